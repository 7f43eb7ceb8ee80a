"""Which slot of a llama-server answers a request, what each was left holding, and when one is erased.

Sends nothing itself: each step yields a `Call` and is given the reply, so that one text serves sync and async. Saving
and restoring a slot is `_llamacpp_files.py`'s, facts of the server are `_llamacpp_server.py`'s.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from agentmem.errors import AgentMemError
from agentmem.provider import Generation

from ._llamacpp_files import REUSED, Live, SlotFiles, Turn, common
from ._llamacpp_server import Call, Json, LlamaServer, Process

__all__ = ["SlotPlanner"]

logger = logging.getLogger("agentmem")


class SlotPlanner:
    """The slots of one llama-server. ``id_slot`` is the only one to use, if there is one."""

    def __init__(self, name: str, asked: LlamaServer, files: SlotFiles, *, id_slot: int | None = None) -> None:
        self._name = name
        self._asked = asked
        self._files = files
        self._only = id_slot
        self._lock = threading.RLock()  # a stream that is left may be closed by the collector at any point
        self._live: dict[int, Live] = {}
        self._used: dict[int, float] = {}
        self._busy: dict[int, int] = {}
        self._uses: dict[int, int] = {}

    # ---- before a request

    def before(self, turn: Turn) -> Generator[Call, Any, None]:
        """Fill in ``turn``. An error leaves it as far as it got, which is always safe to send."""
        turn.fields["cache_prompt"] = False  # until it is sure what the slot holds
        slots = turn.slots
        server = yield from self._asked.known(self._forget)
        states = yield from self._states(server)
        loras, pinned = yield from self._asked.loras(server, turn.request)
        if pinned is not None:
            turn.pin = {"lora": pinned}
            turn.fields["lora"] = pinned
        turn.prefix = yield from self._asked.prefix(turn.request)
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
        have = common(held.tokens, turn.prefix) if held is not None else 0
        # From here on the slot holds a prefix of this tenant under these LoRAs and nothing else.
        turn.fields["cache_prompt"] = True
        self._live[slot] = turn.live
        if facts is None or not slots.helps(facts):
            return
        turn.facts = facts
        yield from self._files.exchange(turn, have)

    def _forget(self) -> None:
        with self._lock:
            self._live.clear()

    def _states(self, server: Process) -> Generator[Call, Any, dict[int, Json] | None]:
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

    def _choose(self, turn: Turn, server: Process, states: Mapping[int, Json] | None, loras: str) -> bool:
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
                shared = common(live.tokens, turn.prefix)
                return shared if shared >= 0.8 * len(live.tokens) else 0

            slot = min(idle or among, key=lambda slot: (-goes_on(slot), self._used.get(slot, 0.0)))
            self._used[slot] = time.monotonic()
            self._busy[slot] = self._busy.get(slot, 0) + 1
            self._uses[slot] = turn.use = self._uses.get(slot, 0) + 1
            turn.slot = slot
            return bool(idle)

    def _facts(self, server: Process, loras: str, turn: Turn) -> Generator[Call, Any, dict[str, str | int] | None]:
        """All that a slot depends on beside its tokens, or None where that can't be known for sure."""
        if server.facts is None or "?" in loras:
            return None
        if loras not in server.probes:
            server.probes[loras] = None  # one try per process: what fails once fails again
            slot = 0 if self._only is None else self._only
            self._live[slot] = Live((), b"", "?")  # nobody's: erased before its next use
            server.probes[loras] = yield from self._asked.probe(slot, turn.pin)
        probe = server.probes[loras]
        return None if probe is None else {**server.facts, "loras": loras, "probe": probe}

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
            self._files.reused(turn, cached)
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
