"""The settings of a training run, and which of them are taken for a model of a given size.

Pure numbers: knows nothing of tensors. tests/benchmarks/lora_ablation.py measures each choice on the 135M model; what
is said of larger ones is reasoned from the literature, and marked so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from agentmem.errors import InvalidInput

__all__ = ["Recipe", "recipe_for"]

#: Parameters of the model that the defaults were measured on.
_MEASURED = 134_515_008


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run. ``threshold`` is the loss in nats below which an answer token counts as known."""

    rank: int = 8
    alpha: float = 16.0
    #: Part of the layers that is trained, from the top.
    layers: float = 0.4
    #: Which Linear modules of a layer: all of them, or those of its MLP.
    modules: Literal["all", "mlp"] = "all"
    #: Acts only from the opening of the answer on (aLoRA, arXiv 2504.12397): the question's states stay the base's.
    activated: bool = True
    rate: float = 3e-3
    #: Examples a step.
    batch: int = 18
    #: Anchors a step, and the weight of their KL term (each direction).
    anchors: int = 24
    kl_weight: float = 4.0
    #: Tokens of the base's own answer to an anchor that are held still.
    anchor_tokens: int = 8
    threshold: float = 0.1
    #: The divergence in nats below which a token of an anchor counts as unmoved and gives no gradient.
    anchor_threshold: float = 0.02
    warmup: int = 2
    #: Times that every example is seen, at most.
    epochs: int = 14
    #: A few facts are known after a few steps; the rest need some more of them to come to stand still again.
    least_steps: int = 32
    clip: float = 1.0
    #: The run ends when all is known and the anchors are on average no further than this from the base (nats a token,
    #: both directions).
    still: float = 0.03
    #: What the finished weights are multiplied by: below 1 a part of the way back to the base, as WiSE-FT goes
    #: (arXiv 2109.01903). Intrusion and divergence fall sooner than recall does; this recipe's need none of it.
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1 or self.anchors < 1 or not 0 < self.layers <= 1 or self.rate <= 0:
            raise InvalidInput(f"{self} can't be trained by: rank, batch and anchors are at least 1, layers in (0, 1]")
        if not 0 < self.scale <= 1:
            raise InvalidInput(f"scale is {self.scale}: above 0 and at most 1")
        if self.modules not in ("all", "mlp"):
            raise InvalidInput(f"modules is {self.modules!r}: 'all' or 'mlp'")


def recipe_for(parameters: int, *, activated: bool = True) -> Recipe:
    """The recipe for a model of so many parameters.

    Measured at 135M. For larger models only the rate changes, and is reasoned: the best rate of a LoRA hardly depends
    on its rank and falls with the width to the power 0.78 (LoRA Without Regret, Thinking Machines 2025, fitted on
    Llama models), and the width grows with about the cube root of the parameters.
    """
    rate = Recipe.rate * (_MEASURED / max(parameters, _MEASURED)) ** (0.78 / 3)
    return Recipe(activated=activated, rate=rate)
