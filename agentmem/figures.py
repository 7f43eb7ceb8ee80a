"""Plots as inline SVG, tables as HTML, numbers as text: what reports and versions are shown with.

Self-contained: no script, no font, nothing loaded from elsewhere; light or dark as the reader's system is. Every text
is escaped. Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from .types import Value

__all__ = ["STYLE", "Curve", "amount", "bars", "columns", "figure", "number", "panels", "table"]

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
.agentmem polyline { fill: none; stroke: var(--first); stroke-width: 2; }
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


class Curve(Value):
    """One measure over steps: ``points`` are (step, value). ``share``: the values are of 1, and shown from 0 to 1."""

    name: str
    points: tuple[tuple[float, float], ...] = ()
    share: bool = False


def amount(value: float) -> str:
    """A number as text with four decimals, or more where it is so small that two digits of it need them."""
    digits = 4 if abs(value) >= 0.001 or abs(value) < 1e-9 else 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{digits}f}"


def figure(title: str, plot: str, below: str) -> str:
    """A plot and what stands below it, a table as a rule, under a title."""
    return f'<figure><figcaption>{escape(title)}</figcaption>{plot}<div class="wide">{below}</div></figure>'


def table(names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Rows under their columns' names; the first cell of a row is its head."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for first, *rest in rows:
        cells = "".join(
            f'<td class="text">{escape(cell)}</td>' if isinstance(cell, str) else f"<td>{number(cell)}</td>"
            for cell in rest
        )
        lines.append(f'<tr><th scope="row">{escape(str(first))}</th>{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def number(value: float | None) -> str:
    """A number as a cell shows it; a dash where it is not known."""
    if value is None:
        return "&ndash;"
    return f"{value:,}" if isinstance(value, int) else amount(value)


def _scale(rows: Rows, room: float) -> tuple[Callable[[float], float], float, float]:
    """Where a value lies in ``room`` units, and the least and the greatest value; zero is always among them."""
    known = [value for _, values in rows for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0
    return (lambda value: (value - low) / span * room), low, high


def bars(title: str, series: Series, rows: Rows) -> str:
    """Horizontal bars, one group a row."""
    place, _, _ = _scale(rows, WIDTH - LABELS - 90)
    group = BAR * len(series) + 8
    parts = []
    for row, (label, values) in enumerate(rows):
        top = 24 + row * group
        middle = top + BAR * len(series) / 2 + 4
        parts.append(f'<text x="{LABELS - 8}" y="{middle:.1f}" text-anchor="end">{escape(_short(label))}</text>')
        for index, value in enumerate(values):
            if value is None:
                continue
            left, right = sorted((place(0.0), place(value)))
            y = top + index * BAR
            parts.append(
                f'<rect class="{_class(index)}" x="{LABELS + left:.1f}" y="{y}" width="{max(right - left, 1):.1f}"'
                f' height="{BAR - 2}"><title>{escape(label)}: {number(value)} {escape(series[index])}</title></rect>'
                f'<text x="{LABELS + right + 4:.1f}" y="{y + BAR - 4}">{number(value)}</text>'
            )
    zero = LABELS + place(0.0)
    height = 24 + len(rows) * group
    parts.append(f'<line x1="{zero:.1f}" x2="{zero:.1f}" y1="20" y2="{height}"/>')
    return _svg(title, series, height + 4, parts)


def columns(title: str, series: Series, rows: Rows) -> str:
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
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{number(float(level))}</text>'
        )
    every = max(1, math.ceil(90 / step))
    for row, (label, values) in enumerate(rows):
        x = left + row * step
        for index, value in enumerate(values):
            if value is not None:
                bottom, top = sorted((place(0.0), place(value)))
                parts.append(
                    f'<rect class="{_class(index)}" x="{x + index * width:.2f}" y="{base - top:.1f}"'
                    f' width="{width:.2f}" height="{max(top - bottom, 0.5):.1f}">'
                    f"<title>{escape(label)}: {number(value)} {escape(series[index])}</title></rect>"
                )
        if row % every == 0 and x + 70 <= WIDTH:
            parts.append(f'<text x="{x:.1f}" y="{base + 16}">{escape(label)}</text>')
    return _svg(title, series, base + 24, parts)


def panels(title: str, curves: Sequence[Curve], *, across: str = "step") -> str:
    """Each curve in a panel of its own, two in a row, for their units differ. A curve of one point is a dot.
    ``across`` names what the points are over."""
    wide, high, gap = WIDTH // 2, 150, 34
    parts = []
    for index, curve in enumerate(curves):
        left, top = index % 2 * wide, index // 2 * (high + gap)
        parts += _panel(curve, left + 58, top + 26, wide - 76, high - 26, across=across)
    rows = (len(curves) + 1) // 2
    return _svg(title, (), rows * (high + gap), parts)


def _panel(curve: Curve, left: int, top: int, width: int, height: int, *, across: str) -> list[str]:
    """The lines, labels and points of one curve within this box."""
    parts = [f'<text x="{left}" y="{top - 10}">{escape(curve.name)}</text>']
    points = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return [*parts, f'<text x="{left}" y="{top + height / 2:.0f}">not measured</text>']
    values = [y for _, y in points]
    low, high = (0.0, 1.0) if curve.share else (min(0.0, *values), max(0.0, *values))
    low, high = min(low, *values), max(high, *values)
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / ((last - first) or 1.0) if last > first else 0.5
        return left + across * width, top + height - (y - low) / ((high - low) or 1.0) * height

    for level in sorted({low, 0.0, high}):
        y = place(first, level)[1]
        label = f"{level:.0%}" if curve.share else f"{level:.3g}"
        parts.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )
    ends = {first: "start", last: "end"} if last > first else {first: "middle"}
    for x, anchor in ends.items():
        parts.append(
            f'<text x="{place(x, 0.0)[0]:.1f}" y="{top + height + 16}" text-anchor="{anchor}">{across} {x:g}</text>'
        )
    drawn = [place(x, y) for x, y in points]
    if len(drawn) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)}"/>')
    parts += [
        f'<circle class="first" cx="{x:.1f}" cy="{y:.1f}" r="2.5"><title>{across} {step:g}: {value:.4g}</title>'
        "</circle>"
        for (x, y), (step, value) in zip(drawn, points, strict=True)
    ]
    return parts


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
