"""Turns that only tell, by their English words; whatever is not sure may ask."""

from __future__ import annotations

import pytest

from agentmem.plaintext.asking import tells


@pytest.mark.parametrize(
    "text",
    [
        "I went to a support group yesterday.",
        "Hey Mel! It was so powerful, I loved every minute.",
        "Wow, that's great. My kids adore the beach.",
        "Thanks! We had a lovely time.",
    ],
)
def test_statements_tell(text: str) -> None:
    assert tells(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What must she not eat?",
        "I like cooking. Suggest a snack",
        "Suggest a snack.",
        "hey, remind me of my doctor's name",
        "I need a recipe for tonight",
        "I'm looking for a present for my sister",
        "I don't remember where I parked",
        "My flight leaves at nine. Could you plan the morning.",
        "Es hat gestern geregnet.",
        "明天的会议几点\uff1f",
        "weather in Lisbon",
    ],
)
def test_what_may_ask_is_not_taken_for_a_statement(text: str) -> None:
    assert not tells(text)


def test_a_text_of_any_length_is_read_quickly() -> None:
    assert tells("I like it. " * 100_000)
