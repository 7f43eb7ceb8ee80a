"""The verbs on money, each once: ``report``, ``budget`` and ``spent``, for the scope of a handle.

Orders the ledger's sums and what the engine holds into one `Report`; adds nothing up itself.
"""

from __future__ import annotations

from typing import Any

from . import consolidate
from .engine import Engine
from .errors import InvalidInput
from .jobs import Jobs
from .kinds import entries
from .ledger.accounts import Accounts
from .ledger.budgets import Action, Budget, Period, Spent
from .ledger.report import Prefix, Report, Taught
from .plaintext.conditions import beneath
from .plaintext.drafts import moment, utc_seconds
from .planner.values import Outcome
from .types import Scope

__all__ = ["budget", "report", "spent"]

#: Stored prefixes told one by one.
TOLD = 20
#: Moves of consolidation, where their savings are not told.
MOVED = 20
#: LoRA versions whose training is drawn, the newest.
DRAWN = 5
#: What `Engine.bytes_held` tells of each kind of memory.
HELD = {
    "plaintext": ("records", "index"),
    "activation": ("KV pages", "saved slots"),
    "parametric": ("LoRA", "published LoRA"),
}


def report(engine: Engine, scope: Scope, *, since: Any = None, until: Any = None) -> Report:
    """What memory cost and saved in this scope and beneath it, from ``since`` until before ``until``.

    Sizes on disk are those of the whole folder: they are told on the root handle only.
    """
    first, last = moment(since, "since"), moment(until, "until")
    bounds = [None if when is None else utc_seconds(when) for when in (first, last)]
    if bounds[0] is not None and bounds[1] is not None and bounds[0] >= bounds[1]:
        raise InvalidInput(f"until {until} must lie after since {since}")
    accounts = Accounts(engine.ledger, scope, since=bounds[0], until=bounds[1])
    held = engine.bytes_held() if scope == Scope() else {}
    sizes = {kind: sum(held.get(name, 0) for name in names) for kind, names in HELD.items()} if held else {}
    compared = accounts.compared()
    return Report(
        since=first,
        until=last,
        lines=accounts.lines(),
        providers=tuple(accounts.providers()),
        scopes=tuple(accounts.scopes()),
        days=tuple(accounts.days()),
        kinds=tuple(accounts.kinds(sizes, compared)),
        compared=tuple(compared),
        prefixes=tuple(accounts.prefixes() + _pages(engine, scope, accounts)),
        misses=tuple(accounts.misses()),
        budgets=tuple(engine.ledger.budgets.listed(scope)),
        bytes=held,
        storage_month=engine.ledger.costs.storing(sum(held.values())) if held else None,
        records=engine.records.count(scope),
        pages=_count_pages(engine, scope),
        loras=_count_loras(engine, scope),
        lora_uses=accounts.lora_uses(),
        taught=tuple(_taught(engine, scope)),
        moves=_moves(engine, scope),
        paused=Jobs(engine.database, engine.clock).paused(),
    )


def _moves(engine: Engine, scope: Scope) -> tuple[Outcome, ...]:
    """What consolidation did in this scope, with what it saved since; the ledger is read only where it did anything."""
    if engine.provider is None:
        return tuple(Jobs(engine.database, engine.clock).outcomes(scope, limit=MOVED))
    if not Jobs(engine.database, engine.clock).jobs(scope, limit=1):
        return ()
    return tuple(consolidate.outcomes(engine, scope))


def budget(
    engine: Engine, scope: Scope, dollars: float | None, *, per: Period = "day", action: Action = "stop"
) -> Budget | None:
    """Set what may be spent in this scope and beneath it per day, month (UTC) or ever; None removes that budget."""
    return engine.ledger.budgets.set(scope, dollars, per=per, action=action)


def spent(engine: Engine, scope: Scope) -> Spent:
    """What was spent in this scope and beneath it, and the budgets that were set there."""
    budgets = engine.ledger.budgets
    return Spent(
        day=budgets.spent(scope, "day"),
        month=budgets.spent(scope, "month"),
        ever=budgets.spent(scope, "ever"),
        budgets=budgets.listed(scope),
    )


def _count_pages(engine: Engine, scope: Scope) -> int:
    if scope == Scope():
        return int(engine.database.query("SELECT COUNT(*) FROM pages")[0][0])
    whose, values = beneath(scope)
    rows = engine.database.query(
        "SELECT COUNT(DISTINCT lineage.key) FROM records CROSS JOIN lineage ON lineage.record = records.id"
        f" AND lineage.kind = 'page' WHERE {whose}",
        values,
    )
    return int(rows[0][0])


def _count_loras(engine: Engine, scope: Scope) -> int:
    if scope == Scope():
        return int(engine.database.query("SELECT COUNT(*) FROM loras WHERE state != 'retired'")[0][0])
    return sum(version.state != "retired" for version in engine.registry.versions(scope))


def _taught(engine: Engine, scope: Scope) -> list[Taught]:
    """The newest versions of this scope that may serve, or failed their gate, with the curves of their training."""
    if not _count_loras(engine, scope):
        return []  # so that a memory without any loads nothing for it
    from .parametric.plots import curves

    return [
        Taught(
            name=version.name,
            state="active" if version.active else version.state,
            records=len(version.records),
            recall=version.gate.recall_held_out,
            drift=version.gate.drift,
            cpu_seconds=version.cpu_seconds,
            curves=curves(version.curve),
        )
        for version in [one for one in engine.registry.versions(scope) if one.state != "retired"][:DRAWN]
    ]


def _pages(engine: Engine, scope: Scope, accounts: Accounts) -> list[Prefix]:
    """The KV pages of this scope, a row for all that begin with one first page: what computing them took and what their
    uses saved, by the pace measured in this scope. What keeping them costs on disk is in ``money``."""
    provider = engine.provider
    pace = None if provider is None else accounts.second_per_token(provider.name)
    if provider is None or provider.capabilities.kv != "tensors" or pace is None:
        return []
    chains: dict[str, list[Any]] = {}
    begins: dict[str, str] = {}
    for entry in sorted(entries(engine, scope), key=lambda entry: entry.number):
        first = begins[entry.key] = begins.get(entry.parent, entry.key)
        chains.setdefault(first, []).append(entry)
    now = engine.clock()
    found = []
    for pages in chains.values():
        tokens, read = sum(page.tokens for page in pages), sum(page.tokens * page.uses for page in pages)
        costs = [engine.ledger.costs.storing(page.bytes, max(now - page.created, 0.0)) for page in pages]
        found.append(
            Prefix(
                where=provider.name,
                name=f"{len(pages)} KV pages, {pages[0].key[:12]}",
                tokens=tokens,
                read_tokens=read,
                unit="seconds",
                cost=tokens * pace,
                gained=read * pace,
                reads_needed=1.0,
                bytes=sum(page.bytes for page in pages),
                money=None if None in costs else sum(cost for cost in costs if cost is not None),
            )
        )
    return sorted(found, key=lambda prefix: (-prefix.read_tokens, -prefix.tokens))[:TOLD]
