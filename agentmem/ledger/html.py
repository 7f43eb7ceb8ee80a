"""A report as a page for browsers: tables, and above each its plot as inline SVG.

Self-contained: no script, no font, nothing loaded from elsewhere; light or dark as the reader's system is. Every text
is escaped, for scopes and models have names that users chose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from .budgets import amount

if TYPE_CHECKING:
    from .report import Report, Share

__all__ = ["body", "page"]

STYLE = """
.agentmem { --ink: #1b1f24; --paper: #ffffff; --faint: #d0d7de; --first: #1f6feb; --second: #2da44e;
  color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto;
  padding: 1rem; }
@media (prefers-color-scheme: dark) { .agentmem { --ink: #e6edf3; --paper: #0d1117; --faint: #30363d;
  --first: #58a6ff; --second: #3fb950; } body:has(> .agentmem) { background: #0d1117; } }
.agentmem figure { margin: 2rem 0; } .agentmem figcaption { font-weight: 600; }
.agentmem svg { width: 100%; height: auto; } .agentmem svg text { fill: var(--ink); font-size: 12px; }
.agentmem svg line { stroke: var(--faint); } .agentmem .first { fill: var(--first); }
.agentmem .second { fill: var(--second); }
.agentmem .wide { overflow-x: auto; } .agentmem table { border-collapse: collapse; }
.agentmem th, .agentmem td { padding: .15rem .6rem; border-bottom: 1px solid var(--faint); text-align: right; }
.agentmem th:first-child, .agentmem td.text, .agentmem th.text { text-align: left; }
"""

#: Width of a plot in its own units.
WIDTH = 720
#: Room for labels at the left of bars.
LABELS = 200
#: Height of one bar.
BAR = 14

Cell = str | int | float | None
#: The names of a plot's one or two series, and per row its label and their values.
Series = Sequence[str]
Rows = Sequence[tuple[str, Sequence[float | None]]]


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
            _figure(
                "Over time, by day (UTC)",
                _columns("spent and saved by day", money, [(d.name, (d.money, d.saved_money)) for d in report.days]),
                _shares(report.days, "day"),
            )
        )
    if report.compared:
        first = report.compared[0]
        rows: list[tuple[str, Sequence[float | None]]] = [("as it was", (first.spent,))]
        rows += [(c.policy, (c.money,)) for c in report.compared]
        parts.append(
            _figure(
                f"The newest {first.requests:,} requests under other policies",
                _bars("what the same requests would have cost", ("$",), rows),
                _table(
                    ("policy", "would have cost $", "spent $", "saved $"),
                    [(c.policy, c.money, c.spent, c.saved) for c in report.compared],
                ),
            )
        )
    for title, shares in (("By provider", report.providers), ("By scope", report.scopes)):
        if shares:
            plot = _bars(title.lower(), money, [(s.name, (s.money, s.saved_money)) for s in shares[:20]])
            parts.append(_figure(title, plot, _shares(shares, title.removeprefix("By "))))
    if report.kinds:
        parts.append(
            _figure(
                "By kind of memory",
                _bars("by kind of memory", money, [(k.name, (k.money, k.saved_money)) for k in report.kinds]),
                _table(
                    ("kind", "uses", "tokens", "seconds", "bytes", *money),
                    [(k.name, k.uses, k.tokens, k.seconds, k.bytes, k.money, k.saved_money) for k in report.kinds],
                ),
            )
        )
    parts.append(_figure("By verb and model", "", _lines(report)))
    if report.prefixes:
        parts.append(
            _figure(
                "Stored prefixes: what storing took, what reading gave back",
                "",
                _table(
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
        plot = _bars("missed cache hits by reason", ("uses",), [(m.reason, (m.uses,)) for m in report.misses[:10]])
        table = _table(("reason", "uses", "tokens paid again"), [(m.reason, m.uses, m.tokens) for m in report.misses])
        parts.append(_figure("Expected cache hits that did not come", plot, table))
    if report.budgets:
        parts.append(
            _figure(
                "Budgets",
                "",
                _table(
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
    disk = _table(("on disk", "bytes"), list(report.bytes.items())) if report.bytes else ""
    return f"<p>{held}{'; uses ' + span if span else ''}.</p>{f'<ul>{sentences}</ul>' if sentences else ''}{disk}"


def _lines(report: Report) -> str:
    names = ("verb", "model", "uses", "tokens in", "cached", "written", "out", "seconds", "missed", "$", "saved $")
    return _table(
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
    return _table(
        (name, "uses", "tokens in", "cached", "written", "out", "seconds", "spent $", "saved $"),
        [
            (
                *(s.name, s.uses, s.input_tokens, s.cached_tokens, s.written_tokens, s.output_tokens),
                *(s.seconds, s.money, s.saved_money),
            )
            for s in shares
        ],
    )


def _figure(title: str, plot: str, table: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption>{plot}<div class="wide">{table}</div></figure>'


def _table(names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f'<td class="text">{escape(cell)}</td>' if isinstance(cell, str) else f"<td>{_number(cell)}</td>"
            for cell in rest
        )
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _number(value: float | None) -> str:
    if value is None:
        return "&ndash;"
    return f"{value:,}" if isinstance(value, int) else amount(value)


def _scale(rows: Rows, room: float) -> tuple[Callable[[float], float], float, float]:
    """Where a value lies in ``room`` units, and the least and the greatest value; zero is always among them."""
    known = [value for _, values in rows for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0
    return (lambda value: (value - low) / span * room), low, high


def _bars(title: str, series: Series, rows: Rows) -> str:
    """Horizontal bars, one group a row."""
    place, _, _ = _scale(rows, WIDTH - LABELS - 90)
    group = BAR * len(series) + 8
    parts = []
    for number, (label, values) in enumerate(rows):
        top = 24 + number * group
        middle = top + BAR * len(series) / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle:.1f}" text-anchor="end">{escape(_short(label))}</text>')
        for index, value in enumerate(values):
            if value is None:
                continue
            left, right = sorted((place(0.0), place(value)))
            y = top + index * BAR
            parts.append(
                f'<rect class="{_class(index)}" x="{LABELS + left:.1f}" y="{y}" width="{max(right - left, 1):.1f}"'
                f' height="{BAR - 2}"><title>{escape(label)}: {_number(value)} {escape(series[index])}</title></rect>'
                f'<text x="{LABELS + right + 4:.1f}" y="{y + BAR - 4}">{_number(value)}</text>'
            )
    zero = LABELS + place(0.0)
    height = 24 + len(rows) * group
    parts.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="20" y2="{height}"/>')
    return _svg(title, series, height + 4, parts)


def _columns(title: str, series: Series, rows: Rows) -> str:
    """Columns over time, one group a row."""
    height, left = 180, 70
    place, low, high = _scale(rows, height)
    step = (WIDTH - left) / max(len(rows), 1)
    width = min(step * 0.8 / len(series), 40.0)
    base = 24 + height
    parts = []
    for level in sorted({low, 0.0, high}):
        y = base - place(level)
        parts.append(
            f'<line x1="{left}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(float(level))}</text>'
        )
    every = max(1, math.ceil(90 / step))
    for number, (label, values) in enumerate(rows):
        x = left + number * step
        for index, value in enumerate(values):
            if value is not None:
                bottom, top = sorted((place(0.0), place(value)))
                parts.append(
                    f'<rect class="{_class(index)}" x="{x + index * width:.2f}" y="{base - top:.1f}"'
                    f' width="{width:.2f}" height="{max(top - bottom, 0.5):.1f}">'
                    f"<title>{escape(label)}: {_number(value)} {escape(series[index])}</title></rect>"
                )
        if number % every == 0 and x + 70 <= WIDTH:
            parts.append(f'<text x="{x:.1f}" y="{base + 16}">{escape(label)}</text>')
    return _svg(title, series, base + 24, parts)


def _svg(title: str, series: Series, height: float, parts: Sequence[str]) -> str:
    legend = "".join(
        f'<rect class="{_class(index)}" x="{LABELS + index * 90}" y="4" width="10" height="10"/>'
        f'<text x="{LABELS + index * 90 + 14}" y="13">{escape(name)}</text>'
        for index, name in enumerate(series)
    )
    return (
        f'<svg role="img" aria-label="{escape(title)}; the numbers are in the table below"'
        f' viewBox="0 0 {WIDTH} {height:.0f}">{legend}{"".join(parts)}</svg>'
    )


def _class(index: int) -> str:
    return ("first", "second")[index % 2]


def _short(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "…"
