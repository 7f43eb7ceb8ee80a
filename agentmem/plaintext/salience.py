"""Which records are worth standing at the head of every prompt of a scope, and how many of them pay for their place.

Pure: knows records, how often turns needed them and what a token costs; asks no store, no model and no clock.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..types import Record

__all__ = ["Candidate", "Chosen", "Seen", "allowed", "chances", "choose", "needs", "promise", "ranked", "salience"]

# A rough prior for English, chosen by hand and not measured; elsewhere only uses count. Being recalled outweighs it.
_FIRST_PERSON = re.compile(r"\b(i|i'm|i've|i'd|my|me|mine|we|our|us)\b", re.IGNORECASE)
_STANDING = re.compile(
    r"\b(am|i'm|is|are|live|work|study|love|like|prefer|hate|favou?rite|always|never|every|allergic|name|called|born|"
    r"married|daughter|son|wife|husband|kids|dog|cat|job|from|have|own|want|plan|hope|goal)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

#: The source of a chat's own turns.
CHAT = "chat"
#: Marks of a standing statement that count, and what each of them is worth.
MOST_MARKS, MARK = 3, 0.5
#: Fewer words say nothing by themselves.
LEAST_WORDS = 3
#: What a question keeps of its salience; words of a text above which its marks are diluted.
ASKED, LONG_WORDS = 0.25, 40
#: The salience of what a model wrote of what was said, by its kind; it is standing by what it is.
WRITTEN = {"fact": 2.0, "preference": 2.5, "summary": 1.0, "gist": 1.0}
#: The chance that a turn needs a record before any turn was seen, for each unit of salience, and at most.
USE_PRIOR, MOST_PRIOR = 0.04, 0.12
#: Turns that this prior weighs as much as.
PRIOR_TURNS = 12.0
#: What a turn counts once another came after it: about the last fifty decide.
FADING = 0.98
#: Of two texts that share so much of their words (Jaccard) the second says nothing new.
SAME = 0.8
#: The likeliest records that are compared with each other.
POOL = 160
#: Shared words below this part are chance.
ALIKE = 0.25


def salience(record: Record) -> float:
    """How likely a record is to matter in most conversations of its scope, by its words alone: what a model wrote of a
    person, standing statements of people about themselves; questions and pleasantries last. 0 for what never may stand
    in a core: untrusted text, a tool's or a model's words."""
    if not allowed(record):
        return 0.0
    kind = record.metadata.get("kind")
    if record.role == "system" and isinstance(kind, str) and kind in WRITTEN:
        return WRITTEN[kind]
    return _of_words(record.text)


@functools.lru_cache(maxsize=4096)
def _of_words(text: str) -> float:
    words = len(text.split())
    if words < LEAST_WORDS:
        return 0.0
    marks = (len(found.findall(text)) for found in (_FIRST_PERSON, _STANDING))
    score = sum(MARK * min(count, MOST_MARKS) for count in marks)
    if text.rstrip().endswith("?"):
        score *= ASKED
    return score * min(1.0, LONG_WORDS / words)


def promise(record: Record) -> float:
    """The chance that a turn needs a record, by its words alone."""
    return min(MOST_PRIOR, USE_PRIOR * salience(record))


@dataclass(frozen=True, slots=True)
class Seen:
    """A turn of the past: when (Unix seconds), the records that its search named, in the core or beside it, and the id
    of the turn at which its verbatim history began (None: it showed no earlier turn). Ids are in order of arrival."""

    at: float
    needed: frozenset[str]
    start: str | None = None


def chances(
    records: Sequence[Record],
    turns: Sequence[Seen],
    *,
    edits: Mapping[str, int] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    prior: float = 1.0,
) -> dict[str, float]:
    """Of each record the chance that the next turn needs it.

    The mean of a Beta posterior whose prior is the record's salience and whose trials are the turns since it was
    stored, the newest counting most; of a chat's own turn those since it went out of sight. A record that was written
    from others (``sources``) is needed where they were. One that was edited may be again: its chance is divided among
    its versions. ``prior`` scales what salience is believed.
    """
    weights: dict[str, float] = {}
    # Of the turns, newest first: when, where their history began, and the weight of it and all newer ones.
    since: list[tuple[float, str | None, float]] = []
    weight, total = 1.0, 0.0
    for turn in reversed(turns):
        for id_ in turn.needed:
            weights[id_] = weights.get(id_, 0.0) + weight
        total += weight
        since.append((turn.at, turn.start, total))
        weight *= FADING
    found: dict[str, float] = {}
    for record in records:
        if not allowed(record):
            found[record.id] = 0.0
            continue
        needed = weights.get(record.id, 0.0)
        for source in (sources or {}).get(record.id, ()):
            needed = max(needed, weights.get(source, 0.0))
        trials = max(_trials(since, record), needed)
        belief = min(MOST_PRIOR, promise(record) * prior)
        chance = (needed + belief * PRIOR_TURNS) / (trials + PRIOR_TURNS)
        found[record.id] = chance / (1 + (edits or {}).get(record.id, 0))
    return found


def needs(
    records: Sequence[Record], turns: Sequence[Seen], sources: Mapping[str, Sequence[str]] | None = None
) -> dict[str, int]:
    """How many of these turns needed each record, or one that it was written from."""
    counts: dict[str, int] = {}
    for turn in turns:
        for id_ in turn.needed:
            counts[id_] = counts.get(id_, 0) + 1
    of = sources or {}
    return {record.id: max(counts.get(id_, 0) for id_ in (record.id, *of.get(record.id, ()))) for record in records}


def _trials(since: Sequence[tuple[float, str | None, float]], record: Record) -> float:
    """The weight of the turns that could have needed a record: it was stored, and the history did not show it."""
    stored = record.created.timestamp() if record.created is not None else 0.0
    found = 0.0
    for at, start, weight in since:
        if at < stored or (record.source == CHAT and start is not None and start <= record.id):
            break
        found = weight
    return found


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record that might stand in the core: the tokens of its line, and the chance that a turn needs it."""

    record: Record
    tokens: int
    chance: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """Records of a core in order of arrival, their tokens, and what a turn gains by them (uncached tokens)."""

    records: tuple[Record, ...] = ()
    tokens: int = 0
    gain: float = 0.0


def choose(
    candidates: Sequence[Candidate],
    *,
    price: float,
    budget: int,
    fill: int = 0,
    instead: Mapping[str, Sequence[str]] | None = None,
) -> Chosen:
    """The core that pays: each of its records spares more at the end of a prompt (its tokens, as often as turns need
    it) than it costs at the head (``price`` a token and turn, in uncached tokens).

    Greedy by what a token gains, where what the core says already counts for nothing: maximal marginal relevance
    (Carbonell and Goldstein, SIGIR 1998) with shared words as the similarity. ``fill`` tokens are chosen even where
    they don't pay by themselves (a host's minimum), ``budget`` is never exceeded; none where nothing pays. ``instead``
    names, of a record that was written from others, those that it stands for: never both.
    """
    order = {candidate.record.id: place for place, candidate in enumerate(candidates)}
    likely = [candidate for candidate in candidates if candidate.chance > 0 and candidate.tokens <= budget]
    pool = sorted(likely, key=lambda one: (-one.chance, one.record.id))[:POOL]
    words = {one.record.id: _words(one.record.text) for one in pool}
    new = {one.record.id: 1.0 for one in pool}
    stands_for = instead or {}
    chosen: list[Candidate] = []
    left, gain = budget, 0.0
    while pool:
        best = max(pool, key=lambda one: (one.chance * new[one.record.id], -order[one.record.id]))
        worth = best.chance * new[best.record.id] - price
        used = budget - left
        if worth <= 0 and used >= fill:
            break
        pool.remove(best)
        if best.tokens > left or new[best.record.id] <= 0:
            continue
        chosen.append(best)
        left -= best.tokens
        gain += worth * best.tokens
        ousted = {
            *stands_for.get(best.record.id, ()),
            *(made for made, of in stands_for.items() if best.record.id in of),
        }
        pool = [one for one in pool if one.record.id not in ousted]
        for one in pool:
            alike = _alike(words[best.record.id], words[one.record.id])
            new[one.record.id] = min(new[one.record.id], 1.0 - alike)
    if not fill and gain <= 0:
        return Chosen()
    chosen.sort(key=lambda one: order[one.record.id])
    return Chosen(tuple(one.record for one in chosen), budget - left, gain)


def _words(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(text))


def _alike(one: frozenset[str], other: frozenset[str]) -> float:
    """0 where two texts share no more words than by chance, 1 where they say the same."""
    both = len(one | other)
    shared = len(one & other) / both if both else 1.0
    return min(1.0, max(0.0, (shared - ALIKE) / (SAME - ALIKE)))


def ranked(
    records: Iterable[Record], shown: Mapping[str, int], *, budget: int, least: int, count: Callable[[Record], int]
) -> list[Record]:
    """Without prices: the most salient records within ``budget`` tokens, in order of arrival; none if they have fewer
    than ``least`` (below a page or a host's minimum a prefix can't be cached, so that a core would only cost).

    ``shown`` says how often each was put into a prompt before: being recalled outweighs the words.
    """
    known = list(records)
    worth = {record.id: salience(record) + MARK * min(shown.get(record.id, 0), 6) for record in known}
    best = sorted(
        (record for record in known if worth[record.id] >= MARK and allowed(record)), key=lambda one: -worth[one.id]
    )
    chosen: set[str] = set()
    used = 0
    for record in best:
        tokens = count(record)
        if used + tokens <= budget:
            chosen.add(record.id)
            used += tokens
    return [record for record in known if record.id in chosen] if used >= least else []


def allowed(record: Record) -> bool:
    """Whether a record may stand in a core at all: trusted words of a person, or written of what people said."""
    return record.role in ("user", "system") and record.trust == "trusted"
