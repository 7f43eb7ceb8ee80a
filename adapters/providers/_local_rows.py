"""Whether what a model computes for one token depends on how many others are computed with it, bit for bit.

Knows linear layers and the order in which libraries add up; knows nothing of caches, pages or prompts. Libraries choose
a kernel by the number of rows, and each kernel has an order of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

__all__ = ["all_rows", "least_rows"]

#: Numbers of rows that are computed at once: around what kernels are cut by, up to a whole step of the grid.
_COUNTS = (2, 3, 4, 5, 6, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 129, 192, 255)
_ROWS = 256
#: A least number beyond this one is none: nearly every turn would have to be computed from the page on.
_MOST = 8


def least_rows(model: Any) -> int | None:
    """The least number of rows from which on each row that a linear layer of this model computes is the same, whatever
    rows come with it. At least 2, since a single one has a kernel of its own; None where even many rows differ, or
    where the model has weights in other layers than linear ones and embeddings.

    Tried per shape with numbers that cancel: every product comes twice, with both signs, at random places. The exact
    sum is 0, and what is left of it is rounding alone, which tells one order of adding from another (as in Xie et al.,
    Revealing Floating-Point Accumulation Orders, USENIX ATC 2025).
    """
    least = 2
    head = model.get_output_embeddings()
    seen: set[tuple[object, ...]] = set()
    for layer in model.modules():
        matrices = [weight for weight in layer.parameters(recurse=False) if weight.dim() > 1]
        if not matrices or layer is head or isinstance(layer, torch.nn.Embedding):
            continue
        if not _plain(layer):
            return None
        outputs, inputs = matrices[0].shape
        shape = (outputs, inputs, matrices[0].dtype, layer.bias is not None)
        if shape not in seen:
            seen.add(shape)
            found = _least(outputs, inputs, matrices[0].dtype, biased=layer.bias is not None)
            if found is None:
                return None
            least = max(least, found)
    return least


def _plain(layer: torch.nn.Module) -> bool:
    """A linear layer itself: a subclass (of a quantised model) computes in a way of its own."""
    return type(layer) is torch.nn.Linear


def _least(outputs: int, inputs: int, dtype: torch.dtype, *, biased: bool) -> int | None:
    generator = torch.Generator().manual_seed(0)
    half = inputs // 2
    places = torch.randperm(inputs, generator=generator)
    some = torch.randn(outputs, half, generator=generator)
    others = torch.randn(_ROWS, half, generator=generator)
    rest = inputs - 2 * half  # an odd one out
    weight = torch.cat([some, -some, torch.zeros(outputs, rest)], 1)[:, places].to(dtype)
    rows = torch.cat([others, others, torch.zeros(_ROWS, rest)], 1)[:, places].to(dtype)
    bias = torch.zeros(outputs, dtype=dtype) if biased else None
    with torch.inference_mode():
        whole = torch.nn.functional.linear(rows, weight, bias)
        for count in reversed(_COUNTS):
            first = (_ROWS - count) // 2
            piece = torch.nn.functional.linear(rows[first : first + count], weight, bias)
            if not torch.equal(piece, whole[first : first + count]):
                return next((other for other in _COUNTS if count < other <= _MOST), None)
    return _COUNTS[0]


@contextlib.contextmanager
def all_rows(model: Any, count: int) -> Generator[Callable[[], bool]]:
    """Inside, passes of ``count`` tokens are watched; what is given says whether every linear layer but the head
    computed all of them, and at once (an expert doesn't)."""
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    met: list[tuple[torch.nn.Module, int]] = []

    def noting(layer: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        met.append((layer, given[0].numel() // given[0].shape[-1] if given else 0))

    hooks = [layer.register_forward_pre_hook(noting) for layer in layers]
    try:
        yield lambda: {layer for layer, _ in met} == set(layers) and all(rows == count for _, rows in met)
    finally:
        for hook in hooks:
            hook.remove()
