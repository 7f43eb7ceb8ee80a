"""Attention over KV pages where they lie: the functions that transformers calls, and the cache they read.

Knows transformers' attention and mask interfaces and one native call per layer; knows nothing of prompts, of how pages
are stored or of which models are fit for it (_local_in_place.py tries that). One sequence at a time (batch 1).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from agentmem._pure import kernels
from agentmem.activation.pages import DTYPES, Codec, Dtype, Encoded, encode
from agentmem.errors import InvalidInput, Unavailable
from agentmem.types import Attended

from ._local_device import as_array

__all__ = ["CODECS", "NAMES", "VERSION", "PagedCache", "PagedLayer", "Stretch", "attending", "probing", "seeing"]

#: Of the numerics. Part of the identity of pages that were computed so.
VERSION = 1
#: Codecs that are read in place.
CODECS: frozenset[Codec] = frozenset({"raw", "int8", "k8v4", "int4"})
#: The compute dtypes as a page's header calls them.
NAMES: dict[torch.dtype, Dtype] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

#: What our functions are called in transformers' registers.
_REGISTERED = "agentmem_in_place"
#: Arguments that say nothing about which positions a query sees or how they count.
_SILENT = frozenset({"position_ids", "cache_position", "use_cache", "return_dict", "output_hidden_states"})
_BLOCK = 64


class _Handed(threading.local):
    """What the cache hands to the attention function, which transformers calls right after it, in the same thread."""

    layer: PagedLayer | None = None
    #: Of the segments, each token of a pass sees the first so many; None: all.
    seen: npt.NDArray[np.uint32] | None = None
    #: Positions at which the masks of a model under trial are compared; empty else.
    probes: tuple[int, ...] = ()


_handed = _Handed()


@dataclass(frozen=True)
class Stretch:
    """Stored states that stand at another place than where they were computed: tokens ``first .. first + count``
    (-1: to the end) of a page file's bytes ``data``.

    ``cosine`` and ``sine``, float32 [rotary pairs], are of the angles (place now - place then) x frequency; queries are
    turned back by them (`agentmem._native.Prefix.begin_segment`).
    """

    data: Any
    cosine: npt.NDArray[np.float32]
    sine: npt.NDArray[np.float32]
    first: int = 0
    count: int = -1


class PagedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer of a `PagedCache`: ``tail`` [KV heads, grid, dim] of K and V for the tokens behind the sealed ones."""

    def __init__(self, cache: PagedCache, index: int, tail: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prefix = cache.prefix  # not the cache: in a circle it would hold its pages until the collector comes
        self.index = index
        self.tail = tail
        self.length = 0  # tokens in the tail, those of the pass under way included
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the new states to the attention function, which puts them behind the tail. Stores nothing itself."""
        if key_states.shape[0] != 1:
            raise InvalidInput(f"attention in place takes one sequence, not a batch of {key_states.shape[0]}")
        if self.new is not None:
            raise InvalidInput(f"layer {self.index} was given new states before attention read the last ones")
        self.new = key_states, value_states
        self.length += key_states.shape[2]
        _handed.layer = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return int(self.prefix.tokens) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class PagedCache(DynamicCache):
    """KV states as sealed pages, read where they lie, and a tail of at most ``grid`` tokens in the compute dtype.

    ``shapes`` has (KV heads, dimensions of a key, of a value) of each layer. For forward passes inside `attending`.
    Call `seal` whenever the tail holds ``grid`` tokens: there is no room for more.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, *, grid: int, codec: Codec = "raw"
    ) -> None:
        super().__init__()
        self.grid = grid
        self.codec: Codec = codec
        self.prefix: Any = kernels().Prefix(DTYPES[NAMES[dtype]], list(shapes))
        #: What one position takes in the compute dtype, all layers, in bytes.
        self.position_bytes = dtype.itemsize * sum(heads * (key + value) for heads, key, value in shapes)
        self.record_tokens = 0
        # Memory of its own, in small pages that come with their first use and can be given back: a buffer for a whole
        # page of the grid would otherwise be most of what a short chat holds.
        size = self.position_bytes * grid
        try:
            self._memory = mmap.mmap(-1, size)
        except OSError as error:
            raise Unavailable(
                f"no memory for the KV states of {grid} tokens ({size} bytes): {error.strerror}"
            ) from error
        slab = np.frombuffer(self._memory, as_array(torch.empty(0, dtype=dtype)).dtype)
        layers, at = [], 0
        for index, (heads, *dims) in enumerate(shapes):
            parts = []
            for dim in dims:
                size = heads * grid * dim
                parts.append(slab[at : at + size].reshape(heads, grid, dim))
                at += size
            layers.append(PagedLayer(self, index, (parts[0], parts[1])))
        self.layers: list[Any] = layers
        self._segments = 1
        self._turned = False  # what is appended now would belong to a stretch from elsewhere

    @property
    def tail(self) -> int:
        """Tokens that are not sealed."""
        return int(self.layers[0].length)

    @property
    def tail_bytes(self) -> int:
        """What the tail takes: whole memory pages of every head that hold any of it."""
        heads = (part for layer in self.layers for side in layer.tail for part in side[:, : layer.length])
        return sum(-(-part.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for part in heads)

    @property
    def full(self) -> bool:
        """Whether the tail has to be sealed before the next pass."""
        return self.tail == self.grid

    def attending(self, config: Any) -> contextlib.AbstractContextManager[None]:
        """Inside, passes of the model with this text config read this cache. Hold the model's lock."""
        return attending(config)

    def attended(self) -> Attended:
        """What a query reads in place now."""
        tokens = int(self.prefix.tokens)
        return Attended(
            codec=self.codec,
            tokens=tokens,
            bytes=int(self.prefix.bytes),
            stock_bytes=tokens * self.position_bytes,
            record_tokens=self.record_tokens,
        )

    def append(self, data: Any) -> None:
        """A page file's bytes behind all that is sealed; they are kept, not copied. ValueError if they don't fit."""
        self._straight()
        self.prefix.append_page(data)

    def append_encoded(self, encoded: Encoded) -> None:
        """As `append`, for what `agentmem.activation.pages.encode` gave."""
        self._straight()
        self.prefix.append_encoded(encoded.layout.grid, encoded.table, encoded.body)

    def seal(self) -> Encoded:
        """The full tail as a page of the codec, which is read instead of it from now on."""
        if not self.full:
            raise InvalidInput(f"a tail of {self.tail} tokens is no page of {self.grid}")
        return self._sealed(0, self.grid, self.codec)

    def tail_rows(self, count: int) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """Copies of the first ``count`` states of the tail, per layer (K, V), each [KV heads, count, dim]."""
        return [(layer.tail[0][:, :count].copy(), layer.tail[1][:, :count].copy()) for layer in self.layers]

    def refill(self, rows: Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]], count: int) -> None:
        """Put the first ``count`` of such states into an empty tail."""
        for layer, sides in zip(self.layers, rows, strict=True):
            for tail, states in zip(layer.tail, sides, strict=True):
                tail[:, :count] = states[:, :count]
            layer.length = count

    def flush(self) -> None:
        """Seal what the tail holds, however little: whole blocks in the codec, the few tokens behind them raw."""
        tail = self.tail
        whole = tail if tail == self.grid else tail // _BLOCK * _BLOCK
        if whole:
            self._sealed(0, whole, self.codec)
        if tail > whole:
            self._sealed(whole, tail - whole, "raw")

    def _sealed(self, at: int, count: int, codec: Codec) -> Encoded:
        encoded = encode([layer.tail for layer in self.layers], count, at, codec)
        self.append_encoded(encoded)
        for layer in self.layers:
            layer.length -= count
        if not self.tail and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)  # what it held is in the page now
        return encoded

    def attach(self, stretches: Sequence[Stretch]) -> int:
        """Stored states as if their tokens came next; positions go on behind them. The tail is flushed before.

        Neighbours with the very same ``cosine`` stand at one distance and are one segment. Returns how many segments
        stand before them.
        """
        self.flush()
        standing = self._segments
        angles: object = None
        for stretch in stretches:
            if stretch.cosine is not angles:
                self.prefix.begin_segment(stretch.cosine, stretch.sine)
                self._segments += 1
                self._turned, angles = True, stretch.cosine
            before = self.prefix.tokens
            self.prefix.append_page(stretch.data, stretch.first, stretch.count)
            self.record_tokens += self.prefix.tokens - before
        return standing

    def _straight(self) -> None:
        if self._turned:
            self.prefix.begin_segment(np.ones(1, np.float32), np.zeros(1, np.float32))
            self._segments += 1
            self._turned = False


# -- what transformers calls -------------------------------------------------------------------------------------------


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of ``query`` [1, heads, n, dim] over the cache that ``key`` and ``value`` were just put into.

    Returns [1, n, heads, value dim] and no weights. Raises `InvalidInput` for what it can't compute.
    """
    layer, _handed.layer = _handed.layer, None
    if layer is None or layer.new is None or key is not layer.new[0] or value is not layer.new[1]:
        raise InvalidInput(f"{type(module).__name__} attends to other states than it put into the cache")
    layer.new = None
    for name, given in others.items():
        if given is not None and given is not False and name not in _SILENT and not (name == "is_causal" and given):
            raise InvalidInput(f"attention in place knows no {name} ({type(module).__name__})")
    if dropout or getattr(module, "is_causal", True) is not True or others.get("is_causal") is False:
        raise InvalidInput(f"attention in place is causal and drops nothing ({type(module).__name__})")
    window = sliding_window or 0
    if attention_mask is not None:
        _compare(attention_mask, window, module)
    count = query.shape[2]
    if count != key.shape[2] or layer.length > layer.tail[0].shape[1]:
        raise InvalidInput(f"{count} queries and {key.shape[2]} new states for a tail of {layer.length} tokens")
    out = torch.empty((1, count, query.shape[1], value.shape[3]), dtype=query.dtype)
    layer.prefix.attend(
        layer.index,
        _bits(query),
        _bits(key),
        _bits(value),
        *layer.tail,
        layer.length - count,
        _bits(out),
        1 / math.sqrt(query.shape[3]) if scaling is None else float(scaling),
        window,
        torch.get_num_threads(),
        _handed.seen,
    )
    return out, None


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor [1, ..] without its first dimension, as `as_array` but with less ceremony: four times a layer."""
    array: npt.NDArray[Any] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array[0]  # type: ignore[no-any-return]


def _mask(
    *,
    batch_size: int = 1,
    mask_function: Callable[..., torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """None, since `_attend` does causality and windows itself. Refused is what it doesn't do.

    Under trial: whether a query at the probed positions [row] sees those [column], to be compared in `_attend`.
    """
    if batch_size != 1:
        raise InvalidInput(f"attention in place takes one sequence, not a batch of {batch_size}")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InvalidInput("attention in place takes no padding and no hidden tokens: leave attention_mask out")
    if use_vmap:
        raise InvalidInput("attention in place takes no mask of the model's own")
    if not _handed.probes or mask_function is None:
        return None
    places = torch.tensor(_handed.probes)
    zero = torch.zeros((), dtype=torch.long)
    seen = mask_function(zero, zero, places[:, None], places[None, :])
    return seen.expand(len(places), len(places))[None, None]


def _compare(mask: torch.Tensor, window: int, module: Any) -> None:
    if not _handed.probes:
        raise InvalidInput("attention in place takes no attention_mask")
    places = torch.tensor(_handed.probes)
    query, key = places[:, None], places[None, :]
    seen = key <= query
    if window:
        seen &= key > query - window
    if mask.shape != (1, 1, *seen.shape) or mask.dtype != torch.bool or not torch.equal(mask[0, 0], seen):
        name = type(module).__name__
        raise InvalidInput(
            f"{name} masks other positions than the future and what left its window of {window or 'all'}"
        )


AttentionInterface.register(_REGISTERED, _attend)
AttentionMaskInterface.register(_REGISTERED, _mask)


@contextlib.contextmanager
def attending(config: Any, attention: str = _REGISTERED) -> Generator[None]:
    """Inside, the model with this text config attends in place (or by another function of transformers' register).

    Hold the model's lock: others see the same config.
    """
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before
        _handed.layer = None


@contextlib.contextmanager
def seeing(segments: Sequence[int]) -> Generator[None]:
    """Inside, token i of this thread's one pass sees the first ``segments[i]`` segments of the cache and no others."""
    _handed.seen = np.asarray(segments, np.uint32)
    try:
        yield
    finally:
        _handed.seen = None


@contextlib.contextmanager
def probing(window: int) -> Generator[None]:
    """Inside, this thread's passes also compare the model's masks with what attention in place does, far beyond the
    tokens given: around ``window``, and at positions that no trial reaches."""
    around = {0, 1, 2, 62, 63, 64, 65, 1000, 5000, 131_071}
    around |= {place for at in (window, 2 * window, 5000 + window) for place in range(max(at - 2, 0), at + 3)}
    _handed.probes = tuple(sorted(around))
    try:
        yield
    finally:
        _handed.probes = ()
