"""Consolidation: plan the moves of memory between the kinds scope by scope, make them, say what earlier ones saved.

Knows the order of snapshot, plan and moves, and what they may spend. What pays is decided in planner/, how a move is
made in moving.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from . import snapshots
from .engine import Engine
from .errors import InvalidInput, StoreError
from .flow import Flow
from .jobs import Job, Jobs
from .moving import make
from .plaintext.drafts import shown
from .planner.plan import fit, plan
from .planner.values import Budget, ConsolidationPlan, Move, Outcome, Snapshot
from .progress import progress
from .snapshots import Ledgered, snapshot
from .types import Scope

__all__ = ["consolidate", "due", "outcomes", "scopes"]

#: A move can make another one worth it (what was rewritten is to be primed): plans in one call.
ROUNDS = 3
#: Scopes from which on planning shows its progress.
MANY = 200
#: Earlier moves whose savings are told.
TOLD = 20
#: The row of ``meta`` that says what the last plan of the whole folder had seen.
PLANNED = "consolidation planned"

#: Work that one move may leave a part of. All other keys name what the move acts on, with the newest turn where that
#: matters: made once, there is nothing more to do (and what the user took back since, such as by a rollback, stays so).
_AGAIN = ("extract", "reconcile")

Stop = Callable[[], bool]
_log = logging.getLogger("agentmem")


def consolidate(
    engine: Engine,
    scope: Scope,
    *,
    dry_run: bool = False,
    budget: Budget | Mapping[str, float] | None = None,
    stop: Stop = lambda: False,
    quiet_s: float = 0.0,
) -> Flow[ConsolidationPlan]:
    """Plan for this scope and those beneath it, and make the moves; with ``dry_run`` only say what would be done.

    ``budget`` bounds CPU-seconds, dollars and new bytes; None is the setting ``consolidate_budget``. Once ``stop`` says
    true it returns with what was made so far and the rest in ``left``; the next call goes on. Conversations used within
    ``quiet_s`` seconds keep their head. Without a model there is nothing to plan.
    """
    limit = _budget(engine.settings.consolidate_budget if budget is None else budget)
    if engine.provider is None or not engine.provider.capabilities.chat:
        return ConsolidationPlan(dry_run=bool(dry_run))
    jobs = Jobs(engine.database, engine.clock)
    seen = snapshots.ledgered(engine, scope)
    planned = _planned(engine, scope, seen, jobs, limit, stop=stop, quiet_s=quiet_s)
    if dry_run:
        told = _measured(engine, scope, jobs, seen)
        return ConsolidationPlan(
            dry_run=True, moves=planned.moves, left=planned.left, outcomes=told, costs=planned.costs
        )
    begun = _state(engine)
    if engine.page_view(scope) is not None:
        engine.pages.drop_unstored()
    owner = Jobs.owner()
    made: list[Outcome] = []
    left = planned.left
    tried: set[str] = set()
    todo = list(planned.moves)
    for _ in range(ROUNDS):
        while todo and not stop():
            move = todo.pop(0)
            tried.add(move.key)
            outcome = yield from make(
                engine,
                move,
                stop=stop,
                owner=owner,
                facts=planned.facts.get(move.key),
                again=move.kind in _AGAIN,
            )
            if outcome is None:
                continue
            made = [*(one for one in made if one.move.key != move.key), outcome]  # it may have been interrupted before
            limit = _rest(limit, outcome)
            if outcome.state == "queued":
                todo.insert(0, move)
            if not fit([*todo[:1]], limit)[0]:
                break
        left = (*todo, *planned.left)
        if stop() or not made or all(outcome.state != "done" for outcome in made):
            break
        seen = snapshots.ledgered(engine, scope)
        planned = _planned(engine, scope, seen, jobs, limit, stop=stop, quiet_s=quiet_s)
        todo = [move for move in planned.moves if move.key not in tried]
        left = (*todo, *planned.left)  # what is found behind the last round is the next call's
        if not todo:
            break
    if not stop():
        jobs.clear(scope)
        # What the budget or the rounds had no room for is the next run's: the folder stays due.
        if scope == Scope() and not left:
            _note_planned(engine, begun)
    now = {outcome.move.key for outcome in made}
    made.sort(key=lambda outcome: outcome.state == "queued")  # what was given up is told behind what was made
    earlier = _measured(engine, scope, jobs, seen)
    return ConsolidationPlan(
        moves=tuple(outcome.move for outcome in made if outcome.state != "queued"),
        left=tuple(dict.fromkeys(left)),
        outcomes=(*made, *(outcome for outcome in earlier if outcome.move.key not in now)),
        costs=planned.costs,
    )


def scopes(engine: Engine, scope: Scope) -> list[Scope]:
    """The scopes at and beneath this one that are planned for, each alone, the last used first."""
    return snapshots.scopes(engine, scope)


# ---- planning --------------------------------------------------------------------------------------------------------


class _Planned:
    """The moves for all scopes that fit a budget, those that don't, and the numbers that go with each move's job."""

    def __init__(self) -> None:
        self.moves: tuple[Move, ...] = ()
        self.left: tuple[Move, ...] = ()
        self.costs: dict[str, str] = {}
        self.facts: dict[str, dict[str, float]] = {}


def _planned(
    engine: Engine, scope: Scope, seen: Ledgered, jobs: Jobs, limit: Budget | None, *, stop: Stop, quiet_s: float
) -> _Planned:
    found = _Planned()
    moves: list[Move] = []
    primed: set[tuple[Any, ...]] = set()
    closed = jobs.closed(again=_AGAIN)
    every = snapshots.scopes(engine, scope, seen)
    with progress("planning") if len(every) >= MANY else _silent() as moved:
        for number, one in enumerate(every, 1):
            if stop():
                break
            taken = snapshot(engine, one, seen, quiet_s=quiet_s)
            found.costs = taken.costs.source
            for move in plan(taken).moves:
                head = (move.scope.model_copy(update={"session": None}), move.records, move.tokens)
                if move.key in closed or (move.kind == "prime" and head in primed):
                    continue
                if move.kind == "prime":  # sessions of one user may begin alike: their states are the same
                    primed.add(head)
                moves.append(move)
                found.facts[move.key] = _facts(taken, move)
            if moved:
                moved(number, len(every))
    found.moves, found.left = fit(moves, limit)
    return found


def _facts(taken: Snapshot, move: Move) -> dict[str, float]:
    """What a later look at the savings needs: the saving that is expected of a request, and what a token costs."""
    costs = taken.costs
    prefill, cached = costs.prefill, costs.cached
    if move.kind == "prime":  # of tokens with none before them
        prefill = costs.computing(0, move.tokens) / max(move.tokens, 1)
        cached = costs.loading(1)
    return {
        "a request": move.saves / move.requests if move.requests > 0 else 0.0,
        "prefill": prefill,
        "cached": cached,
        "lora": costs.lora,
        "core": float(taken.core.tokens if taken.core else 0),
    }


@contextlib.contextmanager
def _silent() -> Generator[None]:
    yield None


# ---- what it may spend -----------------------------------------------------------------------------------------------


def _budget(given: Any) -> Budget | None:
    if given is None or isinstance(given, Budget):
        return given
    names = [field.name for field in fields(Budget)]
    if not isinstance(given, Mapping):
        raise InvalidInput(f"budget is a {type(given).__name__}: give a dict of {', '.join(names)}")
    told: dict[str, Any] = {}
    for name, most in given.items():
        if name not in names:
            raise InvalidInput(f"budget has {shown(name)}: give {', '.join(names)}")
        if isinstance(most, bool) or not isinstance(most, int | float) or not 0 <= most < math.inf:
            raise InvalidInput(f"budget[{name!r}] is {shown(most)}: give a number of 0 or more")
        told[name] = int(most) if name == "bytes" else float(most)
    return Budget(**told) if told else None


def _rest(budget: Budget | None, outcome: Outcome) -> Budget | None:
    """What is left once this was spent; a move may cost more than was expected, then nothing is."""
    if budget is None:
        return None
    move, cost, made = outcome.move, outcome.cost or 0.0, outcome.state == "done"
    return Budget(
        seconds=_less(budget.seconds, cost if move.unit == "seconds" else 0.0),
        dollars=_less(budget.dollars, cost if move.unit == "dollars" else 0.0),
        bytes=None if budget.bytes is None else max(0, budget.bytes - (max(0, move.bytes) if made else 0)),
    )


def _less(held: float | None, spent: float) -> float | None:
    return None if held is None else max(0.0, held - spent)


# ---- what moves saved ------------------------------------------------------------------------------------------------


def outcomes(engine: Engine, scope: Scope) -> list[Outcome]:
    """What became of the newest moves in this scope, those that were made with what they saved since."""
    jobs = Jobs(engine.database, engine.clock)
    return list(_measured(engine, scope, jobs, snapshots.ledgered(engine, scope)))


def _measured(engine: Engine, scope: Scope, jobs: Jobs, seen: Ledgered) -> tuple[Outcome, ...]:
    found = jobs.jobs(scope, limit=TOLD)
    later: dict[tuple[Scope, bool], float] = {}
    told: list[Outcome] = []
    since = _since(engine, found)
    for job in found:  # the newest first: what a later one of its kind saves is not the earlier one's
        outcome = job.told()
        if job.state == "done":
            kind = (job.move.scope, job.move.kind in _HEADS)
            tokens = seen.heads.get(job.move.scope) or seen.owners.get(job.move.scope)
            until = later.get(kind) if kind[1] else None
            turns = [one for one in since[job.move.scope] if one[0]["at"] >= job.at]
            outcome = _saved(job, outcome, turns, {} if tokens is None else tokens.tokens, until=until)
            if kind[1]:
                later.setdefault(kind, job.at)
        told.append(outcome)
    return tuple(told)


#: A use, and the turn that it was of.
_Use = tuple[Any, dict[str, Any]]


def _since(engine: Engine, jobs: Sequence[Job]) -> dict[Scope, list[_Use]]:
    """By scope, the requests since the oldest of these moves that was made: each is read once."""
    made = [job for job in jobs if job.state == "done"]
    first = {job.move.scope: job.at for job in sorted(made, key=lambda job: -job.at)}
    return {
        scope: [
            (row, turn)
            for row in snapshots.requests_since(engine, scope, at)
            if isinstance(turn := json.loads(row["turn"]), dict)
        ]
        for scope, at in first.items()
    }


_HEADS = ("collapse", "shrink")
_SAVING = (*_HEADS, "learn", "prime", "distil")


def _saved(
    job: Job, outcome: Outcome, turns: Sequence[_Use], tokens: Mapping[str, int], *, until: float | None
) -> Outcome:
    """The outcome with what the move saved over the ``turns`` since, at the prices that it was planned with, beside
    what was expected of as many requests.

    Of a core block: the records that searches named and that stand in it now and did not before, which would have been
    recalled uncached; less those that were recalled because they stand in it no longer, and less the tokens by which it
    is longer, read from the cache or computed as each request was. Of a LoRA version: the records that searches named
    and that it answered, less what it adds to the requests that it acted on. Of a distilled head: its tokens that came
    from a cache; of a primed one, those of the first request after it.
    """
    facts, move = job.facts, job.move
    if not {"prefill", "cached", "a request"} <= set(facts) or move.kind not in _SAVING:
        return outcome
    turns = [one for one in turns if until is None or one[0]["at"] < until]
    if turns and move.kind in _HEADS:  # until a chat rewrote the block: what follows is not this move's
        stood = turns[0][1].get("core")
        turns = list(itertools.takewhile(lambda one: one[1].get("core") == stood, turns))
    elif move.kind == "prime":  # the next request would have kept what it computed: only it was spared that
        turns = turns[:1]
    if not turns:
        return outcome
    prefill, cached = facts["prefill"], facts["cached"]
    new, old = set(move.records), set(job.before)
    saved = 0.0
    for row, turn in turns:
        used = set(turn.get("used") or ())
        if move.kind in _HEADS:
            spared = sum(tokens.get(record, 0) for record in used & (new - old))
            lost = sum(size for record, size in turn.get("recalled") or () if record in old - new)
            head = int(turn.get("system") or 0) + int(turn.get("core") or 0)
            grown = int(turn.get("core") or 0) - facts.get("core", 0.0)
            saved += (spared - lost) * prefill - grown * (cached if row["cached"] >= 0.9 * head else prefill)
        elif move.kind == "learn":
            spared = sum(tokens.get(record, 0) for record in used & new)
            saved += spared * prefill - (facts.get("lora", 0.0) if row["loras"] else 0.0)
        else:
            saved += min(row["cached"], move.tokens) * (prefill - cached)
    count = len(turns)
    return outcome.model_copy(update={"saved": saved, "expected": facts["a request"] * count, "requests": count})


# ---- whether there is anything to do ---------------------------------------------------------------------------------


def due(engine: Engine) -> bool:
    """Whether a consolidation of the whole folder may find something to do: a move was left half-way, a version waits
    to be trained again, or there were chats or changes since the last plan that left nothing beyond its budget. Takes a
    millisecond."""
    if engine.provider is None or not engine.provider.capabilities.chat:
        return False
    try:
        jobs = Jobs(engine.database, engine.clock)
        if jobs.abandoned():
            return True
        rows = engine.database.query("SELECT value FROM meta WHERE key = ?", (PLANNED,))
        planned = json.loads(rows[0]["value"]) if rows else None
    except ValueError:
        return True
    now = _state(engine)
    if planned is None:
        return now["uses"] > 0 or now["owed"] > 0
    if any(now[name] != planned.get(name) for name in ("uses", "changes", "owed")):
        return True
    # A session that was going on then has ended since.
    last, ended = now["last"], snapshots.ENDED_S
    return engine.settings.consolidate_writes and planned.get("at", 0.0) < last + ended <= engine.clock()


def _state(engine: Engine) -> dict[str, float]:
    """How far the folder has come, in numbers that only what is planned from moves."""
    [row] = engine.database.query(
        "SELECT (SELECT coalesce(max(id), 0) FROM uses WHERE verb = 'chat') AS uses,"
        " coalesce((SELECT at FROM uses WHERE verb = 'chat' ORDER BY id DESC LIMIT 1), 0) AS last,"
        " (SELECT coalesce(max(change), 0) FROM changes) AS changes,"
        " (SELECT count(*) FROM jobs WHERE kind = 'retrain' AND state = 'queued') AS owed"
    )
    return {**dict(row), "at": engine.clock()}


def _note_planned(engine: Engine, state: Mapping[str, float]) -> None:
    try:
        with engine.database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (PLANNED, json.dumps(dict(state))))
    except StoreError as error:
        _log.warning("that the folder was planned could not be noted: %s", error)
