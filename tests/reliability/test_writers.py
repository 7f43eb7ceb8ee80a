"""Four processes that write and two that read, at once: nothing is lost, no lock is seen, all is found at once."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

import pytest

from agentmem import Memory

pytestmark = pytest.mark.slow

ADDS = 2_000 if os.environ.get("AGENTMEM_RELIABILITY") == "full" else 150
WRITERS = ["ana", "ben", "cleo", "dan"]
#: Every so many adds the test looks whether it finds the record in its own memory, open all the while.
SAMPLE = 25


def add(said: Connection, folder: str, user: str, count: int) -> None:
    """Add records and say each one's id as soon as it is stored."""
    with Memory(folder, embedder="hash") as memory:
        mine = memory.scope(user=user)
        for number in range(count):
            [record] = mine.add(f"{user}fact{number} is stored")
            said.send_bytes(json.dumps([user, number, record.id]).encode())
    said.close()


def read(said: Connection, folder: str, stop: str) -> None:
    """Search and list until told to stop; say how often, or what went wrong."""
    rounds = before = 0
    with Memory(folder, embedder="hash") as memory:
        while not Path(stop).exists():
            memory.search("fact that is stored", k=5)
            now = memory.plaintext.count()
            assert now >= before, "records went away"
            rounds, before = rounds + 1, now
    said.send_bytes(json.dumps([rounds, before]).encode())
    said.close()


def test_four_writers_and_two_readers(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    folder, stop = str(tmp_path / "memory"), str(tmp_path / "stop")
    acknowledged: dict[str, str] = {}
    started = []
    with Memory(folder, embedder="hash") as watching:
        hearing: list[Connection] = []
        listening: list[Connection] = []

        def start(ends: list[Connection], target: Callable[..., None], *arguments: str | int) -> None:
            ours, theirs = processes.Pipe(duplex=False)
            process = processes.Process(target=target, args=(theirs, *arguments))
            process.start()
            theirs.close()
            ends.append(ours)
            started.append(process)

        for user in WRITERS:
            start(hearing, add, folder, user, ADDS)
        for _ in range(2):
            start(listening, read, folder, stop)
        while hearing:
            for end in cast(list[Connection], wait(hearing, timeout=120)):
                try:
                    user, number, id_ = json.loads(end.recv_bytes())
                except EOFError:
                    hearing.remove(end)
                    continue
                acknowledged[id_] = f"{user}fact{number} is stored"
                if number % SAMPLE == 0:
                    hits = watching.search(f"{user}fact{number}", k=3)
                    assert id_ in {hit.record.id for hit in hits}, "stored, said and not found"
        Path(stop).touch()
        for end in listening:
            rounds, seen = json.loads(end.recv_bytes())
            assert rounds > 0
            assert seen <= len(acknowledged)
        for process in started:
            process.join(60)
        assert [process.exitcode for process in started] == [0] * 6
        assert len(acknowledged) == ADDS * len(WRITERS)
        assert {record.id: record.text for record in watching.list(limit=10**6)} == acknowledged
        assert watching.verify().problems == []
