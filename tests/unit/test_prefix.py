"""Distilling a head into fewer states: what is read, chosen, trained and judged, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import InvalidInput, TrainingError
from agentmem.parametric.corpus import Example
from agentmem.parametric.prefix import (
    Lesson,
    PrefixRecipe,
    Reader,
    TrainedStates,
    distil,
    head_of,
    lesson,
)
from agentmem.parametric.prefix_gate import judge
from agentmem.parametric.train import steady
from agentmem.provider import load
from agentmem.types import Message

HEAD = [Message(role="system", content="My dog is called Biscuit. My cat is called Quill. " * 2)]
QUICK = PrefixRecipe(epochs=1.0, batch=2, general=1, least_steps=6, answer_tokens=3)


@pytest.fixture(scope="module")
def tensors(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tiny_model(tmp_path_factory.mktemp("model"))
    provider = load(f"local:{folder}", {"device": "cpu", "dtype": "float32", "cache_dir": str(folder / "cache")})
    yield provider.tensors()
    provider.close()


@pytest.fixture(scope="module")
def head(tensors: Any) -> list[int]:
    return head_of(tensors, HEAD)


@pytest.fixture(scope="module")
def lessons(tensors: Any, head: list[int]) -> list[Lesson]:
    asked = (
        ("What is my dog called?", "Biscuit.", ("a",)),
        ("And my cat?", "Quill.", ("b",)),
        ("Hello!", "", ()),
    )
    made = [lesson(tensors, HEAD, head, Example(question, answer, (), ids)) for question, answer, ids in asked]
    return [one for one in made if one is not None]


def states(trained: TrainedStates) -> list[torch.Tensor]:
    return [part for pair in trained.layers for part in pair]


def test_a_head_ends_where_the_users_words_begin(tensors: Any, head: list[int]) -> None:
    whole = tensors.render([*HEAD, Message(role="user", content="anything")])
    assert whole[: len(head)] == head
    assert tensors.tokenizer.decode(head).endswith("<|im_start|>user\n")


def test_a_lesson_goes_on_behind_the_head_to_the_end_of_the_answer(tensors: Any, lessons: list[Lesson]) -> None:
    assert len(lessons) == 3
    said = tensors.tokenizer.decode([*lessons[0].tail, *lessons[0].answer])
    assert said == "What is my dog called?<|im_end|>\n<|im_start|>assistant\nBiscuit.<|im_end|>"
    assert lessons[2].answer == ()


def test_what_is_read_behind_states_is_what_the_model_says_of_the_whole_text(
    tensors: Any, head: list[int], lessons: list[Lesson]
) -> None:
    with steady(tensors.model), torch.inference_mode():
        reader = Reader(tensors)
        got = reader.answered(reader.read(head), lessons[:2])
        rows = []
        for one in lessons[:2]:
            ids = torch.tensor([[*head, *one.tail, *one.answer]])
            rows.append(tensors.model(input_ids=ids).logits[0, -len(one.answer) - 1 : -1].float())
    assert torch.allclose(got, torch.cat(rows), atol=1e-4)


def test_states_read_at_negative_positions_give_the_same_at_the_same_distance(
    tensors: Any, head: list[int], lessons: list[Lesson]
) -> None:
    with steady(tensors.model), torch.inference_mode():
        reader = Reader(tensors)
        whole = reader.read(head, -7)
        again = reader.read(head)
        ids = torch.tensor([list(lessons[0].tail)])

        def said(found: Any, first: int) -> torch.Tensor:
            places = torch.arange(first, first + ids.shape[1])[None]
            out = reader.decoder(
                input_ids=ids, past_key_values=reader._cache(found, 1), position_ids=places, use_cache=True
            )
            hidden: torch.Tensor = out.last_hidden_state
            return hidden

        assert torch.allclose(said(whole, len(head) - 7), said(again, len(head)), atol=1e-3)


def test_greedy_answers_of_a_batch_are_those_of_one_at_a_time(
    tensors: Any, head: list[int], lessons: list[Lesson]
) -> None:
    with steady(tensors.model):
        reader = Reader(tensors)
        found = reader.read(head)
        together = reader.greedy(found, lessons, 5)
        alone = [reader.greedy(found, [one], 5)[0] for one in lessons]
    assert together == alone


def test_a_prefix_comes_nearer_to_its_teacher_and_leaves_the_model_alone(
    tensors: Any, head: list[int], lessons: list[Lesson]
) -> None:
    before = {name: weight.clone() for name, weight in tensors.model.named_parameters()}
    steps: list[tuple[int, int]] = []
    recipe = replace(QUICK, least_steps=40, rate=2e-2, gold=0.0)  # the distance to the teacher alone
    trained = distil(
        tensors, head, lessons, tokens=32, recipe=recipe, progress=lambda done, total: steps.append((done, total))
    )
    assert trained.tokens == 32
    assert steps[-1] == (40, 40)
    assert sum(trained.losses[-5:]) < 0.5 * sum(trained.losses[:5])
    assert all(torch.equal(weight, before[name]) for name, weight in tensors.model.named_parameters())
    assert not any(weight.requires_grad for weight in tensors.model.parameters())


def test_the_first_position_stays_what_was_read(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    trained = distil(tensors, head, lessons, tokens=32, recipe=QUICK)
    with steady(tensors.model):
        read = Reader(tensors).read(head, 32 - len(head))
    for (key, value), (first, second) in zip(trained.layers, read, strict=True):
        assert torch.equal(key[:, 0], first[0, :, 0])
        assert torch.equal(value[:, 0], second[0, :, 0])


def test_one_seed_gives_one_prefix(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    one, same, other = (
        states(distil(tensors, head, lessons, tokens=16, recipe=replace(QUICK, batch=1), seed=seed))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_stopped_run_keeps_nothing(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    with pytest.raises(TrainingError, match="stopped after step 0"):
        distil(tensors, head, lessons, tokens=16, recipe=QUICK, stop=lambda: True)


@pytest.mark.parametrize("tokens", [0, 1, 10_000])
def test_a_length_that_saves_nothing_is_refused(
    tokens: int, tensors: Any, head: list[int], lessons: list[Lesson]
) -> None:
    with pytest.raises(InvalidInput, match=str(tokens)):
        distil(tensors, head, lessons, tokens=tokens)


def test_without_an_answer_there_is_nothing_to_learn(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    with pytest.raises(InvalidInput, match="no lesson has an answer"):
        distil(tensors, head, lessons[2:], tokens=16)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_a_model_that_forgets_positions_is_refused(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path, head: list[int], lessons: list[Lesson]
) -> None:
    folder = tiny_model(tmp_path / "model", kind)
    provider = load(f"local:{folder}", {"device": "cpu", "dtype": "float32", "cache_dir": str(tmp_path)})
    with pytest.raises(TrainingError, match="see every position"):
        distil(provider.tensors(), head, lessons, tokens=16)
    provider.close()


def gated(tensors: Any, trained: TrainedStates, lessons: list[Lesson]) -> Any:
    head = list(trained.head)
    return judge(tensors, trained, lessons[:2], lessons[2:], truncated=head[:32], nothing=head[:16])


def exact(tensors: Any, head: list[int]) -> TrainedStates:
    with steady(tensors.model):
        found = Reader(tensors).read(head)
    layers = [(key[0].clone(), value[0].clone()) for key, value in found]
    return TrainedStates(tuple(head), layers, (), 0.0, 0.0, 0.0)


def test_the_gate_passes_what_answers_as_the_whole_head(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    report = gated(tensors, exact(tensors, head), lessons)
    assert report.passed
    assert report.ll_trained == pytest.approx(report.ll_full, abs=1e-4)
    assert report.agreement == 1.0
    assert report.kl_unrelated == pytest.approx(0, abs=1e-4)
    assert report.ll_truncated != pytest.approx(report.ll_full, abs=1e-2)


def test_the_gate_refuses_what_says_other_things(tensors: Any, head: list[int], lessons: list[Lesson]) -> None:
    trained = exact(tensors, head)
    broken = replace(trained, layers=[(torch.zeros_like(key), 3 * value) for key, value in trained.layers])
    report = gated(tensors, broken, lessons)
    assert not report.passed
    assert any("KL on unrelated" in reason for reason in report.failed)
    assert "failed" in str(report)
