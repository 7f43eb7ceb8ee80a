"""Measures a trained LoRA before it may serve: does it know the facts, and is the model otherwise what it was?

Knows how to ask and to compare; knows nothing of files, scopes or versions. Recall alone is a false friend: a recipe
can reach 100 % of it and ruin the model, so drift and intrusion decide as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agentmem.errors import ConfigError
from agentmem.types import Value

from .answering import Answer, divergence, said, text_loss
from .corpus import Corpus, Example
from .lessons import Tensors, encode, ends, steady
from .lora import applied, base_only
from .probes import PASSAGE, SPOKEN_PASSAGE, UNRELATED, neighbours, sample, unknown
from .train import Trained

if TYPE_CHECKING:
    from .lora import Lora

__all__ = ["GateReport", "Thresholds", "drift", "failures", "gate", "intrudes", "perplexity", "recall"]


class Thresholds(Value):
    """What a version must reach before it may serve. Shares are of 1; what was not measured is not judged.

    The setting ``lora_gate`` changes them by name.
    """

    recall_trained: float = Field(default=0.9, ge=0, description="least share of trained questions answered right")
    recall_held_out: float = Field(default=0.8, ge=0, description="least share of held-out wordings answered right")
    recall_natural: float = Field(default=0.4, ge=0, description="least share of wholly reworded questions answered")
    drift: float = Field(default=0.04, ge=0, description="largest relative rise of the perplexity on unrelated text")
    kl: float = Field(default=0.1, ge=0, description="largest KL(base || adapted) on unrelated chat, nats per token")
    intrusion: float = Field(
        default=0.1, ge=0, description="largest share of unrelated and neighbour questions answered with a learnt fact"
    )
    gated_intrusion: float = Field(
        default=0.05, ge=0, description="the same, of questions on which the version would act in a chat"
    )
    neighbours: float = Field(
        default=0.2, ge=0, description="largest share of questions about other people answered with a learnt fact"
    )
    unknown: float = Field(
        default=0.8, ge=0, description="least share of unanswerable personal questions left without a learnt fact"
    )
    retention: float = Field(
        default=0.8, ge=0, description="least share of what earlier versions taught that is still answered right"
    )
    composition: float = Field(
        default=0.8, ge=0, description="least recall of held-out wordings while the other active versions act as well"
    )
    drift_composed: float = Field(
        default=0.1, ge=0, description="largest rise of the perplexity while the other active versions act as well"
    )

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Thresholds:
        """The thresholds with those of the setting ``lora_gate`` changed.

        Raises `ConfigError` for a name that is none of them, and for a value that is not a number of at least 0.
        """
        for name, value in settings.items():
            if name not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise ConfigError(f"lora_gate has no threshold {name!r:.60}: it has {known}")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ConfigError(f"lora_gate: {name} is {value!r:.60}: give a finite number of at least 0")
        return cls(**settings)


class GateReport(Value):
    """What the gate measured; None is what it had no questions for, or nothing to compare with.

    ``drift`` is the larger of two: text read as it is, and text that the assistant says. ``intrusion`` counts all
    questions that no learnt fact answers, ``neighbours`` those of them that ask the same about other people;
    ``unknown`` is the share of personal questions that nothing answers and that stay without a learnt fact.
    ``gated_intrusion`` counts, of all of these, only what comes out where the plaintext index lets the version act.
    ``retention``, ``composition`` and ``drift_composed`` are with other active versions beside it: ``beside`` of the
    ``others`` acted in a sum that was asked. ``failed`` says
    in words which thresholds were missed, ``missed`` are ids of records whose fact did not come out in trained or
    held-out wording, ``by_record`` maps each id to the share of its held-out and natural questions answered right,
    ``asked`` counts the questions. No question is kept: what is forgotten must not live on in a report.
    """

    recall_trained: float
    recall_held_out: float
    recall_natural: float | None = None
    drift: float
    kl: float | None = None
    intrusion: float
    neighbours: float | None = None
    unknown: float | None = None
    retention: float | None = None
    composition: float | None = None
    drift_composed: float | None = None
    beside: int = 0
    others: int = 0
    gated_intrusion: float | None = None
    passed: bool
    failed: tuple[str, ...] = ()
    thresholds: Thresholds = Thresholds()
    missed: tuple[str, ...] = ()
    by_record: dict[str, float] = Field(default_factory=dict)
    asked: int = 0
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        natural = "" if self.recall_natural is None else f", {self.recall_natural:.0%} reworded"
        kl = "" if self.kl is None else f", KL {self.kl:.3f}"
        beside = f", beside {self.beside} of {self.others} active" if self.others else ""
        why = f" ({'; '.join(self.failed)})" if self.failed else ""
        return (
            f"{'passed' if self.passed else 'failed'}: recall {self.recall_trained:.0%} trained, "
            f"{self.recall_held_out:.0%} held out{natural}, drift {self.drift:+.1%}{kl}, "
            f"intrusion {self.intrusion:.0%}{beside}{why}"
        )


#: Questions that no learnt fact answers, in all; personal ones that nothing answers; those about earlier facts; those
#: that were trained.
_QUESTIONS, _UNKNOWN, _EARLIER, _TRAINED = 40, 8, 20, 30
#: Room for an answer that holds a fact, at least.
_LEAST_TOKENS = 20
#: A ruined model's drift or KL may have no number: it is given as this, so that reports can be stored and compared.
_RUINED = 1e6
#: What asks for the passage that the assistant says.
_STORY = "Please read me the beginning of a book."

_AT_LEAST = {
    "recall_trained": "recall of trained wordings",
    "recall_held_out": "recall of held-out wordings",
    "recall_natural": "recall of wholly reworded questions",
    "unknown": "the share of unanswerable questions left without a learnt fact",
    "retention": "recall of what earlier versions taught",
    "composition": "recall beside the other active versions",
}
_AT_MOST = {
    "drift": "drift on unrelated text",
    "intrusion": "intrusion into unrelated and neighbour questions",
    "gated_intrusion": "intrusion into questions on which it would act",
    "neighbours": "intrusion into questions about other people",
    "drift_composed": "drift beside the other active versions",
}
#: The base's answers to questions that are the same for every corpus, by model and question: a guess for next time.
_base_answers: dict[tuple[bytes, str], list[int]] = {}


def gate(
    tensors: Tensors,
    trained: Trained | Lora,
    corpus: Corpus,
    *,
    thresholds: Thresholds | None = None,
    beside: Sequence[Lora] = (),
    others: int | None = None,
    earlier: Corpus | None = None,
    concerns: Callable[[str], bool] | None = None,
    acting: Callable[[Example], Collection[int]] | None = None,
    max_questions: int = 40,
    max_tokens: int = 16,
) -> GateReport:
    """Ask the model with the LoRA on it, and compare with the base. The model is as before afterwards; its lock is
    held.

    ``beside``: LoRAs that are served with it, of ``others`` in all, and ``earlier`` what they were taught: a sample of
    it, and of the new facts, is asked for under the exact sum that answers in a chat. ``acting(example)`` says which of
    them all a chat lets act on that question, by place: 0 is the LoRA itself, then ``beside`` in order; None that all
    of them do. ``concerns(question)`` says whether a chat would let the LoRA itself act on this question.

    At most ``max_questions`` of each kind are asked, an even sample over the facts; ``max_tokens`` bounds an answer to
    a question that no fact answers. Costs about ten CPU-seconds for ten facts on a 135M model.
    """
    lora = trained.lora if isinstance(trained, Trained) else trained
    together = (lora, *beside)
    cpu = time.process_time()
    opening = next((part.activated for part in together if part.activated), ())
    unrelated = [Example(question, "", (), ()) for question in UNRELATED]
    unknowns = unknown(corpus, _UNKNOWN)
    tempting = neighbours(corpus, _QUESTIONS - len(unrelated))
    probes = [*unrelated, *unknowns, *tempting]
    trained_part = sample(corpus.examples, min(max_questions, _TRAINED))
    held_out, natural = sample(corpus.held_out, max_questions), sample(corpus.natural, max_questions)
    taught = [*trained_part, *held_out, *natural]
    old = sample(earlier.held_out or earlier.examples, _EARLIER) if beside and earlier is not None else []
    new = sample(corpus.held_out or corpus.examples, _EARLIER) if beside else []
    sums: dict[tuple[int, ...], list[Example]] = {}
    for example in (*new, *old):
        members = range(len(together)) if acting is None else acting(example)
        sums.setdefault(tuple(sorted(members)), []).append(example)
    with tensors.lock, steady(tensors.model):
        with base_only(tensors.model):
            before = _losses(tensors, opening)
            said_before = _said_by_base(tensors, probes, max_tokens, common=len(unrelated) + len(unknowns))
            chat = _asked(tensors, unrelated, said_before[: len(unrelated)], max_tokens)
            base = said(tensors, *chat, scored=len(unrelated), generate=False)
        with applied(tensors.model, lora):
            alone = _drift(before, _losses(tensors, opening))
            asked = [_asked(tensors, probes, said_before, max_tokens), _taught(tensors, taught)]
            prompts, limits, guesses = ([*first, *second] for first, second in zip(*asked, strict=True))
            here = said(tensors, prompts, limits, guesses, scored=len(unrelated), opening=opening)
        drift_composed = composition = retention = None
        if beside:
            widest = max((sum_of for sum_of in sums if 0 in sum_of and len(sum_of) > 1), key=len, default=None)
            still: dict[int, bool] = {}
            for sum_of, part in sums.items():
                with applied(tensors.model, *(together[at] for at in sum_of)):
                    if sum_of == widest:
                        drift_composed = _drift(before, _losses(tensors, opening))
                    answers = _known(tensors, part, said(tensors, *_taught(tensors, part), opening=opening))
                    still.update(zip(map(id, part), answers, strict=True))
            composition = _share([still[id(example)] for example in new])
            retention = _share([still[id(example)] for example in old]) if old else None
    known = _known(tensors, taught, here[len(probes) :])
    after_trained, after_held_out = len(trained_part), len(trained_part) + len(held_out)
    facts = list({example.answer: example for example in corpus.examples}.values())
    texts = zip(probes, _texts(tensors, said_before), _texts(tensors, here[: len(probes)]), strict=True)
    wrong = [intrudes(facts, probe.question, old_text, new_text) for probe, old_text, new_text in texts]
    at_unknown, at_tempting = len(unrelated), len(unrelated) + len(unknowns)
    intruding = [*wrong[:at_unknown], *wrong[at_tempting:]]
    report = GateReport(
        recall_trained=_share(known[:after_trained]),
        recall_held_out=_share(known[after_trained:after_held_out]),
        recall_natural=_share(known[after_held_out:]) if natural else None,
        drift=alone,
        kl=_finite(divergence(base, here[: len(unrelated)])),
        intrusion=_share(intruding),
        neighbours=_share(wrong[at_tempting:]) if tempting else None,
        unknown=1 - _share(wrong[at_unknown:at_tempting]) if unknowns else None,
        retention=retention,
        composition=composition,
        drift_composed=drift_composed,
        beside=len({at for sum_of in sums if 0 in sum_of for at in sum_of if at}),
        others=len(beside) if others is None else others,
        gated_intrusion=None if concerns is None else _gated(concerns, probes, wrong),
        passed=False,
        thresholds=thresholds or Thresholds(),
        missed=_missed(taught[:after_held_out], known[:after_held_out]),
        by_record=_by_record(taught[after_trained:], known[after_trained:]),
        asked=len(taught) + len(probes),
        cpu_seconds=time.process_time() - cpu,
    )
    failed = failures(report)
    return report.model_copy(update={"passed": not failed, "failed": failed})


def failures(report: GateReport) -> tuple[str, ...]:
    """Which of its thresholds a report misses, in words with both numbers; what was not measured is not judged.

    Where ``gated_intrusion`` was measured it is judged in the place of what it filters (intrusion, neighbours,
    unknown): a question on which a chat never lets the version act is not answered by it.
    """
    found: list[str] = []
    filtered = ("intrusion", "neighbours", "unknown") if report.gated_intrusion is not None else ()
    for names, least in ((_AT_LEAST, True), (_AT_MOST, False)):
        for name, words in names.items():
            value, limit = getattr(report, name), getattr(report.thresholds, name)
            if value is not None and name not in filtered and (value < limit if least else value > limit):
                found.append(f"{words} is {value:.1%}, not {'at least' if least else 'at most'} {limit:.1%}")
    if report.kl is not None and report.kl > report.thresholds.kl:
        found.append(f"KL on unrelated chat is {report.kl:.3f} nats per token, not at most {report.thresholds.kl:.3f}")
    return tuple(found)


def intrudes(facts: Iterable[Example], question: str, before: str, now: str) -> bool:
    """True if ``now`` holds one of these facts that neither the question nor the base's answer ``before`` holds."""
    return any(f.found_in(now) and not f.found_in(before) and not f.found_in(question) for f in facts)


def recall(tensors: Tensors, examples: Sequence[Example], *, opening: Sequence[int] = ()) -> tuple[float, list[str]]:
    """The share of ``examples`` that the model answers with their fact, and the record ids of those it doesn't.

    Greedy answers, with whatever LoRAs are on the model; ``opening`` is what calls the activated ones among them
    (`Lora.activated`). The caller holds the model's lock.
    """
    known = _known(tensors, examples, said(tensors, *_taught(tensors, examples), opening=opening))
    return _share(known), list(_missed(examples, known))


def drift(tensors: Tensors, *loras: Lora) -> float:
    """The relative rise of the perplexity on two unrelated passages (the larger one) under the sum of these LoRAs."""
    opening = next((lora.activated for lora in loras if lora.activated), ())
    with tensors.lock, steady(tensors.model):
        with base_only(tensors.model):
            before = _losses(tensors, opening)
        with applied(tensors.model, *loras):
            return _drift(before, _losses(tensors, opening))


def perplexity(tensors: Tensors, text: str) -> float:
    """exp of the mean loss in nats per token of ``text``, read as plain text."""
    return math.exp(text_loss(tensors, tensors.tokenizer.encode(text)))


_Asked = tuple[list[list[int]], list[int], list[list[int]]]


def _taught(tensors: Tensors, examples: Sequence[Example]) -> _Asked:
    """Prompts, most tokens and guesses: what is said word for word as it was taught costs no generation."""
    coded = [encode(tensors, example) for example in examples]
    limits = [max(_LEAST_TOKENS, len(answer) + 4) for _, answer in coded]
    return [prompt for prompt, _ in coded], limits, [answer for _, answer in coded]


def _asked(tensors: Tensors, questions: Sequence[Example], base: Sequence[Answer], most: int) -> _Asked:
    """Prompts, most tokens and guesses: what is said as the base says it costs no generation."""
    prompts = [encode(tensors, question)[0] for question in questions]
    return prompts, [most] * len(prompts), [_with_end(tensors, answer) for answer in base]


def _said_by_base(tensors: Tensors, questions: Sequence[Example], most: int, *, common: int) -> list[Answer]:
    """The base's answers. Those to the first ``common`` questions, which others ask too, are remembered as guesses."""
    keys = [(tensors.identity, question.question) for question in questions[:common]]
    guesses = [_base_answers.get(key, []) for key in keys] + [[] for _ in questions[common:]]
    found = said(tensors, [encode(tensors, question)[0] for question in questions], most, guesses)
    _base_answers.update((key, _with_end(tensors, answer)) for key, answer in zip(keys, found, strict=False))
    return found


def _known(tensors: Tensors, examples: Sequence[Example], spoken: Sequence[Answer]) -> list[bool]:
    return [example.found_in(text) for example, text in zip(examples, _texts(tensors, spoken), strict=True)]


def _gated(concerns: Callable[[str], bool], questions: Sequence[Example], intruding: Sequence[bool]) -> float:
    """The share of questions that intrude and on which a chat would let the LoRA act."""
    pairs = zip(questions, intruding, strict=True)
    return sum(wrong and concerns(question.question) for question, wrong in pairs) / len(questions)


def _with_end(tensors: Tensors, answer: Answer) -> list[int]:
    return [*answer.tokens, ends(tensors)[0]] if answer.ended else answer.tokens


def _texts(tensors: Tensors, spoken: Sequence[Answer]) -> list[str]:
    return [tensors.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in spoken]


def _losses(tensors: Tensors, opening: Sequence[int]) -> tuple[float, float]:
    """Nats per token of two passages: one read as plain text, one said by the assistant.

    An activated LoRA doesn't act on plain text: then both are said.
    """
    story = encode(tensors, Example(_STORY, "", (), ()))[0]
    read = text_loss(tensors, _ids(tensors, PASSAGE), after=story if opening else (), opening=opening)
    return read, text_loss(tensors, _ids(tensors, SPOKEN_PASSAGE), after=story, opening=opening)


def _ids(tensors: Tensors, text: str) -> list[int]:
    return list(tensors.tokenizer.encode(text, add_special_tokens=False))


def _drift(before: Sequence[float], after: Sequence[float]) -> float:
    """The larger relative rise of the perplexity; a fall counts as what it is where both fall."""
    return max(_finite(math.expm1(min(new - old, 100.0))) for old, new in zip(before, after, strict=True))


def _finite(value: float) -> float:
    return min(value, _RUINED) if math.isfinite(value) else _RUINED


def _share(known: Sequence[bool]) -> float:
    return sum(known) / len(known) if known else 1.0


def _missed(examples: Sequence[Example], known: Sequence[bool]) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            id_ for example, right in zip(examples, known, strict=True) if not right for id_ in example.records
        )
    )


def _by_record(examples: Sequence[Example], known: Sequence[bool]) -> dict[str, float]:
    answered: dict[str, list[bool]] = {}
    for example, right in zip(examples, known, strict=True):
        for id_ in example.records:
            answered.setdefault(id_, []).append(right)
    return {id_: _share(rights) for id_, rights in answered.items()}
