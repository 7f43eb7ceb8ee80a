"""An upgrade killed at any step: the next open finds the old file or the new one, whole, and goes on from there."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from agentmem import Memory
from agentmem.database import Database
from tests.unit.test_database import golden

pytestmark = pytest.mark.slow

#: Every so many calls of Python or C, and steps of SQLite's machine, the upgrade is killed once.
CALLS, STEPS = (1, 40) if os.environ.get("AGENTMEM_RELIABILITY") == "full" else (9, 250)


def killed(folder: Path, *, calls: int = 0, steps: int = 0) -> bool:
    """Open the database in a child that is killed after so many calls or steps; False if it got to the end before."""
    child = os.fork()
    if child == 0:
        left = [calls, steps]

        def called(frame: FrameType, event: str, argument: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def stepped() -> int:
            left[1] -= 1
            if left[1] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return 0

        opened = Database._opened

        def watched(database: Database) -> sqlite3.Connection:
            connection = opened(database)
            if steps:
                connection.set_progress_handler(stepped, 1)
            return connection

        try:
            Database._opened = watched  # type: ignore[method-assign, assignment]
            if calls:
                sys.setprofile(called)
            Database(folder / "memory.db")
        finally:
            sys.setprofile(None)
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("kind", ["calls", "steps"])
def test_an_upgrade_killed_at_any_step_is_made_at_the_next_open(tmp_path: Path, kind: str) -> None:
    expected = golden(tmp_path / "old", 4)
    texts = [record["text"] for record in expected["records"]]
    every = CALLS if kind == "calls" else STEPS
    after, kills = every, 0
    while True:
        folder = tmp_path / "memory"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        went_on = killed(folder, **{kind: after})
        with Memory(folder, embedder="hash") as memory:
            assert [record.text for record in memory.list()] == texts
            if kills % 10 == 0:
                assert memory.verify().problems == []
        assert (folder / "memory.db.format-4").exists()
        if not went_on:
            break
        kills += 1
        after += every
    assert kills > 10
