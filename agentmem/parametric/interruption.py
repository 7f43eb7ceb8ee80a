"""Work on a model that ends within a layer's time when it is asked to: a chat waits for the same machine.

Knows a model's layers and a question to ask before each. Training asks by itself between its steps, which must be
whole; what has no steps (a prefill, a gate's answers, the states that a run begins with) is ended by this.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

from agentmem.errors import TrainingError

__all__ = ["asking", "giving_way", "whole"]

_own = threading.local()


@contextlib.contextmanager
def giving_way(stop: Callable[[], bool]) -> Generator[None]:
    """Inside, what this thread does `asking` ends with `TrainingError` as soon as ``stop()`` is true."""
    before = getattr(_own, "stop", None)
    _own.stop = stop
    try:
        yield
    finally:
        _own.stop = before


@contextlib.contextmanager
def asking(model: Any) -> Generator[None]:
    """Inside, this thread's passes through ``model`` (any torch module) ask before each layer whether to give way.

    Other threads pass unhindered. Nothing is added to the model where nobody asked this thread to give way.
    """
    stop, thread = getattr(_own, "stop", None), threading.get_ident()
    if stop is None:
        yield
        return

    def ask(*_: Any) -> None:
        if threading.get_ident() == thread and not getattr(_own, "whole", False) and stop():
            raise TrainingError("stopped: somebody waits for the model")

    hooks = [layer.register_forward_pre_hook(ask) for layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def whole() -> Generator[None]:
    """Inside, this thread's passes are not ended: they are a step that is taken or not."""
    before = getattr(_own, "whole", False)
    _own.whole = True
    try:
        yield
    finally:
        _own.whole = before


def _layers(model: Any) -> list[Any]:
    """The modules of the longest list of modules in it (its decoder's layers), or itself where it has none."""
    lists = [module for module in model.modules() if type(module).__name__ == "ModuleList"]
    longest = max(lists, key=len, default=())
    return list(longest) or [model]
