"""How a version's training is drawn: every point where it belongs, nothing where nothing was measured."""

from __future__ import annotations

import datetime as dt
import re
from xml.etree import ElementTree

import pytest

from agentmem.figures import Curve, panels
from agentmem.ledger.report import Report, Taught
from agentmem.parametric.gate import GateReport
from agentmem.parametric.plots import body, curves, line
from agentmem.parametric.steps import Point
from agentmem.parametric.versions import LoraVersion
from agentmem.types import Scope

GATE = GateReport(recall_trained=1, recall_held_out=0.96, drift=0.018, intrusion=0, passed=True)


def point(step: int, known: float, **more: float) -> Point:
    return Point(step=step, loss=3.0 / step, known=known, cpu_seconds=step, **more)


RUN = (point(1, 0.1), point(8, 0.6, drift=0.01, kl=0.02), point(32, 1.0, drift=0.018, kl=0.05))


def version(*points: Point, name: str = "lora-abc") -> LoraVersion:
    return LoraVersion(
        name=name,
        digest="ab" * 32,
        scope=Scope(user="ana"),
        created=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
        records=("r1",),
        base="local:tiny",
        identity="ab",
        gate=GATE,
        state="ready",
        bytes=1_650_000,
        cpu_seconds=31.0,
        curve=points,
    )


def svg(html: str) -> ElementTree.Element:
    found = re.search(r"<svg.*?</svg>", html, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def test_each_measure_has_a_panel_and_a_dot_for_every_point() -> None:
    drawn = svg(body(version(*RUN)))
    assert len(drawn.findall("polyline")) == 4
    dots = [dot.findtext("title") for dot in drawn.findall("circle")]
    assert len(dots) == 3 + 3 + 2 + 2
    assert "step 32: 1" in dots
    assert "step 8: 0.02" in dots


def test_a_curve_runs_from_the_left_to_the_right_and_known_lies_between_none_and_all() -> None:
    drawn = svg(panels("run", curves(RUN)[:1]))
    text = drawn.findall("polyline")[0].get("points") or ""
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, pair.split(","))) for pair in text.split()]
    assert x0 < x1 < x2
    assert (x1 - x0) / (x2 - x0) == pytest.approx((8 - 1) / (32 - 1), abs=0.01)
    assert y0 > y1 > y2, "more is higher"
    lines = {float(line.get("y1") or 0) for line in drawn.findall("line")}
    assert (min(lines) - y2, max(lines) - y0) == pytest.approx((0, (max(lines) - min(lines)) * 0.1), abs=0.2)


def test_one_point_is_a_dot_without_a_line() -> None:
    drawn = svg(body(version(RUN[1])))
    assert drawn.findall("polyline") == []
    assert len(drawn.findall("circle")) == 4


def test_what_was_not_measured_says_so_and_no_point_is_made_up() -> None:
    drawn = svg(body(version(RUN[0], point(2, 0.3))))
    assert len(drawn.findall("polyline")) == 2
    assert sum((text.text or "") == "not measured" for text in drawn.iter("text")) == 2
    infinite = panels("x", [Curve(name="loss", points=((1, float("nan")), (2, float("inf"))))])
    assert "nan" not in infinite
    assert "not measured" in infinite


def test_a_version_without_a_curve_has_its_tables_alone() -> None:
    shown = body(version())
    assert "<svg" not in shown
    assert "local:tiny" in shown
    assert line(()) == ""


def test_names_are_never_markup() -> None:
    assert "<script>" not in body(version(*RUN, name="<script>alert(1)</script>"))


def test_a_notebook_shows_it_light_or_dark_with_nothing_loaded_from_elsewhere() -> None:
    shown = version(*RUN)._repr_html_()
    assert "prefers-color-scheme: dark" in shown
    assert not re.search(r"https?://|<script|@import|url\(", shown)


def test_a_notebook_says_why_a_gate_failed_and_what_was_not_learnt() -> None:
    failed = GATE.model_copy(update={"passed": False, "failed": ("drift on unrelated text is 9.0%, not at most 4.0%",)})
    shown = version(*RUN).model_copy(update={"gate": failed, "left_out": (("r7", "it asks, and states nothing"),)})
    assert "drift on unrelated text is 9.0%" in shown._repr_html_()
    assert "it asks, and states nothing" in shown._repr_html_()
    assert "why the gate failed" not in version(*RUN)._repr_html_()


def test_in_a_line_of_text() -> None:
    assert (
        line(RUN) == "known ▂▅█ 100%, loss 3.00 to 0.09, drift +1.8% on a passage of its own, KL 0.050 after 32 steps"
    )
    assert line(RUN[:1]) == "known ▂ 10%, loss 3.00 to 3.00 after 1 steps"
    assert line(RUN) in str(version(*RUN))
    long = line([point(step, step / 400) for step in range(1, 401)])
    assert len(long.split()[1]) <= 25
    assert long.endswith("after 400 steps")


def test_the_report_draws_what_was_taught() -> None:
    taught = Taught(
        name="lora-abc", state="active", records=10, recall=0.96, drift=0.018, cpu_seconds=31, curves=curves(RUN)
    )
    report = Report(lines=[], bytes={}, records=10, pages=0, loras=1, taught=(taught,))
    page = report.html()
    assert "What lora-abc learnt" in page
    assert len(svg(page).findall("polyline")) == 4
    bare = report.model_copy(update={"taught": (taught.model_copy(update={"curves": curves(())}),)}).html()
    assert "What lora-abc learnt" in bare
    assert "<svg" not in bare
