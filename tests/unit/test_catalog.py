"""The catalog: what the database says, as arrays, whatever happens to the records."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.plaintext import catalog as module
from agentmem.plaintext.catalog import TIMED, Catalog, View
from agentmem.plaintext.conditions import joined, valid_at, visible
from agentmem.plaintext.drafts import ROLES
from agentmem.plaintext.records import Records, drafts
from agentmem.types import Record, Scope

NOW = 1_700_000_000.0


class Store:
    def __init__(self, path: str | Path = ":memory:") -> None:
        self.database = Database(path)
        self.records = Records(self.database)
        self.catalog = Catalog(self.database)

    def add(self, *content: Any, **options: Any) -> list[Record]:
        levels = {key: options.pop(key, None) for key in ("tenant", "user", "agent", "session")}
        return self.records.insert(drafts(list(content), scope=Scope(**levels), **options))


@pytest.fixture
def store() -> Store:
    return Store()


def expected(store: Store, scope: Scope, at: float) -> set[int]:
    sql, values = joined([visible(scope), valid_at(at)])
    return {row[0] for row in store.database.query(f"SELECT seq FROM records WHERE {sql}", values)}


def fresh(store: Store, tenant: str | None) -> dict[str, Any]:
    return columns(Catalog(store.database).view(tenant))


def columns(view: View) -> dict[str, Any]:
    """What a view says, by row number: places, codes and documents may differ between two views that say the same."""
    live = np.flatnonzero(view.live)
    beside = {name: np.append(view.seq, -1)[getattr(view, name)][live].tolist() for name in ("previous", "next")}
    same: dict[int, list[int]] = {}
    for place in live.tolist():
        same.setdefault(int(view.document[place]), []).append(int(view.seq[place]))
    plain = ("seq", "role", "asks", "timed", "length", "from_s", "until_s")
    return {
        **{name: getattr(view, name)[live].tolist() for name in plain},
        **beside,
        "at_s": np.nan_to_num(view.at_s[live], nan=-1).tolist(),
        "name": [[*view.names, None][code] for code in view.name[live].tolist()],
        "documents": sorted(same.values()),
    }


def test_says_what_the_records_say(store: Store) -> None:
    store.add(
        {"role": "user", "content": "Where was I yesterday? ", "name": "Ana"}, session="s", at="2024-05-01T10:00Z"
    )
    store.add(
        {"role": "assistant", "content": "At home"}, session="s", valid_from="2024-01-01", valid_until="2025-01-01"
    )
    view = store.catalog.view(None)
    assert view.seq.tolist() == [1, 2]
    assert view.asks.tolist() == [True, False]
    assert view.timed.tolist() == [True, False]
    assert view.length.tolist() == [5, 2]
    assert [ROLES[role] for role in view.role.tolist()] == ["user", "assistant"]
    assert view.names == ["Ana"]
    assert view.name.tolist() == [0, -1]
    assert view.at_s[0] == 1714557600
    assert np.isnan(view.at_s[1])
    assert (view.from_s.tolist(), view.until_s.tolist()) == ([-np.inf, 1704067200], [np.inf, 1735689600])
    assert (view.previous.tolist(), view.next.tolist()) == ([-1, 0], [1, -1])


def test_neighbours_are_those_of_the_same_full_scope(store: Store) -> None:
    for number, (user, session) in enumerate(
        [("a", "s"), ("b", "s"), ("a", None), ("a", "s"), ("b", "s"), ("a", None)]
    ):
        store.add(f"turn {number}", user=user, session=session)
    view = store.catalog.view(None)
    assert view.previous.tolist() == [-1, -1, -1, 0, 1, -1]
    assert view.next.tolist() == [3, 4, -1, -1, -1, -1]
    document = view.document.tolist()
    assert (document[0], document[1]) == (document[3], document[4])
    assert len(set(document)) == 4


def test_long_texts_have_their_length_in_words(store: Store) -> None:
    store.add("word " * 70_000)
    assert store.catalog.view(None).length.tolist() == [70_000]


@pytest.mark.parametrize("seed", range(4))
def test_allowed_is_what_the_conditions_say(seed: int) -> None:
    store, draw = Store(), random.Random(seed)
    levels = [None, "a", "b", "A"]
    for number in range(120):
        start = draw.choice([None, "2023-11-01", "2023-12-01"])
        end = draw.choice([None, "2023-11-20", "2024-01-01"]) if start != "2023-12-01" else None
        names = {level: draw.choice(levels) for level in ("tenant", "user", "agent", "session")}
        store.add(f"text {number}", **names, valid_from=start, valid_until=end)
    for _ in range(60):
        scope = Scope(**{level: draw.choice([*levels, "c"]) for level in ("tenant", "user", "agent", "session")})
        view = store.catalog.view(scope.tenant)
        for at in (NOW, NOW - 30 * 86400, NOW, 1704067200.0, 1704067199.5):
            assert set(view.seq[view.allowed(scope, at)].tolist()) == expected(store, scope, at)


def test_a_mask_can_not_be_written_to(store: Store) -> None:
    store.add("text")
    with pytest.raises(ValueError, match="read-only"):
        store.catalog.view(None).allowed(Scope(), NOW)[0] = False


@pytest.mark.parametrize("seed", range(6))
def test_follows_every_change(seed: int) -> None:
    store, draw = Store(), random.Random(seed)
    held: list[View] = []
    ids: list[str] = []
    for step in range(60):
        kind = draw.random()
        if kind < 0.55 or not ids:
            names = {"tenant": draw.choice([None, "t", "u"]), "session": draw.choice([None, "s", "z"])}
            texts = [f"words number {step} {n}" + draw.choice(["", "?", " in may"]) for n in range(draw.randint(1, 4))]
            ids += [record.id for record in store.add(*texts, **names)]
        elif kind < 0.75:
            chosen = draw.choice(ids)
            store.records.update(chosen, Scope(), text=f"other words {step}?")
        else:
            gone = draw.sample(ids, min(len(ids), 2))
            store.records.delete(gone)
            ids = [id_ for id_ in ids if id_ not in gone]
        for tenant in (None, "t"):
            view = store.catalog.view(tenant)
            assert columns(view) == fresh(store, tenant)
            if draw.random() < 0.2:
                held.append(view)  # as a search in another thread would


def test_a_view_in_use_stays_as_it_was(store: Store) -> None:
    ids = [record.id for record in store.add("one", "two", "three", session="s")]
    view = store.catalog.view(None)
    before = {name: getattr(view, name).copy() for name in module.COLUMNS}
    store.add("four", session="s")
    store.records.delete(ids[1:2])
    store.records.update(ids[0], Scope(), text="one?")
    after = store.catalog.view(None)
    assert all(np.array_equal(getattr(view, name), before[name], equal_nan=True) for name in before if name != "at_s")
    assert columns(after) == fresh(store, None)


def test_another_process_s_commit_is_in_the_next_view(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path / "memory.db"), Store(tmp_path / "memory.db")
    mine.add("first")
    assert theirs.catalog.view(None).n == 1
    mine.add("second")
    assert theirs.catalog.view(None).n == 2


def test_a_history_that_is_not_ours_is_read_anew(store: Store) -> None:
    store.add("one", "two")
    assert store.catalog.view(None).n == 2
    with store.database.write() as connection:
        connection.execute("DELETE FROM changes")
        connection.execute("DELETE FROM records WHERE seq = 1")
    assert store.catalog.view(None).seq.tolist() == [2]


def test_what_was_deleted_is_let_go_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEW_DEAD", 3)
    ids = [record.id for record in store.add(*(f"text {n}" for n in range(12)))]
    assert store.catalog.view(None).n == 12
    store.records.delete(ids[:3])
    assert store.catalog.view(None).n == 12
    store.records.delete(ids[3:5])
    assert store.catalog.view(None).n == 7


def test_the_views_used_longest_ago_go_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", 5)
    for tenant in ("a", "b", "c"):
        store.add("one", "two", tenant=tenant)
        assert store.catalog.view(tenant).n == 2
    assert [*store.catalog._tables] == ["b", "c"]


def test_places_of_rows(store: Store) -> None:
    ids = [record.id for record in store.add("a", "b", "c")]
    store.add("foreign", tenant="t")
    store.add("d")
    store.records.delete(ids[1:2])
    view = store.catalog.view("other")
    assert view.places([1, 2, 3, 4, 5, 99]).tolist() == [0, -1, 1, -1, 2, -1]


def test_a_damaged_text_keeps_no_other_from_being_seen(store: Store) -> None:
    store.add("fine", "bad")
    with store.database.write() as connection:
        connection.execute("UPDATE records SET text = CAST(x'80ff' AS TEXT) WHERE seq = 2")
    assert store.catalog.view(None).n == 2


def test_threads_see_whole_views(store: Store) -> None:
    failures: list[BaseException] = []

    def look() -> None:
        try:
            for _ in range(150):
                view = store.catalog.view(None)
                near = view.next[view.next >= 0]
                assert (near < view.n).all()
                assert (view.previous[near] >= 0).all()
                assert view.allowed(Scope(user="u"), NOW).sum() == view.live.sum()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(60):
        [record] = store.add(f"turn {number}", user="u", session="s")
        if number % 3 == 0:
            store.records.delete([record.id])
    for thread in threads:
        thread.join()
    assert not failures


def test_what_is_gone_has_no_neighbours_and_is_none(store: Store) -> None:
    [first] = store.add("one", session="s")
    store.catalog.view(None)
    store.add("two", "three", session="s")  # seen together with what follows
    store.records.delete([first.id])
    view = store.catalog.view(None)
    assert view.live.tolist() == [False, True, True]
    assert view.next.tolist() == [-1, 2, -1]
    assert view.previous.tolist() == [-1, -1, 1]


@pytest.mark.parametrize("held", [False, True])
def test_what_ctrl_c_left_half_applied_is_not_gone_on_with(
    held: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add("one", "two", session="s")
    before = store.catalog.view(None)
    if not held:
        del before
    store.add("three", "four", session="s")

    def interrupted(table: Any, first: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module._Table, "_link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.catalog.view(None)
    view = store.catalog.view(None)
    assert view.previous.tolist() == [-1, 0, 1, 2]
    assert len(set(view.document.tolist())) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_with_a_free_lock(tmp_path: Path) -> None:
    store = Store(tmp_path / "memory.db")
    store.add("text")
    store.catalog.view(None)
    with store.catalog._lock:
        child = os.fork()
        if child == 0:
            done: list[int] = []
            thread = threading.Thread(target=lambda: done.append(store.catalog.view(None).n), daemon=True)
            thread.start()
            thread.join(20)
            os._exit(0 if done == [1] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("text", "timed"),
    [("We met LAST WEEK", True), ("in 2023 we", True), ("i may go", True), ("maybe not", False), ("dismay", False)],
)
def test_words_of_time(text: str, timed: bool) -> None:
    assert (TIMED.search(text.lower()) is not None) is timed
