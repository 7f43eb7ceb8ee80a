"""From logits to text: the next token by sampling, and tokens as text, piece by piece.

Knows sampling options, whole characters and stop strings; knows nothing of models, prompts or KV states.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from agentmem.errors import InvalidInput
from agentmem.provider import Options

__all__ = ["Sampler", "Text"]

log = logging.getLogger("agentmem")


class Sampler:
    """Picks the next token: the likeliest at temperature None or 0, else by nucleus sampling (Holtzman et al. 2020).

    ``extra`` may hold ``top_k`` and ``repetition_penalty`` (Keskar et al. 2019); others are ignored and logged. Equal
    seeds give equal tokens. Raises `InvalidInput` for values that can't be.
    """

    def __init__(self, options: Options) -> None:
        unknown = sorted(set(options.extra) - {"top_k", "repetition_penalty", "chat_template_kwargs"})
        if unknown:
            log.warning("a local model takes no option %s: it is ignored", ", ".join(unknown))
        self._temperature = _number("temperature", options.temperature, 0.0, low=0.0, high=100.0)
        self._top_p = _number("top_p", options.top_p, 1.0, low=0.0, high=1.0)
        self._top_k = int(_number("top_k", options.extra.get("top_k"), 0, low=0, high=1 << 31))
        self._penalty = _number(
            "repetition_penalty", options.extra.get("repetition_penalty"), 1.0, low=0.01, high=100.0
        )
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            seed = options.seed
            if isinstance(seed, bool) or not isinstance(seed, int):
                raise InvalidInput(f"seed is {seed!r}; give a whole number")
            self._generator.manual_seed(seed % (1 << 63))
        if not isinstance(options.extra.get("chat_template_kwargs", {}), Mapping):
            raise InvalidInput("chat_template_kwargs must be a mapping")
        if any(not isinstance(text, str) for text in options.stop):
            raise InvalidInput(f"stop is {options.stop!r}; give texts")
        self._seen: set[int] = set()

    def __call__(self, logits: torch.Tensor, prompt: Sequence[int]) -> int:
        """The next token. ``logits`` [vocabulary] is float32 on the CPU."""
        if self._penalty != 1.0:
            self._seen |= set(prompt) if not self._seen else set()
            seen = torch.tensor(sorted(self._seen))
            before = logits[seen]
            logits = logits.clone()
            logits[seen] = torch.where(before > 0, before / self._penalty, before * self._penalty)
        token = int(logits.argmax()) if self._temperature == 0 else self._drawn(logits)
        self._seen.add(token)
        return token

    def _drawn(self, logits: torch.Tensor) -> int:
        values, order = (logits / self._temperature).sort(descending=True, stable=True)
        if self._top_k:
            values = values[: self._top_k]
        chances = values.softmax(-1)
        # Kept are the likeliest tokens whose predecessors together have less than top_p, so at least one.
        kept = chances.cumsum(-1) - chances < max(self._top_p, 1e-9)
        chances = chances * kept
        return int(order[torch.multinomial(chances, 1, generator=self._generator)])


def _number(name: str, value: Any, default: float, *, low: float, high: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidInput(f"{name} is {value!r}; give a number from {low:g} to {high:g}")
    return float(value)


class Text:
    """Tokens as text, piece by piece: whole characters, no special tokens, nothing from a stop string on."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._start = 0  # decoding begins here, a few tokens back: a token's text can depend on the one before it
        self._read = 0  # tokens whose text was taken
        self._held = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now; often one word, empty inside a character or a possible stop string."""
        self._tokens.append(token)
        before = self._decoded(self._start, self._read)
        now = self._decoded(self._start, len(self._tokens))
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._checked(now[len(before) :])

    def flush(self) -> str:
        """What was held back, at the end of the answer. Bytes of an unfinished character are dropped."""
        if self.stopped:
            return ""
        before = self._decoded(self._start, self._read)
        rest = self._decoded(self._start, len(self._tokens))[len(before) :].rstrip("\N{REPLACEMENT CHARACTER}")
        piece = self._checked(rest)
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _decoded(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._tokens[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _checked(self, piece: str) -> str:
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)]
        else:
            keep = max((_overlap(text, stop) for stop in self._stops), default=0)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
