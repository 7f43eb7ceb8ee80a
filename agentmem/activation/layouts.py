"""Where a scope's verbatim history begins: the one decision that tells full history, layered and folded prompts apart.

While the beginning stands still the prefix only grows, nothing of the scope is out of sight and nothing needs to be
recalled for it; but every request reads all of it. Moving it costs a rebuild of what stays (nothing where the cache is
cold anyway), and from then on what went out of sight is recalled, uncached, turn by turn. `Layouts` compares the bills
of both for the requests to come, with prices from `CacheRules` and sizes and gaps from the scope's own turns. Knows no
text, no clock and no provider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cache_rules import CacheRules
from .layout_facts import Place, State, read, written
from .turns import Coming, Layout, Turn

__all__ = ["Coming", "Layout", "Layouts", "Turn"]

#: Requests looked ahead at most, how many are believed at first to come before the cache is cold, and the runs of
#: requests that tell better.
MOST_AHEAD, FIRST_AHEAD, RUNS = 50, 9, 16
#: What is recalled for a turn when all earlier turns are out of sight, until turns have shown it: tokens, and how many
#: turns that belief weighs.
RECALL_PRIOR, RECALL_WEIGHT = 250.0, 3.0
#: The part of recalled tokens that will be recalled again in the same history, and the tokens that belief weighs.
REPEAT_PRIOR, REPEAT_WEIGHT = 0.3, 500.0
#: How far above the host's minimum a prefix is planned: counts are estimates, and records can be forgotten.
MARGIN = 0.02
#: After so many requests that found nothing kept of such a prefix, none is planned to be kept until one is.
MOST_UNKEPT, UNREACHED = 2, 1e12
#: By what share more history than needed has to be cheaper to be sent anew: what is to come is foreseen badly.
HESITANCE = 0.1
#: A session is never folded into less than this verbatim.
TAIL_TURNS, TAIL_TOKENS = 5, 2000
#: A session that was used within these seconds is still going on: its turns are not dropped as another's past.
OPEN_S = 600.0
#: Places at which a history may begin: the newest one by one, older ones merged.
MOST_PLACES, SINGLE_PLACES = 64, 24
#: Record ids remembered to learn how often what is recalled comes back.
RECENT = 48
#: Means forget what is older than about so many turns.
MEMORY = 100.0


@dataclass(frozen=True, slots=True)
class _Choice:
    """A beginning with its bills, in uncached input tokens."""

    place: int
    core: int
    life: int
    later: float  # one of the requests to come, once the prefix is cached
    total: float  # all of them until the cache is cold
    count: int


@dataclass(frozen=True, slots=True)
class _Prospect:
    """What the coming requests are expected to be like."""

    read: float  # price of a token of the prefix that is cached
    first: float  # price of one that is computed, with nothing before it
    each: float  # what each token before it adds to that
    least: float  # the fewest tokens of a prefix that the host keeps
    warm: bool  # the last request's prefix can still be read
    lives: tuple[tuple[float, int], ...]  # per lifetime: price of writing, requests before the cache is cold
    growth: float  # tokens that each adds to the history
    recall: float  # tokens recalled for each if all earlier turns were out of sight
    sizes: tuple[int, ...]  # tokens of the history from each place on, and of none
    everything: int  # tokens of all earlier turns

    def computing(self, start: float, end: float) -> float:
        """The price of computing the tokens from one position to another."""
        return (end - start) * (self.first + self.each * (start + end) / 2)

    def unseen(self, place: int) -> float:
        """The part of the earlier turns that a history from this place leaves out of sight."""
        return 1 - self.sizes[place] / self.everything if self.everything else 0.0


class Layouts:
    """The layouts of one scope for one model.

    ``core_tokens`` is the most a core block may have, ``window`` the most a prompt may, ``history_tokens`` the most its
    verbatim history may (None: unlimited). ``state`` is what `state` returned before; a state of another form or with
    other content raises `InvalidInput`. Not locked.
    """

    def __init__(
        self,
        rules: CacheRules,
        *,
        core_tokens: int = 0,
        window: int | None = None,
        history_tokens: int | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._rules = rules
        self._core_tokens = core_tokens
        self._window = window
        self._history_tokens = history_tokens
        self._state = State() if state is None else read(state)
        self._state.life = min(self._state.life, len(rules.lifetimes) - 1)  # the rules may be others now
        missing = len(rules.lifetimes) - len(self._state.run)
        self._state.run += [0] * missing
        self._state.runs += [[] for _ in range(missing)]

    def choose(self, coming: Coming) -> Layout:
        """How to lay the coming request out. Changes nothing; ``start`` and ``core`` don't depend on what is recalled,
        so it may be asked before the search and once more, for ``keep``, after it."""
        choice, _, ahead = self._weigh(coming)
        places = self._state.places
        start = places[choice.place].id if choice.place < len(places) else None
        cold = not ahead.warm or choice.place != self._state.start or start is None
        keep, behind = self._keeps(coming, choice, ahead), ahead.sizes[choice.place]
        kept = coming.system + choice.core + behind >= ahead.least
        return Layout(start, choice.core, keep, choice.life, behind, cold, kept, ahead.lives[choice.life][1])

    def done(self, turn: Turn, layout: Layout, *, held: int | None = None, base: int = 0) -> None:
        """This turn was sent as ``layout`` said, and answered. ``held`` and ``base`` are `Coming`'s held and core."""
        state = self._state
        coming = Coming(turn.at, turn.session, turn.system, turn.message, held=held, core=base)
        choice, carry, ahead = self._weigh(coming)
        start = self._index(layout.start)
        self._note_kept(coming, ahead)
        if turn.session != state.session:
            state.core_most = None
        if turn.core < layout.core:
            state.core_most = turn.core
        state.life = choice.life
        state.carry = carry if start == state.start else 0.0
        self._learn(turn, ahead.unseen(start))
        kept = sum(tokens for _, tokens in turn.recalled) if layout.keep else 0
        state.start = start
        state.places.append(Place(turn.id, turn.session, turn.message + turn.reply + kept, turn.at))
        state.at, state.session, state.core = turn.at, turn.session, turn.core
        self._merge()

    def price(self, rules: CacheRules) -> None:
        """The same cache has other prices now (they are measured): go on with them."""
        if len(rules.lifetimes) == len(self._rules.lifetimes):
            self._rules = rules

    @property
    def empty(self) -> bool:
        """Whether nothing is known of any earlier turn."""
        return not self._state.places

    def recount(self, start: str | None, turns: Sequence[tuple[str, str, int, float]]) -> None:
        """The history from ``start`` on is other than what was told here (another handle or model went on with it):
        ``turns`` are its turns as they are, each with its session, its tokens and its Unix seconds. With None they come
        after all that is known."""
        state = self._state
        first = self._index(start)
        begins = state.places[state.start].id if first < state.start < len(state.places) else None
        state.places[first:] = [Place(*turn) for turn in turns]
        if state.start > first:
            state.start = next((at for at, place in enumerate(state.places) if place.id == begins), first)
        self._merge()

    def state(self) -> dict[str, Any]:
        """What has to be kept until the next turn, as JSON: a few kilobytes however long the scope is."""
        return written(self._state)

    # -- what is known of the scope --------------------------------------------------------------------------------

    def _note_kept(self, coming: Coming, ahead: _Prospect) -> None:
        """Learn whether the last request's prefix was kept at all."""
        state = self._state
        if coming.held is None or not state.places or not self._recent(coming.at):
            return
        prefix = coming.system + state.core + ahead.sizes[state.start] - state.places[-1].tokens
        if coming.held >= self._rules.minimum:
            state.unkept = 0
        elif prefix >= self._rules.minimum * (1 + MARGIN):
            state.unkept += 1

    def _learn(self, turn: Turn, unseen: float) -> None:
        state = self._state
        if state.at is not None:
            for life, lifetime in enumerate(self._rules.lifetimes):
                if turn.at - state.at <= lifetime.seconds:
                    state.run[life] += 1
                else:
                    state.runs[life] = [*state.runs[life], state.run[life]][-RUNS:]
                    state.run[life] = 0
        state.turns = min(state.turns + 1, MEMORY)
        state.message += (turn.message - state.message) / state.turns
        state.growth += (turn.message + turn.reply - state.growth) / state.turns
        tokens = sum(count for _, count in turn.recalled)
        fade = 1 - 1 / MEMORY
        if unseen > 0:
            state.recalled = state.recalled * fade + tokens
            state.out_of_sight = state.out_of_sight * fade + unseen
            state.most_recalled = max(state.most_recalled * fade, float(tokens))
        known = set(state.recent)
        state.seen = state.seen * fade + tokens
        state.repeated = state.repeated * fade + sum(count for id_, count in turn.recalled if id_ in known)
        fresh = [id_ for id_, _ in turn.recalled if id_ not in known]
        if turn.session != state.session:
            state.recent = []
        state.recent = (state.recent + fresh)[-RECENT:]

    def _merge(self) -> None:
        """Fewer places: what lies far before the history's beginning is dropped, old neighbours become one."""
        state = self._state
        places = state.places
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
        state.places[at] = Place(one.id, session, one.tokens + two.tokens, two.last)
        if state.start > at:
            state.start -= 1

    def tokens(self, start: str) -> int:
        """How many tokens a history from this turn on has, as far as is known here."""
        return sum(place.tokens for place in self._state.places[self._index(start) :])

    def _index(self, start: str | None) -> int:
        places = self._state.places
        if start is None:
            return len(places)
        return next((at for at, place in enumerate(places) if place.id == start), self._state.start)

    def _prospect(self, coming: Coming) -> _Prospect:
        """What to expect, by the scope's own turns so far."""
        state, rules, depth = self._state, self._rules, self._rules.depth
        sizes = [0]
        for place in reversed(state.places):
            sizes.append(sizes[-1] + place.tokens)
        sizes.reverse()
        lives = tuple((life.write, 1 + self._ahead(index, coming.at)) for index, life in enumerate(rules.lifetimes))
        return _Prospect(
            read=rules.read if depth is None else depth.read,
            first=1.0 if depth is None else depth.first,
            each=0.0 if depth is None else depth.each,
            least=UNREACHED if state.unkept > MOST_UNKEPT else rules.minimum * (1 + MARGIN),
            warm=self._warm(coming, sizes[state.start]),
            lives=lives,
            growth=max(state.growth or coming.message, 1.0),
            recall=self._recall(),
            sizes=tuple(sizes),
            everything=state.gone + sizes[0],
        )

    def _ahead(self, life: int, at: float) -> int:
        """How many requests will follow the one at ``at`` before a gap that this lifetime doesn't outlast: as many as
        in the earlier runs that came so far (where none did, those that came half as far speak for an end), and as if
        runs ended by chance."""
        state = self._state
        runs, lasts = state.runs[life], state.at is not None and at - state.at <= self._rules.lifetimes[life].seconds
        so_far = state.run[life] + 1 if lasts else 0
        by_chance = min(MOST_AHEAD, (sum(runs) + so_far + FIRST_AHEAD) / (len(runs) + 1))
        longer = [run - so_far for run in runs if run > so_far] or [0 for run in runs if 2 * run > so_far]
        return min(MOST_AHEAD, round((sum(longer) + by_chance) / (len(longer) + 1)))

    def _recall(self) -> float:
        """Tokens recalled for a turn if all earlier turns were out of sight: in proportion to what was out of sight so
        far, but never more than a turn was seen to recall, since a little out of sight may fill the gate."""
        state = self._state
        expected = (state.recalled + RECALL_PRIOR * RECALL_WEIGHT) / (state.out_of_sight + RECALL_WEIGHT)
        return min(expected, max(state.most_recalled, RECALL_PRIOR))

    def _recent(self, at: float) -> bool:
        state = self._state
        return state.at is not None and at - state.at <= self._rules.lifetimes[state.life].seconds

    def _warm(self, coming: Coming, history: int) -> bool:
        """Whether the last request's prefix, with its history or the most of it, can still be read."""
        state = self._state
        if state.at is None:
            return False
        if coming.held is not None and coming.system + state.core + history >= self._rules.minimum:
            return coming.held > coming.system + state.core + 0.5 * (history - state.places[-1].tokens)
        return self._recent(coming.at)

    # -- the decision ----------------------------------------------------------------------------------------------

    def _weigh(self, coming: Coming) -> tuple[_Choice, float, _Prospect]:
        """The beginning to take, and what staying will then have cost beside the best other one.

        Where the cache is cold the history begins anew wherever that costs least. While it is warm a move is a rebuild:
        it is made when staying has cost as much as that, which is at most twice what the best moves in hindsight cost
        (ski rental), and only if the requests to come are expected to gain by it.
        """
        state = self._state
        ahead = self._prospect(coming)
        options = [
            (place, core, life)
            for place in self._allowed(coming, ahead)
            for core in self._cores(coming, place, ahead)
            for life in range(len(ahead.lives))
        ]
        cold = [self._choice(coming, *option, ahead, cold=True) for option in options]
        newest = max(choice.place for choice in cold)
        anew = min(cold, key=lambda choice: (self._each(choice, newest), -choice.place))
        if not ahead.warm:
            staying = [choice for choice in cold if (choice.place, choice.core) == (state.start, state.core)]
            if staying and self._recent(coming.at):
                # Nothing was kept of it, though it is not long ago: a beginning that moves each time never will be.
                stay = min(staying, key=lambda choice: choice.total / choice.count)
                if stay.total / stay.count * (1 - HESITANCE) <= anew.total / anew.count:
                    return stay, 0.0, ahead
            return anew, 0.0, ahead
        # Lifetimes end after different numbers of requests: each request counts less what it costs on the average.
        usual = anew.total / anew.count
        choices = [self._choice(coming, *option, ahead) for option in options]
        best = min(choices, key=lambda choice: (choice.total - usual * choice.count, -choice.place))
        staying = [choice for choice in choices if (choice.place, choice.core) == (state.start, state.core)]
        if not staying:
            return best, 0.0, ahead
        stay = min(staying, key=lambda choice: choice.total - usual * choice.count)
        saved = stay.later - best.later
        carry = max(0.0, state.carry + saved)
        gain = (stay.total - usual * stay.count) - (best.total - usual * best.count)
        least = HESITANCE * stay.total if best.place < stay.place else 0.0
        if gain > least and carry >= saved * best.count - gain:
            return best, 0.0, ahead
        return stay, carry, ahead

    @staticmethod
    def _each(choice: _Choice, newest: int) -> float:
        """The price of a request; what is written beyond need has to pay for sure."""
        return choice.total / choice.count * (1 + HESITANCE * (choice.place < newest))

    def _allowed(self, coming: Coming, ahead: _Prospect) -> list[int]:
        """The places at which the history may begin now. Sessions that are going on stay in it, but for the oldest
        turns of long ones."""
        state = self._state
        places, sizes = state.places, ahead.sizes
        open_ = {place.session for place in places if coming.at - place.last <= OPEN_S} | {coming.session}
        latest = next((at for at, place in enumerate(places) if place.session in open_), len(places))
        room = math.inf if self._history_tokens is None else self._history_tokens
        if self._window is not None:
            room = min(room, self._window - coming.system - coming.message - round(ahead.recall))
        tail, least = len(places), min(TAIL_TOKENS, room / 3)  # in a small window it must not move at every turn
        while tail > latest and (len(places) - tail < TAIL_TURNS or sizes[tail] < least):
            if sizes[tail - 1] > max(room / 2, 0):
                break
            tail -= 1
        allowed = [*range(tail + 1), *([state.start] if state.start > tail else [])]
        if sizes[state.start] <= room:
            return [at for at in allowed if sizes[at] <= room]
        # Once it must move it moves far enough to stay for a while.
        fitting = [at for at in allowed if sizes[at] <= room // 2]
        return fitting or [next(at for at, size in enumerate(sizes) if size <= room or not size)]

    def _cores(self, coming: Coming, place: int, ahead: _Prospect) -> list[int]:
        """The core blocks worth a look: the one that pays by itself (or none), and one that fills the prefix up to the
        host's minimum. It stands still as long as the history does."""
        state, base = self._state, coming.core
        if place == state.start and place < len(state.places) and ahead.warm:
            return [state.core]
        missing = math.ceil(ahead.least - coming.system - ahead.sizes[place])
        most = self._core_tokens if state.core_most is None else min(self._core_tokens, state.core_most)
        return [base, missing] if base < missing <= most else [base]

    def _choice(
        self, coming: Coming, place: int, core: int, life: int, ahead: _Prospect, *, cold: bool = False
    ) -> _Choice:
        state = self._state
        prefix = coming.system + core + ahead.sizes[place]
        # The system part is written again after every long pause, wherever the history begins.
        head = coming.system + core * (core == state.core)
        cached = head if head >= ahead.least else 0
        if not cold and place == state.start < len(state.places) and core == state.core:
            held = prefix - state.places[-1].tokens
            cached = held if held >= ahead.least else cached
        recalled = ahead.recall * ahead.unseen(place)
        tail = ahead.computing(prefix, prefix + recalled)
        later, total = _bills(prefix, cached, ahead, life)
        count = ahead.lives[life][1]
        return _Choice(place, core, life, later + tail, total + tail * count, count)

    def _keeps(self, coming: Coming, choice: _Choice, ahead: _Prospect) -> bool:
        """Whether what was recalled should stay behind its turn: written once and read again, against recalled anew."""
        if not coming.recalled:
            return False
        state = self._state
        write, count = ahead.lives[choice.life]
        tokens = sum(count for _, count in coming.recalled)
        ends = coming.system + choice.core + ahead.sizes[choice.place] + coming.message
        again = (state.repeated + REPEAT_PRIOR * REPEAT_WEIGHT) / (state.seen + REPEAT_WEIGHT)
        stays = float(count - 1)
        # What is kept is read by each request, and attended to by each token that is computed in it.
        read = ahead.read + ahead.each * (ahead.growth + ahead.recall * ahead.unseen(choice.place))
        if read:  # a long session is folded before the cache is cold
            tail = max(TAIL_TOKENS, TAIL_TURNS * ahead.growth)
            stays = min(stays, math.sqrt(2 * write * tail / (read * ahead.growth)))
        if ends + tokens < ahead.least:
            return (
                _bills(ends + tokens, 0, ahead, choice.life)[1]
                < _bills(ends, 0, ahead, choice.life)[1] + again * tokens
            )
        # On an engine of one's own the turn stands behind what was recalled for it: without it, it is computed again.
        lost = 0.0 if self._rules.priced else coming.message / tokens
        return write - 1 + read * stays < (again + lost) * (ahead.first + ahead.each * ends)


def _bills(prefix: float, cached: float, ahead: _Prospect, life: int) -> tuple[float, float]:
    """What the coming requests pay for their prefix: one once it is cached, and all of them together.

    What is cached is read, the rest written; below the host's minimum all is paid in full until the prefix has grown to
    it. What reading the growth costs after that is left out: it is the same for all beginnings, and is what moving the
    beginning later is for.
    """
    read, growth, (write, count) = ahead.read, ahead.growth, ahead.lives[life]
    short = min(count, math.ceil((ahead.least - prefix) / growth)) if prefix < ahead.least else 0
    total = short * ahead.computing(0, prefix + growth * (short - 1) / 2)
    if short == count:
        return total / count, total
    reached, more = prefix + growth * short, write - 1
    later = read * reached + more * growth + ahead.computing(reached, reached + growth)
    cached = 0.0 if short else cached
    first = read * cached + more * (reached - cached) + ahead.computing(cached, reached)
    return later, total + first + later * (count - short - 1)
