"""Work on a model that ends within a layer's time when it is asked to: a chat waits for the same machine.

Knows a model's layers and a question to ask before each, on the way forth and back; knows nothing of what passes
through them, and changes no bit of it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from typing import Any

from agentmem.errors import TrainingError

__all__ = ["Interrupted", "asking", "giving_way", "whole"]

_own = threading.local()


class Interrupted(TrainingError):
    """Somebody waits for the model: what was begun on it ended half-way."""


@contextlib.contextmanager
def giving_way(stop: Callable[[], bool]) -> Generator[None]:
    """Inside, what this thread does `asking` ends with `Interrupted` as soon as ``stop()`` is true."""
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
            raise Interrupted("stopped: somebody waits for the model")

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ask()
        # On the CPU autograd comes back through here in the same thread.
        for given in (*arguments[:1], *named.values()):
            if getattr(given, "requires_grad", False):
                given.register_hook(ask)
                break

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def whole() -> Generator[None]:
    """Inside, this thread's passes are not ended: what they do can't be done by half."""
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
