"""What LoRAs add to a model's Linear layers while it computes: their exact sum, per row of a batch, from a token on.

Knows tensors and forward hooks; knows nothing of files, versions or which LoRA is right. A batch whose rows carry
different LoRAs gathers A and B by row (BGMV of Punica, arXiv 2310.18547); an activated LoRA (arXiv 2504.12397) adds
nothing before its invocation tokens, so what stands before them is the base model's, bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.errors import InvalidInput, TrainingError

if TYPE_CHECKING:
    import torch

    from .lora import Lora

__all__ = ["Delta", "Fitted", "Gathered", "Reach", "attach", "fit", "last_start", "linears", "reach_of", "summed"]

_REACH = "_agentmem_reach"
#: Which tokens call it; empty: it acts on every token.
Invocation = tuple[int, ...]


class Delta:
    """Forward hook of one Linear: adds (x Aᵀ) Bᵀ in the precision of A and B, then rounds once to the Linear's dtype.

    ``down`` is Aᵀ [in, rank], ``up`` is Bᵀ [rank, out] with every factor in it.
    """

    __slots__ = ("down", "up")

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self.down = down
        self.up = up

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return (output + (inputs[0].to(self.down.dtype) @ self.down) @ self.up).to(output.dtype)


@dataclass(frozen=True)
class Fitted:
    """LoRAs as they act on one model's Linear layers: by invocation, then by module path."""

    parts: Mapping[Invocation, Mapping[str, Delta]]
    bytes: int


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The Linear layers of a model by their paths."""
    import torch

    return {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def fit(modules: Mapping[str, torch.nn.Linear], lora: Lora, name: str) -> Fitted:
    """A LoRA on the model's device, in float32, after checking that every path and shape is the model's.

    Raises `TrainingError` where one is not.
    """
    deltas: dict[str, Delta] = {}
    size = 0
    for path, (a, b) in lora.tensors.items():
        module = modules.get(path)
        if module is None:
            raise TrainingError(f"{name} has weights for {path}, which this model doesn't have: it needs {lora.base}")
        if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
            raise TrainingError(
                f"{name}: {path} is [{b.shape[0]}, {a.shape[1]}], this model's is "
                f"[{module.out_features}, {module.in_features}]: it needs {lora.base}"
            )
        device = module.weight.device
        down, up = a.to(device).float().t(), (b.to(device).float() * (lora.alpha / lora.rank)).t()
        deltas[path] = Delta(down, up)
        size += down.nbytes + up.nbytes
    return Fitted({tuple(lora.activated): deltas}, size)


def summed(parts: Sequence[tuple[Fitted, float]]) -> Fitted:
    """The exact sum of several LoRAs, each times its scale: their ranks side by side (PEFT's ``cat``), not an average
    of their weights. Those with another invocation stay apart."""
    import torch

    parts = [part for part in parts if part[1] != 0.0]
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    total: dict[Invocation, dict[str, Delta]] = {}
    size = 0
    for invocation in sorted({key for fitted, _ in parts for key in fitted.parts}):
        here = [(fitted.parts[invocation], scale) for fitted, scale in parts if invocation in fitted.parts]
        if len(here) == 1 and here[0][1] == 1.0:  # the same tensors, and so the same bits, as without the others
            total[invocation] = dict(here[0][0])
            continue
        total[invocation] = {}
        for path in sorted({path for deltas, _ in here for path in deltas}):
            scaled = [(deltas[path], scale) for deltas, scale in here if path in deltas]
            down = torch.cat([delta.down for delta, _ in scaled], dim=1)
            up = torch.cat([delta.up * scale for delta, scale in scaled], dim=0)
            total[invocation][path] = Delta(down, up)
            size += down.nbytes + up.nbytes
    return Fitted(total, size)


# ---- on a model


class Reach:
    """From which position of the pass that runs now LoRAs of an invocation act, for each row of its batch.

    Found in the token ids of every pass of the decoder, or told by `told` for the passes inside.
    """

    def __init__(self) -> None:
        self._told: Mapping[Invocation, Sequence[int]] | Sequence[int] | None = None
        self._found: dict[Invocation, list[int]] = {}
        self._called: dict[Invocation, list[bool]] = {}
        self._ids: list[list[int]] | None = None
        self._goes_on = False

    @contextlib.contextmanager
    def told(self, starts: Mapping[Invocation, Sequence[int]] | Sequence[int]) -> Generator[None]:
        """In the passes inside these are the starts: of each row, or one for all rows."""
        before, self._told = self._told, starts
        try:
            yield
        finally:
            self._told = before

    def starts(self, invocation: Invocation) -> Sequence[int] | None:
        """Where LoRAs of this invocation begin to act in this pass; None: nowhere."""
        if self._told is not None:
            return self._told.get(invocation) if isinstance(self._told, Mapping) else self._told
        if self._ids is None:
            return None
        if invocation not in self._found:
            self._found[invocation] = self._search(invocation, self._ids)
        return self._found[invocation]

    def _search(self, invocation: Invocation, ids: Sequence[Sequence[int]]) -> list[int]:
        called = self._called.get(invocation, [])
        if not self._goes_on or len(called) != len(ids):
            called = [False] * len(ids)
        found: list[int] = []
        for row, before in zip(ids, called, strict=True):
            start = last_start(row, invocation)
            found.append((0 if before else len(row)) if start is None else start)
        self._called[invocation] = [
            before or start < len(row) for before, start, row in zip(called, found, ids, strict=True)
        ]
        return found

    def begin(self, _module: object, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a pass of the decoder."""
        ids = arguments[0] if arguments else named.get("input_ids")
        cache = named.get("past_key_values")
        self._found = {}
        self._goes_on = cache is not None and hasattr(cache, "get_seq_length") and cache.get_seq_length() > 0
        self._ids = None if ids is None or self._told is not None else ids.tolist()

    def end(self, *_: object) -> None:
        """After it: layers that are called by themselves are no pass of it."""
        if self._ids is not None:
            for invocation in list(self._called):  # a pass in which no such LoRA acted was read all the same
                self.starts(invocation)
        self._ids, self._found = None, {}


def last_start(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Where the last occurrence of ``invocation`` in ``tokens`` begins; None if it is not there."""
    wanted, size = list(invocation), len(invocation)
    for start in range(len(tokens) - size, -1, -1):
        if tokens[start] == wanted[0] and list(tokens[start : start + size]) == wanted:
            return start
    return None


class _Late:
    """As `Delta`, but from the reach's start on. Rows must come as [rows, positions, features]."""

    def __init__(self, delta: Delta, invocation: Invocation, reach: Reach) -> None:
        self._delta = delta
        self._invocation = invocation
        self._reach = reach

    def __call__(self, module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        starts = self._reach.starts(self._invocation)
        first = None if starts is None else _first(starts, output)
        if starts is None or first is None:
            return None
        if min(starts) == max(starts):
            if not first:
                return self._delta(module, inputs, output)
            added = self._delta(module, (inputs[0][:, first:],), output[:, first:])
        else:
            before = output[:, first:]
            added = self._delta(module, (inputs[0][:, first:],), before)
            added = added.where(_acting(starts, first, before), before)
        output[:, first:] = added  # the Linear made it for this call alone
        return output


class _Rows:
    """As `Delta`, of another LoRA sum in every row. ``down`` [sums, in, rank], ``up`` [sums, rank, out], ``index``
    [rows]: which sum a row takes."""

    def __init__(
        self, down: torch.Tensor, up: torch.Tensor, index: torch.Tensor, invocation: Invocation, reach: Reach
    ) -> None:
        self._down = down
        self._up = up
        self._index = index
        self._invocation = invocation
        self._reach = reach

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if output.dim() != 3 or output.shape[0] != len(self._index):
            raise InvalidInput(
                f"LoRAs were chosen for {len(self._index)} rows, but the model reads {tuple(output.shape)}"
            )
        starts = self._reach.starts(self._invocation) if self._invocation else (0,)
        first = None if starts is None else _first(starts, output)
        if starts is None or first is None:
            return None
        before = output[:, first:]
        down, up = self._down.index_select(0, self._index), self._up.index_select(0, self._index)
        added = (before + (inputs[0][:, first:].to(down.dtype) @ down) @ up).to(output.dtype)
        if min(starts) != max(starts):
            added = added.where(_acting(starts, first, before), before)
        if not first:
            return added
        output[:, first:] = added
        return output


def _first(starts: Sequence[int], output: torch.Tensor) -> int | None:
    """The first position that any row's LoRA acts on; None where there is none in this pass."""
    if output.dim() != 3:
        raise TrainingError("a LoRA that acts on some tokens only sits on a layer that is not told which they are")
    if len(starts) not in (1, output.shape[0]):
        raise InvalidInput(f"{len(starts)} starts are given for a batch of {output.shape[0]} rows")
    first = max(min(starts), 0)
    return first if first < output.shape[1] else None


def _acting(starts: Sequence[int], first: int, like: torch.Tensor) -> torch.Tensor:
    """[rows, positions, 1]: whether the row's LoRA acts at that position; the first column is position ``first``."""
    import torch

    places = torch.arange(first, first + like.shape[1], device=like.device)
    return (places[None] >= torch.tensor(list(starts), device=like.device)[:, None])[:, :, None]


def attach(model: torch.nn.Module, modules: Mapping[str, torch.nn.Linear], fitted: Fitted) -> list[Any]:
    """Hooks that make these LoRAs act on the model; each has ``remove()``."""
    hooks: dict[str, list[Any]] = {}
    for invocation, deltas in fitted.parts.items():
        for path, delta in deltas.items():
            hooks.setdefault(path, []).append(_Late(delta, invocation, reach_of(model)) if invocation else delta)
    return _hooked(model, modules, hooks, any(fitted.parts))


class Gathered:
    """LoRA sums stacked for passes of ``len(index)`` rows: row i takes ``sums[index[i]]``. Made once per batch."""

    def __init__(
        self,
        model: torch.nn.Module,
        modules: Mapping[str, torch.nn.Linear],
        sums: Sequence[Fitted],
        index: Sequence[int],
    ) -> None:
        self._model = model
        self._modules = modules
        self._late = any(any(fitted.parts) for fitted in sums)
        self._hooks = _stacked(model, modules, sums, index)

    def attach(self) -> list[Any]:
        """As `attach`."""
        return _hooked(self._model, self._modules, self._hooks, self._late)


def _stacked(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Linear], sums: Sequence[Fitted], index: Sequence[int]
) -> dict[str, list[Any]]:
    import torch

    hooks: dict[str, list[Any]] = {}
    invocations = sorted({key for fitted in sums for key in fitted.parts})
    for invocation in invocations:
        parts = [fitted.parts.get(invocation, {}) for fitted in sums]
        for path in sorted({path for deltas in parts for path in deltas}):
            module = modules[path]
            rank = max(deltas[path].down.shape[1] for deltas in parts if path in deltas)
            # Ranks are filled up with zeros, and a row without a LoRA takes a sum of zeros: both add exactly nothing.
            down = module.weight.new_zeros((len(sums), module.in_features, rank), dtype=torch.float32)
            up = module.weight.new_zeros((len(sums), rank, module.out_features), dtype=torch.float32)
            for number, deltas in enumerate(parts):
                if path in deltas:
                    own = deltas[path].down.shape[1]
                    down[number, :, :own] = deltas[path].down
                    up[number, :own] = deltas[path].up
            chosen = torch.tensor(list(index), device=module.weight.device)
            hooks.setdefault(path, []).append(_Rows(down, up, chosen, invocation, reach_of(model)))
    return hooks


def _hooked(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Linear], hooks: Mapping[str, Sequence[Any]], late: bool
) -> list[Any]:
    made: list[Any] = []
    try:
        if late:
            whole: Any = model
            decoder = whole.get_decoder() if hasattr(whole, "get_decoder") else whole
            reach = reach_of(model)
            made.append(decoder.register_forward_pre_hook(reach.begin, with_kwargs=True))
            made.append(decoder.register_forward_hook(reach.end, always_call=True))
        for path, several in hooks.items():
            made += [modules[path].register_forward_hook(hook) for hook in several]
    except BaseException:
        for hook in made:
            hook.remove()
        raise
    return made


def reach_of(model: torch.nn.Module) -> Reach:
    """The model's one `Reach`."""
    reach: Reach | None = getattr(model, _REACH, None)
    if reach is None:
        reach = Reach()
        object.__setattr__(model, _REACH, reach)
    return reach
