"""``kill -9`` while memories are moved between the kinds: nothing lost, nothing twice, the next call goes on."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from agentmem import Memory, Scope, consolidate, cores
from agentmem.jobs import Jobs
from agentmem.testing import FakeClock
from tests.reliability.consolidator import ASKED, FACTS, consolidating, live, talk

pytestmark = pytest.mark.slow

#: How often it is killed; all of the promised hundred where AGENTMEM_RELIABILITY=full.
KILLS = 100 if os.environ.get("AGENTMEM_RELIABILITY") == "full" else 12


_AT_STAKE = ("consolidate", "forget")


def _processes() -> Any:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["agentmem", "tests.reliability.consolidator", "torch"])
    return processes


@pytest.mark.timeout(600 + 20 * KILLS)
def test_killed_anywhere_nothing_is_lost_nothing_twice_and_it_goes_on(tmp_path: Path) -> None:
    processes = _processes()
    chance = random.Random(7)
    folder = tmp_path / "memory"
    held: set[str] = set()
    killed_in: Counter[str] = Counter()
    made: Counter[str] = Counter()
    for kill in range(KILLS):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=live, args=(str(folder), kill, theirs))
        process.start()
        theirs.close()
        last: dict[str, Any] = {}
        going = chance.randint(1, 12)
        while True:
            try:
                said: dict[str, Any] = json.loads(ours.recv())
            except (EOFError, OSError):
                break
            held |= set(said.get("added", ()))
            held -= {said.get("forgot")}
            last |= said
            going -= 1
            if going <= 0 and (last["doing"] in _AT_STAKE or going < -20) and process.is_alive():
                time.sleep(chance.random() * 0.08)
                process.kill()
        process.join(30)
        ours.close()
        killed_in[last["doing"]] += 1
        held = _whole(folder, held, last, made, learns=bool(kill % 2))
    assert sum(killed_in[doing] for doing in _AT_STAKE) > KILLS / 2, killed_in
    assert {"collapse", "learn", "prime"} <= set(made), made


def _whole(folder: Path, held: set[str], last: dict[str, Any], made: Counter[str], *, learns: bool) -> set[str]:
    """Check what a killed process left, and that the next call goes on, noting which kinds of moves were made; returns
    the ids of the records that are there."""
    with consolidating(folder, learns=learns) as memory:
        assert memory.verify().problems == []
        ana = memory.scope(user="ana")
        found = {record.id for record in ana.list(limit=10_000)}
        gone, new = held - found, found - held
        assert gone <= ({last["one"]} if last["doing"] == "forget" else set())
        assert not new or last["doing"] == "add"
        _nothing_twice(memory, found)
        plan = memory.consolidate(dry_run=True)
        for _ in range(5):  # what was begun is taken up or given up at once: its process is gone
            plan = memory.consolidate()
            assert all(outcome.state in ("done", "skipped") for outcome in plan.outcomes), plan
            made.update(outcome.move.kind for outcome in plan.outcomes)
            if not plan.moves:
                break
        assert plan.moves == (), plan
        assert not consolidate.due(memory._engine)
        assert not Jobs(memory._engine.database, memory._engine.clock).abandoned()
        _nothing_twice(memory, found)
        assert memory.verify().problems == []
        return found


def _nothing_twice(memory: Memory, held: set[str]) -> None:
    ana, engine = memory.scope(user="ana"), memory._engine
    active = ana.parametric.active()
    learnt = Counter(record for version in active for record in version.records)
    assert set(learnt.values()) <= {1}, learnt  # no record is in two versions that act
    assert set(learnt) <= held
    assert len({version.digest for version in active}) == len(active)
    for row in engine.database.query("SELECT ids, tenant, user, agent, session FROM cores"):
        ids = json.loads(row["ids"])
        assert len(set(ids)) == len(ids)
        key = json.dumps([row[level] for level in ("tenant", "user", "agent", "session")])
        lineage = engine.database.query("SELECT record FROM lineage WHERE kind = 'core' AND key = ?", (key,))
        assert {one["record"] for one in lineage} == set(ids) <= held


# ---- at named points


def _die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _consolidate(folder: str, point: str, learns: bool, now: float) -> None:
    with consolidating(folder, learns=learns, clock=FakeClock(now)) as memory, mock.patch(point, _die):
        memory.consolidate()


@pytest.mark.parametrize(
    ("point", "kind"),
    [
        ("agentmem.moving._work", "collapse"),  # the lease is taken, nothing is done
        ("agentmem.cores.store", "collapse"),  # in the middle of the transaction that rewrites the block
        ("agentmem.jobs.Jobs.done", "collapse"),  # the move is made, its outcome is not written
        ("agentmem.chat._observe", "prime"),  # the head is primed, that is not noted
        ("agentmem.parametric.folder.VersionFolder.publish", "learn"),  # its files are written, under a private name
        ("agentmem.parametric.registry.Registry.join", "learn"),  # it is stored and acts nowhere
        ("agentmem.parametric.registry.Registry._admit", "learn"),  # in the middle of its activation
        ("agentmem.jobs.Jobs.done", "learn"),
        ("agentmem.consolidate._note_planned", "learn"),  # all is made
    ],
)
def test_killed_between_two_steps_the_next_call_makes_the_rest_once(point: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    learns = kind == "learn"
    clock = FakeClock()
    with consolidating(folder, learns=False, clock=clock) as memory:
        ana = memory.scope(user="ana")
        ana.add(list(FACTS))
        talk(memory, ASKED if learns else (ASKED[0],) * 4, times=4, pause=lambda: clock.advance(7200))
        ids = {record.id for record in ana.list()}
        with memory._engine.database.write() as connection:  # as after a forget: no block stands
            connection.execute("DELETE FROM cores")
            connection.execute("DELETE FROM lineage WHERE kind = 'core'")
    process = _processes().Process(target=_consolidate, args=(str(folder), point, learns, clock() + 60))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    clock.advance(120)
    with consolidating(folder, learns=learns, clock=clock) as memory:
        ana = memory.scope(user="ana")
        assert {record.id for record in ana.list()} == ids
        assert memory.verify().problems == []
        _nothing_twice(memory, ids)
        plan = memory.consolidate()
        assert all(outcome.state in ("done", "skipped") for outcome in plan.outcomes), plan
        assert memory.consolidate().moves == ()
        assert not Jobs(memory._engine.database, memory._engine.clock).abandoned()
        # What the move was to do is done, whoever did it.
        if learns:
            assert len(ana.parametric.active()) == len(ana.parametric.versions()) > 0
        else:
            assert cores.standing(memory._engine, Scope(user="ana"))
        if kind == "prime":
            assert "prime" in {outcome.move.kind for outcome in plan.outcomes if outcome.state == "done"}
        _nothing_twice(memory, ids)
