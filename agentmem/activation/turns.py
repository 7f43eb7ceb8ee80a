"""What one request of a conversation was made of, in tokens, and how the next one is to be laid out.

Values only: `layouts` decides, `replays` bills.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Value

__all__ = ["Coming", "Layout", "Turn"]


class Turn(Value):
    """A request that was sent and answered. All sizes are tokens, with what the chat format adds to each message.

    ``id`` is the turn's own, ``at`` Unix seconds. ``system`` counts tools and everything else that never changes;
    ``core`` is the core block that was sent, ``reply`` what the answer adds to the history. ``recalled``: the records
    that the search gave for this turn beside what the history and the core hold, as (record id, tokens); ``used``:
    those that it gave and that stood in the core, or that a LoRA version which acted had learnt. ``start`` is the id of
    the first turn that it showed as history; None: none was shown.
    """

    id: str
    at: float
    session: str
    system: int
    core: int
    message: int
    reply: int
    recalled: tuple[tuple[str, int], ...] = ()
    used: tuple[str, ...] = ()
    start: str | None = None


@dataclass(frozen=True, slots=True)
class Coming:
    """A request that is about to be laid out. ``recalled`` is None while the search has not been made.

    ``held``: how many tokens of the last request's prefix the host still holds, as `MarkPlanner.held` knows it; None
    where it doesn't, and the time that passed has to tell. ``core``: tokens of the core block that stands at the head
    because it pays by itself.
    """

    at: float
    session: str
    system: int
    message: int
    recalled: tuple[tuple[str, int], ...] | None = None
    held: int | None = None
    core: int = 0


@dataclass(frozen=True, slots=True)
class Layout:
    """How to lay a request out.

    ``start``: the id of the turn at which the verbatim history begins (None: nothing of earlier turns). ``core``: how
    many tokens of core block are wanted, 0 for none. ``keep``: what was recalled for this turn stays in the history,
    behind the turn's message. ``longest``: index of the longest of the host's lifetimes that the history is worth
    (`marks.Level.longest`); after longer pauses it would begin anew. ``behind``: tokens of the history, which stands
    behind the core. ``cold``: they are not cached behind the core as it was, so that another core costs nothing more.
    ``kept``: the prompt's beginning is long enough to be kept. ``ahead``: requests expected before the cache is cold.
    """

    start: str | None
    core: int = 0
    keep: bool = False
    longest: int | None = None
    behind: int = 0
    cold: bool = True
    kept: bool = True
    ahead: int = 1
