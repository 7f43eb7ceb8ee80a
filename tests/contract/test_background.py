"""Consolidation in the background waits for silence, gives way to a chat at once, is paused, and ends with close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from agentmem import AsyncMemory, Memory, consolidate
from agentmem import background as backgrounds
from agentmem import chat as chats
from agentmem.background import Background, driven
from agentmem.errors import StoreError, TrainingError
from agentmem.flow import Flow, Work, local
from agentmem.planner.values import ConsolidationPlan
from agentmem.testing import FakeClock, ScriptedProvider


class Consolidation:
    """Stands in for consolidate.py: work that goes on until it is told to stop, or ``steps`` are done."""

    def __init__(self, steps: int = 10**9) -> None:
        self.steps, self.done = steps, 0
        self.begun, self.ended = threading.Event(), threading.Event()
        self.runs = self.cut = 0
        self.failure: Exception | None = None
        self.is_due, self.never_done = True, False

    def consolidate(self, *_: Any, **__: Any) -> Flow[ConsolidationPlan]:
        self.runs += 1
        self.begun.set()
        if self.failure is not None:
            raise self.failure
        try:
            yield Work(self.work)
        except TrainingError:
            self.cut += 1
        self.ended.set()
        return ConsolidationPlan()

    def work(self, stop: Callable[[], bool]) -> None:
        while self.done < self.steps:
            if stop():
                raise TrainingError("stopped")
            time.sleep(0.002)
            self.done += 1
        self.is_due = self.never_done

    def due(self, _: Any) -> bool:
        return self.is_due


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Consolidation:
    standing = Consolidation()
    monkeypatch.setattr(consolidate, "consolidate", standing.consolidate)
    monkeypatch.setattr(consolidate, "due", standing.due)
    monkeypatch.setattr(backgrounds, "POLL_S", 0.02)
    monkeypatch.setattr(backgrounds, "LOOK_S", 0.02)
    monkeypatch.setattr(backgrounds, "BACKOFF_S", 0.05)
    return standing


@contextlib.contextmanager
def memory(**settings: Any) -> Generator[Memory]:
    with Memory(":memory:", model=ScriptedProvider(), embedder="none", **settings) as opened:
        yield opened


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def test_nothing_runs_unless_it_is_asked_for(work: Consolidation) -> None:
    with memory() as mem:
        mem.chat("Hello.")
        assert Background.started(mem._engine) is None
        time.sleep(0.1)
    assert not work.runs


def test_it_runs_in_the_silence_and_not_before(work: Consolidation) -> None:
    with memory(consolidate_idle=0.3) as mem:
        begun = time.monotonic()
        while time.monotonic() < begun + 0.6:  # nobody is silent
            mem.chat("Hello.")
            assert not work.runs or time.monotonic() > begun + 0.3 + 0.3
        assert work.begun.wait(20)
        assert work.runs == 1


def test_a_chat_stops_it_and_the_silence_after_it_takes_it_up(work: Consolidation) -> None:
    with memory(consolidate_idle=0.05) as mem:
        assert work.begun.wait(20)
        mem.chat("Hello.")  # answers though the work would go on for ever
        assert work.ended.wait(20)
        assert work.cut == 1
        done = work.done
        work.steps = done + 5
        until(lambda: not work.is_due)
        assert work.done == done + 5
        runs = work.runs
        time.sleep(0.2)
        assert work.runs == runs  # nothing is due any more


def test_it_gives_way_while_the_answer_is_awaited(work: Consolidation) -> None:
    """The turn is the one that the provider answers at this moment, not one that ended."""
    stopped: list[bool] = []

    def answer(_: Any) -> str:
        stopped.append(work.ended.wait(20))
        return "Here."

    provider = ScriptedProvider(answer)
    with Memory(":memory:", model=provider, embedder="none", consolidate_idle=0.05) as mem:
        assert work.begun.wait(20)
        mem.chat("Hello.")
    assert stopped == [True]


def test_a_stream_keeps_it_waiting_until_its_last_piece(work: Consolidation) -> None:
    with memory(consolidate_idle=0.05) as mem:
        assert work.begun.wait(20)
        stream = mem.chat("Hello.", stream=True)
        pieces = iter(stream)
        next(pieces)
        assert work.ended.wait(20)
        runs = work.runs
        time.sleep(0.3)
        assert work.runs == runs
        assert list(pieces) == []
        until(lambda: work.runs > runs)


def test_a_schedule_needs_no_silence_but_gives_way_too(work: Consolidation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backgrounds, "RESUME_S", 0.05)
    provider = ScriptedProvider(lambda _: f"stopped: {work.ended.wait(20)}")
    with Memory(":memory:", model=provider, embedder="none", consolidate_every=0.2) as mem:
        assert work.begun.wait(20)
        assert mem.chat("Hello.").text == "stopped: True"
        until(lambda: work.runs == 2)  # what was cut short is taken up again
        work.steps = work.done
        until(lambda: not work.is_due)
        work.is_due, before = True, work.runs
        work.steps = work.done
        until(lambda: work.runs > before)


def test_pausing_holds_for_all_processes_and_resuming_goes_on(work: Consolidation, tmp_path: Path) -> None:
    with (
        Memory(tmp_path / "m", model=ScriptedProvider(), embedder="none", consolidate_idle=0.05) as mem,
        Memory(tmp_path / "m", embedder="none") as other,
    ):
        assert work.begun.wait(20)
        other.pause_consolidation()
        assert work.ended.wait(20)  # also what is under way ends
        time.sleep(0.1)
        runs = work.runs
        time.sleep(0.3)
        assert work.runs == runs
        other.resume_consolidation()
        until(lambda: work.runs > runs)
        del mem


def test_chats_of_another_process_count_as_ones_own(work: Consolidation, tmp_path: Path) -> None:
    with (
        Memory(tmp_path / "m", embedder="none", model=ScriptedProvider(), consolidate_idle=0.2),
        Memory(tmp_path / "m", embedder="none", model=ScriptedProvider()) as other,
    ):
        assert work.begun.wait(20)
        other.chat("Hello.")
        assert work.ended.wait(20)
        runs, begun = work.runs, time.monotonic()
        until(lambda: work.runs > runs)
        assert time.monotonic() - begun > 0.1


def test_closing_ends_it_promptly(work: Consolidation) -> None:
    with memory(consolidate_idle=0.02):
        assert work.begun.wait(20)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert work.cut == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "agentmem-background"]


async def test_the_asynchronous_face_runs_and_ends_it_too(work: Consolidation) -> None:
    async with AsyncMemory(":memory:", model=ScriptedProvider(), embedder="none", consolidate_idle=0.02) as mem:
        await mem.add("I live in Porto.")
        assert await asyncio.to_thread(work.begun.wait, 20)
        await mem.chat("Hello.")
    assert work.cut >= 1
    assert not [thread for thread in threading.enumerate() if thread.name == "agentmem-background"]


def test_a_failure_is_logged_and_tried_again_later(work: Consolidation, caplog: pytest.LogCaptureFixture) -> None:
    work.failure = StoreError("the disk is full")
    with caplog.at_level(logging.WARNING, "agentmem"), memory(consolidate_idle=0.02) as mem:
        until(lambda: work.runs >= 2)
        assert mem.chat("Hello.").text == "ok"
        work.failure, work.steps = None, 0
        until(lambda: not work.is_due)
    assert "consolidation in the background failed: the disk is full" in caplog.text


def test_what_can_not_be_made_now_is_not_tried_all_the_time(
    work: Consolidation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backgrounds, "BACKOFF_S", 60.0)
    work.steps, work.never_done = 0, True  # something is due, and a run makes nothing: it is beyond the budget, say
    with memory(consolidate_idle=0.02) as mem:
        until(lambda: work.runs == 1)
        time.sleep(0.5)
        assert work.runs == 1
        mem.chat("Hello.")  # now there may be something else
        until(lambda: work.runs == 2)
        time.sleep(0.3)
        assert work.runs == 2


def test_no_clock_of_the_user_s_decides_how_long_it_was_silent(work: Consolidation) -> None:
    clock = FakeClock()  # stands still
    with Memory(":memory:", model=ScriptedProvider(), embedder="none", clock=clock, consolidate_idle=0.1) as mem:
        mem.chat("Hello.")
        assert work.begun.wait(20)


def test_a_memory_that_is_dropped_unclosed_takes_the_thread_with_it(work: Consolidation) -> None:
    work.is_due = False
    mem = Memory(":memory:", model=ScriptedProvider(), embedder="none", consolidate_idle=0.02)
    assert mem._background is not None
    thread = mem._background._thread
    gone = weakref.ref(mem._engine)
    assert thread is not None
    del mem

    def dropped() -> bool:
        gc.collect()
        return gone() is None and not thread.is_alive()

    until(dropped)


@pytest.mark.slow
def test_what_is_owed_is_done_in_the_silence_on_a_real_model(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """A LoRA version lost a record: it is trained again without it between chats, which are answered meanwhile."""
    model = f"local:{tiny_model(tmp_path / 'tiny')}"
    with Memory(tmp_path / "m", model=model, embedder="hash", consolidate_idle=0.3) as mem:
        mem.pause_consolidation()
        ana = mem.scope(user="ana")
        kept, gone = ana.add(["My dog is called Biscuit.", "My sister lives in Porto."])
        version = ana.parametric.train(epochs=2)
        ana.parametric.activate(version, force=True)  # random weights pass no gate
        ana.forget(gone.id)
        assert [receipt.state for receipt in ana.parametric.receipts()] == ["queued"]
        mem.resume_consolidation()
        answered = 0

        def done() -> bool:
            nonlocal answered
            if answered < 5:
                ana.chat("Where does my dog sleep?", max_tokens=2)
                answered += 1
            return ana.parametric.receipts()[0].state == "done"

        until(done, 120)
        [proof] = ana.parametric.receipts()
        assert proof.forgotten == (gone.id,)
        [active] = ana.parametric.active()
        assert active.records == (kept.id,)
        assert not mem._engine.learning_now()
        assert "retrain of user='ana'" in str(mem.consolidate(dry_run=True)).replace("(", "of ").replace(")", "")
        assert mem.verify().ok


def test_a_prefill_that_gave_way_leaves_no_trace_in_later_answers(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = f"local:{tiny_model(tmp_path / 'tiny')}"
    system = "You are kind. " * 8

    def answer(mem: Memory, session: str) -> str:
        return mem.scope(user="ana", session=session).chat("Where does it sleep?", system=system, max_tokens=12).text

    with Memory(":memory:", model=model, embedder="none", page_tokens=16, cache="fixed") as plain:
        expected = answer(plain, "s")
    with Memory(tmp_path / "m", model=model, embedder="none", page_tokens=16, cache="fixed") as mem:
        cut = 0
        for fires in (1, 2, 3, 4, 6, 9, 14, 21):
            asked: list[int] = []

            def stop(asked: list[int] = asked, fires: int = fires) -> bool:
                asked.append(1)
                return len(asked) == fires

            session = mem.scope(user="ana", session=f"s{fires}")
            mem.activation.evict()
            flow = chats.prime(mem._engine, session._conversation, system=system)
            try:
                driven(flow, stop)
            except TrainingError:
                cut += 1
            assert mem.verify().ok
            assert answer(mem, f"s{fires}") == expected
        assert cut > 2


def test_a_driven_flow_is_told_of_failures_and_returns_its_result() -> None:
    def flow() -> Flow[str]:
        with pytest.raises(ZeroDivisionError):
            yield Work(lambda stop: 1 / 0)
        answer = yield Work(lambda stop: stop())
        return f"{answer}"

    assert driven(flow(), lambda: True) == "True"
    assert driven(local(lambda: 3), lambda: False) == 3
