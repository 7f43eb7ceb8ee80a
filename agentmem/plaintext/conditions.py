"""Who may see and change which records, as conditions in SQL.

Knows the scope rule, validity and ``where``; knows nothing of what the statements are for. Every value is bound, never
written into the SQL.
"""

from __future__ import annotations

import abc
import datetime as dt
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.types import Scope

from .drafts import check_scope, check_value, moment, shown, utc_seconds

__all__ = ["Condition", "above", "beneath", "joined", "matching", "valid_at", "visible"]

#: A piece of SQL over the table ``records`` and the values of its question marks.
Condition = tuple[str, list[Any]]

#: Keys of ``where`` that mean a column of the record; every other key is one of its metadata.
TEXTS = ("id", "role", "name", "source", "trust")
TIMES = {
    "at": "records.at_s",
    "created": "round(records.created, 6)",  # a datetime has microseconds, the clock a little more
    "valid_from": "records.from_s",
    "valid_until": "records.until_s",
}
ORDERS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
MAX_DEPTH = 64
MAX_CONDITIONS = 1000
#: SQLite's parser refuses what needs more than 100 of its stack's entries; the statement around a condition needs some.
MAX_STACK = 72
#: Operands in one flat chain: SQLite refuses expressions deeper than 1,000, and a chain is as deep as it is long.
CHAIN = 30


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


@dataclass(frozen=True)
class _Node:
    """A part of a ``where``. ``stack`` is how many entries of SQLite's parser stack its parts need at most."""

    sql: str
    values: list[Any]
    stack: int = 0


class _Left:
    """How many more conditions a ``where`` may have, and how many mappings around them."""

    def __init__(self) -> None:
        self.conditions = MAX_CONDITIONS
        self.mappings = 2 * MAX_CONDITIONS

    def take(self, conditions: int = 1) -> None:
        self.conditions -= conditions
        self.mappings -= 1 - conditions
        if min(self.conditions, self.mappings) < 0:
            raise InvalidInput(f"where has more than {MAX_CONDITIONS} conditions: split the call")


def matching(where: Mapping[str, Any] | None) -> Condition:
    """What ``where`` says, as a condition. All keys of a mapping must hold:

    - ``key: value``: equality. ``id``, ``role``, ``name``, ``source``, ``trust`` and the times ``at``, ``created``,
      ``valid_from``, ``valid_until`` (datetime or ISO 8601; naive is UTC) are those of the record. Every other key is
      one of the top level of its metadata, character for character: a dot is a dot. ``{"metadata": {key: ...}}``
      reaches keys that have such a name themselves.
    - ``key: {...}`` with ``eq``, ``gt``, ``gte``, ``lt``, ``lte``, ``in`` (a list), ``prefix`` or ``not`` (a value or a
      test); several in one mapping must all hold.
    - ``"and": [where, ...]``, ``"or": [where, ...]``, ``"not": where``.

    Types count: ``True`` is not ``1``, nor is ``"1"``; numbers are compared with numbers, strings with strings (by code
    point), times with times, and what is of another type or absent does not match. ``not`` matches exactly what its
    condition does not, so also records without the key. None matches null (in metadata: the key is there, with null).
    Raises `InvalidInput` for everything else, for more than 64 levels and for more than 1,000 conditions.
    """
    if where is None:
        return "TRUE", []
    if not isinstance(where, Mapping):
        raise InvalidInput(f"where is a {type(where).__name__}: give a mapping of keys to the values they must have")
    node = _where(where, 1, _Left(), wanted=True)
    if node.stack > MAX_STACK:
        raise InvalidInput("where nests too many conditions in one another: write it flatter")
    return node.sql, node.values


def _where(where: object, depth: int, left: _Left, *, wanted: bool) -> _Node:
    if not isinstance(where, Mapping):
        raise InvalidInput(f"where holds {shown(where)} where a condition must stand: give a mapping")
    _check_depth(depth)
    left.take(0)
    parts: list[_Node] = []
    for key, value in where.items():
        if type(key) is not str:
            raise InvalidInput(f"where has the key {shown(key)} of type {type(key).__name__}: keys are str")
        if key in ("and", "or"):
            if not isinstance(value, (list, tuple)) or not value:
                raise InvalidInput(f"where[{key!r}] is {shown(value)}: give a list of one condition or more")
            inner = [_where(_full(item, key), depth + 1, left, wanted=wanted) for item in value]
            parts.append(_joined("AND" if (key == "and") is wanted else "OR", inner))
        elif key == "not":
            parts.append(_where(_full(value, key), depth + 1, left, wanted=not wanted))
        elif key == "metadata":
            if not isinstance(value, Mapping) or not value:
                raise InvalidInput(f"where['metadata'] is {shown(value)}: give a mapping of metadata keys to tests")
            for name, test in value.items():
                if type(name) is not str:
                    raise InvalidInput(f"where['metadata'] has the key {shown(name)}: keys are str")
                parts.append(_key(_Metadata(name), test, depth + 1, left, wanted=wanted))
        else:
            parts.append(_key(_field(key), value, depth + 1, left, wanted=wanted))
    if not parts:
        return _Node("TRUE" if wanted else "FALSE", [])
    return _joined("AND" if wanted else "OR", parts)


def _check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise InvalidInput(f"where is nested deeper than {MAX_DEPTH} levels, or contains itself")


def _full(condition: object, key: str) -> object:
    """An empty condition holds for everything: inside a larger one it is a slip, and `forget` takes a ``where``."""
    if isinstance(condition, Mapping) and not condition:
        raise InvalidInput(f"where[{key!r}] holds an empty condition: leave it out")
    return condition


def _joined(word: str, parts: Sequence[_Node]) -> _Node:
    """These parts, all of them or any. What nests deepest comes first: then the parser holds one entry per level."""
    if len(parts) == 1:
        return parts[0]
    ordered = sorted(parts, key=lambda part: -part.stack)
    if len(ordered) > CHAIN:
        size = max(CHAIN, -(-len(ordered) // CHAIN))
        ordered = [_joined(word, ordered[first : first + size]) for first in range(0, len(ordered), size)]
        return _joined(word, ordered)
    stack = max(part.stack + (1 if place == 0 else 3) for place, part in enumerate(ordered))
    values = [value for part in ordered for value in part.values]
    return _Node("(" + f" {word} ".join(part.sql for part in ordered) + ")", values, stack)


# ---- one key -------------------------------------------------------------------------------------------------------


def _key(field: _Field, test: object, depth: int, left: _Left, *, wanted: bool) -> _Node:
    if not isinstance(test, Mapping):
        left.take()
        return field.leaf("eq", test, wanted=wanted)
    _check_depth(depth)
    left.take(0)
    if not test:
        raise InvalidInput(f"where[{field.shown}] is empty: give a value or a test such as {{'gt': 3}}")
    parts: list[_Node] = []
    for operator, value in test.items():
        if operator == "not":
            parts.append(_key(field, value, depth + 1, left, wanted=not wanted))
        elif operator == "in":
            if not isinstance(value, (list, tuple)):
                raise InvalidInput(f"where[{field.shown}]['in'] is a {type(value).__name__}: give a list of values")
            for _ in value:
                left.take()
            any_of = [field.leaf("eq", item, wanted=wanted) for item in value]
            nothing = _Node("FALSE" if wanted else "TRUE", [])
            parts.append(_joined("OR" if wanted else "AND", any_of) if any_of else nothing)
        elif operator in ORDERS or operator in ("eq", "prefix"):
            left.take()
            parts.append(field.leaf(operator, value, wanted=wanted))
        else:
            known = ", ".join(("eq", *ORDERS, "in", "prefix", "not"))
            raise InvalidInput(f"where[{field.shown}] has the test {shown(operator)}: use {known}, or a plain value")
    return _joined("AND" if wanted else "OR", parts)


class _Field(abc.ABC):
    """What a key of ``where`` stands for. ``leaf`` gives a condition that is true or false, never NULL."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.shown = shown(name)

    def leaf(self, operator: str, value: object, *, wanted: bool) -> _Node:
        sql, values = self.test(operator, value)
        return _Node(sql if wanted else f"NOT {sql}", values)

    @abc.abstractmethod
    def test(self, operator: str, value: object) -> Condition:
        """One comparison; `InvalidInput` for a value that this kind of key can't be compared with."""

    def refuse(self, operator: str, value: object, wanted: str) -> InvalidInput:
        return InvalidInput(f"where[{self.shown}] {operator} {shown(value)}, a {type(value).__name__}: give {wanted}")


class _Text(_Field):
    def test(self, operator: str, value: object) -> Condition:
        column = f"records.{self.name}"
        if value is None and operator == "eq":
            return f"({column} IS NULL)", []
        if not isinstance(value, str):
            raise self.refuse(operator, value, "a str" + " or None" * (operator == "eq"))
        text = check_value(value)
        if operator == "prefix":
            return f"({column} IS NOT NULL AND substr({column}, 1, length(?)) = ?)", [text, text]
        return f"({column} IS NOT NULL AND {column} {ORDERS.get(operator, '=')} ?)", [text]


class _Time(_Field):
    def test(self, operator: str, value: object) -> Condition:
        column = TIMES[self.name]
        if value is None and operator == "eq":
            return f"({column} IS NULL)", []
        if operator == "prefix" or not isinstance(value, (str, dt.datetime)):
            raise self.refuse(operator, value, "a datetime or an ISO 8601 string (prefix compares strings only)")
        when = moment(value, f"where[{self.shown}]")
        assert when is not None
        return f"({column} IS NOT NULL AND {column} {ORDERS.get(operator, '=')} ?)", [utc_seconds(when)]


class _Metadata(_Field):
    def test(self, operator: str, value: object) -> Condition:
        check_value(self.name)
        bound: str | float
        if isinstance(value, str):
            kind, bound = "item.type = 'text'", check_value(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            kind, bound = "item.type IN ('integer', 'real')", self._number(value)
        elif value is None and operator == "eq":
            return self._has("item.type = 'null'"), [self.name]
        elif isinstance(value, bool) and operator == "eq":
            return self._has(f"item.type = '{'true' if value else 'false'}'"), [self.name]
        else:
            order = "a str or a number" if operator != "eq" else "a str, a number, a bool or None"
            raise self.refuse(operator, value, order)
        if operator == "prefix":
            if not isinstance(value, str):
                raise self.refuse(operator, value, "a str")
            return self._has(f"{kind} AND substr(item.value, 1, length(?)) = ?"), [self.name, bound, bound]
        return self._has(f"{kind} AND item.value {ORDERS.get(operator, '=')} ?"), [self.name, bound]

    def _has(self, test: str) -> str:
        return f"EXISTS (SELECT 1 FROM json_each(records.metadata) AS item WHERE item.key = ? AND {test})"

    def _number(self, value: int | float) -> int | float:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"where[{self.shown}] is outside the range of 64-bit integers")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInput(f"where[{self.shown}] is {value}: JSON has no such number")
        return value


def _field(key: str) -> _Field:
    return _Text(key) if key in TEXTS else _Time(key) if key in TIMES else _Metadata(key)


def joined(conditions: Iterable[Condition]) -> Condition:
    """All of these at once."""
    parts: list[str] = []
    values: list[Any] = []
    for sql, some in conditions:
        parts.append(sql)
        values += some
    return " AND ".join(parts) or "TRUE", values
