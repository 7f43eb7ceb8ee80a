"""Time and truth: superseding without deleting, searches as of then, histories of records and of matters."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem import AsyncMemory, Memory
from agentmem.errors import ConfigError, InvalidInput, NotFound, ScopeError
from agentmem.provider import Capabilities
from agentmem.testing import FakeClock, ScriptedProvider


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(dt.datetime(2026, 6, 1, tzinfo=dt.UTC).timestamp())


@pytest.fixture
def memory(clock: FakeClock) -> Iterator[Memory]:
    with Memory(":memory:", embedder="hash", clock=clock) as made:
        yield made


def texts(memory: Memory, query: str, at: str | None = None) -> list[str]:
    return [hit.record.text for hit in memory.search(query, at=at)]


def test_what_was_superseded_is_found_as_of_then_and_not_now(memory: Memory) -> None:
    [old] = memory.add("I live in Lisbon", at="2020-01-01")
    [new] = memory.add("I live in Porto", at="2024-03-01", supersedes=old.id)
    assert texts(memory, "where do I live") == ["I live in Porto"]
    assert texts(memory, "where do I live", at="2022-01-01") == ["I live in Lisbon"]
    assert memory.get(old.id).valid_until == new.valid_from == dt.datetime(2024, 3, 1)
    assert [record.text for record in memory.list()] == ["I live in Lisbon", "I live in Porto"]


def test_the_boundary_is_valid_from_else_at_else_now(memory: Memory, clock: FakeClock) -> None:
    ends = []
    for more in ({"valid_from": "2025-01-01", "at": "2025-02-01"}, {"at": "2025-02-01"}, {}):
        [old] = memory.add("old")
        memory.add("new", supersedes=[old.id], **more)  # type: ignore[arg-type]
        ends.append(memory.get(old.id).valid_until)
    assert ends == [dt.datetime(2025, 1, 1), dt.datetime(2025, 2, 1), clock.datetime()]


def test_the_history_of_any_link_is_the_whole_chain(memory: Memory) -> None:
    [first] = memory.add("a", at="2020-01-01")
    memory.update(first.id, "a, corrected")
    [second] = memory.add("b", at="2021-01-01", supersedes=first.id)
    [third] = memory.add("c", at="2022-01-01", supersedes=second.id)
    for link in (first, second, third):
        assert [record.text for record in memory.history(link.id)] == ["a", "a, corrected", "b", "c"]


@pytest.mark.parametrize("embedder", ["default", "hash", "none"])
@pytest.mark.parametrize(
    ("about", "now"),
    [("where I live", "I live in Porto."), ("my dog", "My dog is called Bello."), ("work", "I work as")],
)
def test_other_matters_are_not_told(about: str, now: str, embedder: str) -> None:
    with Memory(":memory:", embedder=embedder) as memory:
        for before, after in (
            ("I live in Lisbon.", "I live in Porto."),
            ("I work as a nurse.", "I work as a teacher."),
            ("My favourite drink is tea.", "My favourite drink is mate."),
            ("My dog is called Rex.", "My dog is called Bello."),
        ):
            [old] = memory.add(before, at="2026-01-01")
            memory.add(after, at="2026-05-05", supersedes=old.id)
        changes = memory.history(about=about)
        assert [change.old is None for change in changes] == [True, False]
        assert changes[-1].new
        assert changes[-1].new.text.startswith(now)


def test_what_changed_about_a_matter(memory: Memory) -> None:
    [old] = memory.add("My favourite drink is tea", at="2020-01-01")
    [new] = memory.add("My favourite drink is coffee", at="2023-01-01", supersedes=old.id)
    memory.update(new.id, "My favourite drink is black coffee")
    memory.add("My favourite drink at night is milk", valid_until="2024-01-01", at="2021-01-01")
    memory.add("My favourite film is Alien")
    changes = memory.history(about="my favourite drink")
    assert [(c.old and c.old.text, c.new and c.new.text) for c in changes] == [
        (None, "My favourite drink is tea"),
        (None, "My favourite drink at night is milk"),
        ("My favourite drink is tea", "My favourite drink is coffee"),
        ("My favourite drink at night is milk", None),
        ("My favourite drink is coffee", "My favourite drink is black coffee"),
    ]
    assert "tea" in str(changes[2])


def test_superseding_obeys_scopes_and_writes_nothing_where_it_fails(memory: Memory) -> None:
    [shared] = memory.add("shared")
    [foreign] = memory.scope(user="bo").add("bo's")
    ana = memory.scope(user="ana")
    with pytest.raises(ScopeError):
        ana.add("x", supersedes=shared.id)
    for unknown in (foreign.id, "0" * 32, "no id"):
        with pytest.raises(NotFound):
            ana.add("x", supersedes=unknown)
    for malformed in (5, [5], {"a": 1}, b"x"):
        with pytest.raises(InvalidInput):
            ana.add("x", supersedes=malformed)  # type: ignore[arg-type]
    assert len(memory.list()) == 2


def test_a_successor_can_not_begin_before_what_it_replaces(memory: Memory) -> None:
    [old] = memory.add("old", valid_from="2025-01-01")
    with pytest.raises(InvalidInput, match="later valid_from"):
        memory.add("new", at="2024-01-01", supersedes=old.id)
    assert memory.list() == [old]


def test_forgetting_the_middle_keeps_one_chain(memory: Memory) -> None:
    [first] = memory.add("a", at="2020-01-01")
    [second] = memory.add("b", at="2021-01-01", supersedes=first.id)
    [third] = memory.add("c", at="2022-01-01", supersedes=second.id)
    memory.forget(second.id)
    assert [record.text for record in memory.history(first.id)] == ["a", "c"]
    assert [record.text for record in memory.history(third.id)] == ["a", "c"]


def test_superseding_survives_reopening(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="hash") as memory:
        [old] = memory.add("I live in Lisbon", at="2020-01-01")
        memory.add("I live in Porto", at="2024-03-01", supersedes=old.id)
    with Memory(tmp_path, embedder="hash") as memory:
        assert texts(memory, "live") == ["I live in Porto"]
        assert memory.verify().ok


@pytest.mark.parametrize("arguments", [{}, {"id": "x", "about": "y"}, {"about": ""}, {"about": 5}, {"id": 5}])
def test_history_wants_one_of_two(memory: Memory, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        memory.history(**arguments)  # type: ignore[call-overload]


def test_trust_is_kept_and_checked(memory: Memory) -> None:
    [record] = memory.add("says a web page", trust="untrusted")
    assert memory.get(record.id).trust == "untrusted"
    assert memory.list({"trust": "untrusted"}) == [record]
    with pytest.raises(InvalidInput):
        memory.add("x", trust="partly")  # type: ignore[arg-type]


async def test_the_async_face_has_them_too() -> None:
    async with AsyncMemory(":memory:", embedder="hash") as memory:
        [old] = await memory.add("I live in Lisbon", at="2020-01-01")
        [new] = await memory.add("I live in Porto", at="2024-01-01", supersedes=old.id)
        assert [record.id for record in await memory.history(old.id)] == [old.id, new.id]
        assert [change.new and change.new.id for change in await memory.history(about="live")] == [old.id, new.id]


def test_no_lora_learns_from_a_stranger_unless_it_is_approved() -> None:
    model = ScriptedProvider(capabilities=Capabilities(chat=True, trains=True))
    with Memory(":memory:", model=model, embedder="none") as memory:
        [stranger] = memory.add("My dog is called Rex.", trust="untrusted")
        [other] = memory.add("Who knows?")
        with pytest.raises(InvalidInput, match="not trusted"):
            memory.parametric.train()
        with pytest.raises(ConfigError, match="no weights"):  # the corpus is made: it is the model that can't
            memory.parametric.train(approve=[stranger.id])
        with pytest.raises(InvalidInput, match="not among"):
            memory.parametric.train(records=[other], approve=[stranger])
        with pytest.raises(NotFound):
            memory.parametric.train(approve=["0" * 32])
        assert memory.get(stranger.id).trust == "untrusted"


def test_a_hit_is_shown_amid_its_neighbours() -> None:
    with Memory(":memory:", embedder="none") as memory:
        ana = memory.scope(user="ana")
        said = ana.scope(session="one").add([f"turn {number}" for number in range(6)])
        ana.scope(session="two").add("another session")
        [note] = ana.add("a note of no session")
        texts = [record.text for record in ana.plaintext.around(said[2].id, before=1, after=2)]
        assert texts == ["turn 1", "turn 2", "turn 3", "turn 4"]
        assert ana.plaintext.around(said[0].id, before=9, after=0) == [said[0]]
        assert ana.plaintext.around(note.id) == [note]
        with pytest.raises(NotFound):
            memory.scope(user="ben").plaintext.around(said[2].id)
