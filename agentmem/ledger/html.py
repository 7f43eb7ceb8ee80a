"""A report as a page for browsers: tables, and above each its plot as inline SVG.

Orders what figures.py draws. Every text is escaped there, for scopes and models have names that users chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..figures import STYLE, bars, columns, figure, panels, table

if TYPE_CHECKING:
    from .report import Report, Share

__all__ = ["body", "page"]


def page(report: Report) -> str:
    """The report as one HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>agentmem: what memory cost and saved</title>\n</head>\n<body>\n{body(report)}\n</body>\n</html>\n"
    )


def body(report: Report) -> str:
    """The report as an element for a page or a notebook."""
    parts = [f"<style>{STYLE}</style>", "<h1>What memory cost and saved</h1>", _header(report)]
    money = ("spent $", "saved $")
    if report.days:
        parts.append(
            figure(
                "Over time, by day (UTC)",
                columns("spent and saved by day", money, [(d.name, (d.money, d.saved_money)) for d in report.days]),
                _shares(report.days, "day"),
            )
        )
    if report.compared:
        first = report.compared[0]
        rows: list[tuple[str, Sequence[float | None]]] = [("as it was", (first.spent,))]
        rows += [(c.policy, (c.money,)) for c in report.compared]
        parts.append(
            figure(
                f"The newest {first.requests:,} requests under other policies",
                bars("what the same requests would have cost", ("$",), rows),
                table(
                    ("policy", "would have cost $", "spent $", "saved $"),
                    [(c.policy, c.money, c.spent, c.saved) for c in report.compared],
                ),
            )
        )
    for title, shares in (("By provider", report.providers), ("By scope", report.scopes)):
        if shares:
            plot = bars(title.lower(), money, [(s.name, (s.money, s.saved_money)) for s in shares[:20]])
            parts.append(figure(title, plot, _shares(shares, title.removeprefix("By "))))
    if report.kinds:
        parts.append(
            figure(
                "By kind of memory",
                bars("by kind of memory", money, [(k.name, (k.money, k.saved_money)) for k in report.kinds]),
                table(
                    ("kind", "uses", "tokens", "seconds", "bytes", *money),
                    [(k.name, k.uses, k.tokens, k.seconds, k.bytes, k.money, k.saved_money) for k in report.kinds],
                ),
            )
        )
    parts.append(figure("By verb and model", "", _lines(report)))
    if report.prefixes:
        parts.append(
            figure(
                "Stored prefixes: what storing took, what reading gave back",
                "",
                table(
                    (
                        "prefix",
                        "where",
                        "tokens",
                        "tokens read",
                        "cost",
                        "gained",
                        "in",
                        "reads to pay",
                        "paid",
                        "bytes",
                    ),
                    [
                        (
                            *(p.name, p.where, p.tokens, p.read_tokens, p.cost, p.gained, p.unit, p.reads_needed),
                            *("yes" if p.paid else "not yet", p.bytes),
                        )
                        for p in report.prefixes
                    ],
                ),
            )
        )
    if report.misses:
        plot = bars("missed cache hits by reason", ("uses",), [(m.reason, (m.uses,)) for m in report.misses[:10]])
        told = table(("reason", "uses", "tokens paid again"), [(m.reason, m.uses, m.tokens) for m in report.misses])
        parts.append(figure("Expected cache hits that did not come", plot, told))
    for taught in report.taught:
        plot = panels(f"how {taught.name} learnt", taught.curves) if any(c.points for c in taught.curves) else ""
        cells = (taught.state, taught.records, taught.recall, taught.drift, taught.cpu_seconds)
        below = table(
            ("LoRA version", "state", "records", "recall of held-out wordings", "drift", "CPU-seconds"),
            [(taught.name, *cells)],
        )
        parts.append(figure(f"What {taught.name} learnt", plot, below))
    if report.moves:
        names = ("move", "scope", "state", "cost", "expected", "saved", "in", "requests since")
        moved = [
            (
                *(m.move.kind, str(m.move.scope), m.state, m.cost if m.cost is not None else m.move.cost, m.expected),
                *(m.saved, m.move.unit, m.requests),
            )
            for m in report.moves
        ]
        parts.append(figure("What consolidation moved", "", table(names, moved)))
    if report.budgets:
        parts.append(
            figure(
                "Budgets",
                "",
                table(
                    ("scope", "per", "$", "spent $", "left $", "then"),
                    [(str(b.scope), b.per, b.dollars, b.spent, b.left, b.action) for b in report.budgets],
                ),
            )
        )
    return f'<div class="agentmem">{"".join(parts)}</div>'


def _header(report: Report) -> str:
    held = f"{report.records:,} records, {report.pages:,} KV pages, {report.loras:,} LoRA versions"
    span = " ".join(
        f"{word} {escape(when.isoformat())}"
        for word, when in (("from", report.since), ("until", report.until))
        if when is not None
    )
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.summary())
    disk = table(("on disk", "bytes"), list(report.bytes.items())) if report.bytes else ""
    return f"<p>{held}{'; uses ' + span if span else ''}.</p>{f'<ul>{sentences}</ul>' if sentences else ''}{disk}"


def _lines(report: Report) -> str:
    names = ("verb", "model", "uses", "tokens in", "cached", "written", "out", "seconds", "missed", "$", "saved $")
    return table(
        names,
        [
            (
                *(x.verb, x.model, x.uses, x.input_tokens, x.cached_tokens, x.written_tokens, x.output_tokens),
                *(x.seconds, x.missed, x.money, x.saved_money),
            )
            for x in report.lines
        ],
    )


def _shares(shares: Sequence[Share], name: str) -> str:
    return table(
        (name, "uses", "tokens in", "cached", "written", "out", "seconds", "spent $", "saved $"),
        [
            (
                *(s.name, s.uses, s.input_tokens, s.cached_tokens, s.written_tokens, s.output_tokens),
                *(s.seconds, s.money, s.saved_money),
            )
            for s in shares
        ],
    )
