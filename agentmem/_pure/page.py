"""Page files in numpy, format version 1 (native/README.md): the twin of native/page.c.

Knows the bytes of a page and the rules that a reader checks; codecs are in the modules beside it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import codec
from .crc import crc32c, rows_crc
from .rules import broken

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Buffer

    Bytes = npt.NDArray[np.uint8]

__all__ = [
    "ITEMS",
    "TABLE_ENTRY",
    "aligned",
    "extents_of",
    "opened",
    "page_encode",
    "page_parse",
    "page_read",
    "page_size",
    "page_verify",
    "page_write",
    "page_write_encoded",
    "prefault",
    "reserve",
    "write_behind",
]


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
TABLE_ENTRY = struct.Struct("<QII")

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


def aligned(offset: int) -> int:
    """Up to a multiple of 64."""
    return -(-offset // ALIGN) * ALIGN


def _places(dtype: int, grid: int, layers: Layers) -> tuple[int, int, int, list[_Place]]:
    """(header bytes, file bytes, extents, a place per layer) of a layout; raises `PageError` for an impossible one."""
    if dtype not in ITEMS:
        raise broken("dtype")
    if not (1 <= grid <= MAX_GRID and (grid <= BLOCK or grid % BLOCK == 0)):
        raise broken("grid")
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise broken("layers")
    block = min(BLOCK, grid)
    blocks = grid // block
    extents = 0
    for heads, key_dim, value_dim in layers:
        if not (1 <= heads <= MAX_HEADS and 1 <= key_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM):
            raise broken("shape")
        extents += heads * blocks
    first = offset = aligned(FIXED + 4 * grid + LAYER.size * len(layers) + EXTENT.size * extents)
    if first > 0xFFFFFFFF:
        raise broken("header length")
    places = []
    for heads, key_dim, value_dim in layers:
        size = block * (key_dim + value_dim) * ITEMS[dtype]
        room = aligned(size)
        places.append(_Place(heads, blocks, block, block * key_dim * ITEMS[dtype], size, room, offset))
        offset += heads * blocks * room
    return first, offset, extents, places


def extents_of(dtype: int, grid: int, layers: Layers) -> int:
    """Number of extents of a layout; raises `PageError` for an impossible one."""
    return _places(dtype, grid, layers)[2]


def page_size(dtype: int, grid: int, layers: Layers, /) -> int:
    """Length in bytes of a page file with this layout and the raw codec: the most that it takes with any other."""
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
        if not array.flags.aligned:
            raise ValueError(f"{name}[{layer}] must be aligned to its values")


def _blocks_of(array: npt.NDArray[Any], at: int, grid: int, place: _Place) -> Bytes:
    """Positions ``at .. at + grid`` as bytes [kv_heads * blocks, bytes of a block]."""
    import numpy as np

    part = np.ascontiguousarray(array[:, at : at + grid])
    return part.reshape(-1).view(np.uint8).reshape(place.heads * place.blocks, -1)


def _shapes(
    dtype: int, grid: int, keys: Sequence[Any], values: Sequence[Any], at: int, *, writable: bool
) -> tuple[list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], Layers]:
    """The arrays of every layer, checked, and their shapes."""
    if dtype not in ITEMS:
        raise broken("dtype")
    pairs = _pairs(keys, values, writable=writable)
    layers: Layers = tuple((k.shape[0], k.shape[2], v.shape[2]) for k, v in pairs)
    for i, (pair, shape) in enumerate(zip(pairs, layers, strict=True)):
        if shape[0] > MAX_HEADS or shape[1] > MAX_DIM or shape[2] > MAX_DIM:
            raise broken("shape")
        _check_fit(pair, i, shape=shape, item=ITEMS[dtype], at=at, grid=grid)
    return pairs, layers


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
    """Write a whole page file to the empty file ``fd`` with the raw codec; its length in bytes.

    ``keys[layer]`` and ``values[layer]`` are [kv_heads, positions, head_dim]; ``at`` is the page's first position
    there.
    """
    import numpy as np

    ids = _ids(identity, key, parent, tokens, grid)
    pairs, layers = _shapes(dtype, grid, keys, values, at, writable=False)
    first, length, _, places = _places(dtype, grid, layers)
    body = np.zeros(length - first, np.uint8)
    table: list[tuple[int, int, int]] = []
    for pair, place in zip(pairs, places, strict=True):
        rows = body[place.offset - first :][: place.heads * place.blocks * place.room].reshape(-1, place.room)
        rows[:, : place.key_bytes] = _blocks_of(pair[0], at, grid, place)
        rows[:, place.key_bytes : place.size] = _blocks_of(pair[1], at, grid, place)
        table.extend((place.size, int(crc), codec.RAW) for crc in rows_crc(rows[:, : place.size]))
    return _write(fd, dtype, grid, number, ids, layers, table, memoryview(body.data))


def _ids(identity: Buffer, key: Buffer, parent: Buffer, tokens: Buffer, grid: int) -> list[bytes]:
    ids = [bytes(memoryview(part)) for part in (identity, key, parent, tokens)]
    if [len(part) for part in ids] != [32, 32, 32, 4 * grid]:
        raise ValueError("identity, key and parent are 32 bytes each, tokens are grid int32 values")
    return ids


def _write(  # noqa: PLR0917
    fd: int,
    dtype: int,
    grid: int,
    number: int,
    ids: list[bytes],
    layers: Layers,
    table: list[tuple[int, int, int]],
    body: memoryview,
) -> int:
    """Header, then body, into an empty file; ``table`` has (size, checksum, codec) of every extent."""
    if not 0 <= number < 1 << 32:
        raise ValueError(f"{number} is no number from 0 to 2**32 - 1")
    first, _, extents, _ = _places(dtype, grid, layers)
    length = first + len(body)
    fields = (first, dtype, length, grid, min(BLOCK, grid), number, len(layers), extents, b"", *ids[:3])
    header = bytearray(FIXED_FIELDS.pack(MAGIC, VERSION, 0, *fields))
    header += ids[3] + b"".join(LAYER.pack(*shape, 0) for shape in layers)
    offset = first
    for size, crc, number_of_codec in table:
        header += EXTENT.pack(offset, size, crc, number_of_codec)
        offset += aligned(size)
    header += bytes(first - len(header))
    struct.pack_into("<I", header, 12, crc32c(memoryview(header)[16:]))
    at = 0
    for part in (memoryview(header), body):
        sent = 0
        while sent < len(part):
            sent += os.pwrite(fd, part[sent:], at + sent)
        at += len(part)
    return length


def page_encode(  # noqa: PLR0917
    dtype: int, wanted: int, grid: int, keys: Sequence[Any], values: Sequence[Any], at: int, writeback: bool, /
) -> tuple[bytes, bytearray]:
    """(table, body) of positions ``at .. at + grid`` in the codec ``wanted``.

    The table has ``<QII`` (size, CRC32C, codec) per extent, the body each extent padded to a multiple of 64 bytes. A
    block that the codec does not take is stored raw. With ``writeback`` the decoded values replace those given.
    """
    if wanted not in codec.CODECS:
        raise broken("codec")
    pairs, layers = _shapes(dtype, grid, keys, values, at, writable=writeback)
    _places(dtype, grid, layers)
    block = min(BLOCK, grid)
    table, body = bytearray(), bytearray()
    for (key, value), (heads, _, _) in zip(pairs, layers, strict=True):
        for head in range(heads):
            for start in range(at, at + grid, block):
                parts = key[head, start : start + block], value[head, start : start + block]
                used, encoded = wanted, codec.encode(wanted, dtype, *parts)
                if encoded is None:
                    used, encoded = codec.RAW, parts[0].tobytes() + parts[1].tobytes()
                elif writeback:
                    codec.decode(wanted, dtype, encoded, *parts)
                table += TABLE_ENTRY.pack(len(encoded), crc32c(encoded), used)
                body += encoded + bytes(aligned(len(encoded)) - len(encoded))
    return bytes(table), body


def page_write_encoded(  # noqa: PLR0917
    fd: int,
    dtype: int,
    grid: int,
    number: int,
    identity: Buffer,
    key: Buffer,
    parent: Buffer,
    tokens: Buffer,
    layers: Layers,
    table: Buffer,
    body: Buffer,
    /,
) -> int:
    """Write the page file of what `page_encode` gave to the empty file ``fd``; its length in bytes."""
    ids = _ids(identity, key, parent, tokens, grid)
    _, _, extents, places = _places(dtype, grid, layers)
    view = memoryview(body).cast("B")
    entries = memoryview(table).cast("B")
    if len(entries) != extents * TABLE_ENTRY.size:
        raise broken("extent")
    found = list(TABLE_ENTRY.iter_unpack(entries))
    offset = 0
    for (size, _, used), shape in zip(found, _block_shapes(dtype, places), strict=True):
        if used not in codec.CODECS:
            raise broken("codec")
        if not codec.good_size(used, *shape, size) or aligned(offset + size) > len(view):
            raise broken("extent")
        offset = aligned(offset + size)
    if offset != len(view):
        raise broken("extent")
    return _write(fd, dtype, grid, number, ids, layers, found, view)


def _block_shapes(dtype: int, places: list[_Place]) -> Iterator[tuple[int, int, int, int]]:
    """(dtype, rows, key_dim, value_dim) of the block behind every extent, in the order of the table."""
    item = ITEMS[dtype]
    for place in places:
        key_dim = place.key_bytes // (place.block * item)
        value_dim = (place.size - place.key_bytes) // (place.block * item)
        for _ in range(place.heads * place.blocks):
            yield dtype, place.block, key_dim, value_dim


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
    extents: list[tuple[int, int, int, int]]  # offset, size, checksum, codec


def opened(data: memoryview) -> _Header:
    """The checked header of a page file, in the order of checks of ``am_page_open``."""
    length = len(data)
    if length < FIXED:
        raise broken("short")
    magic, version, crc, first, dtype, total, grid, block, number, layer_count, extents, zero, *ids = (
        FIXED_FIELDS.unpack_from(data)
    )
    if magic != MAGIC:
        raise broken("magic")
    if version != VERSION:
        raise broken("version")
    if first < FIXED or first % ALIGN or first > length:
        raise broken("header length")
    if total != length:
        raise broken("length")
    if crc32c(data[16:first]) != crc:
        raise broken("header checksum")
    if any(zero):
        raise broken("reserved")
    if dtype not in ITEMS:
        raise broken("dtype")
    if not (1 <= grid <= MAX_GRID and (grid <= BLOCK or grid % BLOCK == 0)) or block != min(BLOCK, grid):
        raise broken("grid")
    if not 1 <= layer_count <= MAX_LAYERS:
        raise broken("layers")
    layers_at = FIXED + 4 * grid
    extents_at = layers_at + LAYER.size * layer_count
    if extents_at > first:
        raise broken("header length")
    layers = []
    for entry in LAYER.iter_unpack(data[layers_at:extents_at]):
        if not (1 <= entry[0] <= MAX_HEADS and 1 <= entry[1] <= MAX_DIM and 1 <= entry[2] <= MAX_DIM):
            raise broken("shape")
        if entry[3]:
            raise broken("reserved")
        layers.append(entry[:3])
    end = extents_at + EXTENT.size * extents
    if sum(layer[0] for layer in layers) * (grid // block) != extents or first != aligned(end):
        raise broken("header length")
    _, _, _, places = _places(dtype, grid, tuple(layers))
    table = list(EXTENT.iter_unpack(data[extents_at:end]))
    where = first
    for (offset, size, _, used), shape in zip(table, _block_shapes(dtype, places), strict=True):
        if used not in codec.CODECS:
            raise broken("codec")
        if offset != where or not codec.good_size(used, *shape, size) or aligned(offset + size) > length:
            raise broken("extent")
        where = aligned(offset + size)
    if where != length:
        raise broken("length")
    if any(data[end:first]):
        raise broken("padding")
    tokens = bytes(data[FIXED:layers_at])
    return _Header(dtype, grid, number, ids[0], ids[1], ids[2], tokens, tuple(layers), places, table)


def page_parse(data: Buffer, /) -> tuple[int, int, int, bytes, bytes, bytes, bytes, Layers]:
    """(dtype, grid, number, identity, key, parent, tokens, layers) of a page file whose header passes every check."""
    return opened(memoryview(data).cast("B"))[:8]


def _named(place: _Place, layer: int, i: int) -> str:
    return f" (layer {layer}, head {i // place.blocks}, block {i % place.blocks})"


def _check_extents(data: memoryview, header: _Header, layers: range) -> None:
    """Checksums and padding of these layers, many extents of one size at a time."""
    import numpy as np

    image = np.frombuffer(data, np.uint8)
    index = _extents_before(header, layers.start)
    for layer in layers:
        place = header.places[layer]
        count = place.heads * place.blocks
        mine = header.extents[index : index + count]
        index += count
        runs = [mine] if len({size for _, size, _, _ in mine}) == 1 else [[extent] for extent in mine]
        done = 0
        for run in runs:
            offset, size = run[0][:2]
            rows = image[offset:][: len(run) * aligned(size)].reshape(len(run), -1)
            bad_sum = rows_crc(rows[:, :size]) != np.array([checksum for _, _, checksum, _ in run], np.uint32)
            bad = bad_sum | rows[:, size:].any(axis=1)
            if bad.any():
                i = int(np.argmax(bad))
                raise broken("checksum" if bad_sum[i] else "padding", _named(place, layer, done + i))
            done += len(run)


def _extents_before(header: _Header, layer: int) -> int:
    return sum(place.heads * place.blocks for place in header.places[:layer])


def page_verify(data: Buffer, /) -> None:
    """Check every checksum of a page file; `PageError` for the first that fails."""
    view = memoryview(data).cast("B")
    header = opened(view)
    _check_extents(view, header, range(len(header.layers)))


def page_read(  # noqa: PLR0917
    data: Buffer, keys: Sequence[Any], values: Sequence[Any], at: int, check: bool = True, first: int = 0, /
) -> None:
    """Decode layers ``first ..`` of a page file into ``keys[i]``, ``values[i]``, positions ``at .. at + grid``."""
    view = memoryview(data).cast("B")
    header = opened(view)
    pairs = _pairs(keys, values, writable=True)
    if first >= len(header.layers) or len(pairs) > len(header.layers) - first:
        raise ValueError(
            f"the page has {len(header.layers)} layers, room for {len(pairs)} from layer {first} on was given"
        )
    for i, pair in enumerate(pairs):
        _check_fit(pair, i, shape=header.layers[first + i], item=ITEMS[header.dtype], at=at, grid=header.grid)
    import numpy as np

    if any(np.may_share_memory(array, np.frombuffer(view, np.uint8)) for pair in pairs for array in pair):
        raise ValueError("a page can't be read into its own bytes")
    if check:
        _check_extents(view, header, range(first, first + len(pairs)))
    index = _extents_before(header, first)
    for layer, (key, value) in enumerate(pairs, first):
        place = header.places[layer]
        for i in range(place.heads * place.blocks):
            offset, size, _, used = header.extents[index]
            index += 1
            start = at + i % place.blocks * place.block
            head = i // place.blocks
            parts = key[head, start : start + place.block], value[head, start : start + place.block]
            try:
                codec.decode(used, header.dtype, bytes(view[offset : offset + size]), *parts)
            except ValueError:
                raise broken("encoding", _named(place, layer, i)) from None


def prefault(data: Buffer, fd: int = -1, /) -> None:
    """Map all of a file mapping now; OSError where it can't be read. Needs the C extension: here it does nothing."""


def reserve(data: Buffer, /) -> None:
    """Let a fresh buffer get its memory in huge pages. Needs the C extension: here it does nothing."""


def write_behind(fd: int, /) -> None:
    """Begin to bring the file to the disk. Needs the C extension: here it does nothing."""
