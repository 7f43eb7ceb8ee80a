"""Greedy answers and token scores of a loaded model, many questions at a time, from as few passes as there can be.

Knows tokens and forward passes; knows nothing of facts, thresholds or which LoRA acts. A prefix that the prompts of a
batch share is computed once. A guessed answer is checked in one pass (the speculative decoding of Leviathan et al.,
arXiv 2211.17192): what greedy decoding would have said alike is kept, and only the rest is generated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .lessons import Tensors, ends
from .lora import acting_from

if TYPE_CHECKING:
    import torch

__all__ = ["Answer", "divergence", "said", "text_loss"]

#: Rows of one pass: more of them are hardly faster per row and take memory.
_ROWS = 40


@dataclass
class Answer:
    """A greedy answer: ``tokens`` without the end mark; ``logits`` [positions, vocabulary] where it was to be scored.

    ``logits`` are those that predict the guess where one was given (the end mark included), else the answer itself.
    """

    tokens: list[int]
    ended: bool = False
    logits: torch.Tensor | None = None


def said(
    tensors: Tensors,
    prompts: Sequence[Sequence[int]],
    most: int | Sequence[int],
    guesses: Sequence[Sequence[int]] | None = None,
    *,
    scored: int = 0,
    opening: Sequence[int] = (),
    generate: bool = True,
) -> list[Answer]:
    """The model's greedy answers to ``prompts`` (token ids, none empty), each of at most ``most`` tokens.

    ``guesses``, token ids with the end mark where they end, cost one pass together where they are right; without
    ``generate`` an answer ends where it leaves its guess. The first ``scored`` answers carry their logits. The answers
    are those of plain greedy decoding, up to the rounding of passes of another shape. ``opening``: the tokens from
    whose last place in a prompt on the activated LoRAs that are on the model act (`Lora.activated`). The caller holds
    the model's lock and has put it in evaluation mode.
    """
    import torch

    limits = [most] * len(prompts) if isinstance(most, int) else list(most)
    guessed = [list(guess)[:limit] for guess, limit in zip(guesses or [()] * len(prompts), limits, strict=True)]
    asking = _Asking(tensors, [list(prompt) for prompt in prompts], guessed, limits, scored=scored, opening=opening)
    # Rows that begin alike share a prefix; of those, rows of like length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: (list(prompts[i][:8]), len(prompts[i])))
    with torch.inference_mode(), _dense_head(tensors.model):
        going = [asking.checked(part) for part in _parts(order, prompts)]
        if generate:
            asking.go_on([part for part in going if part.rows])
    return asking.found()


def divergence(base: Sequence[Answer], here: Sequence[Answer]) -> float:
    """Mean KL(base || here) in nats per token, of answers whose ``logits`` stand at the same positions."""
    total, count = 0.0, 0
    for before, after in zip(base, here, strict=True):
        if before.logits is None or after.logits is None:
            continue
        old, new = before.logits.float().log_softmax(-1), after.logits.float().log_softmax(-1)
        total += float((old.exp() * (old - new)).sum())
        count += len(old)
    return total / count if count else 0.0


def text_loss(tensors: Tensors, ids: Sequence[int], *, after: Sequence[int] = (), opening: Sequence[int] = ()) -> float:
    """The mean loss in nats per token of ``ids``, which follow ``after``; without it the first one is not counted."""
    import torch
    from torch.nn import functional

    whole = torch.tensor([[*after, *ids]], device=tensors.model.device)
    kept = len(ids) + 1 if after else len(ids)
    with torch.inference_mode(), _acting(tensors.model, [_place(after, opening)] if opening else None):
        logits = tensors.model(input_ids=whole, use_cache=False, logits_to_keep=kept).logits[0, :-1].float()
        loss = float(functional.cross_entropy(logits, whole[0, 1 - kept :]))
    return loss if math.isfinite(loss) else math.inf


def _parts(order: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """``order`` cut where the prompts begin differently, and into parts of nearly equal size."""
    groups: list[list[int]] = []
    for i in order:
        if groups and list(prompts[groups[-1][0]][:8]) == list(prompts[i][:8]):
            groups[-1].append(i)
        else:
            groups.append([i])
    parts: list[list[int]] = []
    for group in groups:
        size = math.ceil(len(group) / math.ceil(len(group) / _ROWS))
        parts += [group[start : start + size] for start in range(0, len(group), size)]
    return parts


@dataclass
class _Going:
    """Rows that are not answered yet, with keys and values of what they hold: [rows, heads, columns, size] a layer."""

    rows: list[int]
    cache: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor


class _Asking:
    """Prompts on their way to answers.

    Columns of a batch: [shared prefix][padding][rest of the prompt][guess][padding][what is generated]. The answers of
    all its rows begin in the same column; what is padding, or a wrong guess, is masked.
    """

    def __init__(
        self,
        tensors: Tensors,
        prompts: list[list[int]],
        guesses: list[list[int]],
        limits: list[int],
        *,
        scored: int,
        opening: Sequence[int],
    ) -> None:
        self.tensors, self.prompts, self.guesses, self.limits, self.scored = tensors, prompts, guesses, limits, scored
        self.ends = frozenset(ends(tensors))
        self.answers = [Answer([]) for _ in prompts]
        self.kept: list[list[torch.Tensor]] = [[] for _ in prompts]
        self.activated = bool(opening)
        self.opened = [_place(prompt, opening) for prompt in prompts]

    def found(self) -> list[Answer]:
        import torch

        for answer, kept in zip(self.answers[: self.scored], self.kept, strict=False):
            answer.logits = torch.cat(kept)
        return self.answers

    def checked(self, rows: list[int]) -> _Going:
        """One pass over a batch; keeps of each guess what greedy decoding says alike, and the token after it."""
        import torch
        from transformers import DynamicCache

        prompts, guesses = [self.prompts[row] for row in rows], [self.guesses[row] for row in rows]
        device = self.tensors.model.device
        cache: Any = DynamicCache()
        shared = min(_shared(prompts), *(self.opened[row] for row in rows)) if len(rows) > 1 else 0
        if shared:
            with _acting(self.tensors.model, [shared] if self.activated else None):
                head = torch.tensor([prompts[0][:shared]], device=device)
                self.tensors.model.get_decoder()(input_ids=head, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(rows))
        width = max(len(prompt) for prompt in prompts) - shared
        longest = max(len(guess) for guess in guesses)
        ids, marks, places = [], [], []
        for prompt, guess in zip(prompts, guesses, strict=True):
            left, right = width - (len(prompt) - shared), longest - len(guess)
            # Padding repeats a token of the prompt: it is masked, and always within the vocabulary.
            ids.append([*[prompt[-1]] * left, *prompt[shared:], *guess, *[prompt[-1]] * right])
            marks.append([*[1] * shared, *[0] * left, *[1] * (len(prompt) - shared + len(guess)), *[0] * right])
            places.append([max(shared, shared + column - left) for column in range(width + longest)])
        mask = torch.tensor(marks, device=device)
        starts = [width - (len(self.prompts[row]) - self.opened[row]) for row in rows]
        logits = self._pass(cache, mask, ids=ids, places=places, starts=starts, kept=longest + 1)
        likeliest = logits.argmax(-1).tolist()
        for at, row in enumerate(rows):
            guess = self.guesses[row]
            same = next((n for n, token in enumerate(guess) if likeliest[at][n] != token), len(guess))
            mask[at, shared + width + same :] = 0
            for token in [*guess[:same], likeliest[at][same]]:
                self._take(row, token)
            if row < self.scored:
                self.kept[row].append(logits[at, : max(1, len(guess))].clone())
        left_over = [at for at, row in enumerate(rows) if not self._done(row)]
        cache.batch_select_indices(torch.tensor(left_over, dtype=torch.long, device=device))
        return _Going([rows[at] for at in left_over], _states(cache), mask[left_over])

    def go_on(self, parts: Sequence[_Going]) -> None:
        """Generate what is missing, all rows together."""
        import torch
        from transformers import DynamicCache

        if not parts:
            return
        rows, mask = [row for part in parts for row in part.rows], _side_by_side([part.mask for part in parts])
        layers = [
            (_side_by_side([keys for keys, _ in states]), _side_by_side([values for _, values in states]))
            for states in zip(*(part.cache for part in parts), strict=True)
        ]
        cache: Any = DynamicCache(layers)
        while going := [at for at, row in enumerate(rows) if not self._done(row)]:
            if len(going) <= 0.75 * len(rows):  # dropping rows copies the cache: only when it pays
                chosen = torch.tensor(going, device=mask.device)
                cache.batch_select_indices(chosen)
                mask, rows = mask[chosen], [rows[at] for at in going]
            ids = [[(self.answers[row].tokens or self.prompts[row])[-1]] for row in rows]
            places = [[len(self.prompts[row]) + len(self.answers[row].tokens) - 1] for row in rows]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._pass(cache, mask, ids=ids, places=places, starts=[0] * len(rows), kept=1)
            for at, token in enumerate(logits[:, -1].argmax(-1).tolist()):
                if self._done(rows[at]):
                    continue
                if rows[at] < self.scored and not self.guesses[rows[at]]:
                    self.kept[rows[at]].append(logits[at])
                self._take(rows[at], token)

    def _pass(
        self,
        cache: Any,
        mask: torch.Tensor,
        *,
        ids: Sequence[Sequence[int]],
        places: Sequence[Sequence[int]],
        starts: Sequence[int],
        kept: int,
    ) -> torch.Tensor:
        import torch

        with _acting(self.tensors.model, starts if self.activated else None):
            logits: torch.Tensor = self.tensors.model(
                input_ids=torch.tensor(ids, device=mask.device),
                attention_mask=mask,
                position_ids=torch.tensor(places, device=mask.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=kept,
            ).logits
        return logits

    def _take(self, row: int, token: int) -> None:
        answer = self.answers[row]
        if not self._done(row):
            answer.ended = token in self.ends
            if not answer.ended:
                answer.tokens.append(token)

    def _done(self, row: int) -> bool:
        return self.answers[row].ended or len(self.answers[row].tokens) >= self.limits[row]


def _states(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Masks [rows, columns] or states [rows, heads, columns, size] as one batch: zeros on the left of the shorter."""
    import torch
    from torch.nn import functional

    column = 1 if parts[0].dim() == 2 else 2
    longest = max(part.shape[column] for part in parts)
    padded = [
        functional.pad(part, (longest - part.shape[1], 0) if column == 1 else (0, 0, longest - part.shape[2], 0))
        for part in parts
    ]
    return torch.cat(padded) if len(padded) > 1 else padded[0]


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; each keeps at least one of its own."""
    shortest = min(len(prompt) for prompt in prompts) - 1
    first = prompts[0]
    return next((at for at in range(shortest) if any(prompt[at] != first[at] for prompt in prompts)), shortest)


def _place(prompt: Sequence[int], opening: Sequence[int]) -> int:
    """Where the last ``opening`` of a prompt begins; its end where there is none."""
    size = len(opening)
    places = range(len(prompt) - size, -1, -1) if size else ()
    return next((at for at in places if list(prompt[at : at + size]) == list(opening)), len(prompt))


def _acting(model: Any, starts: Sequence[int] | None) -> contextlib.AbstractContextManager[Any]:
    """Activated LoRAs act from these positions of the next pass on; None: there are none, so nothing is said."""
    return contextlib.nullcontext() if starts is None else acting_from(model, starts)


@contextlib.contextmanager
def _dense_head(model: Any) -> Generator[None]:
    """What enters the head inside the block is contiguous.

    A slice of several rows is not, and torch then copies the head's whole weight for every row of the batch: measured
    four times the cost of the pass.
    """

    def dense(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(dense)
    try:
        yield
    finally:
        hook.remove()
