"""Which records a question concerns, by what a search found: how likely each is evidence, and whose matters it tells.

Decides which LoRA versions act on a request (a version whose records aren't concerned would only intrude). Knows hits
and grammar; knows no index and no LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from agentmem.types import Hit

from .asking import asks
from .whose import of_self, personal, same_people

__all__ = ["WEIGHED", "concerned"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+")

#: "When the router blinks, unplug it": that asks nothing.
_CASE = re.compile(r"\s*(?:when|whenever|where)\b[^?]*,[^?]*$", re.IGNORECASE)

#: Hits to search for: what was asked before often stands in front of what was told.
WEIGHED = 60
#: The least probability of a record that is concerned. Low, since those who ask of others are told apart by grammar:
#: measured on 36 facts amid other statements and earlier questions, 99 % of held-out and 95 % of reworded questions
#: reach it, and none of 168 questions about neighbours or unrelated matters concerns a record (tests/benchmarks/
#: lora_serving.py).
LEAST = 0.005
#: The least probability of a record that is nobody's own ("To reset the boiler, ..."), or of any where the question
#: isn't about the speaker's own: grammar says too little of whose matters are meant there. Unrelated questions reach
#: 0.06 (0.13 of any record), its own 0.5 and more.
LEAST_IMPERSONAL = 0.2
#: And the least part of the likeliest one's: of many versions only those that the question is about should act, for
#: they disturb each other. Of 50 facts in three versions a tenth of it let 93 % of held-out and 74 % of reworded
#: questions come out in a chat, 0.3 and more 95 and 86 %.
BESIDE = 0.5


def concerned(question: str, hits: Sequence[Hit], learnt: Collection[str]) -> list[str]:
    """The ids in ``learnt`` that ``question`` concerns, the likeliest first.

    A hit's score is the probability that it is evidence, and shared among all that was found: earlier questions and
    answers took of it what belongs to the statements behind them, so they are left out of the sum. What is then at
    least `LEAST` likely (`LEAST_IMPERSONAL` where it is nobody's own, or isn't asked for as the speaker's), and likely
    enough beside the best, is concerned if it tells of the same people.
    """
    # The user's own past questions are learnt from too, but it is what a version answers that a turn is about.
    facts = {hit.record.id for hit in hits if hit.record.id in learnt and not _only_asks(hit.record.text)}
    stated = [hit for hit in hits if hit.record.id in facts or not (hit.record.role != "user" or asks(hit.record.text))]
    held = sum(hit.score for hit in stated)
    share = held / max(sum(hit.score for hit in hits), 1e-12)
    least = LEAST * share
    own = of_self(question)
    found: list[str] = []
    for hit in stated:
        if hit.score < least:
            break
        if hit.score < LEAST_IMPERSONAL * share and not (own and personal(hit.record.text)):
            continue
        if hit.record.id in facts and same_people(question, hit.record.text, hit.record.name):
            least = max(least, BESIDE * hit.score)
            found.append(hit.record.id)
    return found


def _only_asks(text: str) -> bool:
    """Whether each of its sentences asks for something: "I live in Oslo. What can I do there?" also tells."""
    return all(asks(sentence) and not _CASE.match(sentence) for sentence in _SENTENCE.split(text) if sentence.strip())
