"""A workload, and a machine's times, by what a folder's ledger has seen.

Reads ``uses``, ``records`` and ``versions``; writes nothing. What the ledger can't tell keeps the default and is named.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median, stdev
from typing import Any

from ..activation.turns import Turn
from ..database import Database
from ..errors import NotFound
from ..ledger.uses import beneath, read_turns
from ..types import Scope
from .offers import Machine
from .workload import Workload, checked

__all__ = ["from_ledger", "machine_of", "models"]

#: Tokens of a page, where its row doesn't say (schema.py).
GRID = 256
#: Newest uses that are read.
READ = 20_000
#: Users from which on their spread is told, and sessions in which a record has to be recalled to count as standing.
MANY, STANDING = 5, 3


def from_ledger(database: Database, scope: Scope | None = None, **changes: Any) -> tuple[Workload, list[str]]:
    """The workload of this scope and beneath it, by its newest chats, and what of it could not be told.

    ``changes`` are numbers that the caller knows better. Raises `NotFound` where there are no chats, and `InvalidInput`
    for changes that no workload has.
    """
    where, values = beneath(scope or Scope())
    rows = database.query(
        f"SELECT at, tenant, user, agent, session, turn FROM uses WHERE {where} AND verb = 'chat' AND turn IS NOT NULL"
        " ORDER BY id DESC LIMIT ?",
        (*values, READ),
    )[::-1]
    chats = [(row, turn) for row in rows for turn in read_turns([row["turn"]])]
    if not chats:
        raise NotFound("the ledger has no chats here that a workload could be read from: give its numbers")
    talks: dict[tuple[str, ...], list[Turn]] = defaultdict(list)
    persons: dict[tuple[str, str], int] = defaultdict(int)
    turns = [turn for _, turn in chats]
    for row, turn in chats:
        talks[row["tenant"], row["user"], row["agent"], turn.session].append(turn)
        persons[row["tenant"], row["user"]] += 1
    users = len(persons)
    each = len(talks) / users
    # Between the first and the last of n sessions lie n - 1 gaps.
    days = max((rows[-1]["at"] - rows[0]["at"]) / 86_400 * (each / (each - 1) if each > 1 else 1.0), 1.0)
    found: dict[str, Any] = {
        "users": users,
        "sessions_day": each / days,
        "turns_session": len(turns) / len(talks),
        "system_tokens": round(fmean(turn.system for turn in turns)),
        "message_tokens": max(fmean(turn.message for turn in turns), 1.0),
        "reply_tokens": max(fmean(turn.reply for turn in turns), 1.0),
        "recalled_tokens": fmean(sum(tokens for _, tokens in turn.recalled) for turn in turns),
    }
    unknown = ["top_k", "retention_days", "months", "standing_facts"]
    gaps = [two.at - one.at for said in talks.values() for one, two in pairwise(said)]
    _told(found, unknown, "gap_s", median(gap for gap in gaps if gap > 0) if any(gap > 0 for gap in gaps) else None)
    recalled = [pair for turn in turns for pair in turn.recalled]
    _told(found, unknown, "record_tokens", max(fmean(tokens for _, tokens in recalled), 1.0) if recalled else None)
    _told(found, unknown, "standing_share", _standing(talks) if recalled else None)
    counts = [math.log(count) for count in persons.values()]
    _told(found, unknown, "spread", min(stdev(counts), 4.0) if users >= MANY else None)
    found |= _memories(database, scope or Scope(), users, days)
    told = [
        f"The workload is that of {len(turns):,} chats of {users:,} users in {days:.3g} days, as the ledger has them.",
        f"The ledger can't tell {', '.join(name for name in unknown if name not in changes)}: those are the defaults.",
    ]
    return checked({**found, **changes}), told


def machine_of(database: Database, model: str) -> Machine | None:
    """The times that this model's uses took, by least squares; None where there are too few to tell.

    Seconds of the clock, on as many cores as the engine used: what they cost is that of the whole machine.
    """
    import numpy as np

    rows = database.query(
        "SELECT input, cached, output, first_s, total_s FROM uses WHERE model = ? AND verb = 'chat' AND first_s > 0"
        " AND money IS NULL ORDER BY id DESC LIMIT 400",
        (model,),
    )
    if len(rows) < MANY:
        return None
    table = np.array([[row["input"] - row["cached"], row["cached"]] for row in rows], float)
    waits = np.array([row["first_s"] for row in rows], float)
    kept = table[:, 1].any()
    solved = np.linalg.lstsq(table if kept else table[:, :1], waits, rcond=None)[0]
    prefill = float(solved[0])
    # A clock that others share can make pages look dearer than computing, or free.
    cached = min(max(float(solved[1]), 0.0), prefill) if kept else prefill
    outputs = sum(row["output"] for row in rows)
    if prefill <= 0 or not outputs:
        return None
    decode = sum(max(row["total_s"] - row["first_s"], 0.0) for row in rows) / outputs
    note = f"measured, {len(rows)} uses of the ledger, seconds of the clock"
    size, tokens = database.query(
        "SELECT COALESCE(SUM(bytes), 0), COALESCE(SUM(CASE grid WHEN 0 THEN ? ELSE grid END), 0) FROM pages", (GRID,)
    )[0]
    return Machine(
        prefill_s=prefill,
        cached_s=cached,
        decode_s=decode,
        token_bytes=size / tokens if tokens else 0.0,
        source={"computing": note, "bytes": "KV pages of this folder" if tokens else "none kept here"},
    )


def models(database: Database) -> list[str]:
    """The models that chats of this folder asked, the most used first."""
    rows = database.query("SELECT model FROM uses WHERE verb = 'chat' GROUP BY model ORDER BY COUNT(*) DESC, model")
    return [str(row["model"]) for row in rows]


def _told(found: dict[str, Any], unknown: list[str], name: str, value: float | None) -> None:
    if value is None:
        unknown.append(name)
    else:
        found[name] = value


def _standing(talks: Mapping[tuple[str, ...], Sequence[Turn]]) -> float:
    """The share of recalled tokens that are of records which were recalled in several sessions."""
    seen: dict[str, set[str]] = defaultdict(set)
    for said in talks.values():
        for turn in said:
            for id_, _ in turn.recalled:
                seen[id_].add(turn.session)
    pairs = [pair for said in talks.values() for turn in said for pair in turn.recalled]
    total = sum(tokens for _, tokens in pairs)
    return sum(tokens for id_, tokens in pairs if len(seen[id_]) >= STANDING) / total if total else 0.0


def _memories(database: Database, scope: Scope, users: int, days: float) -> dict[str, float]:
    where, values = beneath(scope)
    added = database.query(f"SELECT COUNT(*) FROM records WHERE {where} AND source IS NOT 'chat'", values)[0][0]
    edits = database.query(
        f"SELECT COUNT(*) FROM versions WHERE id IN (SELECT id FROM records WHERE {where} AND source IS NOT 'chat')",
        values,
    )[0][0]
    return {"memories_day": added / users / days, "edits_day": edits / users / days}
