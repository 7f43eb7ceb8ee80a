"""Leases on moves: one owner at a time, taken over when it is gone, left alone after failures."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.database import Database
from agentmem.jobs import BACKOFF_S, LEASE_S, TRIES, Jobs
from agentmem.planner.values import Move, Outcome
from agentmem.testing import FakeClock
from agentmem.types import Scope

ANA = Scope(user="ana")


def a_move(key: str = "k", **more: Any) -> Move:
    return Move(key=key, kind="prime", scope=ANA, records=("r1",), **more)


def elsewhere(number: int) -> str:
    """An owner on another machine: whether it lives can't be seen from here."""
    return f"another-machine {number} {number:016x}"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def jobs(clock: FakeClock) -> Jobs:
    return Jobs(Database(":memory:"), clock)


def test_a_move_has_one_owner_until_its_lease_has_passed(jobs: Jobs, clock: FakeClock) -> None:
    move = a_move()
    assert jobs.take(move, elsewhere(1))
    assert not jobs.take(move, elsewhere(2))
    assert jobs.closed() == {"k"}
    clock.advance(LEASE_S - 1)
    assert jobs.renew("k", elsewhere(1))
    clock.advance(LEASE_S - 1)
    assert not jobs.take(move, elsewhere(2))
    clock.advance(2)
    assert jobs.abandoned()
    assert jobs.take(move, elsewhere(2))
    assert not jobs.renew("k", elsewhere(1))  # who lost it learns so
    assert not jobs.done(Outcome(move=move, state="done", at=clock()), elsewhere(1))
    assert [outcome.state for outcome in jobs.outcomes()] == ["running"]
    assert jobs.done(Outcome(move=move, state="done", at=clock()), elsewhere(2))
    assert [outcome.state for outcome in jobs.outcomes()] == ["done"]


def test_a_clock_that_was_set_back_makes_no_lease_endless(jobs: Jobs, clock: FakeClock) -> None:
    assert jobs.take(a_move(), elsewhere(1))
    clock.advance(-10 * 365 * 86_400)
    assert jobs.take(a_move(), elsewhere(2))


def test_what_was_given_back_is_for_whoever_asks_next(jobs: Jobs) -> None:
    assert jobs.take(a_move(), elsewhere(1))
    jobs.release("k", elsewhere(2))  # not its owner: nothing happens
    assert not jobs.take(a_move(), elsewhere(2))
    jobs.release("k", elsewhere(1))
    assert jobs.abandoned()
    assert jobs.take(a_move(), elsewhere(2))


def test_a_move_that_fails_waits_and_is_left_alone_in_the_end(jobs: Jobs, clock: FakeClock) -> None:
    move = a_move()
    for number in range(TRIES):
        assert jobs.take(move, elsewhere(number))
        assert jobs.done(Outcome(move=move, state="failed", at=clock(), note="why"), elsewhere(number))
        assert not jobs.take(move, elsewhere(9))
        clock.advance(BACKOFF_S * 4**number + 1)
    assert not jobs.take(move, elsewhere(9))
    assert jobs.closed() == {"k"}
    assert jobs.take(a_move("of other records"), elsewhere(9))


def test_a_final_failure_is_not_tried_again(jobs: Jobs, clock: FakeClock) -> None:
    assert jobs.take(a_move(), elsewhere(1))
    assert jobs.done(Outcome(move=a_move(), state="failed", at=clock()), elsewhere(1), final=True)
    clock.advance(1e6)
    assert not jobs.take(a_move(), elsewhere(1))


def test_what_was_done_may_be_done_again_and_a_killed_process_is_no_failure(jobs: Jobs, clock: FakeClock) -> None:
    for _ in range(TRIES + 2):
        assert jobs.take(a_move(), elsewhere(1))  # and dies
        clock.advance(LEASE_S + 1)
    assert jobs.take(a_move(), elsewhere(2))
    assert jobs.done(Outcome(move=a_move(), state="done", at=clock()), elsewhere(2))
    assert jobs.take(a_move(), elsewhere(3))


def test_outcomes_are_those_of_the_scope_and_beneath(jobs: Jobs, clock: FakeClock) -> None:
    for user in ("ana", "bo"):
        move = Move(key=user, kind="collapse", scope=Scope(user=user))
        assert jobs.take(move, elsewhere(1))
        jobs.done(Outcome(move=move, state="done", at=clock(), cost=1.5), elsewhere(1), {"prefill": 2.0})
    assert [outcome.move.key for outcome in jobs.outcomes(ANA)] == ["ana"]
    assert len(jobs.outcomes(Scope())) == 2
    [job] = jobs.jobs(ANA)
    assert job.facts == {"prefill": 2.0}
    assert job.told().cost == 1.5


def test_pausing_is_seen_by_all(tmp_path: Path, clock: FakeClock) -> None:
    one, two = (Jobs(Database(tmp_path / "memory.db"), clock) for _ in range(2))
    one.pause()
    assert two.paused()
    two.resume()
    assert not one.paused()


def test_a_note_that_cannot_be_read_is_passed_over(jobs: Jobs) -> None:
    assert jobs.take(a_move(), elsewhere(1))
    with jobs._database.write() as connection:
        connection.execute("UPDATE jobs SET note = 'broken'")
    assert jobs.outcomes() == []
    assert jobs.take(a_move(), elsewhere(2))


def test_the_lease_is_renewed_while_the_work_goes_on(tmp_path: Path) -> None:
    jobs = Jobs(Database(tmp_path / "memory.db"), time.time)
    assert jobs.take(a_move(), elsewhere(1), lease_s=0.3)
    with jobs.renewed("k", elsewhere(1), lease_s=0.3):
        time.sleep(0.8)
        assert not jobs.take(a_move(), elsewhere(2))


def test_what_another_made_since_it_was_planned_is_not_made_again(jobs: Jobs, clock: FakeClock) -> None:
    move = a_move()
    assert jobs.take(move, elsewhere(1), again=False)
    assert jobs.done(Outcome(move=move, state="done", at=clock()), elsewhere(1))
    assert not jobs.take(move, elsewhere(2), again=False)
    assert [outcome.state for outcome in jobs.outcomes()] == ["done"]
    assert jobs.take(move, elsewhere(2))  # work that may be left in part


def test_moves_that_failed_are_not_kept_for_ever_either(
    jobs: Jobs, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem.jobs.KEPT", 5)
    for number in range(20):
        move = a_move(str(number))
        assert jobs.take(move, elsewhere(1))
        assert jobs.done(Outcome(move=move, state="failed", at=clock()), elsewhere(1))
    assert len(jobs.outcomes()) == 5


def _take_many(folder: str, number: int, connection: Any) -> None:
    jobs = Jobs(Database(f"{folder}/memory.db"), time.time)
    connection.send("ready")
    connection.recv()
    owner = Jobs.owner()
    connection.send([key for key in map(str, range(60)) if jobs.take(a_move(key), owner)])
    connection.recv()  # lives on, so that its leases hold


def test_of_several_processes_one_gets_each_move_and_a_dead_ones_moves_are_taken_over(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    Database(tmp_path / "memory.db").close()
    pipes, started = [], []
    for number in range(3):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=_take_many, args=(str(tmp_path), number, theirs))
        process.start()
        pipes.append(ours)
        started.append(process)
    for pipe in pipes:
        assert pipe.recv() == "ready"
    for pipe in pipes:
        pipe.send("go")
    taken = [key for pipe in pipes for key in pipe.recv()]
    assert sorted(taken) == sorted(map(str, range(60)))  # each by exactly one
    jobs = Jobs(Database(tmp_path / "memory.db"), time.time)
    assert not jobs.abandoned()
    assert not jobs.take(a_move("0"), Jobs.owner())
    for process in started:
        process.kill()
        process.join()
    assert jobs.abandoned()  # at once, long before the leases pass
    assert all(jobs.take(a_move(str(number)), f"here {os.getpid()}") for number in range(60))
