"""Measures a trained LoRA before it may serve: does it know the facts, and is the model otherwise what it was?

Knows how to ask and to compare; knows nothing of files, scopes or versions. Recall alone is a false friend: a recipe
can reach 100 % of it and ruin the model, so drift and intrusion decide as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from agentmem.errors import ConfigError
from agentmem.types import Value

from .corpus import Corpus, Example
from .lora import applied, base_only
from .train import Tensors, Trained, answers, encode, steady

if TYPE_CHECKING:
    from .lora import Lora

__all__ = ["PASSAGE", "UNRELATED", "GateReport", "Thresholds", "gate", "perplexity", "recall"]


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
    ``gated_intrusion`` counts only what comes out where the plaintext index lets the version act. ``retention``,
    ``composition`` and ``drift_composed`` are with the other active versions beside it. ``failed`` says in words
    which thresholds were missed, ``missed`` are ids of records whose fact did not come out in trained or held-out
    wording, ``by_record`` maps each id to the share of its held-out and natural questions answered right, ``asked``
    counts the questions. No question is kept: what is forgotten must not live on in a report.
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
        why = f" ({'; '.join(self.failed)})" if self.failed else ""
        return (
            f"{'passed' if self.passed else 'failed'}: recall {self.recall_trained:.0%} trained, "
            f"{self.recall_held_out:.0%} held out{natural}, drift {self.drift:+.1%}{kl}, "
            f"intrusion {self.intrusion:.0%}{why}"
        )


#: The opening of H. G. Wells, The War of the Worlds (1898), which is in the public domain.
PASSAGE = (
    "No one would have believed in the last years of the nineteenth century that this world was being watched "
    "keenly and closely by intelligences greater than man's and yet as mortal as his own; that as men busied "
    "themselves about their various concerns they were scrutinised and studied, perhaps almost as narrowly as a man "
    "with a microscope might scrutinise the transient creatures that swarm and multiply in a drop of water. With "
    "infinite complacency men went to and fro over this globe about their little affairs, serene in their assurance "
    "of their empire over matter. It is possible that the infusoria under the microscope do the same. No one gave a "
    "thought to the older worlds of space as sources of human danger, or thought of them only to dismiss the idea "
    "of life upon them as impossible or improbable. It is curious to recall some of the mental habits of those "
    "departed days. At most terrestrial men fancied there might be other men upon Mars, perhaps inferior to "
    "themselves and ready to welcome a missionary enterprise. Yet across the gulf of space, minds that are to our "
    "minds as ours are to those of the beasts that perish, intellects vast and cool and unsympathetic, regarded "
    "this earth with envious eyes, and slowly and surely drew their plans against us. And early in the twentieth "
    "century came the great disillusionment. The planet Mars, I scarcely need remind the reader, revolves about the "
    "sun at a mean distance of 140,000,000 miles, and the light and heat it receives from the sun is barely half of "
    "that received by this world."
)

#: Questions that no learnt fact answers; none of them is an anchor of the training (corpus.py).
UNRELATED = (
    "What is the capital of France?",
    "What is my neighbour Karl's dog called?",
    "Where does my colleague Maria live?",
    "What does my friend Omar do for work?",
    "Who painted the Mona Lisa?",
    "Recommend a city for a holiday.",
    "What is a healthy breakfast?",
    "What is the name of a well-known rock band?",
)


def gate(
    tensors: Tensors,
    trained: Trained | Lora,
    corpus: Corpus,
    *,
    thresholds: Thresholds | None = None,
    max_questions: int = 48,
    max_tokens: int = 20,
) -> GateReport:
    """Ask the model with the LoRA on it, and compare with the base. The model is as before afterwards; its lock is
    held.

    Costs two passes over a few hundred tokens and at most ``max_questions`` short greedy answers per kind of question
    (where the corpus has more, an even sample is asked). ``max_tokens`` bounds an answer to an unrelated question.
    """
    limits = thresholds or Thresholds()
    lora = trained.lora if isinstance(trained, Trained) else trained
    cpu = time.process_time()
    unrelated = [Example(text, "", (), ()) for text in UNRELATED]
    with tensors.lock, steady(tensors.model):
        with base_only(tensors.model):
            base_perplexity = perplexity(tensors, PASSAGE)
            base_said = _said(tensors, unrelated, max_tokens)
        with applied(tensors.model, lora):
            changed = perplexity(tensors, PASSAGE) / base_perplexity - 1
            said = _said(tensors, unrelated, max_tokens)
            trained_share, missed = recall(tensors, _sample(corpus.examples, max_questions), max_tokens)
            held_out_share, missed_too = recall(tensors, _sample(corpus.held_out, max_questions), max_tokens)
    facts = list({example.answer: example for example in corpus.examples}.values())
    intruded = [
        any(f.found_in(new) and not f.found_in(old) for f in facts) for new, old in zip(said, base_said, strict=True)
    ]
    report = GateReport(
        recall_trained=trained_share,
        recall_held_out=held_out_share,
        drift=changed,
        intrusion=sum(intruded) / len(intruded),
        passed=False,
        thresholds=limits,
        missed=tuple(dict.fromkeys(missed + missed_too)),
        cpu_seconds=time.process_time() - cpu,
    )
    return report.model_copy(update={"passed": _passes(report)})


def recall(tensors: Tensors, examples: Sequence[Example], max_tokens: int = 20) -> tuple[float, list[str]]:
    """The share of ``examples`` that the model answers with their fact, and the record ids of those it doesn't."""
    if not examples:
        return 1.0, []
    said = _said(tensors, examples, max_tokens)
    missed = [example for example, text in zip(examples, said, strict=True) if not example.found_in(text)]
    return 1 - len(missed) / len(examples), [id_ for example in missed for id_ in example.records]


def perplexity(tensors: Tensors, text: str) -> float:
    """exp of the mean loss in nats per token of ``text``, read as plain text."""
    import torch
    from torch.nn import functional

    ids = torch.tensor([tensors.tokenizer.encode(text)], device=tensors.model.device)
    with torch.inference_mode():
        logits = tensors.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        return math.exp(float(functional.cross_entropy(logits, ids[0, 1:])))


def _said(tensors: Tensors, examples: Sequence[Example], max_tokens: int) -> list[str]:
    coded = [encode(tensors, example) for example in examples]
    prompts = [prompt for prompt, _ in coded]
    # A long statement is given the room to be said in full.
    max_tokens = max(max_tokens, *(len(answer) + 4 for _, answer in coded))
    return [tensors.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers(tensors, prompts, max_tokens)]


def _sample(examples: Sequence[Example], most: int) -> Sequence[Example]:
    if len(examples) <= most:
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def _passes(report: GateReport) -> bool:
    limits = report.thresholds
    return (
        report.recall_trained >= limits.recall_trained
        and report.recall_held_out >= limits.recall_held_out
        and report.drift <= limits.drift
        and report.intrusion <= limits.intrusion
    )
