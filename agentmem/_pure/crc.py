"""CRC32C in numpy (Castagnoli, RFC 3720): many lanes at once, joined by "advance over n zero bytes".

The twin of native/crc32c.c. numpy is imported by the first call that needs it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    Bytes = npt.NDArray[np.uint8]
    Words = npt.NDArray[Any]  # uint32; the stubs lose that at every operator

__all__ = ["crc32c", "rows_crc"]


@functools.cache
def _byte_table() -> Words:
    import numpy as np

    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(0x82F63B78)
    return table


def _advanced(crc: Words, tables: Words) -> Words:
    result: Words = tables[0][crc & 255] ^ tables[1][crc >> 8 & 255] ^ tables[2][crc >> 16 & 255] ^ tables[3][crc >> 24]
    return result


@functools.lru_cache(maxsize=64)
def _zeros_tables(zeros: int) -> Words:
    """Tables [4, 256]: byte k of a register after ``zeros`` zero bytes, by squaring."""
    import numpy as np

    places = np.arange(4, dtype=np.uint32)[:, None] * 8
    registers = (np.arange(256, dtype=np.uint32)[None, :] << places).astype(np.uint32)
    if zeros == 0:
        return registers
    if zeros == 1:
        one: Words = _byte_table()[registers & 255] ^ (registers >> 8)
        return one
    half = _zeros_tables(zeros // 2)
    tables = _advanced(half, half)
    return _advanced(tables, _zeros_tables(1)) if zeros % 2 else tables


def rows_crc(rows: Bytes) -> Words:
    """CRC32C of every row of a byte matrix."""
    import numpy as np

    count, length = rows.shape
    table = _byte_table()
    # Lanes of `width` bytes, their number a power of two. Zero bytes in front don't change a zero register, so rows are
    # filled up there; the initial register of all ones is an exclusive-or with the first four bytes of the message.
    lanes = 1 << max(0, (length // 256).bit_length() - 1)
    width = -(-length // lanes)
    before = lanes * width - length
    filled = np.zeros((count, lanes * width), np.uint8)
    filled[:, before:] = rows
    if length >= 4:
        filled[:, before : before + 4] ^= 0xFF
        columns = np.ascontiguousarray(filled.reshape(count * lanes, width).T)
        crc = np.zeros(count * lanes, np.uint32)
        for column in columns:
            crc = table[(crc ^ column) & 255] ^ (crc >> 8)
        while lanes > 1:
            pairs = crc.reshape(-1, 2)
            crc = _advanced(pairs[:, 0], _zeros_tables(width)) ^ pairs[:, 1]
            lanes, width = lanes // 2, width * 2
    else:
        crc = np.full(count, 0xFFFFFFFF, np.uint32)
        for column in np.ascontiguousarray(rows.T):
            crc = table[(crc ^ column) & 255] ^ (crc >> 8)
    return ~crc


def crc32c(data: Buffer, value: int = 0, /) -> int:
    """CRC32C of ``data``, appended to data whose checksum is ``value``."""
    import numpy as np

    array = np.frombuffer(memoryview(data), np.uint8)
    crc = int(rows_crc(array[None, :])[0])
    if value:
        crc ^= int(_advanced(np.array([value], np.uint32), _zeros_tables(len(array)))[0])
    return crc
