"""Lossless codecs of page extents in numpy: exponents in 4 bits, and the parts and halves both codecs are made of.

The twin of native/lossless.c: the same bytes from the same values, the same encodings refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import dense

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    Array = npt.NDArray[Any]
    Bytes = npt.NDArray[np.uint8]

__all__ = ["decode", "encode", "size"]

LOSSLESS, DENSE = 1, 2
F32, BF16 = 1, 3
#: Codes 0 to 13 are steps below the top.
_ZERO, _ESCAPE, _LOWEST_TOP = 14, 15, 14


def _most_escapes(count: int) -> int:
    return count // 16


def _fixed(keys: int, values: int) -> int:
    return keys + values + (keys + 1) // 2 + (values + 1) // 2 + 2


def _best_top(exponents: Array) -> int:
    """The top of the 14 exponents that hold most values, the lowest of equals; exponent 0 has a code of its own."""
    import numpy as np

    totals = np.concatenate([[0], np.cumsum(np.bincount(exponents, minlength=256))])
    held = totals[_LOWEST_TOP + 1 :] - totals[1:-_ZERO]
    return int(np.argmax(held)) + _LOWEST_TOP


def _top(exponents: Array) -> int | None:
    """The exponent of code 0; None where every choice escapes too many values."""
    for top in (max(int(exponents.max()), _LOWEST_TOP), _best_top(exponents)):
        if _escaped(exponents, top).sum() <= _most_escapes(len(exponents)):
            return top
    return None


def _escaped(exponents: Array, top: int) -> Array:
    escaped: Array = (exponents != 0) & ((exponents > top) | (exponents <= top - _ZERO))
    return escaped


def _escape_order(escaped: Array) -> Array:
    """Places of the escaped values in the order of the code bytes, low half of a byte first."""
    import numpy as np

    half = (len(escaped) + 1) // 2
    places = np.flatnonzero(escaped)
    return places[np.argsort(2 * (places % half) + places // half, kind="stable")]


def _fast_encode(parts: tuple[Array, Array]) -> bytes | None:
    import numpy as np

    rests, codes, tops, escapes = b"", b"", b"", b""
    for part in parts:
        exponents = (part >> 7 & 255).astype(np.int64)
        top = _top(exponents)
        if top is None:
            return None
        escaped = _escaped(exponents, top)
        nibbles = np.zeros(len(part) + len(part) % 2, np.uint8)
        nibbles[: len(part)] = np.where(escaped, _ESCAPE, np.where(exponents, top - exponents, _ZERO))
        first, second = nibbles.reshape(2, -1)
        rests += (part >> 8 & 0x80 | part & 0x7F).astype(np.uint8).tobytes()
        codes += (first | second << 4).tobytes()
        tops += bytes([top])
        escapes += exponents[_escape_order(escaped)].astype(np.uint8).tobytes()
    return rests + codes + tops + escapes


def _fast_decode(data: Bytes, counts: tuple[int, int]) -> tuple[Array, Array]:
    import numpy as np

    fixed = _fixed(*counts)
    if len(data) < fixed:
        raise ValueError(f"{len(data)} bytes are too few for this block")
    rests, codes = data[: sum(counts)], data[sum(counts) : fixed - 2]
    escapes, parts = data[fixed:], []
    for count, top in zip(counts, data[fixed - 2 : fixed].tolist(), strict=True):
        half = (count + 1) // 2
        nibbles = np.concatenate([codes[:half] & 15, codes[:half] >> 4]).astype(np.int64)
        escaped = nibbles[:count] == _ESCAPE
        places = _escape_order(escaped)
        if top < _LOWEST_TOP or nibbles[count:].any() or len(places) > len(escapes):
            raise ValueError("no exponents of such a block")
        exponents = np.where(nibbles[:count] == _ZERO, 0, top - nibbles[:count])
        exponents[places] = escapes[: len(places)]
        if not np.array_equal(_escaped(exponents, top), escaped) or _top(exponents) != top:
            raise ValueError("not the exponents that an encoder writes")
        rest = rests[:count].astype(np.uint16)
        parts.append((rest & 0x80) << 8 | exponents.astype(np.uint16) << 7 | rest & 0x7F)
        rests, codes, escapes = rests[count:], codes[half:], escapes[len(places) :]
    if len(escapes):
        raise ValueError(f"{len(escapes)} bytes too many")
    return parts[0], parts[1]


def size(codec: int, dtype: int, rows: int, key_dim: int, value_dim: int) -> int:
    """The most bytes an encoding of such a block takes."""
    keys, values = rows * key_dim, rows * value_dim
    halves = 2 * (keys + values) if dtype == F32 else 0
    if codec == DENSE:
        return halves + dense.size(keys, values)
    return halves + _fixed(keys, values) + _most_escapes(keys) + _most_escapes(values)


def encode(codec: int, dtype: int, key: Array, value: Array) -> bytes | None:
    """The encoding of K ``[rows, key_dim]`` and V ``[rows, value_dim]``, in two or four bytes a value; None where it is
    not shorter than these."""
    import numpy as np

    lows, highs = b"", []
    for part in (key, value):
        words: Array = np.ascontiguousarray(part).view(np.uint32 if dtype == F32 else np.uint16)
        if dtype == F32:
            lows += words.astype(np.uint16).tobytes()
            words = (words >> 16).astype(np.uint16)
        highs.append(words)
    if codec == DENSE:
        encoded = dense.encode((highs[0], highs[1]))
    else:
        encoded = _fast_encode((highs[0].ravel(), highs[1].ravel()))
    if encoded is None or len(lows) + len(encoded) >= key.nbytes + value.nbytes:
        return None
    return lows + encoded


def decode(codec: int, dtype: int, data: Buffer, key: Array, value: Array) -> None:
    """Decodes into ``key`` and ``value``; ValueError unless ``data`` is what ``encode`` gives for them, in all that an
    encoding without a checksum can tell."""
    import numpy as np

    array = np.frombuffer(memoryview(data), np.uint8)
    halves = 2 * (key.size + value.size) if dtype == F32 else 0
    if not halves <= len(array) < key.nbytes + value.nbytes:
        raise ValueError(f"{len(array)} bytes are no encoding of a block of {key.nbytes + value.nbytes}")
    if codec == DENSE:
        parts = dense.decode(array[halves:], key.shape[0], (key.shape[1], value.shape[1]))
    else:
        parts = _fast_decode(array[halves:], (key.size, value.size))
    lows = array[:halves].view(np.uint16)
    for part, into in zip(parts, (key, value), strict=True):
        words = part
        if dtype == F32:
            words = part.astype(np.uint32) << 16 | lows[: part.size]
            lows = lows[part.size :]
        into[...] = words.reshape(into.shape).view(into.dtype)
