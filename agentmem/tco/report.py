"""What a workload costs, as values: by offer and policy, where one overtakes the other, and what was assumed.

Values and how they look as text and CSV; the page for browsers is in page.py.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import StoreError
from ..figures import Curve
from ..types import Value
from .workload import Workload

__all__ = ["BreakEven", "Line", "TcoReport"]

#: Columns of the CSV file; one for each tier of bytes follows.
COLUMNS = (
    "offer", "policy", "dollars_month", "dollars_turn", "dollars_storage", "cpu_seconds_month", "cpu_seconds_turn",
    "standard_error", "first_token_s", "first_token_p95_s", "prompt_tokens", "read_share", "written_share",
    "core_tokens", "lora_records", "setting",
)  # fmt: skip
TIERS = ("records", "vectors", "token codes", "index", "ledger", "KV pages", "LoRA")


class Line(Value):
    """One policy with one offer. Money is in US dollars, None where nothing has a price; ``seconds`` are CPU-seconds of
    the machine, None at hosts.

    ``turn`` and ``seconds`` are of a mean turn, ``month`` and ``seconds_month`` of all users. ``storage`` is what the
    bytes cost a month where that is known, a part of ``month``. ``error`` is the relative standard error of the sample.
    ``read`` and ``written`` are shares of the prompt's tokens that come from a cache and go to it, ``core_tokens`` and
    ``learnt`` the size of the core block and the records in a LoRA that the planner chooses. ``bytes`` are on disk, by
    tier, of all users. ``setting`` says with which cache lifetimes the policy is cheapest here.
    """

    offer: str
    policy: str
    turn: float | None = None
    month: float | None = None
    storage: float | None = None
    seconds: float | None = None
    seconds_month: float | None = None
    error: float = 0.0
    first_token_s: float
    first_token_p95_s: float
    prompt_tokens: float
    read: float
    written: float
    core_tokens: float = 0.0
    learnt: float = 0.0
    bytes: dict[str, int] = Field(default={})
    setting: str = ""

    @property
    def cost(self) -> float:
        """A mean turn in what the offer is compared in: dollars, else CPU-seconds."""
        found = self.seconds if self.turn is None else self.turn
        assert found is not None
        return found


class BreakEven(Value):
    """Where ``cheaper`` gets cheaper than ``dearer``: from ``at`` of ``axis`` on.

    ``at`` is None where one of them is cheaper all along; ``always`` then says whether that is ``cheaper``.
    """

    offer: str
    cheaper: str
    dearer: str
    axis: Literal["days of history", "turns a session", "users", "days of use"]
    at: float | None = None
    always: bool = False
    note: str = ""

    def __str__(self) -> str:
        told = f"{self.offer}: {self.cheaper} is "
        if self.at is not None:
            told += f"cheaper than {self.dearer} from {_short(self.at)} {self.axis} on"
        else:
            told += f"{'always' if self.always else 'never'} cheaper than {self.dearer} (by {self.axis})"
        return f"{told}; {self.note}" if self.note else told


class TcoReport(Value):
    """The comparison. ``str()`` of it is a table with the assumptions; `csv` and `html` write files.

    ``curves`` are the cost of a turn over the days of history by offer and policy.
    """

    workload: Workload
    lines: tuple[Line, ...]
    breaks: tuple[BreakEven, ...] = ()
    curves: tuple[tuple[str, Curve], ...] = ()
    assumptions: tuple[str, ...] = ()
    seed: int = 0
    sample: int = 0

    def line(self, offer: str, policy: str) -> Line:
        """The line of this offer and policy. Raises `KeyError` where there is none."""
        for line in self.lines:
            if (line.offer, line.policy) == (offer, policy):
                return line
        raise KeyError(f"{offer}, {policy}")

    def csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The lines as CSV, a row each, numbers in full; with ``path`` they are written there too (or `StoreError`)."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*COLUMNS, *(f"bytes_{tier.replace(' ', '_').lower()}" for tier in TIERS)])
        for line in self.lines:
            money = (line.month, line.turn, line.storage, line.seconds_month, line.seconds, line.error)
            rest = (
                line.first_token_s,
                line.first_token_p95_s,
                line.prompt_tokens,
                line.read,
                line.written,
                line.core_tokens,
                line.learnt,
            )
            numbers = ["" if value is None else f"{value:.8g}" for value in (*money, *rest)]
            sizes = [line.bytes.get(tier, 0) for tier in TIERS]
            writer.writerow([line.offer, line.policy, *numbers, line.setting, *sizes])
        return _kept(out.getvalue(), path)

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one page with plots, self-contained; with ``path`` it is written there (or `StoreError`)."""
        from .page import page

        return _kept(page(self), path)

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        work = self.workload
        table = Table(
            title=f"agentmem: what memory costs for {work.users:,} users, {work.turns_day:g} turns a day each",
            caption=f"means over {work.months:g} months; ± is the standard error of {self.sample} sampled users",
        )
        table.add_column("model", overflow="fold")
        table.add_column("memory", no_wrap=True)
        priced = any(line.month is not None for line in self.lines)
        timed = any(line.seconds is not None for line in self.lines)
        names = ["$ a month", "$ a 1,000 turns"] * priced + ["CPU-s a turn"] * timed
        for name in (*names, "±", "times the least", "first token s", "prompt tokens", "cached", "on disk"):
            table.add_column(name, justify="right")
        from ..ledger.report import size

        least: dict[str, float] = {}
        for line in self.lines:
            least[line.offer] = min(least.get(line.offer, line.cost), line.cost)
        named = ""
        for line in self.lines:
            offer, named = "" if line.offer == named else line.offer, line.offer  # once for all of its lines
            if offer:
                table.add_section()
            cells = [_short(line.month), _short(None if line.turn is None else 1_000 * line.turn)] * priced
            cells += [_short(line.seconds)] * timed
            table.add_row(
                escape(offer),
                escape(line.policy),
                *cells,
                f"{line.error:.1%}",
                f"{line.cost / least[line.offer]:.2f}" if least[line.offer] else "-",
                f"{line.first_token_s:.2f}",
                f"{line.prompt_tokens:,.0f}",
                f"{line.read:.0%}",
                size(sum(line.bytes.values())),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=170, no_color=True).print(self.__rich__())
        return out.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        parts = [Text(str(one)) for one in self.breaks]
        told = [Text(f"- {sentence}") for sentence in self.assumptions]
        return Group(self._table(), *parts, Text("Assumed:"), *told)

    def _repr_html_(self) -> str:
        from .page import body

        return body(self)


def _short(value: float | None) -> str:
    """A number with three digits that mean something; a dash where it is not known."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def _kept(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StoreError(f"can't write the report to {os.fspath(path)!r}: {error.strerror}") from error
    return text
