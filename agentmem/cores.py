"""The core block of a scope: which records stand at the head of its prompts, and what was carried since it was chosen.

Knows the table ``cores`` and the collapse account beside the layouts. What makes a record worth its place is judged in
plaintext/salience.py, when a collapse is due in planner/collapse.py.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from . import economics, prompt
from .activation.layout_state import store, stored
from .engine import Engine
from .errors import NotFound
from .ledger.uses import NEWEST, beneath
from .plaintext.drafts import utc_seconds
from .planner.collapse import Account
from .types import Record, Scope

if TYPE_CHECKING:
    from .activation.layouts import Layout
    from .cache_rules import CacheRules
    from .plaintext.salience import Chosen

__all__ = [
    "Review",
    "account",
    "candidate",
    "collapse",
    "core",
    "keep_account",
    "review",
    "standing",
    "tokens",
    "within",
]

_log = logging.getLogger("agentmem")

#: The newest records that a core is chosen from, and the newest turns that say what is needed.
CORE_CANDIDATES, TURNS_SEEN = 400, 160
#: Turns that a core is expected to stand, until collapses have shown it: what writing it costs is divided among them.
STANDS_TURNS = 50.0
#: What a collapse moves that belief.
MOVES = 0.3
#: Turns that a record must have been needed in before it may stand in a core because it pays.
NEEDED = 2
#: Uses that the prior of how often a core is needed weighs as much as.
PRIOR_NEEDS = 3.0
#: The part of what has to be filled that a core reaches at least: lines are counted without the block's own words.
FILLED = 0.9
#: Kinds of what a model wrote that stand for their sources; a summary has less in it than what it sums up.
INSTEAD = frozenset({"fact", "preference"})


def within(engine: Engine, tokens: int, share: float) -> int:
    """A budget of the settings, cut to this share of the model's window where that is known and small."""
    window = engine.chat_provider().capabilities.context_tokens
    return tokens if window is None else min(tokens, int(window * share))


def tokens(engine: Engine, records: Sequence[Record]) -> int:
    """Tokens of a core block of these records, by our count; 0 for none."""
    return engine.count(prompt.quote(records)) if records else 0


# ---- the block as it stands ------------------------------------------------------------------------------------------


def standing(engine: Engine, scope: Scope) -> list[Record] | None:
    """The core block as it stands, in its order; empty where there is none. None where it has to be chosen anew: one of
    its records was forgotten since, and nothing behind it is cached then, or holds no longer."""
    found = _row(engine, scope)
    return None if found is None or _ended(engine, found[0]) else found[0]


def _row(engine: Engine, scope: Scope) -> tuple[list[Record], int | None] | None:
    """The block, and how many records there were when it was chosen (None: it never was)."""
    rows = engine.database.query(
        "SELECT ids, records FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?", _levels(scope)
    )
    if not rows:
        return [], None
    ids = json.loads(rows[0]["ids"])
    held = engine.records.named(ids, scope)
    # One that was forgotten by another process this very moment is missing: then the core is chosen again.
    return (held, rows[0]["records"]) if len(held) == len(ids) else None


def collapse(
    engine: Engine, scope: Scope, records: Sequence[str] | None = None, *, replaces: Sequence[str] | None = None
) -> list[Record]:
    """Rewrite the block, in one transaction: of exactly these records if all still hold and are visible here, else of
    what `candidate` chooses. Its account begins anew. Doing it twice is doing it once.

    Raises `NotFound`, and changes nothing, where a block stands that is not of the records that it ``replaces``: it was
    chosen since.
    """
    chosen = engine.records.named(records, scope) if records is not None else []
    before = account(engine, scope)
    stood = _stands(engine, scope)
    if records is None or len(chosen) < len(records) or _ended(engine, chosen):
        chosen = candidate(engine, scope)
    with engine.database.write() as connection:
        now = standing(engine, scope) if replaces is not None else None
        if replaces is not None and now is not None and [record.id for record in now] != list(replaces):
            raise NotFound("the core block is another one by now")
        _store(engine, connection, scope, chosen)
        stood += MOVES * (before.turns - stood) if before.turns else 0.0
        state = {**asdict(Account(since=engine.clock())), "stands": stood}
        store(connection, _name(engine), scope, engine.clock(), state)
    return chosen


def _store(engine: Engine, connection: sqlite3.Connection, scope: Scope, chosen: Sequence[Record]) -> None:
    levels = _levels(scope)
    key = json.dumps(levels)
    connection.execute("DELETE FROM lineage WHERE kind = 'core' AND key = ?", (key,))
    connection.execute(
        "INSERT OR REPLACE INTO cores VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*levels, json.dumps([record.id for record in chosen]), engine.clock(), engine.records.count(scope)),
    )
    connection.executemany("INSERT INTO lineage VALUES ('core', ?, ?)", [(key, record.id) for record in chosen])


def _levels(scope: Scope) -> list[str]:
    return [value or "" for _, value in scope.levels()]


# ---- what was carried ------------------------------------------------------------------------------------------------


def account(engine: Engine, scope: Scope) -> Account:
    """What carrying the difference to the core that would be chosen has cost since the last collapse, for the present
    model, in the unit of `economics.costs`."""
    state = stored(engine.database, _name(engine), scope)
    try:
        return Account(**{name: state[name] for name in asdict(Account()) if name in state})
    except TypeError:
        return Account()


def keep_account(engine: Engine, connection: sqlite3.Connection, scope: Scope, now: Account) -> None:
    """Keep it, in the caller's transaction."""
    state = {**asdict(now), "stands": _stands(engine, scope)}
    store(connection, _name(engine), scope, engine.clock(), state)


def _stands(engine: Engine, scope: Scope) -> float:
    """Turns that a core of this scope stands, as far as collapses have shown it."""
    stood = stored(engine.database, _name(engine), scope).get("stands", STANDS_TURNS)
    return max(1.0, float(stood)) if isinstance(stood, int | float) else STANDS_TURNS


def _name(engine: Engine) -> str:
    return "core " + engine.chat_provider().name


# ---- the block that would be chosen ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Review:
    """The core that would be chosen now beside the one that stands, each with what a turn gains by it (in tokens of
    uncached prompt), and the tokens of every record's line in either."""

    chosen: Chosen
    standing: Chosen
    lines: Mapping[str, int]

    @property
    def same(self) -> bool:
        """Whether they are the same records."""
        return {one.id for one in self.chosen.records} == {one.id for one in self.standing.records}


def candidate(engine: Engine, scope: Scope, present: Set[str] | None = None) -> list[Record]:
    """The records of the core that would be chosen now, in order; none where none pays. Changes nothing.

    ``present`` are the records that a prompt shows anyway; where it is not given, the turns from the present beginning
    of the history on.
    """
    rules = engine.cache_rules or economics.local_rules(engine)
    if rules is None:
        return _ranked(engine, scope, engine.settings.core_tokens, engine.settings.page_tokens, present or frozenset())
    return list(review(engine, scope, rules, present, None).chosen.records)


def review(
    engine: Engine,
    scope: Scope,
    rules: CacheRules,
    present: Set[str] | None,
    stands: Sequence[Record] | None,
    *,
    fill: int = 0,
    cached: bool = True,
    ahead: float = math.inf,
) -> Review:
    """What core pays at these prices, and what the one that ``stands`` gains. ``fill`` tokens are chosen even where
    they don't pay by themselves; where the prompt's beginning is not ``cached`` each is paid in full each time. The
    cache is cold after ``ahead`` requests.

    Beside what has to be filled only records that turns were seen to need stand in a core: a question is answered
    better with the record beside it, which costs little as long as it is asked seldom.
    """
    from .plaintext import salience
    from .plaintext.lineage import sources as sources_of

    now = engine.clock()
    begins = _begins(engine, scope) if present is None else None
    old = list(stands or ())
    newest = engine.records.newest(scope, limit=CORE_CANDIDATES, at=now)[::-1]
    past = _past(engine, scope)
    seen = [salience.Seen(turn.at, turn.named, turn.start) for turn in past]
    met = {record.id for record in (*newest, *old)}
    needed = list(dict.fromkeys(id_ for turn in seen for id_ in turn.needed if id_ not in met))
    often = [record for record in engine.records.named(needed, scope) if _holds(record, now)]
    records = [*often, *newest]
    records += [record for record in old if record.id not in {one.id for one in records}]
    learnt = engine.vouched(scope)  # a LoRA version answers for these
    records = [record for record in records if salience.allowed(record) and record.id not in learnt]
    ids = [record.id for record in records]
    sources = sources_of(engine.database, ids)
    lines = dict.fromkeys(ids, 0) | {record.id: _line(engine, record) for record in old}
    scale = _scale(past, old, sum(lines.values()))
    likely = salience.chances(records, seen, edits=_edits(engine, ids), sources=sources, prior=scale)
    life = rules.lifetimes[0]
    read = rules.read if cached else 1.0
    price = read + (life.write - rules.read) / max(1.0, min(_stands(engine, scope), ahead))
    needs = salience.needs(records, seen, sources)
    kinds = {record.id: record.metadata.get("kind") for record in records}

    def chosen_for(filled: int) -> salience.Chosen:
        able = []
        for record in records:
            # A line is counted only where it may be chosen at all: counting is most of the work.
            if filled or (likely[record.id] > price and needs[record.id] >= NEEDED):
                lines[record.id] = lines[record.id] or _line(engine, record)
                shown = record.id in present if present is not None else begins is not None and _told(record, begins)
                if not shown:
                    able.append(salience.Candidate(record, lines[record.id], likely[record.id]))
        return salience.choose(
            able,
            price=price,
            budget=within(engine, engine.settings.core_tokens, 0.1),
            fill=filled,
            instead={id_: of for id_, of in sources.items() if kinds.get(id_) in INSTEAD},
        )

    chosen = chosen_for(fill)
    if chosen.tokens < FILLED * fill:  # there is too little to reach what the host keeps: then it fills nothing
        chosen = chosen_for(0)
    gain = sum((likely.get(one.id, 0.0) - read) * lines.get(one.id, 0) for one in old)
    total = sum(lines.get(one.id, 0) for one in old)
    return Review(chosen, salience.Chosen(tuple(old), total, gain), lines)


def _line(engine: Engine, record: Record) -> int:
    return engine.count(prompt.record_line(record)) + 1


@dataclass(frozen=True, slots=True)
class _Past:
    """A turn: when, the records that its search named, how many of them stood in the core, the core's tokens, and where
    its verbatim history began."""

    at: float
    named: frozenset[str]
    used: int
    core: int
    start: str | None


def _scale(past: Sequence[_Past], old: Sequence[Record], tokens: int) -> float:
    """How often the records of a core were really needed, beside what their words promised: the mean of a Gamma
    posterior over the turns that a core stood in."""
    from .plaintext import salience

    if not old or not tokens:
        return 1.0
    promised = sum(salience.promise(record) for record in old) / tokens  # a token and turn
    expected = sum(turn.core for turn in past) * promised
    return (sum(turn.used for turn in past) + PRIOR_NEEDS) / (expected + PRIOR_NEEDS)


def _past(engine: Engine, scope: Scope) -> list[_Past]:
    """The newest turns of this scope, oldest first."""
    where, values = beneath(scope)
    # The scope's uses are told from an index, and rows are read from the newest on until there are enough.
    rows = engine.database.query(
        f"SELECT at, turn FROM uses WHERE id IN (SELECT id FROM uses WHERE {where} AND {NEWEST})"
        " AND verb = 'chat' AND turn IS NOT NULL ORDER BY id DESC LIMIT ?",
        (*values, TURNS_SEEN),
    )
    found: list[_Past] = []
    for row in reversed(rows):
        turn = json.loads(row["turn"])  # some of its fields: a validated turn each would take most of a review's time
        used = turn.get("used", ())
        named = [id_ for id_, _ in turn.get("recalled", ())]
        found.append(_Past(row["at"], frozenset((*named, *used)), len(used), turn.get("core", 0), turn.get("start")))
    return found


def _begins(engine: Engine, scope: Scope) -> str | None:
    """The id of the turn at which the verbatim history begins now, as far as is known."""
    layouts = stored(engine.database, engine.chat_provider().name, scope).get("layouts")
    try:
        return str(layouts["places"][layouts["start"]][0]) if isinstance(layouts, dict) else None
    except (IndexError, KeyError, TypeError):
        return None


def _told(record: Record, begins: str) -> bool:
    """Whether this is a turn of the history that begins there: ids are in order of arrival."""
    return record.source == prompt.CHAT and record.id >= begins


def _holds(record: Record, now: float) -> bool:
    return record.valid_until is None or utc_seconds(record.valid_until) > now


def _ended(engine: Engine, records: Sequence[Record]) -> bool:
    now = engine.clock()
    return not all(_holds(record, now) for record in records)


def _edits(engine: Engine, ids: Sequence[str]) -> dict[str, int]:
    rows = engine.database.query(
        "SELECT id, COUNT(*) AS edits FROM versions WHERE id IN (SELECT value FROM json_each(?)) GROUP BY id",
        [json.dumps(list(ids))],
    )
    return {row["id"]: row["edits"] for row in rows}


# ---- where no prices are known ---------------------------------------------------------------------------------------


def core(engine: Engine, scope: Scope, layout: Layout | None, present: Set[str], *, new_session: bool) -> list[Record]:
    """The records of the scope's core block where nothing is known of what they cost; as many tokens of them as the
    layout wants, where there is one. Those that are ``present`` in the conversation already are passed over.

    It stands still while a session runs, so that the prefix does; it is chosen again at the start of a session when the
    scope has grown by half since, or when one of its records was forgotten or changed.
    """
    wanted = engine.settings.core_tokens if layout is None else min(layout.core, engine.settings.core_tokens)
    if wanted == 0:
        return []
    row = _row(engine, scope)
    if row is not None and row[1] is not None and not (new_session and _outdated(engine, scope, *row)):
        return row[0]
    least = engine.settings.page_tokens if layout is None else 0
    chosen = _ranked(engine, scope, wanted, least, present)
    with engine.database.write() as connection:
        _store(engine, connection, scope, chosen)
    return chosen


def _ranked(engine: Engine, scope: Scope, wanted: int, least: int, present: Set[str]) -> list[Record]:
    from .plaintext.salience import ranked

    # A session's own turns are its history: its core comes from what the levels above share.
    newest = engine.records.newest(scope, limit=CORE_CANDIDATES, at=engine.clock())[::-1]
    candidates = [r for r in newest if r.id not in present and (scope.session is None or r.scope.session is None)]
    return ranked(
        candidates,
        engine.ledger.times_shown([record.id for record in candidates]),
        budget=within(engine, wanted, 0.1),
        least=least,
        count=lambda record: engine.count(prompt.record_line(record)) + 1,
    )


def _outdated(engine: Engine, scope: Scope, core: Sequence[Record], seen: int | None) -> bool:
    """True if the scope has grown by half since the core was chosen, or one of its records no longer holds."""
    return seen is None or _ended(engine, core) or engine.records.count(scope) >= 1.5 * seen + 8
