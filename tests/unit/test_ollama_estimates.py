"""What is planned and inferred for Ollama: `keep_alive` from gaps, reuse from times."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from agentmem.errors import ConfigError
from agentmem.provider import load
from agentmem.testing import FakeClock

estimates = importlib.import_module("agentmem.adapters.providers._ollama_estimates")


def planned(gaps: list[float], told: str = "auto", longest: str = "1h") -> list[str]:
    clock = FakeClock()
    keep = estimates.KeepAlive(told, longest, clock=clock)
    said = [keep.next()]
    for gap in gaps:
        clock.advance(gap)
        said.append(keep.next())
    return said


def test_short_gaps_leave_ollamas_own_five_minutes() -> None:
    assert set(planned([1, 20, 100, 3])) == {"5m"}


def test_long_gaps_are_planned_for_with_a_margin_and_a_limit() -> None:
    assert planned([600]) == ["5m", "20m"]
    assert planned([600], longest="15m") == ["5m", "15m"]
    assert planned([90_000], longest="-1") == ["5m", "3000m"]
    assert planned([90_000], longest="1m") == ["5m", "5m"], "never below Ollama's own"


def test_a_plan_never_gets_shorter() -> None:
    said = [estimates.seconds(one) for one in planned([900, *[1] * 60, 2000, *[1] * 60], longest="2h")]
    assert said == sorted(said)
    assert said[-1] == 1800


def test_one_long_pause_among_many_short_ones_is_no_habit() -> None:
    assert planned([*[10] * 20, 7200])[-1] == "5m"


def test_what_the_user_says_wins() -> None:
    assert set(planned([900, 900], told="30s")) == {"30s"}
    assert set(planned([900, 900], told="-1")) == {"-1"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5m", 300), ("1h30m", 5400), ("90s", 90), ("-1", -1), ("0", 0), ("1.5h", 5400), ("250ms", 0.25), ("-5m", -300)],
)
def test_durations_are_read_as_ollama_writes_them(text: str, expected: float) -> None:
    assert estimates.seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "m5", "5m!", "--5m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    assert estimates.seconds(text) is None
    for name in ("keep_alive", "keep_alive_max"):
        with pytest.raises(ConfigError, match=name):
            load("ollama:m", {name: text})


def test_only_the_time_itself_is_planned() -> None:
    with pytest.raises(ConfigError, match="keep_alive_max"):
        load("ollama:m", {"keep_alive": "auto", "keep_alive_max": "auto"})


@pytest.mark.parametrize(
    ("told", "body"), [("-1", -1), ("300", 300), ("1.5", 1.5), ("0", 0), ("5m", "5m"), ("-1m", "-1m")]
)
def test_a_number_without_a_unit_goes_out_as_a_number(told: str, body: Any) -> None:
    assert estimates.sent(told) == body
    assert type(estimates.sent(told)) is type(body)


def test_another_host_may_hold_a_prompt_as_long_as_the_model_stays() -> None:
    def holds(**settings: Any) -> float | None:
        provider = load("ollama:m", {"base_url": "http://10.0.0.5:1", "context_tokens": 1, **settings})
        return provider.capabilities.holds_prefix_s

    assert holds() == 300
    assert holds(keep_alive="2h") == 7200
    assert holds(keep_alive="auto", keep_alive_max="3h") == 3 * 3600
    assert (holds(keep_alive="-1") or 0) > 86400


SYSTEM = "You are kind. " * 200


def test_reuse_is_what_the_time_says_and_never_more_than_is_shared() -> None:
    reuse = estimates.Reuse()
    assert reuse.estimate(SYSTEM + "one", 1000, 10.0) == 0  # begins like no other: this is the rate
    assert reuse.estimate(SYSTEM + "two", 1000, 1.0) == 900
    assert reuse.estimate(SYSTEM + "three", 1000, 9.99) == 1
    assert reuse.estimate(SYSTEM + "four", 1000, 20.0) == 0
    assert reuse.estimate("Another. " * 100 + SYSTEM, 1000, 0.001) == 0, "nothing that it shares with any"
    half = SYSTEM[: len(SYSTEM) // 2] + "x" * (len(SYSTEM) // 2)
    assert reuse.estimate(half, 1000, 0.001) in range(440, 501)


def test_nothing_is_estimated_before_a_rate_is_known_or_without_a_time() -> None:
    reuse = estimates.Reuse()
    assert reuse.estimate("Hi", 10, 0.1) is None  # too short for a rate
    assert reuse.estimate(SYSTEM, 1000, 0.0) is None
    assert reuse.estimate(SYSTEM, 1000, 0.1) is None  # like the one before, and that gave no rate
    assert reuse.estimate("", 0, 0.1) is None


def test_no_text_of_a_prompt_is_kept() -> None:
    reuse = estimates.Reuse()
    reuse.estimate(SYSTEM, 1000, 1.0)
    assert "kind" not in repr(vars(reuse))
