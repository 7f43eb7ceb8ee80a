"""Distils the head of a prompt into a shorter trained prefix: fewer KV states that answer as the whole head does.

Knows tensors and the recipe; knows nothing of records, pages or scopes. The idea is that of Cartridges (Eyuboglu et al.
2025, arXiv 2506.06266): K and V of n positions are the parameters, the same model that reads the whole head is the
teacher, its first position is frozen. Two things are done differently, because they are what it costs on a CPU
(tests/benchmarks/trained_prefix.py): it starts from the states of the head that the questions attend to most, chosen
per layer and KV head (the score of KVzip, Kim et al. 2025, arXiv 2505.23416), not from the head's first tokens; and the
questions are those of the corpus, not conversations that the model makes up.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.errors import InvalidInput, TrainingError
from agentmem.types import Message

from .corpus import Example
from .lora import base_only
from .train import Tensors, steady

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["RECIPE", "Lesson", "PrefixRecipe", "Reader", "States", "TrainedStates", "distil", "head_of", "lesson"]

_log = logging.getLogger("agentmem")

#: K and V of every layer, [1, KV heads, positions, dim] each, keys as the model has turned them.
States = list[tuple["torch.Tensor", "torch.Tensor"]]
#: Positions of states that a batch reads at most, rows together: what its copies of them take in memory.
_READ_POSITIONS = 16_384
_ROWS = 20


@dataclass(frozen=True, kw_only=True)
class PrefixRecipe:
    """The settings of a run. ``epochs`` are rounds over the lessons that have answers, ``batch`` of them a step, each
    with ``general`` of those that have none; ``top`` are the teacher's likeliest tokens that are told from the rest."""

    rate: float = 3e-3
    epochs: float = 1.0
    batch: int = 16
    general: int = 4
    top: int = 32
    warmup: int = 4
    #: Steps at least: a short head has few lessons.
    least_steps: int = 12
    #: Tokens of the teacher's own answer to a lesson that has none.
    answer_tokens: int = 12
    #: Weight of the gold answers' own loss beside the teacher's: without it, unseen wordings lose a little.
    gold: float = 0.1
    #: Lessons whose attention chooses the states to start from, at most; of every answer at least one.
    scored: int = 64


RECIPE = PrefixRecipe()


@dataclass(frozen=True)
class Lesson:
    """What follows the head up to where the assistant answers, and the answer, in token ids; the records it is about.

    With an empty ``answer`` the teacher's own is taken.
    """

    tail: tuple[int, ...]
    answer: tuple[int, ...] = ()
    records: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainedStates:
    """A trained prefix in memory: ``layers`` are K and V [KV heads, positions, dim] in the model's dtype, on the CPU,
    for positions 0 .. ``tokens``; what follows them continues at position ``tokens``. They stand for ``head``.

    ``losses`` has KL(teacher || student) of each step in nats per token, ``estimated_s`` what was said before the run.
    """

    head: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]]
    losses: tuple[float, ...]
    cpu_seconds: float
    seconds: float
    estimated_s: float

    @property
    def tokens(self) -> int:
        """Positions that it holds."""
        return int(self.layers[0][0].shape[1])

    @property
    def dtype(self) -> str:
        """Of the states, as torch prints it."""
        return str(self.layers[0][0].dtype)

    def arrays(self) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """The memory of ``layers`` as numpy sees it, bfloat16 as uint16. No copy: what is written there, they are."""
        import torch

        def seen(part: torch.Tensor) -> npt.NDArray[Any]:
            array: npt.NDArray[Any] = part.view(torch.uint16).numpy() if part.dtype == torch.bfloat16 else part.numpy()
            return array

        return [(seen(key), seen(value)) for key, value in self.layers]

    def states(self, device: torch.device) -> States:
        """As a batch of one on a device."""
        return [(key[None].to(device), value[None].to(device)) for key, value in self.layers]


def head_of(tensors: Tensors, messages: Sequence[Message]) -> list[int]:
    """The tokens that every prompt begins with whose first messages are these and are followed by a user's."""
    one, other = (tensors.render([*messages, Message(role="user", content=text)]) for text in ("x", "You"))
    length = min(len(one), len(other))
    return list(one[: next((i for i in range(length) if one[i] != other[i]), length)])


def lesson(tensors: Tensors, messages: Sequence[Message], head: Sequence[int], example: Example) -> Lesson | None:
    """``example`` asked behind these messages; None where the template lets it change the head."""
    asked = [*messages, Message(role="user", content=example.question)]
    prompt = list(tensors.render(asked))
    if prompt[: len(head)] != list(head) or len(prompt) == len(head):
        return None
    answer: list[int] = []
    if example.answer:
        whole = list(tensors.render([*asked, Message(role="assistant", content=example.answer)], answer=True))
        if whole[: len(prompt)] != prompt:
            return None
        end = tensors.tokenizer.eos_token_id
        answer = whole[len(prompt) :]
        answer = answer[: answer.index(end) + 1] if end in answer else answer
    return Lesson(tuple(prompt[len(head) :]), tuple(answer), example.records)


class Reader:
    """Runs the model behind KV states that several rows share. The caller holds the lock and steadied the model.

    Raises `TrainingError` for an architecture that this can't be done with.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.model = tensors.model
        self.decoder = self.model.get_decoder()
        self.output = self.model.get_output_embeddings()
        self.config = self.model.config.get_text_config(decoder=True)
        self.device = self.model.device
        self.end = tensors.tokenizer.eos_token_id
        kinds = set(getattr(self.config, "layer_types", None) or ())
        windowed = kinds - {"full_attention"} or (not kinds and getattr(self.config, "sliding_window", None))
        rotary = any(name.rpartition(".")[2] == "inv_freq" for name, _ in self.model.named_buffers())
        if windowed or not rotary or self.output is None:
            raise TrainingError(
                f"{tensors.name} ({type(self.model).__name__}) can have no trained prefix: it needs rotary positions "
                "and layers that see every position"
            )

    def read(self, tokens: Sequence[int], first: int = 0) -> States:
        """The states of these tokens at positions ``first ..``, which may be negative: only distances count."""
        import torch

        with torch.inference_mode():
            cache = self._cache([], 1)
            places = torch.arange(first, first + len(tokens), device=self.device)[None]
            ids = torch.tensor([list(tokens)], device=self.device)
            self.decoder(input_ids=ids, past_key_values=cache, position_ids=places, use_cache=True)
        return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def batches(self, lessons: Sequence[Lesson], length: int, rows: int = _ROWS) -> list[list[Lesson]]:
        """Lessons of like length together, as many as may share states of ``length`` positions."""
        rows = max(1, min(rows, _READ_POSITIONS // max(1, length)))
        order = sorted(lessons, key=lambda lesson: len(lesson.tail) + len(lesson.answer))
        return [order[start : start + rows] for start in range(0, len(order), rows)]

    def answered(self, states: States, batch: Sequence[Lesson]) -> torch.Tensor:
        """Logits, float32 [answer tokens of all lessons in their order, vocabulary], behind these states."""
        hidden, _ = self._pass(states, batch)
        rows = [row for row, lesson in enumerate(batch) for _ in lesson.answer]
        places = [len(lesson.tail) - 1 + at for lesson in batch for at in range(len(lesson.answer))]
        logits: torch.Tensor = self.output(hidden[rows, places]).float()
        return logits

    def attention(self, states: States, batch: Sequence[Lesson]) -> list[torch.Tensor]:
        """Of each layer, the most attention that any token of these lessons gives each of the states: float32 [KV
        heads, positions], over the query heads of each. Needs the eager attention, which keeps its weights."""
        import torch

        _, weights = self._pass(states, batch, weights=True)
        positions = states[0][0].shape[2]
        length = max(len(lesson.tail) + len(lesson.answer) for lesson in batch)
        real = torch.zeros(len(batch), length, device=self.device)
        for row, lesson in enumerate(batch):
            real[row, : len(lesson.tail) + len(lesson.answer)] = 1
        found = []
        for (key, _), layer in zip(states, weights, strict=True):
            given = layer[..., :positions].float() * real[:, None, :, None]  # [rows, heads, length, positions]
            found.append(given.amax((0, 2)).view(key.shape[1], -1, positions).amax(1))
        return found

    def greedy(self, states: States, tails: Sequence[Lesson], most: int) -> list[Lesson]:
        """The lessons with the model's own likeliest answers of at most ``most`` tokens."""
        import torch

        answers: list[list[int]] = []
        positions = states[0][0].shape[2]
        for start in range(0, len(tails), 8):
            part = tails[start : start + 8]
            width = max(len(lesson.tail) for lesson in part)
            # Padded on the left, so that all rows go on at the same place.
            ids = torch.tensor([[0] * (width - len(t.tail)) + list(t.tail) for t in part], device=self.device)
            mask = torch.ones(len(part), positions + width, dtype=torch.long, device=self.device)
            for row, one in enumerate(part):
                mask[row, positions : positions + width - len(one.tail)] = 0
            said: list[list[int]] = [[] for _ in part]
            with torch.inference_mode():
                cache = self._cache(states, len(part))
                for _ in range(most):
                    places = (mask.cumsum(1) - 1)[:, -ids.shape[1] :].clamp(min=0)
                    out = self.decoder(
                        input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
                    )
                    ids = self.output(out.last_hidden_state[:, -1:]).argmax(-1)
                    mask = torch.cat([mask, mask.new_ones(len(part), 1)], 1)
                    for answer, token in zip(said, ids[:, 0].tolist(), strict=True):
                        if self.end not in answer:
                            answer.append(token)
                    if all(self.end in answer for answer in said):
                        break
            answers += said
        return [Lesson(one.tail, tuple(said), one.records) for one, said in zip(tails, answers, strict=True)]

    def _pass(self, states: States, batch: Sequence[Lesson], *, weights: bool = False) -> tuple[torch.Tensor, Any]:
        import torch

        width = max(len(lesson.tail) + len(lesson.answer) for lesson in batch)
        # Padded on the right: what stands behind a lesson is seen by none of its tokens.
        rows = [[*lesson.tail, *lesson.answer] for lesson in batch]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
        first = states[0][0].shape[2]
        out = self.decoder(
            input_ids=ids,
            past_key_values=self._cache(states, len(batch)),
            position_ids=torch.arange(first, first + width, device=self.device)[None],
            use_cache=True,
            output_attentions=weights,
        )
        return out.last_hidden_state, out.attentions if weights else None

    def _cache(self, states: States, rows: int) -> Any:
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for number, (key, value) in enumerate(states):
            cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), number)
        return cache


def distil(
    tensors: Tensors,
    head: Sequence[int],
    lessons: Sequence[Lesson],
    *,
    tokens: int,
    recipe: PrefixRecipe | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TrainedStates:
    """Train ``tokens`` KV states to stand for ``head``; the model is unchanged afterwards, also when this raises.

    Lessons with an answer are what it has to keep; those without are general questions, at which it has to answer as
    the whole head would. Holds the model's lock. The time is logged before the training steps begin. ``progress(done,
    total)`` is called after every step, ``stop()`` before each: when it says true the run ends and nothing is kept.

    Raises `InvalidInput` where there is nothing to learn or to gain, and `TrainingError` for an architecture that can't
    have one, a loss that is not finite, or a run that was stopped.
    """
    if not any(lesson.answer for lesson in lessons):
        raise InvalidInput("nothing to distil: no lesson has an answer")
    if not 2 <= tokens < len(head):
        raise InvalidInput(f"a prefix of {tokens} tokens for a head of {len(head)}: give 2 to {len(head) - 1}")
    clock, cpu = time.monotonic(), time.process_time()
    with tensors.lock, steady(tensors.model), base_only(tensors.model):
        run = _Run(Reader(tensors), head, lessons, recipe or RECIPE, seed)
        start = run.chosen(tokens)
        estimated = run.teach()
        steps = run.steps
        _log.info(
            "distilling a head of %d tokens into %d: %d steps, about %.0f CPU-seconds",
            *(len(head), tokens, steps, estimated),
        )
        layers = run.learn(start, progress, stop)
    return TrainedStates(
        head=tuple(head),
        layers=layers,
        losses=tuple(run.losses),
        cpu_seconds=time.process_time() - cpu,
        seconds=time.monotonic() - clock,
        estimated_s=estimated,
    )


class _Run:
    """One run: the teacher's answers, and the steps."""

    def __init__(
        self, reader: Reader, head: Sequence[int], lessons: Sequence[Lesson], recipe: PrefixRecipe, seed: int
    ) -> None:
        self.reader, self.head, self.recipe = reader, head, recipe
        self.order = random.Random(seed)  # noqa: S311
        self.states = reader.read(head)
        self.asked = [lesson for lesson in lessons if lesson.answer]
        self.general = reader.greedy(
            self.states, [lesson for lesson in lessons if not lesson.answer], recipe.answer_tokens
        )
        self.steps = max(recipe.least_steps, math.ceil(recipe.epochs * len(self.asked) / recipe.batch))
        self.losses: list[float] = []
        #: Of each lesson's answer tokens: the likeliest tokens, [answer tokens, top], and their log-probabilities.
        self.taught: dict[Lesson, tuple[torch.Tensor, torch.Tensor]] = {}

    def chosen(self, tokens: int) -> States:
        """Of each layer and KV head the states of the head that the lessons attend to most, the first one always, in
        their order. They are read so that what follows finds them at the distance at which they really stood."""
        import torch

        sample = _each(self.asked, self.order, self.recipe.scored) + self.general[:16]
        best: list[torch.Tensor] | None = None
        attention = self.reader.config._attn_implementation
        self.reader.model.set_attn_implementation("eager")
        try:
            with torch.inference_mode():
                for batch in self.reader.batches(sample, len(self.head), rows=4):
                    found = self.reader.attention(self.states, batch)
                    best = found if best is None else [torch.maximum(a, b) for a, b in zip(best, found, strict=True)]
        finally:
            self.reader.model.set_attn_implementation(attention)
        assert best is not None
        picked: States = []
        for (key, value), score in zip(self.reader.read(self.head, tokens - len(self.head)), best, strict=True):
            given = score.clone()
            given[:, 0] = math.inf
            places = given.topk(tokens, dim=-1).indices.sort(-1).values[None, :, :, None]
            picked.append(
                (
                    key.gather(2, places.expand(-1, -1, -1, key.shape[3])),
                    value.gather(2, places.expand(-1, -1, -1, value.shape[3])),
                )
            )
        return picked

    def teach(self) -> float:
        """Note what the teacher, which reads the whole head, says to every lesson; CPU-seconds that `learn` will take,
        by what this took: a step reads its batch once and goes back through it once, which costs about as much."""
        import torch

        cpu = time.process_time()
        lessons = [*self.asked, *self.general]
        with torch.inference_mode():
            for batch in self.reader.batches(lessons, len(self.head)):
                known = self.reader.answered(self.states, batch).log_softmax(-1).topk(self.recipe.top, -1)
                at = 0
                for one in batch:
                    end = at + len(one.answer)
                    self.taught[one] = (known.indices[at:end].clone(), known.values[at:end].clone())
                    at = end
        rows = self.steps * (self.recipe.batch + min(self.recipe.general, len(self.general)))
        return 2.2 * (time.process_time() - cpu) / len(lessons) * rows

    def learn(
        self, start: States, progress: Callable[[int, int], None] | None, stop: Callable[[], bool] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        import torch

        dtype = start[0][0].dtype
        leaves = [[part.float().clone().requires_grad_() for part in pair] for pair in start]
        flat = [part for pair in leaves for part in pair]
        optimizer = torch.optim.Adam(flat, lr=self.recipe.rate, betas=(0.9, 0.95))
        waiting: list[Lesson] = []
        for step in range(self.steps):
            if stop is not None and stop():
                raise TrainingError(f"distilling was stopped after step {step} of {self.steps}: nothing was kept")
            while len(waiting) < self.recipe.batch:
                waiting += self.order.sample(self.asked, len(self.asked))
            batch, waiting = waiting[: self.recipe.batch], waiting[self.recipe.batch :]
            batch = batch + self.order.sample(self.general, min(self.recipe.general, len(self.general)))
            for group in optimizer.param_groups:
                group["lr"] = self._rate(step)
            loss = self._apart([(key.to(dtype), value.to(dtype)) for key, value in leaves], batch)
            if not bool(torch.isfinite(loss)):
                raise TrainingError(f"the loss is not finite at step {step}: use a lower rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for part in flat:
                if part.grad is not None:
                    part.grad[:, :, 0] = 0  # every token leans on the first position: moving it breaks all of them
            optimizer.step()
            self.losses.append(float(loss.detach()))
            if progress is not None:
                progress(step + 1, self.steps)
        # A copy also where the dtype is the parameters' own: what is kept must not share their memory.
        kept = [[part.detach()[0].to(dtype).cpu().clone() for part in pair] for pair in leaves]
        return [(key, value) for key, value in kept]

    def _apart(self, states: States, batch: Sequence[Lesson]) -> torch.Tensor:
        """KL(teacher || student) per answer token, over the teacher's likeliest tokens and all others as one."""
        import torch

        said = self.reader.answered(states, batch).log_softmax(-1)
        places, wanted = (torch.cat([self.taught[one][which] for one in batch]) for which in (0, 1))
        got = said.gather(1, places)
        least = 1e-6
        rest_wanted = (1 - wanted.exp().sum(1)).clamp(min=least)
        rest_got = (1 - got.exp().sum(1)).clamp(min=least)
        apart = (wanted.exp() * (wanted - got)).sum(1) + rest_wanted * (rest_wanted.log() - rest_got.log())
        loss = apart.mean()
        if self.recipe.gold:
            gold = [token for one in batch if one.records for token in one.answer]
            mine = [row for one, row in self._rows(batch) if one.records]
            loss = loss - self.recipe.gold * said[mine, gold].mean()
        return loss

    def _rows(self, batch: Sequence[Lesson]) -> list[tuple[Lesson, int]]:
        """The lesson of each row of logits."""
        owners = [one for one in batch for _ in one.answer]
        return list(zip(owners, range(len(owners)), strict=True))

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        up = min(1.0, (step + 1) / (self.recipe.warmup + 1))
        return self.recipe.rate * up * (0.1 + 0.45 * (1 + math.cos(math.pi * step / self.steps)))


def _each(lessons: Sequence[Lesson], order: random.Random, most: int) -> list[Lesson]:
    """A sample of about ``most`` lessons in which every answer has one, or what of it is not asked for is lost."""
    shuffled = order.sample(lessons, len(lessons))
    first = list({one.answer: one for one in shuffled}.values())
    rest = [one for one in shuffled if one not in set(first)]
    return first + rest[: max(0, most - len(first))]
