"""The gate: what it measures on tiny models, and that it refuses what a good memory must not do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import ConfigError
from agentmem.parametric import gate as gates
from agentmem.parametric.answering import Answer
from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.parametric.gate import GateReport, Thresholds, failures, gate, intrudes, perplexity, recall
from agentmem.parametric.lora import Lora, Switch, applied
from agentmem.parametric.probes import UNRELATED, neighbours, unknown
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

    def said(tensors: Any, prompts: Any, most: Any, *_: Any, scored: int = 0, **__: Any) -> list[Answer]:
        on = bool(tensors.model.get_submodule("model.layers.2.mlp.down_proj")._forward_hooks)
        questions = [tensors.tokenizer.decode(ids).split("user\n")[-1].split("<|im_end|>")[0] for ids in prompts]
        texts = [tensors.tokenizer.encode(answer(question, on)) for question in questions]
        return [
            Answer(text, ended=True, logits=torch.zeros(2, 8) if at < scored else None) for at, text in enumerate(texts)
        ]

    monkeypatch.setattr(gates, "said", said)


def told(question: str) -> str:
    return "Biscuit" if re.search("dog|pet|animal", question) else "You live in OSLO!"


def asks_of_the_user(corpus: Corpus) -> Callable[[str], bool]:
    asked = {e.question for part in (corpus.examples, corpus.held_out, corpus.natural) for e in part}
    return lambda question: question in asked


def test_a_lora_that_does_nothing_changes_nothing_and_fails(tensors: Any, corpus: Corpus) -> None:
    report = gate(tensors, lora(tensors, 0.0), corpus, max_tokens=4)
    assert report.drift == 0.0
    assert report.kl == pytest.approx(0.0, abs=1e-6)
    assert (report.intrusion, report.neighbours, report.unknown) == (0.0, 0.0, 1.0)
    assert report.recall_trained == 0.0
    assert set(report.missed) == {"a", "b"}
    assert report.by_record == {"a": 0.0, "b": 0.0}
    assert not report.passed
    assert "recall of held-out wordings is 0.0%, not at least 80.0%" in report.failed


def test_one_that_knows_the_facts_and_nothing_else_passes(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asks_of_the_user(corpus)
    says(monkeypatch, lambda question, on: told(question) if on and own(question) else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert (report.recall_trained, report.recall_held_out, report.intrusion, report.unknown) == (1.0, 1.0, 0.0, 1.0)
    assert report.passed
    assert report.failed == ()
    assert not report.missed
    assert report.by_record == {"a": 1.0, "b": 1.0}
    assert str(report).startswith("passed: recall 100% trained")


def test_perfect_recall_with_a_ruined_model_fails(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = asks_of_the_user(corpus)
    says(monkeypatch, lambda question, on: told(question) if on and own(question) else "no idea")
    report = gate(tensors, lora(tensors, 0.5), corpus)
    assert report.recall_trained == 1.0
    assert report.drift > 0.05
    assert len(report.failed) == 1
    assert "drift on unrelated text" in report.failed[0]
    assert not report.passed


def test_facts_that_intrude_elsewhere_fail_it(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, lambda question, on: told(question) if on else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert (report.intrusion, report.neighbours, report.unknown) == (1.0, 1.0, 0.0)
    assert len(report.failed) == 3
    lax = gate(tensors, lora(tensors, 0.0), corpus, thresholds=Thresholds(intrusion=1, neighbours=1, unknown=0))
    assert lax.passed


def test_only_what_a_chat_would_let_it_answer_counts_as_gated(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda question, on: told(question) if on else "no idea")
    first = neighbours(corpus, 1)[0].question
    report = gate(tensors, lora(tensors, 0.0), corpus, concerns=lambda question: question == first)
    assert report.intrusion == 1.0
    assert report.gated_intrusion == pytest.approx(1 / (40 + len(unknown(corpus, 8))))
    assert report.passed  # it never speaks where it must not, in a chat
    everywhere = gate(tensors, lora(tensors, 0.0), corpus, concerns=lambda _: True)
    assert everywhere.gated_intrusion == 1.0
    assert len(everywhere.failed) == 1
    assert gate(tensors, lora(tensors, 0.0), corpus).gated_intrusion is None


def test_a_learnt_value_for_what_nobody_told_is_counted(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    invented = {question.question for question in unknown(corpus, 8)[:2]}
    says(monkeypatch, lambda question, on: "It is Biscuit." if on and question in invented else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert report.unknown == 0.75
    assert report.intrusion == 0.0
    assert any("unanswerable" in text for text in report.failed)


def test_what_the_base_says_anyway_is_no_intrusion(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, lambda question, _: told(question))
    assert gate(tensors, lora(tensors, 0.0), corpus).intrusion == 0.0


def test_what_a_question_says_itself_is_no_intrusion(corpus: Corpus) -> None:
    facts = corpus.examples[:1]
    assert intrudes(facts, "What is Karl's dog called?", "Rex.", "Biscuit.")
    assert not intrudes(facts, "Is Karl's dog called Biscuit?", "No.", "Biscuit? No.")


def test_held_out_wordings_count_apart(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = {example.question for example in corpus.examples}
    says(monkeypatch, lambda question, on: told(question) if on and question in trained else "no idea")
    report = gate(tensors, lora(tensors, 0.0), corpus)
    assert (report.recall_trained, report.recall_held_out) == (1.0, 0.0)
    assert not report.passed


def test_natural_wordings_count_where_there_are_some(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    worded = Example("Which animal is mine?", "Your dog is called Biscuit.", ("Biscuit",), ("a",))
    own = asks_of_the_user(replace(corpus, natural=()))
    says(monkeypatch, lambda question, on: told(question) if on and own(question) else "no idea")
    report = gate(tensors, lora(tensors, 0.0), replace(corpus, natural=(worded,)))
    assert report.recall_natural == 0.0
    assert report.by_record["a"] < 1.0
    assert any("wholly reworded" in text for text in report.failed)
    assert gate(tensors, lora(tensors, 0.0), replace(corpus, natural=())).recall_natural is None


def test_what_acts_beside_it_is_asked_for_with_all_of_them_on(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting: list[int] = []

    @contextlib.contextmanager
    def counted(model: Any, *loras: Lora) -> Any:
        acting.append(len(loras))
        with applied(model, *loras):
            yield

    monkeypatch.setattr(gates, "applied", counted)
    own = asks_of_the_user(corpus)
    says(monkeypatch, lambda question, on: told(question) if on and own(question) and acting[-1] == 1 else "no idea")
    alone = gate(tensors, lora(tensors, 0.0), corpus)
    assert (alone.composition, alone.retention, alone.drift_composed) == (None, None, None)
    report = gate(tensors, lora(tensors, 0.0), corpus, beside=[lora(tensors, 0.2)], earlier=corpus)
    assert acting == [1, 1, 2]
    assert (report.recall_held_out, report.composition, report.retention) == (1.0, 0.0, 0.0)
    assert report.drift == 0.0
    assert report.drift_composed is not None
    assert report.drift_composed > 0.0
    assert sum("other active versions" in text for text in report.failed) >= 1


def test_each_question_is_asked_under_the_sum_that_answers_it_in_a_chat(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting: list[float] = []

    @contextlib.contextmanager
    def counted(model: Any, *loras: Lora) -> Any:
        acting.append(sum(float(part.tensors["model.layers.2.mlp.down_proj"][1][0, 0]) for part in loras[1:]))
        with applied(model, *loras):
            yield

    monkeypatch.setattr(gates, "applied", counted)
    own = asks_of_the_user(corpus)
    says(monkeypatch, lambda question, on: told(question) if on and own(question) and acting[-1] != 0.25 else "no idea")
    beside = [lora(tensors, size) for size in (0.125, 0.25, 0.5, 1.0)]
    dog = {example.question for example in corpus.held_out if "a" in example.records}
    report = gate(
        tensors,
        lora(tensors, 0.0),
        corpus,
        beside=beside,
        others=9,
        earlier=corpus,
        acting=lambda example: (4, 0, 1) if example.question in dog else (0, 2),
    )
    assert sorted(acting[1:]) == [0.25, 1.125]
    assert report.composition == report.retention == len(dog) / len(corpus.held_out)
    assert (report.beside, report.others) == (3, 9)
    assert "beside 3 of 9 active" in str(report)
    assert report.drift_composed is not None
    every = gate(tensors, lora(tensors, 0.0), corpus, beside=beside)
    assert acting[-1] == 1.875
    assert (every.beside, every.others) == (4, 4)


def test_what_a_chat_would_not_let_act_on_a_question_does_not_disturb_its_answer(
    tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    acting: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def noted(model: Any, *loras: Lora) -> Any:
        acting.append(tuple(map(id, loras)))
        with applied(model, *loras):
            yield

    monkeypatch.setattr(gates, "applied", noted)
    own = asks_of_the_user(corpus)
    new, old = lora(tensors, 0.5), lora(tensors, 0.25)
    says(
        monkeypatch, lambda question, on: told(question) if on and own(question) and acting[-1] == (id(old),) else "no"
    )
    report = gate(tensors, new, corpus, beside=[old], earlier=corpus, acting=lambda _: (1,))
    assert acting[1:] == [(id(old),)]
    assert (report.retention, report.drift_composed, report.beside) == (1.0, None, 0)


def test_a_model_that_computes_no_numbers_any_more_still_gives_a_report_that_can_be_stored(
    tensors: Any, corpus: Corpus
) -> None:
    report = gate(tensors, lora(tensors, float("inf")), corpus, max_tokens=2)
    assert not report.passed
    assert report.drift > 1.0
    assert GateReport.model_validate_json(report.model_dump_json()) == report


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


def test_many_questions_are_sampled(tensors: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, lambda *_: "")
    many = replace(corpus, examples=corpus.examples * 40)
    report = gate(tensors, lora(tensors, 0.0), many, max_questions=10)
    tempting = len(neighbours(corpus, 24))
    assert report.asked == 10 + len(corpus.held_out) + len(corpus.natural) + len(UNRELATED) + tempting + len(
        unknown(corpus, 8)
    )


def test_recall_asks_the_model(tensors: Any, corpus: Corpus) -> None:
    share, missed = recall(tensors, corpus.examples[:3])
    assert share == 0.0
    assert set(missed) <= {"a", "b"}
    assert recall(tensors, []) == (1.0, [])


def test_what_was_not_measured_is_not_judged() -> None:
    report = GateReport(recall_trained=1, recall_held_out=1, drift=0, intrusion=0, passed=True)
    assert failures(report) == ()
    assert len(failures(report.model_copy(update={"kl": 0.5, "retention": 0.1}))) == 2


def test_perplexity_of_a_random_model_is_near_the_size_of_its_alphabet(tensors: Any) -> None:
    assert 50 < perplexity(tensors, "No one would have believed in the last years") < 5000


def test_a_report_survives_json() -> None:
    report = GateReport(recall_trained=1, recall_held_out=0.9, drift=0.01, intrusion=0, passed=True, missed=("a",))
    assert GateReport.model_validate_json(report.model_dump_json()) == report


def test_a_long_statement_has_room_to_be_said(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def counted(_tensors: Any, prompts: Any, most: Any, *_: Any, **__: Any) -> list[Answer]:
        asked.extend(most)
        return [Answer([]) for _ in prompts]

    monkeypatch.setattr(gates, "said", counted)
    long = build([Record(id="a", text="The garden shed " + "and then the fence " * 8 + "burnt down.")])
    recall(tensors, long.examples)
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
