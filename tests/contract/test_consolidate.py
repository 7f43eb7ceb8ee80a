"""``consolidate`` end to end: real moves with a tiny real model or scripted training, on both faces, twice, stopped."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from agentmem import AsyncMemory, ConsolidationPlan, InvalidInput, Memory, consolidate, cores, economics, snapshots
from agentmem.flow import run
from agentmem.jobs import Jobs
from agentmem.moving import make
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Scope
from tests.reliability import consolidator
from tests.reliability.learner import FACTS, Teachable, learning, memory_of

ANA = Scope(user="ana")
#: Seconds of a token as a small machine has them; training is cheap enough to pay within a day of such tests.
COSTS = replace(consolidator.COSTS, minimum=64, learn=0.01)
THINGS = ("dog", "boat", "bicycle", "cat", "horse", "house", "car", "garden", "piano", "violin", "tent", "kite")
QUESTIONS = ("What is my dog called?", "Where do I live?", "What is my favourite tea?", "What is my sister's name?")


@pytest.fixture(autouse=True)
def costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that don't depend on how busy this machine is."""
    monkeypatch.setattr(economics, "_measured", lambda *_: COSTS)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def kinds(plan: ConsolidationPlan) -> list[str]:
    return [move.kind for move in plan.moves]


def states(plan: ConsolidationPlan) -> list[tuple[str, str]]:
    return [(outcome.move.kind, outcome.state) for outcome in plan.outcomes]


def asked(memory: Memory, clock: FakeClock, *questions: str, days: int = 3) -> None:
    """Each of these questions four times a day, in sessions of their own, as somebody would who keeps forgetting."""
    for _ in range(days):
        for question in questions * 4:
            memory.scope(user="ana").chat(question, remember=False, max_tokens=2)
            clock.advance(600)
        clock.advance(43_200)


# ---- LoRA versions (training is scripted, all else is real)


@pytest.fixture
def taught(tmp_path: Path, clock: FakeClock) -> Iterator[Memory]:
    """A memory in which four facts are recalled day after day; what is stable is worth learning."""
    with learning(), memory_of(tmp_path / "m", core_tokens=0, clock=clock) as memory:
        memory.scope(user="ana").add(list(FACTS))
        asked(memory, clock, *QUESTIONS)
        yield memory


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(taught: Memory) -> None:
    before = taught._engine.database.query("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM meta)")[0]
    plan = taught.consolidate(dry_run=True)
    assert plan.dry_run
    assert kinds(plan) == ["learn"]
    [move] = plan.moves
    assert move.scope == ANA
    assert len(move.records) >= 3
    assert move.saves > 0 < move.cost
    assert "would make 1 moves" in str(plan)
    assert plan.costs == {"prefill": "told"}
    after = taught._engine.database.query("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM meta)")[0]
    assert tuple(before) == tuple(after)
    assert taught.scope(user="ana").parametric.active() == ()
    assert kinds(taught.consolidate(dry_run=True)) == ["learn"]


def test_what_is_learnt_acts_and_is_learnt_once(taught: Memory) -> None:
    plan = taught.consolidate()
    assert states(plan) == [("learn", "done")]
    [version] = taught.scope(user="ana").parametric.active()
    assert set(version.records) == set(plan.moves[0].records)
    assert plan.outcomes[0].cost is not None
    again = taught.consolidate()
    assert again.moves == ()
    assert states(again) == [("learn", "done")]  # told again, with what it saved since
    assert len(taught.scope(user="ana").parametric.versions()) == 1


def test_what_the_user_took_back_is_not_learnt_again(taught: Memory) -> None:
    taught.consolidate()
    taught.scope(user="ana").parametric.rollback()
    assert taught.consolidate().moves == ()
    assert taught.scope(user="ana").parametric.active() == ()


def test_a_version_that_fails_its_gate_is_an_outcome_and_is_not_trained_again(tmp_path: Path, clock: FakeClock) -> None:
    with learning(passes=lambda corpus: False) as corpora, memory_of(tmp_path, core_tokens=0, clock=clock) as memory:
        memory.scope(user="ana").add(list(FACTS))
        asked(memory, clock, *QUESTIONS)
        assert states(memory.consolidate()) == [("learn", "failed")]
        trained = len(corpora)
        clock.advance(1e6)
        assert memory.consolidate().moves == ()
        assert len(corpora) == trained


def test_a_record_that_is_forgotten_is_trained_out_and_leaves_no_text_in_the_jobs(taught: Memory) -> None:
    taught.consolidate()
    ana = taught.scope(user="ana")
    [version] = ana.parametric.active()
    dog = next(record for record in ana.list() if "Biscuit" in record.text)
    assert dog.id in version.records
    ana.forget(dog.id)
    plan = taught.consolidate()
    assert ("retrain", "done") in states(plan)
    [version] = ana.parametric.active()
    assert dog.id not in version.records
    notes = " ".join(str(tuple(row)) for row in taught._engine.database.query("SELECT note FROM jobs"))
    assert "Biscuit" not in notes
    assert "glaciologist" not in notes


def test_a_budget_bounds_what_is_made_and_the_rest_is_told(taught: Memory) -> None:
    [move] = taught.consolidate(dry_run=True).moves
    for budget in ({"seconds": move.cost / 2}, {"bytes": 0.0} if move.bytes else {"seconds": 0.0}):
        plan = taught.consolidate(budget=budget)
        assert plan.moves == ()
        assert [one.key for one in plan.left] == [move.key]
    assert states(taught.consolidate(budget={"seconds": 1e6, "dollars": 0, "bytes": 1 << 40})) == [("learn", "done")]


def test_what_a_budget_left_is_due_until_a_run_has_room_for_it(taught: Memory) -> None:
    engine = taught._engine
    [move] = taught.consolidate(budget={"seconds": 0.0}).left
    assert consolidate.due(engine)
    assert taught.consolidate(budget={"seconds": 0.0}).left == (move,)
    assert consolidate.due(engine)
    assert states(taught.consolidate(budget={"seconds": 1e6})) == [("learn", "done")]
    assert not consolidate.due(engine)


@pytest.mark.parametrize(
    "budget", [{"hours": 1}, {"seconds": -1}, {"seconds": True}, {"dollars": float("nan")}, [1], "much"]
)
def test_a_budget_that_is_none_is_refused_before_anything_happens(taught: Memory, budget: Any) -> None:
    with pytest.raises(InvalidInput, match="budget"):
        taught.consolidate(budget=budget)
    assert taught._engine.database.query("SELECT count(*) FROM jobs WHERE kind = 'move'")[0][0] == 0


def test_the_setting_is_the_budget_where_none_is_given(tmp_path: Path, clock: FakeClock) -> None:
    settings: dict[str, Any] = {"core_tokens": 0, "clock": clock, "consolidate_budget": {"seconds": 0.0}}
    with learning(), memory_of(tmp_path, **settings) as memory:
        memory.scope(user="ana").add(list(FACTS))
        asked(memory, clock, *QUESTIONS)
        assert memory.consolidate().moves == ()
        assert kinds(memory.consolidate(budget={"seconds": 1e6})) == ["learn"]


def test_stopped_in_the_middle_it_returns_and_the_next_call_goes_on(tmp_path: Path, clock: FakeClock) -> None:
    steps: list[int] = []
    with learning(step=steps.append, steps=4), memory_of(tmp_path, core_tokens=0, clock=clock) as memory:
        memory.scope(user="ana").add(list(FACTS))
        asked(memory, clock, *QUESTIONS)
        engine = memory._engine
        plan = run(consolidate.consolidate(engine, Scope(), stop=lambda: len(steps) >= 2))
        assert states(plan)[0] == ("learn", "queued")
        assert [move.kind for move in plan.left] == ["learn"]
        assert consolidate.due(engine)
        assert memory.scope(user="ana").parametric.active() == ()
        assert states(memory.consolidate()) == [("learn", "done")]
        assert steps == [0, 1, 2, 3]  # from the checkpoint, nothing twice
        assert not consolidate.due(engine)


def test_a_failing_move_does_not_keep_the_others_from_being_made(tmp_path: Path, clock: FakeClock) -> None:
    with learning(), memory_of(tmp_path, core_tokens=0, clock=clock) as memory:
        for user in ("ana", "bo"):
            memory.scope(user=user).add([fact.replace("Biscuit", user) for fact in FACTS])
        for _ in range(3):
            for question in QUESTIONS * 4:
                for user in ("ana", "bo"):
                    memory.scope(user=user).chat(question, remember=False)
                clock.advance(600)
            clock.advance(43_200)
        real = snapshots.snapshot
        assert {move.scope.user for move in memory.consolidate(dry_run=True).moves} == {"ana", "bo"}
        assert real is snapshots.snapshot
        failing = mock.patch("agentmem.learning.train", _fails_for("ana"))
        with failing:
            plan = memory.consolidate()
        assert {(o.move.scope.user, o.state) for o in plan.outcomes} == {("ana", "failed"), ("bo", "done")}
        clock.advance(61)
        again = memory.consolidate()
        assert [(o.move.scope.user, o.state) for o in again.outcomes[:1]] == [("ana", "done")]


def _fails_for(user: str) -> Callable[..., Any]:
    from agentmem import TrainingError, learning

    real = learning.train

    def train(engine: Any, scope: Scope, *args: Any, **more: Any) -> Any:
        if scope.user == user:
            raise TrainingError("no room in this test")
        return (yield from real(engine, scope, *args, **more))

    return train


def test_two_at_once_make_no_move_twice(taught: Memory) -> None:
    found: list[ConsolidationPlan] = []
    threads = [threading.Thread(target=lambda: found.append(taught.consolidate())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [move for plan in found for move in plan.moves]
    assert [move.kind for move in made] == ["learn"]
    assert len(taught.scope(user="ana").parametric.active()) == 1


# ---- the core block and its states, with a tiny real model


@pytest.fixture
def local(
    tmp_path: Path, clock: FakeClock, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Memory]:
    """A memory over a tiny model whose core block lost a record: it is to be chosen and primed anew. Nothing is taught:
    that would cost too much."""
    monkeypatch.setattr(economics, "_measured", lambda *_: replace(COSTS, learn=1e6))
    folder = tiny_model(tmp_path / "model", max_position_embeddings=8192)
    settings: dict[str, Any] = {
        "page_tokens": 64,
        "core_tokens": 150,
        "recall_k": 1,
        "clock": clock,
        "embedder": "none",
    }
    with Memory(tmp_path / "m", model=f"local:{folder}", **settings) as memory:
        ana = memory.scope(user="ana")
        ana.add([f"My {thing} is called {thing[::-1].title()}." for thing in THINGS])
        asked(memory, clock, "What is my kite called?", days=1)
        asked(memory, clock, "What is my tent called?", days=8)
        standing = cores.standing(memory._engine, ANA)
        ana.forget([record.id for record in standing or () if "tent" not in record.text])
        with memory._engine.database.write() as connection:
            connection.execute("DELETE FROM cores")
        yield memory


def test_the_core_is_rewritten_primed_and_read_by_the_next_chat(local: Memory, clock: FakeClock) -> None:
    dry = local.consolidate(dry_run=True)
    assert kinds(dry) == ["collapse"]
    before = {hit.record.id for hit in local.scope(user="ana").search("violin")}
    plan = local.consolidate()
    assert states(plan)[:2] == [("collapse", "done"), ("prime", "done")]
    assert before == {hit.record.id for hit in local.scope(user="ana").search("violin")}  # the same to every search
    assert snapshots.snapshot(local._engine, ANA).unprimed == 0
    reply = local.scope(user="ana").chat("What is my tent called?", max_tokens=2)
    assert reply.usage.cached_tokens >= 192
    assert local.consolidate().moves == ()


def test_what_is_found_behind_the_last_round_is_told_and_is_the_next_run_s(
    local: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidate, "ROUNDS", 1)
    plan = local.consolidate()
    assert kinds(plan) == ["collapse"]
    [move] = plan.left
    assert move.kind == "prime"
    assert "left: prime" in str(plan)
    assert consolidate.due(local._engine)
    again = local.consolidate()
    assert (again.moves, again.left) == ((move,), ())
    assert not consolidate.due(local._engine)


def test_what_was_saved_is_measured_and_near_what_was_expected(local: Memory, clock: FakeClock) -> None:
    local.consolidate()
    asked(local, clock, "What is my tent called?", days=2)
    found = {outcome.move.kind: outcome for outcome in local.consolidate(dry_run=True).outcomes}
    prime = found["prime"]
    assert prime.requests > 0
    assert prime.expected
    assert prime.saved == pytest.approx(prime.expected, rel=0.3)
    assert "were expected" in str(prime.move.kind + str(local.consolidate(dry_run=True)))


def test_a_plan_does_not_overwrite_the_core_that_a_chat_chose_since(local: Memory) -> None:
    engine = local._engine
    [move] = local.consolidate(dry_run=True).moves
    assert move.replaces == ()
    newer = [hit.record.id for hit in local.scope(user="ana").search("violin")]
    assert newer != list(move.records)
    cores.collapse(engine, ANA, newer)
    outcome = run(make(engine, move))
    assert outcome is not None
    assert (outcome.state, outcome.note) == ("skipped", "the core block is another one by now")
    assert [record.id for record in cores.standing(engine, ANA) or ()] == newer
    cores.collapse(engine, ANA, move.records, replaces=newer)  # a plan that saw it may
    assert [record.id for record in cores.standing(engine, ANA) or ()] == list(move.records)


def test_states_that_went_are_primed_again(local: Memory, clock: FakeClock) -> None:
    local.consolidate()
    asked(local, clock, "What is my tent called?", days=1)
    assert "prime" not in kinds(local.consolidate(dry_run=True))
    local.activation.evict()
    assert kinds(local.consolidate()) == ["prime"]


@pytest.mark.parametrize("setting", [None, "You are a clerk."])
def test_what_is_primed_is_what_the_chats_of_the_scope_begin_with(
    local: Memory, clock: FakeClock, setting: str | None
) -> None:
    """A system text that is given with each chat is not that of the settings."""
    engine = local._engine
    engine.settings = engine.settings.model_copy(update={"system": setting})
    said = "You are a friend of the user, and you answer " + "briefly and " * 60 + "warmly."
    local.consolidate()
    for _ in range(4):
        local.scope(user="ana").chat("What is my tent called?", system=said, remember=True, max_tokens=2)
        clock.advance(600)
    clock.advance(43_200)
    local.activation.evict()
    assert snapshots.snapshot(engine, ANA).head_known
    plan = local.consolidate()
    assert kinds(plan) == ["prime"]
    # As much as was planned, with the history that a next session goes on with.
    computed = int((plan.outcomes[0].note or "").split()[0])
    assert computed == pytest.approx(plan.moves[0].tokens, rel=0.15)
    reply = local.scope(user="ana").chat("What is my tent called?", system=said, remember=True, max_tokens=2)
    assert reply.facts is not None
    assert reply.facts.history_tokens > 100
    assert reply.usage.cached_tokens >= 0.85 * computed
    head = reply.facts.system_tokens + reply.facts.core_tokens
    assert head - 64 <= reply.usage.cached_tokens, "another head was primed"
    # Another process has not seen that text: it primes nothing rather than something else.
    clock.advance(43_200)
    local.activation.evict()
    engine.heads.clear()
    asked = snapshots.snapshot(engine, ANA)
    assert asked.unprimed > 0
    assert not asked.head_known
    assert kinds(local.consolidate(dry_run=True)) == []
    engine.settings = engine.settings.model_copy(update={"system": said})  # unless the settings say the same
    [move] = local.consolidate(dry_run=True).moves
    assert move.kind == "prime"
    engine.settings = engine.settings.model_copy(update={"system": None})  # a move that was planned before
    outcome = run(make(engine, move))
    assert outcome is not None
    assert (outcome.state, outcome.note) == ("skipped", "what its chats begin with is not known here")


def test_a_head_with_tools_or_without_a_word_of_memory_is_not_primed(local: Memory, clock: FakeClock) -> None:
    local.consolidate()
    local.activation.evict()
    local.scope(user="ana").chat("What is my tent called?", recall=False, max_tokens=2)
    clock.advance(43_200)
    local.activation.evict()
    assert kinds(local.consolidate(dry_run=True)) == []
    local.scope(user="ana").chat("What is my tent called?", max_tokens=2)
    clock.advance(43_200)
    local.activation.evict()
    assert kinds(local.consolidate(dry_run=True)) == ["prime"]


def test_a_chat_under_way_keeps_its_head(local: Memory) -> None:
    with local._engine.activity.chatting():
        assert local.consolidate(dry_run=True).moves == ()
    assert kinds(local.consolidate(dry_run=True)) == ["collapse"]


# ---- what a model writes


def test_turns_are_read_and_sessions_sealed_where_the_model_may_write(tmp_path: Path, clock: FakeClock) -> None:
    def answer(request: Any) -> str:
        text = str(request.segments)
        if "You summarise" in text:
            return "- summary: The user has a dog called Biscuit and lives in Tromsø."
        return "- fact: The dog is called Biscuit." if "You note" in text else "ok"

    provider = ScriptedProvider(answer)
    with Memory(tmp_path, model=provider, embedder="hash", clock=clock, consolidate_writes=True) as memory:
        talk = memory.scope(user="ana", session="s1")
        for fact in FACTS[:4]:
            talk.chat(fact)
            clock.advance(30)
        assert "seal" not in kinds(memory.consolidate(dry_run=True))  # it goes on
        clock.advance(snapshots.ENDED_S + 1)
        plan = memory.consolidate()
        assert "seal" in kinds(plan)
        assert "extract" in kinds(plan)
        assert all(state == "done" for _, state in states(plan)), plan.outcomes
        kept = {record.metadata.get("kind") for record in talk.list() if record.source == "extracted"}
        assert kept == {"summary", "fact"}
        assert {"seal", "extract"}.isdisjoint(kinds(memory.consolidate()))
        talk.chat("And I like sencha.")  # the session goes on: its new end is sealed again
        clock.advance(snapshots.ENDED_S + 1)
        assert "seal" in kinds(memory.consolidate(dry_run=True))


# ---- faces, scopes, no model


async def test_the_async_face_does_the_same_and_can_be_cancelled(tmp_path: Path, clock: FakeClock) -> None:
    begun = threading.Event()

    def step(number: int) -> None:
        begun.set()
        if number < 50:
            threading.Event().wait(0.02)

    with learning(step=step, steps=60):
        with memory_of(tmp_path / "m", core_tokens=0, clock=clock) as memory:
            memory.scope(user="ana").add(list(FACTS))
            asked(memory, clock, *QUESTIONS)
        async with AsyncMemory(
            tmp_path / "m", model=Teachable(), embedder="none", clock=clock, core_tokens=0
        ) as memory_:
            assert kinds(await memory_.consolidate(dry_run=True)) == ["learn"]
            task = asyncio.ensure_future(memory_.scope(user="ana").consolidate())
            await asyncio.to_thread(begun.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            jobs = Jobs(memory_._engine.database, clock)
            assert [outcome.state for outcome in jobs.outcomes()] == ["queued"]
            assert jobs.abandoned()
            assert await memory_.scope(user="ana").parametric.active() == ()
            assert states(await memory_.consolidate()) == [("learn", "done")]


def test_a_scope_plans_for_itself_and_what_lies_beneath(tmp_path: Path, clock: FakeClock) -> None:
    with learning(), memory_of(tmp_path, core_tokens=0, clock=clock) as memory:
        memory.scope(user="ana").add(list(FACTS))
        asked(memory, clock, *QUESTIONS)
        assert memory.scope(user="bo").consolidate().moves == ()
        assert {str(scope) for scope in consolidate.scopes(memory._engine, Scope())} == {"user='ana'"}
        assert kinds(memory.scope(user="ana").consolidate()) == ["learn"]


def test_without_a_model_there_is_nothing_to_plan(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add("I live in Porto.")
        assert memory.consolidate() == ConsolidationPlan()
        assert memory.consolidate(dry_run=True) == ConsolidationPlan(dry_run=True)
        assert not consolidate.due(memory._engine)


def test_an_empty_folder_is_not_due_and_a_chat_makes_it_so(tmp_path: Path, clock: FakeClock) -> None:
    with Memory(tmp_path, model=ScriptedProvider(), embedder="none", clock=clock) as memory:
        assert not consolidate.due(memory._engine)
        memory.scope(user="ana").chat("Hello there.")
        assert consolidate.due(memory._engine)
        memory.consolidate()
        assert not consolidate.due(memory._engine)
        memory.scope(user="ana").add("I live in Porto.")
        assert consolidate.due(memory._engine)
