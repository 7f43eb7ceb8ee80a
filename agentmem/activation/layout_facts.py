"""What of a scope's layouts outlives the process: the places where a history may begin, and what its turns taught.

Knows its form as JSON, and refuses another one. What follows from it is decided in layouts.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidInput

__all__ = ["Place", "State", "read", "written"]

#: Of the state; another one is not read.
FORM = 1
#: The fields of a state that are JSON as they are.
_PLAIN = (
    "at", "session", "start", "gone", "core", "core_most", "unkept", "life", "carry", "run", "runs", "turns", "message",
    "growth", "recalled", "out_of_sight", "most_recalled", "seen", "repeated", "recent",
)  # fmt: skip


@dataclass(slots=True)
class Place:
    """Where a history may begin: a turn, or several of one session merged."""

    id: str
    session: str
    tokens: int
    last: float


@dataclass(slots=True)
class State:
    """What `Layouts` knows of its scope. Moments are seconds since 1970; means of the turns are in tokens."""

    at: float | None = None
    session: str = ""
    places: list[Place] = field(default_factory=list)
    #: Index of the place at which the history begins.
    start: int = 0
    #: Tokens of turns that are older than the first place.
    gone: int = 0
    core: int = 0
    #: Tokens of a core block that there were when more was wanted; None where none was missing in this session.
    core_most: int | None = None
    #: Requests in a row that found nothing kept of a prefix that should have been.
    unkept: int = 0
    #: Index of the lifetime that the last prefix was believed to be written with.
    life: int = 0
    #: What staying has cost beside the best other beginning, since the beginning last moved.
    carry: float = 0.0
    #: Per lifetime: how many requests followed without a longer gap, now and in the last runs that ended.
    run: list[int] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)
    turns: float = 0.0
    message: float = 0.0
    growth: float = 0.0
    recalled: float = 0.0
    out_of_sight: float = 0.0
    most_recalled: float = 0.0
    seen: float = 0.0
    repeated: float = 0.0
    recent: list[str] = field(default_factory=list)


def written(state: State) -> dict[str, Any]:
    """The state as JSON; places of one session say so once."""
    before = [None, *(place.session for place in state.places)]
    return {
        "form": FORM,
        "places": [
            [place.id, None if place.session == last else place.session, place.tokens, place.last]
            for place, last in zip(state.places, before, strict=False)
        ],
        **{name: getattr(state, name) for name in _PLAIN},
    }


def _places(stored: Sequence[Sequence[Any]]) -> list[Place]:
    places: list[Place] = []
    for id_, session, tokens, last in stored:
        same = places[-1].session if session is None else str(session)
        places.append(Place(str(id_), same, int(tokens), float(last)))
    return places


def read(state: Mapping[str, Any]) -> State:
    """What `written` gave; `InvalidInput` for anything else."""
    if state.get("form") != FORM:
        raise InvalidInput(f"the layout's state has form {state.get('form')!r}; this version reads {FORM}: drop it")
    try:
        found = State(
            places=_places(state["places"]),
            **{name: state[name] for name in _PLAIN},
        )
        found.run = [int(count) for count in found.run]
        found.runs = [[int(count) for count in counts] for counts in found.runs]
        if len(found.run) != len(found.runs):
            raise ValueError(f"{len(found.run)} runs and the past of {len(found.runs)}")
        found.recent = [str(id_) for id_ in found.recent]
        if not 0 <= found.start <= len(found.places):
            raise ValueError(f"start {found.start} of {len(found.places)} places")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"the layout's state can't be read ({error!r}): drop it, a new one costs a rebuild"
        ) from error
    return found
