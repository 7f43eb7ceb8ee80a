"""Trained prefixes in the page store: whole or not at all, for one tenant, model and head, and gone when forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.activation.pages import CODECS, LOSSY
from agentmem.activation.store import PageStore
from agentmem.activation.trained import StoredPrefix, TrainedPages, base_of
from agentmem.database import Database
from agentmem.errors import InvalidInput

BASE = base_of(bytes(32), "torch.float32")
HEAD = list(range(100, 200))
HEADS, DIM, LAYERS = 2, 16, 3
Layers = list[tuple[Any, Any]]


class Kept:
    def __init__(self, folder: Path, codec: Any = "raw", budget: int = 8 << 30) -> None:
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, folder / "pages", codec=codec, budget_bytes=budget)
        self.prefixes = self.of("ana")

    def of(self, tenant: str) -> TrainedPages:
        view = self.store.view(tenant.encode(), grid=TrainedPages.GRID)
        return TrainedPages(view, self.store, self.database, tenant)

    def rows(self) -> int:
        return len(self.database.query("SELECT key FROM meta WHERE key LIKE 'trained prefix%'"))

    def close(self) -> None:
        self.store.close()
        self.database.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path)
    yield made
    made.close()


def layers(length: int = 32, seed: int = 0) -> Layers:
    draw = np.random.default_rng(seed)

    def side() -> Any:
        return draw.standard_normal((HEADS, length, DIM), dtype=np.float32)

    return [(side(), side()) for _ in range(LAYERS)]


def keep(
    prefixes: TrainedPages, made: Layers | None = None, head: list[int] | None = None, owner: str = "a"
) -> StoredPrefix:
    made = made or layers()
    stored = prefixes.keep(
        BASE,
        head or HEAD,
        made,
        encoded=prefixes.settled(made),
        records=("r1", "r2"),
        report={"note": 1},
        seconds=60.0,
        owner=owner,
    )
    assert stored is not None
    return stored


def read(stored: StoredPrefix) -> Layers:
    into = [
        (np.empty((HEADS, stored.tokens, DIM), np.float32), np.empty((HEADS, stored.tokens, DIM), np.float32))
        for _ in range(LAYERS)
    ]
    for number, page in enumerate(stored.pages):
        page.read_layers([key for key, _ in into], [value for _, value in into], number * TrainedPages.GRID)
    return into


def equal(one: Layers, other: Layers) -> bool:
    return all(np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_what_was_judged_is_what_is_found(codec: str, tmp_path: Path) -> None:
    kept, made, before = Kept(tmp_path, codec), layers(48), layers(48)
    stored = keep(kept.prefixes, made)
    found = kept.prefixes.find(BASE, [*HEAD, 7])
    assert found is not None
    assert (found.digest, found.tokens, found.stands_for) == (stored.digest, 48, 100)
    assert (found.records, found.report) == (("r1", "r2"), {"note": 1})
    assert equal(read(found), made)
    assert equal(made, before) == (codec not in LOSSY)
    kept.close()


def test_it_stands_for_exactly_its_head_under_its_model(kept: Kept) -> None:
    keep(kept.prefixes)
    assert kept.prefixes.find(BASE, HEAD) is not None
    assert kept.prefixes.find(BASE, HEAD[:-1]) is None
    assert kept.prefixes.find(BASE, [*HEAD[:-1], 7, 8]) is None
    assert kept.prefixes.find(base_of(bytes(32), "torch.bfloat16"), HEAD) is None
    assert kept.prefixes.find(base_of(bytes([1]) * 32, "torch.float32"), HEAD) is None


def test_no_tenant_finds_or_drops_anothers(kept: Kept) -> None:
    stored = keep(kept.prefixes)
    other = kept.of("bo")
    assert other.find(BASE, HEAD) is None
    assert other.entries() == []
    assert other.drop(stored.digest) == []
    assert kept.prefixes.find(BASE, HEAD) is not None


def test_the_longest_head_wins_and_then_the_newest(kept: Kept) -> None:
    keep(kept.prefixes, head=HEAD[:50], owner="b")
    long = keep(kept.prefixes, owner="c")
    newer = keep(kept.prefixes, layers(seed=1), owner="d")
    found = kept.prefixes.find(BASE, [*HEAD, 7])
    assert found is not None
    assert found.digest == newer.digest != long.digest
    assert [entry.stands_for for entry in kept.prefixes.entries()] == [100, 100, 50]


def test_an_owner_has_one(kept: Kept) -> None:
    keep(kept.prefixes, head=HEAD[:50])
    newer = keep(kept.prefixes)
    assert [entry.digest for entry in kept.prefixes.entries()] == [newer.digest]
    assert len(kept.store.entries()) == 2


def test_it_is_pinned_until_it_is_dropped(kept: Kept) -> None:
    stored = keep(kept.prefixes)
    assert kept.store.evict() == 0
    assert kept.store.evict(bytes=1 << 40) == 0
    assert len(kept.prefixes.drop(stored.digest)) == len(stored.pages) == 2
    assert kept.prefixes.find(BASE, HEAD) is None
    assert (kept.store.entries(), kept.rows()) == ([], 0)


def test_forgetting_a_record_leaves_nothing_of_it(kept: Kept) -> None:
    keep(kept.prefixes)
    keep(kept.of("bo"), layers(seed=1))
    assert kept.rows() == 2
    kept.store.delete(kept.store.made_from(["r2"]))
    assert kept.prefixes.find(BASE, HEAD) is None
    assert (kept.store.entries(), kept.rows()) == ([], 0)


def test_one_made_from_a_forgotten_record_is_not_kept(kept: Kept) -> None:
    with kept.database.write() as connection:
        columns = [row["name"] for row in connection.execute("PRAGMA table_info(tombstones)")]
        connection.execute(
            f"INSERT INTO tombstones ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
            ["r1" if name == "record" else 0 for name in columns],
        )
    made = layers()
    stored = kept.prefixes.keep(BASE, HEAD, made, encoded=[], records=("r1",), report={}, seconds=1.0, owner="a")
    assert stored is None
    assert (kept.store.entries(), kept.rows()) == ([], 0)


def test_saving_leaves_it_out_and_says_so(kept: Kept, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    view = kept.store.view(b"ana", grid=16)
    view.seal(bytes(32), list(range(32)), 0, layers(), [(), ()])
    assert kept.store.save(tmp_path / "computed") == 2
    assert not caplog.records
    keep(kept.prefixes)
    keep(kept.of("bo"), layers(seed=1))
    assert kept.store.save(tmp_path / "saved") == 2
    assert "2 trained prefixes are not saved" in caplog.text
    (tmp_path / "other").mkdir()
    other = Kept(tmp_path / "other")
    assert other.store.restore(tmp_path / "saved") == 2
    assert [entry.tokens for entry in other.store.entries()] == [16, 16]
    assert other.prefixes.find(BASE, HEAD) is None
    other.close()
    assert kept.prefixes.find(BASE, HEAD) is not None


def test_half_a_prefix_is_none(kept: Kept) -> None:
    stored = keep(kept.prefixes)
    kept.store._catalog.path(stored.pages[1].name).unlink()
    assert kept.prefixes.find(BASE, HEAD) is None
    assert kept.prefixes.entries() == []


def test_without_room_it_is_not_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path, budget=1000)
    made = layers()
    assert kept.prefixes.keep(BASE, HEAD, made, encoded=[], records=(), report={}, seconds=1.0, owner="a") is None
    assert kept.rows() == 0
    kept.close()


@pytest.mark.parametrize("length", [0, 8, 40])
def test_states_that_make_no_whole_pages_are_refused(length: int, kept: Kept) -> None:
    with pytest.raises(InvalidInput, match=str(length)):
        kept.prefixes.keep(BASE, HEAD, layers(length), encoded=[], records=(), report={}, seconds=1.0, owner="a")
