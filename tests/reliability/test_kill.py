"""``kill -9`` at any moment: everything acknowledged is there, what was under way is there whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from tests.reliability.writer import Expected, problems, stored, write_to

pytestmark = pytest.mark.slow

#: 200 kills and 20,000 writes where AGENTMEM_RELIABILITY=full, else a part of them.
KILLS, WRITES = (200, 20_000) if os.environ.get("AGENTMEM_RELIABILITY") == "full" else (25, 1_500)


def test_a_killed_writer_loses_nothing_that_it_was_told_is_stored(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["agentmem", "tests.reliability.writer", "faiss", "numpy"])
    chance = random.Random(5)
    expected = Expected()
    folder = tmp_path / "memory"
    for kill in range(KILLS):
        ours, theirs = processes.Pipe(duplex=False)
        process = processes.Process(target=write_to, args=(theirs, str(folder), kill, 10**6, expected.changes))
        process.start()
        theirs.close()
        wanted = expected.changes + chance.randint(1, 2 * WRITES // KILLS - 1)
        while expected.changes < wanted:
            expected.heard(ours.recv_bytes())
        time.sleep(chance.random() * 0.002)
        process.kill()
        while True:
            try:
                expected.heard(ours.recv_bytes())
            except (EOFError, OSError):  # what the pipe held to the end, the last message maybe in part
                break
        process.join(30)
        ours.close()
        records = stored(folder)
        expected.check(records)
        expected.accept(records)
        if kill % 10 == 9:
            assert problems(folder) == []
    assert expected.changes >= WRITES * 0.9
