"""What a plan is made from: uses by head and by owner, what is kept, what is owed, read from a folder's own rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory, economics, snapshots
from agentmem.activation.turns import Turn
from agentmem.planner.values import Costs
from agentmem.provider import Capabilities
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Scope, Usage

ANA = Scope(user="ana")
DAY = 86_400.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def memory(tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    told = Costs(unit="seconds", prefill=1e-3, cached=5e-5, write=5e-5, minimum=16)
    monkeypatch.setattr(economics, "_measured", lambda *_: told)
    provider = ScriptedProvider(capabilities=Capabilities(chat=True, kv="auto", context_tokens=4096))
    with Memory(tmp_path, model=provider, embedder="none", clock=clock) as opened:
        yield opened


def noted(memory: Memory, scope: Scope, *needed: tuple[str, int], used: tuple[str, ...] = (), **sizes: Any) -> None:
    """A use of this scope that needed these records, as `chat` would note it."""
    engine = memory._engine
    given: dict[str, Any] = {"id": f"t{time.monotonic_ns()}", "system": 50, "core": 0, "message": 10, "reply": 20}
    given |= sizes
    turn = Turn(at=engine.clock(), session=scope.session or "", recalled=needed, used=used, **given)
    usage = Usage(input_tokens=300, cached_tokens=sizes.get("core", 0) + 50, output_tokens=20, total_s=0.1)
    engine.ledger.note("chat", "scripted:test", scope, usage, turn=turn)


def test_uses_are_counted_for_the_owner_and_for_the_head_that_stood(memory: Memory, clock: FakeClock) -> None:
    session = Scope(user="ana", session="open")
    with memory._engine.database.write() as connection:  # a handle of this session has a core block of its own
        connection.execute("INSERT INTO cores VALUES ('', 'ana', '', 'open', '[]', 0, 0)")
    [one, two] = memory.scope(user="ana").add(["I live in Porto.", "I like tea."])
    noted(memory, session, (one.id, 9), used=(two.id,))
    noted(memory, Scope(user="ana", session="another"), (one.id, 9))
    noted(memory, Scope(user="bo", session="x"), (one.id, 9))
    seen = snapshots.ledgered(memory._engine, Scope())
    assert seen.owners[ANA].uses == {one.id: 2, two.id: 1}
    assert seen.owners[ANA].requests == 2
    assert seen.heads[session].uses == {one.id: 1, two.id: 1}
    assert seen.heads[ANA].uses == {one.id: 1}
    assert seen.owners[Scope(user="bo")].requests == 1
    assert set(snapshots.ledgered(memory._engine, ANA).owners) == {ANA}
    assert set(snapshots.scopes(memory._engine, Scope())) == {ANA, session, Scope(user="bo")}
    clock.advance(snapshots.ENDED_S + 1)
    assert session not in snapshots.scopes(memory._engine, Scope())


def test_a_snapshot_says_how_records_are_used_and_where_they_live(memory: Memory, clock: FakeClock) -> None:
    ana = memory.scope(user="ana")
    [one, two, three] = ana.add(["I live in Porto.", "I like tea.", "I have a boat."])
    ana.update(two.id, text="I like green tea.")
    noted(memory, Scope(user="ana", session="s"), (one.id, 9), (two.id, 8))
    clock.advance(2 * DAY)
    noted(memory, Scope(user="ana", session="t"), (one.id, 9))
    with memory._engine.database.write() as connection:
        connection.execute(
            "INSERT OR REPLACE INTO cores VALUES ('', 'ana', '', '', ?, ?, 3)", (f'["{three.id}"]', clock())
        )
    found = snapshots.snapshot(memory._engine, ANA)
    groups = {group.key: group for group in found.groups}
    assert groups[one.id].uses == 2
    assert groups[one.id].days == pytest.approx(2)
    assert (groups[two.id].uses, groups[two.id].edits, groups[two.id].tokens) == (1, 1.0, 8)
    assert groups[three.id].where == {"plain", "core"}
    assert found.core is not None
    assert found.core.records == (three.id,)
    assert found.requests_day == pytest.approx(1)
    assert found.sessions_day == pytest.approx(1)
    assert not found.able.lora
    assert not found.busy
    assert snapshots.snapshot(memory._engine, ANA, quiet_s=60.0).busy  # another process chatted a moment ago
    with memory._engine.activity.chatting():
        assert snapshots.snapshot(memory._engine, ANA).busy


def test_what_stood_in_the_history_was_no_occasion_to_need_it(memory: Memory, clock: FakeClock) -> None:
    """A turn that was told verbatim in most requests, and recalled in each of the few in which it was not."""
    talk = memory.scope(user="ana", session="s")
    [told] = talk.add("I live in Porto.", source="chat")
    turns = []
    for number in range(10):
        clock.advance(1)
        turns += [record.id for record in talk.add(f"Word {number}.")]
    for id_ in turns[:8]:
        noted(memory, Scope(user="ana", session="s"), id=id_, start=told.id)
    for id_ in turns[8:]:
        noted(memory, Scope(user="ana", session="s"), (told.id, 9), id=id_, start=turns[5])
    seen = snapshots.ledgered(memory._engine, ANA).owners[ANA]
    assert seen.requests == 10
    assert seen.uses[told.id] == 2
    assert seen.trials(told) == (2, 10)
    clock.advance(1)
    assert seen.trials(memory.scope(user="ana").add("I like tea.")[0]) == (0, 0)
    group = next(one for one in snapshots.snapshot(memory._engine, ANA).groups if one.key == told.id)
    whole = next(iter(snapshots.snapshot(memory._engine, ANA).groups)).days
    assert group.days <= whole


def test_a_snapshot_changes_nothing_and_is_the_same_again(memory: Memory) -> None:
    [one] = memory.scope(user="ana").add("I live in Porto.")
    noted(memory, Scope(user="ana", session="s"), (one.id, 9))
    before = memory._engine.database.query("SELECT total_changes()")[0][0]
    first = snapshots.snapshot(memory._engine, ANA)
    assert snapshots.snapshot(memory._engine, ANA) == first
    assert memory._engine.database.query("SELECT total_changes()")[0][0] == before


def test_a_use_that_cannot_be_read_is_passed_over(memory: Memory) -> None:
    noted(memory, Scope(user="ana", session="s"))
    with memory._engine.database.write() as connection:
        connection.execute("UPDATE uses SET turn = 'broken'")
    assert snapshots.ledgered(memory._engine, Scope()).owners == {}


def test_a_session_is_unsealed_once_it_has_ended(tmp_path: Path, clock: FakeClock) -> None:
    provider = ScriptedProvider()
    with Memory(tmp_path, model=provider, embedder="none", clock=clock, consolidate_writes=True) as memory:
        talk = memory.scope(user="ana", session="s")
        talk.chat("I live in Porto.")
        assert snapshots.snapshot(memory._engine, ANA).unsealed == ()
        clock.advance(snapshots.ENDED_S + 1)
        last = talk.list()[-1].id
        found = snapshots.snapshot(memory._engine, ANA)
        assert found.unsealed == (last,)
        assert found.unread == 1
        with memory._engine.database.write() as connection:
            connection.execute("INSERT INTO jobs (kind, record, state, at) VALUES ('seal', ?, 'done', 0)", (last,))
        assert snapshots.snapshot(memory._engine, ANA).unsealed == ()


@pytest.mark.slow
def test_ten_thousand_records_are_planned(memory: Memory, clock: FakeClock) -> None:
    ids: list[str] = []
    for first in range(0, 10_000, 500):
        texts = [f"My thing {number} is called Ob{number}." for number in range(first, first + 500)]
        ids += [record.id for record in memory.scope(user="ana").add(texts)]
    with memory._engine.database.write():
        for number in range(3000):
            clock.advance(600)
            needed = tuple((ids[number * step % len(ids)], 12) for step in (1, 7, 31))
            noted(memory, Scope(user="ana", session=f"s{number // 20}"), *dict(needed).items())
    begun = time.process_time()
    plan = memory.consolidate(dry_run=True)
    assert time.process_time() - begun < 20  # about 1 here: a guard against what grows with the square
    assert plan.dry_run


def test_a_head_that_is_too_short_to_be_kept_says_nothing_of_the_cache(memory: Memory, clock: FakeClock) -> None:
    """Else no core block would ever pay: it is what makes the head long enough."""
    seen = snapshots.Seen()
    row = {"at": clock(), "session": "s", "input": 300, "cached": 0}
    for turn, cached, counted in (
        ({"id": "t1", "system": 50}, 0, (0, 0)),
        ({"id": "t2", "system": 50, "core": 200}, 192, (1, 1)),
        ({"id": "t3", "system": 50, "core": 200}, 0, (1, 2)),
    ):
        seen.note({**row, "cached": cached}, turn, slack=64)
        assert (seen.warm, seen.findable) == counted
    memory._engine.provider = ScriptedProvider(capabilities=Capabilities(chat=True, kv="slots", context_tokens=4096))
    noted(memory, Scope(user="ana", session="s"), system=50)
    assert snapshots.snapshot(memory._engine, ANA).warm is None
    noted(memory, Scope(user="ana", session="s"), system=50, core=500)
    assert snapshots.snapshot(memory._engine, ANA).warm == 1.0


def test_what_the_history_shows_anyway_is_needed_by_no_request(memory: Memory, clock: FakeClock) -> None:
    """A small model is told the best records again, though the history shows them: no other place would spare that."""
    ana = memory.scope(user="ana")
    said = ana.chat("I moor my boat in Aveiro.")
    turn = memory.get(said.records[0])
    assert turn is not None
    later = ["f" * 31 + str(number) for number in range(6)]
    for id_ in later[:4]:  # its history begins with the turn
        noted(memory, ANA, used=(turn.id,), id=id_, start=turn.id)
    for id_ in later[4:]:  # and then behind it
        noted(memory, ANA, (turn.id, 12), id=id_, start="f" * 31)
    seen = snapshots.ledgered(memory._engine, ANA).owners[ANA]
    assert seen.uses[turn.id] == 6
    assert seen.needs(turn) == 2
    assert seen.trials(turn)[0] == 3  # with the request that said it
    [group] = [one for one in snapshots.snapshot(memory._engine, ANA).groups if one.key == turn.id]
    assert group.uses == 2
