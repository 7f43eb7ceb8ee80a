"""Trains a LoRA on a corpus, on the model that is already loaded, and leaves that model as it was.

Knows what a run is asked for and what comes of it; knows nothing of records, scopes or registry. Loss on answers only;
LoRA on the top layers, over states that are computed once (states.py); KL to the base model's own answers on other
questions, so that the rest stays still; what is already known is dropped (token threshold, arXiv 2605.30260).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentmem.errors import InvalidInput

from .corpus import Corpus
from .lessons import Tensors, answers, encode, ends, steady
from .lora import Lora, base_only
from .recipe import Recipe, recipe_for
from .steps import Estimate, Point, Run

__all__ = [
    "Estimate",
    "Point",
    "Recipe",
    "Tensors",
    "Trained",
    "answers",
    "encode",
    "ends",
    "estimate",
    "steady",
    "train",
]


@dataclass(frozen=True)
class Trained:
    """A trained LoRA in memory and how it came about. ``losses`` holds the answer loss of each step, in nats per token.

    ``records`` maps the ids of the records that it learnt to the digests of their content. ``cpu_seconds`` counts the
    whole process while it trained, ``seconds`` is wall time. ``reproducible``: the same corpus, recipe, seed, thread
    count and versions give the same weights. ``peak_bytes`` is what the run held beyond the model: states, weights,
    optimizer, activations of a step.
    """

    lora: Lora
    losses: tuple[float, ...]
    cpu_seconds: float
    seconds: float
    seed: int
    epochs: int
    recipe: dict[str, Any]
    identity: str
    base: str
    records: dict[str, str]
    curve: tuple[Point, ...] = ()
    reproducible: bool = True
    peak_bytes: int = 0

    @property
    def activated(self) -> bool:
        """Whether it acts only from the opening of an answer on."""
        return bool(self.lora.activated)


def train(
    tensors: Tensors,
    corpus: Corpus,
    *,
    seed: int = 0,
    epochs: int | None = None,
    recipe: Recipe | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    checkpoint: Path | None = None,
    keep: bool = False,
    ram_budget: int | None = None,
) -> Trained:
    """Teach ``corpus`` to a new LoRA; the model itself is unchanged afterwards, also when this raises.

    Holds the model's lock for the whole run. ``recipe`` None takes the one measured for a model of this size,
    ``epochs`` None the recipe's; the run ends earlier when every answer is known and the rest stands still.
    ``progress(done, total)`` is called after every step. ``stop()`` is asked before each: when it says true the run
    ends.

    ``checkpoint`` is a folder (its parent exists) that keeps the run's state every few seconds, and when it is stopped:
    the same call then goes on from there and ends with the same bytes as a run that was never stopped; a checkpoint
    that is damaged or of another run is passed over. It is gone at the end, unless ``keep`` leaves it for whoever may
    be interrupted between this and storing what was trained: the same call then ends at once.

    ``ram_budget`` bounds the bytes held beyond the model: states that don't fit are computed again at each use, and a
    step is split. The same corpus, recipe, seed, budget, thread count and library versions give the same weights on a
    CPU (``Trained.reproducible``).

    Raises `InvalidInput` for an empty corpus, and `TrainingError` when the model's architecture is not understood, the
    loss is not finite, the run was stopped, or a single example does not fit the budget.
    """
    recipe, epochs = _settled(tensors, corpus, recipe, epochs)
    clock, cpu = time.monotonic(), time.process_time()
    with tensors.lock, steady(tensors.model, attention="eager"), base_only(tensors.model):
        run = Run(tensors, corpus, recipe, seed=seed, epochs=epochs, ram_budget=ram_budget)
        run.prepare()
        run.learn(progress, stop, checkpoint, keep=keep)
    if run.stopped:
        run.halt(checkpoint)
    made_from = repr(sorted(corpus.records.items()))
    notes = {"base": tensors.identity.hex(), "records": hashlib.sha256(made_from.encode()).hexdigest()}
    weights = {path: (a.detach().cpu(), b.detach().cpu() * recipe.scale) for path, (a, b) in run.stack.weights.items()}
    return Trained(
        lora=Lora(recipe.rank, recipe.alpha, tensors.name, weights, notes, run.opening),
        losses=tuple(run.losses),
        cpu_seconds=time.process_time() - cpu,
        seconds=time.monotonic() - clock,
        seed=seed,
        epochs=epochs,
        recipe=asdict(recipe),
        identity=tensors.identity.hex(),
        base=tensors.name,
        records=dict(corpus.records),
        curve=tuple(run.curve),
        reproducible=run.reproducible,
        peak_bytes=run.held + run.step_bytes,
    )


def _settled(tensors: Tensors, corpus: Corpus, recipe: Recipe | None, epochs: int | None) -> tuple[Recipe, int]:
    if not corpus.examples:
        raise InvalidInput(
            "nothing to train on: no record states something that can be asked for (see Corpus.left_out)"
        )
    if recipe is None:
        recipe = recipe_for(sum(weight.numel() for weight in tensors.model.parameters()))
    if epochs is None:
        epochs = recipe.epochs
    if epochs < 1:
        raise InvalidInput(f"epochs is {epochs}: at least 1")
    return recipe, epochs


def estimate(
    tensors: Tensors,
    corpus: Corpus,
    *,
    recipe: Recipe | None = None,
    epochs: int | None = None,
    ram_budget: int | None = None,
) -> Estimate:
    """What `train` will cost with these arguments, from one step on a few examples; the model is unchanged afterwards.

    Costs about a second for a 135M model on one core. Errors as those of `train`.
    """
    recipe, epochs = _settled(tensors, corpus, recipe, epochs)
    with tensors.lock, steady(tensors.model, attention="eager"), base_only(tensors.model):
        run = Run(tensors, corpus, recipe, seed=0, epochs=epochs, ram_budget=ram_budget)
        return run.trial()
