"""Who may see and change which records, as conditions in SQL.

Knows the scope rule, validity and ``where``; knows nothing of what the statements are for. Every value is bound, never
written into the SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.types import Scope

from .drafts import check_metadata, check_scope, shown

__all__ = ["Condition", "above", "beneath", "joined", "matching", "valid_at", "visible"]

#: A piece of SQL over the table ``records`` and the values of its question marks.
Condition = tuple[str, list[Any]]


def beneath(scope: Scope) -> Condition:
    """Records at ``scope`` or beneath it: what a handle may change."""
    values = [(level, value) for level, value in check_scope(scope).levels() if value is not None]
    return " AND ".join(f"records.{level} = ?" for level, _ in values) or "TRUE", [value for _, value in values]


def above(scope: Scope) -> Condition:
    """Records at ``scope`` or at a level above it that shares with it: what a handle inherits."""
    parts: list[str] = []
    values: list[Any] = []
    for level, value in check_scope(scope).levels():
        parts.append(f"records.{level} = ''" if value is None else f"records.{level} IN ('', ?)")
        values += [] if value is None else [value]
    return " AND ".join(parts), values


def visible(scope: Scope) -> Condition:
    """Records at ``scope``, beneath it or above it: what a handle may read."""
    (under, values), (over, more) = beneath(scope), above(scope)
    return f"({under} OR ({over}))", values + more


def valid_at(seconds: float) -> Condition:
    """Records that hold at this time (UTC seconds): from ``valid_from`` on, until before ``valid_until``."""
    return (
        "((records.from_s IS NULL OR records.from_s <= ?) AND (records.until_s IS NULL OR records.until_s > ?))",
        [seconds, seconds],
    )


def matching(where: Mapping[str, Any] | None) -> Condition:
    """Equality on ``id``, ``role``, ``name``, ``source`` and, for every other key, on the metadata's top level.

    Types count: ``True`` is not ``1``, nor is ``"1"``. None matches null (in metadata: the key is there, with null).
    """
    if where is None:
        return "TRUE", []
    if not isinstance(where, Mapping):
        raise InvalidInput(f"where is a {type(where).__name__}: give a mapping of keys to the values they must have")
    parts: list[str] = []
    values: list[Any] = []
    for key, value in check_metadata(where).items():
        if isinstance(value, (list, dict)):
            raise InvalidInput(
                f"where[{shown(key)}] is a {type(value).__name__}: only equality with one value is understood"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"where[{shown(key)}] is outside the range of 64-bit integers")
        if key in ("id", "role", "name", "source"):
            if value is not None and not isinstance(value, str):
                raise InvalidInput(f"where[{shown(key)}] is a {type(value).__name__}: give a str or None")
            parts.append(f"records.{key} IS ?")
            values.append(value)
            continue
        kind, test = _json_test(value)
        parts.append(f"EXISTS (SELECT 1 FROM json_each(records.metadata) AS item WHERE item.key = ? AND {kind}{test})")
        values += [key, value] if test else [key]
    return " AND ".join(parts) or "TRUE", values


def _json_test(value: object) -> tuple[str, str]:
    if value is None:
        return "item.type = 'null'", ""
    if isinstance(value, bool):
        return f"item.type = '{'true' if value else 'false'}'", ""
    if isinstance(value, str):
        return "item.type = 'text'", " AND item.value = ?"
    return "item.type IN ('integer', 'real')", " AND item.value = ?"


def joined(conditions: Iterable[Condition]) -> Condition:
    """All of these at once."""
    parts: list[str] = []
    values: list[Any] = []
    for sql, some in conditions:
        parts.append(sql)
        values += some
    return " AND ".join(parts) or "TRUE", values
