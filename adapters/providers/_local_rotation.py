"""Moving stored states to other positions by turning their keys, or the queries that meet them; for which models.

Knows rotary positions in the rotate-half layout (RoFormer, Su et al. 2021, arXiv 2104.09864, as transformers lays it
out) and how to prove on a model that turning is what it does; knows nothing of records or prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ._local_kv import STEADY_ROPE, ropes

if TYPE_CHECKING:
    from ._local_generate import Engine

__all__ = ["DISTANCES", "Rotation", "rotation", "unlike"]

#: Distances at which a stretch is moved for the proof.
DISTANCES = (50, 777)
#: Tokens of that stretch, and of what is computed behind it.
_STRETCH, _THEN = 24, 8
#: How far the logits may be from the model's own path: their largest difference, in their standard deviations.
_BOUND = 0.25


@dataclass(frozen=True)
class Rotation:
    """The rotary frequencies that all layers of a model share, float64 [pairs]."""

    frequencies: torch.Tensor

    def angles(self, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 [pairs], of what ``distance`` positions turn."""
        angles = self.frequencies * distance
        return angles.cos().float(), angles.sin().float()

    def turned(self, keys: torch.Tensor, distance: int) -> torch.Tensor:
        """Keys [..., dim] as they are ``distance`` positions further on. Channels behind the pairs stay."""
        cosine, sine = (part.to(keys.device) for part in self.angles(distance))
        pairs = len(cosine)
        wide = keys.float()
        first, second = wide[..., :pairs], wide[..., pairs : 2 * pairs]
        turned = (first * cosine - second * sine, second * cosine + first * sine, wide[..., 2 * pairs :])
        return torch.cat(turned, dim=-1).to(keys.dtype)


def rotation(model: Any) -> tuple[Rotation, str | None]:
    """A model's rotation, and why it can't be used, if it can't: every layer must turn by the same steady angles and
    see all positions."""
    none = Rotation(torch.empty(0))
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ())
    if (kinds - {"full_attention"}) or (not kinds and getattr(config, "sliding_window", None)):
        return none, "it has layers that don't see all positions"
    found = [str(rope.get("rope_type", rope.get("type", "default"))) for rope in ropes(config)]
    if any(kind not in STEADY_ROPE for kind in found):
        return none, f"its rotary positions ({', '.join(found)}) depend on the length of the prompt"
    buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "inv_freq"]
    if not buffers:
        return none, "it has no rotary positions"
    if any(not torch.equal(buffer, buffers[0]) for buffer in buffers[1:]):
        return none, "its layers turn by different angles"
    return Rotation(buffers[0].detach().double().cpu()), None


@torch.inference_mode()
def unlike(turning: Rotation, engine: Engine) -> str | None:
    """Why turned keys are not what this model would compute; None if they are.

    A stretch of 24 tokens is computed at position 0 and moved by each of `DISTANCES`; the logits of 8 tokens behind it
    are compared with those behind the same stretch computed there, by the model's own ``position_ids``. They may differ
    by a quarter of their standard deviation: a difference of rounding, where wrong angles give several.
    """
    if len(set(engine.states.shapes)) > 1:
        return "its layers have several shapes"
    size = int(engine.loaded.model.get_input_embeddings().num_embeddings)
    ids = [(7919 * i + 13) % size for i in range(_STRETCH + _THEN)]

    def at(first: int, count: int) -> dict[str, torch.Tensor]:
        return {"position_ids": torch.arange(first, first + count, device=engine.loaded.device)[None]}

    for wished in DISTANCES:
        distance = min(wished, (engine.window or wished + len(ids)) - len(ids))
        wanted, got = engine.states.empty(len(ids)), engine.states.empty(len(ids))
        engine.forward(ids[:_STRETCH], wanted, (), None, inputs=at(distance, _STRETCH))
        engine.forward(ids[:_STRETCH], got, (), None, inputs=at(0, _STRETCH))
        for layer in got.layers:
            layer.place(0, turning.turned(layer.keys[0], distance), layer.values[0].clone())
        logits = [
            engine.forward(ids[_STRETCH:], cache, (), None, keep=_THEN, inputs=at(distance + _STRETCH, _THEN))[0]
            for cache in (wanted, got)
        ]
        apart = float((logits[0] - logits[1]).abs().max() / logits[0].std())
        if not apart <= _BOUND:
            return f"its positions can't be moved by turning keys (logits are {apart:.2f} deviations off)"
    return None
