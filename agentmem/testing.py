"""Test doubles and the conformance suite for providers, for our tests and for those of third parties.

Knows the contracts and nothing of any real provider. pytest is only needed to run the suite.
"""

# ruff: noqa: D102 - the names of the suite's tests say what they claim
from __future__ import annotations

import asyncio
import datetime as dt
import inspect
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ConfigError, Rejected
from .provider import Capabilities, Generation, LoraRef, Options, Provider, Request, split_name
from .types import Message, Segment, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .plaintext.embed import HashEmbedder

__all__ = ["FakeClock", "HashEmbedder", "ProviderSuite", "ScriptedProvider", "chat_request"]

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    if name == "HashEmbedder":  # loads numpy, which nothing else here needs
        from .plaintext.embed import HashEmbedder

        return HashEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        return _last(self.stream(request))

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
        from .plaintext.embed import HashEmbedder

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


def _last(pieces: Iterable[str | Generation]) -> Generation:
    whole = [piece for piece in pieces if isinstance(piece, Generation)]
    assert len(whole) == 1, f"a stream ends with one Generation, not {len(whole)}"
    return whole[0]


class ProviderSuite:
    """What every provider must do. Subclass it as ``Test...`` and give a pytest fixture ``provider``, fresh per test.

    Turn the class variables off where the model behind the fixture can't show something.
    """

    #: The same request at temperature 0 gives the same text.
    deterministic = True
    #: A repeated long prompt is reported as cached (only asked where ``kv`` is not "none").
    reports_cached = True
    #: Words of the long system text that is to be cached.
    prefix_words = 200
    #: Tokens asked for in an answer.
    max_tokens = 12

    def request(self, text: str = "Say hello to me.", *, system: str | None = None, **options: Any) -> Request:
        """A small request that any chat model can answer, as repeatable as the provider allows."""
        chosen = {"max_tokens": self.max_tokens, "temperature": 0.0, "seed": 7, **options}
        return chat_request(text, system=system, cache_key="suite", **chosen)

    def test_keeps_to_the_protocol(self, provider: Provider) -> None:
        assert isinstance(provider, Provider)
        scheme, model = split_name(provider.name)
        assert scheme, provider.name
        assert model, f"name {provider.name!r} is not 'scheme:model'"
        for face in ("generate", "stream", "embed"):
            sync, other = getattr(provider, face), getattr(provider, f"a{face}")
            assert list(inspect.signature(sync).parameters) == list(inspect.signature(other).parameters)

    def test_generate_returns_text_and_usage(self, provider: Provider) -> None:
        reply = provider.generate(self.request())
        assert isinstance(reply, Generation)
        assert reply.text.strip()
        assert reply.finish_reason
        self._check_usage(reply.usage)

    def test_stream_gives_the_text_of_generate(self, provider: Provider) -> None:
        provider.generate(self.request())  # some engines give other low bits while their cache is cold
        pieces = list(provider.stream(self.request()))
        whole = _last(pieces)
        assert pieces[-1] is whole
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == whole.text
        self._check_usage(whole.usage)
        assert whole.usage.first_token_s is None or 0 <= whole.usage.first_token_s <= whole.usage.total_s
        if self.deterministic:
            assert whole.text == provider.generate(self.request()).text

    def test_async_gives_the_text_of_sync(self, provider: Provider) -> None:
        provider.generate(self.request())
        expected = provider.generate(self.request())

        async def both() -> tuple[Generation, list[str | Generation]]:
            reply = await provider.agenerate(self.request())
            return reply, [piece async for piece in provider.astream(self.request())]

        reply, pieces = self._run(provider, both)
        self._check_usage(reply.usage)
        assert "".join(piece for piece in pieces if isinstance(piece, str)) == _last(pieces).text
        if self.deterministic:
            assert reply.text == expected.text == _last(pieces).text

    def test_a_repeated_prefix_is_cached(self, provider: Provider) -> None:
        system = " ".join(f"Rule {n} stands." for n in range(self.prefix_words // 3))
        first = provider.generate(self.request("What is rule one?", system=system)).usage
        second = provider.generate(self.request("What is rule two?", system=system)).usage
        self._check_usage(first)
        self._check_usage(second)
        if provider.capabilities.kv == "none":
            assert (first.cached_tokens, second.cached_tokens) == (0, 0)
        elif self.reports_cached:
            assert second.cached_tokens > second.input_tokens // 2

    def test_max_tokens_zero_generates_no_text(self, provider: Provider) -> None:
        reply = provider.generate(self.request(max_tokens=0))
        assert reply.text == ""
        assert reply.usage.input_tokens > 0
        pieces = list(provider.stream(self.request(max_tokens=0)))
        assert [type(piece) for piece in pieces] == [Generation]

    def test_max_tokens_limits_the_answer(self, provider: Provider) -> None:
        assert provider.generate(self.request(max_tokens=2)).usage.output_tokens <= 2

    def test_stop_texts_end_the_answer_before_them(self, provider: Provider) -> None:
        if not self.deterministic:
            return
        provider.generate(self.request())
        whole = provider.generate(self.request()).text
        words = whole.split()
        stop = words[1] if len(words) > 1 else words[0]
        cut = provider.generate(self.request(stop=(stop,))).text
        assert stop not in cut
        assert whole.startswith(cut.rstrip())

    def test_a_stream_may_be_left_early(self, provider: Provider) -> None:
        stream = provider.stream(self.request())
        with closing(stream):  # type: ignore[type-var]
            assert isinstance(next(stream), str)

        async def leave() -> None:
            pieces = provider.astream(self.request())
            async for _ in pieces:
                break
            await pieces.aclose()  # type: ignore[attr-defined]

        assert provider.generate(self.request()).text
        self._run(provider, leave)

    def test_threads_may_share_it(self, provider: Provider) -> None:
        with ThreadPoolExecutor(4) as pool:
            replies = list(pool.map(lambda n: provider.generate(self.request(f"Count to {n}.")), range(4)))
        assert all(reply.text for reply in replies)

    def test_capabilities_are_the_truth(self, provider: Provider) -> None:
        import pytest

        can = provider.capabilities
        if not can.embeds:
            with pytest.raises(ConfigError):
                provider.embed(["a"])
            with pytest.raises(ConfigError):
                self._run(provider, lambda: provider.aembed(["a"]))
        if not can.trains:
            with pytest.raises(ConfigError):
                provider.tensors()
        if not can.loras:
            lora = LoraRef(name="none", digest="00", path="/nowhere")
            with pytest.raises(ConfigError):
                provider.generate(replace(self.request(), loras=(lora,)))

    def test_embeddings_are_rows_of_one_length(self, provider: Provider) -> None:
        if not provider.capabilities.embeds:
            return
        import numpy as np

        texts = ["a red apple", "the sea at night", "a red apple"]
        rows = provider.embed(texts)
        assert rows.shape[0] == len(texts)
        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert np.allclose(rows[0], rows[2], atol=1e-3)
        assert not np.allclose(rows[0], rows[1], atol=1e-3)
        assert np.allclose(self._run(provider, lambda: provider.aembed(texts)), rows, atol=1e-3)
        assert provider.embed([]).shape[0] == 0

    def test_tokens_are_counted(self, provider: Provider) -> None:
        assert provider.count_tokens("") == 0
        assert 0 < provider.count_tokens("one two") < provider.count_tokens("one two " * 50)

    def test_close_may_be_called_again(self, provider: Provider) -> None:
        provider.generate(self.request())
        provider.close()
        provider.close()

    def _check_usage(self, usage: Usage) -> None:
        assert usage.input_tokens > 0
        assert 0 <= usage.cached_tokens <= usage.input_tokens
        assert 0 <= usage.written_tokens <= usage.input_tokens
        assert usage.output_tokens >= 0
        assert usage.total_s >= 0

    def _run(self, provider: Provider, work: Callable[[], Awaitable[T]]) -> T:
        """Run in a new event loop; a provider that has ``aclose`` gets its connections of that loop closed there."""

        async def inside() -> T:
            try:
                return await work()
            finally:
                if (aclose := getattr(provider, "aclose", None)) is not None:
                    await aclose()

        return asyncio.run(inside())
