"""What a plan is made from: how a scope's memories are used, where they live and what is owed, read from the folder.

Knows the ledger, the tables of derived things and the settings; decides nothing, changes nothing, asks no model.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import cores, extraction, heads, planning, prompt
from .economics import costs as costs_of
from .engine import Engine
from .ledger.uses import HAS_TURN, LISTED, beneath
from .plaintext.drafts import utc_seconds
from .plaintext.salience import PRIOR_TURNS
from .planner.places import MOST_DAYS
from .planner.values import Able, Costs, Group, Snapshot, State
from .teaching import contradicted, owner
from .types import LEVELS, Record, Scope

if TYPE_CHECKING:
    from .activation.layouts import Layout

__all__ = ["Seen", "ledgered", "requests_since", "scopes", "snapshot"]

#: Records of one scope that are weighed at most: those used most.
WEIGHED = 500
#: A session without a word for so many seconds has ended.
ENDED_S = 1800.0
#: Unread turns are counted up to here; tokens that reading one takes with its instructions, and writing what it says.
UNREAD = 1000
EXTRACT_TOKENS, ANSWER_TOKENS = 700.0, 40.0
DAY_S = 86_400.0
#: Stands for the session that a next chat opens; no session is named so.
_NEXT = "\0next"
_PLAIN: frozenset[State] = frozenset({"plain"})


@dataclass
class Seen:
    """What the kept uses of one scope say: requests, and how many of them needed which record."""

    requests: int = 0
    first: float = 0.0
    last: float = 0.0
    #: By record: requests that needed it (recalled, or named by the search while it stood in the core).
    uses: dict[str, int] = field(default_factory=dict)
    #: The same by their places in `shown`.
    needed: dict[str, list[int]] = field(default_factory=dict)
    #: By record: tokens of its line, as it was recalled last.
    tokens: dict[str, int] = field(default_factory=dict)
    #: Of each request its id with that of the turn at which its verbatim history began ("": none was shown), and when.
    shown: list[tuple[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    #: Requests that found their head kept, of those whose head is long enough to be found, and the sessions of all.
    warm: int = 0
    findable: int = 0
    sessions: set[str] = field(default_factory=set)
    #: Of the newest request: its id, tokens of its head (system, tools), and those of the history that it leaves.
    latest: str = ""
    session: str = ""
    head: int = 0
    message: int = 0
    behind: int = 0

    def days(self, now: float, since: float = 0.0) -> float:
        """Days that were watched, of what came into being at ``since``."""
        return max(now - max(self.first, since), 60.0) / DAY_S

    def trials(self, record: Record) -> tuple[int, int]:
        """How many of the requests since it was stored could have needed it, and how many there were: those in which a
        turn was told in the history anyway could not. What is out of sight now is needed as often as it was then."""
        stored = utc_seconds(record.created) if record.created else 0.0
        first = bisect.bisect_left(self.times, stored)
        since = len(self.times) - first
        return since - (_told_in(record, self.shown[first:]) if record.source == prompt.CHAT else 0), since

    def needs(self, record: Record) -> int:
        """How many of those that could have needed it did. The search names what a history shows, too: a record that is
        repeated at the end of a small model's prompt would stand there wherever else it lives."""
        at = self.needed.get(record.id, ())
        return len(at) - (_told_in(record, [self.shown[one] for one in at]) if record.source == prompt.CHAT else 0)

    def note(self, row: Any, turn: Mapping[str, Any], slack: int = 0) -> None:
        """One more use, with its turn; in order of time. ``slack`` tokens at the end of a prefix are kept by nobody
        (part of a page)."""
        self.first = self.first or row["at"]
        self.last = row["at"]
        self.requests += 1
        self.latest = str(turn.get("id") or "")
        self.shown.append((self.latest, str(turn.get("start") or "")))
        self.times.append(self.last)
        self.session = row["session"]
        self.sessions.add(self.session)
        recalled = turn.get("recalled") or ()
        for record, size in recalled:
            self.tokens[record] = size
        for record in {*(record for record, _ in recalled), *(turn.get("used") or ())}:
            self.uses[record] = self.uses.get(record, 0) + 1
            self.needed.setdefault(record, []).append(len(self.shown) - 1)
        message, core = int(turn.get("message") or 0), int(turn.get("core") or 0)
        self.head = int(turn.get("system") or 0)
        kept = self.head + core - slack
        self.findable += kept > 0  # of a shorter head nothing is kept, and what is not found says nothing
        self.warm += 0 < 0.9 * kept <= row["cached"]
        told = self.head + core + message + sum(size for _, size in recalled)
        # What this request was answered with is history for the next.
        self.message = message
        self.behind = max(0, row["input"] - told) + message + int(turn.get("reply") or 0)


def _told_in(record: Record, shown: Iterable[tuple[str, str]]) -> int:
    """How many of these requests told this turn in their history."""
    return sum("" < start <= record.id < turn for turn, start in shown)  # ids grow with time


@dataclass
class Ledgered:
    """The kept uses of a handle's scope and beneath it: ``heads`` by the scope whose core stood at the head, ``owners``
    by the scope without a session, to which the records belong."""

    heads: dict[Scope, Seen] = field(default_factory=dict)
    owners: dict[Scope, Seen] = field(default_factory=dict)


def ledgered(engine: Engine, scope: Scope) -> Ledgered:
    """Read the ledger once for all plans beneath ``scope``. A hundred microseconds for ten requests."""
    sql, values = beneath(scope)
    rows = engine.database.query(
        f"SELECT at, tenant, user, agent, session, input, cached, turn FROM uses WHERE {sql} AND {HAS_TURN}"
        " ORDER BY id DESC",
        values,
    )
    named = _heads(engine, scope)
    found = Ledgered()
    ours = engine.provider is not None and engine.provider.capabilities.kv in ("tensors", "slots")
    slack = engine.settings.page_tokens if ours else 0
    for row in reversed(rows):
        try:
            turn = json.loads(row["turn"])
        except ValueError:
            continue
        if not isinstance(turn, dict):
            continue
        session = _scope(row)
        whose = session.model_copy(update={"session": None})
        whose = whose if whose.within(scope) else session
        # The head of a chat is chosen for the handle that it runs on: the narrowest that has one.
        head = next((one for one in (session, whose) if one in named), whose)
        found.heads.setdefault(head, Seen()).note(row, turn, slack)
        found.owners.setdefault(whose, Seen()).note(row, turn, slack)
    return found


def _heads(engine: Engine, scope: Scope) -> set[Scope]:
    """The scopes that have a core block, or prompts laid out by what they cost."""
    sql, values = beneath(scope)
    columns = ", ".join(LEVELS)
    rows = engine.database.query(
        f"SELECT {columns} FROM cores WHERE {sql} UNION SELECT {columns} FROM layouts WHERE {sql}", (*values, *values)
    )
    return {_scope(row) for row in rows}


def _scope(row: Any) -> Scope:
    # Built without validation: these are names that were checked when they were stored, and there may be many rows.
    return Scope.model_construct(**{level: row[level] or None for level in LEVELS})


def scopes(engine: Engine, scope: Scope, seen: Ledgered | None = None) -> list[Scope]:
    """The scopes at and beneath a handle's that there may be something to plan for, the last used first: those with
    uses, core blocks or versions that wait; where a model may write, also those with records. Sessions that ended have
    nothing that will be read again."""
    seen = seen or ledgered(engine, scope)
    over = engine.clock() - ENDED_S
    used = [one for one in dict.fromkeys((*seen.heads, *seen.owners)) if one.session is None or _last(seen, one) > over]
    found = dict.fromkeys(sorted(used, key=lambda one: -_last(seen, one)))
    found.update(dict.fromkeys(sorted((one for one in _heads(engine, scope) if one.session is None), key=str)))
    found.update(dict.fromkeys(whose for whose, _, _ in _owed(engine) if whose.within(scope)))
    if engine.settings.consolidate_writes:
        sql, values = beneath(scope)
        rows = engine.database.query(
            f"SELECT DISTINCT tenant, user, agent, '' AS session FROM records WHERE {sql}", values
        )
        found.update(dict.fromkeys(whose for row in rows if (whose := _scope(row)).within(scope)))
    return list(found)


def _last(seen: Ledgered, scope: Scope) -> float:
    return max((held[scope].last for held in (seen.heads, seen.owners) if scope in held), default=0.0)


def snapshot(engine: Engine, scope: Scope, seen: Ledgered | None = None, *, quiet_s: float = 0.0) -> Snapshot:
    """All that a plan for this one scope is made from. Milliseconds, once `ledgered` was read.

    A conversation that was used within ``quiet_s`` seconds counts as going on. Raises `ConfigError` without a model.
    """
    seen = seen or ledgered(engine, scope)
    now = engine.clock()
    costs = costs_of(engine)
    able = _able(engine, scope)
    head = seen.heads.get(scope, Seen())
    mine = seen.owners.get(scope, Seen())
    standing = (cores.standing(engine, scope) or []) if able.core else []
    built = _built(engine, scope)
    core = _block(engine, scope, standing, head, key="core", now=now)
    kept, size = _kept(engine, [record.id for record in standing], built, head.last)
    if core is not None:
        where: set[State] = {"plain", "core"}
        where |= {"pages"} if kept else set()
        prefixes = _prefixes(engine, scope, [record.id for record in standing]) if able.prefix else []
        where |= {"prefix"} if prefixes else set()
        core = replace(core, where=frozenset(where), bytes=size + sum(prefixes))
    told = head.head or planning.head_tokens(engine, engine.settings.system, (), memories=True)
    cold = now - head.last > costs.lifetime_s or not head.requests
    chosen: Sequence[Record] = ()
    behind = head.behind
    # The history that the next request begins with: that of a session which goes on, or what its layout carries over.
    coming = behind if now - head.last <= ENDED_S else 0
    if able.core and head.requests:
        chosen, layout = _candidate(engine, scope, standing, head, head_tokens=told)
        cold = cold if layout is None else layout.cold
        behind = head.behind if layout is None else layout.behind
        coming = coming if layout is None else layout.behind
    owed = [(digest, remain) for whose, digest, remain in _owed(engine) if whose == scope] if able.lora else []
    return Snapshot(
        at=now,
        scope=scope,
        model=engine.chat_provider().name,
        costs=costs,
        able=able,
        groups=tuple(_groups(engine, scope, mine, standing, able=able, costs=costs, now=now)),
        core=core,
        candidate=_block(engine, scope, chosen, head, key="candidate", now=now),
        behind=behind,
        carried=cores.account(engine, scope).carried,
        cold=cold,
        busy=engine.activity.busy() or (head.requests > 0 and now - head.last < quiet_s),
        stood=(now - built) / DAY_S if core is not None and built else None,
        requests_day=head.requests / head.days(now) if head.requests else 0.0,
        unprimed=_unprimed(engine, told + coming, core, kept=kept, cold=cold, fresh=built > head.last),
        head_known=heads.system_of(engine, scope) is not None,
        owed=tuple(digest for digest, _ in owed),
        owed_records=tuple(remain for _, remain in owed),
        unsealed=tuple(_unsealed(engine, scope, now)) if able.writes else (),
        unread=extraction.unread(engine, scope, UNREAD) if able.writes else 0,
        turn_tokens=EXTRACT_TOKENS if able.writes else 0.0,
        answer_tokens=ANSWER_TOKENS if able.writes else 0.0,
        sessions_day=len(head.sessions) / head.days(now) if head.requests else None,
        warm=head.warm / head.findable if head.findable else None,
        latest=head.latest,
    )


def _able(engine: Engine, scope: Scope) -> Able:
    can, settings = engine.chat_provider().capabilities, engine.settings
    ours = can.kv in ("tensors", "slots")
    own = scope.session is None  # what a session's handle shares with others is planned where it belongs
    return Able(
        core=settings.core_tokens > 0,
        pages=can.kv != "none" and (settings.page_budget > 0 or not ours) and settings.cache != "off",
        prefix=own and can.trains and engine.prefix_view(scope) is not None,
        lora=own and can.trains and can.loras and settings.lora_spares,
        always=settings.lora_when == "always",
        writes=own and can.chat and settings.consolidate_writes,
        shard=settings.lora_shard,
    )


# ---- the core block --------------------------------------------------------------------------------------------------


def _block(
    engine: Engine, scope: Scope, records: Sequence[Record], seen: Seen, *, key: str, now: float
) -> Group | None:
    if not records:
        return None
    sizes = [seen.tokens.get(record.id) or engine.count(prompt.record_line(record)) + 1 for record in records]
    # As many of all requests as of those that could have needed it; they were chosen for having been needed, so the
    # trials count for as many more as in the choice itself.
    parts = [seen.needs(record) / (seen.trials(record)[0] + PRIOR_TURNS) for record in records]
    needed = sum(part * (seen.requests + 1) * size for part, size in zip(parts, sizes, strict=True))
    return Group(
        key=key,
        scope=scope,
        records=tuple(record.id for record in records),
        tokens=engine.count(prompt.quote(records)),
        # So that uses times tokens are the recalled tokens that it spares.
        uses=needed / max(sum(sizes), 1),
        days=seen.days(now),
        edits=float(sum(record.version - 1 for record in records)),
        sightings=min(1 + seen.uses.get(record.id, 0) for record in records),
    )


def _candidate(
    engine: Engine, scope: Scope, standing: Sequence[Record], seen: Seen, *, head_tokens: int
) -> tuple[Sequence[Record], Layout | None]:
    """The block that the next chat would choose, and how its prompt is laid out where prices are known: it goes on with
    the last session, or begins a new one where that has ended."""
    plan = planning.planned(engine, scope)
    if plan is None:
        return cores.candidate(engine, scope), None
    plan.stands(cores.tokens(engine, standing))
    ended = scope.session is None and engine.clock() - seen.last > ENDED_S
    layout = plan.choose(_NEXT if ended else seen.session, head_tokens, seen.message, None)
    present = _told(engine, scope, layout.start)
    review = cores.review(engine, scope, plan.rules, present, standing, fill=layout.core, cached=layout.kept)
    # The same records in another order are no reason to compute anything anew.
    return standing if review.same else review.chosen.records, layout


def _told(engine: Engine, scope: Scope, start: str | None) -> frozenset[str]:
    """The records that a history from this turn on shows: turns, and what was recalled for them and stays."""
    if start is None:
        return frozenset()
    sql, values = beneath(scope)
    rows = engine.database.query(
        f"SELECT id FROM records WHERE {sql} AND source = ? AND seq >= (SELECT seq FROM records WHERE id = ?)"
        f" UNION SELECT record FROM kept WHERE turn IN (SELECT id FROM records WHERE {sql} AND source = ?"
        " AND seq >= (SELECT seq FROM records WHERE id = ?))",
        (*values, prompt.CHAT, start, *values, prompt.CHAT, start),
    )
    return frozenset(row["id"] for row in rows)


def _built(engine: Engine, scope: Scope) -> float:
    rows = engine.database.query(
        "SELECT built FROM cores WHERE tenant = ? AND user = ? AND agent = ? AND session = ?",
        [value or "" for _, value in scope.levels()],
    )
    return float(rows[0]["built"]) if rows else 0.0


def _kept(engine: Engine, core: Sequence[str], built: float, last: float) -> tuple[bool, int]:
    """Whether states of this block are kept here since it was built, and the bytes of all that were made from it. What
    the ``last`` request found or kept of it is noted with the pages only now and then."""
    if not core:
        return False, 0
    [row] = engine.database.query(
        "SELECT coalesce(sum(bytes), 0) AS bytes, coalesce(max(used), 0) AS used FROM pages WHERE hex(key) IN"
        f" (SELECT upper(key) FROM lineage WHERE kind = 'page' AND record IN ({LISTED}))",
        [json.dumps(list(core))],
    )
    slots = engine.database.query(
        f"SELECT 1 FROM lineage WHERE kind = 'slot' AND record IN ({LISTED}) LIMIT 1", [json.dumps(list(core))]
    )
    return bool(slots) or (row["bytes"] > 0 and max(row["used"], last) >= built > 0), row["bytes"]


def _prefixes(engine: Engine, scope: Scope, core: Sequence[str]) -> list[int]:
    """Bytes of the trained prefixes that stand for this block."""
    from .activation.trained import names

    view = engine.prefix_view(scope)
    if view is None or not core or not names(engine.database):
        return []
    return [entry.bytes for entry in view.entries() if set(core) <= set(entry.records)]


def _any_kept(engine: Engine) -> bool:
    """Whether any states are kept here: those of a head without a core are, from the first request that had it on."""
    return bool(engine.database.query("SELECT 1 FROM pages LIMIT 1") or engine.slots.size())


def _unprimed(engine: Engine, beside: int, core: Group | None, *, kept: bool, cold: bool, fresh: bool) -> int:
    """Tokens that the next request begins with, of which nobody keeps the states yet: the core block and what stands
    ``beside`` it, the system part and the history.

    Here they are kept by whole pages; at a host as long as it keeps a prefix, once it was sent.
    """
    tokens = beside + (core.tokens if core is not None else 0)
    capabilities = engine.chat_provider().capabilities
    if capabilities.kv in ("tensors", "slots"):
        if kept if core is not None else _any_kept(engine):
            return 0
        return tokens // engine.settings.page_tokens * engine.settings.page_tokens
    return tokens if cold or (fresh and core is not None) else 0


# ---- records ---------------------------------------------------------------------------------------------------------


def _groups(
    engine: Engine, scope: Scope, seen: Seen, standing: Sequence[Record], *, able: Able, costs: Costs, now: float
) -> Iterator[Group]:
    """One group for each record that is used, or lives elsewhere than in its row."""
    if scope.session is not None:
        return
    learnt: dict[str, int] = {}
    if able.lora:
        for version in engine.registry.active(scope):
            if version.scope == scope:
                learnt.update(dict.fromkeys(version.records, version.bytes // max(len(version.records), 1)))

    def pays(record: Record, size: int) -> bool:
        """Whether it is used so much that teaching it may pay at all: asking what can be asked about it takes long."""
        days = seen.days(now, utc_seconds(record.created) if record.created else 0.0)
        spared = seen.needs(record) / min(days, 1.0) * MOST_DAYS * size * costs.prefill
        return able.lora and costs.learn is not None and spared > costs.learn

    core = {record.id for record in standing}
    most = sorted(seen.uses, key=lambda id_: (-seen.uses[id_], id_))[:WEIGHED]
    records = engine.records.named(list(dict.fromkeys([*most, *core, *learnt])), scope)
    sizes = {r.id: seen.tokens.get(r.id) or engine.count(prompt.record_line(r)) + 1 for r in records}
    taught = _teachable(scope, [r for r in records if r.id in learnt or pays(r, sizes[r.id])], learnt, now)
    for record in records:
        trials, since = seen.trials(record)
        where: set[State] = set(_PLAIN)
        where |= {"core"} if record.id in core else set()
        where |= {"lora"} if record.id in learnt else set()
        uses = seen.needs(record)
        yield Group(
            key=record.id,
            scope=scope,
            records=(record.id,),
            tokens=sizes[record.id],
            uses=uses,
            days=seen.days(now, utc_seconds(record.created) if record.created else 0.0) * (trials + 1) / (since + 1),
            edits=float(record.version - 1),
            where=frozenset(where),
            sightings=1 + seen.uses.get(record.id, 0),
            teachable=record.id in taught,
            bytes=learnt.get(record.id, 0),
        )


def _teachable(scope: Scope, records: Sequence[Record], learnt: Collection[str], now: float) -> set[str]:
    """Those that a LoRA may be taught: trusted, in force, of this owner, uncontradicted, and something can be asked
    about them. What was ``learnt`` had somebody's approval: only what contradicts it tells against it."""
    from .parametric import corpus as corpora

    able: list[Record] = []
    for record in records:
        ended = record.valid_until is not None and utc_seconds(record.valid_until) <= now
        early = record.valid_from is not None and utc_seconds(record.valid_from) > now
        if record.id in learnt:
            able.append(record.model_copy(update={"trust": "trusted"}))
        elif record.trust == "trusted" and not ended and not early and owner(record, scope) == scope:
            able.append(record)
    able.sort(key=lambda record: record.id)  # ids grow with time, and what was said later tells
    held = set(corpora.build(able).records) if able else set()
    beside = {record.id for record in able if record.id in learnt} - held
    return held | (beside - contradicted(able, ()) if beside else set())


# ---- what is owed ----------------------------------------------------------------------------------------------------


def _owed(engine: Engine) -> list[tuple[Scope, str, int]]:
    """Versions that wait to be trained again: scope, digest, how many of their records remain."""
    rows = engine.database.query(
        "SELECT loras.digest, tenant, user, agent, session,"
        " json_array_length(manifest, '$.records') - coalesce(json_array_length(jobs.note, '$.records'), 0) AS remain"
        " FROM jobs JOIN loras ON digest = record WHERE kind = 'retrain' AND jobs.state = 'queued' ORDER BY jobs.id"
    )
    return [(_scope(row), row["digest"], max(0, row["remain"] or 0)) for row in rows]


def _unsealed(engine: Engine, scope: Scope, now: float) -> list[str]:
    """The last record of each session of this scope that ended and was not sealed since, the oldest first."""
    levels = [value or "" for _, value in scope.levels()][:3]
    rows = engine.database.query(
        "SELECT id FROM records WHERE seq IN (SELECT max(seq) FROM records WHERE source = 'chat' AND tenant = ?"
        " AND user = ? AND agent = ? AND session != '' GROUP BY session) AND created <= ? AND NOT EXISTS"
        " (SELECT 1 FROM jobs WHERE jobs.record = records.id AND kind = 'seal' AND state IN ('done', 'failed'))"
        " ORDER BY seq",
        (*levels, now - ENDED_S),
    )
    return [row["id"] for row in rows]


def requests_since(engine: Engine, scope: Scope, at: float) -> Iterable[Any]:
    """The uses of a scope and beneath it since a moment, oldest first: rows of (at, input, cached, money,
    uncached_money, turn, loras)."""
    sql, values = beneath(scope, since=at)
    return engine.database.query(
        f"SELECT at, input, cached, money, uncached_money, turn, loras FROM uses WHERE {sql} AND {HAS_TURN}"
        " ORDER BY id",
        values,
    )
