"""Self-study: the model itself writes questions about a record that it is shown, and answers them.

Knows how to ask a loaded model and what to believe of what it wrote; knows no scopes and no files. Only what the record
makes the difference for is kept: right with it in the prompt, wrong without. A small model is not able to do this, so a
trial on known statements decides first (after PRAG, arXiv 2501.15915, and Cartridges, arXiv 2506.06266, which assume a
model that is).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from agentmem.types import Message, Record

from .corpus import Example
from .grammar import fold, second_person, telling
from .lessons import Tensors, answers, steady
from .lora import base_only

__all__ = ["ABLE", "Study", "study", "trial"]

_log = logging.getLogger("agentmem")

#: A model is able if of its questions in the trial at least this share is fit to learn from.
ABLE = 0.5
#: Tokens of a written question and of an answer to it, and words of a record, at most.
QUESTION_TOKENS, ANSWER_TOKENS, LONGEST_WORDS = 24, 40, 60
#: Statements of several kinds that the trial is made on.
TRIAL = (
    "My dog is called Biscuit.",
    "I work as a glass blower.",
    "We moved our release to Friday because of the audit.",
    "On 3 May I flew to Oslo with my aunt.",
)
#: What questions are asked for, one request each.
_STYLES = (
    "Write one short question, from my point of view, that this answers.",
    "Ask the same thing in wholly different words, as I would ask you weeks later. Write only the question.",
)
_trials: dict[bytes, Study] = {}
_SHOWN = "The user told you: {said}"


@dataclass(frozen=True)
class Study:
    """What came of it: ``share`` of the written questions that were kept; ``why`` says why there are no examples."""

    examples: tuple[Example, ...]
    share: float
    why: str = ""


def trial(tensors: Tensors) -> Study:
    """How well the base model does on four known statements; the result is kept for the process.

    About a second of CPU for a 135M model, which fails at its first questions, some more for one that doesn't.
    """
    key = tensors.identity
    if key not in _trials:
        records = [Record(id=f"trial{i}", text=text) for i, text in enumerate(TRIAL)]
        _trials[key] = _studied(tensors, records, least=ABLE)
    return _trials[key]


def study(tensors: Tensors, records: Sequence[Record], *, able: float | None = None) -> Study:
    """Examples that the model wrote about ``records``, each checked with and without its record in the prompt.

    ``able`` is the share of an earlier `trial` of this model; without it one is made. Below `ABLE` nothing is written.
    Takes records that a person said, that are trusted and not long. Holds the model's lock; costs four short greedy
    answers per record and style, in batches. Give the examples to `corpus.build` as ``written``.
    """
    if able is None:
        able = trial(tensors).share
    if able < ABLE:
        why = f"{tensors.name} wrote fit questions for {able:.0%} of a trial, less than {ABLE:.0%}: it is not able"
        _log.info("no self-study: %s", why)
        return Study((), able, why)
    fit = [r for r in records if r.role == "user" and r.trust == "trusted" and r.valid_until is None]
    return _studied(tensors, [r for r in fit if 3 <= len(r.text.split()) <= LONGEST_WORDS])


def _studied(tensors: Tensors, records: Sequence[Record], *, least: float = 0.0) -> Study:
    """``least``: given up where a smaller share of the first questions is fit to be asked."""
    if not records:
        return Study((), 0.0, "there is no record to study")
    tried: list[tuple[Record, str]] = []
    with tensors.lock, steady(tensors.model), base_only(tensors.model):
        for style in _STYLES:
            written = _say(tensors, [_shown(record, style) for record in records], QUESTION_TOKENS)
            asked = [(record, _question(text, record)) for record, text in zip(records, written, strict=True)]
            tried += [(record, question) for record, question in asked if question]
            if len(tried) < least * len(records):
                return Study((), 0.0, f"{len(tried)} of {len(records)} first questions were fit to be asked")
        knowing = _say(tensors, [_shown(record, question) for record, question in tried], ANSWER_TOKENS)
        blind = _say(tensors, [[Message(role="user", content=question)] for _, question in tried], ANSWER_TOKENS)
    found: dict[str, Example] = {}
    for (record, question), answer, guess in zip(tried, knowing, blind, strict=True):
        example = _example(record, question, answer)
        if example and not example.found_in(guess):
            found.setdefault(fold(question), example)
    kept = tuple(found.values())
    return Study(kept, len(kept) / (len(records) * len(_STYLES)), "" if kept else "nothing that it wrote held")


def _shown(record: Record, request: str) -> list[Message]:
    said = Message(role="system", content=_SHOWN.format(said=record.text))
    return [said, Message(role="user", content=request)]


def _say(tensors: Tensors, conversations: Sequence[Sequence[Message]], most: int) -> list[str]:
    if not conversations:
        return []
    prompts = [list(tensors.render(conversation)) for conversation in conversations]
    texts = [tensors.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers(tensors, prompts, most)]
    return [" ".join(text.split()) for text in texts]


def _question(text: str, record: Record) -> str:
    """The first question in what the model wrote, if it is one about the user that doesn't hold its own answer."""
    question = re.split(r"[.!:\"]", text[: text.find("?") + 1])[-1].strip(" '*-")
    words = set(fold(question).split())
    fit = 3 <= len(question.split()) <= 20 and words & {"i", "my", "me", "we", "our"}
    return question if fit and len(telling(record.text, question)) >= 1 else ""


def _example(record: Record, question: str, answer: str) -> Example | None:
    """The answer's first sentence, if it says what the record says and the question doesn't."""
    sentence = answer.split(". ", maxsplit=1)[0].rstrip(".") + "."
    folded = fold(sentence)
    news = telling(record.text, question)
    keys = tuple(word for word in news if f" {fold(word).strip()} " in folded)[:4]
    if not keys or 2 * len(keys) < min(len(news), 4) or set(fold(sentence).split()) & {"i", "my", "me"}:
        return None
    strange = telling(sentence, f"{question} {second_person(record.text)} {record.text}")
    return None if len(strange) > 2 else Example(question, sentence, keys, (record.id,))
