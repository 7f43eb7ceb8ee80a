"""How a report looks: a table and a few sentences as text, JSON, and a page that needs nothing from elsewhere."""

from __future__ import annotations

import datetime as dt
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import StoreError
from agentmem.ledger.budgets import Budget
from agentmem.ledger.report import Comparison, Kind, Line, Miss, Prefix, Report, Share
from agentmem.planner.values import Move, Outcome
from agentmem.types import Scope

NASTY = "<script>alert('x')</script>&\"quoted\""


def line(model: str = "anthropic:claude-sonnet-5-5", *, spent: float | None = 0.05, saved: float | None = 0.02) -> Line:
    return Line(
        verb="chat",
        model=model,
        uses=3,
        input_tokens=1000,
        cached_tokens=900,
        written_tokens=50,
        output_tokens=10,
        seconds=1.5,
        first_token_s=0.25,
        missed=1,
        money=spent,
        saved_money=saved,
    )


def share(name: str, *, spent: float | None = 0.05, saved: float | None = 0.02) -> Share:
    return Share(
        name=name,
        uses=3,
        input_tokens=1000,
        cached_tokens=900,
        written_tokens=50,
        output_tokens=10,
        seconds=1.5,
        money=spent,
        saved_money=saved,
    )


@pytest.fixture
def report() -> Report:
    prefix = Prefix(
        where="m", name=NASTY, tokens=100, read_tokens=9, unit="tokens", cost=25.0, gained=8.0, reads_needed=0.3
    )
    return Report(
        lines=[line(), line(NASTY, spent=None, saved=None)],
        bytes={"records": 2048},
        records=1,
        pages=0,
        loras=0,
        since=dt.datetime(2026, 11, 1, tzinfo=dt.UTC),
        providers=(share("anthropic"), share(NASTY, spent=None, saved=None)),
        scopes=(share(NASTY, saved=-0.01),),
        days=tuple(share(f"2026-11-{day:02}", saved=0.01 * (day % 3 - 1)) for day in range(1, 31)),
        kinds=(
            Kind(name="plaintext", uses=1, tokens=5, seconds=0.0),
            Kind(name="activation", uses=1, tokens=5, seconds=0),
        ),
        compared=tuple(
            Comparison(policy=policy, requests=40, money=money, spent=0.05)
            for policy, money in (("no memory", 0.03), ("full history", 0.5), (NASTY, 0.2))
        ),
        prefixes=(prefix,),
        misses=(Miss(reason=NASTY, uses=4, tokens=1600), Miss(reason="input_changed", uses=1, tokens=0)),
        budgets=(Budget(scope=Scope(user=NASTY), per="day", dollars=1.0, action="stop", spent=0.25),),
    )


def test_text_is_the_table_and_a_summary(report: Report) -> None:
    text = str(report)
    assert "anthropic:claude-sonnet-5-5" in text
    assert "2.0 KiB" in text
    summary = report.summary()
    assert len(summary) == 5
    assert all(sentence.split(NASTY)[0][:40] in text for sentence in summary)
    assert "spent 0.0500 $, saved 0.0200 $" in text
    assert "with full history 0.5000 $" in text
    assert "5 expected cache hits did not come, 4 of them" in text
    assert report.cached_share == 0.9


def test_seconds_that_were_spared_are_told(report: Report) -> None:
    local = line("local:small", spent=None, saved=None).model_copy(update={"saved_seconds": 12.34})
    for lines in ([local], [local, line()]):
        told = report.model_copy(update={"lines": lines})
        assert "spared this machine 12.3 s" in str(told)
        assert len(told.summary()) <= 5


def test_what_consolidation_is_at_and_did_is_told(report: Report) -> None:
    def outcome(state: Any, kind: Any = "learn", saved: float | None = None) -> Outcome:
        move = Move(key=f"{state}{kind}", kind=kind, scope=Scope(user=NASTY), cost=2.0, saves=1.0)
        return Outcome(move=move, state=state, at=1_795_000_000.0, saved=saved, requests=3 if saved else 0)

    moved = report.model_copy(
        update={"moves": (outcome("running"), outcome("done", "collapse", 1.5), outcome("failed")), "paused": True}
    )
    told = moved.summary()[-1]
    assert told.startswith("consolidation is paused: learn of user=")
    assert told.endswith(" since 11:06:40 UTC, 1 made, 1 failed")
    assert "What consolidation moved" in moved.html()
    assert NASTY not in moved.html()
    assert report.model_copy(update={"paused": True}).summary()[-1] == "consolidation is paused: no moves"


def test_an_empty_report_is_only_its_table() -> None:
    empty = Report(lines=[], bytes={}, records=0, pages=0, loras=0)
    assert empty.summary() == []
    assert (empty.money, empty.saved_money, empty.cached_share) == (None, None, 0.0)
    assert "0 records" in str(empty)
    assert "<h1>" in empty.html()


def test_brackets_in_names_are_no_markup(report: Report) -> None:
    odd = report.model_copy(update={"lines": [line("local:[red]x[/nonsense]")]})
    assert "local:[red]x[/nonsense]" in str(odd)


def test_json_gives_the_report_back(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report


class _Page(HTMLParser):
    """What a page is made of, and whether its elements close in order."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_is_whole_and_loads_nothing(report: Report) -> None:
    text = report.html()
    page = read(text)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not re.search(r"https?:|//|@import|url\(", text)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert "prefers-color-scheme: dark" in text


def test_names_are_shown_and_never_markup(report: Report) -> None:
    text = report.html()
    page = read(text)
    assert "<script" not in text
    assert page.text.count(NASTY) >= 5
    nasty = report.model_copy(update={"lines": [line('x" onload="boom')], "providers": (share('x" onload="boom'),)})
    assert not [name for name, _ in read(nasty.html()).attributes if name == "onload"]


def test_every_plot_names_itself_and_stands_above_its_table(report: Report) -> None:
    text = report.html()
    figures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    plots = [figure for figure in figures if "<svg" in figure]
    assert len(plots) == 6
    for figure in figures:
        assert figure.index("<table") > figure.find("</svg>")
        assert '<th scope="col">' in figure
        assert "<figcaption>" in figure
    assert all('role="img" aria-label="' in plot for plot in plots)


def test_bars_are_as_long_as_their_values(report: Report) -> None:
    [figure] = re.findall(r"<figure><figcaption>The newest.*?</figure>", report.html(), re.DOTALL)
    widths = [float(width) for width in re.findall(r'<rect class="first" x="[^"]*" y="[^"]*" width="([\d.]+)"', figure)]
    spent, without, full, other = widths[1:]  # the first is the legend's
    assert full / spent == pytest.approx(10.0, rel=0.01)
    assert without / spent == pytest.approx(0.6, rel=0.02)
    assert other / spent == pytest.approx(4.0, rel=0.01)


def test_bars_of_losses_point_the_other_way(report: Report) -> None:
    [figure] = re.findall(r"<figure><figcaption>By scope.*?</figure>", report.html(), re.DOTALL)
    [_, (gain, _), (loss, width)] = [
        (float(x), float(width))
        for x, width in re.findall(r'<rect class="\w+" x="([\d.]+)" y="\d+" width="([\d.]+)"', figure)
    ][-3:]
    assert loss + width == pytest.approx(gain, abs=0.2)


def test_the_page_is_written_where_asked(report: Report, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    assert report.html(target) == target.read_text(encoding="utf-8")
    with pytest.raises(StoreError, match="nowhere"):
        report.html(tmp_path / "nowhere" / "report.html")


def test_a_notebook_shows_it_without_a_document_around(report: Report) -> None:
    shown = report._repr_html_()
    assert shown.startswith('<div class="agentmem">')
    assert "<html" not in shown
