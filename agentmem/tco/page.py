"""A comparison as a page for browsers: tables, and above each its plot as inline SVG.

Orders what figures.py draws; every text is escaped there.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..figures import STYLE, Cell, bars, figure, panels, table

if TYPE_CHECKING:
    from .report import Line, TcoReport

__all__ = ["body", "page"]


def page(report: TcoReport) -> str:
    """The comparison as one HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>agentmem: what memory costs</title>\n</head>\n<body>\n{body(report)}\n</body>\n</html>\n"
    )


def body(report: TcoReport) -> str:
    """The comparison as an element for a page or a notebook."""
    work = report.workload
    parts = [
        f"<style>{STYLE}</style>",
        "<h1>What memory costs</h1>",
        f"<p>{work.users:,} users, {work.turns_day:g} turns a day each, over {work.months:g} months.</p>",
    ]
    for offer in dict.fromkeys(line.offer for line in report.lines):
        lines = [line for line in report.lines if line.offer == offer]
        parts.append(_offer(offer, lines))
        curves = [curve for name, curve in report.curves if name == offer]
        if curves:
            unit = "$" if lines[0].turn is not None else "CPU-seconds"
            names = ("policy", *(f"{x:g} days" for x, _ in curves[0].points))
            rows: list[Sequence[Cell]] = [(curve.name, *(y for _, y in curve.points)) for curve in curves]
            title = f"{offer}: {unit} a turn by days of history"
            parts.append(figure(title, panels(title, curves, across="day"), table(names, rows)))
    if report.breaks:
        told = "".join(f"<li>{escape(str(one))}</li>" for one in report.breaks)
        parts.append(f"<h2>Break-even points</h2><ul>{told}</ul>")
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in report.assumptions)
    parts.append(f"<h2>Assumed</h2><ul>{sentences}</ul>")
    parts.append(f"<h2>Workload</h2>{table(('field', 'value'), [(name, _cell(value)) for name, value in work])}")
    return f'<div class="agentmem">{"".join(parts)}</div>'


def _offer(offer: str, lines: Sequence[Line]) -> str:
    priced = lines[0].month is not None
    unit = "$ a month" if priced else "CPU-seconds a turn"
    values = [(line.policy, (line.month if priced else line.seconds,)) for line in lines]
    names = (
        "memory", "$ a month", "$ a turn", "CPU-seconds a turn", "standard error", "first token s", "of 95 in 100",
        "prompt tokens", "from cache", "core tokens", "LoRA records", "bytes on disk", "cache lifetimes",
    )  # fmt: skip
    rows: list[Sequence[Cell]] = [
        (
            *(line.policy, line.month, line.turn, line.seconds, f"{line.error:.1%}", line.first_token_s),
            *(line.first_token_p95_s, round(line.prompt_tokens), f"{line.read:.0%}", round(line.core_tokens)),
            *(f"{line.learnt:.1f}", sum(line.bytes.values())),
            line.setting,
        )
        for line in lines
    ]
    tiers = list(dict.fromkeys(tier for line in lines for tier in line.bytes))
    sizes: list[Sequence[Cell]] = [(line.policy, *(line.bytes.get(tier, 0) for tier in tiers)) for line in lines]
    below = table(names, rows) + table(("bytes on disk", *tiers), sizes)
    return figure(f"{offer}: {unit}", bars(f"{offer}: {unit}", (unit,), values), below)


def _cell(value: object) -> Cell:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
