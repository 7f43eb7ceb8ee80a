"""What all values are made of, and the scope that each memory belongs to.

Knows nothing of any other value: those are in types.py, and each part of the house has its own.
"""

from __future__ import annotations

import html
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict

__all__ = ["LEVELS", "Scope", "Value"]

#: From the widest to the narrowest.
LEVELS = ("tenant", "user", "agent", "session")


class Value(BaseModel):
    """What all of these are: frozen, compared by content, with a table for notebooks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


class Scope(Value):
    """Whose memory it is: any of tenant, user, agent and session. ``None`` means that the level is not set.

    Values are compared byte for byte: nothing is trimmed, folded or treated as a wildcard.
    """

    tenant: str | None = None
    user: str | None = None
    agent: str | None = None
    session: str | None = None

    def __hash__(self) -> int:
        return hash((self.tenant, self.user, self.agent, self.session))

    def levels(self) -> Iterator[tuple[str, str | None]]:
        """The four levels from the widest to the narrowest, as (name, value)."""
        for level in LEVELS:
            yield level, getattr(self, level)

    def within(self, other: Scope) -> bool:
        """True if this scope is ``other`` or lies beneath it: every level that ``other`` sets is the same here."""
        return all(value is None or value == getattr(self, level) for level, value in other.levels())

    def __str__(self) -> str:
        return " ".join(f"{level}={value!r}" for level, value in self.levels() if value is not None) or "(root)"
