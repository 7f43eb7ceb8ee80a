"""Restores and saves the slot of one request, beside what is known of that request while it runs.

Knows nothing of stored files beyond `agentmem.provider.Slots`; sends nothing itself, each step yields a `Call`. What
the server says it did is never believed: a restore counts by the cached tokens of the next call.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentmem.errors import AgentMemError, StoreError
from agentmem.provider import Request, SavedSlot, Slots

from ._llamacpp_server import Call, Json

__all__ = ["REUSED", "Live", "SlotFiles", "Turn", "common"]

logger = logging.getLogger("agentmem")

#: A restore counts as reused if this share of its tokens was. The last token is always computed again.
REUSED = 0.9


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


class SlotFiles:
    """The files of one server's slots, in the folder where it saves them."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        #: The last prefix that could not be saved, by tenant and LoRA set.
        self._tried: dict[tuple[bytes, str], tuple[int, ...]] = {}

    def exchange(self, turn: Turn, have: int) -> Generator[Call, Any, None]:
        """Restore the best saved file if the slot holds less than it, ``have`` tokens; save a prefix that has grown."""
        best = yield from self._restored(turn, have)
        # What could not be saved is not tried again at every turn.
        tried = self._tried.get((turn.slots.tenant, str(turn.facts["loras"])), ())
        known = max(best.tokens if best else 0, common(tried, turn.prefix))
        if len(turn.prefix) - known >= turn.slots.step:
            yield from self._saved(turn, best)

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
        if turn.restored and not self.reused(turn, turn.cached):
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

    def reused(self, turn: Turn, cached: int) -> bool:
        """True if a restore shows in the cached tokens of the call after it; else that is told."""
        if cached >= REUSED * turn.restored - 1:
            return True
        turn.miss = f"the server restored {turn.restored} tokens and reused {cached} of them"
        logger.warning("%s: %s", self._name, turn.miss)
        return False


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
