"""Activity: turns are counted, the silence after the last one is measured."""

from __future__ import annotations

import os
import threading

import pytest

from agentmem import Memory
from agentmem.activity import LOST_S, Activity
from agentmem.testing import FakeClock, ScriptedProvider


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_silence_begins_with_the_engine_and_anew_after_each_turn() -> None:
    clock = Clock()
    activity = Activity(clock)
    clock.now += 5
    assert activity.quiet_s() == 5
    assert not activity.busy()
    with activity.chatting():
        clock.now += 7
        assert activity.busy()
        assert activity.waiting()
        assert activity.quiet_s() == 0
    assert not activity.busy()
    assert activity.quiet_s() == 0
    clock.now += 3
    assert activity.quiet_s() == 3


def test_turns_may_overlap_and_the_last_one_ends_it() -> None:
    clock = Clock()
    activity = Activity(clock)
    first, second = activity.chatting(), activity.chatting()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert activity.busy()
    second.__exit__(None, None, None)
    assert not activity.busy()


def test_a_turn_that_fails_ends_too() -> None:
    activity = Activity()
    with pytest.raises(ValueError, match="half way"), activity.chatting():
        raise ValueError("half way")
    assert not activity.busy()


def test_a_clock_that_goes_back_is_no_negative_silence() -> None:
    clock = Clock()
    activity = Activity(clock)
    clock.now -= 50
    assert activity.quiet_s() == 0


def test_a_turn_without_a_sign_of_life_is_given_up_for_lost() -> None:
    clock = FakeClock()
    activity = Activity(clock)
    with activity.chatting() as turn:
        clock.advance(LOST_S - 1)
        assert activity.busy()
        turn.heard()
        clock.advance(LOST_S - 1)
        assert activity.busy()
        clock.advance(1)
        assert not activity.busy()
        assert activity.quiet_s() == LOST_S
        turn.heard()  # somebody read on after all
        assert activity.busy()
        clock.advance(LOST_S)
        with activity.chatting():
            assert activity.busy()  # another one counts as ever
        clock.advance(5)
        assert activity.quiet_s() == 5
    assert activity.quiet_s() == 0


def test_a_turn_that_nobody_holds_any_more_is_over() -> None:
    activity = Activity()
    turn = activity.begin()
    assert activity.busy()
    del turn
    assert not activity.busy()


def test_ending_a_turn_twice_is_no_second_end() -> None:
    clock = FakeClock()
    activity = Activity(clock)
    turn = activity.begin()
    turn.end()
    clock.advance(7)
    turn.end()
    assert activity.quiet_s() == 7


def test_a_stream_that_is_held_open_unread_keeps_nothing_waiting_for_ever() -> None:
    clock = FakeClock()
    with Memory(":memory:", model=ScriptedProvider([["one ", "two ", "three"]]), embedder="none") as memory:
        activity = memory._engine.activity = Activity(clock)
        stream = memory.chat("Count!", stream=True)
        assert next(stream).strip() == "one"
        clock.advance(LOST_S - 1)
        assert next(stream).strip() == "two"
        clock.advance(LOST_S - 1)
        assert activity.busy()  # it was read on meanwhile
        clock.advance(1)
        assert not activity.busy()
        assert activity.quiet_s() == LOST_S
        assert stream.reply.text == "one two three"
        assert activity.quiet_s() == 0


def test_turns_of_many_threads_are_all_counted() -> None:
    activity = Activity()

    def turns() -> None:
        for _ in range(200):
            with activity.chatting():
                assert activity.busy()

    threads = [threading.Thread(target=turns) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not activity.busy()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_knows_of_no_turn_of_its_parent_and_waits_for_no_lock() -> None:
    activity = Activity()
    with activity.chatting(), activity._lock:
        child = os.fork()
        if child == 0:
            free = activity._lock.acquire(timeout=10)
            activity._lock.release()
            os._exit(0 if free and not activity.busy() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
