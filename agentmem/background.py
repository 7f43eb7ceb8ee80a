"""Consolidation that nobody waits for: in the silence between chats, on a schedule, or in a worker process.

Knows when to begin and when to give way; what is done is consolidate.py's, who does it is told by the leases of
jobs.py. A chat that begins ends the work within a training step or a layer of the model; it is taken up again later.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from . import consolidate
from .engine import Engine
from .errors import AgentMemError
from .flow import Flow, Generate, Need, Work, run, through
from .jobs import Jobs
from .types import Scope

if TYPE_CHECKING:
    from .planner.values import ConsolidationPlan

__all__ = ["Background", "driven"]

_log = logging.getLogger("agentmem")

T = TypeVar("T")

#: Seconds between two looks whether there is something to do.
POLL_S = 2.0
#: Seconds between two looks into the database while work is under way: is it paused, does another process chat.
LOOK_S = 0.5
#: Seconds of silence after which a schedule takes up again what a chat cut short.
RESUME_S = 5.0
#: Seconds until the next try after a failure, doubled by each further one up to the longest.
BACKOFF_S, LONGEST_S = 10.0, 600.0
#: Seconds that closing waits for the work to give way.
CLOSE_S = 20.0


class Background:
    """Consolidates a folder when it is due: after ``idle_s`` seconds without a chat, or every ``every_s`` seconds.

    Turns of other processes, as the ledger has them, count as this one's do where idleness is waited for. ``told`` is
    called with what each run made. Pausing is the folder's (`Jobs.pause`), for all processes.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        idle_s: float | None = None,
        every_s: float | None = None,
        budget: Mapping[str, float] | None = None,
        told: Callable[[ConsolidationPlan], object] | None = None,
    ) -> None:
        self._engine = engine
        self._jobs = Jobs(engine.database, engine.clock)
        self._idle_s, self._every_s, self._told = idle_s, every_s, told
        self._budget = budget
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._next = time.monotonic()
        self._cut = False
        #: Runs in a row that failed or made nothing though something is due; before when the next one is not tried.
        self._vain = 0
        self._after = 0.0
        self._looked = 0.0
        self._seen = 0
        self._asked_to_stop = False
        #: The newest chat of the ledger, and when it was seen first, by the monotonic clock.
        self._newest = 0, time.monotonic()

    @classmethod
    def started(cls, engine: Engine) -> Background | None:
        """One that runs in a thread of this process, as the settings ask for it; None where they don't."""
        idle_s, every_s = engine.settings.consolidate_idle, engine.settings.consolidate_every
        if idle_s is None and every_s is None:
            return None
        background = cls(engine, idle_s=idle_s, every_s=every_s)
        background.start()
        return background

    # ---- running

    def start(self) -> None:
        """Run in a daemon thread until `close`, or until nobody holds this any more."""
        # The thread holds no more than a weak reference between two looks: a memory that is dropped unclosed must go.
        thread = threading.Thread(target=_loop, args=(weakref.ref(self), self._ending), name="agentmem-background")
        thread.daemon = True
        self._thread = thread
        # At the interpreter's end a thread inside a model's pass would be cut off there.
        weakref.finalize(self, _end, self._ending, thread)
        thread.start()

    def close(self, timeout: float = CLOSE_S) -> bool:
        """End, and wait for the work to give way; whether it has. Safe to call twice."""
        self._ending.set()
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            _log.warning("consolidation in the background did not end within %g s", timeout)
            return False
        return True

    def look(self) -> float:
        """One look: consolidate if it is due. Returns after how many seconds to look again; raises nothing."""
        try:
            wait = self._wait()
            if wait > 0:
                return wait
            made = self.run().moves
        except Exception as error:  # noqa: BLE001 - nobody would hear of it, and the next run may succeed
            if self._ending.is_set():  # the folder was closed under it
                return 0.0
            level = logging.WARNING if isinstance(error, AgentMemError) else logging.ERROR
            _log.log(level, "consolidation in the background failed: %s", error, exc_info=level == logging.ERROR)
            made, self._cut = (), False
        # What can't be made now (it failed, or is beyond the budget) is not tried every second.
        self._vain = 0 if made or self._cut else self._vain + 1
        self._after = time.monotonic() + min(BACKOFF_S * 2 ** (self._vain - 1), LONGEST_S) if self._vain else 0.0
        return self._patience()

    def run(self) -> ConsolidationPlan:
        """Consolidate now, giving way to chats; what was made. Raises what `consolidate` raises."""
        self._seen = self._chats()
        self._looked, self._asked_to_stop = 0.0, False
        begun = time.monotonic()
        try:
            flow = consolidate.consolidate(
                self._engine, Scope(), budget=self._budget, stop=self.stop, quiet_s=self._idle_s or 0.0
            )
            plan = driven(flow, self.stop)
        finally:
            # What was cut short is taken up again in the next silence, not at the next date of the schedule.
            cut = self.stop()
            self._next = time.monotonic() if cut else begun + (self._every_s or 0.0)
            self._cut = cut
        if self._told is not None:
            self._told(plan)
        return plan

    def stop(self) -> bool:
        """Whether work has to give way: a turn of this process is under way, this is closed, the folder is paused, or
        (where idleness is waited for) another process chatted."""
        if self._ending.is_set() or self._engine.activity.waiting():
            return True
        now = time.monotonic()
        if not self._asked_to_stop and now >= self._looked + LOOK_S:
            self._looked = now
            self._asked_to_stop = self._jobs.paused() or (self._idle_s is not None and self._chats() > self._seen)
        return self._asked_to_stop

    # ---- when

    def _wait(self) -> float:
        """Seconds until it is worth another look; 0 where it is time."""
        newest, quiet_s = self._chats(), self._quiet_s()
        new = newest != self._seen  # then there is something else to do than what was tried in vain
        if self._engine.activity.busy() or self._jobs.paused() or (time.monotonic() < self._after and not new):
            return self._patience()
        waits = []
        if self._every_s is not None:
            waits.append(self._next - time.monotonic())
            if self._cut:  # not between two turns of a lively conversation
                waits[-1] = max(waits[-1], min(RESUME_S, self._every_s) - self._engine.activity.quiet_s())
        if self._idle_s is not None:
            waits.append(self._idle_s - quiet_s)
        if min(waits) > 0:
            return min(*waits, POLL_S)
        return 0.0 if consolidate.due(self._engine) else self._patience()

    def _patience(self) -> float:
        return min(POLL_S, *(wait for wait in (self._idle_s, self._every_s) if wait is not None))

    def _quiet_s(self) -> float:
        """Seconds since anybody chatted in this folder, as far as this process saw it: no clock of another counts."""
        newest = self._chats()
        if newest != self._newest[0]:
            self._newest = newest, time.monotonic()
        return min(self._engine.activity.quiet_s(), time.monotonic() - self._newest[1])

    def _chats(self) -> int:
        rows = self._engine.database.query("SELECT id FROM uses WHERE verb = 'chat' ORDER BY id DESC LIMIT 1")
        return int(rows[0]["id"]) if rows else 0


def driven(flow: Flow[T], stop: Callable[[], bool]) -> T:
    """Run a flow to its result in this thread; what it does on the model of this machine ends when ``stop()`` says so.

    The flow is told by `TrainingError`, as where a training is stopped.
    """

    def answered(need: Need) -> Any:
        with _giving_way(need, stop):
            return need.work(stop) if isinstance(need, Work) else need.answer()

    return run(through(flow, lambda need: Work(lambda _: answered(need))))


@contextlib.contextmanager
def _giving_way(need: Need, stop: Callable[[], bool]) -> Generator[None]:
    from .parametric.interruption import asking, giving_way

    with contextlib.ExitStack() as hooked:
        hooked.enter_context(giving_way(stop))
        if isinstance(need, Generate) and need.provider.capabilities.trains:
            hooked.enter_context(asking(need.provider.tensors().model))
        yield


def _loop(background: weakref.ref[Background], ending: threading.Event) -> None:
    while not ending.is_set():
        held = background()
        if held is None:
            return
        wait = held.look()
        del held
        if ending.wait(wait):
            return


def _end(ending: threading.Event, thread: threading.Thread) -> None:
    ending.set()
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join(CLOSE_S)
