"""Every use and what it cost: one row per request in ``uses``, summed for reports.

Counts are the provider's own (normalised by its adapter); money comes from costs.py as of the moment of the use. Knows
nothing of prompts or records; holds no text.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cache_rules import CacheRules
from ..database import Database
from ..types import CacheUse, Scope, Usage
from .budgets import Budgets
from .costs import LocalCosts, price

if TYPE_CHECKING:
    from ..activation.turns import Turn

__all__ = ["HAS_TURN", "LISTED", "NEWEST", "Ledger", "beneath", "read_turns"]

_log = logging.getLogger("agentmem")

#: Many values bound as one JSON list.
LISTED = "SELECT value FROM json_each(?)"
#: Uses whose turn is kept, newest first: what layouts are learnt from and what is replayed. Sums need none.
TURNS_KEPT = 20_000
#: The conditions on ``uses`` for the newest of them, and for those whose turn is kept: a ledger of millions of uses is
#: not read through where few or none of them match.
NEWEST = f"id > (SELECT max(id) FROM uses) - {TURNS_KEPT}"
HAS_TURN = f"turn IS NOT NULL AND {NEWEST}"


class Ledger:
    """The uses of one folder.

    ``costs`` is the setting of that name, ``day_budget`` in dollars. ``rules`` gives a model's cache rules, where they
    are known.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float],
        *,
        costs: Mapping[str, float] | None = None,
        day_budget: float | None = None,
        rules: Callable[[str], CacheRules | None] | None = None,
    ) -> None:
        self.database = database
        self.clock = clock
        self.costs = LocalCosts.of(costs or {})
        self.budgets = Budgets(database, clock, day=day_budget)
        self._rules = rules

    def rules(self, model: str) -> CacheRules | None:
        """What the cache of this model's host does and costs, where it is known."""
        return None if self._rules is None else self._rules(model)

    def check(self, scope: Scope, model: str) -> None:
        """Call before a model is asked: raises `BudgetExceeded` where a budget of this scope or above it is spent."""
        self.budgets.check(scope, model)

    def money(self, model: str, usage: Usage, *, here: bool = False) -> tuple[float, float | None] | None:
        """(what this use cost, what it would have cost with nothing cached) in dollars; None where neither is known.

        ``here`` says that it was computed on this machine: then, where nobody sells the model, its seconds are priced.
        """
        found = price(model, usage, rules=self.rules(model), at=self.clock())
        if found is None and here and (cost := self.costs.computing(usage.total_s)) is not None:
            return cost, None
        return found

    def note(
        self,
        verb: str,
        model: str,
        scope: Scope,
        usage: Usage,
        *,
        cache: CacheUse | None = None,
        size: int = 0,
        shown: Sequence[str] = (),
        money: tuple[float, float | None] | None = None,
        turn: Turn | None = None,
        here: bool = False,
        loras: Sequence[str] = (),
    ) -> None:
        """Write down one use. ``shown`` are the records that stood in the prompt; ``size`` is in bytes written;
        ``turn`` is what the request was made of; ``loras`` are the LoRA versions that acted, by name. ``money`` is
        what `money` said, asked here (with ``here``) if not given."""
        now = self.clock()
        cache = cache or CacheUse()
        paid, bare = money or self.money(model, usage, here=here) or (None, None)
        levels = [value or "" for _, value in scope.levels()]
        with self.database.write() as connection:
            number = connection.execute(
                "INSERT INTO uses (at, verb, model, tenant, user, agent, session, input, cached, written, output,"
                " first_s, total_s, bytes, expected, reason, money, uncached_money, attended, long_written, turn,"
                " loras)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(now, verb, model, *levels),
                    *(usage.input_tokens, usage.cached_tokens, usage.written_tokens, usage.output_tokens),
                    *(usage.first_token_s, usage.total_s, size, cache.expected_tokens, cache.reason, paid, bare),
                    cache.attended and cache.attended.model_dump_json(),
                    *(usage.written_long_tokens, turn and turn.model_dump_json()),
                    json.dumps(list(loras)) if loras else None,
                ),
            ).lastrowid
            connection.execute("UPDATE uses SET turn = NULL WHERE id = ?", ((number or 0) - TURNS_KEPT,))
            self.note_shown(model, shown, None)

    def turns(self, scope: Scope, model: str, limit: int) -> list[Turn]:
        """What the newest ``limit`` requests of this scope and beneath to this model were made of, oldest first."""
        where, values = beneath(scope)
        rows = self.database.query(
            f"SELECT turn FROM uses WHERE {where} AND model = ? AND turn IS NOT NULL ORDER BY id DESC LIMIT ?",
            (*values, model, limit),
        )
        return read_turns(row["turn"] for row in reversed(rows))

    def note_shown(self, model: str, records: Sequence[str], holds_s: float | None) -> None:
        """Write down that these records stand in a prompt, which a host may hold for ``holds_s`` seconds."""
        now = self.clock()
        with self.database.write() as connection:
            connection.executemany(
                "INSERT INTO shown VALUES (?, ?, ?, 1, ?)"
                " ON CONFLICT DO UPDATE SET at = excluded.at, times = times + 1, holds_s = excluded.holds_s",
                [(record, model, now, holds_s) for record in dict.fromkeys(records)],
            )

    def times_shown(self, records: Sequence[str]) -> dict[str, int]:
        """How often each of these records was put into a prompt, by id; those that never were are left out."""
        rows = self.database.query(
            f"SELECT record, SUM(times) FROM shown WHERE record IN ({LISTED}) GROUP BY record", [json.dumps(records)]
        )
        return {row[0]: int(row[1]) for row in rows}

    def may_hold(self, records: Sequence[str]) -> list[str]:
        """One sentence per provider outside this machine that was shown one of the records: what it may hold."""
        rows = self.database.query(
            "SELECT model, MAX(at + holds_s) AS until FROM shown"
            f" WHERE record IN ({LISTED}) AND holds_s IS NOT NULL GROUP BY model ORDER BY model",
            [json.dumps(records)],
        )
        return [
            f"{row['model']} was shown them; its prompt cache may hold them until {_utc(row['until'])}, "
            "its logs as its contract says"
            for row in rows
        ]


def read_turns(texts: Iterable[str]) -> list[Turn]:
    """The turns that these texts of ``uses`` hold. One that can't be read is passed over: sums need none."""
    from ..activation.turns import Turn

    turns = []
    for text in texts:
        try:
            turns.append(Turn.model_validate_json(text))
        except ValueError as error:
            _log.warning("the turn of a use can't be read: %s", str(error).splitlines()[0])
    return turns


def beneath(scope: Scope, since: float | None = None, until: float | None = None) -> tuple[str, list[Any]]:
    """The condition on ``uses`` for this scope and beneath it, within ``since`` <= at < ``until`` (Unix seconds)."""
    tests: list[tuple[str, Any]] = [(f"{level} = ?", value) for level, value in scope.levels() if value is not None]
    tests += [("at >= ?", since)] * (since is not None) + [("at < ?", until)] * (until is not None)
    return " AND ".join(test for test, _ in tests) or "TRUE", [value for _, value in tests]


def _utc(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
