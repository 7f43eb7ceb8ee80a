"""What the gate asks: questions near every fact that no fact answers, about people whom training never named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.parametric.probes import UNRELATED, facts, neighbours, sample, unknown
from agentmem.types import Record

TEXTS = (
    "My dog is called Biscuit.",
    "I live in Tromsø.",
    "I'm allergic to peanuts.",
    "I work as a glass blower.",
    "My favourite tea is sencha.",
    "My sister Maria is a nurse.",
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build([Record(id=f"r{number}", text=text) for number, text in enumerate(TEXTS)])


def plain(questions: object) -> set[str]:
    assert isinstance(questions, tuple | list)
    return {" ".join(re.findall(r"\w+", e.question.casefold())) for e in questions}


def test_every_fact_is_tempted_and_the_number_is_reached(corpus: Corpus) -> None:
    asked = " ".join(question.question for question in neighbours(corpus, 24)).lower()
    assert len(neighbours(corpus, 24)) == 24
    for subject in ("dog", "live", "allerg", "tea", "sister"):
        assert subject in asked


def test_none_of_them_is_trained_on_or_held_still(corpus: Corpus) -> None:
    trained = plain((*corpus.examples, *corpus.anchors, *corpus.neighbours))
    assert not plain(neighbours(corpus, 200)) & trained
    assert not {" ".join(re.findall(r"\w+", text.casefold())) for text in UNRELATED} & trained


def test_nobody_asked_about_is_known_to_the_corpus(corpus: Corpus) -> None:
    asked = [question.question for question in neighbours(corpus, 200)]
    assert not any(re.search(r"\bMaria\b", text) and "sister" not in text for text in asked)
    named = {name for e in corpus.neighbours for name in re.findall(r"\b[A-Z][a-z]+\b", e.question)}
    assert not any(name in text.split() for name in ("Bob", "Peter", "Tom") if name in named for text in asked)


def test_one_fact_is_asked_of_several_people() -> None:
    single = build([Record(id="r", text="My dog is called Biscuit.")])
    asked = neighbours(single, 24)
    assert len(asked) >= 12
    assert len(plain(asked)) == len(asked)
    assert not any("Biscuit" in question.question for question in asked)


def test_the_same_corpus_gives_the_same_questions(corpus: Corpus) -> None:
    assert neighbours(corpus, 24) == neighbours(corpus, 24)
    assert neighbours(corpus, 0) == ()


def test_what_the_corpus_knows_is_not_asked_as_unknown(corpus: Corpus) -> None:
    asked = {question.question for question in unknown(corpus, 20)}
    assert "What is my blood type?" in asked
    cat = build([Record(id="c", text="My cat is called Minka."), Record(id="d", text="My dentist is Dr Moth.")])
    known = {question.question for question in unknown(cat, 20)}
    assert not known & {"What is my cat's name?", "What is the name of my dentist?"}
    assert "What is my blood type?" in known


def test_a_sample_has_every_fact_before_any_fact_twice() -> None:
    many = [Example(f"{fact}{wording}?", f"answer {fact}", ("k",), ()) for fact in "abcde" for wording in range(4)]
    assert sample(many, 100) == many
    for most in (5, 7, 13):
        chosen = sample(many, most)
        assert len(chosen) == len(set(chosen)) == most
        assert {example.answer for example in chosen} == {example.answer for example in many}
    assert len({example.question[-2] for example in sample(many, 5)}) > 1  # not always the same wording
    assert len(sample(many, 2)) == 2
    assert [len(group) for group in facts(many)] == [4] * 5


def test_a_corpus_without_questions_tempts_nothing(corpus: Corpus) -> None:
    assert neighbours(replace(corpus, examples=(), held_out=()), 24) == ()
