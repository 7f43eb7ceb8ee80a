"""KV pages to an accelerator and back: layer by layer through pinned memory, the copies beside the computation.

Knows torch's streams and events and how a page is read in parts; knows nothing of cache layers, models or stores.
Without a stream (a CPU, in tests) the same steps run one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Loading", "NotLoaded", "as_array", "to_host"]

#: Pinned buffers in turn: one is filled from the pages while the one before it is on its way to the device.
BUFFERS = 2


def as_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A CPU tensor's memory as numpy sees it; bfloat16, which numpy doesn't have, as uint16. No copy."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16)
        return bits
    plain: npt.NDArray[Any] = tensor.numpy()
    return plain


def _stream(device: torch.device) -> Any:
    cuda: Any = torch.cuda  # its annotations are incomplete
    return cuda.Stream(device) if device.type == "cuda" else None


def _host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


class NotLoaded(Exception):
    """States that should have come from pages did not come: what was computed with them does not count."""


class Loading:
    """Pages on their way into device tensors, in a thread of their own, layer after layer.

    ``targets[layer]`` is (K, V), [KV heads, positions, head dim] on the device, of which the first
    ``len(pages) * grid`` positions are filled. `wait` is called before a layer's first use: by then the layers before
    it have been computed while this one was copied. `leave` ends the thread: call it whatever happened.
    """

    def __init__(self, pages: Sequence[Any], grid: int, targets: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._pages = pages
        self._grid = grid
        self._targets = targets
        self._device = targets[0][0].device
        self._stream = _stream(self._device)
        if self._stream is not None:
            # The targets' memory may have been another tensor's a moment ago, which queued work still reads.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            for target in (part for pair in targets for part in pair):
                target.record_stream(self._stream)
        self._loaded = [threading.Event() for _ in targets]
        self._copied: list[Any] = [None] * len(targets)
        self._error: Exception | None = None
        self._left = False
        self._thread = threading.Thread(target=self._run, name="agentmem KV pages", daemon=True)
        self._thread.start()

    def wait(self, layer: int) -> None:
        """Return when this layer's states can be used by what is queued from now on; `NotLoaded` if they won't come."""
        self._loaded[layer].wait()
        if self._error is not None:
            raise NotLoaded(str(self._error)) from self._error
        event = self._copied[layer]
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def leave(self) -> None:
        """Stop loading: nobody will wait for more. Returns when the thread has ended."""
        self._left = True
        self._thread.join()

    def _run(self) -> None:
        try:
            self._load()
        except Exception as error:  # noqa: BLE001 (told to whoever waits)
            self._error = error
        finally:
            for event in self._loaded:
                event.set()

    def _load(self) -> None:
        length = len(self._pages) * self._grid
        buffers: list[Any] = [None] * BUFFERS
        busy: list[Any] = [None] * BUFFERS
        for layer, pair in enumerate(self._targets):
            if self._left:
                raise NotLoaded("loading was given up")
            turn = layer % BUFFERS
            if busy[turn] is not None:
                busy[turn].synchronize()
            shapes = [(part.shape[0], length, part.shape[2]) for part in pair]
            if buffers[turn] is None or [tuple(part.shape) for part in buffers[turn]] != shapes:
                buffers[turn] = [_host(shape, pair[0].dtype, self._device) for shape in shapes]
            keys, values = (as_array(part) for part in buffers[turn])
            for number, page in enumerate(self._pages):
                page.read_layers([keys], [values], number * self._grid, layer)
            busy[turn] = self._copied[layer] = self._sent(buffers[turn], pair, length)
            self._loaded[layer].set()
        for event in busy:  # the buffers must outlive the copies from them
            if event is not None:
                event.synchronize()

    def _sent(self, buffers: list[torch.Tensor], pair: tuple[torch.Tensor, torch.Tensor], length: int) -> Any:
        if self._stream is None:
            for part, buffer in zip(pair, buffers, strict=True):
                part[:, :length] = buffer
            return None
        with torch.cuda.stream(self._stream):
            for part, buffer in zip(pair, buffers, strict=True):
                part[:, :length].copy_(buffer, non_blocking=True)
            return self._stream.record_event()


def to_host(tensors: Sequence[torch.Tensor]) -> list[npt.NDArray[Any]]:
    """The tensors as arrays in host memory: on a CPU their own, else copies that were all under way at once."""
    if not tensors or tensors[0].device.type == "cpu":
        return [as_array(tensor) for tensor in tensors]
    device = tensors[0].device
    hosts = [_host(tuple(tensor.shape), tensor.dtype, device) for tensor in tensors]
    stream = _stream(device)
    if stream is None:
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor)
        return [as_array(host) for host in hosts]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for host, tensor in zip(hosts, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)
    stream.synchronize()
    return [as_array(host) for host in hosts]
