"""Every use and what it cost: one row per request in ``uses``, read back as a report.

Counts are the provider's own (normalised by its adapter); money comes from the price table of ``genai-prices``,
offline. Knows nothing of prompts or records; holds no text.
"""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .database import Database
from .provider import split_name
from .types import CacheUse, Scope, Usage, Value

__all__ = ["Ledger", "Line", "Report", "price"]

#: Many values bound as one JSON list.
LISTED = "SELECT value FROM json_each(?)"


class Line(Value):
    """The uses of one model by one verb. Money is in US dollars; None where no price is known.

    ``saved_tokens`` were read from a cache instead of being computed; ``saved_money`` is what they would have cost at
    the uncached price, less what writing the cache cost. ``attended_tokens`` were attended to in place, as KV pages of
    ``attended_codec``; ``spared_bytes`` is the most that this kept out of RAM in one use. ``record_tokens``
    came as KV states of recalled records, attended to in place or copied.
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


class Report(Value):
    """What memory cost and saved, by verb and model, and what it holds.

    ``bytes`` is on disk, by kind of memory: the whole folder's, so it is told on the root handle only.
    """

    lines: list[Line]
    bytes: dict[str, int]
    records: int
    pages: int
    loras: int

    @property
    def cached_share(self) -> float:
        """The share of all prompt tokens that came from a cache, 0 to 1."""
        tokens = sum(line.input_tokens for line in self.lines)
        return sum(line.cached_tokens for line in self.lines) / tokens if tokens else 0.0

    def _disk(self) -> str:
        sizes = ", ".join(f"{kind} {_size(size)}" for kind, size in self.bytes.items())
        return f"; on disk: {sizes}" if sizes else ""

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(
            title="agentmem: what memory cost and saved",
            caption=(
                f"{self.records} records, {self.pages} KV pages, {self.loras} LoRA versions{self._disk()}"
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
                line.model,
                *(f"{count:,}" for count in counts),
                first,
                f"{line.seconds:.1f}",
                str(line.missed),
                f"{line.attended_tokens:,} {line.attended_codec}" if line.attended_tokens else "-",
                _size(line.spared_bytes) if line.spared_bytes else "-",
                _money(line.money),
                _money(line.saved_money),
                *([f"{line.record_tokens:,}"] if composed else []),
            )
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=170, record=False, no_color=True)
        console.print(self._table())
        out = console.file
        assert isinstance(out, io.StringIO)
        return out.getvalue().rstrip()

    def __rich__(self) -> Any:
        return self._table()


def _money(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def price(model: str, usage: Usage) -> tuple[float, float] | None:
    """(what this use cost, what it would have cost with nothing cached) in dollars, or None where no price is known.

    Prices: genai-prices' packaged table. Its input count, like ours, includes cached and written tokens.
    """
    scheme, name = split_name(model)
    try:
        from genai_prices import Usage as Used
        from genai_prices import calc_price
    except ModuleNotFoundError:
        return None
    try:
        full = calc_price(
            Used(
                input_tokens=usage.input_tokens,
                cache_read_tokens=usage.cached_tokens,
                cache_write_tokens=usage.written_tokens,
                output_tokens=usage.output_tokens,
            ),
            model_ref=name,
            provider_id=scheme,
        )
        bare = calc_price(
            Used(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens), model_ref=name, provider_id=scheme
        )
    except (LookupError, ValueError):
        return None
    return float(full.total_price), float(bare.total_price)


class Ledger:
    """The uses of one folder."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._database = database
        self._clock = clock

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
        money: tuple[float, float] | None = None,
    ) -> None:
        """Write down one use. ``shown`` are the records that stood in the prompt; ``size`` is in bytes written;
        ``money`` is what `price` said, asked here if not given."""
        now = self._clock()
        cache = cache or CacheUse()
        paid, bare = money or price(model, usage) or (None, None)
        levels = [value or "" for _, value in scope.levels()]
        with self._database.write() as connection:
            connection.execute(
                "INSERT INTO uses (at, verb, model, tenant, user, agent, session, input, cached, written, output,"
                " first_s, total_s, bytes, expected, reason, money, uncached_money, attended)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(now, verb, model, *levels),
                    *(usage.input_tokens, usage.cached_tokens, usage.written_tokens, usage.output_tokens),
                    *(usage.first_token_s, usage.total_s, size, cache.expected_tokens, cache.reason, paid, bare),
                    cache.attended and cache.attended.model_dump_json(),
                ),
            )
            self.note_shown(model, shown, None)

    def note_shown(self, model: str, records: Sequence[str], holds_s: float | None) -> None:
        """Write down that these records stand in a prompt, which a host may hold for ``holds_s`` seconds."""
        now = self._clock()
        with self._database.write() as connection:
            connection.executemany(
                "INSERT INTO shown VALUES (?, ?, ?, 1, ?)"
                " ON CONFLICT DO UPDATE SET at = excluded.at, times = times + 1, holds_s = excluded.holds_s",
                [(record, model, now, holds_s) for record in dict.fromkeys(records)],
            )

    def times_shown(self, records: Sequence[str]) -> dict[str, int]:
        """How often each of these records was put into a prompt, by id; those that never were are left out."""
        rows = self._database.query(
            f"SELECT record, SUM(times) FROM shown WHERE record IN ({LISTED}) GROUP BY record", [json.dumps(records)]
        )
        return {row[0]: int(row[1]) for row in rows}

    def may_hold(self, records: Sequence[str]) -> list[str]:
        """One sentence per provider outside this machine that was shown one of the records: what it may hold."""
        rows = self._database.query(
            "SELECT model, MAX(at + holds_s) AS until FROM shown"
            f" WHERE record IN ({LISTED}) AND holds_s IS NOT NULL GROUP BY model ORDER BY model",
            [json.dumps(records)],
        )
        return [
            f"{row['model']} was shown them; its prompt cache may hold them until {_utc(row['until'])}, "
            "its logs as its contract says"
            for row in rows
        ]

    def lines(self, scope: Scope) -> list[Line]:
        """The uses in this scope and beneath it, summed by verb and model."""
        set_levels = [(level, value) for level, value in scope.levels() if value is not None]
        where = " AND ".join(f"{level} = ?" for level, _ in set_levels) or "1"
        rows = self._database.query(
            "SELECT verb, model, COUNT(*) AS uses, SUM(input) AS input, SUM(cached) AS cached, SUM(written) AS written,"
            " SUM(output) AS output, SUM(total_s) AS seconds, AVG(first_s) AS first, SUM(reason IS NOT NULL) AS missed,"
            " SUM(money) AS money, SUM(uncached_money - money) AS saved,"
            " COALESCE(SUM(json_extract(attended, '$.tokens')), 0) AS attended,"
            " GROUP_CONCAT(DISTINCT json_extract(attended, '$.codec')) AS codec,"
            " COALESCE(MAX(json_extract(attended, '$.stock_bytes') - json_extract(attended, '$.bytes')), 0) AS spared,"
            " COALESCE(SUM(json_extract(attended, '$.record_tokens')), 0) AS record_tokens"
            f" FROM uses WHERE {where} GROUP BY verb, model ORDER BY verb, model",
            [value for _, value in set_levels],
        )
        return [_line(dict(row)) for row in rows]


def _line(row: Mapping[str, Any]) -> Line:
    return Line(
        verb=row["verb"],
        model=row["model"],
        uses=row["uses"],
        input_tokens=row["input"],
        cached_tokens=row["cached"],
        written_tokens=row["written"],
        output_tokens=row["output"],
        seconds=row["seconds"],
        first_token_s=row["first"],
        missed=row["missed"],
        attended_tokens=row["attended"],
        attended_codec=row["codec"],
        spared_bytes=max(row["spared"], 0),
        record_tokens=row["record_tokens"],
        money=row["money"],
        saved_money=row["saved"],
    )


def _utc(seconds: float) -> str:
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
