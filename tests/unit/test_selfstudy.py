"""Self-study: what of a model's own questions is believed, on a model that says what the test wants it to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentmem.parametric import selfstudy
from agentmem.parametric.selfstudy import ABLE, study, trial
from agentmem.provider import load
from agentmem.types import Message, Record

JOB = Record(id="job", text="I work as a glass blower.")
ASKS = "What do I do for a living?"


@pytest.fixture
def tensors(tmp_path: Path, tiny_model: Callable[..., Path]) -> Any:
    return load(f"local:{tiny_model(tmp_path / 'base')}", {"dtype": "float32"}).tensors()


def speaks(monkeypatch: pytest.MonkeyPatch, question: str, knowing: str, blind: str) -> None:
    """The model writes ``question`` wherever it is to write one, and answers with or without the record."""

    def say(_: Any, conversations: Sequence[Sequence[Message]], _most: int) -> list[str]:
        return [said(conversation) for conversation in conversations]

    def said(conversation: Sequence[Message]) -> str:
        if conversation[0].role != "system":
            return blind
        return question if conversation[-1].content in selfstudy._STYLES else knowing

    monkeypatch.setattr(selfstudy, "_say", say)


def test_a_question_is_kept_that_only_the_record_answers(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speaks(monkeypatch, f'Sure: "{ASKS}" I hope it helps', "You work as a glass blower. Nice!", "You are a teacher.")
    made = study(tensors, [JOB], able=1.0)
    [example] = made.examples
    assert example.question == ASKS
    assert example.answer == "You work as a glass blower."
    assert example.records == ("job",)
    assert set(example.keys) == {"work", "glass", "blower"}


@pytest.mark.parametrize(
    ("question", "knowing", "blind"),
    [
        (ASKS, "You work as a glass blower.", "You work as a glass blower."),  # known without the record
        (ASKS, "You are a teacher.", "No idea."),  # wrong with it
        (ASKS, "I work as a glass blower.", "No idea."),  # speaks of itself
        ("What is glass?", "You work as a glass blower.", "No idea."),  # not about the user
        ("I am glad to help you.", "You work as a glass blower.", "No idea."),  # asks nothing
        (ASKS, "You work as a glass blower in a castle near Vienna, Austria.", "No idea."),  # makes things up
    ],
)
def test_anything_else_is_not(
    tensors: Any, monkeypatch: pytest.MonkeyPatch, question: str, knowing: str, blind: str
) -> None:
    speaks(monkeypatch, question, knowing, blind)
    made = study(tensors, [JOB], able=1.0)
    assert made.examples == ()
    assert made.why


def test_a_model_that_fails_its_trial_writes_nothing(tensors: Any) -> None:
    tried = trial(tensors)  # a random model writes noise
    assert tried.share < ABLE
    made = study(tensors, [JOB])
    assert made.examples == ()
    assert "not able" in made.why


def test_only_what_may_be_learnt_is_studied(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    speaks(monkeypatch, ASKS, "You work as a glass blower.", "No idea.")
    untrusted = JOB.model_copy(update={"trust": "untrusted"})
    answer = JOB.model_copy(update={"role": "assistant"})
    assert study(tensors, [untrusted, answer], able=1.0).examples == ()


def test_a_trial_is_made_once_for_a_model(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trial(tensors)
    speaks(monkeypatch, ASKS, "You work as a glass blower.", "No idea.")
    assert trial(tensors) is first


def test_the_model_is_left_as_it_was(tensors: Any) -> None:
    tensors.model.train()
    trial(tensors)
    assert tensors.model.training
