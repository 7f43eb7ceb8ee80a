"""Tokens as text and logits as tokens: whole characters, stop strings, sampling."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.errors import InvalidInput
from agentmem.provider import Options

_local_text = importlib.import_module("agentmem.adapters.providers._local_text")
Sampler, Text = _local_text.Sampler, _local_text.Text

Make = Callable[..., Any]


def read(tokenizer: Any, text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], Any]:
    out = Text(tokenizer, stops)
    pieces = []
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        pieces.append(out.push(token))
        if out.stopped:
            break
    return [*pieces, out.flush()], out


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=20))
def test_pieces_are_whole_characters_and_add_up(byte_tokenizer: Make, text: str) -> None:
    tokenizer = byte_tokenizer()
    pieces, out = read(tokenizer, text)
    assert "".join(pieces) == out.text == text.rstrip("\ufffd")
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("abc🎉"), max_size=20),
    stops=st.lists(st.text(st.sampled_from("abc🎉"), max_size=4), max_size=3).map(tuple),
)
def test_nothing_from_a_stop_string_on_is_said(byte_tokenizer: Make, text: str, stops: tuple[str, ...]) -> None:
    pieces, out = read(byte_tokenizer(), text, stops)
    said = "".join(pieces)
    # Tokens come one byte at a time here, so the stop that is complete first ends the answer.
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop and stop in text]
    wanted = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    assert said == out.text == wanted
    assert out.stopped == bool(ends)


def test_an_unfinished_character_is_dropped_at_the_end(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer()
    out = Text(tokenizer, ())
    pieces = [out.push(token) for token in tokenizer("ab🎉")["input_ids"][:-1]]
    assert "".join([*pieces, out.flush()]) == out.text == "ab"


def test_special_tokens_are_not_said(byte_tokenizer: Make) -> None:
    tokenizer = byte_tokenizer()
    out = Text(tokenizer, ())
    ids = tokenizer("a")["input_ids"]
    assert "".join([out.push(t) for t in (*ids, 256, *ids, 257)] + [out.flush()]) == "aa"


LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 2.8])


def drawn(logits: torch.Tensor = LOGITS, times: int = 300, **options: Any) -> set[int]:
    sampler = Sampler(Options(seed=1, **options))
    return {sampler(logits, ()) for _ in range(times)}


def test_no_temperature_takes_the_likeliest() -> None:
    assert drawn() == drawn(temperature=0) == {1}


def test_temperature_reaches_every_token_and_the_filters_cut_the_tail() -> None:
    assert drawn(temperature=2.0) == {0, 1, 2, 3, 4}
    assert drawn(temperature=2.0, extra={"top_k": 2}) == {1, 2}
    assert drawn(temperature=1.0, top_p=0.6) == {1, 2}
    assert drawn(temperature=1.0, top_p=0.0) == {1}


def test_samples_follow_the_probabilities() -> None:
    sampler = Sampler(Options(seed=3, temperature=1.0))
    counts = torch.bincount(torch.tensor([sampler(LOGITS, ()) for _ in range(6000)]), minlength=5) / 6000
    torch.testing.assert_close(counts, LOGITS.softmax(0), atol=0.02, rtol=0)


def test_the_penalty_counts_the_prompt_and_what_was_said() -> None:
    sampler = Sampler(Options(extra={"repetition_penalty": 1.2}))
    assert [sampler(LOGITS, (1,)) for _ in range(3)] == [2, 4, 1]


@pytest.mark.parametrize(
    "bad", [{"temperature": float("nan")}, {"top_p": -0.1}, {"seed": 1.5}, {"stop": (3,)}, {"temperature": "hot"}]
)
def test_values_that_cannot_be_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(bad))):
        Sampler(Options(**bad))
