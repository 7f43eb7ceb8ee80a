"""The file of truth: older formats are upgraded after a backup, newer ones refused; lost and altered ones noticed."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory, Record
from agentmem.database import FORMAT, Database, _merge_words
from agentmem.errors import Corrupt, Full, Incompatible, StoreError
from agentmem.types import Scope
from agentmem.watermark import Watermark

GOLDEN = Path(__file__).parents[1] / "golden" / "databases"


def golden(folder: Path, format: int) -> dict[str, Any]:
    """Put a ``memory.db`` as format 4 or 5 wrote it (or an older one had it) into a folder; returns what is in it."""
    folder.mkdir(exist_ok=True)
    written = f"format-{max(format, 4)}.db.gz"
    (folder / "memory.db").write_bytes(gzip.decompress((GOLDEN / written).read_bytes()))
    with sqlite3.connect(folder / "memory.db") as old:
        for since, column in ((4, "pages DROP COLUMN grid"), (3, "uses DROP COLUMN attended")):
            if format < since:
                old.execute(f"ALTER TABLE {column}")
        if format < 2:
            old.execute("ALTER TABLE pages DROP COLUMN codec")
        old.execute(f"PRAGMA user_version = {format}")
    old.close()
    content: dict[str, Any] = json.loads((GOLDEN / "format-4.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("format", [1, 2, 3, 4, 5])
def test_a_folder_of_an_older_format_is_upgraded_after_a_backup(tmp_path: Path, format: int) -> None:
    expected = golden(tmp_path, format)
    before = (tmp_path / "memory.db").read_bytes()
    records = [Record.model_validate(record) for record in expected["records"]]
    for _ in range(2):
        with Memory(tmp_path, embedder="hash") as memory:
            assert memory.list() == records
            assert memory.history(records[0].id) == [Record.model_validate(past) for past in expected["history"]]
            assert memory.search("Zoë Oslo", at="2025-01-01")[0].record == records[2]
            assert memory._engine.records.known(expected["forgotten"])
            assert memory._engine.records.newest(Scope(user="ben")) == [records[3], records[2]]
            query = memory._engine.database.query
            assert [row["at_s"] for row in query("SELECT at_s FROM records")] == [1774958400.0, None, None, None]
            assert [
                (row["part"], row["start"], row["stop"]) for row in query("SELECT * FROM vectors ORDER BY seq")
            ] == [(0, 0, len(record.text)) for record in records]
            assert query("PRAGMA user_version")[0][0] == FORMAT
            assert memory.verify().problems == []
    with sqlite3.connect(tmp_path / f"memory.db.format-{format}") as backup:
        assert backup.execute("PRAGMA user_version").fetchone()[0] == format
        assert backup.execute("SELECT count(*) FROM records").fetchone()[0] == len(records)
    backup.close()
    assert len(before) == (tmp_path / f"memory.db.format-{format}").stat().st_size


def test_the_first_forget_after_an_upgrade_deletes_the_backup(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = golden(tmp_path, 4)
    with Memory(tmp_path, embedder="hash") as memory, caplog.at_level(logging.INFO, "agentmem"):
        assert (tmp_path / "memory.db.format-4").exists()
        memory.forget(expected["records"][2]["id"])
        assert "memory.db.format-4" in caplog.text
    assert not (tmp_path / "memory.db.format-4").exists()
    assert all("Zoë".encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_upgrade_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden(tmp_path, 4)
    half = {4: "CREATE TABLE half (x);\nCREATE TABLE records (x);", 5: ""}
    monkeypatch.setattr("agentmem.database.UPGRADES", half)
    with pytest.raises(StoreError, match="already exists"):
        Database(tmp_path / "memory.db")
    monkeypatch.undo()
    with Memory(tmp_path, embedder="hash") as memory:
        assert memory.verify().ok
        assert len(memory.list()) == 4


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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add(["kept", "and kept"])
        shutil.copy(tmp_path / "memory.db", tmp_path / "older.db")
        shutil.copy(tmp_path / "memory.db-wal", tmp_path / "older.db-wal")
        memory.add("and this")
    return tmp_path


def test_a_database_that_is_gone_or_emptied_is_no_new_memory(folder: Path) -> None:
    for damage in ("gone", "empty"):
        (folder / "memory.db").unlink(missing_ok=True)
        if damage == "empty":
            (folder / "memory.db").touch()
        with pytest.raises(Corrupt, match=f"{damage}.*delete memory.id"):
            Memory(folder, embedder="none")
    (folder / "memory.id").unlink()
    with Memory(folder, embedder="none") as memory:
        assert memory.list() == []


def test_an_older_copy_is_refused_until_it_is_accepted(folder: Path) -> None:
    for suffix in ("", "-wal"):
        (folder / f"older.db{suffix}").replace(folder / f"memory.db{suffix}")
    with pytest.raises(Corrupt, match="older copy"):
        Memory(folder, embedder="none")
    (folder / "memory.id").unlink()
    with Memory(folder, embedder="none") as memory:
        assert [record.text for record in memory.list()] == ["kept", "and kept"]
        assert memory.verify().ok


def test_another_memorys_database_is_refused(folder: Path, tmp_path: Path) -> None:
    with Memory(tmp_path / "other", embedder="none") as memory:
        for number in range(20):
            memory.add(f"of another memory {number}")
    shutil.copy(tmp_path / "other" / "memory.db", folder / "memory.db")
    with pytest.raises(Corrupt, match="not the database that was here"):
        Memory(folder, embedder="none")


def test_a_log_without_its_end_is_noticed(tmp_path: Path) -> None:
    with Memory(tmp_path / "live", embedder="none") as memory:
        memory.add("first")
        size = (tmp_path / "live" / "memory.db-wal").stat().st_size
        memory.add("second")
        shutil.copytree(tmp_path / "live", tmp_path / "cut")
    with open(tmp_path / "cut" / "memory.db-wal", "r+b") as log:
        log.truncate(size)
    with pytest.raises(Corrupt, match="lost its end"):
        Memory(tmp_path / "cut", embedder="none")


@pytest.mark.parametrize("damage", ["gone", "empty", "junk", "short", "long"])
def test_a_damaged_watermark_is_written_anew(folder: Path, damage: str) -> None:
    file = folder / "memory.id"
    content = file.read_bytes()
    assert len(content) == 32
    spoilt = {"empty": b"", "junk": bytes(32), "short": content[:-1], "long": content + b"\0"}
    file.unlink() if damage == "gone" else file.write_bytes(spoilt[damage])
    with Memory(folder, embedder="none") as memory:
        assert len(memory.list()) == 3
    assert file.read_bytes() == content


def test_a_watermark_never_falls_and_is_of_one_database(tmp_path: Path) -> None:
    first, second = Watermark(str(tmp_path / "id")), Watermark(str(tmp_path / "id"))
    assert first.read() is None
    first.start(b"identity", 5)
    second.start(b"identity", 9)
    first.raise_to(7)
    assert second.read() == (b"identity", 9)
    first.start(b"another.", 3)
    assert first.read() == (b"another.", 3)
    first.close()
    second.close()


def test_compaction_gives_room_back(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add([f"record {number} " + "word " * 400 for number in range(300)])
        memory.forget([record.id for record in memory.list(limit=280)])
        before = (tmp_path / "memory.db").stat().st_size
        assert memory._engine.database.compact()
        assert (tmp_path / "memory.db").stat().st_size < before / 2
        assert len(memory.list()) == 20
        assert memory.verify().ok


def test_compaction_repairs_a_damaged_index(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.scope(user="anastasia").add("kept")
        root = "SELECT rootpage FROM sqlite_schema WHERE name = 'records_user'"
        page = memory._engine.database.query(root)[0][0] - 1
    content = (tmp_path / "memory.db").read_bytes()
    at = content.index(b"anastasia", page * 4096)
    (tmp_path / "memory.db").write_bytes(content[:at] + b"anastasio" + content[at + 9 :])
    with Memory(tmp_path, embedder="none") as memory:
        assert any("records_user" in line for line in memory.verify().problems)
        assert memory._engine.database.compact()
        assert memory.verify().problems == []
        assert len(memory.scope(user="anastasia").list()) == 1


def test_the_word_index_outlives_any_number_of_erasures() -> None:
    """SQLite takes it for damaged after about 1,000 merges with changes between them."""
    database = Database(":memory:")
    for number in range(1_300):
        with database.write() as connection:
            connection.execute("INSERT INTO records_fts (rowid, text) VALUES (?, 'word')", (number,))
            _merge_words(connection)
    assert len(database.query("SELECT rowid FROM records_fts WHERE records_fts MATCH 'word'")) in range(1, 1_301)
    database.close()


def test_compaction_without_room_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add("kept")
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(Full, match="needs"):
            memory._engine.database.compact()


def test_ctrl_c_ends_a_compaction_and_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add([f"record {number} " + "word " * 40 for number in range(300)])
        monkeypatch.setattr("agentmem.database.STEPS", 10)
        compactions = iter(memory._engine.database.compact, None)
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        with pytest.raises(KeyboardInterrupt):
            list(compactions)
        assert len(memory.list(limit=1000)) == 300
        assert memory.verify().ok


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, old)


def test_a_column_whose_name_was_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    Database(path).close()
    content = path.read_bytes()
    assert content.count(b"text TEXT NOT NULL,\n    role") == 1
    path.write_bytes(content.replace(b"text TEXT NOT NULL,\n    role", b"text$TEXT NOT NULL,\n    role"))
    with pytest.raises(Corrupt, match=r"lacks records\.text"):
        Database(path)


def test_an_index_of_the_users_own_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "memory.db"
    with contextlib.closing(Database(path)) as database, database.write() as connection:
        connection.execute("CREATE INDEX mine ON records (name)")
    with contextlib.closing(Database(path)) as database:
        assert database.query("SELECT count(*) FROM records")[0][0] == 0
