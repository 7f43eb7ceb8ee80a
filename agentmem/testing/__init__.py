"""Test doubles, the conformance suite, and servers that stand in for hosted models; for tests of third parties too."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .doubles import FakeClock, ScriptedProvider, chat_request
from .suite import ProviderSuite

if TYPE_CHECKING:
    from ..plaintext.embed import HashEmbedder
    from .fault_shapes import FAULTS, Fault
    from .faults import FaultServer
    from .hosts import HostRequest, HostServer

__all__ = [
    "FAULTS",
    "FakeClock",
    "Fault",
    "FaultServer",
    "HashEmbedder",
    "HostRequest",
    "HostServer",
    "ProviderSuite",
    "ScriptedProvider",
    "chat_request",
]

#: Where the names are that few tests need and that take time to load: numpy, a server, a long table.
_LAZY = {
    "FAULTS": ".fault_shapes",
    "Fault": ".fault_shapes",
    "FaultServer": ".faults",
    "HashEmbedder": "..plaintext.embed",
    "HostRequest": ".hosts",
    "HostServer": ".hosts",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
