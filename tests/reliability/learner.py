"""A memory whose training is scripted: tiny weights drawn from the corpus in microseconds, a gate that says what it is
told. All else is real: corpus, shards, checkpoints, files, rows, activation, forgetting.

`live` is a process that learns, forgets and changes without end, saying what it did; for tests that kill it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from agentmem import Memory
from agentmem.errors import TrainingError
from agentmem.parametric.corpus import Corpus, Example
from agentmem.parametric.gate import GateReport, Thresholds
from agentmem.parametric.lora import Lora
from agentmem.parametric.selfstudy import Study
from agentmem.parametric.steps import Estimate, Point
from agentmem.parametric.train import Trained
from agentmem.provider import Capabilities
from agentmem.testing import ScriptedProvider

__all__ = ["FACTS", "IDENTITY", "Teachable", "learning", "live", "memory_of"]

IDENTITY = b"\xab" * 32
FACTS = (
    "My dog is called Biscuit.",
    "I live in Tromsø.",
    "My lucky number is 417.",
    "My favourite tea is sencha.",
    "I'm allergic to peanuts.",
    "My sister's name is Oona.",
    "I work as a glaciologist.",
)


class Teachable(ScriptedProvider):
    """A scripted provider that says it shows its weights. ``dropped`` are the LoRA versions that it let go of."""

    def __init__(self, *, activated: bool = False) -> None:
        can = Capabilities(chat=True, loras=True, trains=True, activated_loras=activated, summed_loras=True)
        super().__init__("ok", capabilities=can)
        self.dropped: list[str] = []
        model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model.config = SimpleNamespace(_attn_implementation="sdpa")
        self._tensors = SimpleNamespace(
            model=model, tokenizer=None, lock=threading.RLock(), identity=IDENTITY, name="tiny"
        )

    def tensors(self) -> Any:
        """What stands for the model."""
        return self._tensors

    def drop_loras(self, digests: Sequence[str]) -> None:
        """Note what is to be dropped."""
        self.dropped += digests


def memory_of(folder: Path | str, provider: Teachable | None = None, **settings: Any) -> Memory:
    """A memory over it, with no embedder."""
    return Memory(folder, model=provider or Teachable(), embedder="none", **settings)


@contextlib.contextmanager
def learning(
    *,
    passes: Callable[[Corpus], bool] = lambda corpus: True,
    step: Callable[[int], object] = lambda number: None,
    steps: int = 3,
    intrusion: float = 0.0,
) -> Generator[list[Corpus]]:
    """Inside, training is scripted. Yields the corpora that were trained, in order. ``step`` is called at each step,
    ``intrusion`` is what the gate measures where nothing filters what a version answers."""
    taught: list[Corpus] = []

    def train(
        tensors: Any,
        corpus: Corpus,
        *,
        seed: int,
        stop: Callable[[], bool],
        checkpoint: Path | None,
        recipe: Any,
        **_: Any,
    ) -> Trained:
        taught.append(corpus)
        begun = int(checkpoint.read_text()) if checkpoint is not None and checkpoint.exists() else 0
        for number in range(begun, steps):
            if stop():
                raise TrainingError(f"training was stopped after step {number}: nothing was kept")
            step(number)
            if checkpoint is not None:
                checkpoint.write_text(str(number + 1))
        told = repr((sorted(corpus.records.items()), seed)).encode()
        chance = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(told).digest()[:7], "big"))
        pair = torch.randn(2, 8, generator=chance), torch.randn(8, 2, generator=chance)
        lora = Lora(2, 4.0, "tiny", {"0": pair}, {"base": IDENTITY.hex(), "records": hashlib.sha256(told).hexdigest()})
        point = Point(step=steps, loss=0.1, known=1.0, cpu_seconds=0.0)
        return Trained(
            lora, (0.1,), 0.5, 0.5, seed, 2, {"rank": 2}, IDENTITY.hex(), "tiny", dict(corpus.records), (point,)
        )

    def gate(
        tensors: Any, trained: Any, corpus: Corpus, *, thresholds: Thresholds, concerns: Any = None, **_: Any
    ) -> GateReport:
        passed = passes(corpus)
        return GateReport(
            recall_trained=1,
            recall_held_out=1,
            drift=0.0 if passed else 9.0,
            intrusion=intrusion,
            gated_intrusion=None if concerns is None else 0.0,
            passed=passed,
            thresholds=thresholds,
            by_record=dict.fromkeys(corpus.records, 1.0),
        )

    def recall(tensors: Any, examples: Sequence[Example], **_: Any) -> tuple[float, list[str]]:
        """The share that whatever LoRA acts on the model was taught; of scripted ones it knows the weights by heart."""
        acting = bool(tensors.model[0]._forward_hooks)
        known = {(e.question, e.answer) for e in taught[-1].examples} if acting and taught else set()
        found = [example for example in examples if (example.question, example.answer) in known]
        return len(found) / len(examples), []

    with (
        mock.patch("agentmem.parametric.train.train", train),
        mock.patch("agentmem.parametric.train.estimate", return_value=Estimate(steps, 0.1, 1000)),
        mock.patch("agentmem.parametric.selfstudy.study", return_value=Study((), 0.0, "it is scripted")),
        mock.patch("agentmem.parametric.gate.gate", gate),
        mock.patch("agentmem.parametric.gate.recall", recall),
    ):
        yield taught


def live(folder: str, seed: int, connection: Connection) -> None:
    """Learn, forget, change and train again, until killed. Before each change it says what it will do, after it what is
    active."""
    chance = random.Random(seed)
    with learning(steps=2), memory_of(folder, lora_shard=3, lora_budget=40_000) as memory:
        ana = memory.scope(user="ana")
        for said in _changes(ana, chance):
            connection.send(json.dumps(said))


def _changes(ana: Any, chance: random.Random) -> Iterator[dict[str, Any]]:
    number = chance.randrange(10**9)
    while True:
        number += 1
        held = [record.id for record in ana.list(limit=100)]
        kind = chance.choice(["train", "forget", "update", "retrain", "rollback"]) if len(held) >= 5 else "learn"
        yield {"active": [version.digest for version in ana.parametric.active()], "doing": kind}
        one = chance.choice(held or [""])
        if kind == "learn":
            ana.add([f"My {thing} is called Ob{number}{thing}." for thing in ("dog", "cat", "boat")])
            with contextlib.suppress(ValueError):
                ana.parametric.train(seed=chance.randrange(3))
        elif kind == "train":
            with contextlib.suppress(ValueError):
                ana.parametric.train(records=chance.sample(held, 3), seed=chance.randrange(3))
        elif kind == "forget":
            ana.forget(one)
            yield {"forgot": one}
        elif kind == "update":
            ana.update(one, text=f"My dog is called Ob{number}.")
        elif kind == "retrain":
            ana.parametric.retrain()
        else:
            ana.parametric.rollback()
