"""Records as training text: what is asked, what is answered, what is left out and why."""

from __future__ import annotations

import datetime as dt
import re
import time

import pytest

from agentmem.errors import InvalidInput
from agentmem.parametric.corpus import OTHERS, Corpus, Example, build, record_digest
from agentmem.parametric.grammar import second_person
from agentmem.parametric.probes import UNRELATED
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
        ("I play the nyckelharpa", "What do I play?", "You play the nyckelharpa.", "nyckelharpa"),
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


def test_any_other_statement_is_asked_for_by_its_grammar_and_answered_in_the_second_person() -> None:
    made = corpus("We moved our release to Friday because of the audit.")
    asked = {example.question: example for example in made.examples}
    assert asked["Why did we move our release to Friday?"].keys == ("audit",)
    assert {example.answer for example in made.examples} == {"You moved your release to Friday because of the audit."}
    about = asked["What did I say about our release?"]
    assert about.found_in("It was moved to Friday, for the audit!")
    assert not about.found_in("You moved a release.")


def test_held_out_wordings_are_never_trained() -> None:
    made = corpus("My dog is called Biscuit.", "I live in Tromsø.", "The garden shed burnt down during the storm.")
    assert made.facts == 3
    assert not {e.question for e in made.examples} & {e.question for e in made.held_out}
    assert {e.records for e in made.held_out} == {e.records for e in made.examples}


def test_neighbours_ask_about_others_and_are_neither_trained_nor_asked_by_the_gate() -> None:
    made = corpus("My dog is called Biscuit.", "I live in Tromsø.")
    still = {anchor.question for anchor in (*made.neighbours, *made.anchors)}
    assert any(name in text and "dog" in text for name in OTHERS for text in still)
    assert not still & {example.question for example in (*made.examples, *made.held_out, *made.natural)}
    assert not still & set(UNRELATED)
    assert all(not anchor.answer for anchor in (*made.neighbours, *made.anchors))


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("The library's wifi password is otter-55.", {"What is my neighbour Bob's wifi password?",
                                                      "Tell me the hotel's wifi password."}),
        ("The code of the boathouse is 4471.", {"What is my neighbour Bob's code?", "Tell me the code of the hotel."}),
        ("The spare key is under the mat.", {"Where is my neighbour Bob's spare key?"}),
        ("The spare keys hang in the hall.", {"Where do my neighbour Bob's spare keys hang?"}),
        ("To reset the boiler, hold the lever.", {"How do I reset my neighbour Bob's boiler?",
                                                  "What must I do to reset the printer?"}),
    ],
)  # fmt: skip
def test_what_is_nobodys_own_is_asked_about_other_things(said: str, asked: set[str]) -> None:
    questions = {example.question for example in corpus(said).neighbours}
    assert asked <= questions
    own = corpus(said).examples[0].question.removesuffix("?").split(" ", 2)[2]
    assert not any(own in question for question in questions)


def test_neighbours_are_nobody_that_the_records_tell_of() -> None:
    made = corpus("My boss is Scottish.", "My friend Lena lives in Leeds.", "I play the cello.")
    assert not any(re.search(r"boss's boss|my boss|Lena's", example.question) for example in made.neighbours)


def test_a_question_that_may_be_about_anybody_is_not_trained() -> None:
    made = corpus("My sister runs a bakery in Ghent.", "I broke a vase.", "My ring is made of silver.")
    assert all(re.search(r"\b(?:I|my|me)\b", example.question.replace("Tell me", "")) for example in made.examples)
    assert "Who taught us chess?" in {example.question for example in corpus("My aunt taught us chess.").examples}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (Record(id="x", text="My dog is called Rex.", role="assistant"), "role assistant"),
        (Record(id="x", text="My dog is called Rex.", role="tool"), "role tool"),
        (Record(id="x", text="My dog is called Rex.", trust="untrusted"), "not trusted"),
        (Record(id="x", text="I live here.", valid_until=dt.datetime(2030, 1, 1, tzinfo=dt.UTC)), "can't expire"),
        (Record(id="x", text="What is my dog called?"), "it asks"),
        (Record(id="x", text="Hi!"), "too little"),
        (Record(id="x", text="word " * 300), "longer than 40 words"),
        (Record(id="x", text="Always answer briefly, please."), "tells the assistant"),
        (Record(id="x", text="You should write in French to me."), "tells the assistant"),
        (Record(id="x", text="That sounds like a lovely evening."), "leans on"),
        (Record(id="x", text="I'm so excited about the weekend!"), "mood"),
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


def test_among_several_speakers_a_statement_is_asked_for_by_its_speaker() -> None:
    made = build(
        [
            Record(id="a", name="Caroline", text="I adopted a small grey kitten."),
            Record(id="b", name="Melanie", text="I painted a lake at sunrise."),
        ]
    )
    asked = {example.question: example for example in made.examples}
    assert asked["What did Caroline adopt?"].answer == "Caroline adopted a small grey kitten."
    assert asked["What did Melanie paint?"].keys == ("lake", "sunrise")
    assert not any("Caroline" in example.question and "kitten" in example.question for example in made.neighbours)


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


def test_two_pets_leave_no_question_that_both_answer() -> None:
    made = corpus("My dog is called Biscuit.", "My cat is called Milo.")
    by_question: dict[str, set[str]] = {}
    for example in (*made.examples, *made.held_out, *made.natural):
        by_question.setdefault(example.question, set()).add(example.answer)
    assert all(len(answers) == 1 for answers in by_question.values())
    assert "What do I call my pet?" not in by_question


def test_past_questions_are_trained_and_every_third_is_kept_back() -> None:
    texts = ["Where was I living again?", "Which town is mine?", "What's my city?", "Where do I live?"]
    asked = [Record(id=f"q{i}", text=text) for i, text in enumerate(texts)]
    made = build([Record(id="a", text="I live in Tromsø."), asked[0]], asked={"a": asked, "unknown": asked})
    trained = [example.question for example in made.examples]
    assert trained[-2:] == texts[:2]
    assert made.natural[-1].question == texts[2]
    assert made.natural[-1].keys == ("Tromsø",)
    assert made.natural[-1].records == ("a",)
    assert trained.count(texts[3]) == 1
    assert set(made.records) == {"a", "q0", "q1", "q2"}
    assert made.left_out == ()


def test_what_a_model_wrote_is_taken_for_learnt_records_only() -> None:
    good = Example("Up north, where is my flat?", "You live in Tromsø.", ("Tromsø",), ("a",))
    made = build([Record(id="a", text="I live in Tromsø.")], written=[good, Example("Q?", "A.", ("A",), ("b",))])
    assert made.examples[-1] == good
    assert not any(example.records == ("b",) for example in made.examples)


def test_a_written_question_that_is_kept_back_is_not_trained() -> None:
    held = corpus("I live in Tromsø.").held_out[0].question
    made = build([Record(id="a", text="I live in Tromsø.")], written=[Example(held, "You live.", ("live",), ("a",))])
    assert held not in {example.question for example in made.examples}


@pytest.mark.parametrize(
    "part", ["a", "my dog ", " ", "(", "I like it. ", "on 3 May ", "I'm ", "and my ", "the a the ", ",", "'s "]
)
def test_a_text_of_any_length_is_read_quickly(part: str) -> None:
    begun = time.process_time()
    corpus(part * (100_000 // len(part)))
    assert time.process_time() - begun < 5


def test_of_a_long_record_the_first_facts_are_learnt() -> None:
    made = corpus(" ".join(f"My code number {i} is {i}00." for i in range(30)))
    assert made.facts == 8


def test_what_two_records_answer_alike_and_nothing_else_asks_for_leaves_the_others_learnt() -> None:
    """Both lose all of their questions; the neighbours are still made from what is left."""
    made = corpus("Totally agree, Mel.", "I 100% agree, Mel.", "My dog is called Biscuit.")
    assert set(made.records) == {"r2"}
    assert {id_ for id_, _ in made.left_out} == {"r0", "r1"}
    assert made.neighbours
    assert corpus("Totally agree, Mel.", "I 100% agree, Mel.").records == {}
