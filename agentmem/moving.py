"""Makes one move of a plan with the component that does such work, under a lease, and says what came of it.

Each is safe to repeat: what stands already is left alone, and the new is committed before the old goes. Knows which
component makes which kind of move; decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from . import chat as chats
from . import cores, distilling, extraction, heads, learning, reconciling
from .chat import Conversation
from .engine import Engine
from .errors import AgentMemError, InvalidInput, NotFound, ProviderError, StoreError
from .flow import Flow, Need, Work, through
from .forgetting import drop_derived
from .jobs import Jobs
from .ledger.uses import beneath
from .planner.values import Move, Outcome
from .publishing import withdraw
from .snapshots import ENDED_S
from .types import LEVELS, Record, Retraining, Scope

__all__ = ["SEALED", "Stopped", "make"]

#: The kind of job that says that a session's gist was taken; its record is the session's last one then.
SEALED = "seal"
#: Pairs of facts that one move asks the model about at most, and turns that it reads.
PAIRS, READ = 64, 64

Stop = Callable[[], bool]
_log = logging.getLogger("agentmem")


class Stopped(Exception):
    """Work was given up because somebody needs the machine; it can be taken up again."""


@dataclass(frozen=True)
class _Made:
    """What came of the work: its state, and what is to be told of it."""

    state: Any = "done"
    note: str | None = None
    #: A failure that will repeat itself.
    final: bool = False
    #: The records whose place the move's took.
    before: tuple[str, ...] = ()


def make(
    engine: Engine,
    move: Move,
    *,
    stop: Stop = lambda: False,
    owner: str | None = None,
    facts: dict[str, float] | None = None,
    again: bool = True,
) -> Flow[Outcome | None]:
    """Make this move; None where another process or thread is at it, or it is to be left alone.

    What fails is an outcome, not an exception: the other moves go on. Once ``stop`` says true the work ends soon and
    the outcome is ``queued``: the next call takes it up. Given up from outside (Ctrl-C, a cancelled task), the lease is
    given back. ``facts`` are numbers to be kept with it. Without ``again`` a move that was made already is left alone.
    """
    jobs = Jobs(engine.database, engine.clock)
    owner = owner or Jobs.owner()
    if not jobs.take(move, owner, again=again):
        return None
    # The whole process's time: a model computes on threads of its library, and the async face works on others than this
    # one; a thread's own clock would miss both. What somebody else computes meanwhile is counted in: a budget that is
    # charged too much is kept, and a move in the background is given up once a chat begins.
    begun, last = time.process_time(), _last_use(engine)
    done = _Made()
    try:
        with jobs.renewed(move.key, owner):
            done = yield from through(_work(engine, move), lambda need: _unless(need, stop))
    except (InvalidInput, NotFound) as error:  # what it was to act on is other than the plan saw it
        done = _Made("skipped", _told(error))
    except AgentMemError as error:
        if stop():
            return _given_back(engine, jobs, move, owner)
        _log.warning("a move (%s of %s) failed: %s", move.kind, move.scope, error)
        done = _Made("failed", _told(error))
    except Stopped:
        return _given_back(engine, jobs, move, owner)
    except BaseException:
        jobs.release(move.key, owner)
        raise
    cost = time.process_time() - begun if move.unit == "seconds" else _dollars(engine, move.scope, last)
    outcome = Outcome(move=move, state=done.state, at=engine.clock(), cost=cost, note=done.note)
    jobs.done(outcome, owner, facts, before=done.before, final=done.final)
    return outcome


def _given_back(engine: Engine, jobs: Jobs, move: Move, owner: str) -> Outcome:
    jobs.release(move.key, owner)
    return Outcome(move=move, state="queued", at=engine.clock(), note="interrupted")


def _told(error: AgentMemError) -> str:
    """What a note says of an error: what a provider says may quote what it was asked, so only the error's name."""
    return type(error).__name__ if isinstance(error, (ProviderError, StoreError)) else str(error).splitlines()[0][:300]


def _unless(need: Need, stop: Stop) -> Need:
    """The need; given up for it, and within long work, once ``stop`` says true."""
    if stop():
        raise Stopped
    if not isinstance(need, Work):
        return need
    work = need.work
    return Work(lambda told: work(lambda: told() or stop()))


def _work(engine: Engine, move: Move) -> Flow[_Made]:
    made: Generator[Any, Any, _Made]
    match move.kind:
        case "collapse" | "shrink":
            made = _collapse(engine, move)
        case "prime":
            made = _prime(engine, move)
        case "learn":
            made = _learn(engine, move)
        case "distil":
            made = _distil(engine, move)
        case "retrain":
            made = _retrain(engine, move)
        case "seal":
            made = _seal(engine, move)
        case "extract":
            made = _extract(engine, move)
        case "reconcile":
            made = _reconcile(engine, move)
        case "evict":
            made = _local(_evict, engine, move)
        case "drop":
            made = _local(_drop, engine, move)
        case "unlearn":
            made = _local(_unlearn, engine, move)
    return (yield from made)


def _local(work: Callable[[Engine, Move], _Made], engine: Engine, move: Move) -> Flow[_Made]:
    return work(engine, move)
    yield  # makes this a generator


def _standing(engine: Engine, move: Move) -> list[Record]:
    """The records of the move; `NotFound` where one is gone: then the plan was made of something else."""
    records = engine.records.named(move.records, move.scope)
    if missing := set(move.records) - {record.id for record in records}:
        raise NotFound(f"{len(missing)} of its records are gone")
    return records


# ---- head of the prompts ---------------------------------------------------------------------------------------------


def _collapse(engine: Engine, move: Move) -> Flow[_Made]:
    def work(_: Stop) -> _Made:
        _standing(engine, move)
        before = [record.id for record in cores.standing(engine, move.scope) or ()]
        if before == list(move.records):
            return _Made("skipped", "it stands already")
        # A chat may have collapsed it since the plan was made: what it chose is newer.
        cores.collapse(engine, move.scope, move.records, replaces=move.replaces)
        return _Made(before=tuple(before))

    made: _Made = yield Work(work)
    return made


def _prime(engine: Engine, move: Move) -> Flow[_Made]:
    """What the next request of this scope begins with is computed (here) or sent (to a host) ahead of it: with the
    history of a session that goes on, else the head of a new one."""
    conversation = Conversation(move.scope, _going_on(engine, move.scope))
    usage = yield from chats.prime(engine, conversation, system=_head(engine, move.scope))
    computed = usage.input_tokens - usage.cached_tokens
    return _Made(note=f"{computed} of {usage.input_tokens} tokens computed")


def _head(engine: Engine, scope: Scope) -> str:
    """The system text of the last chat; `NotFound` where it is none that this process knows by now."""
    if (text := heads.system_of(engine, scope)) is None:
        raise NotFound("what its chats begin with is not known here")
    return text


def _going_on(engine: Engine, scope: Scope) -> Scope | None:
    """The session in which was last spoken, where that is not over."""
    sql, values = beneath(scope, since=engine.clock() - ENDED_S)
    columns = ", ".join(LEVELS)
    rows = engine.database.query(
        f"SELECT {columns} FROM uses WHERE {sql} AND verb = 'chat' ORDER BY id DESC LIMIT 1", values
    )
    session = Scope(**{level: rows[0][level] or None for level in LEVELS}) if rows else None
    return session if session is not None and session.session is not None else None


def _distil(engine: Engine, move: Move) -> Flow[_Made]:
    standing = [record.id for record in cores.standing(engine, move.scope) or ()]
    if move.records and set(standing) != set(move.records):
        raise NotFound("the core block is another one by now")
    text = _head(engine, move.scope)
    prefix = yield from distilling.distil(engine, move.scope, tokens=None, system=text, seed=0)
    if not prefix.gate.passed:
        return _Made("failed", "the trained prefix did not pass its gate", final=True)
    return _Made(note=f"{prefix.tokens} positions for {prefix.stands_for} tokens")


def _evict(engine: Engine, move: Move) -> _Made:
    """Pages made from these records go; they are computed again when they are needed."""
    gone = engine.pages.evict(engine.pages.made_from(move.records))
    return _Made(note=f"{gone} pages") if gone else _Made("skipped", "no page was left of it")


def _drop(engine: Engine, move: Move) -> _Made:
    """Trained prefixes that stand for these records go: their prompts are read in full again."""
    wanted = set(move.records)
    found = [one for one in distilling.prefixes(engine, move.scope) if wanted <= set(one.records)]
    for prefix in found:
        distilling.drop_prefix(engine, move.scope, prefix)
    return _Made(note=f"{len(found)} trained prefixes") if found else _Made("skipped", "there is none any more")


# ---- LoRA versions ---------------------------------------------------------------------------------------------------


def _learn(engine: Engine, move: Move) -> Flow[_Made]:
    """Taught and gated before anything acts; what acted before acts until then."""
    _standing(engine, move)
    if set(move.records) <= _acting(engine, move.scope):
        return _Made("skipped", "an active version learnt them already")
    version = yield from learning.train(
        engine, move.scope, list(move.records), seed=0, epochs=None, activate=True, ram_budget=None
    )
    versions = [engine.registry.get(name, move.scope) for name in version.shards or (version.name,)]
    passed = [one for one in versions if one.state == "ready"]
    note = f"{len(passed)} of {len(versions)} LoRA versions passed their gate"
    return _Made("done" if passed else "failed", note, final=not passed)


def _acting(engine: Engine, scope: Scope) -> set[str]:
    return {record for version in engine.registry.active(scope) for record in version.records}


def _unlearn(engine: Engine, move: Move) -> _Made:
    """Versions that cost more than they spare act no longer; their files stay while there is room. What was said
    otherwise since is taken back for good: its versions are trained again without it."""
    wanted = set(move.records)
    versions = [v for v in engine.registry.active(move.scope) if v.scope == move.scope and wanted & set(v.records)]
    if not versions:
        return _Made("skipped", "no active version learnt them")
    if not move.saves:
        drop_derived(engine, sorted(wanted), pages=False)
        engine.finish_erasures()
        withdraw(engine, [])
        return _Made(note=f"{len(versions)} LoRA versions retired, to be trained again")
    engine.registry.join([], move.scope, instead_of={version.digest for version in versions})
    jobs = Jobs(engine.database, engine.clock)
    learnt = [job.move for job in jobs.jobs(move.scope, limit=10_000) if job.move.kind == "learn"]
    jobs.undo(one.key for one in learnt if wanted & set(one.records))
    return _Made(note=f"{len(versions)} LoRA versions")


def _retrain(engine: Engine, move: Move) -> Flow[_Made]:
    proofs: list[Retraining] = yield from learning.retrain(engine, move.scope)
    if not proofs:
        return _Made("skipped", "nothing waits any more")
    failed = [proof for proof in proofs if proof.state == "failed"]
    note = f"{len(proofs) - len(failed)} of {len(proofs)} trained again"
    return _Made("failed" if failed else "done", note)


# ---- what a model writes ---------------------------------------------------------------------------------------------


def _seal(engine: Engine, move: Move) -> Flow[_Made]:
    """Summaries of the sessions that end with these records; marked one transaction after they are stored."""
    ended = {record.scope for record in _standing(engine, move)}
    found = yield from extraction.extract(engine, move.scope, kinds=("summary",), ended=ended)
    if found.failed and not found.records:
        return _Made("failed", f"{found.failed} readings failed")
    with engine.database.write() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO jobs (kind, record, state, tries, at) SELECT ?, id, 'done', 1, ? FROM records"
            " WHERE id = ?",
            [(SEALED, engine.clock(), id_) for id_ in move.records],
        )
    return _Made(note=f"{len(found.records)} summaries")


def _extract(engine: Engine, move: Move) -> Flow[_Made]:
    found = yield from extraction.extract(engine, move.scope, limit=READ)
    failed = found.failed > 0 and not found.read
    note = f"{found.read} turns read, {len(found.records)} records written, {found.left} left"
    return _Made("failed" if failed else "done", note)


def _reconcile(engine: Engine, move: Move) -> Flow[_Made]:
    found = yield from reconciling.reconcile(engine, move.scope, limit=PAIRS)
    failed = found.failed > 0 and not found.asked
    return _Made("failed" if failed else "done", f"{found.asked} pairs compared, {len(found.conflicts)} conflicts")


# ---- what it cost ----------------------------------------------------------------------------------------------------


def _last_use(engine: Engine) -> int:
    return int(engine.database.query("SELECT coalesce(max(id), 0) FROM uses")[0][0])


def _dollars(engine: Engine, scope: Scope, last: int) -> float:
    """What requests of this scope that are no chats have cost since."""
    sql, values = beneath(scope)
    [row] = engine.database.query(
        f"SELECT coalesce(sum(money), 0) FROM uses WHERE {sql} AND id > ? AND verb NOT IN ('chat', 'embed')",
        (*values, last),
    )
    return float(row[0])
