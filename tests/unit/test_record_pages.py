"""KV states of single records in the page store: any length, no confusion, nothing of what was forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem import prompt
from agentmem.activation.records import RecordPages
from agentmem.activation.store import PageStore
from agentmem.database import Database

IDENTITY = bytes(32)
HEADS, DIM, LAYERS = 2, 16, 3
Layers = list[tuple[Any, Any]]


class Kept:
    def __init__(self, folder: Path, codec: Any = "raw") -> None:
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, folder / "pages", grid=256, codec=codec)
        self.records = self.view(b"salt")

    def view(self, salt: bytes) -> RecordPages:
        return RecordPages(
            self.store.view(salt, grid=RecordPages.GRID), self.database, repaired=False, lay_out=prompt.made_up
        )

    def close(self) -> None:
        self.store.close()
        self.database.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.close()


def states(length: int, seed: int = 0) -> Layers:
    draw = np.random.default_rng(seed)
    return [
        (
            draw.standard_normal((HEADS, length, DIM), dtype=np.float32),
            draw.standard_normal((HEADS, length, DIM), dtype=np.float32),
        )
        for _ in range(LAYERS)
    ]


def read(pages: Any, length: int) -> Layers:
    layers = [
        (np.empty((HEADS, 64 * len(pages), DIM), np.float32), np.empty((HEADS, 64 * len(pages), DIM), np.float32))
        for _ in range(LAYERS)
    ]
    for number, page in enumerate(pages):
        page.read_layers([key for key, _ in layers], [value for _, value in layers], 64 * number)
    return [(key[:, :length], value[:, :length]) for key, value in layers]


@pytest.mark.parametrize("codec", ["raw", "lossless", "int8", "k8v4"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_a_record_of_any_length_comes_back(length: int, codec: str, tmp_path: Path) -> None:
    kept, tokens, layers = Kept(tmp_path, codec), list(range(length)), states(length)
    before = [(key.copy(), value.copy()) for key, value in layers]
    assert kept.records.keep(IDENTITY, "r", tokens, layers)
    pages = kept.records.find(IDENTITY, "r", tokens)
    assert len(pages) == -(-length // 64)
    bound = {"raw": 0.0, "lossless": 0.0, "int8": 0.05, "k8v4": 0.5}[codec]
    for (key, value), (wanted, other) in zip(read(pages, length), before, strict=True):
        np.testing.assert_allclose(key, wanted, atol=min(bound, 0.05))
        np.testing.assert_allclose(value, other, atol=bound)
    kept.close()


def test_padding_is_not_taken_for_tokens(kept: Kept) -> None:
    tokens = [5, 6, 7, 7]
    assert kept.records.keep(IDENTITY, "r", tokens, states(4))
    assert kept.records.find(IDENTITY, "r", tokens)
    for others in ([5, 6, 7], [5, 6, 7, 7, 7], [5, 6, 7] + [7] * 61):
        assert not kept.records.find(IDENTITY, "r", others)


def test_no_tokens_have_no_pages(kept: Kept) -> None:
    assert not kept.records.keep(IDENTITY, "r", [], states(0))
    assert not kept.records.find(IDENTITY, "r", [])


def test_states_are_found_under_their_record_identity_and_tenant_alone(kept: Kept) -> None:
    assert kept.records.keep(IDENTITY, "r", [1, 2], states(2))
    assert not kept.records.find(IDENTITY, "s", [1, 2])
    assert not kept.records.find(b"\1" * 32, "r", [1, 2])
    assert not kept.view(b"pepper").find(IDENTITY, "r", [1, 2])


def test_half_a_record_is_none(kept: Kept) -> None:
    tokens = list(range(130))
    assert kept.records.keep(IDENTITY, "r", tokens, states(130))
    kept.store.evict([kept.records.find(IDENTITY, "r", tokens)[2].name.hex()])
    assert not kept.records.find(IDENTITY, "r", tokens)
    assert kept.records.keep(IDENTITY, "r", tokens, states(130))
    assert len(kept.records.find(IDENTITY, "r", tokens)) == 3


def test_pages_say_their_length_and_their_lineage(kept: Kept) -> None:
    assert kept.records.keep(IDENTITY, "r", list(range(70)), states(70), learnt=("taught",))
    entries = kept.store.entries()
    assert [entry.tokens for entry in entries] == [64, 64]
    assert all(entry.records == ("r", "taught") for entry in entries)
    for record in ("r", "taught"):
        assert set(kept.store.made_from([record])) == {entry.key for entry in entries}
    kept.store.delete(kept.store.made_from(["taught"]))
    assert not kept.records.find(IDENTITY, "r", list(range(70)))


def test_a_forgotten_record_is_not_kept(kept: Kept) -> None:
    with kept.database.write() as connection:
        connection.execute("INSERT INTO tombstones VALUES ('r', 0)")
    assert not kept.records.keep(IDENTITY, "r", [1, 2], states(2))
    assert not kept.store.entries()


def test_records_and_prefixes_share_one_budget(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for number in range(6):
        assert kept.records.keep(IDENTITY, f"r{number}", [number], states(1))
    size = kept.store.bytes()
    kept.store.budget_bytes = size // 2
    kept.store.evict()
    assert 0 < kept.store.bytes() <= size // 2
    kept.close()


def test_a_verdict_is_noted_and_replaced(kept: Kept) -> None:
    assert kept.records.verdict(b"model") == {}
    kept.records.note(b"model", {"passed": False})
    kept.records.note(b"model", {"passed": True, "lists": [[0.5]]})
    assert kept.view(b"pepper").verdict(b"model") == {"passed": True, "lists": [[0.5]]}
    with kept.database.write() as connection:
        connection.execute("UPDATE meta SET value = 'no json' WHERE key LIKE 'record kv %'")
    assert kept.records.verdict(b"model") == {}


def test_a_full_disk_is_logged_and_no_more(kept: Kept, caplog: pytest.LogCaptureFixture) -> None:
    kept.close()
    assert not kept.records.keep(IDENTITY, "r", [1], states(1))
    assert kept.records.find(IDENTITY, "r", [1]) == []
