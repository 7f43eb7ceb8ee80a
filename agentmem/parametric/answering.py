"""Greedy answers and token scores of a loaded model, many questions at a time, from as few passes as there can be.

Knows tokens and forward passes; knows nothing of facts, thresholds or which LoRA acts. A prefix that the prompts of a
batch share is computed once. A guessed answer is checked in one pass (the speculative decoding of Leviathan et al.,
arXiv 2211.17192): what greedy decoding would have said alike is kept, and only the rest is generated.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
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
    """A greedy answer: ``tokens`` without the end mark; ``logits`` [positions, vocabulary] where they were asked for.

    ``logits`` are those that predict the guess where one was given (the end mark included), else the answer itself.
    """

    tokens: list[int]
    ended: bool = False
    logits: torch.Tensor | None = None


def said(
    tensors: Tensors,
    prompts: Sequence[Sequence[int]],
    most: int | Sequence[int],
    *,
    guesses: Sequence[Sequence[int]] | None = None,
    logits: bool = False,
    opening: Sequence[int] = (),
) -> list[Answer]:
    """The model's greedy answers to ``prompts`` (token ids, none empty), each of at most ``most`` tokens.

    ``guesses``, token ids with the end mark where they end, cost one pass together where they are right. The answers
    are those of plain greedy decoding, up to the rounding of passes of another shape. ``opening``: the tokens from
    whose last place in a prompt on the activated LoRAs that are on the model act (`Lora.activated`). The caller holds
    the model's lock and has put it in evaluation mode.
    """
    import torch

    limits = [most] * len(prompts) if isinstance(most, int) else list(most)
    guessed = [list(guess) for guess in guesses] if guesses is not None else [[] for _ in prompts]
    found: list[Answer] = [Answer([]) for _ in prompts]
    # Rows that begin alike share a prefix; of those, rows of like length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: (list(prompts[i][:8]), len(prompts[i])))
    with torch.inference_mode():
        for part in _parts(order, prompts):
            chosen = [list(prompts[i]) for i in part]
            batch = _Batch(tensors, chosen, [guessed[i][: limits[i]] for i in part], keep=logits, opening=opening)
            batch.go_on([limits[i] for i in part])
            for i, answer in zip(part, batch.answers, strict=True):
                found[i] = answer
    return found


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


class _Batch:
    """Rows of one batch: [shared prefix][padding][rest of the prompt][guess][padding][what is generated].

    The answers of all rows begin in the same column; what is padding, or a wrong guess, is masked.
    """

    def __init__(
        self,
        tensors: Tensors,
        prompts: Sequence[list[int]],
        guesses: Sequence[Sequence[int]],
        *,
        keep: bool,
        opening: Sequence[int],
    ) -> None:
        import torch
        from transformers import DynamicCache

        self.tensors, self.prompts, self.guesses, self.keep = tensors, prompts, guesses, keep
        self.ends = frozenset(ends(tensors))
        self.answers = [Answer([]) for _ in prompts]
        self.kept: list[list[torch.Tensor]] = [[] for _ in prompts]
        self.activated = bool(opening)
        self.cache: Any = DynamicCache(config=tensors.model.config)
        opened = [_place(prompt, opening) for prompt in prompts]
        shared = min(_shared(prompts), *opened) if len(prompts) > 1 else 0
        if shared:
            head = torch.tensor([list(prompts[0][:shared])], device=tensors.model.device)
            with _acting(tensors.model, [shared] if self.activated else None):
                tensors.model.get_decoder()(input_ids=head, past_key_values=self.cache, use_cache=True)
            self.cache.batch_repeat_interleave(len(prompts))
        width = max(len(prompt) for prompt in prompts) - shared
        self.columns = shared + width
        longest = max(len(guess) for guess in guesses)
        ids, mask, places = [], [], []
        for prompt, guess in zip(prompts, guesses, strict=True):
            left, right = width - (len(prompt) - shared), longest - len(guess)
            # Padding repeats a token of the prompt: it is masked, and always within the vocabulary.
            ids.append([*[prompt[-1]] * left, *prompt[shared:], *guess, *[prompt[-1]] * right])
            mask.append([*[1] * shared, *[0] * left, *[1] * (len(prompt) - shared + len(guess)), *[0] * right])
            places.append([max(shared, shared + column - left) for column in range(width + longest)])
        self.mask = torch.tensor(mask, device=tensors.model.device)
        starts = [width - (len(prompt) - at) for prompt, at in zip(prompts, opened, strict=True)]
        self.first = self._pass(ids, places, starts, longest + 1)

    def _pass(
        self, ids: Sequence[Sequence[int]], places: Sequence[Sequence[int]], starts: Sequence[int], kept: int
    ) -> torch.Tensor:
        import torch

        model, device = self.tensors.model, self.mask.device
        with _acting(model, starts if self.activated else None):
            logits: torch.Tensor = model(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=self.mask,
                position_ids=torch.tensor(places, device=device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=kept,
            ).logits
        return logits

    def go_on(self, limits: Sequence[int]) -> None:
        """Keep of each guess what greedy decoding says alike, and generate what is missing, up to ``limits``."""
        import torch

        likeliest = self.first.argmax(-1).tolist()
        for row, (guess, answer) in enumerate(zip(self.guesses, self.answers, strict=True)):
            same = next((at for at, token in enumerate(guess) if likeliest[row][at] != token), len(guess))
            self.mask[row, self.columns + same :] = 0
            for token in [*guess[:same], likeliest[row][same]]:
                self._take(answer, token, limits[row])
            if self.keep:
                self.kept[row].append(self.first[row, : max(1, len(guess))].clone())
        del self.first
        rows = list(range(len(self.answers)))
        while going := [at for at, row in enumerate(rows) if not self._done(row, limits)]:
            if len(going) <= 0.75 * len(rows):  # dropping rows copies the cache: only when it pays
                chosen = torch.tensor(going, device=self.mask.device)
                self.cache.batch_select_indices(chosen)
                self.mask, rows = self.mask[chosen], [rows[at] for at in going]
            fed = [self.answers[row].tokens for row in rows]
            ids = [[tokens[-1] if tokens else self.prompts[row][-1]] for row, tokens in zip(rows, fed, strict=True)]
            places = [[len(self.prompts[row]) + len(tokens) - 1] for row, tokens in zip(rows, fed, strict=True)]
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            logits = self._pass(ids, places, [0] * len(rows), 1)
            for at, token in enumerate(logits[:, -1].argmax(-1).tolist()):
                row = rows[at]
                if self._done(row, limits):
                    continue
                if self.keep and not self.guesses[row]:
                    self.kept[row].append(logits[at])
                self._take(self.answers[row], token, limits[row])
        if self.keep:
            for answer, kept in zip(self.answers, self.kept, strict=True):
                answer.logits = torch.cat(kept)

    def _take(self, answer: Answer, token: int, limit: int) -> None:
        if not answer.ended and len(answer.tokens) < limit:
            answer.ended = token in self.ends
            if not answer.ended:
                answer.tokens.append(token)

    def _done(self, row: int, limits: Sequence[int]) -> bool:
        return self.answers[row].ended or len(self.answers[row].tokens) >= limits[row]


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
