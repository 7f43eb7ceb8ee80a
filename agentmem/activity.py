"""Whether somebody is chatting with this engine right now, and for how long nobody has.

Knows the turns of this process by their number only. It refuses to know what they say and what is done in the silence:
background.py waits for it, chat.py marks its turns.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["Activity"]


class Activity:
    """Counts the turns under way. Safe from any thread; ``now`` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._changed = threading.Condition()
        self._turns = 0
        self._last = now()
        _OPEN.add(self)

    @contextmanager
    def chatting(self) -> Generator[None]:
        """Around one turn, a streamed one as long as its pieces come. Turns may overlap."""
        with self._changed:
            self._turns += 1
            self._last = self._now()
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._turns = max(0, self._turns - 1)  # a child that was forked in a turn began with none
                self._last = self._now()
                self._changed.notify_all()

    def touch(self) -> None:
        """Something else than a turn was asked of this engine: the silence begins anew."""
        with self._changed:
            self._last = self._now()

    def busy(self) -> bool:
        """Whether a turn is under way."""
        return self._turns > 0

    def waiting(self) -> bool:
        """Whether a turn waits for the machine, so that work in the background has to stop: the same as `busy`."""
        return self.busy()

    def quiet_s(self) -> float:
        """Seconds since the last turn ended (before the first: since this was made); 0 during a turn."""
        with self._changed:
            return 0.0 if self._turns else max(0.0, self._now() - self._last)

    def until(self, busy: bool, timeout: float) -> bool:
        """Sleep until a turn is under way (``busy``) or none is, at most ``timeout`` seconds; whether it came so."""
        with self._changed:
            return self._changed.wait_for(lambda: self.busy() is busy, timeout)

    def renew_lock(self) -> None:
        """For a forked child: the threads that held the lock, or were in a turn, do not exist there."""
        self._changed = threading.Condition()
        self._turns = 0


_OPEN: weakref.WeakSet[Activity] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for activity in list(_OPEN):
        activity.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
