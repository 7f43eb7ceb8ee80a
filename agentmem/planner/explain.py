"""Why a group of records lives where it does, what each other place would cost, and what would move it.

Says with numbers what `plan` decides by; changes nothing and knows no text.
"""

from __future__ import annotations

import math

from pydantic import Field

from ..value import Value
from . import places
from .places import HYSTERESIS
from .plan import SIGHTINGS
from .rates import rate
from .values import Group, Snapshot, State, Unit, amount

__all__ = ["Verdict", "explain"]

_NAMES: dict[State, str] = {
    "plain": "recalled when it is needed",
    "core": "in the core block, computed for each request",
    "pages": "in the core block, its states kept",
    "prefix": "in a trained prefix",
    "lora": "in a LoRA version",
}


class Verdict(Value):
    """What a group costs in each place and what would move it.

    ``costs`` are what each place that the engine has costs a day in ``unit``, with what bringing it there costs spread
    over ``holds`` days; the place that it lives in now is paid for already. ``uses`` a day are expected, between
    ``low`` and ``high`` in nine of ten cases. ``moves_at``: from how many uses a day on the place costs less than
    recalling the records; None where no number of uses would do.
    """

    key: str
    records: tuple[str, ...]
    now: State
    best: State
    unit: Unit
    costs: dict[State, float]
    uses: float
    low: float
    high: float
    holds: float = Field(description="days until an edit, as far as that can be foreseen")
    moves_at: dict[State, float | None]
    why: str

    def __str__(self) -> str:
        lines = [
            f"{_NAMES[self.now]}; needed {self.uses:.3g} times a day ({self.low:.2g} to {self.high:.2g}); {self.why}"
        ]
        for state, cost in self.costs.items():
            at = self.moves_at.get(state)
            pays = f", less than recalling it from {at:.3g} uses a day on" if at is not None else ""
            lines.append(f"  {_NAMES[state]}: {amount(cost, self.unit)} a day{pays}")
        return "\n".join(lines)


def explain(group: Group, snapshot: Snapshot) -> Verdict:
    """Where a group lives, what each place costs it, which is the best, and what would move it."""
    place, holds = places.place(group), places.days(group)
    uses, running, bringing = places.uses(group, snapshot), places.daily(group, snapshot), places.once(group, snapshot)
    costs: dict[State, float] = {
        state: cost + (0.0 if state in group.where else bringing[state] / holds) for state, cost in running.items()
    }
    allowed: dict[State, float] = {
        state: cost for state, cost in costs.items() if state != "lora" or not _untaught(group)
    }
    cheapest: State = min(allowed, key=lambda state: (allowed[state], places.PLACES.index(state)))
    here = costs.get(place, math.inf)
    # What stays put is what the plan leaves: another place must be cheaper by the hysteresis.
    best: State = cheapest if allowed[cheapest] * HYSTERESIS < here or place not in allowed else place
    recalling = group.tokens * snapshot.costs.prefill
    counted = rate(group.uses, group.days)
    scale = uses / counted.mean
    moves_at: dict[State, float | None] = {}
    for state, cost in costs.items():
        if state != "plain":
            acts = places.answering(group, snapshot) if state == "lora" else 0.0  # grows with the uses
            each = recalling - acts / uses
            moves_at[state] = (cost - acts) / each if each > 0 else None
    return Verdict(
        key=group.key,
        records=group.records,
        now=place,
        best=best,
        unit=snapshot.costs.unit,
        costs=costs,
        uses=uses,
        low=counted.lower * scale,
        high=counted.upper * scale,
        holds=holds,
        moves_at=moves_at,
        why=_why(group, snapshot, place, best),
    )


def _untaught(group: Group) -> bool:
    return not group.teachable or group.sightings < SIGHTINGS


def _why(group: Group, snapshot: Snapshot, place: State, best: State) -> str:
    """In a sentence: what decides."""
    told = "no other place costs less by a fifth" if best == place else f"it would cost less {_NAMES[best]}"
    if snapshot.able.lora and "lora" not in group.where:
        if not group.teachable:
            told += "; no version is taught it: not trusted, not in force, said otherwise, or nothing asks for it"
        elif group.sightings < SIGHTINGS:
            told += f"; no version is taught what was said or needed {group.sightings} times only"
    return told
