"""The dense lossless codec in numpy: signs and exponents by 32 interleaved rANS coders, mantissas in 7 bits.

The twin of native/dense.c, which names the papers. Works on values of 16 bits: bf16, or the high halves of float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["decode", "encode", "size"]

_LANES, _SLOTS, _LEAST, _ESCAPE = 32, 1024, 1 << 15, 15
#: Instead of how far a channel's base is below the top: the channel has exponent 0 alone.
_NULL_CHANNEL, _LOWEST_TOP = 15, 29

#: Of symbol 2 * drop + sign, per class: see native/dense.c.
# fmt: off
_FREQUENCIES = (
    (585, 1, 355, 1, 45, 1, 10, 1, 2, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (127, 79, 202, 143, 127, 97, 65, 54, 33, 28, 16, 14, 8, 7, 4, 3,
     2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (195, 6, 338, 33, 176, 48, 73, 38, 32, 23, 15, 12, 7, 6, 3, 3,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (137, 1, 630, 1, 177, 2, 35, 3, 10, 3, 3, 2, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (37, 28, 162, 127, 164, 130, 100, 79, 52, 42, 27, 22, 13, 11, 6, 5,
     3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (51, 5, 216, 47, 210, 91, 117, 75, 56, 46, 27, 24, 13, 12, 6, 6,
     3, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (44, 1, 324, 6, 324, 21, 129, 29, 49, 22, 20, 14, 9, 7, 4, 4,
     2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    (17, 11, 85, 54, 170, 109, 145, 102, 88, 66, 46, 37, 24, 19, 12, 10,
     6, 5, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
)
# fmt: on


def _price(frequency: int) -> int:
    """Of a symbol, in 1/64 bit, by integers alone: 640 - floor(64 * log2(frequency))."""
    result = frequency.bit_length() - 1
    mantissa = frequency << (31 - result)
    for _ in range(6):
        mantissa = mantissa * mantissa >> 31
        carry = mantissa >> 32
        result, mantissa = 2 * result + carry, mantissa >> carry
    return 640 - result


@functools.cache
def _tables() -> tuple[Array, Array, Array, Array]:
    """Per class and symbol: frequency, first slot, price; per class and slot: symbol."""
    import numpy as np

    frequency = np.array(_FREQUENCIES, np.int64)
    first = np.cumsum(frequency, 1) - frequency
    price = np.array([[_price(each) for each in row] for row in _FREQUENCIES], np.int64)
    symbol = np.stack([np.repeat(np.arange(len(row)), row) for row in frequency])
    return frequency, first, price, symbol


def _run(count: int) -> int:
    return (count + 7) // 8


def _fixed(rows: int, dims: tuple[int, int]) -> int:
    return 7 * _run(rows * dims[0]) + 7 * _run(rows * dims[1]) + 4 * _LANES + 2 + sum(dims)


def size(keys: int, values: int) -> int:
    """Room an encoder needs."""
    return 2 * (keys + values) - 1


def _most(keys: int, values: int) -> int:
    """The most bytes an encoding takes."""
    return size(keys, values) - 64


def _mantissas_put(values: Array) -> bytes:
    import numpy as np

    run = _run(len(values))
    flat = np.zeros(8 * run, np.uint8)
    flat[: len(values)] = values & 0x7F
    runs: Array = flat.reshape(8, run)
    bits: Array = runs[7] >> np.arange(7, dtype=np.uint8)[:, None] & 1
    packed: Array = runs[:7] | bits << 7
    return bytes(packed.tobytes())


def _mantissas_take(data: Array, count: int) -> Array:
    import numpy as np

    runs = data.reshape(7, -1)
    last = np.bitwise_or.reduce(runs >> 7 << np.arange(7, dtype=np.uint8)[:, None], axis=0)
    values = np.concatenate([(runs & 0x7F).ravel(), last]).astype(np.uint8)
    if values[count:].any():
        raise ValueError("mantissas that no value has")
    return values[:count]


def _analyse(part: Array) -> tuple[Array, Array, int, bytes]:
    """Symbols and classes ``[rows, dim]`` as one number, the channels' bytes, the top, the escapes."""
    import numpy as np

    _, _, price, _ = _tables()
    rows, dim = part.shape
    exponents, negative = (part >> 7 & 255).astype(np.int64), part >> 15
    own = exponents.max(0)
    totals = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=256))])
    held = totals[_LOWEST_TOP + 1 :] - totals[_LOWEST_TOP + 1 - _NULL_CHANNEL : -_NULL_CHANNEL]
    top = _LOWEST_TOP + int(np.argmax(held))
    base = np.where(own, np.clip(own, top - _NULL_CHANNEL + 1, top), 0)
    below = np.where(base, top - base, _NULL_CHANNEL)
    flip = 2 * negative.sum(0, dtype=np.int64) > rows
    drop = base - exponents
    drop = np.where((drop < 0) | (drop > _ESCAPE), _ESCAPE, drop)
    symbols = 2 * drop + (negative ^ flip)
    counts = np.zeros((dim, price.shape[1]), np.int64)
    np.add.at(counts, (np.broadcast_to(np.arange(dim), part.shape), symbols), 1)
    classes = np.argmin(counts @ price.T, 1)
    escapes = exponents[drop == _ESCAPE].astype(np.uint8).tobytes()
    return classes * 32 + symbols, (flip * 128 + classes * 16 + below).astype(np.uint8), top, escapes


def encode(parts: tuple[Array, Array]) -> bytes | None:
    """The encoding of K and V ``[rows, dim]``; None where it does not gain 64 bytes."""
    import numpy as np

    frequency, first, _, _ = _tables()
    analysed = [_analyse(part) for part in parts]
    states = np.full(_LANES, _LEAST, np.int64)
    words: list[Array] = []
    for codes, _, _, _ in reversed(analysed):
        flat = codes.ravel()
        for start in reversed(range(0, len(flat), _LANES)):
            step = divmod(flat[start : start + _LANES], 32)
            active, often = states[: len(step[0])], frequency[step]
            full = active >= often << 21
            words.append(active[full] & 0xFFFF)
            active = np.where(full, active >> 16, active)
            whole, rest = np.divmod(active, often)
            states[: len(active)] = (whole << 10) + rest + first[step]
    escapes = b"".join(found for _, _, _, found in analysed)[::-1]
    encoded = b"".join(
        [
            *(_mantissas_put(part.ravel()) for part in parts),
            states.astype("<u4").tobytes(),
            bytes(top for _, _, top, _ in analysed),
            *(channels.tobytes() for _, channels, _, _ in analysed),
            np.concatenate(words[::-1]).astype("<u2").tobytes(),
            escapes,
        ]
    )
    return encoded if len(encoded) <= _most(parts[0].size, parts[1].size) else None


def decode(data: Array, rows: int, dims: tuple[int, int]) -> tuple[Array, Array]:
    """The values of K and V ``[rows * dim]``; ValueError for what is no encoding of such a block."""
    import numpy as np

    frequency, first, _, symbol = _tables()
    fixed = _fixed(rows, dims)
    counts = rows * dims[0], rows * dims[1]
    if not fixed <= len(data) <= _most(*counts):
        raise ValueError(f"{len(data)} bytes are no encoding of such a block")
    head = fixed - sum(dims) - 2
    states = data[head - 4 * _LANES : head].view("<u4").astype(np.int64)
    if ((states < _LEAST) | (states >= _LEAST << 16)).any():
        raise ValueError("states that no coder has")
    tops, channels, rest = data[head : head + 2].tolist(), data[head + 2 : fixed], data[fixed:]
    read, parts = 0, []
    for count, dim, top in zip(counts, dims, tops, strict=True):
        mantissas = _mantissas_take(data[: 7 * _run(count)], count)
        below = (channels[:dim] & 15).astype(np.int64)
        if top < _LOWEST_TOP:
            raise ValueError("a top that has symbols below zero")
        base = np.where(below == _NULL_CHANNEL, 0, top - below)
        place = np.arange(count) % dim
        classes, flips, bases = (channels[:dim] >> 4 & 7)[place], (channels[:dim] >> 7)[place], base[place]
        symbols = np.empty(count, np.int64)
        for start in range(0, count, _LANES):
            active, each = states[: count - start], classes[start : start + _LANES]
            slot = active & (_SLOTS - 1)
            found = symbol[each, slot]
            active = frequency[each, found] * (active >> 10) + slot - first[each, found]
            low = np.flatnonzero(active < _LEAST)
            if read + 2 * len(low) > len(rest):
                raise ValueError("words are missing")
            active[low] = active[low] << 16 | rest[read : read + 2 * len(low)].view("<u2")
            read += 2 * len(low)
            states[: len(active)] = active
            symbols[start : start + _LANES] = found
        exponents = bases - symbols // 2
        escaped = np.flatnonzero(symbols // 2 == _ESCAPE)
        if len(escaped) > len(rest):
            raise ValueError("escapes are missing")
        rest, wanted = rest[: len(rest) - len(escaped)], rest[len(rest) - len(escaped) :][::-1]
        at = bases[escaped]
        if ((at == 0) | (wanted <= at) & (wanted + np.int64(_ESCAPE) > at)).any():
            raise ValueError("an escape that has a symbol")
        exponents[escaped] = wanted
        if (exponents < 0).any():
            raise ValueError("an exponent below zero")
        signs = (symbols & 1).astype(np.uint16) ^ flips
        parts.append((signs << 15 | exponents.astype(np.uint16) << 7 | mantissas).astype(np.uint16))
        data, channels = data[7 * _run(count) :], channels[dim:]
    if (states != _LEAST).any() or read != len(rest):
        raise ValueError("the coders don't end where they began")
    return parts[0], parts[1]
