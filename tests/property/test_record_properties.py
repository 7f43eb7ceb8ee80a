"""The scope rule and exact round trips, over generated scopes, texts and metadata."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.database import Database
from agentmem.errors import AgentMemError, NotFound, ScopeError
from agentmem.plaintext.records import Records, draft_of, drafts
from agentmem.plaintext.search import Searcher
from agentmem.types import LEVELS, Scope

# Values that other systems trimmed, folded, widened or took for a wildcard or for SQL.
ODD = [
    "alice",
    " alice",
    "alice ",
    "alice\n",
    "Alice",
    "*",
    "%",
    "_",
    "null",
    "None",
    "0",
    "' OR 1=1 --",
    "é",
    "e\u0301",
]
values = st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
scopes = st.builds(Scope, **{level: st.none() | values for level in LEVELS})
narrow_scopes = st.builds(Scope, **{level: st.none() | st.sampled_from(ODD[:4]) for level in LEVELS})


@contextlib.contextmanager
def opened() -> Generator[Records]:
    database = Database(":memory:")
    with contextlib.closing(database):
        yield Records(database)


def sees(handle: Scope, record: Scope) -> bool:
    beneath = all(value is None or getattr(record, level) == value for level, value in handle.levels())
    above = all(value is None or getattr(handle, level) == value for level, value in record.levels())
    return beneath or above


@settings(max_examples=30, deadline=None)
@given(st.lists(scopes | narrow_scopes, min_size=1, max_size=12), scopes | narrow_scopes)
def test_a_handle_reads_exactly_what_the_rule_says(owners: list[Scope], handle: Scope) -> None:
    with opened() as records:
        stored = [records.insert(drafts(f"common words {n}", scope=owner))[0] for n, owner in enumerate(owners)]
        expected = {record.id for record in stored if sees(handle, record.scope)}
        assert {record.id for record in records.list(handle)} == expected
        assert {record.id for record in records.newest(handle)} == expected
        assert records.count(handle) == len(expected)
        found = Searcher(records._database, records).search("common words", scope=handle, k=100, now=0.0)
        assert {hit.record.id for hit in found} == expected
        for record in stored:
            if record.id in expected:
                assert records.get(record.id, handle) == record
            else:
                for verb in (records.get, records.history):
                    with pytest.raises(NotFound):
                        verb(record.id, handle)
                with pytest.raises(NotFound):
                    records.update(record.id, handle, text="taken over")
                with pytest.raises(NotFound):
                    records.select(handle, ids=[record.id])


@settings(max_examples=30, deadline=None)
@given(st.lists(scopes | narrow_scopes, min_size=1, max_size=12), scopes | narrow_scopes)
def test_a_handle_changes_and_forgets_only_its_own_and_what_lies_beneath(owners: list[Scope], handle: Scope) -> None:
    with opened() as records:
        stored = [records.insert(drafts("text", scope=owner))[0] for owner in owners]
        own = {record.id for record in stored if record.scope.within(handle)}
        assert set(records.select(handle, where={})) == own == records.ids(handle)
        for record in stored:
            if record.id in own:
                assert records.update(record.id, handle, text="new").version == 2
            elif sees(handle, record.scope):
                with pytest.raises(ScopeError):
                    records.update(record.id, handle, text="new")
                with pytest.raises(ScopeError):
                    records.select(handle, ids=[record.id])


texts = st.text(min_size=1) | st.text(st.characters(), min_size=1)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary()
metadata = st.dictionaries(
    st.text(st.characters()),
    st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8),
)


@settings(max_examples=60, deadline=None)
@given(texts, metadata, st.none() | st.datetimes(timezones=st.none() | st.timezones()), st.none() | texts)
def test_what_is_stored_comes_back_exactly_or_nothing_is_stored(
    text: str, extra: dict[str, Any], at: dt.datetime | None, name: str | None
) -> None:
    with opened() as records:
        message = {"role": "user", "content": text, "name": name, "at": at, "metadata": extra}
        try:
            [draft] = drafts([message], scope=Scope())
        except AgentMemError:
            assert records.count(Scope()) == 0
            return
        [made] = records.insert([draft])
        back = records.get(made.id, Scope())
        assert (back.text, back.name, back.metadata) == (text, name, extra)
        assert repr(back.metadata) == repr(extra)  # 1 is not True and 1.0 is not 1
        assert (back.at and back.at.isoformat()) == (at and at.isoformat())
        assert back == made
        assert draft_of(back) == draft
        assert records.verify() == []


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(), min_size=1), st.lists(texts, max_size=4))
def test_any_query_is_answered_or_refused_by_name(query: str, others: list[str]) -> None:
    with opened() as records:
        for text in others:
            try:
                records.insert(drafts(text, scope=Scope()))
            except AgentMemError:
                continue
        try:
            hits = Searcher(records._database, records).search(query, scope=Scope(), k=3, now=0.0)
        except AgentMemError:
            return
        assert len(hits) <= 3
