"""Attention in place in numpy: the twin of native/attend*.c, operation by operation, so that bits are equal.

Knows prefixes of blocks and one call of attention over them; native/README.md says what is computed and in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import codec as codecs
from . import page, quantized
from .rules import broken

if TYPE_CHECKING:
    import numpy.typing as npt
    from typing_extensions import Buffer

    Array = npt.NDArray[Any]  # float32 but at the borders

__all__ = ["Prefix"]

BLOCK, GROUP, SPAN, PARTS, MAX_DIM = 64, 64, 16, 16, 256
ATTENDABLE = (codecs.RAW, quantized.INT8, quantized.K8V4, quantized.INT4)
KEY_CODES, VALUE_CODES = 32639.0, 32767.0
TINY = 2.0**-100
MAGIC = 1.5 * 2.0**23
LOWEST = -3.4028234663852886e38
COEFFICIENTS = tuple(
    map(
        float.fromhex,
        ("0x1.5bba14p-10", "0x1.3cea88p-7", "0x1.c6b752p-5", "0x1.ebf9bcp-3", "0x1.62e42ap-1", "0x1p0"),
    )
)


class _Piece(NamedTuple):
    """A block in all layers: ``places[layer][head]`` has its codec and bytes; the first ``used`` rows count."""

    first: int
    rows: int
    used: int
    segment: int
    places: list[list[tuple[int, Buffer]]]


class _Segment(NamedTuple):
    cosine: Array
    sine: Array
    pieces: int
    tokens: int
    bytes: int


class Prefix:
    """KV states that queries attend to where they lie: segments of blocks of pages. Keeps their buffers."""

    def __init__(self, dtype: int, layers: Sequence[tuple[int, int, int]], /) -> None:
        import numpy as np

        if dtype not in page.ITEMS:
            raise broken("dtype")
        if not 1 <= len(layers) <= page.MAX_LAYERS:
            raise broken("layers")
        for heads, *dims in layers:
            if not (1 <= heads <= page.MAX_HEADS and all(1 <= dim <= MAX_DIM for dim in dims)):
                raise ValueError(f"attention in place takes 1 to {page.MAX_HEADS} heads and 1 to {MAX_DIM} dimensions")
        self._dtype = dtype
        self._layers = tuple(layers)
        self._pieces: list[_Piece] = []
        empty = np.empty(0, np.float32)
        self._segments = [_Segment(empty, empty, 0, 0, 0)]
        self._tokens = self._bytes = 0

    @property
    def tokens(self) -> int:
        """Positions in all segments."""
        return self._tokens

    @property
    def bytes(self) -> int:
        """Bytes of the blocks that attention reads, of all layers."""
        return self._bytes

    def append_page(self, data: Buffer, first: int = 0, count: int = -1, /) -> None:
        """Tokens ``first .. first + count`` of a page file's bytes, kept where they are, at the end."""
        view = memoryview(data).cast("B")
        header = page.opened(view)
        if header.dtype != self._dtype or header.layers != self._layers:
            raise ValueError("the page has another dtype, or layers of other shapes, than the prefix")
        self._append(
            header.grid, [(offset, size, used) for offset, size, _, used in header.extents], view, first, count
        )

    def append_encoded(self, grid: int, table: Buffer, body: Buffer, first: int = 0, count: int = -1, /) -> None:
        """The same of what `page_encode` returned."""
        entries = memoryview(table).cast("B")
        if len(entries) != page.extents_of(self._dtype, grid, self._layers) * page.TABLE_ENTRY.size:
            raise broken("extent")
        extents, offset = [], 0
        for size, _, used in page.TABLE_ENTRY.iter_unpack(entries):
            extents.append((offset, size, used))
            offset = page.aligned(offset + size)
        self._append(grid, extents, memoryview(body).cast("B"), first, count)

    def _append(self, grid: int, extents: list[tuple[int, int, int]], body: memoryview, first: int, count: int) -> None:
        rows = min(BLOCK, grid)
        count = grid - first if count < 0 else count
        if not (0 <= first < grid and first % rows == 0 and 1 <= count <= grid - first):
            raise ValueError(
                "there are no such tokens: first is a multiple of the block inside of the page, count at least 1 and "
                "no more than what follows"
            )
        wanted = range(first // rows, first // rows - (-count // rows))
        places: list[list[list[tuple[int, Buffer]]]] = [[[] for _ in self._layers] for _ in wanted]
        found, total = iter(extents), 0
        for layer, (heads, *dims) in enumerate(self._layers):
            shape = (self._dtype, rows, dims[0], dims[1])
            for _ in range(heads):
                for block in range(grid // rows):
                    offset, size, used = next(found)
                    if used not in codecs.CODECS:
                        raise broken("codec")
                    if not codecs.good_size(used, *shape, size) or offset + size > len(body):
                        raise broken("extent")
                    if block not in wanted:
                        continue
                    if used not in ATTENDABLE:
                        raise ValueError(
                            "a block is in a lossless codec, which can't be attended to in place: decode it"
                        )
                    content = body[offset : offset + size]
                    if used != codecs.RAW and not quantized.sound(used, content, shape[1:]):
                        raise broken("encoding")
                    places[block - wanted.start][layer].append((used, content))
                    total += size
        for i, each in enumerate(places):
            used = rows if i + 1 < len(places) else count - rows * i
            self._pieces.append(_Piece(self._tokens, rows, used, len(self._segments) - 1, each))
            self._tokens += used
        self._bytes += total

    def begin_segment(self, cosine: Buffer, sine: Buffer, /) -> None:
        """Queries are turned by these angles, float32 each, for what is appended from now on."""
        import numpy as np

        parts = [bytes(memoryview(part).cast("B")) for part in (cosine, sine)]
        if len(parts[0]) != len(parts[1]) or len(parts[0]) % 4 or len(parts[0]) // 4 > MAX_DIM:
            raise ValueError("cosine and sine are float32, one of each per pair of channels")
        turn = [np.frombuffer(part, np.float32) for part in parts]
        if any(2 * len(turn[0]) > key_dim for _, key_dim, _ in self._layers):
            raise ValueError(f"{len(turn[0])} pairs are more channels than a key has")
        self._segments.append(_Segment(turn[0], turn[1], len(self._pieces), self._tokens, self._bytes))

    def truncate_segments(self, count: int, /) -> None:
        """Keep the first ``count`` segments and let go of the others' buffers."""
        if not 1 <= count <= len(self._segments):
            raise ValueError(
                f"{count} segments can't be kept: there are {len(self._segments)}, and the first one stays"
            )
        if count < len(self._segments):
            following = self._segments[count]
            self._tokens, self._bytes = following.tokens, following.bytes
            del self._pieces[following.pieces :], self._segments[count:]

    def attend(  # noqa: PLR0917 (as the C method)
        self,
        layer: int,
        query: Any,
        key: Any,
        value: Any,
        tail_keys: Any,
        tail_values: Any,
        length: int,
        out: Any,
        scale: float,
        window: int,
        threads: int,
        seen: Any = None,
        /,
    ) -> None:
        """softmax(scale * q k^T) v of new tokens over the prefix and the tail, into ``out``; see native/README.md."""
        import numpy as np

        if not 0 <= layer < len(self._layers):
            raise ValueError(f"there is no layer {layer} of {len(self._layers)}")
        if threads < 1 or window < 0:
            raise ValueError(f"threads ({threads}) is at least 1, window ({window}) 0 or more")
        if window and len(self._segments) > 1:
            raise ValueError(f"a window has no meaning over {len(self._segments)} segments")
        heads, key_dim, value_dim = self._layers[layer]
        queries = self._array("query", query, (-1, -1, key_dim), 1)
        total, n, _ = queries.shape
        if total < heads or total % heads or n < 1:
            raise ValueError(f"query is [{total}, {n}, ..]: heads must be a multiple of {heads}, tokens at least 1")
        new_keys = self._array("key", key, (heads, n, key_dim), 1)
        new_values = self._array("value", value, (heads, n, value_dim), 1)
        keys = self._array("tail_keys", tail_keys, (heads, -1, key_dim), 2, writable=True)
        values = self._array("tail_values", tail_values, (heads, keys.shape[1], value_dim), 2, writable=True)
        output = self._array("out", out, (n, total, value_dim), 3, writable=True)
        if not 0 <= length <= keys.shape[1] - n:
            raise ValueError(f"a tail of {keys.shape[1]} tokens has no room for {n} behind {length}")
        limits = None if seen is None else np.frombuffer(memoryview(seen).cast("B"), np.uint8)
        if limits is not None:
            limits = limits.view(np.uint32) if len(limits) == 4 * n else np.zeros(1, np.uint32)
            if not limits.all():
                raise ValueError("seen has a u32 for each query: of the segments it sees the first so many, 1 at least")
        end = length + n
        keys[:, length:end], values[:, length:end] = new_keys, new_values
        group, rows = total // heads, n * (total // heads)
        with np.errstate(all="ignore"):
            for head in range(heads):
                mine = queries[head * group : (head + 1) * group].transpose(1, 0, 2).reshape(rows, key_dim)
                call = _Call(self, layer, head, mine, scale, n, end, window)
                if limits is not None:
                    call.limits = np.repeat(limits, group)
                result = call.attended(keys[head, :end], values[head, :end])
                result = np.where(np.isnan(result), np.float32(np.nan), result)  # one of them, as in C
                part = quantized.stored(self._dtype, result).reshape(n, group, value_dim)
                output[:, head * group : (head + 1) * group] = part.view(output.dtype)

    def _array(
        self, name: str, buffer: Any, shape: tuple[int, int, int], tight: int, *, writable: bool = False
    ) -> npt.NDArray[Any]:
        """The values as float32, float16 or uint16; ValueError unless it has this shape (-1: any)."""
        import numpy as np

        view = memoryview(buffer)
        if writable and view.readonly:
            raise BufferError(f"{name} is read-only")
        array, item = np.asarray(view), page.ITEMS[self._dtype]
        step, wrong = item, array.ndim != 3 or array.itemsize != item
        wrong = wrong or any(asked not in (-1, found) for asked, found in zip(shape, array.shape, strict=True))
        for axis in (2, 1, 0)[: 0 if wrong else tight]:
            wrong = wrong or (array.shape[axis] > 1 and array.strides[axis] != step)
            step *= array.shape[axis]
        if wrong:
            raise ValueError(
                f"{name} must be {list(shape)} (-1: any) of {item}-byte values, contiguous in its last {tight} axes"
            )
        return array.view({1: np.float32, 2: np.float16, 3: np.uint16}[self._dtype])


def _power(x: Array) -> Array:
    """2 to the power of each, for numbers up to 0; 0 below -126.5."""
    import numpy as np

    one = np.float32
    x = np.where(one(-127) > x, one(-127), x)
    rounded = x + one(MAGIC)
    part = x - (rounded - one(MAGIC))
    total = np.full_like(part, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        total = total * part + one(coefficient)
    result: Array = total * ((rounded.view(np.int32) - np.int32(0x4B400000 - 127)) << 23).view(np.float32)
    return result


def _folded(lanes: Array) -> Array:
    """The sum over 16 lanes: upper half on lower half, until one is left."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def _lane_sum(products: Array) -> Array:
    """The sum over the last axis: by lanes of 16, then across."""
    import numpy as np

    lanes = np.zeros((*products.shape[:-1], 16), np.float32)
    for start in range(0, products.shape[-1], 16):
        part = products[..., start : start + 16]
        lanes[..., : part.shape[-1]] += part
    return _folded(lanes)


def _coded(values: Array, most: float) -> tuple[Array, Array]:
    """Codes (float64, whole) of each row, and what a code is worth."""
    import numpy as np

    largest = np.abs(values).max(-1)
    small = ~(largest >= np.float32(TINY))
    inverse = np.where(small, np.float32(0), np.float32(most) / largest)
    codes = (values * inverse[:, None] + np.float32(MAGIC)) - np.float32(MAGIC)
    return codes.astype(np.float64), np.where(small, np.float32(0), largest / np.float32(most))


class _Partial(NamedTuple):
    """Of some rows over some blocks: unnormalised output, sums in lanes, largest score."""

    out: Array
    sums: Array
    largest: Array


class _Call:
    """Attention of the rows of one KV head: token by token, its query heads in turn."""

    def __init__(  # noqa: PLR0917
        self, prefix: Prefix, layer: int, head: int, query: Array, scale: float, n: int, tail: int, window: int
    ) -> None:
        import numpy as np

        self._prefix, self._layer, self._head = prefix, layer, head
        self._dtype = prefix._dtype
        self._dims = prefix._layers[layer][1:]
        factor = np.float32(scale) * np.float32(float.fromhex("0x1.715476p+0"))
        self._query = quantized.floats(self._dtype, query) * factor
        self._own = prefix._tokens + tail - n + np.arange(len(query)) // (len(query) // n)
        self._window = window
        #: Of each row: how many segments it sees, where that is not all.
        self.limits: Array | None = None

    def attended(self, keys: Array, values: Array) -> Array:
        """The output [rows, value_dim] over the prefix and this tail."""
        import numpy as np

        pieces, rows = self._prefix._pieces, len(self._query)
        tails = -(-len(keys) // BLOCK)
        blocks = len(pieces) + tails
        groups = -(-rows // GROUP)
        alone = groups * self._prefix._layers[self._layer][0] >= PARTS
        step = blocks if alone else SPAN
        found = [self._span(range(at, min(at + step, blocks)), keys, values) for at in range(0, blocks, step)]
        most = np.full(rows, LOWEST, np.float32)
        for part in found:
            most = np.where(part.largest > most, part.largest, most)
        total, out = np.zeros(rows, np.float32), np.zeros((rows, self._dims[1]), np.float32)
        for part in found:
            weight = _power(part.largest - most)
            total = total + _folded(part.sums) * weight
            out = out + part.out * weight[:, None]
        return out * (np.float32(1) / total)[:, None]

    def _span(self, blocks: range, keys: Array, values: Array) -> _Partial:
        import numpy as np

        rows, prefix = len(self._query), self._prefix
        state = _Partial(
            np.zeros((rows, self._dims[1]), np.float32),
            np.zeros((rows, 16), np.float32),
            np.full(rows, LOWEST, np.float32),
        )
        for block in blocks:
            if block < len(prefix._pieces):
                piece = prefix._pieces[block]
                used, content = piece.places[self._layer][self._head]
                query = self._turned(prefix._segments[piece.segment])
                self._block(state, query, piece.first, piece.used, piece.rows, used, content, piece.segment)
            else:
                at = (block - len(prefix._pieces)) * BLOCK
                pair = keys[at : at + BLOCK], values[at : at + BLOCK]
                self._block(state, self._query, prefix._tokens + at, len(pair[0]), BLOCK, codecs.RAW, pair)
        return state

    def _turned(self, segment: _Segment) -> Array:
        pairs, query = len(segment.cosine), self._query
        if not pairs:
            return query
        query = query.copy()
        a, b = self._query[:, :pairs], self._query[:, pairs : 2 * pairs]
        query[:, :pairs] = a * segment.cosine + b * segment.sine
        query[:, pairs : 2 * pairs] = b * segment.cosine - a * segment.sine
        return query

    def _block(  # noqa: PLR0917
        self, state: _Partial, query: Array, first: int, used: int, rows: int, kind: int, content: Any, segment: int = 0
    ) -> None:
        """Adds one block's part to the rows that see any of it."""
        import numpy as np

        high = np.clip(self._own + 1 - first, 0, used)
        if self.limits is not None:
            high[self.limits <= segment] = 0
        low = np.clip(self._own + 1 - self._window - first, 0, used) if self._window else np.zeros_like(high)
        seeing = np.flatnonzero(low < high)
        if not len(seeing):
            return
        query = query[seeing]
        token = np.arange(used)
        seen = (token >= low[seeing, None]) & (token < high[seeing, None])
        block = None if kind == codecs.RAW else quantized.unpacked(kind, self._dtype, content, (rows, *self._dims))
        values = np.empty(0, np.float32)
        if block is None:
            pair = self._raw(content, rows) if isinstance(content, memoryview) else content
            keys, values = (quantized.floats(self._dtype, part[:used]) for part in pair)
            scores = np.zeros((len(seeing), used), np.float32)
            for channel in range(self._dims[0]):
                scores = scores + keys[:, channel] * query[:, channel, None]
        else:
            scores = self._coded_scores(query, block, used)
        scores = np.where(seen, scores, np.float32(LOWEST))
        before = state.largest[seeing]
        now = np.maximum(scores.max(1), before)
        decay = _power(before - now)
        weights = np.where(seen, _power(scores - now[:, None]), np.float32(0))
        sums = state.sums[seeing] * decay[:, None]
        for start in range(0, used, 16):
            part = weights[:, start : start + 16]
            sums[:, : part.shape[1]] += part
        state.sums[seeing], state.largest[seeing] = sums, now
        if block is None:
            added = np.zeros((len(seeing), self._dims[1]), np.float32)
            for t in range(used):
                added = added + values[t] * weights[:, t, None]
        else:
            added = self._coded_values(weights, block, used)
        state.out[seeing] = state.out[seeing] * decay[:, None] + added

    def _raw(self, content: memoryview, rows: int) -> tuple[Array, Array]:
        import numpy as np

        kind = {1: np.float32, 2: np.float16, 3: np.uint16}[self._dtype]
        flat: Array = np.frombuffer(content, kind)
        split = rows * self._dims[0]
        return flat[:split].reshape(rows, -1), flat[split:].reshape(rows, -1)

    @staticmethod
    def _coded_scores(query: Array, block: quantized.Unpacked, used: int) -> Array:
        import numpy as np

        groups = len(block.scales)
        step = quantized.TOKENS if groups > 1 else used
        found = []
        for group, start in enumerate(range(0, used, step)):
            codes, worth = _coded(query * block.scales[group], KEY_CODES)
            bias = _lane_sum(query * block.minima[group])
            exact = codes @ block.keys[start : min(start + step, used)].T.astype(np.float64)
            found.append(exact.astype(np.float32) * worth[:, None] + bias[:, None])
        return np.concatenate(found, 1)

    def _coded_values(self, weights: Array, block: quantized.Unpacked, used: int) -> Array:
        import numpy as np

        found = []
        step = quantized.CHANNELS if block.value_minima is not None else self._dims[1]
        for group, start in enumerate(range(0, self._dims[1], step)):
            codes, worth = _coded(weights * block.value_scales[group, :used], VALUE_CODES)
            exact = codes @ block.values[:used, start : start + step].astype(np.float64)
            part = exact.astype(np.float32) * worth[:, None]
            if block.value_minima is not None:
                part = part + _lane_sum(weights * block.value_minima[group, :used])[:, None]
            found.append(part)
        return np.concatenate(found, 1)
