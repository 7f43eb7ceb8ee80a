"""KV states that are attended to in place: for which requests, made how, restored from pages without a copy.

Knows when a model and a page store are fit for it and tries that on the very model; knows nothing of prompts or
sampling. The same steps as `States` of _local_kv.py, which answers for everything that is not fit.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from agentmem._pure import kernels
from agentmem.activation.pages import Codec, encode
from agentmem.errors import AgentMemError
from agentmem.provider import Pages

from ._local_device import as_array
from ._local_kv import Forward, States, leading
from ._local_model import Attention
from ._local_rows import all_rows, least_rows

__all__ = ["InPlace", "PagedStates"]

log = logging.getLogger("agentmem")

#: Tokens of the trial: a page of one block, and some more at once.
_PAGE, _MORE = 64, 9
#: How far logits may be from the stock path's where rounding explains nothing, in their standard deviations.
_LEAST = 0.01


class InPlace:
    """Decides, per request, whether attention is computed in place, and tries it once per codec.

    ``auto`` does it on a CPU for the codecs that can be read in place, where the C extension is there; ``in_place``
    also on its numpy twin; ``stock`` never.
    """

    def __init__(self, model: Any, forward: Forward, stock: States, device: torch.device, attention: Attention) -> None:
        self._model = model
        self._forward = forward
        self._stock = stock
        self._device = device
        self._attention = attention
        # Asked once: during another thread's pass it is another one for a moment.
        self._kernel = getattr(model.config.get_text_config(decoder=True), "_attn_implementation", None)
        self._found: dict[str, PagedStates | None] = {}
        self._linear: list[int | None] = []  # what `least_rows` said of this model, once it was asked

    def states(self, pages: Pages) -> PagedStates | None:
        """How requests with these pages keep their states; None where the stock path does. The first refusal of each
        codec is logged. Only after the stock path's `States.check` said yes."""
        if self._attention == "stock":
            return None
        codec: Any = pages.codec
        if self._attention == "auto" and (self._device.type != "cpu" or not (pages.lossy or codec == "raw")):
            return None
        if codec not in self._found:
            reason = self._unfit(codec)
            made = None if reason is not None else PagedStates(self._stock.shapes, self._stock.dtype, codec)
            if made is not None:
                reason = self._tried(made, codec)
            if reason is not None:
                log.warning("attention is computed the stock way with %s pages: %s", codec, reason)
            self._found[codec] = made if reason is None else None
        return self._found[codec]

    def _unfit(self, codec: str) -> str | None:
        """What speaks against it before anything is tried."""
        native = kernels()
        if self._device.type != "cpu":
            return f"the model is on {self._device}, and pages are attended to in place on a CPU only"
        if not hasattr(native, "Prefix") or (self._attention == "auto" and not native.__name__.endswith("._native")):
            return "the C extension that does it is not there"
        try:
            from ._local_attention import CODECS, NAMES
        except ImportError as error:
            return f"this version of transformers has another interface ({error})"
        if codec not in CODECS:
            return f"{codec} pages have to be decoded first"
        dtype = self._stock.dtype
        if dtype not in NAMES:
            return f"it is not computed in {dtype}"
        return None

    def _tried(self, made: PagedStates, codec: Codec) -> str | None:
        try:
            return self._trial(made, codec)
        except (AgentMemError, RuntimeError, TypeError, ValueError, AttributeError, LookupError, BufferError) as error:
            return f"the trial on this model failed ({error})"

    def _trial(self, made: PagedStates, codec: Codec) -> str | None:
        """A small text both ways: a page as the codec left it, 9 tokens behind it at once, then a single one.

        In place twice, with tails of different length: those must be equal bit for bit. From the stock path the logits
        may differ by three times what transformers' own two kernels, sdpa and eager, differ by (in float32 by a
        hundredth of their standard deviation, some twenty times what was measured). On the way every layer's mask is
        compared with ours, at positions that no short text reaches.
        """
        from ._local_attention import attending, probing

        size = int(self._model.get_input_embeddings().num_embeddings)
        ids = [(7919 * i + 13) % size for i in range(_PAGE + _MORE + 1)]
        page, more, last = ids[:_PAGE], ids[_PAGE:-1], ids[-1:]
        stock = self._stock.empty(len(ids))
        self._forward(page, stock)
        layers = [(as_array(layer.keys[0]), as_array(layer.values[0])) for layer in stock.layers]
        encoded = encode(layers, _PAGE, 0, codec, writeback=True)
        wanted = [self._forward(part, stock)[0] for part in (more, last)]
        for layer in stock.layers:
            layer.restored(_PAGE)
        config = self._model.config.get_text_config(decoder=True)
        other = "sdpa" if self._kernel == "eager" else "eager"
        stock.attending = functools.partial(attending, attention=other)
        noise = _apart([self._forward(part, stock)[0] for part in (more, last)], wanted)
        window = getattr(config, "sliding_window", None) or 0
        caches = [made.made(grid) for grid in (_PAGE, 2 * _PAGE)]
        with probing(window):
            for cache in caches:
                cache.append_encoded(encoded)
            got = [self._forward(part, caches[0])[0] for part in (more, last)]
            again, _ = self._forward(more, caches[1])
        if any(layer.new is not None or not layer.length for cache in caches for layer in cache.layers):
            return "it has layers that don't attend to what they put into the cache"
        if not torch.equal(got[0], again):
            return "two runs over the same states differ"
        made.least = self._least_rows(made, encoded, ids[_PAGE:])
        apart, bound = _apart(got, wanted), max(_LEAST, 3 * noise)
        if not apart <= bound:
            return f"logits are {apart:.3f} standard deviations from the stock path's (at most {bound:.3f})"
        return None

    def _least_rows(self, made: PagedStates, encoded: Any, ids: Sequence[int]) -> int | None:
        """So many tokens at least in each step, and a token's states are the same bits in whichever step it comes;
        None where that can't be said."""
        if not self._linear:
            self._linear.append(least_rows(self._model))
        [least] = self._linear
        if least is None or 2 * least > len(ids):
            return None
        left = []
        for sizes in ((len(ids),), (least, len(ids) - least), (len(ids) - least, least)):
            cache, at = made.made(_PAGE), 0
            cache.append_encoded(encoded)
            for size in sizes:
                with all_rows(self._model, size) as alike:
                    self._forward(ids[at : at + size], cache)
                if not alike():
                    return None
                at += size
            left.append([side for pair in cache.tail_rows(len(ids)) for side in pair])
        whole, *others = left
        return least if all((a == b).all() for other in others for a, b in zip(whole, other, strict=True)) else None


def _apart(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Root mean square of the logits' differences, in their standard deviations; the mean of several."""
    pairs = zip(got, wanted, strict=True)
    return statistics.fmean(float((one - other).square().mean().sqrt() / other.std()) for one, other in pairs)


class PagedStates:
    """The states of requests that are attended to in place; the steps are those of `States`."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, codec: Codec) -> None:
        self.shapes = list(shapes)
        self.dtype = dtype
        self.codec: Codec = codec
        #: With so many tokens in each step a token's states don't depend on which others it was computed with: then
        #: they may be kept from turn to turn. None: they do.
        self.least: int | None = None
        # Products are split among the threads too. The number is the asking thread's own.
        self._threads = torch.get_num_threads()

    @property
    def steady(self) -> int | None:
        """``least``, None also where the number of threads is another one than in the trial."""
        return self.least if torch.get_num_threads() == self._threads else None

    @property
    def attention(self) -> str:
        """What the identity of pages that are made so says of attention."""
        from ._local_attention import VERSION

        # The codec too: what one position attends to is in its code, also within one page's store.
        return f"in place {VERSION}, {self.codec}"

    def made(self, grid: int) -> Any:
        """An empty cache with a tail of ``grid`` tokens."""
        from ._local_attention import PagedCache

        return PagedCache(self.shapes, self.dtype, grid=grid, codec=self.codec)

    def restore(self, pages: Sequence[Any], grid: int, capacity: int) -> tuple[Any, int]:
        """A cache that begins with these pages, and how many positions that are. Nothing is copied or decoded: every
        page is checked at its first use, which also brings it into memory. One that proves bad ends the prefix."""
        del capacity  # it holds no more than the tail
        cache = self.made(grid)
        count = leading(pages, lambda page, _: None if page.verified else page.verify())
        done = 0
        for page in pages[:count]:
            try:
                cache.append(page.data)
            except (AgentMemError, ValueError) as error:
                log.warning("a KV page can't be attended to in place and is computed again: %s", error)
                break
            done += 1
        return cache, done * grid

    def settle(self, pages: Pages, cache: Any, number: int) -> Any:
        """After a page was computed: go on with what it will be restored as, and hold nothing else of it."""
        del pages, number
        return cache.seal()

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
        """As `States.seal`."""
        del cache
        return pages.grid * pages.seal(identity, tokens, first, [], records, encoded=encoded, seconds=seconds)

    def leave(self, cache: Any) -> None:
        """As `States.leave`: nothing loads in the background here."""
