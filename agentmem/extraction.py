"""Extraction as a job: the configured model notes facts, preferences and summaries of what was said, as new records.

Knows which turns are still to be read, asks, and stores what came with its lineage, turn by turn, each committed: it
can be interrupted and goes on where it stopped. It never changes or deletes what it reads. What the model is asked and
how its answer is read is in plaintext/extract.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import prompt
from .engine import Engine
from .errors import InvalidInput, RateLimited, Rejected, StoreError, Unavailable
from .flow import Flow, Generate
from .flows import embedded_if_up, note_embeddings
from .plaintext import extract as extracting
from .plaintext import lineage
from .plaintext.conditions import beneath
from .plaintext.drafts import check_k, drafts, shown
from .plaintext.extract import Finding, Reading, normal, read_reply
from .progress import progress
from .provider import Generation, Options, Provider, Request
from .types import Extraction, Message, Record, Scope, Segment, Usage

__all__ = ["SOURCE", "ask", "extract", "unread"]

#: The source of what a model wrote.
SOURCE = "extracted"
#: Who says it, where it is recalled: without a name it would stand there as the system's word.
NAME = "note"
TRIES = 3
#: Seconds until a failed turn is read again, times four for each further try.
BACKOFF_S = 60.0
#: A process that died while a model answered leaves a turn claimed for this long.
CLAIMED_S = 600.0
#: Turns before the one that is read, for what "it" and "there" mean.
CONTEXT = 2
CONTEXT_CHARACTERS = 300
#: A longer turn is read by its beginning: what follows is found by search, verbatim.
MOST_CHARACTERS = 6000
#: Turns that are summarised together; of a session that ended, at least.
BLOCK = 12
LEAST = 4
#: In a row: then the model is down, and the run ends.
FAILURES = 3
PAGE = 200
#: Why a reading failed where the model could not be reached.
_DOWN = ("Unavailable", "RateLimited")
_log = logging.getLogger("agentmem")


@dataclass(frozen=True)
class _Unit:
    """What is read in one request: the records shown, of which the last ``read`` count as read by it."""

    kind: str
    records: tuple[Record, ...]
    read: int

    @property
    def done(self) -> tuple[Record, ...]:
        return self.records[-self.read :]


def extract(
    engine: Engine,
    scope: Scope,
    *,
    kinds: Sequence[str] = ("fact", "preference"),
    limit: int | None = None,
    retry: bool = False,
    ended: Collection[Scope] = (),
) -> Flow[Extraction]:
    """Read the turns of this scope that were not read yet; see `Plaintext.extract`.

    Of sessions in ``ended`` the rest is summarised too, however short.
    """
    wanted = _kinds(kinds)
    limit = None if limit is None else check_k(limit, "limit")
    provider = engine.chat_provider()
    counts = {"read": 0, "nothing": 0, "failed": 0, "refused": 0}
    found: dict[str, Record] = {}
    down = 0
    units = list(_units(engine, scope, provider, wanted, retry=retry, ended=ended))
    left = len(units)
    with progress("extracting") as moved:
        for unit in units[:limit]:
            key = _key(engine, provider, unit, wanted)
            if not _claim(engine, key, unit, retry=retry):
                left -= 1
                continue
            try:
                again = _same(engine, key, unit)
                reading = Reading("found") if again else (yield from _read(engine, provider, unit, wanted))
                kept = yield from _keep(engine, key, unit, reading, again)
            except BaseException:  # given up, or an error of the user's to mend: nothing stays claimed
                _release(engine, key, unit)
                raise
            found.update((record.id, record) for record in kept)
            left -= 1
            counts["read"] += reading.state in ("found", "nothing")
            counts["nothing"] += reading.state == "nothing"
            if reading.state in ("failed", "refused"):
                counts[reading.state] += 1
            down = down + 1 if reading.why in _DOWN else 0
            if moved:
                moved(len(units) - left, len(units))
            if down >= FAILURES:
                _log.warning("extraction stops, %s failed %d times in a row: %s", provider.name, down, reading.why)
                break
    return Extraction(records=list(found.values()), left=left, **counts)


def _kinds(kinds: Any) -> tuple[str, ...]:
    listed = (kinds,) if isinstance(kinds, str) else tuple(kinds) if isinstance(kinds, (list, tuple, set)) else ()
    if not listed or not all(isinstance(kind, str) and kind in extracting.KINDS for kind in listed):
        raise InvalidInput(f"kinds is {shown(kinds)}: give some of {', '.join(extracting.KINDS)}")
    return tuple(kind for kind in extracting.KINDS if kind in listed)


# ---- what is to be read ----------------------------------------------------------------------------------------------


def unread(engine: Engine, scope: Scope, most: int) -> int:
    """How many turns of users in this scope no job has read for facts and preferences; counted up to ``most``."""
    prefix = _prefix(engine, engine.chat_provider(), ("fact", "preference"))
    found = _unread(engine, scope, prefix, roles=("user",), retry=False)
    return sum(1 for _ in itertools.islice(filter(_worth, found), most))


def _worth(record: Record) -> bool:
    return len(record.text.split()) > 2 or len(record.text) > 24


def _units(
    engine: Engine,
    scope: Scope,
    provider: Provider,
    kinds: tuple[str, ...],
    *,
    retry: bool,
    ended: Collection[Scope] = (),
) -> Iterator[_Unit]:
    notes = tuple(kind for kind in kinds if kind != "summary")
    if notes:
        prefix = _prefix(engine, provider, notes)
        for record in _unread(engine, scope, prefix, roles=("user",), retry=retry):
            if _worth(record):
                yield _Unit("notes", (*_before(engine, record), record), 1)
    if "summary" in kinds:
        blocks: dict[Scope, list[Record]] = {}
        prefix = _prefix(engine, provider, ("summary",))
        for record in _unread(engine, scope, prefix, roles=("user", "assistant"), retry=retry):
            if record.scope.session is None or record.trust != "trusted":
                continue
            block = blocks.setdefault(record.scope, [])
            block.append(record)
            if len(block) == BLOCK:
                yield _Unit("summary", tuple(blocks.pop(record.scope)), BLOCK)
        for whose, block in blocks.items():
            if whose in ended and len(block) >= LEAST:
                yield _Unit("summary", tuple(block), len(block))


def _prefix(engine: Engine, provider: Provider, kinds: tuple[str, ...]) -> str:
    """What the jobs of one way of reading begin with: other words, another model or other kinds read again."""
    return "extract " + engine.keyed(json.dumps([extracting.VERSION, provider.name, kinds]))[:16] + " "


def _unread(engine: Engine, scope: Scope, prefix: str, *, roles: tuple[str, ...], retry: bool) -> Iterator[Record]:
    """The records of this scope that no job of this way has read, in order of arrival."""
    sql, values = beneath(scope)
    open_ = "state IN ('failed', 'refused')" if retry else "state = 'failed' AND tries < ? AND at <= ?"
    more: list[Any] = [] if retry else [TRIES, engine.clock()]
    last = 0
    while True:
        rows = engine.database.query(
            f"SELECT seq FROM records WHERE {sql} AND seq > ? AND role IN (SELECT value FROM json_each(?))"
            f" AND coalesce(source, '') != '{SOURCE}' AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.record = records.id"
            f" AND kind >= ? AND kind < ? AND NOT ({open_} OR (state = 'running' AND at <= ?)))"
            " ORDER BY seq LIMIT ?",
            [*values, last, json.dumps(roles), prefix, prefix + "\x7f", *more, engine.clock() - CLAIMED_S, PAGE],
        )
        if not rows:
            return
        last = rows[-1]["seq"]
        kept = engine.records.at_rows([row["seq"] for row in rows], scope)
        yield from (kept[row["seq"]] for row in rows if row["seq"] in kept)


def _before(engine: Engine, record: Record) -> tuple[Record, ...]:
    """The turns before this one in its session; a stranger's words are no context for what is trusted."""
    if record.scope.session is None:
        return ()
    levels = [value or "" for _, value in record.scope.levels()]
    rows = engine.database.query(
        "SELECT seq FROM records WHERE tenant = ? AND user = ? AND agent = ? AND session = ?"
        f" AND seq < (SELECT seq FROM records WHERE id = ?) AND coalesce(source, '') != '{SOURCE}'"
        " AND trust = 'trusted' ORDER BY seq DESC LIMIT ?",
        (*levels, record.id, CONTEXT),
    )
    kept = engine.records.at_rows([row["seq"] for row in rows], record.scope)
    return tuple(kept[seq] for seq in sorted(kept))


# ---- jobs ------------------------------------------------------------------------------------------------------------


def _key(engine: Engine, provider: Provider, unit: _Unit, kinds: tuple[str, ...]) -> str:
    """Names what is asked, by content: the same words in the same scope under the same key are asked once."""
    notes = ("summary",) if unit.kind == "summary" else tuple(kind for kind in kinds if kind != "summary")
    levels = [value for _, value in unit.done[-1].scope.levels()]
    return _prefix(engine, provider, notes) + engine.keyed(json.dumps([levels, _shown(unit), unit.read]))[:32]


def _claim(engine: Engine, key: str, unit: _Unit, *, retry: bool) -> bool:
    """Mark these records as being read; False where another process reads or has read them."""
    now = engine.clock()
    with engine.database.write() as connection:
        for record in unit.done:
            row = connection.execute(
                "SELECT state, tries, at FROM jobs WHERE kind = ? AND record = ?", (key, record.id)
            ).fetchone()
            if row is None:
                continue
            again = row["state"] == "failed" and row["tries"] < TRIES and row["at"] <= now
            again = again or (retry and row["state"] in ("failed", "refused"))
            if not (again or (row["state"] == "running" and row["at"] <= now - CLAIMED_S)):
                return False
        connection.executemany(
            "INSERT INTO jobs (kind, record, state, tries, at) VALUES (?, ?, 'running', 0, ?)"
            " ON CONFLICT (kind, record) DO UPDATE SET state = 'running', at = excluded.at",
            [(key, record.id, now) for record in unit.done],
        )
    return True


def _release(engine: Engine, key: str, unit: _Unit) -> None:
    with contextlib.suppress(StoreError), engine.database.write() as connection:
        connection.executemany(
            "DELETE FROM jobs WHERE kind = ? AND record = ? AND state = 'running'",
            [(key, record.id) for record in unit.done],
        )


def _same(engine: Engine, key: str, unit: _Unit) -> list[str]:
    """What the same words gave before, in this scope: records to which this one becomes another source."""
    mine = json.dumps([record.id for record in unit.done])
    rows = engine.database.query(
        "SELECT DISTINCT lineage.key FROM jobs JOIN lineage ON lineage.kind = 'record' AND lineage.record = jobs.record"
        " JOIN records ON records.id = lineage.key WHERE jobs.kind = ? AND jobs.state = 'done' AND jobs.note = 'found'"
        " AND jobs.record NOT IN (SELECT value FROM json_each(?)) AND records.until_s IS NULL",
        (key, mine),
    )
    return [row[0] for row in rows]


# ---- asking and keeping ----------------------------------------------------------------------------------------------


def _shown(unit: _Unit) -> str:
    """The records of a unit as quoted data, in the form that recalled ones have in a prompt."""
    whole = unit.kind == "summary"
    cut = [
        record.model_copy(
            update={
                "text": record.text[: CONTEXT_CHARACTERS * 2 if whole else MOST_CHARACTERS]
                if record in unit.done
                else record.text[:CONTEXT_CHARACTERS]
            }
        )
        for record in unit.records
    ]
    return prompt.quote(cut)


def _read(engine: Engine, provider: Provider, unit: _Unit, kinds: tuple[str, ...]) -> Flow[Reading]:
    text = _shown(unit)
    summary = unit.kind == "summary"
    try:
        generation: Generation = yield from ask(
            engine,
            provider,
            unit.records,
            system=extracting.SYSTEM_SUMMARY if summary else extracting.SYSTEM,
            examples=() if summary else extracting.EXAMPLES,
            text=text,
            max_tokens=300,
        )
    except (Unavailable, RateLimited) as error:
        return Reading("failed", why=type(error).__name__)
    except Rejected:
        return Reading("refused", why="the provider rejected the request")
    notes = ("summary",) if summary else tuple(kind for kind in kinds if kind != "summary")
    # A date that we wrote before a text is no ground for anything.
    said = "\n".join(f"{record.name or record.role}: {record.text}" for record in unit.records)
    return read_reply(generation.text, shown=said, finish=generation.finish_reason, kinds=notes)


def ask(
    engine: Engine,
    provider: Provider,
    records: Sequence[Record],
    *,
    system: str,
    examples: Sequence[tuple[str, str]] = (),
    text: str,
    max_tokens: int,
) -> Flow[Generation]:
    """One request about these records, at temperature 0, noted in the ledger. Raises what the provider raises."""
    head = [Message(role="system", content=system)]
    for question, answer in examples:
        head += [Message(role="user", content=question), Message(role="assistant", content=answer)]
    ids = tuple(record.id for record in records)
    scope = records[-1].scope
    request = Request(
        segments=(
            Segment(name="system", messages=tuple(head[:1]), stable=True),
            *([Segment(name="history", messages=tuple(head[1:]), stable=True)] if len(head) > 1 else []),
            Segment(name="turn", messages=(Message(role="user", content=text, records=ids),), stable=False),
        ),
        options=Options(max_tokens=max_tokens, temperature=0.0),
        cache_key=engine.cache_key(scope),
        tenant=engine.tenant_key(scope),
        pages=engine.page_view(scope),
    )
    engine.ledger.check(scope, provider.name)
    holds_s = provider.capabilities.holds_prefix_s
    if holds_s is not None:
        engine.ledger.note_shown(provider.name, ids, holds_s)
    generation: Generation = yield Generate(provider, request)
    engine.ledger.note("extract", provider.name, scope, generation.usage, here=holds_s is None)
    return generation


def _keep(engine: Engine, key: str, unit: _Unit, reading: Reading, again: Sequence[str]) -> Flow[list[Record]]:
    """Store what came of a unit: the new records, their lineage and the job's state, in one transaction."""
    scope = unit.done[-1].scope
    untrusted = any(record.trust != "trusted" for record in unit.records)
    last = unit.done[-1]
    new = []
    for finding in reading.findings:
        new += drafts(
            {
                "role": "system",
                "name": NAME,
                "content": finding.text,
                "at": last.at,
                "metadata": {"kind": finding.kind},
            },
            scope=scope,
            source=SOURCE,
            valid_from=last.valid_from,
            valid_until=last.valid_until,
            trust="untrusted" if untrusted else "trusted",
            redact=engine.redact,
        )
    noted: list[Usage] = []
    vectors = yield from embedded_if_up(engine, new, noted, "what was extracted")
    ids = [record.id for record in unit.records]
    with engine.database.write() as connection:
        now = {record.id: record.version for record in engine.records.named(ids, Scope())}
        if any(now.get(record.id) != record.version for record in unit.records):
            # Forgotten or corrected while the model spoke: what it says is of words that should be gone.
            lineage.redo(connection, [record.id for record in unit.done])
            return []
        names = [_name(engine, scope, finding) for finding in reading.findings]
        known = [_known(engine, name, untrusted=untrusted) for name in names]
        fresh = [place for place, id_ in enumerate(known) if id_ is None]
        picked = None if vectors is None else vectors.pick(fresh)
        made = engine.records.insert([new[place] for place in fresh], picked, engine.space if picked else None)
        for place, record in zip(fresh, made, strict=True):
            known[place] = record.id
            connection.execute(
                "INSERT INTO jobs (kind, record, state, at) VALUES (?, ?, 'done', ?)",
                (names[place], record.id, engine.clock()),
            )
        written = [id_ for id_ in (*known, *again) if id_ is not None]
        lineage.link(connection, "record", [(id_, source) for id_ in written for source in ids])
        state = "done" if reading.state in ("found", "nothing") else reading.state
        tries = connection.execute("SELECT max(tries) FROM jobs WHERE kind = ?", (key,)).fetchone()[0] or 0
        wait = BACKOFF_S * 4**tries if state == "failed" else 0.0
        connection.executemany(
            "UPDATE jobs SET state = ?, tries = ?, note = ?, at = ? WHERE kind = ? AND record = ?",
            [
                (state, tries + 1, reading.why or reading.state, engine.clock() + wait, key, record.id)
                for record in unit.done
            ],
        )
        note_embeddings(engine, scope, noted)
    return engine.records.named(list(dict.fromkeys(written)), scope)


def _name(engine: Engine, scope: Scope, finding: Finding) -> str:
    levels = [value for _, value in scope.levels()]
    return "finding " + engine.keyed(json.dumps([levels, finding.kind, normal(finding.text)]))[:32]


def _known(engine: Engine, name: str, *, untrusted: bool) -> str | None:
    """The record that says this already, in this scope; what a stranger said does not become trusted by agreeing."""
    rows = engine.database.query(
        "SELECT records.id FROM jobs JOIN records ON records.id = jobs.record WHERE jobs.kind = ?"
        " AND records.until_s IS NULL AND records.trust = ?",
        (name, "untrusted" if untrusted else "trusted"),
    )
    return rows[0]["id"] if rows else None
