"""Compressed token vectors: their bytes, and the best match of each query token among those of a passage.

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
    "maxsim",
    "tokens_pack",
    "tokens_shape",
    "tokens_unpack",
]

HEADER = struct.Struct("<BBHI")
VERSION = 1
MOST_DIMENSIONS = 4096
MOST_TOKENS = 65_536
MOST_QUERIES = 256
#: A scale is a whole number of these: no bytes are a NaN, and the largest number of a unit vector fits.
UNIT = 2.0**-18


def tokens_pack(rows: Any, counts: Any) -> list[bytes]:
    """The codes of passages whose token vectors, ``counts[i]`` each, are the rows of float [tokens, dimensions].

    Numbers beyond 1.87 in magnitude are cut. ValueError for NaN, infinities and shapes beyond the format's.
    """
    import numpy as np

    matrix = np.ascontiguousarray(rows, np.float32)
    if matrix.ndim != 2 or not 1 <= matrix.shape[1] <= MOST_DIMENSIONS or sum(counts) != len(matrix):
        raise ValueError(f"token vectors are [tokens, 1..{MOST_DIMENSIONS}], not the shape {matrix.shape}")
    if len(counts) and not 0 <= min(counts) <= max(counts) <= MOST_TOKENS:
        raise ValueError(f"a passage has at most {MOST_TOKENS} tokens, not {max(counts)}")
    count, dimensions = matrix.shape
    largest = np.abs(matrix).max(axis=1) if count else np.zeros(0, np.float32)
    if not np.isfinite(largest).all():
        raise ValueError("a token vector has a NaN or an infinity")
    scales = np.clip(np.rint(largest * np.float32(1 / 7 / UNIT)), 0, 65_535).astype("<u2")
    inverse = np.where(scales > 0, np.float32(1 / UNIT) / np.maximum(scales, 1).astype(np.float32), np.float32(0))
    half = _half(dimensions)
    codes = np.full((count, 2 * half), 8, np.uint8)
    codes[:, :dimensions] = np.clip(np.rint(matrix * inverse[:, None]), -8, 7).astype(np.int8) + 8
    pairs = codes[:, :half] | codes[:, half:] << 4
    packed, at = [], 0
    for some in counts:
        to = at + int(some)
        packed.append(HEADER.pack(VERSION, 0, dimensions, some) + scales[at:to].tobytes() + pairs[at:to].tobytes())
        at = to
    return packed


def _half(dimensions: int) -> int:
    return -(-dimensions // 64) * 32


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
    size = HEADER.size + count * (2 + _half(dimensions))
    if size > length - start:
        raise ValueError(f"the codes at {start} need {size} bytes, there are {length - start}")
    return count, dimensions, size


def tokens_unpack(data: Any, start: int = 0) -> npt.NDArray[np.float32]:
    """Float32 [tokens, dimensions]: what the codes at ``start`` stand for."""
    import numpy as np

    codes, scales, dimensions = _codes(np.frombuffer(data, np.uint8), start)
    return codes[:, :dimensions] * (scales * np.float32(UNIT))[:, None]


def _codes(data: npt.NDArray[np.uint8], start: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], int]:
    """Codes -8 to 7 [tokens, dimensions up to a multiple of 64], scales in units, and the dimensions."""
    import numpy as np

    count, dimensions, size = tokens_shape(data, start)
    first = start + HEADER.size
    scales = np.frombuffer(data[first : first + 2 * count].tobytes(), "<u2").astype(np.float32)
    pairs = data[first + 2 * count : start + size].reshape(count, _half(dimensions))
    return np.concatenate([pairs & 15, pairs >> 4], axis=1).astype(np.float32) - 8, scales, dimensions


def maxsim(query: Any, data: Any, starts: Any, out: Any, /) -> None:
    """Into ``out``, float32 [len(starts), queries]: the best product of each query token with a token of each passage.

    ``query`` is float32 [1..256, dimensions], ``data`` holds passages as `tokens_pack` made them, each beginning at one
    of ``starts`` (int64). Query tokens are rounded to 8 bits; products are whole numbers, so that the result has the
    same bits on every machine. A passage of no tokens scores 0. ValueError for NaN, infinities, bytes that are no
    passage and other dimensions; then ``out`` may hold anything.
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
        or target.shape
        != (
            len(places),
            len(tokens),
        )
    ):
        raise ValueError("starts are int64 [passages], the result is float32 [passages, queries]")
    if not np.isfinite(tokens).all():
        raise ValueError("a query token has a NaN or an infinity")
    largest = np.abs(tokens).max(axis=1)
    inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, np.float32(1e-30)), np.float32(0))
    unit = largest * np.float32(UNIT / 127)
    # Whole numbers, of which no sum of products leaves the 24 bits that float32 holds: exact in any order.
    whole = np.zeros((len(tokens), 2 * _half(tokens.shape[1])), np.float32)
    whole[:, : tokens.shape[1]] = np.clip(np.rint(tokens * inverse[:, None]), -127, 127)
    for row, start in enumerate(places.tolist()):
        codes, scales, dimensions = _codes(held, start)
        if dimensions != tokens.shape[1]:
            raise ValueError(f"the codes at {start} have {dimensions} dimensions, the query {tokens.shape[1]}")
        best = ((codes @ whole.T) * scales[:, None]).max(axis=0) if len(codes) else np.zeros(len(tokens), np.float32)
        target[row] = best * unit + np.float32(0)  # + 0: there is one zero
