"""Every file of a folder, damaged in every way: an error by name, a repair, or a finding of `verify`; never silence."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import AgentMemError, Memory

pytestmark = pytest.mark.slow

FULL = os.environ.get("AGENTMEM_RELIABILITY") == "full"
#: Bit flips of each file, and flips at several places at once.
FLIPS, SHOWERS = (220, 40) if FULL else (14, 3)
QUERIES = ["peanuts and garlic", "who lives in Oslo", "the lantern", "word7 word8"]


def fill(memory: Memory) -> None:
    ana, ben = memory.scope(tenant="acme", user="ana"), memory.scope(user="ben", session="s1")
    said = ana.add([{"role": "user", "content": f"I eat peanuts and garlic on day {day}."} for day in range(40)])
    ben.add("My sister Zoë lives in Oslo.", valid_from="2020-01-01", valid_until="2031-01-01", metadata={"k": [1, "v"]})
    ben.add("A long one: " + " ".join(f"word{n}" for n in range(900)), source="notes.txt")
    for record in said[:6]:
        ana.update(record.id, record.text + " Or so I thought.")
    ana.forget([record.id for record in said[6:9]])
    memory.add({"role": "tool", "content": "The lantern is lit.", "name": "lamp"})
    ana.forget(ana.add("The passphrase is quixotry.")[0].id)


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: an early state, a closed one, and one as a killed process leaves it, with a log."""
    root = tmp_path_factory.mktemp("states")
    with Memory(root / "live", embedder="hash") as memory:
        memory.add("before all")
        memory.search("before")
    shutil.copytree(root / "live", root / "early")
    with Memory(root / "live", embedder="hash") as memory:
        fill(memory)
        for query in QUERIES:
            memory.search(query)
    shutil.copytree(root / "live", root / "closed")
    with Memory(root / "live", embedder="hash") as memory:
        memory.search("before")
        shutil.copytree(root / "live", root / "early_log")
        memory.add([f"In the log: item {n}" for n in range(30)])
        memory.update(memory.list(limit=1)[0].id, "before all, and after")
        shutil.copytree(root / "live", root / "killed")
    return {name: root / name for name in ("early", "closed", "early_log", "killed")}


def told(folder: Path) -> dict[str, Any]:
    """All that a folder says: records, histories, which records are found, and by which words."""
    with Memory(folder, embedder="hash") as memory:
        records = memory.list(limit=10_000)
        histories = {record.id: memory.history(record.id) for record in records}
        found = {query: [hit.record.id for hit in memory.search(query, k=5)] for query in QUERIES}
        shared = memory.scope(user="ben").list(limit=10_000)
        gone = memory._engine.database.query("SELECT record FROM tombstones ORDER BY record")
        return {
            "records": records,
            "histories": histories,
            "found": found,
            "shared": shared,
            "gone": [tuple(row) for row in gone],
        }


def damages(content: bytes, early: bytes | None, seed: str) -> Iterator[tuple[str, bytes | None]]:
    """(name, what the file has become) of each damage; None is no file at all."""
    chance = random.Random(seed)
    size, half = len(content), len(content) // 2
    yield "deleted", None
    yield "emptied", b""
    yield "half", content[:half]
    yield "one byte short", content[:-1]
    yield "a page short", content[:-4096]
    yield "zeros", bytes(size)
    yield "second half zeros", content[:half] + bytes(size - half)
    yield "junk", chance.randbytes(size)
    yield "junk behind", content + chance.randbytes(700)
    if early is not None:
        yield "an older copy", early
    if not content:
        return
    for _ in range(FLIPS):
        yield "a bit flipped", flipped(content, [chance.randrange(size * 8)])
    used = [at for at in range(size) if content[at]] or [0]  # not in the room between rows
    for _ in range(FLIPS):
        yield "a used bit flipped", flipped(content, [chance.choice(used) * 8 + chance.randrange(8)])
    for _ in range(SHOWERS):
        bits = chance.choice([2, 10, 100])
        yield f"{bits} bits flipped", flipped(content, [chance.randrange(size * 8) for _ in range(bits)])
    for _ in range(SHOWERS):
        at = chance.randrange(-(-size // 512)) * 512
        yield "a sector of zeros", content[:at] + bytes(min(512, size - at)) + content[at + 512 :]


def flipped(content: bytes, bits: list[int]) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def outcome(folder: Path, expected: dict[str, Any]) -> str:
    """What a damaged folder does: "named" in an error or by `verify`, or "whole"; anything else is an assertion."""
    try:
        said = told(folder)
    except AgentMemError:
        return "named"
    with Memory(folder, embedder="hash") as memory:
        found = memory.verify().problems
    if found:
        return "named"
    assert said == expected, {key: (value, said[key]) for key, value in expected.items() if said[key] != value}
    return "whole"


@pytest.mark.parametrize("state", ["closed", "killed"])
def test_no_damage_is_silent(tmp_path: Path, states: dict[str, Path], state: str) -> None:
    shutil.copytree(states[state], tmp_path / "sound")
    expected = told(tmp_path / "sound")
    outcomes: Counter[tuple[str, str]] = Counter()
    silent: list[str] = []
    early = states["early" if state == "closed" else "early_log"]
    for file in sorted(path for path in states[state].rglob("*") if path.is_file()):
        name = file.relative_to(states[state])
        content = file.read_bytes()
        older = (early / name).read_bytes() if (early / name).exists() else None
        for number, (damage, changed) in enumerate(damages(content, older, str(name))):
            shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
            shutil.copytree(states[state], tmp_path / "damaged")
            if changed is None:
                (tmp_path / "damaged" / name).unlink()
            else:
                (tmp_path / "damaged" / name).write_bytes(changed)
            try:
                outcomes[str(name.parent / name.suffix), outcome(tmp_path / "damaged", expected)] += 1
            except Exception as error:
                silent.append(f"{name}, damage {number} ({damage}): {type(error).__name__}: {error}")
    assert silent == []
    # Damage to what is derived is repaired, and room between rows says nothing; the rest has to be noticed.
    assert outcomes[".db", "named"] > outcomes[".db", "whole"] / 4, outcomes
