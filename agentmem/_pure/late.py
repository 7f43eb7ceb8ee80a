"""Token vectors in 2 bits a number, and the best match of each query token among those of a passage.

The twin of native/maxsim.c (native/README.md draws the bytes). Knows no texts: what a token stands for is the caller's.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "HEADER",
    "MOST_DIMENSIONS",
    "MOST_QUERIES",
    "MOST_TOKENS",
    "VERSION",
    "maxsim",
    "row_bytes",
    "tokens_encode",
    "tokens_shape",
]

HEADER = struct.Struct("<BBHI")
VERSION = 1
MOST_DIMENSIONS = 4096
MOST_TOKENS = 65_536
MOST_QUERIES = 256
#: A scale is a whole number of these: no bytes are a NaN.
UNIT = 2.0**-18
BLOCK = 64


def row_bytes(dimensions: int) -> int:
    """Bytes of a token's codes."""
    return -(-dimensions // BLOCK) * BLOCK // 4


def rotated(rows: Any) -> npt.NDArray[np.float32]:
    """Float32 [n, dimensions up to a multiple of 64]: the rows, turned so that each number has a part of each old one.

    Two rounds of signs and Hadamard transforms of 64, the second across the blocks of the first. Sums of two, always
    in the same order: the same bits on every machine.
    """
    import numpy as np

    count, dimensions = rows.shape
    width = row_bytes(dimensions) * 4
    made = np.zeros((count, width), np.float32)
    made[:, :dimensions] = np.clip(rows, -1e30, 1e30)
    number = np.arange(2 * width, dtype=np.uint32) + np.uint32(1)
    number *= np.uint32(0x9E3779B1)
    number ^= number >> np.uint32(15)
    number *= np.uint32(0x85EBCA77)
    number ^= number >> np.uint32(13)
    signs = np.where(number & np.uint32(1), np.float32(-1), np.float32(1))
    made = _hadamard(made * signs[:width])
    made = made.reshape(count, width // BLOCK, BLOCK).transpose(0, 2, 1).reshape(count, width)
    return _hadamard(made * signs[width:]) * np.float32(1 / BLOCK)


def _hadamard(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    step = 1
    while step < BLOCK:
        pairs = rows.reshape(len(rows), rows.shape[1] // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = np.stack([first + second, first - second], axis=2).reshape(rows.shape)
        step *= 2
    return rows


def tokens_encode(rows: Any, scales: Any, codes: Any, /) -> None:
    """Of float32 rows [tokens, dimensions], of lengths up to about 1, the ``scales`` (uint16 [tokens]) and ``codes``.

    Codes are uint8 [tokens, bytes of a row]. A rotated number becomes the nearest of -3, -1, 1 and 3 times half of the
    best step for normal numbers; the scale makes a vector's product with its own codes right, so that products with
    others have no bias (Gao and Long 2024, RaBitQ). ValueError for NaN, infinities and other shapes.
    """
    import numpy as np

    given, scale, out = np.asarray(rows), np.asarray(scales), np.asarray(codes)
    if given.dtype != np.float32 or given.ndim != 2 or not 1 <= given.shape[1] <= MOST_DIMENSIONS:
        raise ValueError(f"token vectors are float32 [tokens, 1..{MOST_DIMENSIONS}]")
    if (
        scale.dtype != np.uint16
        or scale.shape != (len(given),)
        or out.dtype != np.uint8
        or out.shape != (len(given), row_bytes(given.shape[1]))
    ):
        raise ValueError("scales are uint16 [tokens], codes uint8 [tokens, bytes of a row]")
    if not np.isfinite(given).all():
        raise ValueError("a token vector has a NaN or an infinity")
    quarter = out.shape[1]
    for first in range(0, len(given), 256):
        some = slice(first, first + 256)
        whole = np.rint(np.clip(rotated(given[some]), -4, 4) * np.float32(65_536)).astype(np.int64)
        power = (whole * whole).sum(axis=1)
        # The step is 0.9956 times the root mean square (1015 / 1024 is its square).
        outer = whole * whole * (1024 * 4 * quarter) > 1015 * power[:, None]
        product = (np.abs(whole) * np.where(outer, 3, 1)).sum(axis=1)
        scale[some] = np.minimum((8 * power + product) // np.maximum(2 * product, 1), 65_535)
        code = np.where(whole < 0, 1 - outer, 2 + outer).astype(np.uint8)
        parts = [code[:, part * quarter : (part + 1) * quarter] << (2 * part) for part in range(4)]
        out[some] = parts[0] | parts[1] | parts[2] | parts[3]


def tokens_shape(data: Any, start: int = 0) -> tuple[int, int, int]:
    """(tokens, dimensions, bytes) of the passage at ``start``; ValueError for bytes that are none."""
    length = len(data)
    if not 0 <= start <= length - HEADER.size:
        raise ValueError(f"no passage's codes at {start}: there are {length} bytes")
    version, zero, dimensions, count = HEADER.unpack_from(data, start)
    if version != VERSION or zero:
        raise ValueError(f"the codes at {start} have version {version}.{zero}, known is {VERSION}.0")
    if not 1 <= dimensions <= MOST_DIMENSIONS or count > MOST_TOKENS:
        raise ValueError(f"the codes at {start} claim {count} tokens of {dimensions} dimensions")
    size = HEADER.size + count * (2 + row_bytes(dimensions))
    if size > length - start:
        raise ValueError(f"the codes at {start} need {size} bytes, there are {length - start}")
    return count, dimensions, size


def _codes(data: npt.NDArray[np.uint8], start: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """Codes -3, -1, 1 or 3 [tokens, dimensions up to a multiple of 64], scales in units, and the dimensions."""
    import numpy as np

    count, dimensions, size = tokens_shape(data, start)
    first = start + HEADER.size
    scales = np.frombuffer(data[first : first + 2 * count].tobytes(), "<u2").astype(np.float32)
    packed = data[first + 2 * count : start + size].reshape(count, row_bytes(dimensions))
    codes = np.concatenate([packed >> (2 * part) & 3 for part in range(4)], axis=1)
    return codes.astype(np.float32) * 2 - 3, scales, dimensions


def maxsim(query: Any, data: Any, starts: Any, out: Any, /) -> None:
    """Into ``out``, float32 [len(starts), queries]: the best product of each query token with a token of each passage.

    ``query`` is float32 [1..256, dimensions], ``data`` holds passages (README.md), each beginning at one of ``starts``
    (int64). Query tokens are rotated as the passages' were and rounded to 8 bits; products are whole numbers, so that
    the result has the same bits on every machine. A passage of no tokens scores 0. ValueError for NaN, infinities,
    bytes that are no passage and other dimensions; then ``out`` may hold anything.
    """
    import numpy as np

    tokens, held = np.asarray(query), np.frombuffer(data, np.uint8)
    places, target = np.asarray(starts), np.asarray(out)
    if (
        tokens.dtype != np.float32
        or tokens.ndim != 2
        or not 1 <= len(tokens) <= MOST_QUERIES
        or not 1 <= tokens.shape[1] <= MOST_DIMENSIONS
    ):
        raise ValueError(f"a query is float32 [1..{MOST_QUERIES}, 1..{MOST_DIMENSIONS}]")
    if (
        places.dtype != np.int64
        or places.ndim != 1
        or target.dtype != np.float32
        or target.shape != (len(places), len(tokens))
    ):
        raise ValueError("starts are int64 [passages], the result is float32 [passages, queries]")
    if not np.isfinite(tokens).all():
        raise ValueError("a query token has a NaN or an infinity")
    turned = rotated(tokens)
    largest = np.abs(turned).max(axis=1)
    inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, np.float32(1e-30)), np.float32(0))
    unit = largest * np.float32(UNIT / 127)
    # Whole numbers, of which no sum of products leaves the 24 bits that float32 holds: exact in any order.
    whole = np.clip(np.rint(turned * inverse[:, None]), -127, 127)
    for row, start in enumerate(places.tolist()):
        codes, scales, dimensions = _codes(held, start)
        if dimensions != tokens.shape[1]:
            raise ValueError(f"the codes at {start} have {dimensions} dimensions, the query {tokens.shape[1]}")
        best = ((codes @ whole.T) * scales[:, None]).max(axis=0) if len(codes) else np.zeros(len(tokens), np.float32)
        target[row] = best * unit + np.float32(0)  # + 0: there is one zero
