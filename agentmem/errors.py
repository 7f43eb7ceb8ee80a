"""Every error that agentmem raises on purpose, in one tree.

    AgentMemError
    ├── ConfigError              a setting is wrong or missing
    ├── ScopeError               a scope is malformed, or reaches outside its handle
    ├── NotFound (LookupError)   no such record, version or page in this scope
    ├── InvalidInput (ValueError) an argument can't be stored or understood; nothing was written
    ├── BudgetExceeded           a budget with action "stop" is spent; .limit .spent .frees_at
    ├── StoreError
    │   ├── Corrupt              a file fails its checksum
    │   ├── Full                 the disk or a quota is full; earlier data is intact
    │   ├── Locked               another process holds the folder for longer than the time-out
    │   └── Incompatible         the folder was made by a newer format or another embedder
    ├── ProviderError            .status .request_id .body where the provider sent them
    │   ├── Unavailable          no connection, a time-out, or a 5xx
    │   ├── RateLimited          429; .retry_after in seconds where it was said
    │   ├── Rejected             the provider refused the request (4xx)
    │   └── MissingDependency    the provider's package is not installed
    └── TrainingError            a LoRA could not be trained or loaded

A message says what was wrong, with which value, and what to do. Errors of other libraries are mapped where they enter
(an adapter, the database) and kept as ``__cause__``.
"""

from __future__ import annotations

__all__ = [
    "AgentMemError",
    "BudgetExceeded",
    "ConfigError",
    "Corrupt",
    "Full",
    "Incompatible",
    "InvalidInput",
    "Locked",
    "MissingDependency",
    "NotFound",
    "ProviderError",
    "RateLimited",
    "Rejected",
    "ScopeError",
    "StoreError",
    "TrainingError",
    "Unavailable",
]


class AgentMemError(Exception):
    """The root of the tree: catch this to catch everything that agentmem raises on purpose."""


class ConfigError(AgentMemError):
    """A setting is wrong, unknown or missing."""


class ScopeError(AgentMemError):
    """A scope value is malformed, or a call tries to reach outside its handle's scope."""


class NotFound(AgentMemError, LookupError):
    """Nothing with this id in this scope. A foreign id and an unknown id give the same error."""


class InvalidInput(AgentMemError, ValueError):
    """An argument can't be stored or understood. Raised before anything is written."""


class BudgetExceeded(AgentMemError):
    """A budget that stops is spent, so the model was not asked. ``limit`` and ``spent`` are in dollars; at ``frees_at``
    (Unix seconds) its day or month is over, None where it never is."""

    def __init__(self, message: str, *, limit: float, spent: float, frees_at: float | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.spent = spent
        self.frees_at = frees_at


class StoreError(AgentMemError):
    """The memory's folder could not be read or written."""


class Corrupt(StoreError):
    """A file or row fails its checksum."""


class Full(StoreError):
    """The disk or a quota is full. What was acknowledged before is intact; reads and deletes still work."""


class Locked(StoreError):
    """Another process held the folder's write lock for longer than the time-out."""


class Incompatible(StoreError):
    """The folder was written by a newer format, or its vectors come from another embedder."""


class ProviderError(AgentMemError):
    """A model provider failed. ``status`` (HTTP), ``request_id`` and ``body`` are set where known."""

    def __init__(
        self, message: str, *, status: int | None = None, request_id: str | None = None, body: object = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id
        self.body = body


class Unavailable(ProviderError):
    """The provider can't be reached, timed out or answered with a server error. Trying again may help."""


class RateLimited(ProviderError):
    """The provider asks for fewer requests. ``retry_after`` is in seconds where it was said."""

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        status: int | None = None,
        request_id: str | None = None,
        body: object = None,
    ) -> None:
        super().__init__(message, status=status, request_id=request_id, body=body)
        self.retry_after = retry_after


class Rejected(ProviderError):
    """The provider understood the request and refused it. Trying again unchanged won't help."""


class MissingDependency(ProviderError):
    """A package that this provider or feature needs is not installed; the message has the command to install it."""


class TrainingError(AgentMemError):
    """A LoRA could not be trained, or a stored version can't be used."""
