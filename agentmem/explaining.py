"""Where one record lives now, why, what it cost and saved so far, and what would move it: ``explain``.

Gathers what the stores, the ledger and the planner know of a record; decides nothing and changes nothing.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from . import prompt, snapshots
from .engine import Engine
from .errors import InvalidInput
from .jobs import Jobs
from .ledger.record_uses import RecordUses, record_uses
from .plaintext.drafts import shown
from .plaintext.lineage import derived, sources
from .planner.explain import Verdict
from .planner.explain import explain as verdict_of
from .planner.values import Group, Outcome, Unit, amount
from .types import LEVELS, Hit, Record, Scope, Value

__all__ = ["Explanation", "Place", "explain"]

#: Moves that concerned the record, told one by one, the newest.
TOLD = 5


class Place(Value):
    """One place that a record lives in. ``name`` says whose or which; ``bytes`` are those of the whole that it is part
    of, with other records; ``tokens`` what it takes there of a prompt; ``active``: whether requests are served by it
    now."""

    kind: Literal["plaintext", "core", "pages", "slots", "prefix", "lora"]
    name: str
    records: int = 1
    bytes: int = 0
    tokens: int = 0
    active: bool = True
    note: str = ""

    def __str__(self) -> str:
        beside = f", with {self.records - 1} others" if self.records > 1 else ""
        size = f", {self.bytes:,} bytes" if self.bytes else ""
        tokens = f", {self.tokens} tokens" if self.tokens else ""
        idle = "" if self.active else " (not in use)"
        return f"{self.kind}: {self.name}{beside}{tokens}{size}{idle}" + (f"; {self.note}" if self.note else "")


class Explanation(Value):
    """What is known of one record: ``str()`` of it can be read, the fields can be reckoned with.

    ``cost`` is what having it in prompts cost so far, ``saved`` what caches saved on that, in ``unit`` (CPU-seconds of
    this machine or dollars), by the costs of now; None without a model. ``verdict`` is the planner's view (`Verdict`):
    what each place costs a day, which is the best, and from how many uses a day on another would be; None without a
    model. ``sources`` it was written from, ``derived`` was written from it. ``moves`` are what consolidation did with
    it. ``costs`` says where the prices come from.
    """

    record: Record
    places: tuple[Place, ...]
    uses: RecordUses
    unit: Unit = "seconds"
    cost: float | None = None
    saved: float | None = None
    verdict: Verdict | None = None
    sources: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    moves: tuple[Outcome, ...] = ()
    costs: dict[str, str] = Field(default={}, description="where each cost comes from")

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield str(self.record)
        yield "lives in"
        yield from (f"  {place}" for place in self.places)
        if self.sources or self.derived:
            yield f"written from {_listed(self.sources)}; {_listed(self.derived)} written from it"
        uses = self.uses
        last = (
            "" if uses.last is None else f", last on {dt.datetime.fromtimestamp(uses.last, dt.UTC):%Y-%m-%d %H:%M} UTC"
        )
        yield f"shown to a model {uses.shown} times{last}"
        yield (
            f"of {uses.requests} requests {uses.recalled} recalled it ({uses.recalled_tokens} tokens), {uses.used} "
            f"needed it in the core, {uses.answered} were answered with a LoRA version that learnt it"
        )
        if self.cost is not None and self.saved is not None:
            yield f"cost so far {amount(self.cost, self.unit)}; caches saved {amount(self.saved, self.unit)}"
        if self.verdict is not None:
            yield str(self.verdict)
        for outcome in self.moves:
            saved = "" if outcome.saved is None else f", saved {amount(outcome.saved, outcome.move.unit)}"
            yield f"{outcome.move.kind} {outcome.state}{saved}: {outcome.move.why}"


def _listed(ids: tuple[str, ...]) -> str:
    return ", ".join(ids) or "nothing"


def explain(engine: Engine, scope: Scope, record: str | Record | Hit) -> Explanation:
    """See `ScopedMemory.explain`. Raises `NotFound` for a record that this scope can't see."""
    wanted: Any = record.record if isinstance(record, Hit) else record
    id_ = wanted.id if isinstance(wanted, Record) else wanted
    if not isinstance(id_, str):
        raise InvalidInput(f"record is {shown(id_)}: give a record, a hit, or a record's id")
    found = engine.records.get(id_, scope)
    whose = found.scope.model_copy(update={"session": None})
    places = tuple(_places(engine, scope, found))
    learnt = tuple(place.name for place in places if place.kind == "lora")
    uses = record_uses(engine.ledger, id_, scope, learnt)
    told: dict[str, Any] = {}
    if engine.provider is not None and engine.provider.capabilities.chat:
        told = _reckoned(engine, whose if whose.within(scope) else scope, found, uses)
    return Explanation(
        record=found,
        places=places,
        uses=uses,
        sources=tuple(_visible(engine, scope, sources(engine.database, [id_]).get(id_, []))),
        derived=tuple(_visible(engine, scope, derived(engine.database, [id_]))),
        moves=tuple(_moves(engine, scope, id_)),
        **told,
    )


def _reckoned(engine: Engine, whose: Scope, record: Record, uses: RecordUses) -> dict[str, Any]:
    """The planner's verdict, and what the uses so far come to by the costs of now."""
    snapshot = snapshots.snapshot(engine, whose)
    costs = snapshot.costs
    tokens = uses.tokens or float(_tokens(engine, record))
    group = next((one for one in snapshot.groups if one.records == (record.id,)), None)
    if group is None:  # no request needed it yet
        days = max((one.days for one in snapshot.groups), default=0.0)
        group = Group(
            key=record.id,
            scope=whose,
            records=(record.id,),
            tokens=int(tokens),
            uses=0.0,
            days=days,
            edits=float(record.version - 1),
        )
    cost, saved = uses.paid(tokens, costs.prefill, costs.cached)
    return {
        "verdict": verdict_of(group, snapshot),
        "unit": costs.unit,
        "cost": cost,
        "saved": saved,
        "costs": dict(costs.source),
    }


def _tokens(engine: Engine, record: Record) -> int:
    return engine.count(prompt.record_line(record)) + 1


def _visible(engine: Engine, scope: Scope, ids: list[str]) -> list[str]:
    return [record.id for record in engine.records.named(ids, scope)]


def _moves(engine: Engine, scope: Scope, id_: str) -> list[Outcome]:
    every = Jobs(engine.database, engine.clock).outcomes(scope)
    return [outcome for outcome in every if id_ in outcome.move.records][:TOLD]


# ---- places --------------------------------------------------------------------------------------------------------


def _places(engine: Engine, scope: Scope, record: Record) -> Iterator[Place]:
    [row] = engine.database.query(
        "SELECT COUNT(*) AS vectors, COALESCE(SUM(length(vector)), 0) AS bytes FROM vectors WHERE seq ="
        " (SELECT seq FROM records WHERE id = ?)",
        (record.id,),
    )
    yield Place(
        kind="plaintext",
        name=f"{record.scope}, version {record.version}",
        tokens=_tokens(engine, record),
        bytes=len(record.text.encode("utf-8", "surrogatepass")) + row["bytes"],
        note=f"{row['vectors']} vectors" + (", untrusted" if record.trust == "untrusted" else ""),
    )
    lineage: dict[str, list[str]] = {}
    for kind, key in engine.database.query(
        "SELECT kind, key FROM lineage WHERE record = ? AND kind IN ('core', 'page', 'slot') ORDER BY key", (record.id,)
    ):
        lineage.setdefault(kind, []).append(key)
    for key in lineage.get("core", []):
        whose = Scope(**{level: value or None for level, value in zip(LEVELS, json.loads(key), strict=True)})
        if whose.within(scope) or scope.within(whose):
            beside = engine.database.query("SELECT COUNT(*) FROM lineage WHERE kind = 'core' AND key = ?", (key,))
            note = "stands at the head of this scope's prompts"
            yield Place(kind="core", name=str(whose), records=beside[0][0], tokens=_tokens(engine, record), note=note)
    yield from _kept(engine, lineage)
    yield from _trained(engine, scope, record)


def _kept(engine: Engine, lineage: dict[str, list[str]]) -> Iterator[Place]:
    """The KV states that were made from it, as pages or in a server's slots."""
    if keys := lineage.get("page"):
        rows = [
            row
            for key in keys
            for row in engine.database.query(
                "SELECT bytes, codec, uses, pinned FROM pages WHERE key = ?", (bytes.fromhex(key),)
            )
        ]
        if rows:
            held = {
                row[0]
                for key in keys
                for row in engine.database.query("SELECT record FROM lineage WHERE kind = 'page' AND key = ?", (key,))
            }
            pinned = sum(bool(row["pinned"]) for row in rows)
            yield Place(
                kind="pages",
                name=f"{len(rows)} KV pages ({', '.join(sorted({row['codec'] for row in rows}))})",
                records=len(held),
                bytes=sum(row["bytes"] for row in rows),
                note=f"read {sum(row['uses'] for row in rows)} times" + (f", {pinned} pinned" if pinned else ""),
            )
    if files := lineage.get("slot"):
        yield Place(kind="slots", name=f"{len(files)} saved slots of a server")


def _trained(engine: Engine, scope: Scope, record: Record) -> Iterator[Place]:
    """The trained prefixes and LoRA versions that learnt it."""
    if engine.provider is not None and engine.provider.capabilities.trains:
        from .activation.trained import names
        from .distilling import prefixes

        for prefix in prefixes(engine, scope) if names(engine.database) else ():
            if record.id in prefix.records:
                yield Place(
                    kind="prefix",
                    name=prefix.name,
                    records=len(prefix.records),
                    bytes=prefix.bytes,
                    note=f"{prefix.tokens} positions for {prefix.stands_for} tokens",
                )
    if not engine.database.query("SELECT 1 FROM loras WHERE state != 'retired' LIMIT 1"):
        return  # so that a memory without any loads nothing for it
    for version in engine.registry.versions(scope):
        if record.id in version.records and version.state != "retired":
            recall = version.gate.by_record.get(record.id)
            yield Place(
                kind="lora",
                name=version.name,
                records=len(version.records),
                bytes=version.bytes,
                active=version.active,
                note=f"gate {'passed' if version.gate.passed else 'failed'}"
                + ("" if recall is None else f", {recall:.0%} of its questions answered"),
            )
