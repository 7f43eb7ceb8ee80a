"""Signals and their fusion: what a query is taken for, what stands for a record, and what is made of both."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.plaintext import fusion
from agentmem.plaintext.catalog import Catalog
from agentmem.plaintext.encoded import Encoded
from agentmem.plaintext.late import Matches
from agentmem.plaintext.records import Records, drafts
from agentmem.plaintext.signals import KINDS, MOST_TOKENS, Pool, Query, Signals, measure
from agentmem.plaintext.words import Words
from agentmem.types import Scope

SESSION = Scope(user="ana", session="s")


class Case:
    """A session of turns and one query; token matches are given as numbers."""

    def __init__(self, content: Any, scope: Scope = SESSION) -> None:
        self.database = Database(":memory:")
        Records(self.database).insert(drafts(content, scope=scope))
        self.view = Catalog(self.database).view(None)
        self.allowed = self.view.allowed(Scope(), 0.0)

    def measure(self, query: Query, found: list[int] | None = None, **known: Any) -> Signals:
        places = np.array(range(self.view.n) if found is None else found, np.int32)
        lexical = Words().score(self.view, Words().stems(query.text), self.allowed)
        return measure(query, Pool.of(self.view, self.allowed, places), lexical, **known)


@pytest.fixture
def talk() -> Iterator[Case]:
    said = [("Ana", "Which dish do you like?"), ("Bob", "Moussaka, always."), ("Ana", "Good to know.")]
    case = Case([{"role": "user", "name": name, "content": text, "at": "2023-05-08"} for name, text in said])
    with contextlib.closing(case.database):
        yield case


def encoded(text: str, spans: list[tuple[int, int]] | None) -> Encoded:
    count = len(spans) if spans is not None else 3
    return Encoded(np.ones((1, 2), np.float32), [np.ones((count, 2), np.float32)], None if spans is None else [spans])


def test_a_token_belongs_to_the_word_that_it_stands_in() -> None:
    query = Query.of("Oslo, 2023?", encoded("", [(0, 2), (2, 4), (4, 5), (6, 10), (10, 11)]))
    assert query.words == ("oslo", "2023")
    assert query.word_of == (0, 0, -1, 1, -1)
    assert Query.of("Oslo", encoded("", None)).word_of == (-1, -1, -1)
    assert Query.of("Oslo", None).word_of == ()
    assert len(Query.of("o " * 999, encoded("", [(2 * n, 2 * n + 1) for n in range(999)])).word_of) == MOST_TOKENS


@pytest.mark.parametrize(
    ("text", "year", "month", "day"),
    [
        ("What happened on 8 May, 2023?", {2023}, {5}, {8}),
        ("what may she eat in june", set(), {6}, set()),
        ("may I?", set(), set(), set()),
        ("the 3rd of February 1999", {1999}, {2}, {3}),
        ("on 2023-05-08", {2023}, {5}, {8}),
        ("24 kittens", set(), set(), set()),
    ],
)
def test_dates_of_a_query(text: str, year: set[int], month: set[int], day: set[int]) -> None:
    query = Query.of(text, None)
    assert (set(query.years), set(query.months)) == (year, month)
    assert day <= query.days


def test_a_date_in_the_query_stands_for_the_records_of_that_day(talk: Case) -> None:
    rows = talk.measure(Query.of("Who cooked on 8 May 2023?", None)).rows
    assert [rows[name].tolist() for name in ("year", "month", "day")] == [[1.0] * 3] * 3
    rows = talk.measure(Query.of("Who cooked on 9 May 2024?", None)).rows
    assert [rows[name][0] for name in ("year", "month", "day")] == [0.0, 1.0, 0.0]


def test_an_answer_has_the_words_of_its_question(talk: Case) -> None:
    rows = talk.measure(Query.of("favourite dish", None)).rows
    assert rows["answer"].tolist() == [0.0, 1.0, 0.0]
    assert rows["turn"][1] == 0.0
    assert rows["turn_answer"][1] > 0.0
    assert rows["answer_share"][1] == rows["answer_share"][0] > 0
    assert rows["window_share"].tolist() == pytest.approx([rows["answer_share"][0]] * 2 + [0.0])


def test_who_is_named_is_meant_unless_both_are(talk: Case) -> None:
    assert talk.measure(Query.of("What does Bob like?", None)).rows["speaker"].tolist() == [0.0, 1.0, 0.0]
    signals = talk.measure(Query.of("What do Ana and Bob like?", None))
    assert signals.rows["speaker"].tolist() == [0.0] * 3
    assert signals.query["named"] == 1.0
    assert talk.measure(Query.of("What does Eve like?", None)).query["named"] == 0.0


def test_a_neighbour_comes_into_the_pool_and_what_is_not_allowed_does_not(talk: Case) -> None:
    assert len(talk.measure(Query.of("x", None), [1]).part) == 3
    talk.allowed = np.array([False, True, True])
    signals = talk.measure(Query.of("dish", None), [1])
    assert len(signals.part) == 2
    assert signals.rows["answer_share"].tolist() == [0.0, 0.0]


def matches(scores: list[list[float]], owner: list[int], part: list[int]) -> Matches:
    return Matches(3, np.array(scores, np.float32), np.array(owner, np.int64), np.array(part, np.int32))


def test_the_best_passage_of_a_record_stands_for_it(talk: Case) -> None:
    query = Query.of("moussaka dish", encoded("", [(0, 8), (9, 13)]))
    cosines = np.array([0.1, 0.2, np.nan], np.float32)
    found = matches([[0.1, 0.2], [0.9, 0.1], [0.2, 0.8], [0.1, 0.1]], [0, 1, 1, 2], [0, 0, 1, 0])
    signals = talk.measure(query, cosines=cosines, matches=found)
    assert signals.kind == "tokens"
    assert signals.part.tolist()[1] in (0, 1)
    assert signals.rows["tokens"].argmax() == 1
    assert signals.rows["cosine"][2] == pytest.approx(0.15)


def test_what_a_question_matches_counts_for_its_answer_and_its_neighbours(talk: Case) -> None:
    query = Query.of("moussaka dish", encoded("", [(0, 8), (9, 13)]))
    found = matches([[0.1, 0.9], [0.7, 0.2], [0.3, 0.1]], [0, 1, 2], [0, 0, 0])
    rows = talk.measure(query, cosines=np.array([0.8, 0.2, 0.2], np.float32), matches=found).rows
    weights = np.linalg.solve([[0.1, 0.9], [0.7, 0.2]], rows["tokens"][:2])
    assert weights.sum() == pytest.approx(1)
    assert rows["cosine_question"].tolist() == pytest.approx([0.0, 0.4, 0.0])
    assert rows["tokens_answer"].tolist() == pytest.approx([rows["tokens"][0], weights @ [0.7, 0.9], rows["tokens"][2]])
    assert rows["tokens_window"][2] == pytest.approx(weights @ [0.85 * 0.7, 0.85 * 0.2])


def test_who_answers_for_a_model_and_what_tells_of_time_are_known() -> None:
    said = [("user", "We met yesterday."), ("assistant", "How nice."), ("tool", "12:00"), ("user", "She likes tea.")]
    case = Case([{"role": role, "content": text} for role, text in said])
    with contextlib.closing(case.database):
        rows = case.measure(Query.of("When did they meet?", None)).rows
        assert rows["assistant"].tolist() == [0.0, 1.0, 1.0, 0.0]
        assert rows["when"][0] == 1.0
        assert rows["when"][3] == 0.0
        assert not case.measure(Query.of("Who likes tea?", None)).rows["when"].any()


def test_records_without_token_vectors_are_judged_by_their_words(talk: Case) -> None:
    query = Query.of("moussaka", encoded("", [(0, 8)]))
    found = matches([[0.3], [0.2]], [0, 2], [0, 0])
    signals = talk.measure(query, cosines=np.zeros(3, np.float32), matches=found)
    assert signals.rows["tokens"].tolist() == pytest.approx([0.3, 0.9, 0.2])
    assert not any(np.isnan(row).any() for row in signals.rows.values())


def test_what_there_is_decides_the_kind(talk: Case) -> None:
    query = Query.of("dish", encoded("", [(0, 4)]))
    assert talk.measure(query).kind == "words"
    assert talk.measure(query, cosines=np.zeros(3, np.float32)).kind == "vectors"
    assert talk.measure(query, cosines=np.zeros(3, np.float32), matches=matches([[1.0]], [0], [0])).kind == "tokens"


def test_small_talk_is_told_from_what_is_about_someone(talk: Case) -> None:
    said = {text: talk.measure(Query.of(text, None)).query for text in ("Hi, how are you?", "What did she cook?")}
    assert [query["chatter"] for query in said.values()] == [1.0, 0.0]
    assert [query["personal"] for query in said.values()] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("roles", "longer"),
    [(["user", "assistant"], math.log(8 / 4)), (["assistant", "user"], math.log(4 / 8)), (["user", "user"], 0.0)],
)
def test_an_assistant_that_writes_essays_is_told_from_one_that_talks(roles: list[str], longer: float) -> None:
    said = ["one two three", "one two three four five six seven"]
    case = Case([{"role": role, "content": text} for role, text in zip(roles, said, strict=True)])
    with contextlib.closing(case.database):
        assert case.measure(Query.of("six", None)).query["lectures"] == pytest.approx(longer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_whole_and_the_order_is_that_of_the_probability(kind: str) -> None:
    numbers = fusion.load(kind)
    assert numbers.by_query.shape == (len(numbers.signals), len(numbers.gates))
    assert all(np.isfinite(part).all() for part in (numbers.weights, numbers.by_query, numbers.told, numbers.spread))
    assert (numbers.spread > 0).all()
    assert numbers.slope + numbers.share > 0  # else a better score would be a smaller probability
    count = 50
    random = np.random.default_rng(0)
    rows = {name: random.normal(size=count).astype(np.float32) for name in numbers.signals}
    fused = numbers.fuse(Signals(kind, rows, dict.fromkeys(numbers.gates, 1.0), np.zeros(count, np.int32)))
    order = np.argsort(-fused.score)
    assert (np.diff(fused.probability[order]) <= 0).all()
    for row, why in enumerate(fused.why(range(3))):
        assert 1 / (1 + math.exp(-sum(why.values()))) == pytest.approx(fused.probability[row], abs=1e-5)


def test_a_signal_that_never_varies_says_nothing_and_one_record_is_no_outlier() -> None:
    numbers = fusion.load("words")
    rows = {name: np.full(3, 5.0, np.float32) for name in numbers.signals}
    signals = Signals("words", rows, {}, np.zeros(3, np.int32))
    assert np.ptp(numbers.fuse(signals).score) == 0.0
    values = fusion.matrix(signals, ["turn"], np.ones(1, np.float32))
    assert values.tolist() == [[0.0] * 3]


def test_the_file_says_what_it_was_fitted_on_and_holds_no_data() -> None:
    file = Path(fusion.__file__).with_name("fusion.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found) == {"made", "by", "data", "taken", "kinds"}
    assert set(found["kinds"]) == set(KINDS)
    assert file.stat().st_size < 20_000


def test_a_prompt_takes_what_is_likely_and_nothing_where_nothing_is() -> None:
    assert fusion.taken([], asking=True) == 0
    assert fusion.taken([0.01] * 50, asking=True) == 0
    assert fusion.taken([0.03] * 50, asking=True) == 50
    assert fusion.taken([0.9, 0.5, 0.06, 0.04, 0.03, 0.0], asking=False) == 3
    assert fusion.taken([0.12, 0.01, 0.01], asking=True) == 0
    assert fusion.taken([0.2, 0.05], asking=True) == 2
    assert fusion.taken([0.2, 0.05], asking=False) == 0, "small talk that may be about something"
