"""Any layout and any bits: a page gives back what it was given, the same from both readers, and no damage passes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem import _pure
from agentmem.activation.identity import chain, root
from agentmem.activation.pages import NewPage, Page, write_page
from agentmem.errors import Corrupt, Incompatible

GRIDS = st.one_of(st.integers(1, 64), st.sampled_from([128, 192, 256]))
SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
DTYPES = st.sampled_from([np.float32, np.float16, np.uint16])


@st.composite
def pages(draw: st.DrawFn) -> tuple[list[tuple[Any, Any]], list[int], int]:
    """Layers, the token ids of one page, and where the page begins in the layers."""
    grid, shapes, dtype = draw(GRIDS), draw(SHAPES), draw(DTYPES)
    before, behind = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    positions, item = before + grid + behind, np.dtype(dtype).itemsize
    layers = [
        tuple(
            np.frombuffer(random.bytes(heads * positions * dim * item), dtype).reshape(heads, positions, dim)
            for dim in dims
        )
        for heads, *dims in shapes
    ]
    return layers, random.integers(0, 1 << 31, grid).tolist(), before  # type: ignore[return-value]


@settings(max_examples=60, deadline=None)
@given(pages(), st.integers(0, (1 << 32) - 1), st.data())
def test_round_trip_and_damage(
    case: tuple[list[tuple[Any, Any]], list[int], int], number: int, data: st.DataObject
) -> None:
    layers, tokens, at = case
    grid = len(tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page"
        parent = root(b"i" * 32, b"s", grid)
        new = NewPage(identity=b"i" * 32, parent=parent, number=number, tokens=tokens, layers=layers, at=at)
        write_page(path, new, durable=False)
        page = Page(path)
        assert page.tokens == tuple(tokens)
        assert [page.key] == chain(b"i" * 32, b"s", tokens, grid)
        readers: list[Callable[..., None]] = [
            page.read_layers,
            lambda *room: _pure.page_read(path.read_bytes(), *room),
        ]
        for reader in readers:
            room = [[np.zeros_like(layer[side]) for layer in layers] for side in (0, 1)]
            reader(*room, at)
            for side in (0, 1):
                for copy, layer in zip(room[side], layers, strict=True):
                    assert copy[:, at : at + grid].tobytes() == layer[side][:, at : at + grid].tobytes()

        content = bytearray(path.read_bytes())
        where = data.draw(st.integers(0, len(content) * 8 - 1), label="bit")
        content[where // 8] ^= 1 << where % 8
        path.write_bytes(content)
        try:
            Page(path).verify()
        except (Corrupt, Incompatible):
            return
        raise AssertionError(f"bit {where} was flipped and nobody noticed")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=4000), st.lists(st.integers(0, 4000), max_size=4))
def test_checksums_of_the_twin_join_at_any_place(content: bytes, cuts: list[int]) -> None:
    crc, start = 0, 0
    for cut in sorted(min(cut, len(content)) for cut in cuts):
        crc = _pure.crc32c(content[start:cut], crc)
        start = cut
    assert _pure.crc32c(content[start:], crc) == _pure.kernels().crc32c(content)
