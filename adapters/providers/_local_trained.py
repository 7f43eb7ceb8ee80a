"""Trained prefixes at work: states that stand for the head of a prompt, put before what follows it.

Knows when a request's head is one that a kept prefix stands for, what its prompt then reads like, and how the states
come into a cache; knows nothing of how they are trained, judged or kept. What follows a trained prefix is computed
behind it and kept in pages under an identity that names it, so no page of the whole head is mixed with one of these.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from agentmem.activation.identity import digest
from agentmem.activation.trained import base_of
from agentmem.errors import AgentMemError
from agentmem.provider import Request

from ._local_device import as_array
from ._local_prompt import Prompt

if TYPE_CHECKING:
    from ._local_generate import Engine

__all__ = ["Standing", "standing"]

log = logging.getLogger("agentmem")


@dataclass(frozen=True)
class Standing:
    """A trained prefix at the head of one request: ``layers`` are its K and V, [KV heads, tokens, dim], as numpy sees
    the model's dtype; ``prompt`` is the request's, with as many tokens 0 as the prefix has positions for its head."""

    digest: str
    tokens: int
    stands_for: int
    layers: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]
    prompt: Prompt

    @property
    def saved(self) -> int:
        """Positions that the prompt is shorter by."""
        return self.stands_for - self.tokens

    def identity(self, identity: bytes) -> bytes:
        """Under what the pages that begin with it are kept."""
        return digest({"states": identity, "trained prefix": self.digest})

    def place(self, cache: Any, at: int, count: int, dtype: torch.dtype, device: torch.device) -> None:
        """Its states ``at .. at + count`` behind what the cache holds, which are its states before them."""
        for layer, sides in zip(cache.layers, self.layers, strict=True):
            parts = [side[:, at : at + count] for side in sides]
            if hasattr(layer, "tail"):  # attended to in place
                for tail, part in zip(layer.tail, parts, strict=True):
                    tail[:, layer.length : layer.length + count] = part
                layer.length += count
            else:
                layer.place(at, *(_tensor(part, dtype).to(device) for part in parts))


def standing(engine: Engine, request: Request, prompt: Prompt) -> Standing | None:
    """The trained prefix that stands for this request's head, its prompt as the template writes it; None where none
    does.

    None too under LoRA versions that act on the head: it was distilled from what the base model reads. Activated ones
    act only where the answer begins.
    """
    if request.prefixes is None or request.pages is None or not all(lora.activated for lora in request.loras):
        return None
    if not engine.states.check():
        return None
    dtype = engine.states.dtype
    base = base_of(engine.loaded.content, str(dtype))
    # Of the head alone, and with a token left to compute: something has to give the first logits.
    found = request.prefixes.find(base, prompt.tokens[: min(prompt.stable, len(prompt.tokens) - 1)])
    if found is None:
        return None
    try:
        layers = _read(found.pages, found.tokens, engine.states.shapes, as_array(torch.empty(0, dtype=dtype)).dtype)
    except AgentMemError as error:
        log.warning("a trained prefix can't be read, the whole head is: %s", error)
        return None
    cut = found.stands_for - found.tokens
    starts = [(0, found.records)] if found.records else []
    starts += [(max(0, start - cut), records) for start, records in prompt.starts]
    shorter = Prompt(
        tokens=[0] * found.tokens + prompt.tokens[found.stands_for :],
        stable=prompt.stable - cut,
        starts=tuple(starts),
    )
    return Standing(found.digest, found.tokens, found.stands_for, layers, shorter)


def _read(
    pages: Sequence[Any], tokens: int, shapes: Sequence[tuple[int, int, int]], kind: np.dtype[Any]
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """The states of these pages. Raises `Corrupt` for a damaged one."""
    layers = [
        (np.empty((heads, tokens, key), kind), np.empty((heads, tokens, value), kind)) for heads, key, value in shapes
    ]
    at = 0
    for page in pages:
        page.read_layers([key for key, _ in layers], [value for _, value in layers], at)
        at += len(page.tokens)
    return layers


def _tensor(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    whole = np.ascontiguousarray(array)
    tensor = torch.from_numpy(whole.view("int16") if dtype == torch.bfloat16 else whole)
    return tensor.view(dtype)
