"""Whether somebody is chatting with this engine right now, and for how long nobody has.

Knows the turns of this process by their signs of life only. It refuses to know what they say and what is done in the
silence: background.py waits for it, chat.py and wrapped_turns.py mark their turns.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager

__all__ = ["Activity", "Turn"]

#: Seconds without a sign of life after which a turn is given up for lost: longer than any answer is waited for. A
#: stream that is held open and read no further must not keep work waiting for ever.
LOST_S = 3600.0


class Turn:
    """One turn under way: until `end`, or until nobody holds this any more."""

    def __init__(self, activity: Activity) -> None:
        self._activity = activity
        self.last = 0.0
        self.heard()

    def heard(self) -> None:
        """A sign of life: the turn begins, or a piece of its answer was taken."""
        self.last = self._activity.touch()

    def end(self) -> None:
        """The turn is over. Safe to call twice."""
        self._activity.ended(self)


class Activity:
    """Knows the turns under way. Safe from any thread; ``now`` is a monotonic clock in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._turns: weakref.WeakSet[Turn] = weakref.WeakSet()
        self._last = now()
        _OPEN.add(self)

    def begin(self) -> Turn:
        """A turn begins. Turns may overlap."""
        turn = Turn(self)
        with self._lock:
            self._turns.add(turn)
        return turn

    def ended(self, turn: Turn) -> None:
        """This turn is over; again, or in a child that was forked in it, that changes nothing."""
        with self._lock:
            if turn not in self._turns:
                return
            self._turns.discard(turn)
        self.touch()

    @contextmanager
    def chatting(self) -> Generator[Turn]:
        """Around one turn, a streamed one as long as its pieces come."""
        turn = self.begin()
        try:
            yield turn
        finally:
            turn.end()

    def touch(self) -> float:
        """Something happened: the silence begins anew. Returns the moment."""
        self._last = self._now()
        return self._last

    def busy(self) -> bool:
        """Whether a turn is under way that showed a sign of life within the last hour."""
        with self._lock:
            turns = list(self._turns)
        return any(self._now() - turn.last < LOST_S for turn in turns)

    def waiting(self) -> bool:
        """Whether a turn waits for the machine, so that work in the background has to stop: the same as `busy`."""
        return self.busy()

    def quiet_s(self) -> float:
        """Seconds since the last turn ended or showed a sign of life (before the first: since this was made); 0 during
        a turn."""
        return 0.0 if self.busy() else max(0.0, self._now() - self._last)

    def renew_lock(self) -> None:
        """For a forked child: the threads that held the lock, or were in a turn, do not exist there."""
        self._lock = threading.Lock()
        self._turns = weakref.WeakSet()


_OPEN: weakref.WeakSet[Activity] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for activity in list(_OPEN):
        activity.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
