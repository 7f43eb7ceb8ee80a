"""Kinds of statements: what is asked about each, what is answered, by which words an answer is known."""

from __future__ import annotations

import datetime as dt

import pytest

from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.types import Record

SAID = dt.datetime(2023, 5, 8, 13, 0, tzinfo=dt.UTC)


def corpus(*texts: str, name: str | None = None) -> Corpus:
    return build([Record(id=f"r{i}", text=text, at=SAID, name=name) for i, text in enumerate(texts)])


def trained(*texts: str) -> dict[str, Example]:
    return {example.question: example for example in corpus(*texts).examples}


@pytest.mark.parametrize(
    ("said", "question", "answer", "key"),
    [
        ("I'm 34 years old.", "How old am I?", "You are 34 years old.", "34"),
        ("My birthday is on 3 May.", "When was I born?", "Your birthday is 3 May.", "May"),
        ("I was born in 1987 in Lyon.", "Where did I grow up?", "You are from Lyon.", "Lyon"),
        ("My sister Ottilie is a nurse.", "What is my sister's job?", "Your sister Ottilie is a nurse.", "nurse"),
        ("My sister Ottilie is a nurse.", "Who is my sister?", "Your sister is called Ottilie.", "Ottilie"),
        ("My brother lives in Porto.", "Where does my brother live?", "Your brother lives in Porto.", "Porto"),
        ("My dentist is Dr. Okonkwo.", "Who is my dentist?", "Your dentist is called Dr. Okonkwo.", "Dr Okonkwo"),
        ("We named our boat Morgenstern", "What do I call my ship?", "Your boat is called Morgenstern.", "Morgenstern"),
        ("I have two children.", "How many children do I have?", "You have two children.", "two"),
        ("I have a red bicycle.", "Which bicycle do I have?", "You have a red bicycle.", "red"),
        ("I have asthma.", "Which illness do I have?", "You have asthma.", "asthma"),
        ("My locker code is 38-12-5.", "What is my locker code?", "Your locker code is 38-12-5.", "38-12-5"),
        ("I have chess club on Tuesdays.", "When is my chess club?", "You have chess club on Tuesdays.", "Tuesdays"),
        (
            "I have chess club on Tuesdays.",
            "What do I do on Tuesdays?",
            "You have chess club on Tuesdays.",
            "chess",
        ),
        ("I can't stand coriander.", "What do I not like?", "You can't stand coriander.", "coriander"),
        ("I don't eat meat.", "What don't I eat?", "You don't eat meat.", "meat"),
        ("I'm afraid of spiders.", "What am I afraid of?", "You are afraid of spiders.", "spiders"),
        ("I'm a vegetarian.", "Which diet do I follow?", "You are a vegetarian.", "vegetarian"),
        ("I'm a nurse.", "What is my job?", "You work as a nurse.", "nurse"),
        ("I work for Siemens.", "Who employs me?", "You work at Siemens.", "Siemens"),
        ("I plan to learn the cello.", "What are my plans?", "You plan to learn the cello.", "cello"),
        ("I keep my passport in the oven.", "Where is my passport?", "You keep your passport in the oven.", "oven"),
        ("The spare key is under the mat.", "Where is the spare key?", "The spare key is under the mat.", "mat"),
        ("I'm learning to knit socks.", "What am I learning?", "You are learning to knit socks.", "knit socks"),
        ("I repair organs for a living.", "What is my job?", "You repair organs for a living.", "repair organs"),
        ("My exam is on Monday at 9:30.", "When is my exam?", "Your exam is on Monday at 9:30.", "9:30"),
        (
            "My favourite books are Dune and Emma.",
            "What are my favourite books?",
            "Your favourite books are Dune and Emma.",
            "Emma",
        ),
        (
            "Bernadette is my mother-in-law.",
            "Who is my mother-in-law?",
            "Your mother-in-law is called Bernadette.",
            "Bernadette",
        ),
        ("My shoe size is 43.", "Which size are my shoes?", "Your shoe size is 43.", "43"),
        ("My motorbike is a Triumph.", "What do I ride?", "Your motorbike is a Triumph.", "Triumph"),
        ("I collect old maps.", "What is in my collection?", "You collect old maps.", "old maps"),
        ("My aunt's birthday is on 3 May.", "When was my aunt born?", "Your aunt's birthday is 3 May.", "May"),
        ("My tailor works as a clown.", "What is my tailor's job?", "Your tailor works as a clown.", "clown"),
        ("Sencha is my favourite tea.", "Which tea do I like best?", "Your favourite tea is Sencha.", "Sencha"),
        ("I speak Basque.", "Which language do I speak?", "You speak Basque.", "Basque"),
        ("I drive a Saab.", "What vehicle do I own?", "You drive a Saab.", "Saab"),
        (
            "To reset the router, pull the plug.",
            "How do I reset the router?",
            "To reset the router, pull the plug.",
            "plug",
        ),
    ],
)
def test_each_kind_is_asked_for_in_words_of_its_own(said: str, question: str, answer: str, key: str) -> None:
    example = trained(said)[question]
    assert example.answer == answer
    assert key in example.keys
    assert example.found_in(answer)


@pytest.mark.parametrize(
    ("said", "question", "keys"),
    [
        ("On 3 May I flew to Oslo.", "When did I fly to Oslo?", ("3", "May")),
        ("On 3 May I flew to Oslo.", "Where did I fly on 3 May?", ("Oslo",)),
        ("Yesterday I planted a pear tree.", "When did I plant a pear tree?", ("7", "May", "2023")),
        ("I planted a pear tree in the garden.", "Where did I plant a pear tree?", ("garden",)),
        ("I planted a pear tree in the garden.", "What did I plant in the garden?", ("pear", "tree")),
        ("My aunt taught us chess.", "Who taught us chess?", ("aunt",)),
        ("I'm writing a novel about lighthouses.", "What am I writing?", ("novel", "lighthouses")),
        ("I can juggle five balls.", "What can I juggle?", ("five", "balls")),
        ("I've visited Japan.", "What have I visited?", ("Japan",)),
        ("Karim and I opened a bakery in Leeds.", "Where did Karim and I open a bakery?", ("Leeds",)),
        ("I met my wife at a bus stop.", "Who did I meet at a bus stop?", ("wife",)),
        ("When I was ten, I broke my arm.", "When did I break my arm?", ("ten",)),
        ("My parents are from Ghana.", "Where are my parents from?", ("Ghana",)),
        ("My wife Anna and I run a pub.", "What do my wife Anna and I run?", ("pub",)),
        ("I sold the car because the engine was loud.", "Why did I sell the car?", ("engine", "loud")),
    ],
)
def test_other_statements_are_asked_for_by_their_parts(said: str, question: str, keys: tuple[str, ...]) -> None:
    assert trained(said)[question].keys == keys


def test_relative_times_become_dates_in_the_answer() -> None:
    answers = {example.answer for example in corpus("I adopted a cat last Friday.").examples}
    assert answers == {"You adopted a cat on 5 May 2023."}


def test_she_is_whom_the_sentence_before_named() -> None:
    asked = trained("My sister Ottilie is a nurse. She lives in Bergen.")
    assert asked["Where does my sister live?"].answer == "Your sister Ottilie lives in Bergen."


def test_one_record_may_hold_several_facts() -> None:
    asked = trained("I live in Oslo and work as a cook, and my dog is called Rex.")
    assert {"Where do I live?", "What is my job?", "What is my dog called?"} <= set(asked)


def test_chats_leave_out_the_person() -> None:
    assert "You lost your job in April." in {e.answer for e in corpus("Lost my job in April.").examples}


@pytest.mark.parametrize(
    "said",
    ["My dog is called Biscuit.", "I live in Oslo.", "I'm 34.", "I work as a cook.", "My favourite tea is sencha.",
     "I play the cello.", "I drive a Saab.", "My lucky number is 417.", "I can't stand coriander.", "I have two sons."],
)  # fmt: skip
def test_every_kind_has_several_wordings_of_each_sort(said: str) -> None:
    made = corpus(said)
    assert len(made.examples) >= 4
    assert len(made.held_out) == 2
    assert made.natural
    assert made.neighbours
