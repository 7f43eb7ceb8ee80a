"""Which slot of a llama-server answers a request, and when slots are saved, restored and erased.

Knows the server's routes and what its slots were left holding; sends nothing itself: each step yields a `Call` and is
given the reply, so that one text serves sync and async. Knows nothing of stored files beyond `agentmem.provider.Slots`.
What the server says it did is never believed: a restore counts by the cached tokens of the next call.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from agentmem.activation.identity import file_digest
from agentmem.errors import AgentMemError, StoreError
from agentmem.provider import Generation, Request, SavedSlot, Slots
from agentmem.types import Segment

__all__ = ["Call", "End", "SlotPlanner", "Turn", "advance", "digest_cache"]

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
#: A restore counts as reused if this share of its tokens was. The last token is always computed again.
REUSED = 0.9

Json = Mapping[str, Any]
T = TypeVar("T")


class Call(NamedTuple):
    """One request to the server."""

    method: str
    path: str
    body: Json | None = None


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
class Live:
    """What a slot was left holding, as far as we know. ``count`` is what /slots should say; None while that is open."""

    tokens: tuple[int, ...]
    tenant: bytes
    loras: str
    count: int | None = None


@dataclass
class Turn:
    """How one request is to be sent: in which slot, with which fields, and what was done before it."""

    request: Request
    slots: Slots
    slot: int = -1
    #: Which use of its slot it is.
    use: int = 0
    #: What the slot will hold once the answer has come; None where others use it at the same time.
    live: Live | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    pin: Json = field(default_factory=dict)
    prefix: tuple[int, ...] = ()
    facts: Mapping[str, str | int] = field(default_factory=dict)
    #: Tokens that a restored file holds.
    restored: int = 0
    #: Cached tokens of the prefill that went before, if one did.
    cached: int | None = None
    #: Wall time that all this took.
    took_s: float = 0.0
    written: int = 0
    miss: str | None = None


@dataclass
class Server:
    """One process of the server, as /props tells it."""

    mark: str
    slots: int
    facts: dict[str, str | int] | None
    adapters: bool
    #: The probe's checksum by LoRA set; None where it could not be made.
    probes: dict[str, str | None] = field(default_factory=dict)


class SlotPlanner:
    """The slots of one llama-server. ``build`` makes a request's body; ``told`` are facts that the user states."""

    def __init__(
        self,
        name: str,
        folder: Path,
        build: Callable[[Request], dict[str, Any]],
        *,
        told: Mapping[str, str | int],
        model_file: Path | None = None,
        id_slot: int | None = None,
        cache: Path | None = None,
    ) -> None:
        self._name = name
        self._folder = folder
        self._build = build
        self._told = dict(told)
        self._model_file = model_file
        self._only = id_slot
        self._cache = cache
        self._lock = threading.RLock()  # a stream that is left may be closed by the collector at any point
        self._server: Server | None = None
        self._live: dict[int, Live] = {}
        self._used: dict[int, float] = {}
        self._busy: dict[int, int] = {}
        self._uses: dict[int, int] = {}
        #: The last prefix that could not be saved, by tenant and LoRA set.
        self._tried: dict[tuple[bytes, str], tuple[int, ...]] = {}
        self._prefixes: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    # ---- before a request

    def before(self, turn: Turn) -> Generator[Call, Any, None]:
        """Fill in ``turn``. An error leaves it as far as it got, which is always safe to send."""
        turn.fields["cache_prompt"] = False  # until it is sure what the slot holds
        slots = turn.slots
        server = yield from self._known_server()
        states = yield from self._states(server)
        loras, pinned = yield from self._loras(server, turn.request)
        if pinned is not None:
            turn.pin = {"lora": pinned}
            turn.fields["lora"] = pinned
        turn.prefix = yield from self._prefix(turn.request)
        idle = self._choose(turn, server, states, loras)
        slot = turn.fields["id_slot"] = turn.slot
        if not idle:
            turn.miss = "every slot of the server was busy"
            return
        held = self._live.pop(slot, None)
        if held is not None and (held.tenant, held.loras) != (slots.tenant, loras):
            logger.info("%s: slot %d held another tenant's or LoRA set's states and is erased", self._name, slot)
            held = None
        turn.live = Live(turn.prefix, slots.tenant, loras)
        if held is None and (states is None or states.get(slot)):
            yield Call("POST", f"/slots/{slot}?action=erase", {})
        facts = (yield from self._facts(server, loras, turn)) if turn.prefix else None
        if self._live.pop(slot, None) is not None:  # the probe was made in this very slot
            yield Call("POST", f"/slots/{slot}?action=erase", {})
            held = None
        have = _common(held.tokens, turn.prefix) if held is not None else 0
        # From here on the slot holds a prefix of this tenant under these LoRAs and nothing else.
        turn.fields["cache_prompt"] = True
        self._live[slot] = turn.live
        if facts is None or not slots.helps(facts):
            return
        turn.facts = facts
        best = yield from self._restored(turn, have)
        # What could not be saved is not tried again at every turn.
        known = max(best.tokens if best else 0, _common(self._tried.get((slots.tenant, loras), ()), turn.prefix))
        if len(turn.prefix) - known >= slots.step:
            yield from self._saved(turn, best)

    def _known_server(self) -> Generator[Call, Any, Server]:
        props = yield Call("GET", "/props")
        mark = str(props.get("media_marker") or "")  # made anew by each process of the server
        with self._lock:
            server = self._server
        if server is not None and mark and server.mark == mark:
            return server
        window = int(props["default_generation_settings"]["n_ctx"])
        adapters = yield Call("GET", "/lora-adapters")
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
        server = Server(mark, int(props["total_slots"]), facts, bool(adapters))
        with self._lock:
            if self._server is not None and not mark:  # an older build does not tell: `_states` finds out
                server.probes = self._server.probes
            elif self._server is not None:
                logger.info("%s: the server was started again", self._name)
                self._live.clear()
            self._server = server
        return server

    def _states(self, server: Server) -> Generator[Call, Any, dict[int, Json] | None]:
        """The state of each slot, ``{}`` for one that holds nothing; None where the server does not tell."""
        try:
            told = yield Call("GET", "/slots")
        except AgentMemError:
            if not server.mark:  # it may be another process each time, and nothing would show it
                server.facts = None
            return None
        states: dict[int, Json] = {}
        same = bool(server.mark)
        for state in told:
            count = state.get("n_prompt_tokens") or 0
            states[state["id"]] = state if count or state.get("is_processing") else {}
            live = self._live.get(state["id"])
            if live is None or live.count is None:
                continue
            if live.count == count:
                same = True
            else:
                self._live.pop(state["id"], None)  # somebody else used it
        if not same:  # no slot is as it was left: it may be another process
            server.probes.clear()
            self._live.clear()
        return states

    def _loras(self, server: Server, request: Request) -> Generator[Call, Any, tuple[str, list[Json] | None]]:
        """What the request is computed under: a digest per adapter and scale, and the list to pin it by.

        Setting the server's scales leaves the states in its slots as they are, so every request names its own.
        """
        if not server.adapters:
            return "", None
        told = yield Call("GET", "/lora-adapters")
        given = request.options.extra.get("lora")
        asked = {int(one["id"]): float(one["scale"]) for one in (told if given is None else given)}
        known: list[str] = []
        for adapter in told:
            if scale := asked.get(int(adapter["id"]), 0.0):
                try:
                    digest = file_digest(Path(adapter["path"]), self._cache)
                except StoreError:
                    digest = f"?{adapter['path']}"  # told apart while the server runs, never saved
                known.append(f"{digest}*{scale!r}")
        return ",".join(sorted(known)), [{"id": one, "scale": scale} for one, scale in sorted(asked.items())]

    def _prefix(self, request: Request) -> Generator[Call, Any, tuple[int, ...]]:
        """The token ids of the stable prefix, without the last one: the text behind it may change how it is cut."""
        stable = tuple(segment for segment in request.segments if segment.stable)
        rest = [message for segment in request.segments if not segment.stable for message in segment.messages]
        if not stable or not rest:
            return ()
        mark = rest[0].model_copy(update={"content": MARK, "name": None if rest[0].role == "user" else rest[0].name})
        shown = replace(request, segments=(*stable, Segment(name="turn", messages=(mark,), stable=False)))
        body = {name: value for name, value in self._build(shown).items() if name not in SAMPLING}
        key = json.dumps(body, sort_keys=True)
        with self._lock:
            if key in self._prefixes:
                self._prefixes.move_to_end(key)
                return self._prefixes[key]
        text: str = (yield Call("POST", "/apply-template", body))["prompt"]
        cut = text.rfind(MARK)
        reply = yield Call("POST", "/tokenize", {"content": text[: max(cut, 0)], **AS_PROMPT})
        tokens = tuple(int(token) for token in reply["tokens"][:-1])
        with self._lock:
            self._prefixes[key] = tokens
            if len(self._prefixes) > PREFIXES:
                self._prefixes.popitem(last=False)
        return tokens

    def _choose(self, turn: Turn, server: Server, states: Mapping[int, Json] | None, loras: str) -> bool:
        """Take a slot, and whether it is idle: the one that this prefix goes on from, else the least recently used.

        A slot whose states would mostly be thrown away is left to its own conversation.
        """
        with self._lock:
            among = list(range(server.slots)) if self._only is None else [self._only]
            idle = [
                slot
                for slot in among
                if not self._busy.get(slot) and not (states or {}).get(slot, {}).get("is_processing")
            ]

            def goes_on(slot: int) -> int:
                live = self._live.get(slot)
                if live is None or (live.tenant, live.loras) != (turn.slots.tenant, loras):
                    return 0
                common = _common(live.tokens, turn.prefix)
                return common if common >= 0.8 * len(live.tokens) else 0

            slot = min(idle or among, key=lambda slot: (-goes_on(slot), self._used.get(slot, 0.0)))
            self._used[slot] = time.monotonic()
            self._busy[slot] = self._busy.get(slot, 0) + 1
            self._uses[slot] = turn.use = self._uses.get(slot, 0) + 1
            turn.slot = slot
            return bool(idle)

    def _facts(self, server: Server, loras: str, turn: Turn) -> Generator[Call, Any, dict[str, str | int] | None]:
        """All that a slot depends on beside its tokens, or None where that can't be known for sure."""
        if server.facts is None or "?" in loras:
            return None
        if loras not in server.probes:
            server.probes[loras] = None  # one try per process: what fails once fails again
            server.probes[loras] = yield from self._probe(turn)
        probe = server.probes[loras]
        return None if probe is None else {**server.facts, "loras": loras, "probe": probe}

    def _probe(self, turn: Turn) -> Generator[Call, Any, str | None]:
        """Prefill a constant text in slot 0, save that, and take the file's digest: the numbers themselves."""
        slot = 0 if self._only is None else self._only
        file = f"agentmem-probe-{secrets.token_hex(8)}.slot"
        try:
            ids = (yield Call("POST", "/tokenize", {"content": PROBE, "add_special": True}))["tokens"]
            body = {"prompt": ids, "n_predict": 0, "cache_prompt": False, "id_slot": slot, **turn.pin}
            self._live.pop(slot, None)
            yield Call("POST", "/completion", body)
            self._live[slot] = Live(tuple(ids), b"", "?")  # nobody's: erased before its next use
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

    def _restored(self, turn: Turn, have: int) -> Generator[Call, Any, SavedSlot | None]:
        """Restore the best saved file if the slot holds less; which file it is, restored or not."""
        slots, slot = turn.slots, turn.slot
        while (best := slots.longest(self._folder, turn.facts, turn.prefix)) is not None and best.tokens > have:
            if not slots.sound(self._folder, turn.facts, turn.prefix, best):
                continue  # put aside: the next best
            try:
                if turn.pin:  # a slot drops what it holds when a request brings other LoRAs than its last one
                    one = {"prompt": list(turn.prefix[:1]), "n_predict": 0, "cache_prompt": False, "id_slot": slot}
                    yield Call("POST", "/completion", {**one, **turn.pin})
                reply = yield Call("POST", f"/slots/{slot}?action=restore", {"filename": best.name})
                if reply.get("n_restored") == best.tokens:
                    turn.restored = best.tokens
                    return best
                why = f"it says {reply.get('n_restored')} tokens of {best.tokens}"
            except AgentMemError as error:
                why = str(error)
            logger.warning("%s: the server did not restore a saved slot, computing anew: %s", self._name, why)
            turn.miss = f"a saved slot could not be restored: {why}"
            slots.discard(self._folder, best.name)
            # A restore that failed may leave half of it behind (ggml-org/llama.cpp issue 27068).
            turn.fields["cache_prompt"] = False
            yield Call("POST", f"/slots/{slot}?action=erase", {})
            turn.fields["cache_prompt"] = True
            have = 0
        return best

    def _saved(self, turn: Turn, best: SavedSlot | None) -> Generator[Call, Any, None]:
        """Prefill the stable prefix alone and save it, before the turn: a file never holds what was only recalled, nor
        an answer, whose records it could not name."""
        slots, slot, prefix, facts = turn.slots, turn.slot, turn.prefix, turn.facts
        segments = [segment for segment in turn.request.segments if segment.stable]
        records = [record for segment in segments for message in segment.messages for record in message.records]
        body = {"prompt": list(prefix), "n_predict": 0, "cache_prompt": True, "id_slot": slot, **turn.pin}
        timings = (yield Call("POST", "/completion", body))["timings"]
        turn.cached = int(timings["cache_n"])
        if turn.restored and not self._reused(turn, turn.cached):
            return
        self._tried[slots.tenant, str(facts["loras"])] = prefix
        name = slots.reserve(self._folder, facts, prefix, records)
        if name is None:
            return
        try:
            reply = yield Call("POST", f"/slots/{slot}?action=save", {"filename": name})
            if reply.get("n_saved") != len(prefix):
                raise StoreError(f"the server saved {reply.get('n_saved')} tokens of {len(prefix)}")
        except AgentMemError as error:
            logger.warning("%s: a slot could not be saved, the chat goes on without it: %s", self._name, error)
            slots.discard(self._folder, name)
            return
        kept = slots.keep(
            self._folder,
            facts,
            prefix,
            size=int(reply["n_written"]),
            head=not any(segment.name == "history" for segment in segments),
            records=records,
            # A conversation that went on needs its longer file only; its head serves others too.
            instead_of=best.name if best is not None and not best.head else None,
        )
        if kept:
            self._tried.pop((slots.tenant, str(facts["loras"])), None)
            turn.written = len(prefix) - (best.tokens if best else 0)

    # ---- after it

    def after(self, turn: Turn, generation: Generation) -> Generation:
        """The generation with what was really reused; notes what the slot holds now and what a restore was worth."""
        usage = generation.usage
        cached = usage.cached_tokens
        if turn.live is not None:
            turn.live.count = usage.input_tokens + max(usage.output_tokens, 1) - 1
            with self._lock:
                if self._uses.get(turn.slot) == turn.use:
                    self._live[turn.slot] = turn.live
                else:  # another request was sent there meanwhile: which of them came last can't be known
                    self._live.pop(turn.slot, None)
        if turn.cached is None and turn.restored:
            self._reused(turn, cached)
        astray = turn.cached is not None and cached < REUSED * len(turn.prefix) - 1
        if astray and turn.miss is None:
            turn.miss = f"of the {len(turn.prefix)} tokens prepared, the server's prompt begins with {cached}"
            logger.warning("%s: %s", self._name, turn.miss)
        if turn.restored or astray:
            turn.slots.judge(turn.facts, helped=turn.miss is None)
            if turn.miss is not None and not turn.slots.helps(turn.facts):
                logger.warning(
                    "%s: restoring slots does not help with this model (hybrid or sliding-window attention): "
                    "its prefixes are only kept warm from now on",
                    self._name,
                )
        if turn.cached is not None:
            usage = usage.model_copy(
                update={
                    "cached_tokens": min(turn.cached, cached),
                    "written_tokens": min(turn.written, usage.input_tokens),
                }
            )
        return replace(generation, usage=usage, miss=turn.miss or generation.miss)

    def _reused(self, turn: Turn, cached: int) -> bool:
        """True if a restore shows in the cached tokens of the call after it; else that is told."""
        if cached >= REUSED * turn.restored - 1:
            return True
        turn.miss = f"the server restored {turn.restored} tokens and reused {cached} of them"
        logger.warning("%s: %s", self._name, turn.miss)
        return False

    def done(self, turn: Turn) -> None:
        """The request is over, however it ended: its slot is free again."""
        if turn.slot < 0:
            return
        with self._lock:
            self._busy[turn.slot] -= 1
            if turn.live is None:
                self._live.pop(turn.slot, None)
        turn.slot = -1

    def erase(self) -> Generator[Call, Any, int]:
        """Erase every slot of the server. Returns how many; one that fails is erased before its next use."""
        with self._lock:
            self._live.clear()
        props = yield Call("GET", "/props")
        erased = 0
        for slot in range(int(props["total_slots"])):
            with contextlib.suppress(AgentMemError):
                yield Call("POST", f"/slots/{slot}?action=erase", {})
                erased += 1
        return erased


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)


def digest_cache() -> Path:
    """Where the digests of model files are kept, as for local models."""
    return Path(os.environ.get("AGENTMEM_CACHE") or "~/.cache/agentmem").expanduser()
