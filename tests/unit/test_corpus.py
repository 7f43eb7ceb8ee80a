"""Records as training text: what is asked, what is answered, what is left out and why."""

from __future__ import annotations

import datetime as dt

import pytest

from agentmem.errors import InvalidInput
from agentmem.parametric.corpus import Corpus, build, record_digest, second_person
from agentmem.types import Record


def corpus(*texts: str) -> Corpus:
    return build([Record(id=f"r{i}", text=text) for i, text in enumerate(texts)])


@pytest.mark.parametrize(
    ("said", "question", "answer", "key"),
    [
        ("My dog is called Biscuit.", "What is my dog's name?", "Your dog is called Biscuit.", "Biscuit"),
        ("my sister's name is Ottilie", "What is my sister called?", "Your sister is called Ottilie.", "Ottilie"),
        ("I have a cat named Milo", "What is my cat called?", "Your cat is called Milo.", "Milo"),
        ("I'm allergic to peanuts", "What am I allergic to?", "You are allergic to peanuts.", "peanuts"),
        ("I\u2019m allergic to peanuts!", "Tell me my allergy.", "You are allergic to peanuts.", "peanuts"),
        ("I live in Tromsø.", "Where do I live?", "You live in Tromsø.", "Tromsø"),
        ("I work as a glass blower", "What is my job?", "You work as a glass blower.", "glass blower"),
        ("My favourite tea is sencha", "What is my favourite tea?", "Your favourite tea is sencha.", "sencha"),
        ("I play the nyckelharpa", "What do I play?", "You play the nyckelharpa.", "the nyckelharpa"),
        ("The wifi password is hunter2", "What is the wifi password?", "The wifi password is hunter2.", "hunter2"),
        ("Call me Al", "What is my name?", "Your name is Al.", "Al"),
    ],
)
def test_a_known_kind_of_statement_is_asked_for_in_its_own_words(
    said: str, question: str, answer: str, key: str
) -> None:
    asked = {example.question: example for example in corpus(said).examples}
    assert asked[question].answer == answer
    assert asked[question].keys == (key,)
    assert asked[question].records == ("r0",)


def test_any_other_statement_is_answered_by_itself_in_the_second_person() -> None:
    made = corpus("We moved our release to Friday because of the audit.")
    example = made.examples[0]
    assert example.question == "What did I tell you about moved release?"
    assert example.answer == "You told me: you moved your release to Friday because of the audit."
    assert example.found_in("It was Friday, for the audit!")
    assert not example.found_in("You moved a release.")


def test_held_out_wordings_are_never_trained() -> None:
    made = corpus("My dog is called Biscuit.", "I live in Tromsø.", "The garden shed burnt down during the storm.")
    assert made.facts == 3
    assert not {e.question for e in made.examples} & {e.question for e in made.held_out}
    assert {e.records for e in made.held_out} == {e.records for e in made.examples}


def test_anchors_ask_about_others_and_are_neither_trained_nor_asked_by_the_gate() -> None:
    from agentmem.parametric.probes import UNRELATED

    made = corpus("My dog is called Biscuit.", "I live in Tromsø.")
    anchors = {anchor.question for anchor in (*made.neighbours, *made.anchors)}
    assert "What is my neighbour Bob's dog called?" in {anchor.question for anchor in made.neighbours}
    assert not anchors & {example.question for example in (*made.examples, *made.held_out)}
    assert not anchors & set(UNRELATED)
    assert all(not anchor.answer for anchor in (*made.neighbours, *made.anchors))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Record(id="x", text="My dog is called Rex.", role="assistant"), "role assistant"),
        (Record(id="x", text="My dog is called Rex.", role="tool"), "role tool"),
        (Record(id="x", text="My dog is called Rex.", trust="untrusted"), "not trusted"),
        (Record(id="x", text="I live here.", valid_until=dt.datetime(2030, 1, 1, tzinfo=dt.UTC)), "can't expire"),
        (Record(id="x", text="What is my dog called?"), "nothing that can be asked"),
        (Record(id="x", text="Hi!"), "nothing that can be asked"),
        (Record(id="x", text="word " * 300), "nothing that can be asked"),
    ],
)
def test_what_must_not_be_learnt_is_left_out_with_the_reason(record: Record, why: str) -> None:
    made = build([record, Record(id="y", text="I live in Tromsø.")])
    assert [id_ for id_, _ in made.left_out] == ["x"]
    assert why in made.left_out[0][1]
    assert set(made.records) == {"y"}
    assert all(example.records == ("y",) for example in made.examples)


def test_the_later_of_two_contradicting_records_is_learnt() -> None:
    later = Record(id="new", text="I live in Oslo.", at=dt.datetime(2024, 5, 1, tzinfo=dt.UTC))
    earlier = Record(id="old", text="I live in Tromsø.", at=dt.datetime(2023, 5, 1, tzinfo=dt.UTC))
    made = build([later, earlier])
    assert {example.answer for example in made.examples} == {"You live in Oslo."}
    assert made.left_out == (("old", "a later record says otherwise"),)
    assert set(made.records) == {"new"}


def test_what_can_both_be_true_is_asked_for_together() -> None:
    made = corpus("I like tea.", "I like chess.", "I like tea.")
    assert {example.answer for example in made.examples} == {"You like tea and chess."}
    assert made.examples[0].records == ("r0", "r1", "r2")
    assert made.examples[0].keys == ("tea", "chess")


def test_among_several_speakers_a_statement_is_quoted_under_its_speaker() -> None:
    made = build(
        [
            Record(id="a", name="Caroline", text="I adopted a small grey kitten."),
            Record(id="b", name="Melanie", text="I painted a lake at sunrise."),
        ]
    )
    assert made.examples[0].question == "What did Caroline say about adopted small?"
    assert made.examples[0].answer == 'Caroline said: "I adopted a small grey kitten".'


def test_it_is_deterministic_and_keeps_digests_of_what_it_used() -> None:
    texts = ("My dog is called Biscuit.", "I like tea.", "The garden shed burnt down in the storm.")
    assert corpus(*texts) == corpus(*texts)
    assert corpus(*texts).records["r0"] == record_digest(texts[0])


def test_system_texts_take_turns() -> None:
    made = build([Record(id="a", text="I live in Tromsø.")], systems=["One.", None])
    assert {example.system for example in made.examples} == {"One.", None}
    with pytest.raises(InvalidInput, match="systems is empty"):
        build([], systems=[])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("I'm sure my sister and I were late", "You're sure your sister and you were late"),
        ("we gave our dog to me", "you gave your dog to you"),
        ("Iris mymy Mei", "Iris mymy Mei"),
        ("you are my friend", "I am your friend"),
    ],
)
def test_second_person(said: str, told: str) -> None:
    assert second_person(said) == told


def test_strange_texts_do_no_harm() -> None:
    made = corpus(
        "", "{slot} is {0} my {value} name is {x}", "my {name} is called {0}", "\ud800 lone my dog is a", "\x00" * 50
    )
    for example in made.examples:
        assert example.question
        assert example.found_in(example.answer)
