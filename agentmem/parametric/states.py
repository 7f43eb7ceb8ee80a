"""A model's trained layers, run alone: what enters them is computed once by the base model and kept.

Nothing below the first trained layer changes during a run, so its output is a constant of a sequence. Under an
activated LoRA (aLoRA, arXiv 2504.12397) the keys and values of the question are constants in every layer too, and only
the answer's few tokens go through the layers. Knows layers, attention masks and caches; knows nothing of losses.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agentmem.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from .lessons import Tensors
    from .recipe import Recipe

__all__ = ["Batch", "Stack", "State"]


@dataclass(frozen=True)
class State:
    """One sequence, as it enters the trained layers.

    ``inputs`` [n, width]: its tokens from ``start`` on. ``contexts``: per trained layer the base's (keys, values)
    [heads, start, head width] of the tokens before. ``calls``: per trained layer its other arguments, cut to the n
    tokens, and ``masks`` what they may look at [n, start + n]. ``positions`` in 0..n-1 predict ``targets``. ``before``
    [positions, width] is what enters the head there in the base model.
    """

    start: int
    inputs: torch.Tensor
    contexts: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    calls: tuple[dict[str, Any], ...]
    masks: tuple[torch.Tensor, ...]
    positions: torch.Tensor
    targets: torch.Tensor
    before: torch.Tensor

    @property
    def bytes(self) -> int:
        """What it holds in memory. Masks and positions that layers share are counted once."""
        held = [self.inputs, self.before, *(tensor for pair in self.contexts for tensor in pair)]
        shared = {id(tensor): tensor for tensor in (*self.masks, *_tensors(self.calls))}
        return sum(tensor.numel() * tensor.element_size() for tensor in (*held, *shared.values()))


@dataclass(frozen=True)
class Batch:
    """States side by side, padded on the right. ``rows`` and ``positions`` pick where a target is predicted."""

    inputs: torch.Tensor
    contexts: tuple[_Context, ...]
    calls: tuple[dict[str, Any], ...]
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    before: torch.Tensor


@dataclass
class _Context:
    """The keys and values before the answer, in the place where a layer expects its cache."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def get_seq_length(self, *_: object) -> int:
        return int(self.keys.shape[2])


class Stack:
    """The trained layers with the weights that are trained on them.

    ``weights[path]`` is (A [rank, in], B [out, rank]) in float32 with gradients; B is zero: it starts at the base.
    """

    def __init__(self, tensors: Tensors, recipe: Recipe, seed: int) -> None:
        import torch

        self.name, self.model, self.recipe = tensors.name, tensors.model, recipe
        self.decoder = self.model.get_decoder()
        self.layers: Any = getattr(self.decoder, "layers", None)
        self.norm: Any = getattr(self.decoder, "norm", None)
        self.head = self.model.get_output_embeddings()
        if self.layers is None or self.norm is None or self.head is None or not len(self.layers):
            raise TrainingError(
                f"{self.name} ({type(self.model).__name__}) has no layers, norm and head where Llama-like models "
                "have them: this training can't follow it"
            )
        self._checked = False
        self._acting = False
        self.first = len(self.layers) - max(1, round(len(self.layers) * recipe.layers))
        prefix = next(name for name, module in self.model.named_modules() if module is self.layers)
        chance = torch.Generator().manual_seed(seed)
        self.weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._modules: dict[str, Any] = {}
        for number in range(self.first, len(self.layers)):
            for name, module in self.layers[number].named_modules():
                if isinstance(module, torch.nn.Linear) and (recipe.modules == "all" or "mlp" in name.split(".")):
                    path = f"{prefix}.{number}.{name}"
                    self._modules[path] = module
                    self.weights[path] = self._start(module, chance)
        if not self.weights:
            raise TrainingError(f"{self.name}: its layers hold no Linear modules to train ({recipe.modules})")

    @property
    def flat(self) -> list[torch.Tensor]:
        """Every trained tensor, in a fixed order."""
        return [tensor for pair in self.weights.values() for tensor in pair]

    def _start(self, module: torch.nn.Linear, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A uniform as PEFT draws it (kaiming, a = sqrt 5), B zero."""
        import torch

        bound = 1 / math.sqrt(module.in_features)
        a = (torch.rand(self.recipe.rank, module.in_features, generator=chance) * 2 - 1) * bound
        device = module.weight.device
        b = torch.zeros(module.out_features, self.recipe.rank, device=device)
        return a.to(device).requires_grad_(), b.requires_grad_()

    @contextlib.contextmanager
    def attached(self) -> Generator[None]:
        """The trained weights act on every token that goes through `last`; off again at the end.

        In bfloat16 their products are bfloat16 too (the weights themselves stay float32): on a CPU with AVX512-BF16
        that is 4 times faster, and the rounding is a 256th of what the LoRA adds.
        """
        import torch

        scale = self.recipe.alpha / self.recipe.rank

        def hook(path: str) -> Callable[..., Any]:
            a, b = self.weights[path]

            def add(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                if not self._acting:
                    return output
                kind = output.dtype if output.dtype == torch.bfloat16 else torch.float32
                low = inputs[0].to(kind) @ a.to(kind).t()
                return (output + low @ (b * scale).to(kind).t()).to(output.dtype)

            return add

        hooks = [module.register_forward_hook(hook(path)) for path, module in self._modules.items()]
        self._acting = True
        try:
            yield
        finally:
            self._acting = False
            for handle in hooks:
                handle.remove()

    def last(self, batch: Batch) -> torch.Tensor:
        """What enters the head at the picked positions [picked, width]."""
        hidden = batch.inputs
        for layer, context, call in zip(self.layers[self.first :], batch.contexts, batch.calls, strict=True):
            past = context if context.keys.shape[2] else None
            out = layer(hidden, **call, past_key_values=past, use_cache=False)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden[batch.rows, batch.positions])  # type: ignore[no-any-return]

    def batch(self, states: Sequence[State]) -> Batch:
        """States as one batch."""
        import torch

        most = max(len(state.inputs) for state in states)
        before = max(state.start for state in states)
        masks: dict[tuple[int, ...], torch.Tensor] = {}
        calls: list[dict[str, Any]] = []
        contexts: list[_Context] = []
        merged: dict[tuple[int, ...], Any] = {}
        for number in range(len(states[0].contexts)):
            one = tuple(id(state.masks[number]) for state in states)
            if one not in masks:
                masks[one] = self._mask([state.masks[number] for state in states], before, most)
            call = {
                name: _padded([state.calls[number][name] for state in states], most, merged)
                for name in states[0].calls[number]
            }
            calls.append({**call, "attention_mask": masks[one]})
            keys, values = (
                torch.stack([_grown(state.contexts[number][which], before, 1) for state in states]) for which in (0, 1)
            )
            contexts.append(_Context(keys, values))
        device = states[0].inputs.device
        counts = torch.tensor([len(state.positions) for state in states], device=device)
        return Batch(
            inputs=torch.stack([_grown(state.inputs, most, 0) for state in states]),
            contexts=tuple(contexts),
            calls=tuple(calls),
            rows=torch.repeat_interleave(torch.arange(len(states), device=device), counts),
            positions=torch.cat([state.positions for state in states]),
            targets=torch.cat([state.targets for state in states]),
            before=torch.cat([state.before for state in states]),
        )

    def _mask(self, masks: Sequence[torch.Tensor], before: int, most: int) -> torch.Tensor:
        """Additive [rows, 1, most, before + most]. Padded tokens look at themselves, so that no row is empty."""
        import torch

        seen = torch.zeros(len(masks), most, before + most, dtype=torch.bool, device=masks[0].device)
        seen[:, :, before:] = torch.eye(most, dtype=torch.bool, device=masks[0].device)
        for row, mask in zip(seen, masks, strict=True):
            n, start = len(mask), mask.shape[1] - len(mask)
            row[:n, :start] = mask[:, :start]
            row[:n, before : before + n] = mask[:, start:]
        kind = self.model.dtype
        blocked = torch.finfo(kind).min
        return torch.zeros(seen.shape, dtype=kind, device=seen.device).masked_fill_(~seen, blocked)[:, None]

    def capture(self, sequences: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> list[State]:
        """One pass of the base model over (prompt, answer, start) each, also while the trained weights are attached.

        Sequences are padded on the right: under a causal mask nothing before the padding sees it. Raises
        `TrainingError` when the layers alone don't compute what the whole model does.
        """
        import torch

        acting, self._acting = self._acting, False
        try:
            with torch.no_grad():
                return self._captured(sequences)
        finally:
            self._acting = acting

    def _captured(self, sequences: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> list[State]:
        import torch
        from transformers import DynamicCache

        shared = _alike(sequences)
        longest = max(len(prompt) + len(answer) for prompt, answer, _ in sequences)
        ids = [[*p, *a, *[0] * (longest - len(p) - len(a))] for p, a, _ in sequences]
        inputs: list[torch.Tensor] = []
        calls: list[dict[str, Any]] = []

        def keep(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs.append(arguments[0] if arguments else named["hidden_states"])
            calls.append({name: value for name, value in named.items() if name not in _OWN})

        tokens = torch.tensor(ids, device=self.model.device)
        cache: Any = DynamicCache()
        if shared:  # a system text that all prompts begin with is read once
            self.decoder(input_ids=tokens[:1, :shared], past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(ids))
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers[self.first :]]
        try:
            hidden = self.decoder(input_ids=tokens[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
        finally:
            for handle in hooks:
                handle.remove()
        caches = [(layer.keys, layer.values) for layer in cache.layers[self.first :]]
        if len(caches) != len(calls) or any(keys is None or keys.shape[2] != longest for keys, _ in caches):
            raise self._strange("has layers that don't keep keys and values each")
        seen = _Pass(shared, inputs[0], hidden, caches, calls)
        states = [_state(seen, row, sequence) for row, sequence in enumerate(sequences)]
        if not self._checked:
            self._check(states, ids, sequences)
            self._checked = True
        return states

    def _check(
        self, states: Sequence[State], ids: Sequence[Sequence[int]], sequences: Sequence[tuple[Any, Any, int]]
    ) -> None:
        """The first sequence through the layers alone gives the whole model's logits, or this model is refused."""
        import torch

        prompt, answer, _ = sequences[0]
        tokens = torch.tensor([list(ids[0])[: len(prompt) + len(answer)]], device=self.model.device)
        whole = self.model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        ours = self.head(self.last(self.batch(states[:1]))).float()
        if not torch.allclose(ours, whole, rtol=0.02, atol=0.2):
            raise self._strange("computes more than its layers, norm and head in turn")

    def _strange(self, what: str) -> TrainingError:
        return TrainingError(f"{self.name} ({type(self.model).__name__}) {what}: this training can't follow it")


#: What a layer is given for its cache; replaced by ours.
_OWN = frozenset({"hidden_states", "past_key_values", "use_cache"})


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _alike(sequences: Sequence[tuple[Sequence[int], Sequence[int], int]]) -> int:
    """How many tokens all sequences begin with, none of them one that the LoRA acts on."""
    first, most = sequences[0][0], min(start for _, _, start in sequences)
    if len(sequences) == 1:
        return 0
    return next((at for at in range(most) if any(p[at] != first[at] for p, _, _ in sequences)), most)


@dataclass
class _Pass:
    """What one pass over a batch left behind: ``skipped`` tokens of each row were in the cache before it.

    ``pieces`` are what was cut from it, held once where layers share them.
    """

    skipped: int
    inputs: torch.Tensor
    hidden: torch.Tensor
    caches: Sequence[tuple[Any, Any]]
    calls: Sequence[dict[str, Any]]
    pieces: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def cut(self, value: Any, row: int, tokens: slice) -> Any:
        """An argument with one entry per token ([1 or rows, length, ...]), cut to a row's tokens; others unchanged."""
        import torch

        if isinstance(value, tuple | list):
            return tuple(self.cut(part, row, tokens) for part in value)
        rows, length = self.inputs.shape[:2]
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != length:
            return value
        key = (id(value), row)
        if key not in self.pieces:
            self.pieces[key] = value[row if len(value) == rows > 1 else 0, self.here(tokens)].clone()
        return self.pieces[key]

    def mask(self, mask: torch.Tensor | None, row: int, tokens: slice) -> torch.Tensor:
        """What a row's tokens may look at, of all tokens up to them."""
        import torch

        key = (id(mask), -1 - row)
        if key not in self.pieces:
            if mask is None:
                whole = torch.ones(tokens.stop, tokens.stop, dtype=torch.bool, device=self.inputs.device).tril()[tokens]
            else:
                one = mask[row if len(mask) > 1 else 0, 0][self.here(tokens), : tokens.stop]
                whole = one if one.dtype == torch.bool else one >= 0
            self.pieces[key] = whole.clone()
        return self.pieces[key]

    def here(self, tokens: slice) -> slice:
        """Tokens of a row as places in this pass."""
        return slice(tokens.start - self.skipped, tokens.stop - self.skipped)


def _state(seen: _Pass, row: int, sequence: tuple[Sequence[int], Sequence[int], int]) -> State:
    import torch

    prompt, answer, start = sequence
    device = seen.inputs.device
    tokens = slice(start, len(prompt) + len(answer))
    picked = torch.arange(len(prompt) - 1, tokens.stop - 1, device=device)
    return State(
        start=start,
        inputs=seen.inputs[row, seen.here(tokens)].clone(),
        contexts=tuple((keys[row, :, :start].clone(), values[row, :, :start].clone()) for keys, values in seen.caches),
        calls=tuple(
            {name: seen.cut(value, row, tokens) for name, value in call.items() if name != "attention_mask"}
            for call in seen.calls
        ),
        masks=tuple(seen.mask(call.get("attention_mask"), row, tokens) for call in seen.calls),
        positions=picked - start,
        targets=torch.tensor(list(answer), device=device),
        before=seen.hidden[row, picked - seen.skipped].clone(),
    )


def _padded(parts: Sequence[Any], most: int, merged: dict[tuple[int, ...], Any]) -> Any:
    """The same argument of several states as one of the batch."""
    import torch

    if isinstance(parts[0], tuple):
        return tuple(_padded(column, most, merged) for column in zip(*parts, strict=True))
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    key = tuple(id(part) for part in parts)
    if key not in merged:
        merged[key] = torch.stack([_grown(part, most, 0) for part in parts])
    return merged[key]


def _grown(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """``tensor`` with zeros behind it along ``dim`` up to ``size``."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    import torch

    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
