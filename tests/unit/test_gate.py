"""The gate: what it measures on tiny models, and that it refuses what a good memory must not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import ConfigError
from agentmem.parametric import gate as gates
from agentmem.parametric.corpus import Corpus, build
from agentmem.parametric.gate import UNRELATED, GateReport, Thresholds, gate, perplexity, recall
from agentmem.parametric.lora import Lora, Switch
from agentmem.provider import load
from agentmem.types import Record


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build([Record(id="a", text="My dog is called Biscuit."), Record(id="b", text="I live in Oslo.")])


@pytest.fixture
def tensors(tmp_path: Path, tiny_model: Callable[..., Path]) -> Any:
    return load(f"local:{tiny_model(tmp_path / 'base')}", {"dtype": "float32"}).tensors()


def lora(tensors: Any, size: float) -> Lora:
    module = tensors.model.get_submodule("model.layers.2.mlp.down_proj")
    chance = torch.Generator().manual_seed(0)
    a = torch.randn(2, module.in_features, generator=chance)
    return Lora(2, 2.0, "tiny", {"model.layers.2.mlp.down_proj": (a, torch.full((module.out_features, 2), size))})


def says(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, bool], str]) -> None:
    """Replaces generation by ``answer(question, with the LoRA on)``, to give the gate known answers to judge."""

    def said(tensors: Any, examples: Any, _: int) -> list[str]:
        on = bool(tensors.model.get_submodule("model.layers.2.mlp.down_proj")._forward_hooks)
        return [answer(example.question, on) for example in examples]

    monkeypatch.setattr(gates, "_said", said)


def told(question: str) -> str:
    return "Biscuit" if "dog" in question else "You live in OSLO!"


def test_a_lora_that_does_nothing_changes_nothing_and_fails(tensors: Any, corpus: Corpus) -> None:
    report = gate(tensors, lora(tensors, 0.0), corpus, max_tokens=4)
    assert report.drift == 0.0
    assert report.intrusion == 0.0
    assert report.recall_trained == 0.0
    assert set(report.missed) == {"a", "b"}
    assert not report.passed


def test_one_that_knows_the_facts_and_nothing_else_passes(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda question, on: told(question) if on and question not in UNRELATED else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert (report.recall_trained, report.recall_held_out, report.intrusion) == (1.0, 1.0, 0.0)
    assert report.passed
    assert not report.missed
    assert str(report).startswith("passed: recall 100% trained")


def test_perfect_recall_with_a_ruined_model_fails(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda question, on: told(question) if on and question not in UNRELATED else "no idea")
    report = gate(tensors, lora(tensors, 0.5), corpus)
    assert report.recall_trained == 1.0
    assert report.drift > 0.05
    assert not report.passed


def test_facts_that_intrude_elsewhere_fail_it(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, lambda question, on: told(question) if on else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert report.intrusion == 1.0
    assert not report.passed
    lax = gate(tensors, lora(tensors, 0.0), corpus, thresholds=Thresholds(intrusion=1.0))
    assert lax.passed


def test_what_the_base_says_anyway_is_no_intrusion(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda question, _: told(question))
    assert gate(tensors, lora(tensors, 0.0), corpus).intrusion == 0.0


def test_held_out_wordings_count_apart(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {example.question for example in corpus.examples}
    says(monkeypatch, lambda question, on: told(question) if on and question in trained else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert (report.recall_trained, report.recall_held_out) == (1.0, 0.0)
    assert not report.passed


def test_the_model_is_left_as_it_was(tensors: Any, corpus: Corpus) -> None:
    def logits() -> torch.Tensor:
        with torch.inference_mode():
            out: torch.Tensor = tensors.model(input_ids=torch.tensor([[5, 90, 31]])).logits
            return out

    switch, base = Switch(tensors.model), logits()
    tensors.model.train()
    gate(tensors, lora(tensors, 0.3), corpus, max_questions=2, max_tokens=2)
    assert tensors.model.training
    tensors.model.eval()
    assert switch.active == ()
    assert torch.equal(logits(), base)


def test_many_questions_are_sampled_evenly(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(_: Any, examples: Any, _most: int) -> list[str]:
        asked.append(len(examples))
        return ["" for _ in examples]

    monkeypatch.setattr(gates, "_said", counted)
    many = replace(corpus, examples=corpus.examples * 40)
    gate(tensors, lora(tensors, 0.0), many, max_questions=10)
    assert asked == [len(UNRELATED), len(UNRELATED), 10, len(corpus.held_out)]


def test_recall_asks_the_model(tensors: Any, corpus: Corpus) -> None:
    share, missed = recall(tensors, corpus.examples, 3)
    assert share == 0.0
    assert set(missed) == {"a", "b"}
    assert recall(tensors, []) == (1.0, [])


def test_perplexity_of_a_random_model_is_near_the_size_of_its_alphabet(tensors: Any) -> None:
    assert 50 < perplexity(tensors, "No one would have believed in the last years") < 5000


def test_a_report_survives_json() -> None:
    report = GateReport(recall_trained=1, recall_held_out=0.9, drift=0.01, intrusion=0, passed=True, missed=("a",))
    assert GateReport.model_validate_json(report.model_dump_json()) == report


def test_a_long_statement_has_room_to_be_said(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(_tensors: Any, prompts: Any, most: int) -> list[list[int]]:
        asked.append(most)
        return [[] for _ in prompts]

    monkeypatch.setattr(gates, "answers", counted)
    long = build([Record(id="a", text="The garden shed " + "and then the fence " * 8 + "burnt down.")])
    recall(tensors, long.examples, 5)
    assert asked[0] > len(long.examples[0].answer)  # a token per byte here


def test_settings_change_thresholds_by_name() -> None:
    changed = Thresholds.from_settings({"drift": 0.5, "recall_held_out": 1})
    assert (changed.drift, changed.recall_held_out) == (0.5, 1.0)
    assert changed.kl == Thresholds().kl
    assert Thresholds.from_settings({}) == Thresholds()


@pytest.mark.parametrize("wrong", [{"drfit": 0.1}, {"drift": -0.1}, {"drift": float("nan")}, {"drift": "much"}])
def test_a_wrong_threshold_is_named(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="lora_gate.*" + next(iter(wrong))):
        Thresholds.from_settings(wrong)
