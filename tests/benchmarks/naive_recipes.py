"""Two recipes that look right and ruin a model: what the gate must reject, and what the benchmark compares with.

Recipe A trains on the sentences themselves, as a plain "train on the memories" does; recipe C on questions and answers
with LoRA on every Linear of every layer. Neither holds anything still. They are those of measured trials on the small
model: A knows next to nothing afterwards, C knows all of it and says it to whatever it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from agentmem.parametric.corpus import Corpus
from agentmem.parametric.lessons import Tensors, encode, steady
from agentmem.parametric.lora import Delta, Lora, base_only
from agentmem.parametric.probes import sample

__all__ = ["raw_text", "whole_model"]

_RANK, _ALPHA, _RATE = 8, 16.0, 2e-3


def raw_text(tensors: Tensors, texts: Sequence[str], *, steps: int = 16) -> Lora:
    """Recipe A: loss on every token of the raw sentences, LoRA on q and v of all layers."""
    read = [list(tensors.tokenizer.encode(text)) for text in texts]
    return _learnt(tensors, [[(ids[:1], ids[1:]) for ids in read]], r"q_proj|v_proj", steps)


def whole_model(tensors: Tensors, corpus: Corpus, *, steps: int = 24) -> Lora:
    """Recipe C: loss on the answers of three wordings a fact, LoRA on all Linears of all layers, no KL."""
    chosen = [encode(tensors, example) for example in sample(corpus.examples, 3 * corpus.facts)]
    return _learnt(tensors, [chosen[at::3] for at in range(3)], r"q|k|v|o|gate|up|down", steps)


def _learnt(
    tensors: Tensors, batches: Sequence[Sequence[tuple[list[int], list[int]]]], modules: str, steps: int
) -> Lora:
    """AdamW over (prompt, answer) batches in turn, with loss on the answers alone."""
    model, chance = tensors.model, torch.Generator().manual_seed(0)
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    hooks: list[Any] = []
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or re.search(rf"\.(?:{modules})(?:_proj)?$", path) is None:
            continue
        a = (torch.rand(_RANK, module.in_features, generator=chance) * 2 - 1) / module.in_features**0.5
        b = torch.zeros(module.out_features, _RANK)
        weights[path] = (a.requires_grad_(), b.requires_grad_())

        def hook(layer: Any, inputs: Any, output: Any, path: str = path) -> Any:
            down, up = weights[path]
            return Delta(down.t(), up.t() * (_ALPHA / _RANK))(layer, inputs, output)

        hooks.append(module.register_forward_hook(hook))
    optimizer = torch.optim.AdamW([weight for pair in weights.values() for weight in pair], lr=_RATE, weight_decay=0.0)
    padded = [_padded(batch) for batch in batches]
    try:
        with tensors.lock, steady(model), base_only(model):
            for step in range(steps):
                ids, targets = padded[step % len(padded)]
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
                wanted = targets[:, 1:] >= 0
                optimizer.zero_grad()
                functional.cross_entropy(logits[wanted].float(), targets[:, 1:][wanted]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        for handle in hooks:
            handle.remove()
    return Lora(_RANK, _ALPHA, tensors.name, {path: (a.detach(), b.detach()) for path, (a, b) in weights.items()})


def _padded(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, targets) [rows, longest]; padding on the right, -1 where nothing is to be predicted."""
    longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = [[*prompt, *answer, *[0] * (longest - len(prompt) - len(answer))] for prompt, answer in pairs]
    targets = [
        [*[-1] * len(prompt), *answer, *[-1] * (longest - len(prompt) - len(answer))] for prompt, answer in pairs
    ]
    return torch.tensor(ids), torch.tensor(targets)
