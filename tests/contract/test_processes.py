"""Several processes on one folder, and processes that die: nothing acknowledged is lost, the folder opens by itself."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentmem import Memory

pytestmark = pytest.mark.slow

#: Adds records one by one and prints each id as soon as the add has returned.
WRITER = """
import sys
from agentmem import Memory
with Memory(sys.argv[1], embedder="hash") as memory:
    mine = memory.scope(user=sys.argv[2])
    for number in range(int(sys.argv[3])):
        [record] = mine.add(f"fact {number} of {sys.argv[2]}")
        sys.stdout.write(record.id + "\\n")
        sys.stdout.flush()
        if number % 20 == 19:
            mine.search(f"fact {number}", k=1)
"""


def writer(folder: Path, user: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), user, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})


def test_two_processes_add_two_hundred_records_each(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", embedder="hash") as watching:
        writers = [writer(tmp_path / "m", user, 200) for user in ("ana", "ben")]
        printed = {line for process in writers for line in process.communicate(timeout=120)[0].split()}
        assert [process.returncode for process in writers] == [0, 0]
        # A process that was open all the while sees them on its next verb.
        assert {record.id for record in watching.list(limit=1000)} == printed
        assert watching.search("fact 199 of ana", k=1)[0].record.text == "fact 199 of ana"
        assert (len(printed), watching.scope(user="ana").plaintext.count()) == (400, 200)
        assert watching.verify().ok


def test_fifty_kills_lose_no_acknowledged_record(tmp_path: Path) -> None:
    acknowledged: set[str] = set()
    chance = random.Random(7)
    for _ in range(50):
        process = writer(tmp_path / "m", "ana", 100_000)
        assert process.stdout is not None
        for _, line in zip(range(chance.randrange(1, 40)), process.stdout, strict=False):
            acknowledged.add(line.strip())
        time.sleep(chance.random() * 0.005)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        acknowledged |= {line for line in rest.split("\n")[:-1] if line}  # the last line may be cut
        process.wait(timeout=10)
        process.stdout.close()
    with Memory(tmp_path / "m", embedder="hash") as memory:
        there = {record.id for record in memory.list(limit=10**6)}
        assert acknowledged <= there
        assert len(there) - len(acknowledged) <= 50  # at most one unacknowledged record per kill
        assert memory.search("fact 0", k=1)
        assert memory.verify().ok
    assert len(acknowledged) > 500


@pytest.mark.parametrize("state", ["rows", "pages"])
def test_an_erasure_that_was_killed_is_finished_at_the_next_open(tmp_path: Path, state: str) -> None:
    """Killed between the commit of an erasure and the deletion of its files: the next open deletes them."""
    code = """
import os, signal, sys
from agentmem import Memory
from agentmem.engine import Engine
with Memory(sys.argv[1], embedder="hash") as memory:
    [record] = memory.add("The passphrase is quixotry.")
    memory.search("passphrase")
    memory._engine.index.save()
    Engine.finish_erasures = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    memory.forget(record.id)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=False)
    assert done.returncode == -signal.SIGKILL
    embedder = "hash" if state == "rows" else "none"  # with and without an index at hand
    with Memory(tmp_path / "m", embedder=embedder) as memory:
        assert memory.list() == []
        files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
        assert all(b"quixotry" not in path.read_bytes() for path in files)
        assert memory._engine.database.query("SELECT * FROM erasures") == []
