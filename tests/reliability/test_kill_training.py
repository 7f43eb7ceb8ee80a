"""``kill -9`` while LoRA versions are trained, promoted, forgotten and trained again: never half of one answers."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.learner import learning, live, memory_of

pytestmark = pytest.mark.slow

#: How often it is killed; all of the promised hundred where AGENTMEM_RELIABILITY=full.
KILLS = 100 if os.environ.get("AGENTMEM_RELIABILITY") == "full" else 20


def test_a_killed_learner_leaves_whole_versions_of_records_that_are_there(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["agentmem", "tests.reliability.learner", "torch"])
    chance = random.Random(11)
    folder = tmp_path / "memory"
    answering = 0
    forgotten: set[str] = set()
    for kill in range(KILLS):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=live, args=(str(folder), kill, theirs))
        process.start()
        theirs.close()
        last: dict[str, Any] = json.loads(ours.recv())
        for _ in range(chance.randint(2, 14)):
            last |= json.loads(ours.recv())
        time.sleep(chance.random() * 0.03)
        process.kill()
        while True:
            try:
                said = json.loads(ours.recv())
            except (EOFError, OSError):
                break
            last |= said
            forgotten.update({said["forgot"]} if "forgot" in said else ())
        process.join(30)
        ours.close()
        answering += _is_whole(folder, last, forgotten)
    assert answering > KILLS / 4  # else nothing was at stake


def _is_whole(folder: Path, last: dict[str, Any], forgotten: set[str]) -> bool:
    """Check what a killed process left, by what it said last; returns whether a version answers."""
    with learning(), memory_of(folder, lora_shard=3, lora_budget=40_000) as memory:
        assert memory.verify().problems == []
        ana = memory.scope(user="ana")
        versions = ana.parametric.versions()
        held = {record.id for record in ana.list(limit=1000)}
        for version in versions:
            if version.state != "retired":  # none outlives a record that it learnt
                assert set(version.records) <= held
                assert not forgotten & set(version.records)
        before, now = set(last["active"]), {version.digest for version in ana.parametric.active()}
        retired = {version.digest for version in versions if version.state == "retired"}
        ready = {version.digest for version in versions if version.state == "ready"}
        assert now <= ready
        if last["doing"] in ("forget", "update"):
            assert now == before - retired
        elif last["doing"] in ("learn", "train", "retrain"):
            # What a later record contradicts is taken back before anything is trained in its place.
            kept = now == before - retired
            assert kept or now & (ready - before), "neither what answered before nor what was trained"
        memory._engine.registry.sweep()
        named = {path.name for path in (folder / "lora").iterdir() if not path.name.startswith(".")}
        assert named == ready
        assert not list((folder / "lora").glob(".new-*"))
        ana.parametric.retrain()  # what waits is done, and all works on
        assert all(proof.state == "done" for proof in ana.parametric.receipts())
        assert memory.verify().problems == []
        return bool(now)
