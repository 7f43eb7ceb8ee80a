"""Test doubles, the conformance suite, and servers that stand in for hosted models; for tests of third parties too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .doubles import FakeClock, ScriptedProvider, chat_request
from .fault_shapes import FAULTS, Fault
from .faults import FaultServer
from .hosts import HostRequest, HostServer
from .suite import ProviderSuite

if TYPE_CHECKING:
    from ..plaintext.embed import HashEmbedder

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


def __getattr__(name: str) -> Any:
    if name == "HashEmbedder":  # loads numpy, which nothing else here needs
        from ..plaintext.embed import HashEmbedder

        return HashEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
