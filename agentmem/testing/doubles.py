"""Test doubles that answer as they are told: a scripted provider, a clock that stands still, requests of one turn.

Knows the contracts and nothing of any real provider.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Rejected
from ..provider import Capabilities, Generation, Options, Request
from ..types import Message, Segment, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FakeClock", "ScriptedProvider", "chat_request", "last"]


def chat_request(text: str, *, system: str | None = None, cache_key: str = "", **options: Any) -> Request:
    """A request of one turn: the user's message, after a stable system segment if there is a system text."""
    segments = [Segment(name="turn", messages=(Message(role="user", content=text),), stable=False)]
    if system is not None:
        segments.insert(0, Segment(name="system", messages=(Message(role="system", content=system),), stable=True))
    return Request(segments=tuple(segments), options=Options(**options), cache_key=cache_key)


class FakeClock:
    """A clock that stands still until it is told to move. Call it for Unix seconds."""

    def __init__(self, start: float = 1_700_000_000.0) -> None:
        self._now = start

    def __call__(self) -> float:
        """Now, in Unix seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward; usable in place of ``time.sleep``."""
        self._now += seconds

    def datetime(self) -> dt.datetime:
        """Now, in UTC."""
        return dt.datetime.fromtimestamp(self._now, dt.UTC)


class ScriptedProvider:
    """A provider that answers as it is told. ``requests`` holds every request it got.

    ``replies`` is one answer, given each time, or a list of them, given in order (then `Rejected`). An answer is a
    text; a list of stream pieces, where an exception among them breaks the stream off; a `Generation` (its usage is
    replaced); an exception; or a function of the request that returns one of these. ``max_tokens`` and ``stop`` are
    honoured.

    Tokens are words. Like a hosted prompt cache it remembers, per ``cache_key``, the prompts it saw (up to the last
    stable segment if ``kv="breakpoints"``): ``cached_tokens`` is the real length of the longest common prefix;
    ``kv="none"`` caches nothing.
    """

    def __init__(
        self,
        replies: str | Iterable[Any] | Callable[[Request], Any] | Exception = "ok",
        *,
        name: str = "scripted:test",
        capabilities: Capabilities | None = None,
    ) -> None:
        self.name = name
        self.capabilities = capabilities or Capabilities(chat=True, tools=True, kv="auto", context_tokens=100_000)
        self.requests: list[Request] = []
        self.closed = False
        one = isinstance(replies, (str, Exception, Generation)) or callable(replies)
        self._always: Any = replies if one else None
        self._script: deque[Any] = deque(() if one else replies)  # type: ignore[arg-type]
        self._seen: dict[str, list[list[str]]] = {}
        self._lock = threading.Lock()

    def generate(self, request: Request) -> Generation:
        """The next answer, whole."""
        return last(self.stream(request))

    async def agenerate(self, request: Request) -> Generation:
        """The next answer, whole."""
        last: Generation | None = None
        async for piece in self.astream(request):
            last = piece if isinstance(piece, Generation) else last
        assert last is not None
        return last

    def stream(self, request: Request) -> Iterator[str | Generation]:
        """The next answer, word by word."""
        pieces, whole = self._answer(request)
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece
        yield whole

    async def astream(self, request: Request) -> AsyncIterator[str | Generation]:
        """The next answer, word by word, giving way to other tasks between words."""
        for piece in self.stream(request):
            await asyncio.sleep(0)
            yield piece

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """The hash embedder's vectors, if ``embeds`` is a capability."""
        if not self.capabilities.embeds:
            raise ConfigError(f"{self.name} has no embeddings")
        from ..plaintext.embed import HashEmbedder

        return HashEmbedder().embed(texts)

    async def aembed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """As `embed`."""
        return self.embed(texts)

    def count_tokens(self, text: str) -> int:
        """Words."""
        return len(text.split())

    def tensors(self) -> Any:
        """Always `ConfigError`."""
        raise ConfigError(f"{self.name} gives no weights: only local models can be trained (model='local')")

    def close(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def _answer(self, request: Request) -> tuple[list[str | Exception], Generation]:
        if request.loras and not self.capabilities.loras:
            raise ConfigError(f"{self.name} can't serve LoRA versions")
        with self._lock:
            self.requests.append(request)
            prefill = request.options.max_tokens == 0
            answer = "" if prefill else self._next(request)
            used = self._use(request)
        if isinstance(answer, Exception):
            raise answer
        whole = answer if isinstance(answer, Generation) else Generation(text="", usage=used)
        pieces = list(answer) if isinstance(answer, (list, tuple)) else _words(str(getattr(answer, "text", answer)))
        kept, finish = _limited(pieces, request.options)
        text = "".join(piece for piece in kept if isinstance(piece, str))
        used = used.model_copy(update={"output_tokens": len(text.split())})
        if whole.finish_reason is None or finish != "stop":
            whole = replace(whole, finish_reason=finish)
        return kept, replace(whole, text=text, usage=used)

    def _next(self, request: Request) -> Any:
        if self._always is None and not self._script:
            raise Rejected(f"{self.name}: no reply was scripted for request {len(self.requests)}")
        answer = self._always if self._always is not None else self._script.popleft()
        return answer(request) if callable(answer) and not isinstance(answer, type) else answer

    def _use(self, request: Request) -> Usage:
        prompt, stable = _rendered(request)
        if self.capabilities.kv == "none":
            return Usage(input_tokens=len(prompt))
        seen = self._seen.setdefault(request.cache_key, [])
        common = max((_common(prompt, earlier) for earlier in seen), default=0)
        cached = max(0, min(common, len(prompt) - 1))  # the last token is always computed
        kept = prompt[:stable] if self.capabilities.kv == "breakpoints" else prompt
        seen.append(kept)
        return Usage(input_tokens=len(prompt), cached_tokens=cached, written_tokens=max(0, len(kept) - cached))


def _rendered(request: Request) -> tuple[list[str], int]:
    """The prompt as words, and how many of them end with the last stable segment."""
    words: list[str] = []
    stable = 0
    for tool in request.tools:
        words += ["<tool>", *repr(dict(tool)).split()]
    for segment in request.segments:
        for message in segment.messages:
            words += [f"<{message.role}:{message.name or ''}>", *message.content.split()]
            words += [repr(call) for call in message.tool_calls]
        if segment.stable:
            stable = len(words)
    return words, stable


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def _words(text: str) -> list[str | Exception]:
    return list(re.findall(r"\s*\S+\s*$|\s*\S+", text)) or ([text] if text else [])


def _limited(pieces: Sequence[str | Exception], options: Options) -> tuple[list[str | Exception], str]:
    """The pieces up to the first stop text or the token limit, and the finish reason."""
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    end = min((at for stop in options.stop if (at := text.find(stop)) >= 0), default=len(text))
    finish = "stop"
    if options.max_tokens is not None and (options.max_tokens == 0 or len(text[:end].split()) > options.max_tokens):
        words = [match.end() for match in re.finditer(r"\S+", text)]
        end = words[options.max_tokens - 1] if options.max_tokens else 0
        finish = "length"
    if end == len(text):
        return list(pieces), finish
    kept: list[str | Exception] = []
    for piece in pieces:
        if isinstance(piece, Exception) or end <= 0:  # an error that stood in what is cut off never happens
            return [*kept, piece] if end > 0 else kept, finish
        kept.append(piece[:end])
        end -= len(piece)
    return kept, finish


def last(pieces: Iterable[str | Generation]) -> Generation:
    """The one `Generation` with which a stream ends."""
    whole = [piece for piece in pieces if isinstance(piece, Generation)]
    assert len(whole) == 1, f"a stream ends with one Generation, not {len(whole)}"
    return whole[0]
