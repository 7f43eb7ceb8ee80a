"""agentmem: one memory API over three kinds of memory (records, KV caches, LoRA), on any model provider.

Importing this imports nothing else: each public name is loaded when it is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation.store import PageEntry as PageEntry
    from .activation.swapping import Swapped as Swapped
    from .async_memory import AsyncMemory as AsyncMemory
    from .async_memory import AsyncScopedMemory as AsyncScopedMemory
    from .errors import AgentMemError as AgentMemError
    from .errors import BudgetExceeded as BudgetExceeded
    from .errors import ConfigError as ConfigError
    from .errors import Corrupt as Corrupt
    from .errors import Full as Full
    from .errors import Incompatible as Incompatible
    from .errors import InvalidInput as InvalidInput
    from .errors import Locked as Locked
    from .errors import MissingDependency as MissingDependency
    from .errors import NotFound as NotFound
    from .errors import ProviderError as ProviderError
    from .errors import RateLimited as RateLimited
    from .errors import Rejected as Rejected
    from .errors import ScopeError as ScopeError
    from .errors import StoreError as StoreError
    from .errors import TrainingError as TrainingError
    from .errors import Unavailable as Unavailable
    from .explaining import Explanation as Explanation
    from .ledger.budgets import Budget as Budget
    from .ledger.budgets import Spent as Spent
    from .ledger.report import Report as Report
    from .memory import Memory as Memory
    from .memory import ScopedMemory as ScopedMemory
    from .parametric.registry import LoraVersion as LoraVersion
    from .planner.values import ConsolidationPlan as ConsolidationPlan
    from .planner.values import Move as Move
    from .planner.values import Outcome as Outcome
    from .reply_stream import AsyncReplyStream as AsyncReplyStream
    from .reply_stream import ReplyStream as ReplyStream
    from .types import Attended as Attended
    from .types import CacheUse as CacheUse
    from .types import Change as Change
    from .types import Compaction as Compaction
    from .types import Context as Context
    from .types import Erasure as Erasure
    from .types import Extraction as Extraction
    from .types import Hit as Hit
    from .types import Image as Image
    from .types import Message as Message
    from .types import Reconciliation as Reconciliation
    from .types import Record as Record
    from .types import Reply as Reply
    from .types import Retraining as Retraining
    from .types import Scope as Scope
    from .types import TokenCount as TokenCount
    from .types import ToolCall as ToolCall
    from .types import TurnFacts as TurnFacts
    from .types import Usage as Usage
    from .types import Verification as Verification
    from .wrapping import wrap as wrap

__version__ = "0.1.0"

#: Kernels that oneDNN and PyTorch's layer above it keep, one per shape of a product, where the environment says
#: nothing. Their own 1,024 each are never used up: every new length of a text or of a prompt leaves some, more than a
#: chat's states take (LRU_CACHE_CAPACITY=1024 tests/benchmarks/efficiency.py shows it); a pass needs five. Set here:
#: libtorch reads it when it is loaded, and nothing of agentmem loads it before.
_KERNELS = "16"
for _capacity in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_capacity, _KERNELS)

#: Where each public name lives.
_MODULES = {
    "activation.store": "PageEntry",
    "activation.swapping": "Swapped",
    "async_memory": "AsyncMemory AsyncScopedMemory",
    "ledger.budgets": "Budget Spent",
    "errors": (
        "AgentMemError BudgetExceeded ConfigError Corrupt Full Incompatible InvalidInput Locked MissingDependency "
        "NotFound ProviderError RateLimited Rejected ScopeError StoreError TrainingError Unavailable"
    ),
    "explaining": "Explanation",
    "ledger.report": "Report",
    "memory": "Memory ScopedMemory",
    "parametric.registry": "LoraVersion",
    "planner.values": "ConsolidationPlan Move Outcome",
    "reply_stream": "AsyncReplyStream ReplyStream",
    "types": (
        "Attended CacheUse Change Compaction Context Erasure Extraction Hit Image Message Reconciliation Record Reply "
        "Retraining Scope TokenCount ToolCall TurnFacts Usage Verification"
    ),
    "wrapping": "wrap",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load a public name from its module, and show it as ``agentmem.<name>`` in tracebacks."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    value.__module__ = __name__
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
