"""After ``forget`` and ``compact`` no byte of a text or a vector is left in the folder, the log included."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from agentmem import Memory
from tests.unit.test_database import golden

CANARY = "quixotry"


def needles(memory: Memory, id_: str, text: str) -> list[bytes]:
    """The bytes to look for: the text's rare words in three encodings, vectors as float32, token codes, metadata."""
    words = [word for word in text.split() if CANARY in word]
    found = [word.encode(code) for word in words for code in ("utf-8", "utf-16-le", "utf-16-be")]
    query = memory._engine.database.query
    vectors = query("SELECT vector FROM vectors WHERE seq IN (SELECT seq FROM records WHERE id = ?)", (id_,))
    tokens = query("SELECT codes FROM tokens WHERE seq IN (SELECT seq FROM records WHERE id = ?)", (id_,))
    return list({*found, *(row[0] for row in vectors), *(row[0] for row in tokens)})


def residue(folder: Path, wanted: list[bytes]) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        yield from ((str(path), needle) for needle in set(wanted) if needle in content)


def test_no_byte_is_left_of_what_was_forgotten(tmp_path: Path) -> None:
    chance = random.Random(3)
    with Memory(tmp_path, embedder="hash") as memory:
        for number in range(40):
            memory.add([f"fact {number} {'padding ' * chance.randrange(300)}" for _ in range(3)])
        secret: list[bytes] = []
        gone = []
        for number in range(24):
            text = f"The {CANARY}{number} phrase " + f"{CANARY}long{number} " * chance.choice([1, 250])
            [record] = memory.scope(user="ana").add(text, metadata={"k": f"{CANARY}meta{number}"})
            memory.add(f"something else {number} " * chance.randrange(1, 200))
            secret += needles(memory, record.id, text)
            if number % 3 == 0:
                memory.update(record.id, f"Corrected: {CANARY}{number}b")
                secret += needles(memory, record.id, f"{CANARY}{number}b")
            gone.append(record.id)
        memory.search(CANARY)
        memory._engine.index.save() if memory._engine.index else None
        assert list(residue(tmp_path, secret)), "the scan finds nothing even before"
        for id_ in gone[:5]:
            memory.forget(id_)
        memory.forget(gone[5:])
        compaction = memory.compact()
        assert compaction.emptied
        assert list(residue(tmp_path, [CANARY.encode(), *secret])) == []
        assert memory.verify().problems == []
        assert len(memory.list(limit=1_000)) == 144
    assert list(residue(tmp_path, [CANARY.encode(), *secret])) == []


def test_a_backup_from_before_an_upgrade_goes_with_the_compaction(tmp_path: Path) -> None:
    golden(tmp_path, 4)
    with Memory(tmp_path, embedder="hash") as memory:
        assert list(tmp_path.glob("memory.db.format-*"))
        memory.compact()
        assert not list(tmp_path.glob("memory.db.format-*"))
        assert len(memory.list()) == 4


def test_a_compaction_beside_a_reader_says_that_its_log_is_still_read(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory, Memory(tmp_path, embedder="none") as other:
        memory.add([f"fact {number}" for number in range(50)])
        reading = other._engine.database
        with reading._lock:
            cursor = reading._live().execute("SELECT * FROM records")
            cursor.fetchone()
            reading_goes_on = memory.compact()
            cursor.close()
        assert not reading_goes_on.emptied
        assert memory.compact().emptied
        assert len(other.list()) == 50
        shutil.rmtree(tmp_path / "index", ignore_errors=True)
        assert memory.verify().ok
