"""Quantised blocks in numpy: K per channel, V per token, in 8 or 4 bits, laid out for attention in place.

The twin of native/quantized.c, which also says why each step is what it is; native/README.md draws the bytes. Knows one
block of one KV head; nothing of pages. numpy is imported by the first call that needs it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    Array = npt.NDArray[Any]  # float32, float16, or uint16 for bfloat16, at the borders; float32 inside
    Codes = npt.NDArray[np.uint8]
    Shape = tuple[int, ...]

__all__ = ["Unpacked", "decode", "encode", "floats", "size", "sound", "stored", "unpacked"]

INT8, K8V4, INT4 = 3, 4, 5
F32, F16, BF16 = 1, 2, 3
#: Largest magnitude that a minimum can have.
LARGEST = 65504.0
#: Tokens per K scale in 4 bits, channels per V scale in 4 bits.
TOKENS, CHANNELS = 32, 64


def _parts(count: int, size: int) -> int:
    return -(-count // size)


def _shapes(codec: int, rows: int, key_dim: int, value_dim: int) -> tuple[Shape, Shape, Shape, Shape]:
    """Shapes of K codes and V codes as stored, and of the arrays of K and V scales."""
    key4, value4 = codec == INT4, codec != INT8
    return (
        (_parts(rows, 32 if key4 else 16), _parts(key_dim, 4), 16, 4),
        (_parts(value_dim, 32 if value4 else 16), _parts(rows, 4), 16, 4),
        (_parts(rows, TOKENS) if key4 else 1, key_dim),
        (_parts(value_dim, CHANNELS) if value4 else 1, rows),
    )


def size(codec: int, dtype: int, rows: int, key_dim: int, value_dim: int) -> int:
    """Bytes of an encoded block; the same for all values and for every ``dtype``."""
    del dtype
    key, value, key_scales, value_scales = _shapes(codec, rows, key_dim, value_dim)
    minima = 2 if codec != INT8 else 1
    return math.prod(key) + math.prod(value) + 4 * math.prod(key_scales) + 2 * minima * math.prod(value_scales)


def floats(dtype: int, values: Array) -> Array:
    """Values of the dtype as float32."""
    import numpy as np

    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == BF16 else values.astype(np.float32)


def stored(dtype: int, values: Array) -> Array:
    """To the nearest of the dtype, ties to even. A NaN stays one; f16 keeps what is finite so."""
    import numpy as np

    if dtype == BF16:
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return values.clip(-LARGEST, LARGEST).astype(np.float16) if dtype == F16 else values.astype(np.float32)


def _below(values: Array) -> Array:
    import numpy as np

    half = (values + np.float32(0)).astype(np.float16)  # 0 instead of -0
    with np.errstate(over="ignore", under="ignore"):
        return np.where(half > values, np.nextafter(half, np.float16(-np.inf)), half)


def _above(values: Array) -> Array:
    import numpy as np

    half = (values + np.float32(0)).astype(np.float16)
    with np.errstate(over="ignore", under="ignore"):
        return np.where(half < values, np.nextafter(half, np.float16(np.inf)), half)


def _inverse(scale: Array) -> Array:
    import numpy as np

    with np.errstate(divide="ignore"):
        return np.where(scale > 0, np.float32(1) / scale.astype(np.float32), np.float32(0))


def _quantised(groups: Array, axis: int, levels: int) -> tuple[Codes, Array, Array]:
    """Codes 0 to ``levels``, scales and minima of groups that lie along an axis."""
    import numpy as np

    minima = _below(groups.min(axis=axis, keepdims=True))
    scales = _above((groups.max(axis=axis, keepdims=True) - minima.astype(np.float32)) / np.float32(levels))
    codes = np.rint((groups - minima.astype(np.float32)) * _inverse(scales)).astype(np.uint8)
    return codes, scales.squeeze(axis), minima.squeeze(axis)


def _padded(array: Codes, rows: int, columns: int) -> Codes:
    import numpy as np

    padded = np.zeros((rows, columns), np.uint8)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def _encode_keys(four: bool, key: Array, shape: Shape) -> list[Array]:
    import numpy as np

    tiles, quads = shape[:2]
    groups = [key[i : i + TOKENS] for i in range(0, len(key), TOKENS)] if four else [key]
    codes, scales, minima = zip(*(_quantised(group, 0, 15 if four else 255) for group in groups), strict=True)
    padded = _padded(np.concatenate(codes), tiles * (32 if four else 16), quads * 4).reshape(tiles, -1, 16, quads, 4)
    packed = padded[:, 0] | padded[:, 1] << 4 if four else padded[:, 0]
    return [packed.transpose(0, 2, 1, 3), np.stack(scales), np.stack(minima)]


def _encode_values(four: bool, value: Array, shape: Shape) -> list[Array]:
    import numpy as np

    strips, tiles = shape[:2]
    packed: Array
    if four:
        groups = [value[:, i : i + CHANNELS] for i in range(0, value.shape[1], CHANNELS)]
        codes, *scales = zip(*(_quantised(group, 1, 15) for group in groups), strict=True)
        padded = _padded(np.concatenate(codes, 1), tiles * 4, strips * 32).reshape(tiles, 4, strips, 2, 16)
        packed = padded[:, :, :, 0] | padded[:, :, :, 1] << 4
    else:
        scale = _above(np.abs(value).max(axis=1, keepdims=True) / np.float32(127))
        signed = np.rint(value * _inverse(scale)).astype(np.int8).view(np.uint8)
        packed = _padded(signed, tiles * 4, strips * 16).reshape(tiles, 4, strips, 16)
        scales = [(scale[:, 0],)]
    return [packed.transpose(2, 0, 3, 1), *(np.stack(each) for each in scales)]


def encode(codec: int, dtype: int, key: Array, value: Array) -> bytes | None:
    """The bytes of a block: ``key`` [rows, key_dim] and ``value`` [rows, value_dim]; rows 1 to 64.

    None where a value is no number or beyond the range of float16.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):
        keys, values = floats(dtype, key), floats(dtype, value)
    if not (np.abs(keys).max() <= LARGEST and np.abs(values).max() <= LARGEST):
        return None
    key_shape, value_shape, _, _ = _shapes(codec, len(key), key.shape[1], value.shape[1])
    key_codes, *key_scales = _encode_keys(codec == INT4, keys, key_shape)
    value_codes, *value_scales = _encode_values(codec != INT8, values, value_shape)
    return b"".join(array.tobytes() for array in (key_codes, value_codes, *key_scales, *value_scales))


class Unpacked(NamedTuple):
    """A block's codes as floats, K [rows, key_dim] and V [rows, value_dim], and its scales and minima.

    Those of K are [groups of 32 tokens, key_dim] in 4 bits, else [1, key_dim]; those of V [groups of 64 channels, rows]
    in 4 bits, else [1, rows] and no minima.
    """

    keys: Array
    scales: Array
    minima: Array
    values: Array
    value_scales: Array
    value_minima: Array | None


def _key_codes(four: bool, codes: Codes, rows: int, dim: int) -> Array:
    import numpy as np

    rowwise = codes.transpose(0, 2, 1, 3)
    if four:
        rowwise = np.stack([rowwise & 15, rowwise >> 4], 1)
    return rowwise.reshape(-1, codes.shape[1] * 4)[:rows, :dim].astype(np.float32)


def _value_codes(four: bool, codes: Codes, rows: int, dim: int) -> Array:
    import numpy as np

    rowwise = codes.transpose(1, 3, 0, 2)
    if four:
        rowwise = np.stack([rowwise & 15, rowwise >> 4], 3)
    flat = rowwise.reshape(codes.shape[1] * 4, -1)[:rows, :dim]
    return (flat if four else flat.view(np.int8)).astype(np.float32)


def unpacked(codec: int, dtype: int, data: Buffer, shape: tuple[int, int, int]) -> Unpacked:
    """What the bytes of a block of ``shape`` (rows, key_dim, value_dim) hold; ValueError if they can't be one."""
    import numpy as np

    content = np.frombuffer(memoryview(data), np.uint8)
    rows, key_dim, value_dim = shape
    if len(content) != size(codec, dtype, rows, key_dim, value_dim):
        raise ValueError(f"{len(content)} bytes are no block of {rows} x {key_dim} and {rows} x {value_dim}")
    shapes = _shapes(codec, rows, key_dim, value_dim)
    lengths = [math.prod(shape) for shape in shapes]
    keys, values, rest = np.split(content, np.cumsum(lengths[:2]))
    numbers = rest.view(np.float16).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise ValueError("a scale or minimum is not finite")
    scales, minima, value_scales, value_minima = np.split(numbers, np.cumsum([lengths[2], lengths[2], lengths[3]]))
    return Unpacked(
        _key_codes(codec == INT4, keys.reshape(shapes[0]), rows, key_dim),
        scales.reshape(shapes[2]),
        minima.reshape(shapes[2]),
        _value_codes(codec != INT8, values.reshape(shapes[1]), rows, value_dim),
        value_scales.reshape(shapes[3]),
        value_minima.reshape(shapes[3]) if codec != INT8 else None,
    )


def sound(codec: int, data: Buffer, shape: tuple[int, int, int]) -> bool:
    """Whether all scales and minima of a block of (rows, key_dim, value_dim) are finite, and no scale below 0."""
    import numpy as np

    key, value, key_scales, value_scales = map(math.prod, _shapes(codec, *shape))
    numbers = np.frombuffer(memoryview(data), np.float16, offset=key + value)
    scales = np.concatenate([numbers[:key_scales], numbers[2 * key_scales :][:value_scales]])
    return bool(np.isfinite(numbers).all() and not np.signbit(scales).any())


def decode(codec: int, dtype: int, data: Buffer, key: Array, value: Array) -> None:
    """Fill ``key`` and ``value`` from the bytes of a block; ValueError if they can't be one of these shapes."""
    rows, key_dim, value_dim = *key.shape, value.shape[1]
    block = unpacked(codec, dtype, data, (rows, key_dim, value_dim))
    scale, minimum = (
        array.repeat(TOKENS if codec == INT4 else rows, 0)[:rows] for array in (block.scales, block.minima)
    )
    key[...] = stored(dtype, block.keys * scale + minimum)
    if block.value_minima is None:
        value[...] = stored(dtype, block.values * block.value_scales.T)
    else:
        scale, minimum = (array.repeat(CHANNELS, 0)[:value_dim].T for array in (block.value_scales, block.value_minima))
        value[...] = stored(dtype, block.values * scale + minimum)
