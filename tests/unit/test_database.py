"""The file of truth: older formats are upgraded, newer ones refused, with what was stored left as it is."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.database import FORMAT, Database
from agentmem.errors import Incompatible


def test_a_folder_of_format_1_is_upgraded_in_place(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        [record] = memory.add("kept")
    with sqlite3.connect(tmp_path / "memory.db") as old:
        for table in ("records_terms", "tokens", "jobs", "vectors"):
            old.execute(f"DROP TABLE {table}")
        old.execute(
            "CREATE TABLE vectors (seq INTEGER NOT NULL, space INTEGER NOT NULL, vector BLOB NOT NULL,"
            " checksum INTEGER NOT NULL, PRIMARY KEY (space, seq))"
        )
        old.execute("ALTER TABLE records DROP COLUMN at_s")
        old.execute("ALTER TABLE uses DROP COLUMN attended")
        old.execute("ALTER TABLE pages DROP COLUMN grid")
        old.execute("ALTER TABLE pages DROP COLUMN codec")
        old.execute("INSERT INTO pages VALUES (zeroblob(32), zeroblob(32), zeroblob(32), 0, 9, 0, 0, 0, 0)")
        old.execute("PRAGMA user_version = 1")
    old.close()
    for _ in range(2):
        with Memory(tmp_path, embedder="none") as memory:
            assert memory.get(record.id).text == "kept"
            assert [row["codec"] for row in memory._engine.database.query("SELECT codec FROM pages")] == ["raw"]
            assert memory._engine.database.query("PRAGMA user_version")[0][0] == FORMAT


def test_a_newer_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    Database(tmp_path / "memory.db").close()
    with sqlite3.connect(tmp_path / "memory.db") as newer:
        newer.execute(f"PRAGMA user_version = {FORMAT + 1}")
    newer.close()
    with pytest.raises(Incompatible, match=f"format {FORMAT + 1}"):
        Database(tmp_path / "memory.db")
    with sqlite3.connect(tmp_path / "memory.db") as newer:
        assert newer.execute("PRAGMA user_version").fetchone()[0] == FORMAT + 1
    newer.close()
