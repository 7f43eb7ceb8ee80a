"""Gives back to the system what a turn's heap freed.

Knows glibc's allocator; elsewhere it does nothing. A prefill frees hundreds of activations among which a few live
tensors lie, and glibc gives back by itself only what is at the heap's end.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

__all__ = ["give_back"]


def give_back() -> None:
    """Return free pages of all arenas (malloc_trim(3)): about a millisecond, so only where nobody waits for it."""
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # musl has none
        return None
    found.argtypes, found.restype = [ctypes.c_size_t], ctypes.c_int
    return found
