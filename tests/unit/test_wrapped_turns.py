"""What of a foreign client's request is new, and which of its prefixes the next request begins with."""

from __future__ import annotations

import itertools

import pytest

from agentmem.types import Message, ToolCall
from agentmem.wrapped_turns import Asked

CALL = ToolCall(id="c", name="weather")


def asked(pattern: str) -> Asked:
    """A request of u(ser), a(ssistant), t(ool) and s(ystem) messages; A is an answer that calls tools."""
    roles = {"u": "user", "a": "assistant", "A": "assistant", "t": "tool", "s": "system"}
    messages = [
        Message.model_validate(
            {"role": roles[letter], "content": f"{letter}{at}", "tool_calls": (CALL,) * (letter == "A")}
        )
        for at, letter in enumerate(pattern)
    ]
    return Asked(model="openai:m", messages=tuple(messages))


@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        ("u", "u0"),
        ("uau", "u2"),
        ("uauu", "u2 u3"),
        ("uAt", "t2"),
        ("uAtt", "t2 t3"),
        ("uAtAt", "t4"),
        ("uatu", "t2 u3"),
        ("uaua", "u2"),  # the answer is begun by the caller
        ("usau", "u3"),
        ("a", ""),
        ("", ""),
    ],
)
def test_the_new_input_is_what_follows_the_last_answer(pattern: str, new: str) -> None:
    assert " ".join(message.content for message in asked(pattern).new) == new


@pytest.mark.parametrize(
    ("pattern", "prefixes"),
    [
        ("u", []),
        ("uau", [2]),
        ("uauau", [2, 4]),
        ("uauauau", [4, 6]),
        ("uAt", [3]),
        ("uauAt", [2, 5]),
        ("uauAtAt", [2, 5, 7]),  # where the last request ended, and where this one does
        ("uauAttAtt", [2, 6, 9]),
        ("uauauAtAt", [2, 4, 7, 9]),
        ("", []),
    ],
)
def test_prefixes_end_where_requests_ended(pattern: str, prefixes: list[int]) -> None:
    assert asked(pattern).prefixes == prefixes


def test_each_request_of_a_run_of_tools_marks_where_the_last_one_ended() -> None:
    before = asked("uauAt")
    for more in ("At", "AtAt", "AtAtAt"):
        now = asked("uauAt" + more)
        assert before.prefixes[-1] in now.prefixes
        assert len(now.prefixes) <= 4
        before = now


def test_each_turn_marks_where_the_last_ones_history_ended() -> None:
    talk = "uauAtAtauauAtau"
    starts = [at for at, letter in enumerate(talk) if letter == "u"]
    for before, now in itertools.pairwise(starts[1:]):
        assert asked(talk[: before + 1]).prefixes[-1] in asked(talk[: now + 1]).prefixes
