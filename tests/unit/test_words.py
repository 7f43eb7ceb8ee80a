"""Words as evidence: BM25 as the book has it, over the allowed rows only, in step with the store."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.plaintext import postings
from agentmem.plaintext.catalog import Catalog, View
from agentmem.plaintext.postings import MOST_TERMS, Postings, stems
from agentmem.plaintext.records import Records, drafts
from agentmem.plaintext.words import Lexical, Words
from agentmem.types import Record, Scope

VOCABULARY = ["ant", "bread", "cat", "dog", "egg", "fish", "goat", "hat"]


class Store:
    def __init__(self, path: str | Path = ":memory:") -> None:
        self.database = Database(path)
        self.records = Records(self.database)
        self.catalog = Catalog(self.database)
        self.words = Words()

    @classmethod
    def of(cls, database: Database) -> Store:
        """Another view of the same database, made anew."""
        store = cls()
        store.database, store.records, store.catalog = database, Records(database), Catalog(database)
        return store

    def add(self, *content: Any, **levels: Any) -> list[Record]:
        return self.records.insert(drafts(list(content), scope=Scope(**levels)))

    def score(self, query: str, scope: Scope | None = None, allowed: Any = None) -> tuple[View, Lexical]:
        scope = scope or Scope()
        view = self.catalog.view(scope.tenant)
        mask = view.allowed(scope, 0.0) if allowed is None else allowed
        return view, self.words.score(view, self.words.stems(query), mask)


def bm25(documents: dict[int, list[str]], query: list[str]) -> dict[int, float]:
    """The formula, word by word."""
    usual = sum(map(len, documents.values())) / len(documents)
    scores = dict.fromkeys(documents, 0.0)
    for word in query:
        having = sum(word in words for words in documents.values())
        rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        for key, words in documents.items():
            often = words.count(word)
            scores[key] += rarity * often * 2.2 / (often + 1.2 * (0.25 + 0.75 * len(words) / usual))
    return scores


def filled(draw: random.Random) -> Store:
    store = Store()
    for _ in range(80):
        text = " ".join(draw.choices(VOCABULARY, k=draw.randint(1, 6)))
        store.add(text, user=draw.choice(["a", "b"]), session=draw.choice([None, "s", "t"]))
    return store


def slow(view: View, store: Store, allowed: Any, query: list[str]) -> tuple[dict[int, float], ...]:
    texts = {row[0]: row[1].split() for row in store.database.query("SELECT seq, text FROM records")}
    turns = {p: texts[int(view.seq[p])] for p in np.flatnonzero(allowed).tolist()}
    windows = {
        p: words + turns.get(int(view.previous[p]), []) + turns.get(int(view.next[p]), []) for p, words in turns.items()
    }
    sessions: dict[int, list[str]] = {}
    for place, words in turns.items():
        sessions.setdefault(int(view.document[place]), []).extend(words)
    whole = bm25(sessions, query)
    by_session = {place: whole[int(view.document[place])] for place in turns}
    return bm25(turns, query), bm25(windows, query), by_session


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lazily", [False, True])
def test_scores_are_those_of_the_formula(seed: int, lazily: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if lazily:
        monkeypatch.setattr(Postings, "SMALL", 0)
    draw = random.Random(seed)
    store = filled(draw)
    view = store.catalog.view(None)
    allowed = np.array([draw.random() < 0.7 for _ in range(view.n)])
    _, found = store.score("ant cat hat unheard", allowed=allowed)
    query = stems("ant cat hat unheard")
    for got, wanted in zip((found.turn, found.window, found.session), slow(view, store, allowed, query), strict=True):
        assert np.allclose(got[allowed], [wanted[p] for p in np.flatnonzero(allowed).tolist()], rtol=1e-5, atol=1e-6)
        assert not got[~allowed].any()


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_postings_follow_every_change(seed: int, lazily: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if lazily:
        monkeypatch.setattr(Postings, "SMALL", 0)
    draw = random.Random(seed)
    store = filled(draw)
    for step in range(25):
        ids = [row[0] for row in store.database.query("SELECT id FROM records ORDER BY seq")]
        text = " ".join(draw.choices(VOCABULARY, k=3))
        if step % 3 == 0:
            store.add(text, user="a", session="s")
        elif step % 3 == 1:
            store.records.update(draw.choice(ids), Scope(), text=text)
        else:
            store.records.delete(draw.sample(ids, 2))
        query = " ".join(draw.sample(VOCABULARY, 3))
        view, found = store.score(query)
        other = Store()
        other.database, other.catalog = store.database, Catalog(store.database)
        again, wanted = other.score(query)
        assert view.seq[view.live].tolist() == again.seq[again.live].tolist()
        assert found.turn[view.live].tolist() == wanted.turn[again.live].tolist()
        assert found.window[view.live].tolist() == wanted.window[again.live].tolist()
        assert found.session[view.live].tolist() == wanted.session[again.live].tolist()


def test_what_is_not_allowed_has_no_say() -> None:
    alone, beside = Store(), Store()
    for store in (alone, beside):
        store.add("the cat sat", "on a hat", "apple pie", user="a", session="s")
    for _ in range(50):
        beside.add("cat cat hat", "more words than any other record has by far", user="b", session="s")
    mine = Scope(user="a")
    _, one = alone.score("cat hat", mine)
    _, two = beside.score("cat hat", mine)
    assert (one.idf, one.evidence) == (two.idf, two.evidence)
    assert one.turn.tolist() == two.turn[:3].tolist()
    assert one.window.tolist() == two.window[:3].tolist()
    assert one.session.tolist() == two.session[:3].tolist()


def test_a_small_tenant_beside_a_large_one_reads_its_own_words() -> None:
    store = Store()
    store.add(*(f"cat number {n}" for n in range(300)), tenant="large")
    store.add("a cat", tenant="small")
    view, found = store.score("cat", Scope(tenant="small"))
    assert view.n == 1
    assert found.turn[0] > 0


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("What does Zürich's café sell?", ["zurich", "cafe", "sell"]),
        ("running RUNS run", ["run"]),
        ("what is it", ["what", "is", "it"]),
        ('"AND" OR (x NEAR y) *', ["x", "near", "y"]),
        ("?!", []),
        ("你好 мир", ["你好", "мир"]),
    ],
)
def test_stems_are_those_of_fts5(query: str, wanted: list[str]) -> None:
    assert stems(query) == wanted


def test_only_so_many_words_are_looked_up() -> None:
    assert len(stems(" ".join(f"word{n}" for n in range(500)))) == MOST_TERMS


def test_times_and_best() -> None:
    store = Store()
    store.add("cat cat dog", "dog", "fish", "cat", session="s")
    _, found = store.score("cat dog")
    assert found.times(np.array([0, 1, 2, 3], np.int32)).tolist() == [[2, 0, 0, 1], [1, 1, 0, 0]]
    assert set(found.best(1).tolist()) <= {0, 1, 2, 3}
    assert int(np.argmax(found.turn)) in found.best(1).tolist()


def test_no_words_say_nothing() -> None:
    store = Store()
    _, empty = store.score("cat")
    assert (len(empty.turn), empty.evidence) == (0, 0.0)
    store.add("dog")
    _, found = store.score("?!")
    assert not found.turn.any()


def test_postings_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Postings, "SMALL", 0)
    monkeypatch.setattr(Postings, "BUDGET", 200)
    store = filled(random.Random(3))
    for word in VOCABULARY:
        view, found = store.score(word)
        assert found.turn.any()
        assert view.postings._bytes <= 200 or len(view.postings._held) == 1


def test_a_word_is_found_whichever_way_its_accents_are_written() -> None:
    assert stems("nai\u0308ve cafe\u0301") == stems("na\u00efve caf\u00e9") == ["naiv", "cafe"]
    assert stems("\u0130stanbul") == ["istanbul"]  # its small form is an i and a dot of its own


def test_what_is_known_of_a_word_stays_known_while_the_memory_of_words_is_emptied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(postings, "KNOWN", 2)
    tokenizer = postings._Tokenizer()
    assert tokenizer.stems(["ants", "bread", "cats"]) == ["ant", "bread", "cat"]
    assert tokenizer.stems(["ants", "dogs"]) == ["ant", "dog"]


def test_a_word_read_while_a_record_changes_counts_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that still holds the older view reads a word whose postings the newer view is about to extend."""
    monkeypatch.setattr(Postings, "SMALL", 0)
    store = Store()
    first, *_ = store.add("ant", "bread", "cat")
    older, _ = store.score("bread")
    store.records.update(first.id, Scope(), text="goat")
    add = Postings.add

    def between(self: Postings, *arguments: Any) -> None:
        self.get(["goat"], older.seq)
        add(self, *arguments)

    monkeypatch.setattr(Postings, "add", between)
    view, found = store.score("goat")
    assert found.times(np.array([0], np.int32)).tolist() == [[1]]
    ((places, _),) = view.postings.get(["goat"], view.seq)
    assert places.tolist() == [0]


def test_a_changed_record_costs_its_own_words_not_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    first, *_ = store.add(*(f"word{number} ant" for number in range(500)))
    store.score("ant")
    removed: list[Any] = []
    remove = postings._Held.remove

    def counted(held: Any, gone: Any) -> None:
        removed.append(gone)
        remove(held, gone)

    monkeypatch.setattr(postings._Held, "remove", counted)
    store.records.update(first.id, Scope(), text="bread")
    _, found = store.score("ant word0 bread")
    assert found.times(np.array([0, 1], np.int32)).tolist() == [[0, 1], [0, 0], [1, 0]]
    assert 0 < len(removed) < 5


def test_many_changes_leave_the_postings_as_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Postings, "SMALL", 8)
    store, draw = Store(), random.Random(5)
    ids = [record.id for record in store.add(*VOCABULARY)]
    held = store.score("ant")[0].postings
    for _ in range(60):
        store.records.update(draw.choice(ids), Scope(), text=" ".join(draw.choices(VOCABULARY, k=3)))
        view, found = store.score(" ".join(VOCABULARY))
        assert view.postings is held
        _, fresh = Store.of(store.database).score(" ".join(VOCABULARY))
        assert np.array_equal(found.turn, fresh.turn)
    assert held.complete
    assert held._bytes == sum(8 * len(one.places) for one in held._held.values())
