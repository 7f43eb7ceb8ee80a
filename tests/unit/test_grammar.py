"""English for questions: persons, verb forms, and times made absolute."""

from __future__ import annotations

import datetime as dt

import pytest

from agentmem.parametric.grammar import absolute, base_form, find_time, is_past, of_another, singular_form, telling

SAID = dt.datetime(2023, 5, 8, 13, 0, tzinfo=dt.UTC)  # a Monday


@pytest.mark.parametrize(
    ("asked", "about_bob"),
    [
        ("Where do I live?", "Where does Bob live?"),
        ("What is my dog called?", "What is Bob's dog called?"),
        ("Tell me what I drive.", "Tell me what Bob drives."),
        ("What am I allergic to?", "What is Bob allergic to?"),
        ("What must I not eat because of my allergy?", "What must Bob not eat because of their allergy?"),
        ("Which city is home for me?", "Which city is home for Bob?"),
        ("Remind me where I put my keys.", "Remind me where Bob put their keys."),
        ("We've visited our aunt.", "Bob has visited their aunt."),
        ("Why is the sky blue?", "Why is the sky blue?"),
        ("What don't I eat?", "What doesn't Bob eat?"),
        ("What did I say I have?", "What did Bob say they have?"),
        ("What did my doctor tell me to do?", "What did Bob's doctor tell them to do?"),
        ("Could you tell me where I live?", "Could you tell me where Bob lives?"),
        ("Where did my wife and I meet?", "Where did Bob's wife and they meet?"),
    ],
)
def test_of_another(asked: str, about_bob: str) -> None:
    assert of_another(asked, "Bob") == about_bob


@pytest.mark.parametrize(
    ("past", "base"),
    [("went", "go"), ("stopped", "stop"), ("tried", "try"), ("visited", "visit"), ("created", "create"),
     ("explored", "explore"), ("repeated", "repeat"), ("closed", "close"), ("travelled", "travel")],
)  # fmt: skip
def test_base_forms(past: str, base: str) -> None:
    assert base_form(past) == base
    assert is_past(past)


def test_singular_forms() -> None:
    assert [singular_form(verb) for verb in ("live", "am", "have", "try", "teach", "went", "can")] == [
        "lives", "is", "has", "tries", "teaches", "went", "can",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("phrase", "date"),
    [
        ("yesterday", "on 7 May 2023"),
        ("tomorrow", "on 9 May 2023"),
        ("last Friday", "on 5 May 2023"),
        ("next Monday", "on 15 May 2023"),
        ("two weeks ago", "on 24 April 2023"),
        ("last week", "in the week of 1 May 2023"),
        ("next month", "in June 2023"),
        ("three years ago", "in 2020"),
        ("in ten months", "in March 2024"),
        ("900 years ago", "in 1123"),
    ],
)
def test_relative_times_are_counted_from_when_they_were_said(phrase: str, date: str) -> None:
    assert absolute(f"We met {phrase}.", SAID) == f"We met {date}."
    assert absolute(f"We met {phrase}.", None) == f"We met {phrase}."


def test_a_time_before_all_years_stays_as_it_was_said() -> None:
    assert absolute("It was 999 years ago.", dt.datetime(3, 1, 1, tzinfo=dt.UTC)) == "It was 999 years ago."


@pytest.mark.parametrize(
    ("text", "rest", "time"),
    [
        ("I have chess on Tuesdays at 6 pm", "I have chess", "on Tuesdays at 6 pm"),
        ("On 3 May I flew", "I flew", "On 3 May"),
        ("I run every morning", "I run", "every morning"),
        ("May is my aunt", "May is my aunt", ""),
        ("I moved in 2004 to Rome", "I moved to Rome", "in 2004"),
    ],
)
def test_find_time(text: str, rest: str, time: str) -> None:
    assert find_time(text) == (rest, time)


def test_telling_words_leave_out_what_is_asked_with() -> None:
    assert telling("You planted a pear tree in the garden", "What did I plant in the garden?") == ["pear", "tree"]
