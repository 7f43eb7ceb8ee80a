"""Page files in numpy, format version 1 (native/README.md): the twin of native/page.c.

Knows the bytes of a page and the rules that a reader checks; codecs are in the modules beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .crc import crc32c, rows_crc

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    Bytes = npt.NDArray[np.uint8]

__all__ = ["RULES", "PageError", "page_parse", "page_read", "page_size", "page_verify", "page_write", "prefault"]


class PageError(ValueError):
    """A page file or a layout breaks the rule ``args[0]``; ``args[1]`` says it in words."""


#: The rules of native/page.c, in its words.
RULES = {
    "short": "the file is shorter than a header",
    "magic": "the file is not a page file",
    "version": "the file has another format version",
    "header length": "the header's length is out of bounds",
    "length": "the file is not as long as its header says",
    "header checksum": "the header fails its checksum",
    "reserved": "a reserved field is not zero",
    "dtype": "the data type is unknown",
    "grid": "the grid or block is out of bounds",
    "layers": "the number of layers is out of bounds",
    "shape": "a layer's heads or dimensions are out of bounds",
    "codec": "an extent's codec is unknown",
    "extent": "an extent does not lie where the layout puts it",
    "padding": "padding is not zero",
    "checksum": "an extent fails its checksum",
}


def _broken(rule: str, where: str = "") -> PageError:
    return PageError(rule, RULES[rule] + where)


MAGIC = b"AMKVPAGE"
VERSION = 1
FIXED = 160
ALIGN = 64
BLOCK = 64
MAX_GRID, MAX_LAYERS, MAX_HEADS, MAX_DIM = 65536, 1024, 1024, 65536
ITEMS = {1: 4, 2: 2, 3: 2}  # bytes of a value of f32, f16, bf16
FIXED_FIELDS = struct.Struct("<8sIIIIQIIIII12s32s32s32s")
LAYER = struct.Struct("<IIII")
EXTENT = struct.Struct("<QQII")

Layers = tuple[tuple[int, int, int], ...]


class _Place(NamedTuple):
    """Where the extents of one layer lie: [kv_heads, blocks] extents of ``size`` bytes, ``room`` bytes apart."""

    heads: int
    blocks: int
    block: int
    key_bytes: int
    size: int
    room: int
    offset: int


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _places(dtype: int, grid: int, layers: Layers) -> tuple[int, int, int, list[_Place]]:
    """(header bytes, file bytes, extents, a place per layer) of a layout; raises `PageError` for an impossible one."""
    if dtype not in ITEMS:
        raise _broken("dtype")
    if not (1 <= grid <= MAX_GRID and (grid <= BLOCK or grid % BLOCK == 0)):
        raise _broken("grid")
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise _broken("layers")
    block = min(BLOCK, grid)
    blocks = grid // block
    extents = 0
    for heads, key_dim, value_dim in layers:
        if not (1 <= heads <= MAX_HEADS and 1 <= key_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM):
            raise _broken("shape")
        extents += heads * blocks
    first = offset = _aligned(FIXED + 4 * grid + LAYER.size * len(layers) + EXTENT.size * extents)
    if first > 0xFFFFFFFF:
        raise _broken("header length")
    places = []
    for heads, key_dim, value_dim in layers:
        size = block * (key_dim + value_dim) * ITEMS[dtype]
        room = _aligned(size)
        places.append(_Place(heads, blocks, block, block * key_dim * ITEMS[dtype], size, room, offset))
        offset += heads * blocks * room
    return first, offset, extents, places


def page_size(dtype: int, grid: int, layers: Layers, /) -> int:
    """Length in bytes of a page file with this layout."""
    return _places(dtype, grid, layers)[1]


def _array(buffer: Any, name: str, layer: int, *, writable: bool) -> npt.NDArray[Any]:
    import numpy as np

    view = memoryview(buffer)
    if writable and view.readonly:
        raise BufferError(f"{name}[{layer}] is read-only")
    array = np.asarray(view)
    if array.ndim != 3:
        raise ValueError(f"{name}[{layer}] must have the shape [kv_heads, positions, head_dim], not {array.ndim} axes")
    dim, positions = array.shape[2], array.shape[1]
    if (dim > 1 and array.strides[2] != array.itemsize) or (positions > 1 and array.strides[1] != array.itemsize * dim):
        raise ValueError(f"{name}[{layer}] must be contiguous in its positions and dimensions")
    return array


def _pairs(
    keys: Sequence[Any], values: Sequence[Any], *, writable: bool
) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    if len(keys) != len(values) or not 1 <= len(keys) <= MAX_LAYERS:
        raise ValueError(
            f"{len(keys)} keys and {len(values)} values: there must be one of each per layer, 1 to {MAX_LAYERS} layers"
        )
    return [
        (_array(key, "keys", i, writable=writable), _array(value, "values", i, writable=writable))
        for i, (key, value) in enumerate(zip(keys, values, strict=True))
    ]


def _check_fit(
    pair: tuple[npt.NDArray[Any], npt.NDArray[Any]],
    layer: int,
    *,
    shape: tuple[int, int, int],
    item: int,
    at: int,
    grid: int,
) -> None:
    for name, array, dim in (("keys", pair[0], shape[1]), ("values", pair[1], shape[2])):
        heads, positions, found = array.shape
        if array.itemsize != item or heads != shape[0] or found != dim or at < 0 or at > positions - grid:
            raise ValueError(
                f"{name}[{layer}] is [{heads}, {positions}, {found}] of {array.itemsize}-byte values: "
                f"[{shape[0]}, >= {grid if at < 0 else at + grid}, {dim}] of {item}-byte values needed"
            )


def _blocks_of(array: npt.NDArray[Any], at: int, grid: int, place: _Place) -> Bytes:
    """Positions ``at .. at + grid`` as bytes [kv_heads * blocks, bytes of a block]."""
    import numpy as np

    part = np.ascontiguousarray(array[:, at : at + grid])
    return part.reshape(-1).view(np.uint8).reshape(place.heads * place.blocks, -1)


def page_write(  # noqa: PLR0917 (as the C function)
    fd: int,
    dtype: int,
    grid: int,
    number: int,
    identity: Buffer,
    key: Buffer,
    parent: Buffer,
    tokens: Buffer,
    keys: Sequence[Any],
    values: Sequence[Any],
    at: int,
    /,
) -> int:
    """Write a whole page file to the empty file ``fd``; its length in bytes.

    ``keys[layer]`` and ``values[layer]`` are [kv_heads, positions, head_dim]; ``at`` is the page's first position
    there.
    """
    import numpy as np

    ids = [bytes(memoryview(part)) for part in (identity, key, parent, tokens)]
    if [len(part) for part in ids] != [32, 32, 32, 4 * grid]:
        raise ValueError("identity, key and parent are 32 bytes each, tokens are grid int32 values")
    if dtype not in ITEMS:
        raise _broken("dtype")
    pairs = _pairs(keys, values, writable=False)
    layers: Layers = tuple((k.shape[0], k.shape[2], v.shape[2]) for k, v in pairs)
    for i, (pair, shape) in enumerate(zip(pairs, layers, strict=True)):
        if shape[0] > MAX_HEADS or shape[1] > MAX_DIM or shape[2] > MAX_DIM:
            raise _broken("shape")
        _check_fit(pair, i, shape=shape, item=ITEMS[dtype], at=at, grid=grid)
    first, length, extents, places = _places(dtype, grid, layers)

    image = np.zeros(length, np.uint8)
    table: list[bytes] = []
    for pair, place in zip(pairs, places, strict=True):
        rows = image[place.offset :][: place.heads * place.blocks * place.room].reshape(-1, place.room)
        rows[:, : place.key_bytes] = _blocks_of(pair[0], at, grid, place)
        rows[:, place.key_bytes : place.size] = _blocks_of(pair[1], at, grid, place)
        table.extend(
            EXTENT.pack(place.offset + i * place.room, place.size, int(crc), 0)
            for i, crc in enumerate(rows_crc(rows[:, : place.size]))
        )
    fields = (first, dtype, length, grid, min(BLOCK, grid), number, len(layers), extents, b"", *ids[:3])
    header = bytearray(FIXED_FIELDS.pack(MAGIC, VERSION, 0, *fields))
    header += ids[3] + b"".join(LAYER.pack(*shape, 0) for shape in layers) + b"".join(table)
    header += bytes(first - len(header))
    struct.pack_into("<I", header, 12, crc32c(memoryview(header)[16:]))
    image[:first] = np.frombuffer(header, np.uint8)
    left, offset = memoryview(image.data), 0
    while left:
        done = os.pwrite(fd, left, offset)
        left, offset = left[done:], offset + done
    return length


class _Header(NamedTuple):
    dtype: int
    grid: int
    number: int
    identity: bytes
    key: bytes
    parent: bytes
    tokens: bytes
    layers: Layers
    places: list[_Place]
    checksums: list[int]


def _open(data: memoryview) -> _Header:
    """The checked header of a page file, in the order of checks of ``am_page_open``."""
    length = len(data)
    if length < FIXED:
        raise _broken("short")
    magic, version, crc, first, dtype, total, grid, block, number, layer_count, extents, zero, *ids = (
        FIXED_FIELDS.unpack_from(data)
    )
    if magic != MAGIC:
        raise _broken("magic")
    if version != VERSION:
        raise _broken("version")
    if first < FIXED or first % ALIGN or first > length:
        raise _broken("header length")
    if total != length:
        raise _broken("length")
    if crc32c(data[16:first]) != crc:
        raise _broken("header checksum")
    if any(zero):
        raise _broken("reserved")
    if dtype not in ITEMS:
        raise _broken("dtype")
    if not (1 <= grid <= MAX_GRID and (grid <= BLOCK or grid % BLOCK == 0)) or block != min(BLOCK, grid):
        raise _broken("grid")
    if not 1 <= layer_count <= MAX_LAYERS:
        raise _broken("layers")
    layers_at = FIXED + 4 * grid
    extents_at = layers_at + LAYER.size * layer_count
    if extents_at > first:
        raise _broken("header length")
    layers = []
    for entry in LAYER.iter_unpack(data[layers_at:extents_at]):
        if not (1 <= entry[0] <= MAX_HEADS and 1 <= entry[1] <= MAX_DIM and 1 <= entry[2] <= MAX_DIM):
            raise _broken("shape")
        if entry[3]:
            raise _broken("reserved")
        layers.append(entry[:3])
    end = extents_at + EXTENT.size * extents
    if sum(layer[0] for layer in layers) * (grid // block) != extents or first != _aligned(end):
        raise _broken("header length")
    _, expected_length, _, places = _places(dtype, grid, tuple(layers))
    expected = _extents(places)
    checksums = []
    for offset, size, checksum, codec in EXTENT.iter_unpack(data[extents_at:end]):
        where, length_here, _ = next(expected)
        if codec:
            raise _broken("codec")
        if offset != where or size != length_here or _aligned(offset + size) > length:
            raise _broken("extent")
        checksums.append(checksum)
    if expected_length != length:
        raise _broken("length")
    if any(data[end:first]):
        raise _broken("padding")
    tokens = bytes(data[FIXED:layers_at])
    return _Header(dtype, grid, number, ids[0], ids[1], ids[2], tokens, tuple(layers), places, checksums)


def _extents(places: list[_Place]) -> Iterator[tuple[int, int, str]]:
    """(offset, size, words for an error) of every extent, in the order of the table."""
    for layer, place in enumerate(places):
        for i in range(place.heads * place.blocks):
            where = f" (layer {layer}, head {i // place.blocks}, block {i % place.blocks})"
            yield place.offset + i * place.room, place.size, where


def page_parse(data: Buffer, /) -> tuple[int, int, int, bytes, bytes, bytes, bytes, Layers]:
    """(dtype, grid, number, identity, key, parent, tokens, layers) of a page file whose header passes every check."""
    return _open(memoryview(data).cast("B"))[:8]


def _check_extents(data: memoryview, header: _Header) -> None:
    import numpy as np

    image = np.frombuffer(data, np.uint8)
    index = 0
    for layer, place in enumerate(header.places):
        rows = image[place.offset :][: place.heads * place.blocks * place.room].reshape(-1, place.room)
        wanted = np.array(header.checksums[index : index + len(rows)], np.uint32)
        bad_sum = rows_crc(rows[:, : place.size]) != wanted
        bad = bad_sum | rows[:, place.size :].any(axis=1)
        index += len(rows)
        if bad.any():
            i = int(np.argmax(bad))
            where = f" (layer {layer}, head {i // place.blocks}, block {i % place.blocks})"
            raise _broken("checksum" if bad_sum[i] else "padding", where)


def page_verify(data: Buffer, /) -> None:
    """Check every checksum of a page file; `PageError` for the first that fails."""
    view = memoryview(data).cast("B")
    _check_extents(view, _open(view))


def page_read(data: Buffer, keys: Sequence[Any], values: Sequence[Any], at: int, check: bool = True, /) -> None:
    """Copy all layers out of a page file into ``keys[layer]``, ``values[layer]``, to positions ``at .. at + grid``."""
    import numpy as np

    view = memoryview(data).cast("B")
    header = _open(view)
    pairs = _pairs(keys, values, writable=True)
    if len(pairs) != len(header.layers):
        raise ValueError(f"the page has {len(header.layers)} layers, room for {len(pairs)} was given")
    for i, (pair, shape) in enumerate(zip(pairs, header.layers, strict=True)):
        _check_fit(pair, i, shape=shape, item=ITEMS[header.dtype], at=at, grid=header.grid)
    if check:
        _check_extents(view, header)
    image = np.frombuffer(view, np.uint8)
    for pair, place in zip(pairs, header.places, strict=True):
        rows = image[place.offset :][: place.heads * place.blocks * place.room].reshape(-1, place.room)
        for array, part in ((pair[0], rows[:, : place.key_bytes]), (pair[1], rows[:, place.key_bytes : place.size])):
            shape = (place.heads, header.grid, array.shape[2])
            array[:, at : at + header.grid] = np.ascontiguousarray(part).view(array.dtype).reshape(shape)


def prefault(data: Buffer, /) -> None:
    """Map all of a file mapping now; OSError where it can't be read. Needs the C extension: here it does nothing."""
