"""What becomes of an open memory: forked, interrupted, dropped, opened in vain, closed by a part that fails."""

from __future__ import annotations

import contextlib
import gc
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from agentmem import ConfigError, Memory, StoreError
from agentmem.database import Database
from agentmem.testing import ScriptedProvider


def in_child(work: Any) -> int:
    """Run ``work`` in a forked process; its exit code, 1 where it raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_parent_and_child_both_write_after_a_fork(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", model=ScriptedProvider("ok"), embedder="hash") as memory:
        memory.add("before")
        busy = threading.Event()
        done = threading.Event()

        def hold() -> None:  # another thread is in a transaction while this one forks
            with memory._engine.database.write():
                busy.set()
                done.wait(0.2)

        thread = threading.Thread(target=hold)
        thread.start()
        busy.wait()

        def child() -> None:
            memory.add("by the child")
            memory.search("child")
            memory.close()

        assert in_child(child) == 0
        thread.join()
        memory.add("by the parent")
        assert {record.text for record in memory.list()} == {"before", "by the child", "by the parent"}
        assert memory.verify().ok


def test_a_child_leaves_a_memory_in_ram_alone(tmp_path: Path) -> None:
    with Memory(":memory:", embedder="hash") as memory:
        memory.add("here")
        folder = memory._engine.folder

        def child() -> None:
            with pytest.raises(StoreError, match="fork"):
                memory.list()
            memory.close()

        assert in_child(child) == 0
        assert folder.exists()
        assert memory.list()


def test_a_fork_inside_a_transaction_is_refused_in_the_child(tmp_path: Path) -> None:
    database = Database(tmp_path / "memory.db")
    with database.write() as connection:
        connection.execute("INSERT INTO meta VALUES ('a', 'b')")

        def child() -> None:
            with pytest.raises(StoreError):
                database.query("SELECT 1")

        assert in_child(child) == 0
    assert database.query("SELECT value FROM meta WHERE key = 'a'")[0][0] == "b"
    database.close()


class Interrupting:
    """A connection at whose n-th statement Ctrl-C is pressed, before or after it is done."""

    def __init__(self, connection: Any, at: int, *, after: bool) -> None:
        self.connection = connection
        self.left = at
        self.after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.connection.execute(*arguments)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_anywhere_leaves_no_transaction_open(tmp_path: Path, at: int, after: bool) -> None:
    with Memory(tmp_path / "m", embedder="hash") as memory:
        memory.add("before")
        database: Any = memory._engine.database
        real = database._connection
        database._connection = Interrupting(real, at, after=after)
        with contextlib.suppress(KeyboardInterrupt):
            memory.add(["one", "two"])
        database._connection = real
        assert not real.in_transaction
        assert database._depth == 0
        there = len(memory.list())
        assert there in (1, 3)
        memory.add("after")
        with Memory(tmp_path / "m", embedder="hash") as other:
            assert len(other.list()) == there + 1


def test_a_closed_memory_is_let_go_with_its_model(tmp_path: Path) -> None:
    provider = ScriptedProvider("ok")
    kept = weakref.ref(provider)
    with Memory(tmp_path / "m", model=provider, embedder="hash") as memory:
        memory.chat("Hello")
    del memory, provider
    gc.collect()
    assert kept() is None


def test_a_memory_in_ram_that_is_never_closed_keeps_nothing(tmp_path: Path) -> None:
    code = "from agentmem import Memory; m = Memory(':memory:', embedder='hash'); m.add('x'); m.search('x')"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert list(tmp_path.iterdir()) == []


def test_a_memory_opened_in_vain_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ScriptedProvider] = []

    def load(*_: object) -> ScriptedProvider:
        made.append(ScriptedProvider("ok"))
        return made[0]

    monkeypatch.setattr("agentmem.provider.load", load)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError):
        Memory(tmp_path / "file", model="scripted:x", embedder="hash")
    assert made[0].closed


def test_a_part_that_fails_to_close_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = ScriptedProvider("ok")
    memory = Memory(":memory:", model=provider, embedder="hash")
    folder = memory._engine.folder

    def fail() -> None:
        raise ConfigError("it can't")

    monkeypatch.setattr(provider, "close", fail)
    with pytest.raises(ConfigError):
        memory.close()
    assert not folder.exists()
    with pytest.raises(StoreError, match="closed"):
        memory.list()


def test_an_erasure_is_not_called_finished_while_a_reader_keeps_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agentmem.database.BUSY_S", 0.2)
    with Memory(tmp_path / "m", embedder="hash") as memory:
        [record] = memory.add("The passphrase is quixotry.")
        memory.add("something else")
        reader = sqlite3.connect(tmp_path / "m" / "memory.db")
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM records").fetchall()
        memory.forget(record.id)
        assert len(memory._engine.database.query("SELECT * FROM erasures")) == 1
        reader.close()
    with Memory(tmp_path / "m", embedder="hash") as memory:
        assert memory._engine.database.query("SELECT * FROM erasures") == []
        held = b"".join(path.read_bytes() for path in (tmp_path / "m").rglob("*") if path.is_file())
        assert b"quixotry" not in held


def test_nothing_is_left_in_the_temporary_folder() -> None:
    before = set(Path(tempfile.gettempdir()).glob("agentmem-*"))
    with Memory(":memory:", embedder="hash") as memory:
        memory.add("x")
    assert set(Path(tempfile.gettempdir()).glob("agentmem-*")) <= before
