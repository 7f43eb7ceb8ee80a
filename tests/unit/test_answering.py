"""Answers of many questions at once are those of plain greedy decoding, whatever was guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.parametric.answering import divergence, said, text_loss
from agentmem.parametric.lessons import answers, opening
from agentmem.parametric.lora import Lora, applied
from agentmem.provider import load
from agentmem.types import Message

QUESTIONS = ("Who?", "What is my dog's name?", "Where do I live, and since when?", "Why?", "Is it so?", "x" * 70)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Any:
    made = load(f"local:{tiny_model(tmp_path_factory.mktemp('tiny') / 'base')}", {"dtype": "float32"}).tensors()
    made.model.eval()
    made.model.set_attn_implementation("sdpa")
    return made


def prompts(tensors: Any, *, system: bool = True) -> list[list[int]]:
    said_first = [Message(role="system", content="Be brief, be kind, be quick.")] if system else []
    return [tensors.render([*said_first, Message(role="user", content=question)]) for question in QUESTIONS]


def lora(tensors: Any, activated: tuple[int, ...] = ()) -> Lora:
    chance = torch.Generator().manual_seed(3)
    pairs = {}
    for path in ("model.layers.1.self_attn.v_proj", "model.layers.2.mlp.down_proj"):
        module = tensors.model.get_submodule(path)
        a = torch.randn(2, module.in_features, generator=chance)
        pairs[path] = (a, torch.randn(module.out_features, 2, generator=chance) * 0.2)
    return Lora(2, 2.0, "tiny", pairs, {}, activated)


def plain(tensors: Any, asked: list[list[int]], most: int) -> list[list[int]]:
    """One question at a time, by transformers."""
    return [answers(tensors, [prompt], most)[0] for prompt in asked]


def test_answers_in_batches_are_those_of_one_question_at_a_time(tensors: Any) -> None:
    asked = prompts(tensors)
    expected = plain(tensors, asked, 12)
    assert len({tuple(tokens) for tokens in expected}) > 3
    assert [answer.tokens for answer in said(tensors, asked, 12)] == expected


def test_prompts_that_share_nothing_or_are_equal_are_answered_too(tensors: Any) -> None:
    asked = [[5, 9, 200], [7], [7, 7, 7], [5, 9, 200], *prompts(tensors, system=False)[:2]]
    assert [answer.tokens for answer in said(tensors, asked, 6)] == plain(tensors, asked, 6)
    assert said(tensors, [], 6) == []


def test_a_guess_changes_no_answer(tensors: Any) -> None:
    asked = prompts(tensors)
    expected = plain(tensors, asked, 10)
    right = expected
    half = [tokens[:5] for tokens in expected]
    wrong = [[*tokens[:3], (tokens[3] + 1) % 250, 17] if len(tokens) > 3 else [17] for tokens in expected]
    none: list[list[int]] = [[] for _ in asked]
    for guesses in (right, half, wrong, none, [right[0], half[1], wrong[2], [], right[4], wrong[5]]):
        assert [answer.tokens for answer in said(tensors, asked, 10, guesses=guesses)] == expected


def test_a_guess_that_is_right_costs_no_further_pass(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(tensors)
    expected = plain(tensors, asked, 10)
    passes: list[int] = []
    hook = tensors.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        said(tensors, asked, 10, guesses=expected)
        assert len(passes) == 1
        said(tensors, asked, 10)
        assert len(passes) == 1 + 10
    finally:
        hook.remove()


def test_each_row_has_its_own_limit_and_stops_at_its_end_mark(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(tensors)
    whole = plain(tensors, asked, 12)
    limits = [1, 12, 3, 12, 7, 2]
    assert [a.tokens for a in said(tensors, asked, limits)] == [t[:most] for t, most in zip(whole, limits, strict=True)]
    mark = whole[1][4]
    from agentmem.parametric import answering

    monkeypatch.setattr(answering, "ends", lambda _: [mark])
    for answer, tokens in zip(said(tensors, asked, 12), whole, strict=True):
        assert answer.tokens == (tokens[: tokens.index(mark)] if mark in tokens else tokens)
        assert answer.ended == (mark in tokens)


def test_more_rows_than_a_batch_holds(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem.parametric import answering

    monkeypatch.setattr(answering, "_ROWS", 2)
    asked = prompts(tensors)
    assert [answer.tokens for answer in said(tensors, asked, 5)] == plain(tensors, asked, 5)


def test_logits_stand_where_the_guess_is_predicted(tensors: Any) -> None:
    asked = prompts(tensors)
    own = said(tensors, asked, 8, scored=len(asked))
    again = said(tensors, asked, 8, guesses=[answer.tokens for answer in own], scored=len(asked))
    for answer, forced in zip(own, again, strict=True):
        assert answer.logits is not None
        assert forced.logits is not None
        assert answer.logits.argmax(-1).tolist() == answer.tokens
        torch.testing.assert_close(answer.logits, forced.logits, rtol=1e-4, atol=1e-4)
    assert divergence(own, again) == pytest.approx(0.0, abs=1e-5)
    with applied(tensors.model, lora(tensors)):
        here = said(tensors, asked, 8, guesses=[answer.tokens for answer in own], scored=len(asked))
    assert divergence(own, here) > 0.01


def test_the_divergence_is_the_mean_over_tokens() -> None:
    from agentmem.parametric.answering import Answer

    even, odd = torch.tensor([[0.0, 0.0]]), torch.log(torch.tensor([[0.25, 0.75]]))
    one = 0.5 * float(torch.log(torch.tensor(0.5 / 0.25))) + 0.5 * float(torch.log(torch.tensor(0.5 / 0.75)))
    base = [Answer([1], logits=even), Answer([1], logits=even.repeat(3, 1)), Answer([1])]
    here = [Answer([1], logits=odd), Answer([1], logits=even.repeat(3, 1)), Answer([1])]
    assert divergence(base, here) == pytest.approx(one / 4)
    assert divergence([], []) == 0.0


@pytest.mark.parametrize("activated", [False, True])
def test_a_lora_acts_as_it_does_when_it_is_served(tensors: Any, activated: bool) -> None:
    asked = prompts(tensors)
    mark = opening(tensors) if activated else ()
    base = plain(tensors, asked, 10)
    with applied(tensors.model, lora(tensors, mark)):
        expected = plain(tensors, asked, 10)
        assert expected != base
        assert [answer.tokens for answer in said(tensors, asked, 10, opening=mark)] == expected
        guessed = said(tensors, asked, 10, guesses=base, opening=mark)
        assert [answer.tokens for answer in guessed] == expected


def test_an_activated_lora_leaves_plain_text_alone_and_changes_what_is_said(tensors: Any) -> None:
    mark = opening(tensors)
    text = tensors.tokenizer.encode("No one would have believed", add_special_tokens=False)
    before = text_loss(tensors, text), text_loss(tensors, text, after=prompts(tensors)[0])
    with applied(tensors.model, lora(tensors, mark)):
        assert text_loss(tensors, text) == before[0]
        assert abs(text_loss(tensors, text, after=prompts(tensors)[0], opening=mark) - before[1]) > 1e-3
    assert text_loss(tensors, text) == before[0]


def test_the_loss_of_a_text_is_that_of_its_tokens(tensors: Any) -> None:
    ids, after = [40, 50, 60, 70], [9, 8, 7]
    with torch.inference_mode():
        scores = tensors.model(input_ids=torch.tensor([[*after, *ids]])).logits[0].log_softmax(-1)
        alone = tensors.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert text_loss(tensors, ids, after=after) == pytest.approx(
        -sum(float(scores[2 + at, token]) for at, token in enumerate(ids)) / 4, rel=1e-4
    )
    assert text_loss(tensors, ids) == pytest.approx(
        -sum(float(alone[at, token]) for at, token in enumerate(ids[1:])) / 3, rel=1e-4
    )
