"""Saved slots: only what is whole, ours and of the same identity is given out; what must go is gone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem.activation.slots import ASIDE, SlotStore, TenantSlots
from agentmem.database import Database

FACTS: dict[str, str | int] = {
    "model": "ab" * 32,
    "build": "b1",
    "context": 2048,
    "slots": 1,
    "rope": "",
    "cache types": "",
    "loras": "cd*1.0",
    "probe": "ef" * 32,
}
IDS = list(range(100, 140))
CONTENT = bytes(range(256)) * 20


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "memory.db")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "slots"
    path.mkdir()
    return path


@pytest.fixture
def store(database: Database) -> SlotStore:
    return SlotStore(database, step=16, budget_bytes=10 * len(CONTENT))


@pytest.fixture
def slots(store: SlotStore) -> TenantSlots:
    return store.view(b"tenant a")


def save(slots: TenantSlots, folder: Path, tokens: list[int] = IDS, *, records: Any = ("r1",), **more: Any) -> str:
    """What a server and the planner do."""
    name = slots.reserve(folder, FACTS, tokens, records)
    assert name is not None
    (folder / name).write_bytes(CONTENT)
    options: dict[str, Any] = {"size": len(CONTENT), "head": False, "records": records, **more}
    assert slots.keep(folder, FACTS, tokens, **options)
    return name


def usable(slots: TenantSlots, folder: Path, tokens: list[int] = IDS, facts: Any = FACTS) -> bool:
    """Whether anything is given out for these tokens."""
    found = slots.longest(folder, facts, tokens)
    return found is not None and slots.sound(folder, facts, tokens, found)


def test_what_was_saved_is_found_by_every_prompt_that_begins_with_it(slots: TenantSlots, folder: Path) -> None:
    name = save(slots, folder)
    found = slots.longest(folder, FACTS, [*IDS, 7, 8])
    assert found is not None
    assert (found.name, found.tokens, found.head) == (name, len(IDS), False)
    assert usable(slots, folder)
    assert slots.longest(folder, FACTS, IDS[:-1]) is None
    assert slots.longest(folder, FACTS, [*IDS[:-1], 7, 8]) is None


def test_the_longest_of_several_is_given_out(slots: TenantSlots, folder: Path) -> None:
    save(slots, folder, IDS[:20], head=True)
    longer = save(slots, folder, IDS[:30])
    found = slots.longest(folder, FACTS, IDS)
    assert found is not None
    assert found.name == longer


@pytest.mark.parametrize("fact", list(FACTS))
def test_any_one_fact_changed_alone_is_a_miss(slots: TenantSlots, folder: Path, fact: str) -> None:
    save(slots, folder)
    value = FACTS[fact]
    assert not usable(slots, folder, facts={**FACTS, fact: value + 1 if isinstance(value, int) else value + "x"})
    assert usable(slots, folder)


def test_another_tenant_finds_nothing(store: SlotStore, slots: TenantSlots, folder: Path) -> None:
    name = save(slots, folder)
    other = store.view(b"tenant b")
    assert other.longest(folder, FACTS, IDS) is None
    assert other.reserve(folder, FACTS, IDS, ()) != name
    assert not any(word in name for word in ("tenant", str(FACTS["model"])[:8]))


@pytest.mark.parametrize("field", ["name", "facts", "tokens", "ids", "head", "bytes", "crc32c", "format", "digest"])
def test_a_manifest_with_any_one_field_changed_is_a_miss(slots: TenantSlots, folder: Path, field: str) -> None:
    name = save(slots, folder)
    path = folder / f"{name}.json"
    manifest = json.loads(path.read_text())
    value = manifest[field]
    if isinstance(value, str):
        manifest[field] = ("1" if value[0] == "0" else "0") + value[1:]
    elif isinstance(value, dict):
        manifest[field] = {**value, "build": "b2"}
    else:
        manifest[field] = not value if isinstance(value, bool) else value + 1
    path.write_text(json.dumps(manifest))
    assert not usable(slots, folder)
    assert not (folder / name).exists(), "it is put aside"


def test_a_manifest_that_was_written_for_another_file_is_a_miss(slots: TenantSlots, folder: Path) -> None:
    """Even one whose own digest is right."""
    first, second = save(slots, folder, IDS[:20]), save(slots, folder, IDS[:30])
    (folder / f"{first}.json").replace(folder / f"{second}.json")
    assert not usable(slots, folder, IDS[:30])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(CONTENT) * 8 - 1))
def test_every_flipped_bit_is_noticed(slots: TenantSlots, folder: Path, at: int) -> None:
    name = save(slots, folder)
    damaged = bytearray(CONTENT)
    damaged[at // 8] ^= 1 << at % 8
    (folder / name).write_bytes(damaged)
    assert not usable(slots, folder)
    assert (folder / ASIDE / name).read_bytes() == damaged
    assert slots.longest(folder, FACTS, IDS) is None


@pytest.mark.parametrize("size", [0, 1, len(CONTENT) - 1, len(CONTENT) + 1])
def test_a_file_of_another_length_is_a_miss(slots: TenantSlots, folder: Path, size: int) -> None:
    name = save(slots, folder)
    (folder / name).write_bytes((CONTENT + b"x")[:size])
    assert not usable(slots, folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', "[" * 60000, "x" * 70000])
def test_a_manifest_that_is_none_is_a_miss(slots: TenantSlots, folder: Path, text: str) -> None:
    name = save(slots, folder)
    (folder / f"{name}.json").write_text(text)
    assert not usable(slots, folder)


@pytest.mark.parametrize("damage", ["file", "manifest", "missing"])
def test_verify_reads_every_slot_and_puts_the_damaged_aside(
    store: SlotStore, slots: TenantSlots, folder: Path, damage: str
) -> None:
    name, good = save(slots, folder), save(slots, folder, IDS[:20])
    assert store.verify() == (2, [])
    if damage == "missing":
        (folder / name).unlink()
    else:
        file = folder / (name if damage == "file" else f"{name}.json")
        file.write_bytes(file.read_bytes()[:-1])
    sound, [problem] = store.verify()
    assert sound == 1
    assert name in problem
    assert store.verify() == (1, [])
    assert store.made_from(["r1"]) == sorted([name, good])  # forgetting still finds it


def test_foreign_files_are_left_alone(slots: TenantSlots, folder: Path) -> None:
    for foreign in ("model.bin", "x.slot", "notes.json"):
        (folder / foreign).write_text("theirs")
    save(slots, folder)
    assert usable(slots, folder)
    assert {"model.bin", "x.slot", "notes.json"} <= set(os.listdir(folder))


def test_a_file_shorter_than_the_server_said_is_not_kept(slots: TenantSlots, folder: Path) -> None:
    name = slots.reserve(folder, FACTS, IDS, ())
    assert name is not None
    (folder / name).write_bytes(CONTENT[:-1])
    assert not slots.keep(folder, FACTS, IDS, size=len(CONTENT), head=True, records=())
    assert os.listdir(folder) == []
    assert not slots.keep(folder, FACTS, IDS, size=len(CONTENT), head=True, records=()), "nor one that is missing"


def test_lineage_is_there_before_the_file_and_goes_with_it(
    store: SlotStore, slots: TenantSlots, folder: Path, database: Database
) -> None:
    name = slots.reserve(folder, FACTS, IDS, ["r1", "r2", "r1"])
    assert store.made_from(["r2"]) == [name]
    slots.discard(folder, str(name))
    assert store.made_from(["r1"]) == []
    assert database.query("SELECT * FROM lineage") == []


def test_what_was_made_from_a_record_is_deleted_also_where_it_was_put_aside(
    store: SlotStore, slots: TenantSlots, folder: Path
) -> None:
    good, bad = save(slots, folder, IDS[:20], records=["r1"]), save(slots, folder, IDS[:30], records=["r2"])
    (folder / bad).write_bytes(b"damaged")
    assert usable(slots, folder, IDS[:20])
    assert not usable(slots, folder, IDS[:30])
    assert store.made_from(["r2"]) == [bad]
    store.delete(store.made_from(["r1", "r2"]))
    assert [path for path in folder.rglob("*.slot*") if path.is_file()] == []
    assert store.made_from(["r1", "r2"]) == []
    assert good != bad


def test_another_process_finds_the_folders_to_delete_from(slots: TenantSlots, folder: Path, database: Database) -> None:
    save(slots, folder)
    later = SlotStore(database, step=16, budget_bytes=1 << 20)
    later.delete(later.made_from(["r1"]))
    assert list(folder.glob("*.slot*")) == []


def test_a_forgotten_record_leaves_nothing_even_if_it_is_forgotten_while_the_server_writes(
    slots: TenantSlots, folder: Path, database: Database
) -> None:
    name = slots.reserve(folder, FACTS, IDS, ["r1"])
    assert name is not None
    with database.write() as connection:
        connection.execute("INSERT INTO tombstones VALUES ('r1', 0)")
    (folder / name).write_bytes(CONTENT)
    assert not slots.keep(folder, FACTS, IDS, size=len(CONTENT), head=False, records=["r1"])
    assert os.listdir(folder) == []
    assert slots.reserve(folder, FACTS, IDS, ["r1"]) is None


def test_the_least_recently_used_go_when_the_budget_is_full(database: Database, folder: Path, store: SlotStore) -> None:
    slots = SlotStore(database, step=16, budget_bytes=3 * len(CONTENT)).view(b"t")
    names = [save(slots, folder, IDS[:n]) for n in (10, 20, 30)]
    for age, name in enumerate(names):
        os.utime(folder / f"{name}.json", (1000 + age, 1000 + age))
    assert usable(slots, folder, IDS[:10])  # used again: the oldest no more
    save(slots, folder, IDS)
    assert [(folder / name).exists() for name in names] == [True, False, True]
    assert store.size() == 3 * len(CONTENT)


def test_a_conversation_that_went_on_needs_its_longer_file_only(slots: TenantSlots, folder: Path) -> None:
    first = save(slots, folder, IDS[:20])
    second = save(slots, folder, IDS, instead_of=first)
    assert {path.name for path in folder.glob("*.slot")} == {second}


def test_no_budget_no_file(database: Database, folder: Path) -> None:
    assert SlotStore(database, step=16, budget_bytes=0).view(b"t").reserve(folder, FACTS, IDS, ()) is None


def test_restores_without_effect_are_counted_and_told_apart_by_identity(slots: TenantSlots, database: Database) -> None:
    slots.judge(FACTS, helped=False)
    assert slots.helps(FACTS)
    slots.judge(FACTS, helped=True)  # starts the count anew
    slots.judge(FACTS, helped=False)
    slots.judge(FACTS, helped=False)
    assert not slots.helps(FACTS)
    assert slots.helps({**FACTS, "build": "b2"})
    assert not SlotStore(database, step=16, budget_bytes=1).view(b"another").helps(FACTS)


def test_a_folder_that_is_missing_or_unreadable_is_a_miss(slots: TenantSlots, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert slots.longest(nowhere, FACTS, IDS) is None
    name = slots.reserve(nowhere, FACTS, IDS, ())
    assert name is not None
    assert not slots.keep(nowhere, FACTS, IDS, size=1, head=True, records=())


def test_what_a_killed_process_left_is_removed_later(database: Database, slots: TenantSlots, folder: Path) -> None:
    name = slots.reserve(folder, FACTS, IDS, ["r1"])
    assert name is not None
    (folder / name).write_bytes(CONTENT)  # killed before the manifest was written
    kept = save(slots, folder, IDS[:20])
    SlotStore(database, step=16, budget_bytes=1 << 20)
    assert (folder / name).exists(), "another process may be saving it this moment"
    os.utime(folder / name, (1000, 1000))
    SlotStore(database, step=16, budget_bytes=1 << 20)
    assert {path.name for path in folder.glob("*.slot")} == {kept}
