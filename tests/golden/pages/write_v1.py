"""Writes the v1-*.page files beside this file: run once for format version 1 and never again for it.

They prove that files of version 1 stay readable. v1-blocks: two layers with different heads and dimensions, two blocks
per head, bf16. v1-padding: float32, and a grid so small that extents need padding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from agentmem.activation.identity import digest, root
from agentmem.activation.pages import NewPage, write_page

IDENTITY = digest({"weights": "golden", "version": 1})
SALT = b"golden salt"

#: Name, grid, dtype of the values, and (K, V) shapes per layer.
FILES: tuple[tuple[str, int, Any, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]], ...] = (
    ("v1-blocks.page", 128, np.uint16, (((2, 128, 8), (2, 128, 8)), ((1, 128, 3), (1, 128, 2)))),
    ("v1-padding.page", 7, np.float32, (((2, 7, 3), (2, 7, 2)),)),
)


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
