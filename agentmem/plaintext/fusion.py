"""What signals are worth: a linear sum whose weights depend on the query, and the probability that it stands for.

The numbers were fitted by tests/benchmarks/fit_retrieval.py and lie in fusion.json beside this file. Knows signals by
their names only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .signals import PLAIN, Signals

if TYPE_CHECKING:
    import numpy.typing as npt

    Numbers = npt.NDArray[np.float32]

__all__ = ["TOGETHER", "Fused", "Fusion", "build", "load", "log_sum", "matrix", "query_numbers", "taken"]

#: Signals and numbers of the query are cut at so many standard deviations: outliers must not decide alone.
FARTHEST, FARTHEST_QUERY = 8.0, 3.0
#: How many records of a pool the usual spread of a signal counts as.
USUAL = 20
#: Records that are asked together whether a turn needs any.
TOGETHER = 10
#: The parts of a score that a hit tells of, by the first word of a signal's name.
PARTS = {
    **dict.fromkeys(["turn", "window", "session", "answer_share", "rarest"], "words"),
    **dict.fromkeys(["cosine"], "meaning"),
    **dict.fromkeys(["tokens"], "tokens"),
    **dict.fromkeys(["speaker", "assistant"], "speaker"),
    **dict.fromkeys(["year", "month", "day", "when"], "time"),
    **dict.fromkeys(["question", "answer", "length"], "form"),
}


@dataclass(frozen=True, eq=False)
class Fused:
    """The records of a pool with what they are worth. ``score`` float32 [p]: differences of it are what ranks them."""

    score: Numbers
    #: Float64 [p], 0 to 1: how likely each is evidence for the query. In the order of ``score``.
    probability: npt.NDArray[np.float64]
    _parts: Numbers
    _groups: tuple[tuple[str, ...], Numbers]
    _slope: float
    _constant: float

    def why(self, rows: Sequence[int]) -> list[dict[str, float]]:
        """Of each row the parts of its probability's log-odds, by name; ``query`` is the same for all records."""
        names, members = self._groups
        values = (members @ self._parts[:, rows] * np.float32(self._slope)).T.tolist()
        return [{**dict(zip(names, row, strict=True)), "query": self._constant} for row in values]


@dataclass(frozen=True, eq=False)
class Fusion:
    """One kind's numbers. The weight of a signal is ``weights + by_query @ (what the query is like)``."""

    signals: tuple[str, ...]
    gates: tuple[str, ...]
    #: What each signal's variance in a pool usually is.
    spread: Numbers
    centre: Numbers
    scale: Numbers
    weights: Numbers
    by_query: Numbers
    #: Log-odds: a slope on the score, one on its share of the pool, and the query's numbers with their own scaling.
    slope: float
    share: float
    constant: float
    told_by: tuple[str, ...]
    told_centre: Numbers
    told_scale: Numbers
    told: Numbers

    @cached_property
    def _groups(self) -> tuple[tuple[str, ...], Numbers]:
        """The names of the parts, and float32 [parts, signals]: 1 where a signal belongs to a part."""
        owners = [PARTS[name if name in PARTS else name.split("_")[0]] for name in self.signals]
        names = tuple(dict.fromkeys(owners))
        return names, np.array([[owner == name for owner in owners] for name in names], np.float32)

    def fuse(self, signals: Signals) -> Fused:
        """Weigh a pool's signals."""
        values = matrix(signals, self.signals, self.spread)
        gates = query_numbers(signals.query, self.gates, self.centre, self.scale)
        parts = np.asarray(values * (self.weights + self.by_query @ gates)[:, None], np.float32)
        score = parts.sum(axis=0)
        told = query_numbers(signals.query, self.told_by, self.told_centre, self.told_scale)
        constant = self.constant + float(self.told @ told) - self.share * log_sum(score)
        slope = self.slope + self.share
        odds = np.clip(slope * score.astype(np.float64) + constant, -60, 60)
        return Fused(score, 1 / (1 + np.exp(-odds)), parts, self._groups, slope, constant)


def matrix(signals: Signals, names: Sequence[str], spread: Numbers) -> Numbers:
    """These signals as float32 [signals, p], comparable: in deviations from the pool's mean but for `PLAIN`.

    ``spread`` is what a signal's variance usually is: it counts as `USUAL` records, so that in a pool of few a small
    difference is not taken for a large one.
    """
    values = np.stack([signals.rows[name] for name in names])
    loose = np.array([name not in PLAIN for name in names])
    count = values.shape[1]
    if count and loose.any():
        apart = values[loose]
        apart -= apart.mean(axis=1, keepdims=True)
        variance = (np.square(apart).sum(axis=1) + USUAL * spread[loose]) / (count + USUAL)
        apart /= np.sqrt(variance)[:, None] + np.float32(1e-6)
        values[loose] = np.clip(apart, -FARTHEST, FARTHEST)
    return np.asarray(values, np.float32)


def query_numbers(query: Mapping[str, float], names: Sequence[str], centre: Numbers, scale: Numbers) -> Numbers:
    """What the query is like, float32 [names], in deviations from the queries that this was fitted on."""
    values = np.array([query.get(name, 0.0) for name in names], np.float32)
    return np.asarray(np.clip((values - centre) / scale, -FARTHEST_QUERY, FARTHEST_QUERY), np.float32)


def log_sum(score: Numbers) -> float:
    """The logarithm of the sum of exp(score): a score less this is the logarithm of its share of the pool."""
    most = float(score.max(initial=0.0))
    return most + math.log(float(np.exp(score - most).sum()) + 1e-12)


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("fusion.json").read_text(encoding="utf-8"))
    return found


@cache
def load(kind: str) -> Fusion:
    """The fitted numbers for one of `signals.KINDS`."""
    return build(_file()["kinds"][kind])


def build(numbers: Mapping[str, Any]) -> Fusion:
    """A fusion of numbers as fusion.json holds them."""
    values: dict[str, Any] = {}
    for name, value in numbers.items():
        if isinstance(value, (int, float)):
            values[name] = float(value)
        elif name in ("signals", "gates", "told_by"):
            values[name] = tuple(value)
        else:
            values[name] = np.array(value, np.float32)
    values["by_query"] = values["by_query"].reshape(len(values["signals"]), len(values["gates"]))
    return Fusion(**values)


def taken(probabilities: Sequence[float], *, asking: bool, rule: Mapping[str, float] | None = None) -> int:
    """How many of the best records a prompt should take, of their probabilities in descending order.

    None where the best `TOGETHER` of them aren't expected to hold as much evidence as their tokens are worth (small
    talk; less is enough for a turn that surely asks); else those that are likely enough, by themselves and beside the
    best one. ``rule`` says what is enough, by default the one of fusion.json.
    """
    wanted: Mapping[str, float] = rule or _file()["taken"]
    if not probabilities or sum(probabilities[:TOGETHER]) < wanted["asking" if asking else "evidence"]:
        return 0
    least = max(wanted["least"], wanted["beside_best"] * probabilities[0])
    return sum(probability >= least for probability in probabilities)
