"""Where a scope's verbatim history begins: the one decision that tells full history, layered and folded prompts apart.

While the beginning stands still the prefix only grows, nothing of the scope is out of sight and nothing needs to be
recalled for it; but every request reads all of it. Moving it costs a rebuild of what stays (nothing where the cache is
cold anyway), and from then on what went out of sight is recalled, uncached, turn by turn. `Layouts` compares the bills
of both for the requests to come, with prices from `CacheRules` and sizes and gaps from the scope's own turns. Knows no
text, no clock and no provider.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..cache_rules import CacheRules
from ..errors import InvalidInput
from .turns import Coming, Layout, Turn

__all__ = ["Coming", "Layout", "Layouts", "Turn"]

#: Of the state; another one is not read.
FORM = 1
#: Requests looked ahead at most, and what is believed at first of how many come before the cache is cold.
MOST_AHEAD = 50
WARM_PRIOR, COLD_PRIOR = 9.0, 1.0
#: What is recalled for a turn when all earlier turns are out of sight, until turns have shown it: tokens, and how many
#: turns that belief weighs.
RECALL_PRIOR, RECALL_WEIGHT = 250.0, 3.0
#: The part of recalled tokens that will be recalled again in the same history, and the tokens that belief weighs.
REPEAT_PRIOR, REPEAT_WEIGHT = 0.3, 500.0
#: A session is never folded into less than this verbatim.
TAIL_TURNS, TAIL_TOKENS = 5, 2000
#: A session that was used within these seconds is still going on: its turns are not dropped as another's past.
OPEN_S = 600.0
#: Places at which a history may begin: the newest one by one, older ones merged.
MOST_PLACES, SINGLE_PLACES = 64, 24
#: Record ids remembered to learn how often what is recalled comes back.
RECENT = 128
#: Means forget what is older than about so many turns.
MEMORY = 100.0


@dataclass(slots=True)
class _Place:
    """Where a history may begin: a turn, or several of one session merged."""

    id: str
    session: str
    tokens: int
    last: float


@dataclass(slots=True)
class _State:
    at: float | None = None
    session: str = ""
    places: list[_Place] = field(default_factory=list)
    #: Index of the place at which the history begins.
    start: int = 0
    #: Tokens of turns that are older than the first place.
    gone: int = 0
    core: int = 0
    #: What staying has cost beside the best other beginning, since the beginning last moved.
    carry: float = 0.0
    #: Per lifetime: gaps that it outlasted, gaps that it did not.
    gaps: list[list[float]] = field(default_factory=list)
    turns: float = 0.0
    message: float = 0.0
    growth: float = 0.0
    recalled: float = 0.0
    out_of_sight: float = 0.0
    seen: float = 0.0
    repeated: float = 0.0
    recent: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A beginning with its bills, in uncached input tokens."""

    place: int
    core: int
    first: float  # the coming request
    later: float  # one request after it
    total: float  # all requests looked ahead at


@dataclass(frozen=True, slots=True)
class _Prices:
    life: int
    write: float
    read: float
    warm: bool  # the last request's prefix can still be read
    ahead: int  # requests that follow before the cache is cold


class Layouts:
    """The layouts of one scope for one model.

    ``core_tokens`` is the most a core block may have, ``window`` the most a prompt may (None: unlimited). ``state`` is
    what `state` returned before; a state of another form or with other content raises `InvalidInput`. Not locked.
    """

    def __init__(
        self,
        rules: CacheRules,
        *,
        core_tokens: int = 0,
        window: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._rules = rules
        self._core_tokens = core_tokens
        self._window = window
        self._state = _State() if state is None else _read(state)
        while len(self._state.gaps) < len(rules.lifetimes):
            self._state.gaps.append([0.0, 0.0])

    def choose(self, coming: Coming) -> Layout:
        """How to lay the coming request out. Changes nothing; ``start`` and ``core`` don't depend on what is recalled,
        so it may be asked before the search and once more, for ``keep``, after it."""
        choice, _, prices = self._weigh(coming)
        state = self._state
        start = state.places[choice.place].id if choice.place < len(state.places) else None
        return Layout(start, choice.core, self._keeps(coming, choice, prices))

    def done(self, turn: Turn, layout: Layout) -> None:
        """This turn was sent as ``layout`` said, and answered."""
        state = self._state
        coming = Coming(turn.at, turn.session, turn.system, turn.message)
        choice, carry, _ = self._weigh(coming)
        start = self._index(layout.start)
        moved = start != state.start and bool(state.places)
        state.carry = 0.0 if moved or start != choice.place else carry
        self._learn(turn, self._unseen(start))
        kept = sum(tokens for _, tokens in turn.recalled) if layout.keep else 0
        state.start = start
        state.places.append(_Place(turn.id, turn.session, turn.message + turn.reply + kept, turn.at))
        state.at, state.session, state.core = turn.at, turn.session, turn.core
        self._merge(turn)

    def state(self) -> dict[str, Any]:
        """What has to be kept until the next turn, as JSON: a few kilobytes however long the scope is."""
        state = self._state
        return {
            "form": FORM,
            "places": [[place.id, place.session, place.tokens, place.last] for place in state.places],
            **{name: getattr(state, name) for name in _PLAIN},
        }

    # -- what is known of the scope --------------------------------------------------------------------------------

    def _learn(self, turn: Turn, unseen: float) -> None:
        state = self._state
        if state.at is not None:
            gap = max(0.0, turn.at - state.at)
            for counts, life in zip(state.gaps, self._rules.lifetimes, strict=True):
                counts[0 if gap <= life.seconds else 1] += 1
        state.turns = min(state.turns + 1, MEMORY)
        state.message += (turn.message - state.message) / state.turns
        state.growth += (turn.message + turn.reply - state.growth) / state.turns
        tokens = sum(count for _, count in turn.recalled)
        fade = 1 - 1 / MEMORY
        if unseen > 0:
            state.recalled = state.recalled * fade + tokens
            state.out_of_sight = state.out_of_sight * fade + unseen
        known = set(state.recent)
        state.seen = state.seen * fade + tokens
        state.repeated = state.repeated * fade + sum(count for id_, count in turn.recalled if id_ in known)
        fresh = [id_ for id_, _ in turn.recalled if id_ not in known]
        if turn.session != state.session:
            state.recent = []
        state.recent = (state.recent + fresh)[-RECENT:]

    def _merge(self, turn: Turn) -> None:
        """Fewer places: a session that is over becomes one, what lies far before the history's beginning is dropped."""
        state = self._state
        places = state.places
        at = 0
        while at + 1 < len(places):
            one, two = places[at], places[at + 1]
            over = one.session == two.session != turn.session and turn.at - two.last > OPEN_S
            if over and at + 1 != state.start:
                self._join(at)
            else:
                at += 1
        before = sum(place.tokens for place in places[: state.start])
        while state.start and before - places[0].tokens >= 2 * self._rules.minimum:
            before -= places[0].tokens
            state.gone += places.pop(0).tokens
            state.start -= 1
        while len(places) > MOST_PLACES:
            old = [at for at in range(len(places) - SINGLE_PLACES) if at + 1 != state.start]
            self._join(min(old, key=lambda at: places[at].tokens + places[at + 1].tokens))

    def _join(self, at: int) -> None:
        state = self._state
        one, two = state.places[at], state.places.pop(at + 1)
        session = two.session  # an old place of two sessions counts as the newer one's
        state.places[at] = _Place(one.id, session, one.tokens + two.tokens, two.last)
        if state.start > at:
            state.start -= 1

    def _index(self, start: str | None) -> int:
        places = self._state.places
        if start is None:
            return len(places)
        return next((at for at, place in enumerate(places) if place.id == start), self._state.start)

    def _unseen(self, start: int) -> float:
        """The part of the scope's earlier turns that a history from this place leaves out of sight."""
        state = self._state
        out = state.gone + sum(place.tokens for place in state.places[:start])
        everything = state.gone + sum(place.tokens for place in state.places)
        return out / everything if everything else 0.0

    def _recall(self) -> float:
        """Tokens recalled for a turn if all earlier turns were out of sight."""
        state = self._state
        return (state.recalled + RECALL_PRIOR * RECALL_WEIGHT) / (state.out_of_sight + RECALL_WEIGHT)

    def _prices(self, coming: Coming) -> _Prices:
        """The lifetime whose prices are least for this history, by the gaps that were seen, or no caching."""
        state, rules = self._state, self._rules
        gap = None if state.at is None else max(0.0, coming.at - state.at)
        held = coming.system + sum(place.tokens for place in state.places[state.start :])
        growth = state.growth or coming.message
        best: tuple[float, _Prices] | None = None
        for life, (lifetime, (stayed, lost)) in enumerate(zip(rules.lifetimes, state.gaps, strict=True)):
            warm = (stayed + WARM_PRIOR) / (stayed + lost + WARM_PRIOR + COLD_PRIOR)
            price = held * (warm * rules.read + (1 - warm) * lifetime.write) + growth * lifetime.write
            ahead = min(MOST_AHEAD, round(warm / (1 - warm)))
            there = gap is not None and gap <= lifetime.seconds
            if best is None or price < best[0]:
                best = price, _Prices(life, lifetime.write, rules.read, there, ahead)
        assert best is not None
        return best[1]

    # -- the decision ----------------------------------------------------------------------------------------------

    def _weigh(self, coming: Coming) -> tuple[_Choice, float, _Prices]:
        """The beginning to take, and what staying will then have cost beside the best other one."""
        state = self._state
        prices = self._prices(coming)
        allowed = self._allowed(coming)
        choices = [
            self._choice(coming, place, prices, core) for place in allowed for core in self._cores(coming, place)
        ]
        best = min(choices, key=lambda choice: (choice.total, -choice.place))
        stay = next((choice for choice in choices if choice.place == state.start and choice.core == state.core), None)
        if stay is None or not prices.warm:
            return best, 0.0, prices
        carry = max(0.0, state.carry + stay.later - best.later)
        if best.total < stay.total and carry >= best.first - stay.first:
            return best, 0.0, prices
        return stay, carry, prices

    def _allowed(self, coming: Coming) -> list[int]:
        """The places at which the history may begin now; what is going on stays in it, but for a long session's
        oldest turns."""
        state = self._state
        places = state.places
        open_ = {place.session for place in places if coming.at - place.last <= OPEN_S} | {coming.session}
        latest = next((at for at, place in enumerate(places) if place.session in open_), len(places))
        allowed = [at for at in range(latest) if at == 0 or places[at].session != places[at - 1].session] + [latest]
        tail, tokens = len(places), 0
        while tail > latest and (len(places) - tail < TAIL_TURNS or tokens < TAIL_TOKENS):
            tail -= 1
            tokens += places[tail].tokens
        if tail not in allowed:
            allowed.append(tail)
        if state.start not in allowed and state.start <= tail:
            allowed.append(state.start)
        allowed.sort()
        if self._window is None:
            return allowed
        room = self._window - coming.system - coming.message - round(self._recall())
        sizes = {at: sum(place.tokens for place in places[at:]) for at in allowed}
        if sizes.get(state.start, room + 1) <= room:
            return [at for at in allowed if sizes[at] <= room]
        # Once it must move it moves far enough to stay for a while.
        return [at for at in allowed if sizes[at] <= room // 2] or [self._shortest(room)]

    def _shortest(self, room: int) -> int:
        places = self._state.places
        at = len(places)
        while at and places[at - 1].tokens <= room:
            at -= 1
            room -= places[at].tokens
        return at

    def _cores(self, coming: Coming, place: int) -> list[int]:
        """The core blocks worth a look: none, and one that fills the prefix up to the host's minimum. A session's core
        stands still."""
        state = self._state
        history = sum(p.tokens for p in state.places[place:])
        if place == state.start and state.session == coming.session and place < len(state.places):
            return [state.core]
        missing = self._rules.minimum - coming.system - history
        return [0, missing] if 0 < missing <= self._core_tokens else [0]

    def _choice(self, coming: Coming, place: int, prices: _Prices, core: int) -> _Choice:
        state, least = self._state, self._rules.minimum
        history = sum(p.tokens for p in state.places[place:])
        prefix = coming.system + core + history
        cached = 0
        if prices.warm:
            head = coming.system + core * (core == state.core)
            cached = head if head >= least else 0
            if place == state.start and core == state.core and state.places:
                held = prefix - state.places[-1].tokens * (place < len(state.places))
                cached = held if held >= least else cached
        tail = self._recall() * self._unseen(place)
        growth = state.growth or coming.message
        bills = _bills(prefix, cached, growth, prices, least, prices.ahead + 1)
        later = bills[1] if len(bills) > 1 else bills[0]
        return _Choice(place, core, bills[0] + tail, later + tail, sum(bills) + tail * len(bills))

    def _keeps(self, coming: Coming, choice: _Choice, prices: _Prices) -> bool:
        """Whether what was recalled should stay before its turn: written once and read again, against recalled anew."""
        if not coming.recalled:
            return False
        state = self._state
        tokens = sum(count for _, count in coming.recalled)
        prefix = coming.system + choice.core + sum(p.tokens for p in state.places[choice.place :])
        growth = state.growth or coming.message
        again = (state.repeated + REPEAT_PRIOR * REPEAT_WEIGHT) / (state.seen + REPEAT_WEIGHT)
        least, count = self._rules.minimum, prices.ahead + 1
        message = coming.message
        reply = max(0.0, growth - message)
        dropped = (
            tokens
            + message
            + sum(_bills(prefix + message + reply, prefix, growth, prices, least, count))
            + again * tokens
        )
        ends = prefix + tokens + message
        first = prices.write * (tokens + message) if ends >= least else tokens + message
        kept = first + sum(_bills(ends + reply, ends if ends >= least else 0, growth, prices, least, count))
        return kept < dropped


def _bills(prefix: float, cached: float, growth: float, prices: _Prices, least: int, count: int) -> list[float]:
    """What ``count`` requests pay for a prefix that grows: read what is cached, write the rest, nothing below the
    host's minimum."""
    bills = []
    for _ in range(count):
        if prefix >= least:
            bills.append(prices.read * cached + prices.write * (prefix - cached))
            cached = prefix
        else:
            bills.append(prefix)
        prefix += growth
    return bills


#: The fields of a state that are JSON as they are.
_PLAIN = (
    "at", "session", "start", "gone", "core", "carry", "gaps", "turns", "message", "growth", "recalled", "out_of_sight",
    "seen", "repeated", "recent",
)  # fmt: skip


def _read(state: Mapping[str, Any]) -> _State:
    if state.get("form") != FORM:
        raise InvalidInput(f"the layout's state has form {state.get('form')!r}; this version reads {FORM}: drop it")
    try:
        found = _State(
            places=[_Place(str(a), str(b), int(c), float(d)) for a, b, c, d in state["places"]],
            **{name: state[name] for name in _PLAIN},
        )
        found.gaps = [[float(a), float(b)] for a, b in found.gaps]
        found.recent = [str(id_) for id_ in found.recent]
        if not 0 <= found.start <= len(found.places):
            raise ValueError(f"start {found.start} of {len(found.places)} places")
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"the layout's state can't be read ({error!r}): drop it, a new one costs a rebuild"
        ) from error
    return found
