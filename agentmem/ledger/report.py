"""What a report says: uses and their money by verb, day, scope, provider and kind of memory, and what was saved.

Values and how they look as text; knows no database. The page for browsers is in html.py.
"""

from __future__ import annotations

import datetime as dt
import io
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..errors import StoreError
from ..figures import Curve
from ..planner.values import Outcome
from ..types import Value
from .budgets import Budget, amount

__all__ = ["Comparison", "Kind", "Line", "Miss", "Prefix", "Report", "Share", "Taught", "money", "size"]

#: The policies that a summary names; the page has them all.
NAMED = ("no memory", "full history", "no cache")


class Line(Value):
    """The uses of one model by one verb. Money is in US dollars; None where no price is known.

    ``cached_tokens`` were read from a cache instead of being computed; ``saved_money`` is what they would have cost at
    the uncached price, less what writing the cache cost. For a model on this machine it is the time that computing them
    takes (`saved_seconds`) at the price of a second. ``unpriced`` uses have no known price and are not in ``money``.
    ``attended_tokens`` were attended to in place, as KV pages of ``attended_codec``; ``spared_bytes`` is the most that
    this kept out of RAM in one use. ``record_tokens`` came as KV states of recalled records, attended to in place or
    copied.
    """

    verb: str
    model: str
    uses: int
    input_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    seconds: float
    first_token_s: float | None
    missed: int
    attended_tokens: int = 0
    attended_codec: str | None = None
    spared_bytes: int = 0
    record_tokens: int = 0
    money: float | None
    saved_money: float | None
    saved_seconds: float | None = None
    unpriced: int = 0


class Share(Value):
    """All uses of one provider, of one day (``name`` is the date in UTC) or of one scope beneath the handle."""

    name: str
    uses: int
    input_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    seconds: float
    money: float | None
    saved_money: float | None
    unpriced: int = 0


class Kind(Value):
    """What one kind of memory did and cost.

    plaintext: ``tokens`` of recalled records and of core blocks in prompts; the money of embedding and extracting, of
    recalled tokens at the uncached and of cores at the cached price. activation: ``tokens`` that came from caches and
    pages, ``seconds`` of computing that this spared this machine, and the ``money`` of writing caches beyond that of
    reading the prompt. parametric: training runs. ``saved_money`` is what caching saved, with the writes paid; for
    plaintext it is the price of full history, cached, less what was spent.
    """

    name: Literal["plaintext", "activation", "parametric"]
    uses: int
    tokens: int
    seconds: float
    bytes: int | None = None
    money: float | None = None
    saved_money: float | None = None


class Comparison(Value):
    """What the newest ``requests`` would have cost under another ``policy``, and what was ``spent`` on them, on
    priming the cache for them too.

    Replayed by the rules of their host's cache from the tokens that each request was made of; "no cache" is exact.
    """

    policy: str
    requests: int
    money: float
    spent: float

    @property
    def saved(self) -> float:
        """Dollars saved against this policy; negative where it would have been cheaper."""
        return self.money - self.spent


class Prefix(Value):
    """A stored prefix and whether it paid: a scope's prefix at a host, or KV pages of this machine.

    ``cost`` is what storing it took, ``gained`` what reading it saved, both in ``unit``: uncached input tokens at a
    host, seconds of computing for pages. It has paid once every written token was read ``reads_needed`` times.
    """

    where: str
    name: str
    tokens: int
    read_tokens: int
    unit: Literal["tokens", "seconds"]
    cost: float
    gained: float
    reads_needed: float | None
    bytes: int | None = None
    money: float | None = None

    @property
    def paid(self) -> bool:
        """True once reading it has saved what storing it cost."""
        return self.gained >= self.cost


class Miss(Value):
    """Why an expected cache hit did not come, how often, and how many tokens were paid for again."""

    reason: str
    uses: int
    tokens: int


class Taught(Value):
    """A LoRA version of this scope and how it learnt: its measures over the steps of its training."""

    name: str
    state: str
    records: int
    recall: float
    drift: float
    cpu_seconds: float
    curves: tuple[Curve, ...] = ()


class Report(Value):
    """What memory cost and saved, and what it holds. ``str()`` of it is a table; `html` makes a page with plots.

    ``lines`` is by verb and model, ``providers``, ``scopes`` (the next level beneath the handle) and ``days`` (UTC) sum
    the same uses otherwise. ``bytes`` is on disk, by kind of memory: the whole folder's, so it is told on the root
    handle only, and so is what storing them costs a month. ``lora_uses`` says on how many answers each LoRA version
    acted. ``moves`` are what consolidation is at, failed at or did lately, newest first; it may be ``paused``.
    ``since`` and ``until`` bound the uses, not what is held or was moved.
    """

    lines: list[Line]
    bytes: dict[str, int]
    records: int
    pages: int
    loras: int
    lora_uses: dict[str, int] = Field(default={})
    since: dt.datetime | None = None
    until: dt.datetime | None = None
    providers: tuple[Share, ...] = ()
    scopes: tuple[Share, ...] = ()
    days: tuple[Share, ...] = ()
    kinds: tuple[Kind, ...] = ()
    compared: tuple[Comparison, ...] = ()
    prefixes: tuple[Prefix, ...] = ()
    misses: tuple[Miss, ...] = ()
    budgets: tuple[Budget, ...] = ()
    taught: tuple[Taught, ...] = ()
    storage_month: float | None = None
    moves: tuple[Outcome, ...] = ()
    paused: bool = False

    @property
    def cached_share(self) -> float:
        """The share of all prompt tokens that came from a cache, 0 to 1."""
        tokens = sum(line.input_tokens for line in self.lines)
        return sum(line.cached_tokens for line in self.lines) / tokens if tokens else 0.0

    @property
    def money(self) -> float | None:
        """Dollars spent in all, as far as prices are known; None where none is."""
        return _total([line.money for line in self.lines])

    @property
    def saved_money(self) -> float | None:
        """Dollars that caches saved in all, their writes paid; None where no price is known."""
        return _total([line.saved_money for line in self.lines])

    def html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as one HTML page with plots, self-contained: no script, nothing loaded from elsewhere.

        With ``path`` it is written there too. Raises `StoreError` where that can't be done.
        """
        from .html import page

        text = page(self)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise StoreError(f"can't write the report to {os.fspath(path)!r}: {error.strerror}") from error
        return text

    def summary(self) -> list[str]:
        """At most six lines: what was spent and saved, against what, prefixes, misses, budgets, consolidation."""
        told = []
        spared = sum(line.saved_seconds or 0.0 for line in self.lines)
        here = f"KV pages and slots spared this machine {spared:.1f} s of computing" if spared else ""
        if self.money is not None:
            unpriced = sum(line.unpriced for line in self.lines)
            note = f" ({unpriced} uses have no known price)" if unpriced else ""
            saved = f"spent {amount(self.money)} $, saved {amount(self.saved_money or 0.0)} $ by caches{note}"
            told.append(f"{saved}; {here}" if here else saved)
        elif here:
            told.append(here)
        if self.compared:
            requests = max(compared.requests for compared in self.compared)
            named = [compared for compared in self.compared if compared.policy in NAMED]
            against = ", ".join(f"with {compared.policy} {amount(compared.money)} $" for compared in named)
            told.append(f"the newest {requests} requests cost {amount(self.compared[0].spent)} $; {against}")
        if self.prefixes:
            paid = sum(prefix.paid for prefix in self.prefixes)
            told.append(f"{paid} of {len(self.prefixes)} stored prefixes have paid for themselves")
        if self.misses:
            first = self.misses[0]
            missed = sum(miss.uses for miss in self.misses)
            told.append(f"{missed} expected cache hits did not come, {first.uses} of them: {first.reason}")
        if self.budgets:
            told.append(f"budget of {min(self.budgets, key=lambda budget: budget.left)}")
        if self.moves or self.paused:
            told.append("consolidation" + (" is paused: " if self.paused else ": ") + self._moved())
        return told

    def _moved(self) -> str:
        parts = [
            f"{one.move.kind} of {one.move.scope} since {dt.datetime.fromtimestamp(one.at, dt.UTC):%H:%M:%S} UTC"
            for one in self.moves
            if one.state == "running"
        ]
        for state, verb in (("queued", "waiting"), ("done", "made"), ("failed", "failed")):
            if count := sum(one.state == state for one in self.moves):
                parts.append(f"{count} {verb}")
        return ", ".join(parts) or "no moves"

    def _acted(self) -> str:
        return f" (acted {sum(self.lora_uses.values())} times)" if self.lora_uses else ""

    def _disk(self) -> str:
        sizes = ", ".join(f"{kind} {size(count)}" for kind, count in self.bytes.items())
        month = "" if self.storage_month is None else f" ({amount(self.storage_month)} $ a month)"
        return f"; on disk: {sizes}{month}" if sizes else ""

    def _table(self) -> Any:
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title="agentmem: what memory cost and saved",
            caption=(
                f"{self.records} records, {self.pages} KV pages, {self.loras} LoRA versions{self._acted()}"
                f"{self._disk()}"
                f"; {self.cached_share:.0%} of all prompt tokens came from a cache"
            ),
        )
        table.add_column("verb")
        table.add_column("model")
        for name in (
            "uses",
            "tokens in",
            "cached",
            "written",
            "out",
            "first token s",
            "seconds",
            "missed",
            "in place",
            "RAM spared",
            "$",
            "$ saved",
        ):
            table.add_column(name, justify="right")
        composed = any(line.record_tokens for line in self.lines)
        if composed:  # few use it, and the table is wide
            table.add_column("records as KV", justify="right")
        for line in self.lines:
            first = "-" if line.first_token_s is None else f"{line.first_token_s:.2f}"
            counts = (line.uses, line.input_tokens, line.cached_tokens, line.written_tokens, line.output_tokens)
            table.add_row(
                line.verb,
                escape(line.model),  # a name is no markup
                *(f"{count:,}" for count in counts),
                first,
                f"{line.seconds:.1f}",
                str(line.missed),
                f"{line.attended_tokens:,} {line.attended_codec}" if line.attended_tokens else "-",
                size(line.spared_bytes) if line.spared_bytes else "-",
                money(line.money),
                money(line.saved_money),
                *([f"{line.record_tokens:,}"] if composed else []),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=170, record=False, no_color=True)
        console.print(self.__rich__())
        out = console.file
        assert isinstance(out, io.StringIO)
        return out.getvalue().rstrip()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(self._table(), *(Text(sentence) for sentence in self.summary()))

    def _repr_html_(self) -> str:
        from .html import body

        return body(self)


def money(value: float | None) -> str:
    """Dollars as text; a dash where they are not known."""
    return "-" if value is None else amount(value)


def size(count: int) -> str:
    """Bytes as text in the unit that fits."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def _total(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
