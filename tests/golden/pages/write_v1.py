"""Writes the v1-*.page files beside this file: run once for format version 1 and never again for it.

They prove that files of version 1 stay readable. v1-blocks: two layers with different heads and dimensions, two blocks
per head, bf16. v1-padding: float32, and a grid so small that extents need padding. The others: one block of values like
KV states in every codec; ``DECODED`` is the SHA-256 of what the lossy ones decode to, K then V.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agentmem.activation.identity import digest, root
from agentmem.activation.pages import Codec, NewPage, write_page

IDENTITY = digest({"weights": "golden", "version": 1})
SALT = b"golden salt"

#: Name, grid, dtype of the values, and (K, V) shapes per layer.
FILES: tuple[tuple[str, int, Any, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]], ...] = (
    ("v1-blocks.page", 128, np.uint16, (((2, 128, 8), (2, 128, 8)), ((1, 128, 3), (1, 128, 2)))),
    ("v1-padding.page", 7, np.float32, (((2, 7, 3), (2, 7, 2)),)),
)

#: Name, codec, dtype of the values.
CODED: tuple[tuple[str, Codec, Any], ...] = (
    ("v1-lossless.page", "lossless", np.uint16),
    ("v1-lossless-f32.page", "lossless", np.float32),
    ("v1-dense.page", "dense", np.uint16),
    ("v1-int8.page", "int8", np.uint16),
    ("v1-k8v4.page", "k8v4", np.uint16),
    ("v1-int4.page", "int4", np.uint16),
)
DECODED = {
    "v1-int8.page": "25281c8d98718b3f98a175deba623e2480d09ae4ffc57e2e210528991e04e716",
    "v1-k8v4.page": "11e81487fcad833b21ee41298f2cc74323c6ea83796b7af1b4b6c3ddb776fc4b",
    "v1-int4.page": "2b59791cadc40c18e201469677bb1fb163ca5c3180de98a2740f1a291e42d559",
}


def like_states(dtype: Any) -> list[tuple[Any, Any]]:
    """One layer with one head, 64 tokens, K and V of 64 dimensions: channels of different size, one of them shifted."""
    values = ((np.arange(2 * 64 * 64) * 7919) % 2003 - 1001).astype(np.float32).reshape(2, 1, 64, 64) / 512
    values *= np.float32(2.0) ** (np.arange(64) % 7 - 3)
    values[..., 5] += 9
    if dtype == np.uint16:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return [(values[0], values[1])]


def parent(grid: int) -> bytes:
    """The parent key of page 0."""
    return root(IDENTITY, SALT, grid)


def tokens(grid: int) -> list[int]:
    """The page's token ids."""
    return list(range(1000, 1000 + grid))


def states(dtype: Any, shapes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]) -> list[tuple[Any, Any]]:
    """K and V of every layer: counting values, a new start for every array."""
    return [
        (
            (np.arange(np.prod(k)) * 7 + 1).astype(dtype).reshape(k),
            (np.arange(np.prod(v)) * 11 + 2).astype(dtype).reshape(v),
        )
        for k, v in shapes
    ]


if __name__ == "__main__":
    for name, grid, dtype, shapes in FILES:
        path = Path(__file__).with_name(name)
        layers = states(dtype, shapes)
        page = NewPage(identity=IDENTITY, parent=parent(grid), number=0, tokens=tokens(grid), layers=layers)
        write_page(path, page)
    for name, codec, dtype in CODED:
        page = NewPage(
            identity=IDENTITY, parent=parent(64), number=0, tokens=tokens(64), layers=like_states(dtype), codec=codec
        )
        write_page(Path(__file__).with_name(name), page)
