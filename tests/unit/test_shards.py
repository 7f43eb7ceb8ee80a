"""Records cut into shards: whole, related ones together, about equal."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.parametric.corpus import build
from agentmem.parametric.shards import shards
from agentmem.types import Record, Scope

DAY = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def record(number: int, text: str = "", session: str | None = None, day: int = 0) -> Record:
    text = text or f"My {'abcdefghij'[number % 10]}{number} number is {number}."
    return Record(id=f"r{number}", text=text, scope=Scope(user="ana", session=session), at=DAY + dt.timedelta(day))


def cut(records: list[Record], size: int) -> list[list[str]]:
    return [[record.id for record in part] for part in shards(build(records), records, size)]


@pytest.mark.parametrize(
    ("count", "size", "lengths"), [(0, 3, []), (3, 3, [3]), (21, 20, [11, 10]), (10, 3, [3, 3, 2, 2])]
)
def test_parts_are_about_equal(count: int, size: int, lengths: list[int]) -> None:
    parts = cut([record(number) for number in range(count)], size)
    assert sorted(map(len, parts), reverse=True) == lengths


def test_a_session_stays_together_in_order_of_time() -> None:
    records = [record(n, session=f"s{n % 2}", day=n) for n in range(6)]
    assert cut(records, 3) == [["r0", "r2", "r4"], ["r1", "r3", "r5"]]


def test_answers_to_one_question_stay_together_above_the_size() -> None:
    tea = [record(n, f"I like {what}.") for n, what in enumerate(["tea", "chess", "opera", "rain"])]
    parts = cut([tea[0], record(8), tea[1], record(9), *tea[2:]], 2)
    assert [part for part in parts if "r0" in part] == [["r0", "r1", "r2", "r3"]]


def test_what_is_not_learnt_is_in_no_part() -> None:
    records = [record(1), record(2, "Hello?"), record(3).model_copy(update={"trust": "untrusted"})]
    assert cut(records, 5) == [["r1"]]


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 9))
def test_every_record_is_in_exactly_one_part(days: list[int], size: int) -> None:
    records = [record(number, day=day, session=f"s{day % 3}") for number, day in enumerate(days)]
    parts = cut(records, size)
    assert sorted(id_ for part in parts for id_ in part) == sorted(r.id for r in records)
    assert all(0 < len(part) <= size for part in parts)
