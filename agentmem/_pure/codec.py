"""The codecs of page extents by their numbers: the twin of native/codec.c; the work is in lossless.py and quantized.py.

A block is K [rows, key_dim] and V [rows, value_dim] of one KV head; bf16 travels as uint16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .rules import broken

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

__all__ = ["CODECS", "RAW", "block_decode", "block_encode", "decode", "encode", "good_size"]

RAW = 0
LOSSLESS, DENSE = 1, 2
CODECS = range(6)  # then int8, k8v4, int4
#: Larger heads are stored raw.
MAX_DIM = 1024
MAX_ROWS = 64
F16 = 2
_ITEMS = {1: 4, 2: 2, 3: 2}


def _raw_size(dtype: int, rows: int, key_dim: int, value_dim: int) -> int:
    return rows * (key_dim + value_dim) * _ITEMS[dtype]


def _size(codec: int, dtype: int, rows: int, key_dim: int, value_dim: int) -> int:
    """Exact for the quantised codecs, at most this for the lossless ones."""
    if codec in (LOSSLESS, DENSE):
        from . import lossless

        return lossless.size(codec, dtype, rows, key_dim, value_dim)
    from . import quantized

    return quantized.size(codec, dtype, rows, key_dim, value_dim)


def _takes(codec: int, dtype: int, rows: int, key_dim: int, value_dim: int) -> bool:
    if codec not in CODECS or key_dim > MAX_DIM or value_dim > MAX_DIM:
        return False
    if codec in (LOSSLESS, DENSE) and dtype == F16:
        return False
    # Padding makes tiny blocks larger.
    return _size(codec, dtype, rows, key_dim, value_dim) < _raw_size(dtype, rows, key_dim, value_dim)


def good_size(  # noqa: PLR0917
    codec: int, dtype: int, rows: int, key_dim: int, value_dim: int, size: int
) -> bool:
    """Whether an extent of this codec can have this size."""
    if codec == RAW:
        return size == _raw_size(dtype, rows, key_dim, value_dim)
    if not _takes(codec, dtype, rows, key_dim, value_dim):
        return False
    most = _size(codec, dtype, rows, key_dim, value_dim)
    return 1 <= size <= most if codec in (LOSSLESS, DENSE) else size == most


def encode(codec: int, dtype: int, key: npt.NDArray[Any], value: npt.NDArray[Any]) -> bytes | None:
    """The block in this codec; None if it doesn't take it."""
    if codec == RAW:
        return key.tobytes() + value.tobytes()
    if not _takes(codec, dtype, key.shape[0], key.shape[1], value.shape[1]):
        return None
    if codec in (LOSSLESS, DENSE):
        from . import lossless

        return lossless.encode(codec, dtype, key, value)
    from . import quantized

    return quantized.encode(codec, dtype, key, value)


def decode(codec: int, dtype: int, data: bytes, key: npt.NDArray[Any], value: npt.NDArray[Any]) -> None:
    """Decode into arrays of the block's shape; ValueError for what is no encoding."""
    if codec == RAW:
        import numpy as np

        if len(data) != key.nbytes + value.nbytes:
            raise ValueError("a raw block of another size")
        key[...] = np.frombuffer(data, key.dtype, key.size).reshape(key.shape)
        value[...] = np.frombuffer(data, value.dtype, value.size, key.nbytes).reshape(value.shape)
        return
    if not _takes(codec, dtype, key.shape[0], key.shape[1], value.shape[1]):
        raise ValueError(f"codec {codec} does not take such a block")
    if codec in (LOSSLESS, DENSE):
        from . import lossless

        lossless.decode(codec, dtype, data, key, value)
    else:
        from . import quantized

        quantized.decode(codec, dtype, data, key, value)


def _one_block(dtype: int, key: Any, value: Any, *, writable: bool) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    import numpy as np

    views = memoryview(key), memoryview(value)
    if writable and any(view.readonly for view in views):
        raise BufferError("key or value is read-only")
    arrays = np.asarray(views[0]), np.asarray(views[1])
    if (
        dtype not in _ITEMS
        or any(a.ndim != 2 or a.itemsize != _ITEMS[dtype] or not 1 <= a.shape[1] <= MAX_DIM for a in arrays)
        or arrays[0].shape[0] != arrays[1].shape[0]
        or not 1 <= arrays[0].shape[0] <= MAX_ROWS
    ):
        raise ValueError("a block is K [1..64, 1..1024] and V [as many, 1..1024] of the dtype's values")
    return arrays


def block_encode(wanted: int, dtype: int, key: Any, value: Any, /) -> bytes | None:
    """One block in the codec ``wanted``; None if it isn't taken."""
    return encode(wanted, dtype, *_one_block(dtype, key, value, writable=False))


def block_decode(wanted: int, dtype: int, data: Buffer, key: Any, value: Any, /) -> None:
    """Decode one block into ``key`` and ``value``; `PageError` for bytes that are no encoding."""
    arrays = _one_block(dtype, key, value, writable=True)
    try:
        decode(wanted, dtype, bytes(memoryview(data)), *arrays)
    except ValueError:
        raise broken("encoding") from None
