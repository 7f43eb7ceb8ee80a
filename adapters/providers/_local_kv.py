"""KV states of the local model: computed on the token grid, taken from stored pages, handed out to be sealed.

Knows transformers' cache layers, which architectures can be cut into pages, and how to get the same bits again; knows
nothing of prompts, sampling or how pages are stored. One sequence at a time (batch 1).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy.typing as npt
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from agentmem._pure import kernels
from agentmem.errors import AgentMemError
from agentmem.provider import Pages

from ._local_device import Loading, as_array, to_host

__all__ = ["GRID", "STEADY_ROPE", "Forward", "States", "leading", "ropes", "unsafe_architecture"]

log = logging.getLogger("agentmem")

#: Tokens per prefill step where no page store says otherwise. The same with and without pages: the bits depend on it.
GRID = 256

#: Rope types whose angles don't depend on how long the sequence is (dynamic and longrope do).
STEADY_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
_ATTENTION = ("full_attention", "sliding_attention")
_TEST = (16, 8)
LINE = 64  # bytes of a cache line

#: Of a layer: KV heads, dimensions of a key and of a value, dtype.
Shape = tuple[int, int, int, torch.dtype]
#: Runs the model on the tokens that follow what a cache holds; gives the last one's logits [vocabulary] and the cache.
Forward = Callable[[Sequence[int], Any], tuple[torch.Tensor, Any]]


class PrefixLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer that keeps every position and appends in place.

    The stock layer concatenates all keys and values for every token. This one writes into a buffer made once,
    [1, KV heads, capacity, head dim], and hands out views of it. Layers with a sliding window keep everything too: the
    mask does the window, and any prefix can be taken out again.
    """

    def __init__(self, capacity: int, keys: torch.Tensor | None = None, values: torch.Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._length = 0
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._ready: Callable[[], None] | None = None
        self._places: torch.Tensor | None = None
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self._buffers = (keys, values)

    def restored(self, length: int, ready: Callable[[], None] | None = None) -> None:
        """The first ``length`` positions of the buffers were filled from outside, or will be when ``ready`` returns."""
        self._length = length
        self._ready = ready
        self._show()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._ready is not None:
            self._ready()
            self._ready = None
        places, self._places = self._places, None
        end = self._length + (key_states.shape[-2] if places is None else 0)
        self._reserve(end, key_states, value_states)
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            if places is None:
                buffer[:, :, self._length : end] = new
            else:
                buffer[:, :, places] = new
        self._length = end
        return self._show()

    def place(self, at: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put states [KV heads, n, head dim] that were computed elsewhere to positions ``at ..``. It then holds all
        positions up to their end; those between that nobody filled are to be filled by `scatter`."""
        end = at + keys.shape[1]
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        self._reserve(end, keys[None], values[None])
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[0, :, self._length : at] = 0  # masked until it is filled, but 0 times whatever was there may be NaN
            buffer[0, :, at:end] = new
        self._length = max(self._length, end)
        self._show()

    def scatter(self, places: torch.Tensor) -> None:
        """The states of the next pass belong to these positions, one each, and no others come of it."""
        end = max(self._length, int(places.max()) + 1)
        assert self._buffers is not None
        self._reserve(end, *self._buffers)
        for buffer in self._buffers:
            buffer[:, :, self._length : end] = 0
        self._length, self._places = end, places
        self._show()

    def _reserve(self, end: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for ``end`` positions of such states."""
        if self._buffers is None or end > self._capacity:
            self._capacity = max(self._capacity, end if self._buffers is None else end * 3 // 2)
            self._buffers = (self._grown(keys, 0), self._grown(values, 1))

    def _grown(self, like: torch.Tensor, which: int) -> torch.Tensor:
        buffer = like.new_empty((*like.shape[:2], self._capacity, like.shape[3]))
        if self._buffers is not None:
            buffer[:, :, : self._length] = self._buffers[which][:, :, : self._length]
        return buffer

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._buffers is not None
        keys, values = (buffer[:, :, : self._length] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def unsafe_architecture(model: Any) -> str | None:
    """Why this model's KV states can't be cut into pages and put together again; None if nothing speaks against it."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} keeps a recurrent state, which can't be cut at a page"
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} takes no key-value cache"
    kinds = set(getattr(config, "layer_types", None) or ()) - set(_ATTENTION)
    if kinds:
        return f"{type(model).__name__} has layers of type {', '.join(sorted(kinds))}"
    if getattr(config, "num_kv_shared_layers", None):
        return f"{type(model).__name__} shares KV states between layers"
    for rope in ropes(config):
        if rope.get("rope_type", rope.get("type", "default")) not in STEADY_ROPE:
            return (
                f"its rotary positions ({rope.get('rope_type', rope.get('type'))}) depend on the length of the prompt"
            )
    return None


def ropes(config: Any) -> list[dict[str, Any]]:
    """The settings of the rotary positions in a text config, one per layer type where they differ."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    ropes: list[dict[str, Any]] = []
    for rope in found:
        if isinstance(rope, dict):
            nested = [value for value in rope.values() if isinstance(value, dict)]  # one per layer type
            ropes += nested or [rope]
    return ropes


class States:
    """The KV states of a model: how they are made, and whether they can be restored.

    ``miss`` is the reason why pages are not used, once that is known.
    """

    def __init__(self, model: Any, forward: Forward, device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._staged = device.type != "cpu"
        self._model = model
        self._layers = int(getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0))
        self.miss = unsafe_architecture(model)
        self._shapes: list[Shape] = []
        if self.miss is not None:
            log.warning("KV pages are off for this model: %s", self.miss)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """KV heads, dimensions of a key and of a value, of each layer; known once `check` said yes."""
        return [(heads, key, value) for heads, key, value, _ in self._shapes]

    @property
    def dtype(self) -> torch.dtype:
        """Of the states; known once `check` said yes."""
        return self._shapes[0][3]

    @property
    def gridded(self) -> bool:
        """Whether prefill runs in steps of the grid (else in one step with the model's own cache)."""
        return self.miss is None

    def empty(self, capacity: int) -> Any:
        """An empty cache with room for ``capacity`` positions; None stands for the model's own kind."""
        return self._cache([PrefixLayer(capacity) for _ in range(self._layers)]) if self.gridded else None

    def check(self) -> bool:
        """Whether pages can be used, after a small trial on this very model, once: prefill 24 tokens in two steps, put
        the first step's states into a new cache, continue, and compare bit for bit."""
        if self.miss is None and not self._shapes:
            try:
                self.miss = self._trial()
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                self.miss = f"the trial of restoring its KV states failed ({error})"
            if self.miss is not None:
                log.warning("KV pages are off for this model: %s", self.miss)
        return self.miss is None

    def _trial(self) -> str | None:
        first, rest = _TEST
        size = int(self._model.get_input_embeddings().num_embeddings)
        ids = [(7919 * i + 13) % size for i in range(first + rest)]
        live = self.empty(first + rest)
        self._forward(ids[:first], live)
        wanted, _ = self._forward(ids[first:], live)
        reason = self._unlike_pages(live, first + rest)
        if reason is not None:
            return reason
        shapes = [_shape(layer) for layer in live.layers]
        # Another capacity on purpose: where a state lies in memory must not matter.
        again, buffers = self._reserved(first + rest + 40, shapes)
        for layer, old, new in zip(again, live.layers, buffers, strict=True):
            new[0][:, :, :first] = old.keys[:, :, :first]
            new[1][:, :, :first] = old.values[:, :, :first]
            layer.restored(first)
        got, _ = self._forward(ids[first:], self._cache(again))
        if not torch.equal(wanted, got):
            return "its restored KV states don't give the same logits as live ones"
        self._shapes = shapes  # only now: another thread may ask meanwhile
        return None

    def _unlike_pages(self, cache: Any, length: int) -> str | None:
        """A page holds one K and one V per layer, each with one row per position, all of one dtype."""
        layers = cache.layers
        if len(layers) != self._layers or not all(
            type(layer) is PrefixLayer and layer.is_initialized for layer in layers
        ):
            return "its cache has other layers than attention layers"
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        if len({tensor.dtype for tensor in tensors}) != 1:
            return "its KV states have several dtypes"
        if any(tensor.shape[0] != 1 or tensor.shape[2] != length for tensor in tensors):
            return "its KV states have no row per position"
        if any(layer.keys.shape[1] != layer.values.shape[1] for layer in layers):
            return "its keys and values have different numbers of heads"
        return None

    # -- restore ---------------------------------------------------------------------------------------------------

    def restore(self, pages: Sequence[Any], grid: int, capacity: int) -> tuple[Any, int]:
        """A cache that begins with the states of ``pages``, and how many positions that are.

        A page that can't be read ends the prefix there. Only after `check` said yes. On another device than the CPU the
        pages are checked here and loaded while the first layers compute: then a forward pass raises `NotLoaded` for
        what goes wrong, and `leave` ends the loading.
        """
        if not pages:
            return self.empty(capacity), 0
        layers, buffers = self._reserved(max(capacity, len(pages) * grid), self._shapes)
        loading: Loading | None = None
        ready: list[Callable[[], None] | None]
        if self._staged:
            pages = pages[: leading(pages, lambda page, _: page.verify())]
            if pages:
                loading = Loading(pages, grid, [(key[0], value[0]) for key, value in buffers])
            ready = [None if loading is None else functools.partial(loading.wait, i) for i in range(len(layers))]
        else:
            keys, values = ([as_array(pair[side][0]) for pair in buffers] for side in (0, 1))
            count = leading(pages, lambda page, number: page.read_layers(keys, values, number * grid))
            pages, ready = pages[:count], [None] * len(layers)
        if not pages:
            return self.empty(capacity), 0
        length = len(pages) * grid
        for layer, when in zip(layers, ready, strict=True):
            layer.restored(length, when)
        cache = self._cache(layers)
        cache.loading = loading
        return cache, length

    def leave(self, cache: Any) -> None:
        """After a cache's last use, whatever happened: what still loads into it ends."""
        loading: Loading | None = getattr(cache, "loading", None)
        if loading is not None:
            loading.leave()

    def _reserved(
        self, capacity: int, shapes: Sequence[Shape]
    ) -> tuple[list[PrefixLayer], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Layers with room for ``capacity`` positions, and their buffers [1, KV heads, capacity, head dim].

        On a CPU they are cut from one piece of memory in huge pages: filling fresh memory in small ones is four times
        as slow as copying. Each begins at a cache line, so that a restore can write past the caches.
        """
        item = shapes[0][3].itemsize
        sizes = [
            math.ceil(heads * capacity * dim * item / LINE) * LINE // item for heads, *dims, _ in shapes for dim in dims
        ]
        slab = torch.empty(sum(sizes) + LINE // item, dtype=shapes[0][3], device=self._device)
        if slab.device.type == "cpu":
            kernels().reserve(as_array(slab))
        at = -slab.data_ptr() % LINE // item
        layers, pairs = [], []
        for i, (heads, *dims, _) in enumerate(shapes):
            pair = []
            for dim, size in zip(dims, sizes[2 * i : 2 * i + 2], strict=True):
                pair.append(slab[at : at + heads * capacity * dim].view(1, heads, capacity, dim))
                at += size
            layers.append(PrefixLayer(capacity, *pair))
            pairs.append((pair[0], pair[1]))
        return layers, pairs

    def _cache(self, layers: list[PrefixLayer]) -> Any:
        cache: Any = DynamicCache()
        cache.layers = layers
        return cache

    # -- seal ------------------------------------------------------------------------------------------------------

    def settle(self, pages: Pages, cache: Any, number: int) -> Any:
        """After page ``number`` was computed: with a codec that changes bits, go on with what it will be restored as.

        Returns what the codec made of it, for `seal`; None for a codec that changes nothing.
        """
        if not pages.lossy:
            return None
        start, end = number * pages.grid, (number + 1) * pages.grid
        if not self._staged:
            return pages.encode([(as_array(layer.keys[0]), as_array(layer.values[0])) for layer in cache.layers], start)
        sides = [part[0, :, start:end] for layer in cache.layers for part in (layer.keys, layer.values)]
        hosts = to_host(sides)
        encoded = pages.encode(list(zip(hosts[::2], hosts[1::2], strict=True)), 0)
        with torch.inference_mode():  # as the forward pass that made them
            for side, host in zip(sides, hosts, strict=True):
                side.copy_(_torch(host, side.dtype))
        return encoded

    def seal(
        self,
        pages: Pages,
        identity: bytes,
        cache: Any,
        *,
        tokens: Sequence[int],
        first: int,
        records: Sequence[tuple[str, ...]],
        encoded: Sequence[Any],
        seconds: float,
    ) -> int:
        """Hand pages ``first`` .. to the store, with the ``records`` of each and what `settle` gave for it.

        ``tokens`` end with the last page; computing the pages took ``seconds``. Returns how many positions it wrote.
        """
        layers: list[tuple[Any, Any]] = []  # a lossy codec has them already
        if not pages.lossy:
            start, end = first * pages.grid, len(tokens)
            hosts = to_host([part[0, :, start:end] for layer in cache.layers for part in (layer.keys, layer.values)])
            layers = list(zip(hosts[::2], hosts[1::2], strict=True))
        count = pages.seal(identity, tokens, first, layers, records, encoded=encoded, seconds=seconds)
        return count * pages.grid


def leading(pages: Sequence[Any], read: Callable[[Any, int], None]) -> int:
    """How many pages from the first on could be read. Each of torch's threads reads a run of neighbours."""
    failed: dict[int, AgentMemError] = {}

    def run(numbers: range) -> None:
        for number in numbers:
            try:
                read(pages[number], number)
            except AgentMemError as error:
                failed[number] = error
                return

    count = max(1, min(len(pages), torch.get_num_threads()))
    cuts = [len(pages) * i // count for i in range(count + 1)]
    mine, *others = (range(start, end) for start, end in itertools.pairwise(cuts))
    if others:
        # New threads each time: a pool that was kept would be without its threads in a forked child.
        with ThreadPoolExecutor(len(others)) as pool:
            jobs = [pool.submit(run, numbers) for numbers in others]
            run(mine)
        for job in jobs:
            job.result()
    else:
        run(mine)
    if failed:
        number = min(failed)
        log.warning("a KV page could not be read and is computed again: %s", failed[number])
        return number
    return len(pages)


def _shape(layer: PrefixLayer) -> Shape:
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], layer.keys.dtype


def _torch(array: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array.view("int16") if dtype == torch.bfloat16 else array)
    return tensor.view(dtype)
