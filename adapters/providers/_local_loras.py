"""The LoRA versions of one loaded model while it answers: put on it for a pass, taken off when they are forgotten.

Knows which of a request's versions shape the states of its prompt and from which token on the others act; how they are
loaded and added is parametric/lora.py's, which is imported when the first one is used.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agentmem.errors import NotFound, Unavailable
from agentmem.provider import LoraRef

if TYPE_CHECKING:
    from agentmem.parametric.lora import Switch

__all__ = ["Loras", "Starts", "calls", "plain"]

log = logging.getLogger("agentmem")

#: Of each invocation where its LoRAs begin to act in a pass: one position for all rows, or one for each.
Starts = Mapping[tuple[int, ...], Sequence[int]]


def plain(refs: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    """Those that act on every token, so that KV pages of the prompt are made under them."""
    return tuple(ref for ref in refs if not ref.activated)


def calls(refs: Sequence[LoraRef], tokens: Sequence[int]) -> dict[tuple[int, ...], int]:
    """Where in a prompt the activated ones are called: the last place of their tokens. Logs those that are not."""
    from agentmem.parametric.deltas import last_start

    found: dict[tuple[int, ...], int] = {}
    for ref in refs:
        if ref.activated and ref.activated not in found:
            start = last_start(tokens, ref.activated)
            if start is None:
                log.warning("%s does not act: the prompt doesn't hold the tokens that call it", ref.name)
            found[ref.activated] = sys.maxsize if start is None else start
    return found


class Loras:
    """Puts versions on ``model`` under ``lock``, which every pass of it holds. ``ram`` bounds what stays loaded."""

    def __init__(self, model: Any, identity: bytes, lock: threading.RLock, ram: int | None) -> None:
        self._model = model
        self._identity = identity
        self._lock = lock
        self._ram = ram
        self._made: Switch | None = None

    def present(self, refs: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
        """Those whose files are there. A version may be forgotten between a request's making and its first pass."""
        found = tuple(ref for ref in refs if _there(ref))
        if len(found) < len(refs):
            gone = ", ".join(ref.name for ref in refs if ref not in found)
            log.warning("answered without %s, which was forgotten meanwhile", gone)
        return found

    @contextlib.contextmanager
    def acting(self, refs: Sequence[LoraRef], starts: Starts) -> Generator[None]:
        """Inside, passes are made under these versions. The caller holds the lock.

        Raises `Unavailable` for a version that was forgotten since the answer began.
        """
        if self._made is None and not refs:
            yield
            return
        switch = self._switch()
        try:
            switch.activate(refs)
        except NotFound as error:
            raise Unavailable("a LoRA version was forgotten while it answered: ask again") from error
        try:
            with switch.reach.told(starts):
                yield
        finally:
            switch.settle()

    @contextlib.contextmanager
    def rows(self, refs: Sequence[Sequence[LoraRef]], starts: Starts) -> Generator[None]:
        """As `acting`, for passes of ``len(refs)`` rows, each under versions of its own."""
        if not any(refs):
            with self.acting((), {}):
                yield
            return
        switch = self._switch()
        try:
            with switch.rows(refs), switch.reach.told(starts):
                yield
        except NotFound as error:
            raise Unavailable("a LoRA version was forgotten while it answered: ask again") from error
        finally:
            switch.settle()

    def drop(self, digests: Sequence[str]) -> None:
        """Let go of these versions. One that acts in a pass of this moment goes when the pass is done: nobody waits."""
        switch = self._made
        if switch is None:
            return
        switch.drop(digests)
        # Not long: a training run holds the lock for minutes, but has taken all versions off before.
        if self._lock.acquire(timeout=0.05):
            try:
                switch.settle()
            finally:
                self._lock.release()

    def _switch(self) -> Switch:
        if self._made is None:
            from agentmem.parametric.lora import LOADED_BYTES, Switch

            budget = LOADED_BYTES if self._ram is None else self._ram
            self._made = Switch(self._model, identity=self._identity, budget=budget)
        return self._made


def _there(ref: LoraRef) -> bool:
    from agentmem.parametric.lora import there

    return there(ref)
