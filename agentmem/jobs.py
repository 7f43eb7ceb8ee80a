"""Which moves are being made, by whom, and what came of them: rows of kind ``move`` in the table ``jobs``, with leases.

A lease says until when its owner is believed to be at work; one that passed, or whose process is gone, is taken over.
Knows keys, numbers and times; the notes hold ids and no text.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .database import Database
from .errors import StoreError
from .planner.values import Move, Outcome
from .types import Scope

__all__ = ["LEASE_S", "MOVE", "TRIES", "Job", "Jobs"]

#: The kind of these jobs; their ``record`` is the key of the move.
MOVE = "move"
#: Failed attempts after which a move is left alone: with other records, or another block to replace, it has another
#: key. A process that was killed is no attempt that failed.
TRIES = 3
#: Seconds that a lease lasts; whoever works renews it three times in them.
LEASE_S = 60.0
#: Seconds until a failed move is tried again, times four for each further try.
BACKOFF_S = 60.0
#: Moves that ended and are remembered.
KEPT = 1000
#: The row of ``meta`` that says that consolidation is paused, for all processes.
PAUSED = "consolidation paused"

_log = logging.getLogger("agentmem")


@dataclass(frozen=True)
class Job:
    """A move as the table has it. ``facts`` are numbers that were measured when it was made, ``before`` the ids of the
    records whose place its own took."""

    move: Move
    state: str
    at: float
    tries: int = 0
    owner: str | None = None
    until: float | None = None
    outcome: Outcome | None = None
    facts: dict[str, float] = field(default_factory=dict)
    before: tuple[str, ...] = ()

    def told(self) -> Outcome:
        """What became of it; of one that is under way, that it is."""
        if self.outcome is not None:
            return self.outcome
        note = f"by {self.owner}" if self.state == "running" and self.owner else None
        state: Any = self.state
        return Outcome(move=self.move, state=state, at=self.at, note=note)


class Jobs:
    """The moves of one folder. ``clock`` gives Unix seconds. Safe for many threads and processes.

    Raises `StoreError` where the table can't be read or written.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

    def take(self, move: Move, owner: str, lease_s: float = LEASE_S, *, again: bool = True) -> bool:
        """Make ``owner`` the one who makes this move; False where another is at it, or it is to be left alone; without
        ``again`` also where it was made already, as by another process since it was planned.

        Of all processes and threads that ask at once one gets it: the row is read and written under the write lock.
        """
        now = self._clock()
        with self._database.write() as connection:
            row = connection.execute(
                "SELECT state, tries, note, at FROM jobs WHERE kind = ? AND record = ?", (MOVE, move.key)
            ).fetchone()
            tries = 0
            if row is not None:
                note = _note(row["note"])
                if row["state"] == "running" and not self._lapsed(note, now):
                    return False
                if row["state"] == "failed" and not _again(row["tries"], row["at"], now):
                    return False
                if row["state"] == "done" and not again:
                    return False
                tries = row["tries"] if row["state"] in ("failed", "running", "queued") else 0
            connection.execute(
                "INSERT OR REPLACE INTO jobs (kind, record, state, tries, note, at) VALUES (?, ?, 'running', ?, ?, ?)",
                (MOVE, move.key, tries, _text(move, owner=owner, until=now + lease_s), now),
            )
        return True

    def renew(self, key: str, owner: str, lease_s: float = LEASE_S) -> bool:
        """Go on for another ``lease_s`` seconds; False where the lease was lost to another."""
        with self._database.write() as connection:
            note = self._held(connection, key, owner)
            if note is None:
                return False
            note["until"] = self._clock() + lease_s
            connection.execute("UPDATE jobs SET note = ? WHERE kind = ? AND record = ?", (json.dumps(note), MOVE, key))
        return True

    @contextlib.contextmanager
    def renewed(self, key: str, owner: str, lease_s: float = LEASE_S) -> Generator[None]:
        """Inside, a thread renews the lease, however long the work takes."""
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(lease_s / 3):
                try:
                    if not self.renew(key, owner, lease_s):
                        return
                except StoreError as error:  # the work may end before the lease does
                    _log.warning("the lease of a move could not be renewed: %s", error)

        thread = threading.Thread(target=renew, name="agentmem-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def release(self, key: str, owner: str) -> None:
        """Give the move back, undone: whoever asks next may make it."""
        with self._database.write() as connection:
            note = self._held(connection, key, owner)
            if note is not None:
                note.update(owner=None, until=None)
                connection.execute(
                    "UPDATE jobs SET state = 'queued', note = ? WHERE kind = ? AND record = ?",
                    (json.dumps(note), MOVE, key),
                )

    def done(
        self,
        outcome: Outcome,
        owner: str,
        facts: Mapping[str, float] | None = None,
        *,
        before: Sequence[str] = (),
        final: bool = False,
    ) -> bool:
        """Write down what became of a move; False where its lease was lost, and another tells.

        A failure counts as one of `TRIES`, with ``final`` as all of them.
        """
        key, failed = outcome.move.key, outcome.state == "failed"
        with self._database.write() as connection:
            if self._held(connection, key, owner) is None:
                return False
            connection.execute(
                "UPDATE jobs SET state = ?, tries = CASE WHEN ? THEN max(?, tries + 1) ELSE 0 END, note = ?, at = ?"
                " WHERE kind = ? AND record = ?",
                (
                    outcome.state,
                    failed,
                    TRIES if final else 0,
                    _text(outcome.move, outcome=outcome, facts=dict(facts or {}), before=list(before)),
                    outcome.at,
                    MOVE,
                    key,
                ),
            )
            connection.execute(
                "DELETE FROM jobs WHERE kind = ? AND state IN ('done', 'skipped', 'failed') AND id <="
                " (SELECT id FROM jobs WHERE kind = ? ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (MOVE, MOVE, KEPT),
            )
        return True

    def undo(self, keys: Iterable[str]) -> None:
        """Forget that these moves were made: they may be made again."""
        with self._database.write() as connection:
            connection.executemany(
                "DELETE FROM jobs WHERE kind = ? AND record = ? AND state = 'done'", [(MOVE, key) for key in keys]
            )

    def clear(self, scope: Scope) -> None:
        """Forget moves of this scope that were begun and given up, and that no plan has asked for again."""
        now = self._clock()
        with self._database.write() as connection:
            rows = connection.execute(
                "SELECT record, state, tries, note, at FROM jobs WHERE kind = ? AND state IN ('queued', 'running')",
                (MOVE,),
            ).fetchall()
            for row in rows:
                job = _job(row)
                waits = row["state"] == "queued" or self._lapsed(_note(row["note"]), now)
                if waits and (job is None or job.move.scope.within(scope)):
                    connection.execute("DELETE FROM jobs WHERE kind = ? AND record = ?", (MOVE, row["record"]))

    def jobs(self, scope: Scope | None = None, limit: int = 200) -> list[Job]:
        """The newest moves of this scope and beneath it, newest first; those under way before all others."""
        found: list[Job] = []
        rows = self._database.query(
            "SELECT state, tries, note, at FROM jobs WHERE kind = ? ORDER BY state = 'running' DESC, at DESC, id DESC",
            (MOVE,),
        )
        for row in rows:
            job = _job(row)
            if job is not None and (scope is None or job.move.scope.within(scope)):
                found.append(job)
                if len(found) == limit:
                    break
        return found

    def outcomes(self, scope: Scope | None = None, limit: int = 200) -> list[Outcome]:
        """What became of the newest moves, newest first; those under way are ``running``."""
        return [job.told() for job in self.jobs(scope, limit)]

    def closed(self, again: Sequence[str] = ()) -> set[str]:
        """The keys of moves that are not to be made now: under way elsewhere, left alone after failures, or done, but
        for the kinds that may be made ``again`` under the same key."""
        now = self._clock()
        rows = self._database.query(
            "SELECT record, state, tries, note, at FROM jobs WHERE kind = ? AND (state IN ('running', 'failed') OR"
            " (state = 'done' AND json_extract(note, '$.move.kind') NOT IN (SELECT value FROM json_each(?))))",
            (MOVE, json.dumps(list(again))),
        )
        return {
            row["record"]
            for row in rows
            if row["state"] == "done"
            or (row["state"] == "running" and not self._lapsed(_note(row["note"]), now))
            or (row["state"] == "failed" and not _again(row["tries"], row["at"], now))
        }

    def abandoned(self) -> bool:
        """Whether a move waits that was begun: its process is gone, or it was interrupted."""
        now = self._clock()
        rows = self._database.query(
            "SELECT state, note FROM jobs WHERE kind = ? AND state IN ('running', 'queued')", (MOVE,)
        )
        return any(row["state"] == "queued" or self._lapsed(_note(row["note"]), now) for row in rows)

    # ---- pausing

    def pause(self) -> None:
        """Let no process consolidate this folder in the background until `resume`."""
        with self._database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (PAUSED, repr(self._clock())))

    def resume(self) -> None:
        """Take `pause` back."""
        with self._database.write() as connection:
            connection.execute("DELETE FROM meta WHERE key = ?", (PAUSED,))

    def paused(self) -> bool:
        """Whether consolidation in the background is paused."""
        return bool(self._database.query("SELECT 1 FROM meta WHERE key = ?", (PAUSED,)))

    # ---- leases

    @staticmethod
    def owner() -> str:
        """A name for one run of this process: where it runs, its number, and what tells it from any other."""
        return f"{_place()} {os.getpid()} {secrets.token_hex(8)}"

    def _held(self, connection: Any, key: str, owner: str) -> dict[str, Any] | None:
        row = connection.execute(
            "SELECT note FROM jobs WHERE kind = ? AND record = ? AND state = 'running'", (MOVE, key)
        ).fetchone()
        note = None if row is None else _note(row["note"])
        return note if note is not None and note.get("owner") == owner else None

    def _lapsed(self, note: dict[str, Any], now: float) -> bool:
        """Whether nobody is at work any more, though nobody said so."""
        until = note.get("until")
        # A clock that was set back must not make a lease endless.
        if not isinstance(until, int | float) or not now < until <= now + 10 * LEASE_S:
            return True
        return _gone(str(note.get("owner")))


def _again(tries: int, at: float, now: float) -> bool:
    return tries < TRIES and now >= at + BACKOFF_S * 4 ** max(tries - 1, 0)


def _place() -> str:
    """This machine, or the container in it, in which process numbers mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{platform.node()}{space}".replace(" ", "_") or "here"


def _gone(owner: str) -> bool:
    """Whether the owner's process ran where this one does, and is no more."""
    place, _, rest = owner.partition(" ")
    number = rest.partition(" ")[0]
    if place != _place() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _text(move: Move, *, outcome: Outcome | None = None, **more: Any) -> str:
    told = None if outcome is None else outcome.model_dump(mode="json")
    return json.dumps({"move": move.model_dump(mode="json"), "outcome": told, **more})


def _note(text: str | None) -> dict[str, Any]:
    try:
        note = json.loads(text or "")
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _job(row: Any) -> Job | None:
    note = _note(row["note"])
    try:
        return Job(
            move=Move.model_validate(note["move"]),
            state=row["state"],
            at=row["at"],
            tries=row["tries"],
            owner=note.get("owner"),
            until=note.get("until"),
            outcome=Outcome.model_validate(note["outcome"]) if note.get("outcome") else None,
            facts={str(name): float(value) for name, value in (note.get("facts") or {}).items()},
            before=tuple(map(str, note.get("before") or ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        _log.warning("what became of a move can't be read: %s", str(error).splitlines()[0])
        return None
