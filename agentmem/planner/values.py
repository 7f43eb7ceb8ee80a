"""What the planner reads and what it says: costs, groups of records, moves, the plan.

Values only; nothing here asks a store, a clock or a provider.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from ..cache_rules import Depth
from ..types import Scope, Value

__all__ = [
    "Able",
    "Budget",
    "ConsolidationPlan",
    "Costs",
    "Group",
    "Kind",
    "Move",
    "Outcome",
    "Snapshot",
    "State",
    "Unit",
    "amount",
]

#: What costs are counted in: CPU-seconds of this machine, or dollars at a host.
Unit = Literal["seconds", "dollars"]

#: Where the tokens of a group live beside their records, which always stay.
State = Literal["plain", "core", "pages", "prefix", "lora"]

#: What a move does. Up: ``collapse`` (rewrite a scope's core block), ``prime`` (its head as KV pages or as a
#: host's prefix), ``distil`` (as a trained prefix), ``learn`` (records into a LoRA version). Down: ``shrink`` (a
#: core block that no longer pays, chosen smaller), ``evict`` (pages), ``drop`` (a trained prefix), ``unlearn``
#: (LoRA versions that cost more than they save act no longer). Owed: ``retrain`` (versions that lost a record),
#: ``seal`` (the gist of sessions that ended, as new records), ``extract`` and ``reconcile`` (what a configured
#: model writes better).
Kind = Literal[
    "collapse",
    "prime",
    "distil",
    "learn",
    "shrink",
    "evict",
    "drop",
    "unlearn",
    "retrain",
    "seal",
    "extract",
    "reconcile",
]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What things cost with one model, here or at its host, all in ``unit``.

    ``source`` says of each number by name where it comes from ("measured, 120 uses", "prices of 2026-11-22", "prior").
    """

    unit: Unit
    #: One uncached prompt token.
    prefill: float
    #: One prompt token that comes from a cache: loading it, and attending to it through a whole answer.
    cached: float
    #: One token written into a cache, beyond `prefill`.
    write: float
    #: One token that the model writes.
    output: float = 0.0
    #: Keeping a byte for a day.
    byte_day: float = 0.0
    #: Bytes of one token's KV states on this machine, and of one LoRA version.
    token_bytes: float = 0.0
    version_bytes: float = 0.0
    #: Fewer tokens are not kept as a prefix.
    minimum: int = 0
    #: The same by how many tokens stand before one, where that was measured.
    depth: Depth | None = None
    #: How long a prefix is kept after its last use; infinite for page files.
    lifetime_s: float = float("inf")
    #: Teaching one record to a LoRA version, with its gate; None where the engine can't.
    learn: float | None = None
    #: Distilling one token of a head into a trained prefix; None where the engine can't.
    distil: float | None = None
    #: What LoRA versions add to a request that they act on, and loading one to a session.
    lora: float = 0.0
    swap: float = 0.0
    #: What a second that somebody waits for an answer counts, in seconds of which nobody waits. A preference, not
    #: measured: work that only moves from a turn into the silence is worth it where this exceeds one.
    waiting: float = 2.0
    #: The part of versions that fail their gate.
    gate_fails: float = 0.0
    #: Positions of a trained prefix for each token that it stands for.
    distilled: float = 1 / 3
    source: dict[str, str] = field(default_factory=dict)

    def computing(self, start: float, end: float) -> float:
        """Computing a prompt's tokens from one position to another."""
        if self.depth is None:
            return (end - start) * self.prefill
        return (end - start) * (self.depth.first + self.depth.each * (start + end) / 2)

    def loading(self, tokens: float) -> float:
        """The same tokens from a cache, without what attending to them costs those that are computed behind them."""
        return tokens * (self.cached if self.depth is None else self.depth.read)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Records that move together: a record, a core block, the records of a LoRA version.

    ``uses`` requests in ``days`` days needed it (recalled, or named by the search while it stood in the core or acted);
    it was changed ``edits`` times in them. ``tokens`` as a prompt shows it. ``sightings``: how often it was said or
    recalled without contradiction, the least of its records. ``where`` are the places it lives in now.
    """

    key: str
    scope: Scope
    records: tuple[str, ...]
    tokens: int
    uses: float
    days: float
    edits: float = 0.0
    where: frozenset[State] = frozenset({"plain"})
    sightings: int = 1
    #: Whether a LoRA can learn it at all: trusted, in force, uncontradicted, and there is a question for it.
    teachable: bool = False
    #: Bytes that it takes as pages, as a prefix or as a LoRA version now.
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Able:
    """What the engine and the settings allow in a scope."""

    core: bool = True
    pages: bool = False
    prefix: bool = False
    lora: bool = False
    #: LoRA versions act on every request, not only on those that concern what they learnt.
    always: bool = True
    #: A model that can write records is configured and may be asked.
    writes: bool = False
    #: The most records that one LoRA version is taught.
    shard: int = 20


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a plan is made from, of one scope. The same snapshot gives the same plan.

    ``core`` is the block as it stands (None: none), ``candidate`` the block that would be chosen now, with ``behind``
    tokens of prompt behind it that a collapse has computed anew; ``carried`` is what carrying the difference has cost
    since the last collapse, in `Costs.unit`, and ``cold`` says that nothing behind it is cached anyway. ``busy``: a
    conversation of this scope is going on. ``requests_day`` are requests to the model in a day.
    """

    at: float
    scope: Scope
    model: str
    costs: Costs
    able: Able
    groups: tuple[Group, ...] = ()
    core: Group | None = None
    candidate: Group | None = None
    behind: int = 0
    carried: float = 0.0
    cold: bool = False
    busy: bool = False
    requests_day: float = 0.0
    #: Tokens of system part, core and history that a next request begins with and whose states are not kept yet.
    unprimed: int = 0
    #: Whether the text of that system part is known: else nothing can be computed ahead of the request.
    head_known: bool = True
    #: Digests of LoRA versions that wait to be trained again, the records left in each (where missing: as many as a
    #: version may have), and ids of sessions that ended unsealed.
    owed: tuple[str, ...] = ()
    owed_records: tuple[int, ...] = ()
    unsealed: tuple[str, ...] = ()
    #: User turns that no extraction has read; tokens of one as a model reads it, and of what it writes about it.
    unread: int = 0
    turn_tokens: float = 0.0
    answer_tokens: float = 0.0
    #: Sessions in a day; None: not known, then as many as requests.
    sessions_day: float | None = None
    #: The part of requests that found the head kept; None: not known, then as if requests came by chance.
    warm: float | None = None
    #: Days that the core block has stood as it is; None: not known, then since uses are counted.
    stood: float | None = None
    #: Names the newest turn: what may have to be done again after it has another key then.
    latest: str = ""

    @functools.cached_property
    def watched(self) -> float:
        """Days over which uses were counted."""
        blocks = (block for block in (self.core, self.candidate) if block)
        return max((group.days for group in (*self.groups, *blocks)), default=1.0)

    @functools.cached_property
    def chosen(self) -> frozenset[str]:
        """Ids of the records in the core that would be chosen now."""
        return frozenset(self.candidate.records if self.candidate else ())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a consolidation may spend: None is no limit. ``bytes`` are new bytes on disk."""

    seconds: float | None = None
    dollars: float | None = None
    bytes: int | None = None


class Move(Value):
    """One move of memory from kind to kind, with what it is expected to cost and to save.

    ``cost`` is paid once, ``saves`` is a day's saving, both in ``unit``; ``bytes`` are new bytes (negative: freed).
    ``requests`` are those that ``saves`` counts on, a day, ``holds`` how many days the saving is expected to last
    (until a record of it is edited), ``pays_after`` how many days of use pay the cost back, None where nothing is saved
    (owed work). ``key`` names the move: the same work has the same key, so that it is done once. ``records`` are ids:
    of records, of versions for ``retrain``, of sessions for ``seal``; ``replaces`` those of the core block whose place
    they are to take. ``why`` holds numbers and no text of a record.
    """

    key: str
    kind: Kind
    scope: Scope
    records: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()
    tokens: int = 0
    unit: Unit = "seconds"
    cost: float = 0.0
    saves: float = 0.0
    requests: float = 0.0
    holds: float = 0.0
    bytes: int = 0
    why: str = ""

    @property
    def pays_after(self) -> float | None:
        """Days until the saving has paid the cost; None where it saves nothing."""
        return self.cost / self.saves if self.saves > 0 else None


class Outcome(Value):
    """A move that was made: what it was expected to cost and save, and what it did since.

    ``state`` is done, failed, skipped (what it was to act on had changed) or running. ``saved`` and ``expected`` are
    over the same ``requests`` since the move, in ``unit``; None where there were none yet.
    """

    move: Move
    state: Literal["queued", "running", "done", "failed", "skipped"]
    at: float
    cost: float | None = None
    expected: float | None = None
    saved: float | None = None
    requests: int = 0
    note: str | None = None


class ConsolidationPlan(Value):
    """What `consolidate` will do (``dry_run``) or did: ``moves`` in order of what they save for their cost.

    ``left`` are moves that pay and were not made: they did not fit the budget, it was stopped, or the last round found
    them; ``outcomes`` are those that this call made, and earlier ones with what they did save. ``costs`` says where the
    numbers come from.
    """

    dry_run: bool = False
    moves: tuple[Move, ...] = ()
    left: tuple[Move, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    costs: dict[str, str] = Field(default={}, description="where each cost comes from")

    def __str__(self) -> str:
        lines = [f"{'would make' if self.dry_run else 'made'} {len(self.moves)} moves"]
        lines += [f"  {_told(move)}" for move in self.moves]
        lines += [f"  left: {_told(move)}" for move in self.left]
        lines += [f"  {_became(outcome)}" for outcome in self.outcomes]
        return "\n".join(lines)


def amount(value: float, unit: Unit) -> str:
    """A cost as a person reads it."""
    return f"${value:.4g}" if unit == "dollars" else f"{value:.3g} CPU-s"


def _told(move: Move) -> str:
    saves = f", saves {amount(move.saves, move.unit)} a day" if move.saves else ""
    return f"{move.kind} ({move.scope}): costs {amount(move.cost, move.unit)}{saves}: {move.why}"


def _became(outcome: Outcome) -> str:
    told = f"{outcome.move.kind} ({outcome.move.scope}) {outcome.state}"
    if outcome.saved is not None and outcome.expected is not None:
        unit = outcome.move.unit
        told += (
            f": saved {amount(outcome.saved, unit)} in {outcome.requests} requests, "
            f"{amount(outcome.expected, unit)} were expected"
        )
    return told + (f" ({outcome.note})" if outcome.note else "")
