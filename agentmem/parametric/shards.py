"""Parts of a corpus that are learnt each by a LoRA of its own, so that forgetting a record retrains one of them.

Knows which records must stay together and how a list is cut; knows nothing of training and of what is stored. After
SISA (Bourtoule et al., arXiv 1912.03817): what a shard's weights hold came from its own records only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from agentmem.types import Record

from .corpus import Corpus

__all__ = ["shards"]


def shards(corpus: Corpus, records: Sequence[Record], size: int) -> list[list[Record]]:
    """The records that ``corpus`` learns, in parts of about equal length, at most ``size`` each.

    Those of one session stay together where they fit, in order of time. Those that one question is answered by ("I like
    tea", "I like chess") always do, also where they are more than ``size``: two LoRAs with half an answer each would
    contradict each other.
    """
    chosen = [record for record in records if record.id in corpus.records]
    groups = _bound(corpus, sorted(chosen, key=_order(chosen)))
    count = -(-len(chosen) // size)
    if count <= 1:
        return [[record for group in groups for record in group]] if groups else []
    parts: list[list[Record]] = [[]]
    left = len(chosen)
    for group in groups:
        # What remains, spread over the parts that remain: 21 records in parts of 20 are 11 and 10.
        wanted = -(-(left + len(parts[-1])) // max(1, count - len(parts) + 1))
        if parts[-1] and len(parts[-1]) + len(group) > min(size, wanted):
            parts.append([])
        parts[-1] += group
        left -= len(group)
    return parts


def _order(records: Iterable[Record]) -> Callable[[Record], tuple[float, str, float]]:
    """A sorting key: sessions by their first record, records of a session by time, equal times as they came."""
    first: dict[str, float] = {}
    times: dict[str, float] = {}
    for record in records:
        when = record.at or record.created
        times[record.id] = when.timestamp() if when else 0.0
        session = repr(record.scope)
        first[session] = min(first.get(session, times[record.id]), times[record.id])
    return lambda record: (first[repr(record.scope)], repr(record.scope), times[record.id])


def _bound(corpus: Corpus, records: Sequence[Record]) -> list[list[Record]]:
    """Groups of records that share a question, each where its first record stands."""
    leader = {record.id: record.id for record in records}

    def find(id_: str) -> str:
        while leader[id_] != id_:
            leader[id_] = leader[leader[id_]]
            id_ = leader[id_]
        return id_

    for example in (*corpus.examples, *corpus.held_out, *corpus.natural):
        known = [id_ for id_ in example.records if id_ in leader]
        for id_ in known[1:]:
            leader[find(id_)] = find(known[0])
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(find(record.id), []).append(record)
    return list(groups.values())
