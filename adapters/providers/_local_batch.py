"""Many requests answered in one batch on the local model: rows of unlike length, each with LoRA versions of its own.

Knows padding, rows and when a row is done; what a request becomes in tokens and how a token is chosen is in the modules
beside it. Prompts are computed whole: a batch neither reads nor writes KV pages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import ProviderError, Unavailable
from agentmem.provider import Generation, LoraRef, Request
from agentmem.types import Usage

from ._local_loras import calls
from ._local_text import Sampler, Text

if TYPE_CHECKING:
    from ._local_generate import Engine

__all__ = ["answered"]

#: Rows of a batch, and tokens of their padded prompts, at most.
ROWS, TOKENS = 16, 16_384


@dataclass
class _Row:
    """One request on its way."""

    place: int
    tokens: list[int]
    budget: int
    loras: tuple[LoraRef, ...]
    calls: dict[tuple[int, ...], int]
    sampler: Sampler
    text: Text
    count: int = 0
    finish: str | None = None
    first_s: float | None = None


def answered(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """The answers in the order of the requests; each is what the request alone gets, up to rounding."""
    rows = [_row(engine, place, request) for place, request in enumerate(requests)]
    found: dict[int, Generation] = {}
    for part in _parts(sorted(rows, key=lambda row: len(row.tokens))):
        found.update(_Batch(engine, part).run())
    return [found[place] for place in range(len(rows))]


def _row(engine: Engine, place: int, request: Request) -> _Row:
    options = request.options
    prompt = engine.template.prompt(request.segments, options.extra.get("chat_template_kwargs"))
    loras = engine.loras.present(request.loras)
    return _Row(
        place=place,
        tokens=prompt.tokens,
        budget=engine.budget(len(prompt.tokens), options.max_tokens),
        loras=loras,
        calls=calls(loras, prompt.tokens),
        sampler=Sampler(options),
        text=Text(engine.loaded.tokenizer, (*options.stop, *engine.template.stops)),
    )


def _parts(rows: Sequence[_Row]) -> Iterator[list[_Row]]:
    """Batches of prompts of like length, so that little is padded."""
    part: list[_Row] = []
    for row in rows:
        if part and (len(part) == ROWS or (len(part) + 1) * len(row.tokens) > TOKENS):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


class _Batch:
    """The rows of one batch, padded on the left, and their common KV cache."""

    def __init__(self, engine: Engine, rows: list[_Row]) -> None:
        self._engine = engine
        self._rows = rows
        self._longest = max(len(row.tokens) for row in rows)
        self._pads = [self._longest - len(row.tokens) for row in rows]
        self._pad = min(engine.ends, default=0)
        self._cache: Any = engine.states.empty(self._longest + min(max(row.budget for row in rows), 512))
        self._started = time.perf_counter()

    def run(self) -> dict[int, Generation]:
        """The answers by the places of their requests."""
        ids = [[self._pad] * pad + row.tokens for pad, row in zip(self._pads, self._rows, strict=True)]
        first = 0
        while True:
            logits = self._pass(ids, first)
            first += len(ids[0])
            ids = [[self._taken(row, scores)] for row, scores in zip(self._rows, logits, strict=True)]
            if all(row.finish is not None for row in self._rows):
                return {row.place: self._generation(row) for row in self._rows}

    def _pass(self, ids: list[list[int]], first: int) -> torch.Tensor:
        """Logits of every row's last token, float32 [rows, vocabulary]; ``first`` positions are in the cache."""
        engine, size = self._engine, len(ids[0])
        device = engine.loaded.device
        pads = torch.tensor(self._pads, device=device)[:, None]
        places = torch.arange(first + size, device=device)[None]
        starts: dict[tuple[int, ...], list[int]] = {}
        for invocation in {key for row in self._rows for key in row.calls}:
            begins = [
                min(max(pad + row.calls.get(invocation, size + first) - first, 0), size)
                for pad, row in zip(self._pads, self._rows, strict=True)
            ]
            starts[invocation] = begins
        with engine.turn(None), engine.loras.rows([row.loras for row in self._rows], starts), torch.inference_mode():
            try:
                output = engine.loaded.model(
                    input_ids=torch.tensor(ids, device=device),
                    attention_mask=(places >= pads).long(),
                    position_ids=(places[:, first:] - pads).clamp(min=0),
                    past_key_values=self._cache,
                    use_cache=True,
                    return_dict=True,
                    **dict.fromkeys(engine.options, 1),
                )
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise Unavailable(f"{engine.name} ran out of memory on a batch of {len(ids)} requests") from error
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[:, -1].float().cpu()
        if bool(torch.isnan(logits).any()):
            raise ProviderError(
                f"{engine.name} computed no valid numbers in {engine.loaded.dtype}: set dtype = float32"
            )
        return logits

    def _taken(self, row: _Row, logits: torch.Tensor) -> int:
        """The row's next token; a row that is done reads on for nothing until all are."""
        if row.finish is not None:
            return self._pad
        if row.count >= row.budget:
            row.finish = "length"
            return self._pad
        token = row.sampler(logits, row.tokens)
        if row.first_s is None:
            row.first_s = time.perf_counter() - self._started
        if token in self._engine.ends:
            row.finish = "stop"
            return token
        row.count += 1
        row.text.push(token)
        if row.text.stopped or row.count >= row.budget:
            row.finish = "stop" if row.text.stopped else "length"
        return token

    def _generation(self, row: _Row) -> Generation:
        row.text.flush()
        usage = Usage(
            input_tokens=len(row.tokens),
            output_tokens=row.count,
            first_token_s=row.first_s,
            total_s=(time.perf_counter() - self._started) / len(self._rows),
        )
        return Generation(text=row.text.text, usage=usage, finish_reason=row.finish)
