"""The numpy twin of the C extension: the same functions, the same bytes, the same errors, none of the speed.

The reference in tests, and what runs where no compiler was. Knows nothing of files' names, stores or models. `kernels`
chooses between the two; numpy is imported by the first call that needs it, so that choosing costs nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING

from ..errors import Incompatible
from .attend import Prefix
from .bm25 import bm25_lengths, bm25_scores
from .codec import block_decode, block_encode
from .crc import crc32c
from .late import maxsim, tokens_encode
from .page import (
    page_encode,
    page_parse,
    page_read,
    page_size,
    page_verify,
    page_write,
    page_write_encoded,
    prefault,
    reserve,
    write_behind,
)
from .rules import RULES, PageError

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "RULES",
    "PageError",
    "Prefix",
    "block_decode",
    "block_encode",
    "bm25_lengths",
    "bm25_scores",
    "cpu_level",
    "cpu_levels",
    "crc32c",
    "kernels",
    "maxsim",
    "page_encode",
    "page_parse",
    "page_read",
    "page_size",
    "page_verify",
    "page_write",
    "page_write_encoded",
    "prefault",
    "reserve",
    "set_cpu_level",
    "tokens_encode",
    "write_behind",
]

logger = logging.getLogger("agentmem")

#: One warning per process, also when many threads ask at once.
_choosing = threading.Lock()
_chosen: list[ModuleType] = []


def kernels() -> ModuleType:
    """The C extension if it can be imported, else this module (with one warning in the log).

    ``AGENTMEM_PURE=1`` in the environment forces this module. Raises `Incompatible` on a big-endian machine.
    """
    with _choosing:
        if not _chosen:
            if sys.byteorder != "little":
                raise Incompatible("page files are little-endian: agentmem does not run on a big-endian machine")
            module = sys.modules[__name__]
            if os.environ.get("AGENTMEM_PURE", "") not in {"", "0"}:
                logger.warning("AGENTMEM_PURE is set: using the numpy code instead of the C extension")
            else:
                try:
                    from .. import _native as module
                except ImportError as error:
                    logger.warning(
                        "the C extension agentmem._native can't be used (%s): using the slower numpy code; "
                        "install a C compiler and agentmem again",
                        error,
                    )
            _chosen.append(module)
        return _chosen[0]


def cpu_level() -> str:
    """Name of the instruction set in use: always ``"numpy"`` here."""
    return "numpy"


def cpu_levels() -> tuple[str, ...]:
    """Names that `set_cpu_level` takes."""
    return ("numpy",)


def set_cpu_level(name: str, /) -> None:
    """Use this level from now on; ValueError for one that `cpu_levels` doesn't list."""
    if name != "numpy":
        raise ValueError(f"this CPU has no level {name}: see cpu_levels()")
