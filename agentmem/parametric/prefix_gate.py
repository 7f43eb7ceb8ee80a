"""Decides whether a trained prefix may stand for the head that it was distilled from.

Knows the questions that it was not trained on and what is compared: the whole head, nothing, and the head cut to the
same length. Knows nothing of training, pages or scopes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from agentmem.types import Value

from .lora import base_only
from .prefix import Lesson, Reader, States, TrainedStates
from .train import Tensors, steady

if TYPE_CHECKING:
    import torch

__all__ = ["LIMITS", "UNRELATED", "PrefixGate", "PrefixThresholds", "TrainedPrefix", "judge"]

#: General questions for which a prefix must change nothing; none of them is a lesson or an anchor of the corpus.
UNRELATED = (
    "What is the capital of France?",
    "Who painted the Mona Lisa?",
    "Recommend a city for a holiday.",
    "What is a healthy breakfast?",
    "Explain in one sentence what a volcano is.",
    "How do I sharpen a kitchen knife?",
    "Write a polite reply to a late invitation.",
    "What is twelve times eleven?",
)
#: Tokens of the answer to each.
_SAID = 12
#: Questions about the records, at most; of more an even sample is asked.
_MOST = 64


class PrefixThresholds(Value):
    """What a trained prefix must reach.

    A gap of 0.05 nats makes an answer's token 5 % less likely: less than what the wording of a question does. The
    bound on unrelated chat is the one that LoRA versions have.
    """

    gap: float = Field(default=0.05, description="nats per token of gold answers, at most, below the whole head")
    kl: float = Field(default=0.06, description="largest KL to the whole head on unrelated questions, nats per token")
    lost: float = Field(
        default=0.5, description="nats per token by which no record's answers may fall below the whole head's"
    )


LIMITS = PrefixThresholds()


class PrefixGate(Value):
    """What was measured, on questions in wordings that were not trained.

    ``ll_full``, ``ll_trained``, ``ll_truncated`` and ``ll_none`` are log-likelihoods of the gold answers in nats per
    token: behind the whole head, behind the trained prefix, behind the head cut to as many tokens, and without what it
    says. ``agreement`` is the share of answer tokens at which trained and whole head expect the same next token,
    ``kl_unrelated`` is KL(whole || trained) per token of the model's own answers to unrelated questions. ``weaker``
    are ids of records whose answers fell by more than `PrefixThresholds.lost`.
    """

    ll_full: float
    ll_trained: float
    ll_truncated: float
    ll_none: float
    agreement: float
    kl_unrelated: float
    weaker: tuple[str, ...] = ()
    asked: int = 0
    failed: tuple[str, ...] = ()
    thresholds: PrefixThresholds = LIMITS
    cpu_seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it may be used."""
        return not self.failed

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "failed (" + "; ".join(self.failed) + ")"
        return (
            f"{verdict}: gold answers {self.ll_trained:.2f} nats per token, whole head {self.ll_full:.2f}, cut to the "
            f"same length {self.ll_truncated:.2f}, without {self.ll_none:.2f}; KL on unrelated {self.kl_unrelated:.3f}"
        )


class TrainedPrefix(Value):
    """A trained prefix: ``tokens`` KV states for the ``stands_for`` tokens that a scope's prompts begin with.

    It answers in their place as long as a prompt begins with exactly these: a core block that changed is simply read in
    full again. One that failed its gate is not kept: its ``digest`` is empty. ``records`` are the ids of what it was
    made from: forgetting one of them deletes it. ``cpu_seconds`` is what distilling took, the gate not included.
    """

    name: str
    digest: str
    tokens: int
    stands_for: int
    records: tuple[str, ...]
    gate: PrefixGate
    bytes: int = 0
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}: {self.tokens} positions for {self.stands_for} tokens; {self.gate}"


def judge(
    tensors: Tensors,
    trained: TrainedStates,
    questions: Sequence[Lesson],
    unrelated: Sequence[Lesson],
    *,
    truncated: Sequence[int],
    nothing: Sequence[int],
    thresholds: PrefixThresholds | None = None,
) -> PrefixGate:
    """Compare a trained prefix with the whole head on ``questions``, which have gold answers and were not trained.

    ``truncated`` and ``nothing`` are the tokens of two other heads to compare with: what of it fits into as many
    tokens, and one without what it says. Holds the model's lock; the model is as before afterwards.
    """
    import torch

    limits = thresholds or LIMITS
    cpu = time.process_time()
    asked = [questions[i * len(questions) // min(_MOST, len(questions))] for i in range(min(_MOST, len(questions)))]
    with tensors.lock, steady(tensors.model), base_only(tensors.model), torch.inference_mode():
        reader = Reader(tensors)
        whole, short = reader.read(trained.head), trained.states(reader.device)
        full, full_top = _gold(reader, whole, asked)
        got, got_top = _gold(reader, short, asked)
        cut, _ = _gold(reader, reader.read(truncated), asked)
        none, _ = _gold(reader, reader.read(nothing), asked)
        apart = _apart(reader, whole, short, reader.greedy(whole, unrelated, _SAID))
    same = [a == b for one in asked for a, b in zip(full_top[one], got_top[one], strict=True)]
    weaker = dict.fromkeys(
        record for one in asked for record in one.records if _mean(full[one]) - _mean(got[one]) > limits.lost
    )
    # Two wordings of a question: a record is weaker only where both say so.
    kept = {r for one in asked for r in one.records if _mean(full[one]) - _mean(got[one]) <= limits.lost}
    report = PrefixGate(
        ll_full=_total(full),
        ll_trained=_total(got),
        ll_truncated=_total(cut),
        ll_none=_total(none),
        agreement=sum(same) / len(same),
        kl_unrelated=apart,
        weaker=tuple(record for record in weaker if record not in kept),
        asked=len(asked),
        thresholds=limits,
        cpu_seconds=time.process_time() - cpu,
    )
    return report.model_copy(update={"failed": tuple(_failed(report))})


def _failed(report: PrefixGate) -> list[str]:
    limits, failed = report.thresholds, []
    gap = report.ll_full - report.ll_trained
    if not gap <= limits.gap:
        failed.append(f"gold answers are {gap:.3f} nats per token less likely, at most {limits.gap:g}")
    if not report.kl_unrelated <= limits.kl:
        failed.append(f"the KL on unrelated questions is {report.kl_unrelated:.3f}, at most {limits.kl:g}")
    if report.weaker:
        failed.append(f"{len(report.weaker)} records lost more than {limits.lost:g} nats per token")
    return failed


def _gold(
    reader: Reader, states: States, asked: Sequence[Lesson]
) -> tuple[dict[Lesson, list[float]], dict[Lesson, list[int]]]:
    """Log-likelihood of each gold token behind these states, and the token expected there."""
    import torch

    gold: dict[Lesson, list[float]] = {}
    expected: dict[Lesson, list[int]] = {}
    for batch in reader.batches(asked, states[0][0].shape[2]):
        said = reader.answered(states, batch).log_softmax(-1)
        wanted = torch.tensor([token for one in batch for token in one.answer], device=said.device)
        likely = said.gather(1, wanted[:, None])[:, 0].tolist()
        top = said.argmax(-1).tolist()
        at = 0
        for one in batch:
            end = at + len(one.answer)
            gold[one], expected[one] = likely[at:end], top[at:end]
            at = end
    return gold, expected


def _apart(reader: Reader, whole: States, short: States, said: Sequence[Lesson]) -> float:
    """KL(whole || short) per token of these answers."""
    total, count = 0.0, 0
    for batch in reader.batches(said, whole[0][0].shape[2]):
        wanted: torch.Tensor = reader.answered(whole, batch).log_softmax(-1)
        got = reader.answered(short, batch).log_softmax(-1)
        total += float((wanted.exp() * (wanted - got)).sum())
        count += len(wanted)
    return total / max(1, count)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _total(gold: dict[Lesson, list[float]]) -> float:
    values = [value for one in gold.values() for value in one]
    return sum(values) / len(values)
