"""What speaks for a record as evidence for a query: signals, one row of numbers each, over a pool of candidates.

Knows words, cosines, token matches and the structure of a conversation as arrays; knows no database. What the signals
are worth is fusion.py's.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from agentmem._pure.bm25 import K1, B

from .drafts import ROLES
from .postings import STOP_WORDS, stems

if TYPE_CHECKING:
    import numpy.typing as npt

    from .catalog import View
    from .encoded import Encoded
    from .late import Matches
    from .words import Lexical

    Bools = npt.NDArray[np.bool_]
    Numbers = npt.NDArray[np.float32]
    Places = npt.NDArray[np.int32]
    Rows = npt.NDArray[np.int64]

__all__ = ["KINDS", "MOST_TOKENS", "Pool", "Query", "Signals", "measure"]

#: What a search can go by, the most first: token vectors, one vector a passage, words alone.
KINDS = ("tokens", "vectors", "words")

MONTHS = tuple(dt.date(2000, month, 1).strftime("%B").lower() for month in range(1, 13))
#: "may" is a month only with a capital: as a verb it is in every second question.
MONTH = re.compile(r"\b(?:(May)|(" + "|".join(month for month in MONTHS if month != "may") + r"))\b", re.IGNORECASE)
WHEN = re.compile(r"\s*(?:when|what (?:date|day|year|month|time)|how long|since when)\b", re.IGNORECASE)
#: Words of greetings, thanks and assent, and of wishes that memory has no part in: they ask for nothing remembered.
CHATTER = frozenset(
    """
    again alright awesome bye cheers congrats congratulations cool day doing evening everything fine going good goodbye
    goodnight great haha happy hello hey hi hiya hmm joke just later lol lovely luck morning much nice night nope ok
    okay perfect please really right see sorry sounds sure thank thanks thing things today tomorrow totally understood
    very wait weekend welcome well whatever wonderful wow yeah yep yes yo yup go got it get make helps help helpful
    amazing appreciate assistance bot chat chatting exactly gotcha greetings interesting continue tell
    """.split()  # noqa: SIM905 - read as prose
)
#: Tokens of a query that are matched one by one: what follows adds cost, not sense.
MOST_TOKENS = 256
_ASSISTANT = ROLES.index("assistant")
_TOOL = ROLES.index("tool")
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Query:
    """A query taken apart."""

    text: str
    #: Of each token vector the place of its word in `words`, -1 where it is of none.
    word_of: tuple[int, ...]
    words: tuple[str, ...]
    stems_of: tuple[tuple[str, ...], ...]
    months: frozenset[int]
    years: frozenset[int]
    days: frozenset[int]
    asks_when: bool
    #: Words that could be about something remembered.
    contents: int
    personal: bool

    @classmethod
    def of(cls, text: str, encoded: Encoded | None) -> Query:
        """``encoded`` holds the query as its only text, or is None."""
        spans = [match.span() for match in _WORD.finditer(text)]
        words = tuple(text[start:stop].lower() for start, stop in spans)
        tokens = [] if encoded is None else _spans(encoded)
        starts = np.array([start for start, _ in spans], np.int64)
        at = np.searchsorted(starts, [start for start, _ in tokens], side="right") - 1
        word_of = tuple(
            place if place >= 0 and start < spans[place][1] else -1
            for place, (start, _) in zip(at.tolist(), tokens, strict=True)
        )
        years = {int(year) for year in re.findall(r"\b((?:19|20)\d\d)\b", text)}
        months = {MONTHS.index(m[0].lower()) + 1 for m in MONTH.finditer(text) if m[0] != "may" and m[0] != "MAY"}
        rest = re.sub(r"\b(?:19|20)\d\d\b", "", text)
        days = {int(day) for day in re.findall(r"\b(\d{1,2})(?:st|nd|rd|th)?\b", rest)} if months else set()
        for year, month, day in re.findall(r"\b((?:19|20)\d\d)-(\d\d)(?:-(\d\d))?\b", text):
            years.add(int(year))
            months.add(int(month))
            days |= {int(day)} if day else set()
        return cls(
            text=text,
            word_of=word_of,
            words=words,
            stems_of=tuple(() if word in STOP_WORDS else _stems(word) for word in words),
            months=frozenset(months),
            years=frozenset(years),
            days=frozenset(days),
            asks_when=WHEN.match(text) is not None,
            contents=len({word for word in words if word not in STOP_WORDS and word not in CHATTER}),
            personal=not PERSONAL.isdisjoint(words),
        )


def _spans(encoded: Encoded) -> Sequence[tuple[int, int]]:
    """Where the first `MOST_TOKENS` tokens stand in the query; (-1, -1) where the embedder doesn't tell."""
    if not encoded.tokens:
        return []
    count = min(len(encoded.tokens[0]), MOST_TOKENS)
    return encoded.spans[0][:count] if encoded.spans else [(-1, -1)] * count


#: Words that speak of the one who asks, of someone both know, or of what was said before.
PERSONAL = frozenset(
    """
    i m ve my me mine myself we our us he him his she her hers they their them remember remind told
    """.split()  # noqa: SIM905 - read as prose
)


@lru_cache(maxsize=65_536)
def _stems(word: str) -> tuple[str, ...]:
    return tuple(stems(word))


@dataclass(frozen=True, eq=False)
class Pool:
    """The records weighed against each other: ``places`` in the view, ascending int32 [p].

    ``before`` and ``after`` are the rows of a record's neighbours in its session, -1 for none that is in the pool;
    ``answers`` says that the one before asks and is someone else's.
    """

    view: View
    places: Places
    before: Rows
    after: Rows
    answers: Bools

    @classmethod
    def of(cls, view: View, allowed: Bools, found: Places) -> Pool:
        """What was found and its neighbours: the turn that answers is often the one beside the turn that matches.

        A neighbour that is not allowed is no neighbour: what a condition leaves out has no say in what is found.
        """
        beside = np.concatenate([found, view.previous[found], view.next[found]])
        beside = beside[beside >= 0]
        places = _distinct(beside[allowed[beside]], view.n)
        row_of = _rows_of(places, view.previous[places], view.n), _rows_of(places, view.next[places], view.n)
        before = row_of[0]
        asker = places[np.maximum(before, 0)]
        other = (view.name[asker] != view.name[places]) | (view.role[asker] != view.role[places])
        other |= view.name[places] < 0  # nobody's name is told: who asked may be anyone
        return cls(view, places, *row_of, answers=(before >= 0) & view.asks[asker] & other)

    def __len__(self) -> int:
        return len(self.places)


#: Records of a view up to which a table of all of them is quicker than sorting some.
SMALL = 65_536


def _distinct(places: Places, count: int) -> Places:
    """These places below ``count``, each once, ascending."""
    if count > SMALL:
        return np.unique(places).astype(np.int32)
    here = np.zeros(count, bool)
    here[places] = True
    return np.flatnonzero(here).astype(np.int32)


def _rows_of(places: Places, wanted: Places, count: int) -> Rows:
    """Where ``wanted`` are in the ascending ``places`` below ``count``, -1 for those that are not (-1 is not)."""
    if count <= SMALL:
        rows = np.full(count + 1, -1, np.int64)  # the last one is what -1 finds
        rows[places] = np.arange(len(places))
        return np.asarray(rows[wanted], np.int64)
    if not len(places):
        return np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
    return np.where(places[at] == wanted, at, -1)


@dataclass(frozen=True, eq=False)
class Signals:
    """Signals by name. ``rows``: float32 [p] each; ``query``: numbers that are the same for all records."""

    kind: str
    rows: Mapping[str, Numbers]
    query: Mapping[str, float]
    #: Int32 [p]: the passage of each record that fits best (0 where there is but one, or no token vectors).
    part: Places


#: Signals that are compared as they are; all others as standard deviations from the pool's mean.
PLAIN = frozenset(["speaker", "month", "year", "day", "when", "question", "assistant", "answer"])


def measure(
    query: Query, pool: Pool, lexical: Lexical, cosines: Numbers | None = None, matches: Matches | None = None
) -> Signals:
    """The signals of a pool's records.

    ``cosines``: float32 [p], NaN where a record has no vector; None without an embedder. ``matches`` is what the token
    store says of the pool's records, in their order; None where there are no token vectors.
    """
    count = len(pool)
    rows: dict[str, Numbers] = {}
    asked = _words(rows, query, pool, lexical)
    if cosines is not None:
        asked["best_cosine"] = _cosines(rows, pool, cosines)
    kind, part = "words" if cosines is None else "vectors", np.zeros(count, np.int32)
    if cosines is not None and matches is not None and len(matches.owner) and query.word_of:
        kind = "tokens"
        asked["best_match"], part = _matches(rows, query, pool, lexical, matches)
    asked["named"] = float(_structure(rows, query, pool))
    # Where nobody is known by name, a question that names none of the speakers need not be about somebody else.
    asked["names"] = float((pool.view.name[pool.places] >= 0).mean()) if count else 0.0
    asked["records"] = math.log1p(count)
    asked["assistants"] = float(rows["assistant"].mean()) if count else 0.0
    asked["lectures"] = _lectures(rows["assistant"] > 0, rows["length"])
    return Signals(kind, rows, asked, part)


def _words(rows: dict[str, Numbers], query: Query, pool: Pool, lexical: Lexical) -> dict[str, float]:
    """BM25 of the record, its window and its session; the share of the query's weight that it has with its question."""
    places = pool.places
    rows["turn"], rows["window"] = lexical.turn[places], lexical.window[places]
    rows["session"] = lexical.session_at(places)
    rarity = np.array([lexical.idf[stem] for stem in lexical.stems], np.float32)
    total = float(rarity.sum())
    times = np.zeros((len(rarity), len(places) + 1), np.float32)  # the last one is what -1 finds
    times[:, :-1] = lexical.times(places)
    lengths = np.zeros(len(places) + 1, np.float32)
    lengths[:-1] = pool.view.length[places]
    asked = np.where(pool.answers, pool.before, -1)
    rows["turn_answer"] = _bm25(rarity, times[:, :-1] + times[:, asked], lengths[:-1] + lengths[asked])
    has = times > 0
    share = rarity / total if total else rarity
    own = has[:, :-1]
    rows["answer_share"] = np.asarray(share @ (own | has[:, asked]), np.float32)
    rows["rarest"] = np.asarray((rarity[:, None] * own).max(axis=0, initial=0.0), np.float32)
    rows["window_share"] = np.asarray(share @ (own | has[:, pool.before] | has[:, pool.after]), np.float32)
    found = own.any(axis=1)
    return {
        "evidence": float((share @ own).max(initial=0.0)),
        "stems": float(len(lexical.stems)),
        "rarity": total,
        "unknown": float(share[~found].sum()),
        "contents": float(query.contents),
        "chatter": float(query.contents == 0),
        "personal": float(query.personal),
    }


def _bm25(rarity: Numbers, times: Numbers, lengths: Numbers) -> Numbers:
    """BM25 of documents with so many of each stem [stems, p] and such lengths [p], among themselves."""
    size = K1 * ((1 - B) + B * lengths / max(float(lengths.mean()) if len(lengths) else 1.0, 1.0))
    return np.asarray(rarity @ (times * (K1 + 1) / (times + size)), np.float32)


def _cosines(rows: dict[str, Numbers], pool: Pool, cosines: Numbers) -> float:
    """The record's cosine and its neighbours'. A record without a vector counts as an average one."""
    known = ~np.isnan(cosines)
    usual = float(cosines[known].mean()) if known.any() else 0.0
    own = np.where(known, cosines, np.float32(usual))
    around = _padded(own, last=usual)
    rows["cosine"] = own
    rows["cosine_window"] = np.asarray(own + (around[pool.before] + around[pool.after]) / 2, np.float32)
    rows["cosine_question"] = np.where(pool.answers, around[pool.before] - np.float32(usual), np.float32(0))
    rows["cosine_next"] = around[pool.after]
    return float(own.max(initial=0.0))


def _matches(
    rows: dict[str, Numbers], query: Query, pool: Pool, lexical: Lexical, matches: Matches
) -> tuple[float, Places]:
    """Late interaction: sums over the query's tokens of their best matches, in the record and in what is beside it."""
    scores = matches.scores
    weights = _token_weights(query, lexical)
    even = np.full(len(weights), 1 / len(weights), np.float32)
    both = scores @ np.stack([weights, even], axis=1)
    if matches.one_each:  # usual
        best, sums, part = scores, both, matches.part
    else:
        starts = np.flatnonzero(np.diff(matches.owner, prepend=-1))
        owner = matches.owner[starts]
        best = np.empty((len(pool), scores.shape[1]), np.float32)
        sums = np.empty((len(pool), 2), np.float32)
        part = np.zeros(len(pool), np.int32)
        best[:] = sums[:] = np.nan
        best[owner] = np.maximum.reduceat(scores, starts, axis=0)
        sums[owner] = np.maximum.reduceat(both, starts, axis=0)
        without = np.flatnonzero(np.isnan(sums[:, 0]))
        if len(without):
            best[without] = _guessed(query, pool, lexical, without, best[owner])
            sums[without] = best[without] @ np.stack([weights, even], axis=1)
        order = np.lexsort((both.sum(axis=1), matches.owner))
        part[matches.owner[order]] = matches.part[order]  # the last one of a record is its best
    # Row by row, and with one row more at the end, which is what -1 finds. A stop word's weight is 0 in what follows.
    around = np.full((len(pool) + 1, len(weights)), -1, np.float32)
    around[:-1] = best
    before = around[pool.before]
    beside = np.maximum(before, around[pool.after])
    wide = np.maximum(best, beside)
    rows["tokens_plain_window"] = wide @ even
    deviation = best - best.sum(axis=0) / np.float32(len(pool))
    deviation -= np.sqrt(np.einsum("ij,ij->j", deviation, deviation) / len(pool))
    rows["tokens"], rows["tokens_plain"] = sums[:, 0], sums[:, 1]
    rows["tokens_rare"] = np.maximum(deviation, 0) @ weights
    before[~pool.answers] = -1
    rows["tokens_answer"] = np.maximum(best, before) @ weights
    rows["tokens_window"] = np.maximum(best, NEAR * beside) @ weights
    around[:-1] = wide
    rows["tokens_wide"] = np.maximum(np.maximum(wide, around[pool.before]), around[pool.after]) @ weights
    document = pool.view.document[pool.places]
    order = np.argsort(document, kind="stable")
    new = np.diff(document[order], prepend=-1) != 0
    sessions = np.maximum.reduceat(best[order], np.flatnonzero(new), axis=0) @ weights
    rows["tokens_session"] = np.empty(len(pool), np.float32)
    rows["tokens_session"][order] = sessions[np.cumsum(new) - 1]
    return float(rows["tokens"].max()), part


#: About what a word's token vector and that of the same word in another sentence have in common.
SAME = 0.9


def _guessed(query: Query, pool: Pool, lexical: Lexical, rows: Rows, known: Numbers) -> Numbers:
    """Matches of records without token vectors: a word that is there matches as itself, one that isn't as usual."""
    has = lexical.times(pool.places[rows]) > 0
    row_of = {stem: row for row, stem in enumerate(lexical.stems)}
    guessed = np.tile(known.mean(axis=0), (len(rows), 1))
    for token, word in enumerate(query.word_of):
        for stem in query.stems_of[word] if word >= 0 else ():
            if stem in row_of:
                guessed[has[row_of[stem]], token] = max(SAME, float(known[:, token].max()))
    return guessed


#: What a neighbour's match is worth beside one's own.
NEAR = np.float32(0.85)


def _token_weights(query: Query, lexical: Lexical) -> Numbers:
    """Each token's share of the query's weight: the rarity of its word in the store; float32 that adds up to 1."""
    usual = max(lexical.idf.values(), default=1.0)
    rarity = [max((lexical.idf.get(stem, usual) for stem in stems), default=0.0) for stems in query.stems_of]
    weights = np.array([rarity[word] if word >= 0 else 0.0 for word in query.word_of], np.float32)
    if not weights.any():
        weights = np.ones(len(weights), np.float32)
    return np.asarray(weights / weights.sum(), np.float32)


def _structure(rows: dict[str, Numbers], query: Query, pool: Pool) -> bool:
    """Who said it, when, and whether it asks or answers. Returns whether the query names anyone of the pool."""
    view, places = pool.view, pool.places
    role, name = view.role[places], view.name[places]
    named = _named(query, view.names, name)
    said = named[0] if len(named) == 1 else -1
    rows["speaker"] = np.asarray(name == said, np.float32) if said >= 0 else np.zeros(len(places), np.float32)
    for signal, row in zip(("year", "month", "day"), _dates(query, view.at_s[places]), strict=True):
        rows[signal] = row
    rows["when"] = np.asarray(view.timed[places] & query.asks_when, np.float32)
    rows["question"] = np.asarray(view.asks[places], np.float32)
    rows["assistant"] = np.asarray((role == _ASSISTANT) | (role == _TOOL), np.float32)
    rows["answer"] = np.asarray(pool.answers, np.float32)
    rows["length"] = np.log1p(view.length[places], dtype=np.float32)
    return bool(named)


def _lectures(assistants: Bools, lengths: Numbers) -> float:
    """How much longer the assistants' records are than the others', in logarithms of words: an assistant that writes
    essays says other things than one who is spoken with as a friend. 0 where only one of the two speaks."""
    if not assistants.any() or assistants.all():
        return 0.0
    return float(lengths[assistants].mean() - lengths[~assistants].mean())


def _named(query: Query, names: Sequence[str], codes: Any) -> list[int]:
    """The codes of the speakers among ``codes`` whom the query names by the first word of the name."""
    words, text = set(query.words), query.text.lower()
    found = []
    for code in np.unique(codes[codes >= 0]).tolist():
        name = names[int(code)].lower()
        parts = _WORD.findall(name)
        if parts and (parts[0] in words if len(parts[0]) > 2 else name in text.split()):
            found.append(code)
    return found


def _dates(query: Query, at_s: Any) -> tuple[Numbers, Numbers, Numbers]:
    """Whether a record is of a year, month and day that the query names."""
    none = np.zeros(len(at_s), np.float32)
    if not query.years and not query.months:
        return none, none, none
    known = ~np.isnan(at_s)
    days = np.where(known, at_s, 0).astype("datetime64[s]").astype("datetime64[D]")
    months = days.astype("datetime64[M]")
    year = known & np.isin(months.astype("datetime64[Y]").astype(int) + 1970, list(query.years))
    month = known & np.isin(months.astype(int) % 12 + 1, list(query.months))
    day = month & np.isin((days - months).astype(int) + 1, list(query.days))
    return year.astype(np.float32), month.astype(np.float32), day.astype(np.float32)


def _padded(values: Any, *, last: Any) -> Any:
    """``values`` [..., p] with one more at the end, which is what -1 finds."""
    return np.concatenate([values, np.full((*values.shape[:-1], 1), last, values.dtype)], axis=-1)
