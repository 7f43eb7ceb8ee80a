"""``where`` in SQL against the same rules in plain Python, over generated records and conditions."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem import Memory
from agentmem.database import Database
from agentmem.errors import InvalidInput
from agentmem.plaintext.conditions import MAX_CONDITIONS, MAX_DEPTH
from agentmem.plaintext.drafts import moment, utc_seconds
from agentmem.plaintext.records import Records, drafts
from agentmem.types import Record, Scope

ROOT = Scope()
ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda mine, value: mine > value,
    "gte": lambda mine, value: mine >= value,
    "lt": lambda mine, value: mine < value,
    "lte": lambda mine, value: mine <= value,
}
ABSENT = object()


@contextlib.contextmanager
def opened() -> Generator[Records]:
    database = Database(":memory:")
    with contextlib.closing(database):
        yield Records(database)


# ---- the rules, in Python --------------------------------------------------------------------------------------------


def holds(record: Record, where: dict[str, Any]) -> bool:
    return all(_key_holds(record, key, value) for key, value in where.items())


def _key_holds(record: Record, key: str, value: Any) -> bool:
    if key == "and":
        return all(holds(record, item) for item in value)
    if key == "or":
        return any(holds(record, item) for item in value)
    if key == "not":
        return not holds(record, value)
    if key == "metadata":
        return all(_test(record.metadata.get(name, ABSENT), test) for name, test in value.items())
    if key in ("at", "created", "valid_from", "valid_until"):
        mine = getattr(record, key)
        return _test(None if mine is None else utc_seconds(mine), value, time=True)
    if key in ("id", "role", "name", "source", "trust"):
        return _test(getattr(record, key), value)
    return _test(record.metadata.get(key, ABSENT), value)


def _test(mine: Any, test: Any, *, time: bool = False) -> bool:
    if not isinstance(test, dict):
        test = {"eq": test}
    for operator, value in test.items():
        if operator == "not":
            good = not _test(mine, value, time=time)
        elif operator == "in":
            good = any(_test(mine, item, time=time) for item in value)
        else:
            wanted = value
            if time and value is not None:
                when = moment(value, "a time")
                assert when is not None
                wanted = utc_seconds(when)
            good = _kind(mine) == _kind(wanted) and _compare(operator, mine, wanted)
        if not good:
            return False
    return True


def _compare(operator: str, mine: Any, value: Any) -> bool:
    if operator == "prefix":
        return isinstance(mine, str) and mine.startswith(value)
    return bool(mine == value if operator == "eq" else ORDERS[operator](mine, value))


def _kind(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number"
    return "absent" if value is ABSENT else type(value).__name__


# ---- generated -------------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "a.b", "$.a", "id", "and", "größe", '"'])
texts = st.sampled_from(["", "a", "ab", "A", "é", "e\u0301", "%", "_", "1", "true", "\U0001f600", "z" * 40])
numbers = st.sampled_from([0, 1, -1, 1.0, 0.1, 1.5, 2**53 + 1, -(2**63), 2**63 - 1, 1e300])
days = st.sampled_from(
    ["2024-01-01", "2024-01-01T00:00:00+02:00", "2023-12-31T22:00:00Z", "2030-06-01T12:00:00.000001"]
)
plain = st.none() | st.booleans() | texts | numbers
metadata = st.dictionaries(names, plain | st.just([1]) | st.just({"a": 1}), max_size=4)


def comparisons(values: st.SearchStrategy[Any], ordered: st.SearchStrategy[Any], *, prefix: bool) -> Any:
    simple = st.one_of(
        values,
        st.fixed_dictionaries({"eq": values}),
        st.dictionaries(st.sampled_from(list(ORDERS)), ordered, min_size=1, max_size=3),
        st.fixed_dictionaries({"in": st.lists(values, max_size=4)}),
        *([st.fixed_dictionaries({"prefix": texts})] if prefix else []),
    )
    return simple | st.fixed_dictionaries({"not": simple | st.fixed_dictionaries({"not": simple})})


keyed = st.one_of(
    st.dictionaries(
        st.sampled_from(["a", "b", "a.b", "$.a"]), comparisons(plain, texts | numbers, prefix=True), max_size=3
    ),
    st.fixed_dictionaries({"metadata": st.dictionaries(names, comparisons(plain, texts, prefix=True), min_size=1)}),
    st.dictionaries(
        st.sampled_from(["role", "name", "source", "trust"]),
        comparisons(st.none() | texts | st.sampled_from(["user", "tool", "untrusted"]), texts, prefix=True),
        max_size=2,
    ),
    st.dictionaries(
        st.sampled_from(["at", "valid_from", "valid_until"]), comparisons(st.none() | days, days, prefix=False)
    ),
)
wheres = st.recursive(
    keyed,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"and": st.lists(inner.filter(bool), min_size=1, max_size=3)}),
        st.fixed_dictionaries({"or": st.lists(inner.filter(bool), min_size=1, max_size=3)}),
        st.fixed_dictionaries({"not": inner.filter(bool)}),
    ),
    max_leaves=12,
)
stored = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "tool"]),
        "name": st.none() | texts.filter(bool),
        "at": st.none() | days,
        "metadata": metadata,
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(stored, st.none() | days), min_size=1, max_size=6), st.lists(wheres, min_size=1, max_size=8))
def test_sql_says_what_python_says(made: list[tuple[dict[str, Any], str | None]], asked: list[dict[str, Any]]) -> None:
    with opened() as records:
        kept = []
        for said, start in made:
            kept += records.insert(drafts({**said, "content": "x"}, scope=ROOT, valid_from=start, source=said["name"]))
        for where in asked:
            expected = [record.id for record in kept if holds(record, where)]
            assert [record.id for record in records.list(ROOT, where)] == expected
            assert records.select(ROOT, where=where) == expected


def test_a_record_is_found_by_its_own_times() -> None:
    with opened() as records:
        [kept] = records.insert(drafts({"role": "user", "content": "x", "at": "2024-05-01T10:00:00+02:00"}, scope=ROOT))
        assert records.list(ROOT, {"created": kept.created, "at": kept.at})
        assert records.list(ROOT, {"at": dt.datetime(2024, 5, 1, 8)})
        assert not records.list(ROOT, {"created": {"gt": kept.created}})


def nested(depth: int, leaf: dict[str, Any]) -> dict[str, Any]:
    for level in range(depth):
        leaf = {("and", "or", "not")[level % 3]: leaf if level % 3 == 2 else [leaf, {"a": level}]}
    return leaf


def test_what_is_within_the_limits_is_answered() -> None:
    with opened() as records:
        [kept] = records.insert(drafts("x", scope=ROOT, metadata={"a": 1}))
        many = [{"a": number} for number in range(MAX_CONDITIONS)]
        assert records.list(ROOT, {"or": many}) == [kept]
        assert records.list(ROOT, {"and": many}) == []
        assert records.list(ROOT, {"a": {"in": list(range(MAX_CONDITIONS))}}) == [kept]
        assert isinstance(records.list(ROOT, nested(MAX_DEPTH - 2, {"a": 1})), list)


def balanced(depth: int) -> dict[str, Any]:
    if depth == 0:
        return {"a": 1}
    inner = balanced(depth - 1)
    return {"or": [{"and": [inner, {"b": 1}]}, {"not": inner}]}


ITSELF: dict[str, Any] = {}
ITSELF["and"] = [ITSELF, ITSELF]


@pytest.mark.parametrize(
    "where",
    [
        {"and": []},
        {"or": {}},
        {"or": [{}]},
        {"not": {}},
        {"not": "x"},
        {"and": [5]},
        {"a": {}},
        {"a": {"gt": None}},
        {"a": {"gt": True}},
        {"a": {"gt": [1]}},
        {"a": {"in": "abc"}},
        {"a": {"in": [[1]]}},
        {"a": {"prefix": 5}},
        {"a": {"between": 5}},
        {"a": {"gt": float("nan")}},
        {"a": {"eq": 2**63}},
        {"a": {"eq": dt.datetime(2024, 1, 1)}},
        {"a": "lone \ud800"},
        {"lone \ud800": 1},
        {"a\0": 1},
        {"at": 5},
        {"at": "yesterday"},
        {"at": {"prefix": "2024"}},
        {"role": {"gt": 5}},
        {"trust": {"in": [5]}},
        {"metadata": "x"},
        {"metadata": {}},
        {"metadata": {5: 1}},
        {5: 1},
        nested(MAX_DEPTH + 1, {"a": 1}),
        {"or": [{"a": n} for n in range(MAX_CONDITIONS + 1)]},
        {"a": {"in": list(range(MAX_CONDITIONS + 1))}},
        balanced(9),
        ITSELF,
    ],
    ids=range(34),
)
def test_what_is_not_understood_is_refused_by_name(where: Any) -> None:
    with opened() as records:
        for call in (lambda: records.list(ROOT, where), lambda: records.select(ROOT, where=where)):
            with pytest.raises(InvalidInput):
                call()


def test_the_deepest_condition_fits_into_a_search() -> None:
    with Memory(":memory:", embedder="none") as memory:
        memory.add("a plain word", metadata={"a": 1})
        twice: dict[str, Any] = {"or": [nested(MAX_DEPTH - 3, {"a": 1}), nested(MAX_DEPTH - 3, {"a": 1})]}
        assert len(memory.search("word", where=twice)) == len(memory.list(twice))
