"""Search: finds by words and by meaning, within scope and time, and explains itself."""

from __future__ import annotations

import contextlib
import datetime as dt
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.database import Database
from agentmem.errors import AgentMemError, InvalidInput
from agentmem.plaintext.drafts import passage
from agentmem.plaintext.embed import HashEmbedder
from agentmem.plaintext.encoded import encode_with, passages_with
from agentmem.plaintext.index import VectorIndex, open_space
from agentmem.plaintext.late import TokenStore, pack_all
from agentmem.plaintext.postings import terms
from agentmem.plaintext.records import Records, drafts
from agentmem.plaintext.rows import Passages
from agentmem.plaintext.search import Searcher
from agentmem.types import Hit, Record, Scope

ROOT, ANA, BOB = Scope(), Scope(user="ana"), Scope(user="bob")
NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC).timestamp()


class Store:
    """Records that are searched by the hash embedder's vectors and token vectors, by its vectors, or by words only."""

    def __init__(self, kind: str = "tokens", path: str | Path = ":memory:") -> None:
        self.kind = kind
        self.database = Database(path)
        self.records = Records(self.database)
        self.searcher = Searcher(self.database, self.records)
        self.embedder = HashEmbedder()
        self.space = open_space(self.database, "hash", self.embedder.digest, self.embedder.dimension)
        self.index = VectorIndex(self.database, None, self.space, self.embedder.dimension)
        self.tokens = TokenStore(self.database, self.space)

    def add(self, content: Any, scope: Scope = ANA, **options: Any) -> list[Record]:
        new = drafts(content, scope=scope, **options)
        spans = [passages_with(self.embedder, draft.text, draft.name) for draft in new]
        texts = [
            passage(draft.text[start:stop], draft.name)
            for draft, pieces in zip(new, spans, strict=True)
            for start, stop in pieces
        ]
        encoded = encode_with(self.embedder, texts)
        assert encoded.tokens is not None
        return self.records.insert(new, Passages(spans, encoded.vectors, pack_all(encoded.tokens)), self.space)

    def search(self, query: str, scope: Scope = ANA, k: int = 10, **options: Any) -> list[Hit]:
        words = self.kind == "words" or not query.strip()
        return self.searcher.search(
            query,
            None if words else encode_with(self.embedder, [query], query=True),
            index=None if words else self.index,
            tokens=self.tokens if self.kind == "tokens" and not words else None,
            scope=scope,
            k=k,
            now=options.pop("now", NOW),
            **options,
        )

    def texts(self, query: str, scope: Scope = ANA, k: int = 10, **options: Any) -> list[str]:
        return [hit.record.text for hit in self.search(query, scope, k, **options)]


@pytest.fixture(params=["tokens", "vectors", "words"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    made = Store(request.param)
    with contextlib.closing(made.database):
        yield made


FACTS = ["I'm allergic to peanuts.", "My sister lives in Oslo.", "The car is a blue Volvo.", "I work as a nurse."]


def test_the_fitting_record_comes_first(store: Store) -> None:
    store.add(FACTS)
    for query, expected in (("What is she allergic to?", 0), ("sisters", 1), ("Volvo", 2), ("work nurse", 3)):
        assert store.texts(query)[0] == FACTS[expected]


def test_k_bounds_the_hits_and_a_huge_k_means_all() -> None:
    store = Store()
    store.add(FACTS)
    assert len(store.search("work", k=2)) == 2
    assert len(store.search("work", k=10**9)) == 4
    store.database.close()


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", True, None])
def test_a_bad_k_is_refused(k: Any, store: Store) -> None:
    with pytest.raises(InvalidInput):
        store.search("x", k=k)


@pytest.mark.parametrize(
    "query", ["", " \n", "a\0", "\ud800", 5, None, b"x", ["x"], "x" * (16 * 1024 * 1024 + 1)], ids=range(9)
)
def test_a_bad_query_is_refused(query: Any, store: Store) -> None:
    store.add("x")
    with pytest.raises(InvalidInput):
        store.searcher.search(query, scope=ROOT, k=1, now=NOW)


HOSTILE = [
    '"',
    "' OR 1=1 --",
    "text:x",
    "NEAR(a b)",
    "a AND NOT b",
    "x*",
    "^x",
    "{a b}: c",
    "-",
    "(",
    "\\",
    "%",
    "AND",
    "OR NOT",
]


@pytest.mark.parametrize("query", HOSTILE)
def test_no_query_is_full_text_syntax(query: str, store: Store) -> None:
    store.add([f"something {query}", "other words"])
    assert len(store.search(query)) <= 2
    assert store.records.count(ROOT) == 2


def test_symbols_alone_are_answered_by_meaning_or_not_at_all(store: Store) -> None:
    store.add(["hello", "?!"])
    assert len(store.search("?!")) == (0 if store.kind == "words" else 2)


def test_stop_words_count_only_where_there_is_nothing_else() -> None:
    assert terms("What is the name of the rose?") == ["name", "rose"]
    assert terms("who are you") == ["who", "are", "you"]
    assert terms("a_b c-d É!") == ["b", "c", "é"]
    assert terms("... ?") == []
    assert len(terms(" ".join(f"w{n}" for n in range(1000)))) == 64


def test_nothing_of_another_scope_is_found(store: Store) -> None:
    store.add("ana likes tea", ANA)
    store.add("bob likes tea", BOB)
    store.add("everyone likes tea", ROOT)
    store.add("ana in a session likes tea", Scope(user="ana", session="s"))
    assert set(store.texts("likes tea", ANA)) == {"ana likes tea", "everyone likes tea", "ana in a session likes tea"}
    assert set(store.texts("likes tea", BOB)) == {"bob likes tea", "everyone likes tea"}
    assert store.texts("likes tea", Scope(user="*")) == ["everyone likes tea"]
    assert store.texts("likes tea", Scope(user=" ana")) == ["everyone likes tea"]
    assert len(store.texts("likes tea", ROOT)) == 4


@pytest.mark.parametrize("level", ["tenant", "user"])
def test_a_small_neighbour_beside_a_noisy_one_finds_its_own(level: str, store: Store) -> None:
    noisy, small = Scope(**{level: "noisy"}), Scope(**{level: "small"})
    store.add([f"the meeting about project {n} is in room {n % 7}" for n in range(300)], noisy)
    mine = [f"the meeting about project {n} is in my garden" for n in range(10)]
    store.add(mine, small)
    for n, text in enumerate(mine):
        assert store.texts(f"where is the meeting about project {n}?", small, k=1) == [text]
        assert set(store.texts("meeting about project", small)) == set(mine)


def test_scores_do_not_tell_of_foreign_texts() -> None:
    store = Store("words")
    store.add(["apples and pears", "pears and plums", "plums only"])
    before = [(hit.record.id, round(hit.score, 9)) for hit in store.search("apples plums")]
    store.add(["apples apples here"] * 40, BOB)  # the same length, so that only rarity could change
    after = [(hit.record.id, round(hit.score, 1)) for hit in store.search("apples plums")]
    assert [id_ for id_, _ in before] == [id_ for id_, _ in after]
    assert [round(score, 1) for _, score in before] == [score for _, score in after]
    store.database.close()


def test_only_what_holds_at_the_time_is_found(store: Store) -> None:
    store.add("Ana lives in Rome", valid_until="2026-05-01")
    store.add("Ana lives in Bonn", valid_from="2026-05-01", valid_until="2026-07-01T00:00+02:00")
    store.add("Ana lives in Lima", valid_from="2026-07-01T00:00+02:00")
    assert store.texts("where does Ana live") == ["Ana lives in Bonn"]
    assert store.texts("where does Ana live", at="2026-04-30") == ["Ana lives in Rome"]
    assert store.texts("where does Ana live", at="2026-05-01") == ["Ana lives in Bonn"]
    assert store.texts("where does Ana live", at=dt.datetime(2026, 6, 30, 22, tzinfo=dt.UTC)) == ["Ana lives in Lima"]
    assert store.texts("where does Ana live", now=0.0) == ["Ana lives in Rome"]
    with pytest.raises(InvalidInput):
        store.search("x", at="soon")


def test_where_is_inside_the_search(store: Store) -> None:
    store.add([f"note {n} about tea" for n in range(50)], metadata={"kind": "noise"})
    [mine] = store.add("tea, briefly, among other matters of the day", metadata={"kind": "rare"})
    assert [hit.record for hit in store.search("note about tea", k=1, where={"kind": "rare"})] == [mine]
    assert store.search("tea", where={"kind": "none"}) == []
    with pytest.raises(InvalidInput):
        store.search("tea", where={"kind": ["rare"]})


def test_an_answer_is_found_by_its_question(store: Store) -> None:
    session = Scope(user="ana", session="s")
    store.add(["Nice weather.", "What is your favourite dish?", "Moussaka, always.", "Good to know."], session)
    store.add(["I bought a chair.", "Rain again.", "The train was late."], Scope(user="ana", session="t"))
    assert "Moussaka, always." in store.texts("favourite dish", k=2)


def test_neighbours_of_other_sessions_and_scopes_have_no_say(store: Store) -> None:
    store.add("What is the secret number?", Scope(user="bob", session="s"))
    store.add("Forty-two.", Scope(user="ana", session="s"))
    store.add("What is the secret number?", Scope(user="bob", session="s"))
    for hit in store.search("secret number", explain=True):
        said = hit.record.text, hit.why["signal.window"], hit.why["signal.turn"], hit.why["signal.answer"]
        assert said == ("Forty-two.", 0.0, 0.0, 0.0)


def test_the_named_speaker_comes_first(store: Store) -> None:
    store.add([{"role": "user", "name": name, "content": "I like tea."} for name in ("Bob", "Ana", "Eve")])
    assert store.search("What does Ana like?")[0].record.name == "Ana"


#: What one says and what is answered, with questions that are answered there.
TALK = [
    ("How was your week?", "Busy! I adopted a puppy from the shelter in Bergen, and we called him Biscuit."),
    ("So sweet!", "He already chewed one of my hiking boots, the pair that I bought for the Lofoten islands."),
    ("Oh no! My cat does that, so I keep my watercolours in a locked drawer now.", "Ha, clever cat. And clever you."),
    ("Thanks!", "How is the painting class going?"),
    ("Well! The teacher put two of my lighthouse pictures in the window of the library.", "Wow, congratulations!"),
    ("I was so proud.", "My sister plays the cello in an orchestra now, their first concert was in March."),
    ("Nice!", "She practises in the garage, since the neighbours on the third floor complained."),
    ("Do you still bake?", "Every Sunday, rye bread with caraway, as my grandfather did in his mill."),
    ("Yum.", "What are you doing in the summer?"),
    ("We rent a canoe and paddle down the Dordogne for nine days with my cousin Elise.", "That sounds great!"),
    ("It does.", "I have to stay here, my knee is operated on in July by a doctor from Tromsø."),
    ("Get well soon!", "Thank you. I'm a little afraid of the anaesthesia, to be honest."),
]
ASKED = {
    "Who adopted a puppy from the shelter?": "Biscuit",
    "Where are the watercolours kept?": "locked drawer",
    "Whose pictures are in the window of the library?": "lighthouse",
    "Which instrument does the sister play in the orchestra?": "cello",
    "Where does she practise since the neighbours complained?": "garage",
    "What bread is baked every Sunday?": "caraway",
    "Who paddles down the Dordogne in a canoe?": "Elise",
    "When is the knee operated on?": "July",
}


@pytest.mark.parametrize("session", [None, "s"])
def test_what_is_stored_as_a_chat_is_found_as_what_is_stored_by_speakers(store: Store, session: str | None) -> None:
    store.add(
        [
            said
            for told, answered in TALK
            for said in ({"role": "user", "name": "Ana", "content": told}, {"role": "assistant", "content": answered})
        ],
        Scope(user="ana", session=session),
    )
    missed = [text for asked, text in ASKED.items() if not any(text in found for found in store.texts(asked, k=3))]
    assert len(missed) <= (store.kind == "words"), missed


def test_the_parts_add_up_to_the_odds(store: Store) -> None:
    store.add(FACTS)
    hits = store.search("What is my sister allergic to?")
    parts = {"words", "speaker", "time", "form", "query"}
    parts |= {"words": set(), "vectors": {"meaning"}, "tokens": {"meaning", "tokens"}}[store.kind]
    assert hits
    for hit in hits:
        assert set(hit.why) == parts
        assert hit.score == pytest.approx(1 / (1 + math.exp(-sum(hit.why.values()))), abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_an_explained_hit_tells_each_signal_and_what_the_query_is_like(store: Store) -> None:
    store.add(FACTS)
    [hit] = store.search("What is my sister allergic to?", k=1, explain=True)
    assert 0 <= hit.why["query.evidence"] <= 1
    assert hit.why["signal.length"] == pytest.approx(math.log1p(5))
    assert ("signal.cosine" in hit.why) == (store.kind != "words")
    assert ("signal.tokens" in hit.why) == (store.kind == "tokens")


def test_a_deleted_record_is_gone_at_once_and_a_new_one_is_there(store: Store) -> None:
    made = store.add(FACTS)
    assert store.texts("Volvo")[0] == FACTS[2]
    store.records.delete([made[2].id])
    assert FACTS[2] not in store.texts("Volvo")
    store.add("The new car is a red Volvo.")
    assert store.texts("Volvo")[0] == "The new car is a red Volvo."


def test_empty_memories_and_empty_scopes_give_nothing(store: Store) -> None:
    assert store.search("x") == []
    store.add("x", BOB)
    assert store.search("x", ANA) == []


def test_unembedded_records_are_still_found_by_their_words(store: Store) -> None:
    store.add(FACTS)
    store.records.insert(drafts("The walrus is the plumber.", scope=ANA))
    assert store.texts("walrus")[0] == "The walrus is the plumber."


def test_other_scripts_and_long_queries_work(store: Store) -> None:
    store.add(["Мой брат живёт в Москве", "Ich mag Straßenbahnen", "私は寿司が好きです"])
    assert store.texts("брат")[0] == "Мой брат живёт в Москве"
    assert store.texts("STRASSENBAHNEN Straßenbahnen")[0] == "Ich mag Straßenbahnen"
    assert len(store.search("Москве " * 20_000)) >= 1


def test_threads_search_one_memory() -> None:
    store = Store()
    store.add(FACTS)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(15):
                assert store.texts("Volvo")[0] == FACTS[2]
                store.add("passing thought")
        except (AssertionError, AgentMemError) as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    store.database.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_searches_though_another_thread_was_searching(tmp_path: Path) -> None:
    store = Store(path=tmp_path / "memory.db")
    store.add("Ana keeps bees")
    store.texts("bees")
    with store.searcher._lock, store.tokens._lock:
        child = os.fork()
        if child == 0:
            found: list[str] = []
            thread = threading.Thread(target=lambda: found.extend(store.texts("bees")), daemon=True)
            thread.start()
            thread.join(20)
            os._exit(0 if found == ["Ana keeps bees"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.database.close()


def test_a_record_without_token_vectors_beside_one_of_two_passages_gets_none_of_theirs() -> None:
    """Three records with two passages, one and none: as many passages as records."""
    store = Store()
    long = "Nothing to see. " * 50 + "\n\n" + "the lighthouse keeper paints. " * 20
    store.add(long)
    store.add("the harbour is quiet")
    store.records.insert(drafts("the harbour crane is red", scope=ANA))
    hits = store.search("lighthouse keeper harbour")
    assert {hit.record.text: (hit.start, hit.stop) for hit in hits} == {
        "the harbour crane is red": (0, None),
        "the harbour is quiet": (0, None),
        long: (long.index("the lighthouse"), len(long)),
    }
    found = store.searcher.measure(
        "lighthouse keeper harbour",
        encode_with(store.embedder, ["lighthouse keeper harbour"], query=True),
        index=store.index,
        tokens=store.tokens,
        scope=ANA,
        now=NOW,
    )
    assert found.matches is not None
    assert len(found.matches.owner) == len(found.pool) == 3
    part = found.signals.part.tolist()
    assert part == [1, 0, 0]
