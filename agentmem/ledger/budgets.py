"""What may be spent in a scope: limits per day, month or ever, and the sums that they are held against.

Reads money from ``uses`` and writes ``budgets``; knows no model and no price. Days and months are those of UTC.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..database import Database
from ..errors import BudgetExceeded, InvalidInput
from ..figures import amount
from ..plaintext.drafts import shown
from ..types import LEVELS, Scope, Value

__all__ = ["Action", "Budget", "Budgets", "Period", "Spent", "amount", "begin", "end"]

_log = logging.getLogger("agentmem")

Period = Literal["day", "month", "ever"]
Action = Literal["stop", "warn"]

#: Sums kept in memory at most; a sum that was dropped is read again.
SUMS = 4096
#: Budgets told at once.
LISTED = 50
#: Every budget that a scope is under: its own and those of the levels above it.
APPLYING = (
    "SELECT * FROM budgets WHERE tenant IN ('', ?) AND user IN ('', ?) AND agent IN ('', ?) AND session IN ('', ?)"
)


class Budget(Value):
    """What may be spent in ``scope`` and beneath it, in dollars ``per`` day, month or ever, and what was, so far.

    ``action`` "stop" refuses the next request once it is spent, "warn" logs a warning. A request that is under way is
    counted when it ends, so the last one may go beyond the limit.
    """

    scope: Scope
    per: Period
    dollars: float
    action: Action
    spent: float

    @property
    def left(self) -> float:
        """Dollars left of it, 0 where it is spent."""
        return max(self.dollars - self.spent, 0.0)

    def __str__(self) -> str:
        limit = f"{_limit_text(self.dollars)} $ {_per(self.per)}"
        return f"{self.scope}: {amount(self.spent)} of {limit} spent ({self.action})"


class Spent(Value):
    """Dollars spent in a scope and beneath it: today, this month (UTC) and ever, and the budgets set there.

    Uses without a known price count as nothing.
    """

    day: float
    month: float
    ever: float
    budgets: list[Budget]

    def __str__(self) -> str:
        day, month, ever = map(amount, (self.day, self.month, self.ever))
        lines = [f"spent today {day} $, this month {month} $, ever {ever} $"]
        return "\n".join([*lines, *(str(budget) for budget in self.budgets)])


@dataclass
class _Sum:
    """Dollars of uses up to the id ``seen`` in a period; what follows is added when it is asked for."""

    begins: float
    seen: int = 0
    dollars: float = 0.0


class Budgets:
    """The budgets of one folder. Usable from many threads; other processes' uses are seen as they are committed."""

    def __init__(self, database: Database, clock: Callable[[], float], *, day: float | None = None) -> None:
        self._database = database
        self._clock = clock
        self._day = day
        self._lock = threading.Lock()
        self._sums: dict[tuple[str, ...], _Sum] = {}
        self._warned: dict[tuple[str, ...], float] = {}

    def set(
        self, scope: Scope, dollars: float | None, *, per: Period = "day", action: Action = "stop"
    ) -> Budget | None:
        """Set the budget of this scope for this period, in place of what was set before; None removes it.

        Raises `InvalidInput` for anything but a finite number of dollars of 0 or more and for unknown words.
        """
        if per not in get_args(Period):
            raise InvalidInput(f"per is {shown(per)}: give 'day', 'month' or 'ever'")
        if action not in get_args(Action):
            raise InvalidInput(f"action is {shown(action)}: give 'stop' or 'warn'")
        limit = None if dollars is None else _limit(dollars)
        names = _names(scope)
        with self._database.write() as connection:
            if limit is None:
                connection.execute(
                    "DELETE FROM budgets WHERE tenant = ? AND user = ? AND agent = ? AND session = ? AND per = ?",
                    (*names, per),
                )
                return None
            connection.execute(
                "INSERT OR REPLACE INTO budgets VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*names, per, limit, action, self._clock()),
            )
        return Budget(scope=scope, per=per, dollars=limit, action=action, spent=self.spent(scope, per))

    def applying(self, scope: Scope) -> list[Budget]:
        """The budgets that this scope is under: its own and those above it, the widest first, with what was spent."""
        found = [_budget(row) for row in self._database.query(APPLYING, _names(scope))]
        if self._day is not None:  # the setting holds beside what was set by the verb
            found.append(Budget(scope=Scope(), per="day", dollars=self._day, action="stop", spent=0.0))
        found.sort(key=lambda budget: sum(value is not None for _, value in budget.scope.levels()))
        return self._with_spent(found)

    def listed(self, scope: Scope) -> list[Budget]:
        """The budgets that were set on this scope and beneath it, the largest first, at most `LISTED`. What was spent
        above it is not its to know."""
        where = "".join(f" AND {level} = ?" for level, value in scope.levels() if value is not None)
        rows = self._database.query(
            f"SELECT * FROM budgets WHERE TRUE{where} ORDER BY dollars DESC LIMIT {LISTED}",
            [value for _, value in scope.levels() if value is not None],
        )
        found = [_budget(row) for row in rows]
        if self._day is not None and scope == Scope():
            found.insert(0, Budget(scope=scope, per="day", dollars=self._day, action="stop", spent=0.0))
        return self._with_spent(found)

    def _with_spent(self, budgets: Sequence[Budget]) -> list[Budget]:
        return [budget.model_copy(update={"spent": self.spent(budget.scope, budget.per)}) for budget in budgets]

    def check(self, scope: Scope, model: str) -> None:
        """Raise `BudgetExceeded` if a budget that this scope is under is spent and stops; warn once a day if it warns.

        Any ``model`` is stopped, for it may cost what nobody knows; the message names it. A budget of 0 dollars is
        spent before anything was.
        """
        now = self._clock()
        for budget in self.applying(scope):
            if budget.spent < budget.dollars:
                continue
            until = end(budget.per, now)
            frees = "" if until is None else f"; it is free again at {_utc(until)}"
            said = (
                f"the budget of {_limit_text(budget.dollars)} dollars {_per(budget.per)} of {budget.scope} is spent "
                f"({amount(budget.spent)} dollars){frees}"
            )
            if budget.action == "stop":
                raise BudgetExceeded(
                    f"{model} was not asked: {said}. Set a higher one with budget(...), or the setting day_budget",
                    limit=budget.dollars,
                    spent=budget.spent,
                    frees_at=until,
                )
            with self._lock:
                key, today = (*_names(budget.scope), budget.per), begin("day", now)
                told = self._warned.get(key) == today
                self._warned[key] = today
            if not told:
                _log.warning("%s", said)

    def spent(self, scope: Scope, per: Period) -> float:
        """Dollars spent in this scope and beneath it in the running period.

        The first time in a period all of its uses are read, later only those that came since.
        """
        begins = begin(per, self._clock())
        names = _names(scope)
        key = (*names, per)
        with self._lock:
            known = self._sums.get(key)
        if known is None or known.begins != begins:
            known = _Sum(begins)
        where = "".join(f" AND {level} = ?" for level, name in zip(LEVELS, names, strict=True) if name)
        # At first an index that holds the money is read, later only the rows that came since: never both row by row.
        since = "NOT INDEXED WHERE id > ? AND" if known.seen else "WHERE ? = 0 AND"
        [row] = self._database.query(
            f"SELECT COALESCE(SUM(money), 0), (SELECT COALESCE(MAX(id), 0) FROM uses) FROM uses {since} at >= ?{where}",
            (known.seen, begins, *(name for name in names if name)),
        )
        known = _Sum(begins, int(row[1]), known.dollars + row[0])
        with self._lock:
            if len(self._sums) >= SUMS:
                self._sums.clear()
            self._sums[key] = known
        return known.dollars


def _budget(row: Any) -> Budget:
    scope = Scope(**{level: row[level] or None for level in LEVELS})
    return Budget(scope=scope, per=row["per"], dollars=row["dollars"], action=row["action"], spent=0.0)


def _limit(dollars: object) -> float:
    """A budget's dollars; `InvalidInput` for what is no finite number of 0 or more."""
    try:
        if not isinstance(dollars, bool) and isinstance(dollars, int | float) and 0 <= float(dollars) < math.inf:
            return float(dollars)
    except OverflowError:  # an int beyond all floats
        pass
    raise InvalidInput(f"dollars is {shown(dollars)}: give a number of 0 or more, or None to remove the budget")


def _limit_text(dollars: float) -> str:
    """Whole cents; a limit below a cent with the digits it needs."""
    return f"{dollars:.2f}" if dollars == 0 or dollars >= 0.01 else amount(dollars)


def begin(per: Period, now: float) -> float:
    """When the running day or month (UTC) began, in Unix seconds; minus infinity for "ever"."""
    if per == "ever":
        return -math.inf
    day = dt.datetime.fromtimestamp(now, dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (day if per == "day" else day.replace(day=1)).timestamp()


def end(per: Period, now: float) -> float | None:
    """When the running day or month (UTC) ends, in Unix seconds; None for "ever"."""
    if per == "ever":
        return None
    first = dt.datetime.fromtimestamp(begin(per, now), dt.UTC)
    if per == "day":
        return (first + dt.timedelta(days=1)).timestamp()
    return (first + dt.timedelta(days=32)).replace(day=1).timestamp()


def _names(scope: Scope) -> Sequence[str]:
    return [value or "" for _, value in scope.levels()]


def _per(per: Period) -> str:
    return "in all" if per == "ever" else f"a {per}"


def _utc(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
