"""What a llama-server is and how it reads a prompt: its process, its model and LoRAs, the tokens of a prefix.

Knows the server's routes; sends nothing itself: each step yields a `Call` and is given the reply, so that one text
serves sync and async. Facts are asked once per process of the server.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from agentmem.activation.identity import file_digest
from agentmem.errors import AgentMemError, StoreError
from agentmem.provider import Request
from agentmem.types import Segment

from ._llamacpp_loras import scales

__all__ = [
    "LISTED",
    "Call",
    "End",
    "Json",
    "LlamaServer",
    "Process",
    "advance",
    "digest_cache",
    "rendering",
    "tokenizing",
]

logger = logging.getLogger("agentmem")

#: Stands for the turn when the stable prefix is rendered; only what comes before it is used.
MARK = "agentmem-turn-begins-here"
#: Prefilled once per server process and LoRA set; the bytes of its KV are part of the identity, so that whatever
#: changes the numbers (rope, cache types, weights, a LoRA's content) makes old files misses, told or not.
PROBE = "The quick brown fox jumps over the lazy dog, and 12345 more of them do so at night, slowly."
#: Fields of a request that say nothing about its prompt.
SAMPLING = frozenset(("stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop", "cache_prompt"))
#: Tokenize as the server does with a prompt.
AS_PROMPT = {"add_special": True, "parse_special": True}
#: Prefixes whose token ids are kept, so that they are not asked for again.
PREFIXES = 64

Json = Mapping[str, Any]
T = TypeVar("T")


class Call(NamedTuple):
    """One request to the server."""

    method: str
    path: str
    body: Json | None = None


#: Asks which LoRA adapters the server was started with.
LISTED = Call("GET", "/lora-adapters")


@dataclass
class End(Generic[T]):
    """What the steps came to."""

    value: T


def advance(steps: Generator[Call, Any, T], reply: Any, failure: AgentMemError | None) -> Call | End[T]:
    """The next call that the steps ask for, after the reply to the last one or the error it ended in; or their end."""
    try:
        return steps.send(reply) if failure is None else steps.throw(failure)
    except StopIteration as end:
        return End(end.value)


@dataclass
class Process:
    """One process of the server, as /props tells it."""

    mark: str
    slots: int
    facts: dict[str, str | int] | None
    adapters: bool
    #: The probe's checksum by LoRA set; None where it could not be made.
    probes: dict[str, str | None] = field(default_factory=dict)


def _prompt_fields(body: Json) -> dict[str, Any]:
    """What of a request's body says something about its prompt."""
    return {name: value for name, value in body.items() if name not in SAMPLING}


def rendering(body: Json) -> Call:
    """The call that asks for the prompt that the server makes of a request's body: ``prompt`` of its reply."""
    return Call("POST", "/apply-template", _prompt_fields(body))


def tokenizing(prompt: str) -> Call:
    """The call that asks for a prompt's tokens: ``tokens`` of its reply."""
    return Call("POST", "/tokenize", {"content": prompt, **AS_PROMPT})


class LlamaServer:
    """One llama-server. ``build`` makes a request's body; ``told`` are facts that the user states."""

    def __init__(
        self,
        name: str,
        folder: Path,
        build: Callable[[Request], dict[str, Any]],
        *,
        told: Mapping[str, str | int],
        model_file: Path | None = None,
        cache: Path | None = None,
    ) -> None:
        self._name = name
        self._folder = folder
        self._build = build
        self._told = dict(told)
        self._model_file = model_file
        self._cache = cache
        self._lock = threading.RLock()
        self._server: Process | None = None
        self._prefixes: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    def known(self, restarted: Callable[[], None]) -> Generator[Call, Any, Process]:
        """The server as it is now. ``restarted`` is called before anyone can see that it is another process."""
        props = yield Call("GET", "/props")
        mark = str(props.get("media_marker") or "")  # made anew by each process of the server
        with self._lock:
            server = self._server
        if server is not None and mark and server.mark == mark:
            return server
        window = int(props["default_generation_settings"]["n_ctx"])
        adapters = yield LISTED
        facts: dict[str, str | int] | None = None
        path = self._model_file or Path(str(props.get("model_path") or ""))
        try:
            facts = {
                "model": file_digest(path, self._cache),
                "build": str(props.get("build_info") or ""),
                "context": window,
                "slots": int(props["total_slots"]),
                **self._told,
            }
        except StoreError as error:
            logger.warning(
                "%s: its slots are neither saved nor restored, the model can't be identified (%s); "
                "the setting model_file names its file",
                self._name,
                error,
            )
        server = Process(mark, int(props["total_slots"]), facts, bool(adapters))
        with self._lock:
            if self._server is not None and not mark:  # an older build does not tell: the planner finds out
                server.probes = self._server.probes
            elif self._server is not None:
                logger.info("%s: the server was started again", self._name)
                restarted()
            self._server = server
        return server

    def loras(self, server: Process, request: Request) -> Generator[Call, Any, tuple[str, list[Json] | None]]:
        """What the request is computed under: a digest per adapter and scale, and the list to pin it by.

        Setting the server's scales leaves the states in its slots as they are, so every request names its own.
        """
        if not server.adapters:
            return "", None
        told = yield LISTED
        asked = scales(told, request.loras, request.options.extra.get("lora"))
        known: list[str] = []
        for adapter in told:
            if scale := asked.get(int(adapter["id"]), 0.0):
                try:
                    digest = file_digest(Path(adapter["path"]), self._cache)
                except StoreError:
                    digest = f"?{adapter['path']}"  # told apart while the server runs, never saved
                known.append(f"{digest}*{scale!r}")
        return ",".join(sorted(known)), [{"id": one, "scale": scale} for one, scale in sorted(asked.items())]

    def prefix(self, request: Request) -> Generator[Call, Any, tuple[int, ...]]:
        """The token ids of the stable prefix, without the last one: the text behind it may change how it is cut."""
        stable = tuple(segment for segment in request.segments if segment.stable)
        rest = [message for segment in request.segments if not segment.stable for message in segment.messages]
        if not stable or not rest:
            return ()
        named = None if rest[0].role == "user" else rest[0].name
        mark = rest[0].model_copy(update={"content": MARK, "name": named, "images": ()})
        shown = replace(request, segments=(*stable, Segment(name="turn", messages=(mark,), stable=False)))
        body = _prompt_fields(self._build(shown))
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                return self._prefixes[key]
        text: str = (yield rendering(body))["prompt"]
        cut = text.rfind(MARK)
        reply = yield tokenizing(text[: max(cut, 0)])
        tokens = tuple(int(token) for token in reply["tokens"][:-1])
        with self._lock:
            self._prefixes[key] = tokens
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        return tokens

    def probe(self, slot: int, pin: Json) -> Generator[Call, Any, str | None]:
        """Prefill a constant text in this slot, save that, and take the file's digest: the numbers themselves. None if
        that can't be done."""
        file = f"agentmem-probe-{secrets.token_hex(8)}.slot"
        try:
            ids = (yield Call("POST", "/tokenize", {"content": PROBE, "add_special": True}))["tokens"]
            body = {"prompt": ids, "n_predict": 0, "cache_prompt": False, "id_slot": slot, **pin}
            yield Call("POST", "/completion", body)
            yield Call("POST", f"/slots/{slot}?action=save", {"filename": file})
            try:
                return file_digest(self._folder / file)
            finally:
                (self._folder / file).unlink(missing_ok=True)
        except (AgentMemError, OSError) as error:
            logger.warning(
                "%s: its slots are neither saved nor restored, a trial save failed: is slot_dir (%s) the folder that "
                "llama-server was started with as --slot-save-path, and may we write there? (%s)",
                self._name,
                self._folder,
                error,
            )
            return None


def digest_cache() -> Path:
    """Where the digests of model files are kept, as for local models."""
    return Path(os.environ.get("AGENTMEM_CACHE") or "~/.cache/agentmem").expanduser()
