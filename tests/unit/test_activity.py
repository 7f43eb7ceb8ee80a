"""Activity: turns are counted, the silence after the last one is measured."""

from __future__ import annotations

import os
import threading

import pytest

from agentmem.activity import Activity


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
    activity.touch()
    assert activity.quiet_s() == 0


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


def test_a_sleeper_wakes_when_a_turn_begins() -> None:
    activity = Activity()
    woke = []
    sleeper = threading.Thread(target=lambda: woke.append(activity.until(True, 30)))
    sleeper.start()
    with activity.chatting():
        sleeper.join(30)
        assert woke == [True]
        assert not activity.until(False, 0.01)
    assert activity.until(False, 0)


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
    with activity.chatting(), activity._changed:
        child = os.fork()
        if child == 0:
            free = activity._changed.acquire(timeout=10)
            os._exit(0 if free and not activity.busy() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
