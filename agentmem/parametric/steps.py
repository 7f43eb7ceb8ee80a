"""The steps of a training run: which examples, which losses, when it ends, and how it goes on after an interruption.

Knows lessons, anchors and their states; knows nothing of LoRA files. Every choice is a function of the recipe, the seed
and what was seen so far, so that a run that was stopped and resumed ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import Field

from agentmem.errors import TrainingError
from agentmem.types import Value

from . import checkpoint as checkpoints
from .answering import said
from .corpus import Corpus, Example
from .interruption import Interrupted, whole
from .lessons import HELD, PASSAGE, Tensors, encode, ends, opening
from .losses import answer_loss, divergence
from .recipe import Recipe
from .states import Stack, State

if TYPE_CHECKING:
    import torch

__all__ = ["Estimate", "Lesson", "Point", "Run"]

#: A prompt, its answer, and the token from which the LoRA acts.
_Sequence = tuple[list[int], list[int], int]
#: Points of a whole curve, at least; examples of a trial; seconds between two checkpoints.
_POINTS = 24
_TRIED = 4
#: Tokens by which prompts are told to begin alike.
_BEGINNING = 8
_SAVE_SECONDS = 5.0


class Point(Value):
    """Where a run stood after a step: what the curve of a version is drawn from."""

    step: int = Field(description="steps done")
    loss: float = Field(description="mean loss in nats over the answer tokens of all examples, as last seen")
    known: float = Field(description="share of those tokens above probability 0.5: surely recalled by greedy decoding")
    drift: float | None = Field(default=None, description="rise of the perplexity on a short passage, relative")
    kl: float | None = Field(default=None, description="mean KL in both directions over the anchors, as last seen")
    cpu_seconds: float = Field(description="of the whole process since the run began")


@dataclass(frozen=True)
class Estimate:
    """What a run will cost: optimizer steps at most, seconds of wall time, bytes of memory beyond the model."""

    steps: int
    seconds: float
    bytes: int

    def __str__(self) -> str:
        return f"up to {self.steps} steps, about {self.seconds:.0f} s and {self.bytes / 1e6:.0f} MB"


@dataclass
class Lesson:
    """A sequence with what was last seen of it: ``losses`` of its targets, ``moved``: its KL to the base.

    ``state`` None: it doesn't fit the budget and is captured anew at each use.
    """

    sequence: _Sequence
    state: State | None = None
    losses: torch.Tensor | None = None
    moved: float = math.inf

    @property
    def targets(self) -> int:
        """Tokens to predict."""
        return len(self.sequence[1])

    @property
    def tokens(self) -> int:
        """All its tokens."""
        return len(self.sequence[0]) + len(self.sequence[1])


class Run:
    """One training run: the stack, its lessons and anchors, and the steps."""

    def __init__(
        self, tensors: Tensors, corpus: Corpus, recipe: Recipe, *, seed: int, epochs: int, ram_budget: int | None
    ) -> None:
        import torch

        self.tensors, self.recipe, self.seed, self.ram_budget = tensors, recipe, seed, ram_budget
        self.cpu = time.process_time()
        self.stack = Stack(tensors, recipe, seed)
        self.opening = opening(tensors) if recipe.activated else ()
        self.order = random.Random(seed)  # noqa: S311
        device = torch.device(tensors.model.device)
        self.reproducible = device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        self.optimizer = torch.optim.AdamW(self.stack.flat, lr=recipe.rate, weight_decay=0.0)
        self.lessons = [Lesson(self._sequence(*encode(tensors, example))) for example in corpus.examples]
        self.still = (*corpus.neighbours, *corpus.anchors)
        self.anchors: list[Lesson] = []
        text = tensors.tokenizer.encode(PASSAGE, add_special_tokens=False)
        self.passage = Lesson(self._sequence(encode(tensors, Example("Tell me a story.", "", (), ()))[0], list(text)))
        self.total = max(epochs * math.ceil(len(self.lessons) / recipe.batch), recipe.least_steps)
        self.stopped = False
        self.losses: list[float] = []
        self.curve: list[Point] = []
        #: What is left of the epoch: the numbers of each step's examples.
        self.queue: list[list[int]] = []
        #: Bytes of weights, their gradients and two moments, all float32; then of the states that are kept.
        self.held = 16 * sum(weight.numel() for weight in self.stack.flat)
        self.rows, self.step_bytes = self._fitting(max(self.lessons, key=lambda lesson: lesson.tokens))

    # -- sequences and their states ------------------------------------------------------------------------------------

    def _sequence(self, prompt: list[int], answer: list[int]) -> _Sequence:
        opened = self.opening and tuple(prompt[-len(self.opening) :]) == self.opening
        return prompt, answer, len(prompt) - len(self.opening) if opened else 0

    def _fitting(self, longest: Lesson) -> tuple[int, int]:
        """(rows of one pass, bytes that a pass of so many holds), measured on the longest example."""
        import torch

        most = max(self.recipe.batch, self.recipe.anchors)
        seen: dict[int, int] = {}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        own = {weight.untyped_storage().data_ptr() for weight in self.tensors.model.parameters()}
        (state,) = self.stack.capture([longest.sequence])
        with self.stack.attached(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            hidden = self.stack.last(self.stack.batch([state]))
        row = sum(size for at, size in seen.items() if at not in own) + state.bytes
        row += 2 * longest.targets * self.stack.head.weight.shape[0] * hidden.element_size()
        room = math.inf if self.ram_budget is None else self.ram_budget - self.held
        if row > room:
            raise TrainingError(
                f"training needs {self.held + row} bytes beyond the model for its longest example "
                f"({longest.tokens} tokens), the budget is {self.ram_budget}: give it more, or a smaller rank"
            )
        rows = int(min(most, room // row))
        return rows, rows * row

    def prepare(self) -> None:
        """Compute what doesn't change during the run: the base's own answers, and every sequence's state."""
        held = self.still if self.recipe.kl_weight else ()
        prompts = [encode(self.tensors, example)[0] for example in held]
        most, end = self.recipe.anchor_tokens, ends(self.tensors)[0]
        for prompt, answer in zip(prompts, self._said(prompts), strict=True):
            # That the base stops after a short answer is held still too.
            ended = answer if len(answer) == most else [*answer, end]
            self.anchors.append(Lesson(self._sequence(prompt, ended)))
        self.anchors += self._prose() if self.anchors else []
        # What begins alike, then is of like length, goes through the model together: little is read twice or padded.
        every = [*self.lessons, *self.anchors, self.passage]
        every.sort(key=lambda lesson: (lesson.sequence[0][:_BEGINNING], lesson.tokens))
        for part in self._alike(every):
            for lesson, state in zip(part, self.stack.capture([lesson.sequence for lesson in part]), strict=True):
                if self.ram_budget is None or self.held + self.step_bytes + state.bytes <= self.ram_budget:
                    lesson.state = state
                    self.held += state.bytes
        self.base_loss = self._passage_loss()

    def _prose(self) -> list[Lesson]:
        found: list[Lesson] = []
        for question, text in HELD:
            prompt, _ = encode(self.tensors, Example(question, "", (), ()))
            passage = self.tensors.tokenizer.encode(text, add_special_tokens=False)
            found.append(Lesson(self._sequence(prompt, list(passage))))
        return found

    def _said(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [answer.tokens for answer in said(self.tensors, prompts, self.recipe.anchor_tokens)] if prompts else []

    def _alike(self, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
        """Lessons that stand in order of their beginnings, in parts that begin alike and fit one pass."""
        groups = [list(part) for _, part in itertools.groupby(lessons, lambda lesson: lesson.sequence[0][:_BEGINNING])]
        return [part for group in groups for part in self._parts(group)]

    def _states(self, lessons: Sequence[Lesson]) -> list[State]:
        missing = [lesson.sequence for lesson in lessons if lesson.state is None]
        again = iter(self.stack.capture(missing) if missing else ())
        return [next(again) if lesson.state is None else lesson.state for lesson in lessons]

    # -- steps ---------------------------------------------------------------------------------------------------------

    def learn(
        self,
        progress: Callable[[int, int], None] | None,
        stop: Callable[[], bool] | None,
        checkpoint: Path | None,
        *,
        keep: bool = False,
    ) -> None:
        """All steps, from the checkpoint on where there is one of this very run; ``keep`` leaves it at the end.

        Where ``stop()`` says true, or a pass was `Interrupted`, it returns ``stopped``; `halt` keeps what was done.
        """
        import torch

        key = self._key() if checkpoint is not None else ""
        if checkpoint is not None and (found := checkpoints.load(checkpoint, key)) is not None:
            self._resume(*found)
        saved = time.monotonic()
        with self.stack.attached():
            while len(self.losses) < self.total and not self._done():
                if stop is not None and stop():
                    self.stopped = True
                    return
                if checkpoint is not None and time.monotonic() - saved > _SAVE_SECONDS:
                    checkpoints.save(checkpoint, key, *self._progress())
                    saved = time.monotonic()
                before = self._place()
                try:
                    self._step()
                except Interrupted:
                    self._return(before)
                    self.stopped = True
                    return
                if progress is not None:
                    progress(len(self.losses), self.total)
        if checkpoint is not None and keep:
            checkpoints.save(checkpoint, key, *self._progress())
        elif checkpoint is not None:
            checkpoints.clear(checkpoint)
        if not all(bool(torch.isfinite(weight).all()) for weight in self.stack.flat):
            raise TrainingError("the weights are not finite: nothing was kept; a lower rate may help")

    def halt(self, checkpoint: Path | None) -> NoReturn:
        """Keep the state of a stopped run and say so. The disk may be slow: the model is not held meanwhile."""
        if checkpoint is not None:
            checkpoints.save(checkpoint, self._key(), *self._progress())
        kept = "the same call goes on from there" if checkpoint is not None else "nothing was kept"
        raise TrainingError(f"training was stopped after step {len(self.losses)} of {self.total}: {kept}")

    def _step(self) -> None:
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(len(self.losses))
        self.optimizer.zero_grad(set_to_none=True)
        anchors = self._moved()
        self._learn(self._next())
        learnt = [weight.grad for weight in self.stack.flat]
        self.optimizer.zero_grad(set_to_none=True)
        self._hold(anchors)
        for weight, gradient in zip(self.stack.flat, learnt, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        torch.nn.utils.clip_grad_norm_(self.stack.flat, self.recipe.clip)
        with whole():
            self.optimizer.step()
            done = len(self.losses)
            if done % max(1, self.total // _POINTS) == 0 or done == self.total or self._done():
                self.curve.append(self._point())

    def _place(self) -> tuple[Any, ...]:
        """What a step changes before its weights move: a step that is interrupted was not begun."""
        seen = [lesson.losses for lesson in self.lessons], [anchor.moved for anchor in self.anchors]
        return len(self.losses), [list(part) for part in self.queue], self.order.getstate(), *seen

    def _return(self, place: tuple[Any, ...]) -> None:
        done, self.queue, order, losses, moved = place
        del self.losses[done:]
        self.order.setstate(order)
        for lesson, seen in zip(self.lessons, losses, strict=True):
            lesson.losses = seen
        for anchor, was in zip(self.anchors, moved, strict=True):
            anchor.moved = was

    def _done(self) -> bool:
        """All is known and the anchors stand still on average, after the least number of steps."""
        if len(self.losses) < max(1, self.recipe.least_steps) or not all(map(self._known, self.lessons)):
            return False
        return sum(anchor.moved for anchor in self.anchors) <= self.recipe.still * len(self.anchors)

    def _known(self, lesson: Lesson) -> bool:
        return lesson.losses is not None and bool((lesson.losses < self.recipe.threshold).all())

    def _next(self) -> list[Lesson]:
        """The examples of this step, in an order that is drawn anew for each epoch.

        Of those that were known when last seen only every third is looked at, in turn: they would give no gradient.
        Where that leaves none all are, so that each step has an example.
        """
        steps = math.ceil(len(self.lessons) / self.recipe.batch)
        if not self.queue:
            epoch = len(self.losses) // steps
            seen = [i for i, lesson in enumerate(self.lessons) if i % 3 == epoch % 3 or not self._known(lesson)]
            seen = seen or list(range(len(self.lessons)))
            self.order.shuffle(seen)
            count = min(steps, len(seen))
            self.queue = [seen[i::count] for i in range(count)]
        return [self.lessons[i] for i in self.queue.pop(0)]

    def _moved(self) -> list[Lesson]:
        """Every other step the anchors that moved most when last seen, else the next in turn."""
        count, step = min(self.recipe.anchors, len(self.anchors)), len(self.losses)
        if step % 2:
            return sorted(self.anchors, key=lambda anchor: -anchor.moved)[:count]
        return [self.anchors[(step // 2 * count + i) % len(self.anchors)] for i in range(count)]

    def _learn(self, lessons: list[Lesson]) -> None:
        """Gradients of the mean loss over what is not known yet; notes the mean over all answer tokens."""
        import torch

        losses: list[torch.Tensor] = []
        for part in self._parts(lessons):
            batch = self.stack.batch(self._states(part))
            hidden = self.stack.last(batch)
            found, gradient = answer_loss(hidden.detach(), self.stack.head, batch.targets, self.recipe.threshold)
            for lesson, own in zip(part, _split(found, part), strict=True):
                lesson.losses = own
            if bool((found >= self.recipe.threshold).any()):
                torch.autograd.backward(hidden, gradient)
            losses.append(found)
        whole = torch.cat(losses)
        mean = float(whole.mean())
        if not math.isfinite(mean):
            raise TrainingError("the loss is not finite: nothing was kept; a lower rate or float32 weights may help")
        self.losses.append(mean)
        self._scale(1 / max(1, int((whole >= self.recipe.threshold).sum())))

    def _hold(self, anchors: list[Lesson]) -> None:
        """Gradients of the mean divergence over what has moved."""
        import torch

        limit, count = self.recipe.anchor_threshold, 0
        for part in self._parts(anchors):
            batch = self.stack.batch(self._states(part))
            hidden = self.stack.last(batch)
            found, gradient = divergence(hidden.detach(), batch.before, self.stack.head, limit)
            for anchor, own in zip(part, _split(found, part), strict=True):
                anchor.moved = float(own.mean())
            moved = int((found >= limit).sum())
            if moved:
                torch.autograd.backward(hidden, gradient)
            count += moved
        self._scale(self.recipe.kl_weight / max(1, count))

    def _scale(self, factor: float) -> None:
        for weight in self.stack.flat:
            if weight.grad is not None:
                weight.grad *= factor

    def _parts(self, lessons: list[Lesson]) -> list[list[Lesson]]:
        return [lessons[start : start + self.rows] for start in range(0, len(lessons), self.rows)]

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.recipe.warmup:
            return self.recipe.rate * (step + 1) / (self.recipe.warmup + 1)
        done = (step - self.recipe.warmup) / max(1, self.total - self.recipe.warmup)
        return self.recipe.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    # -- what is told of a run -----------------------------------------------------------------------------------------

    def _passage_loss(self) -> float:
        import torch

        with torch.no_grad():
            batch = self.stack.batch(self._states([self.passage]))
            losses, _ = answer_loss(self.stack.last(batch), self.stack.head, batch.targets, math.inf)
        return float(losses.mean())

    def _point(self) -> Point:
        import torch

        seen = torch.cat([lesson.losses for lesson in self.lessons if lesson.losses is not None])
        moved = [anchor.moved for anchor in self.anchors if math.isfinite(anchor.moved)]
        return Point(
            step=len(self.losses),
            loss=float(seen.mean()),
            known=float((seen < math.log(2)).float().mean()),
            drift=math.expm1(self._passage_loss() - self.base_loss),
            kl=sum(moved) / len(moved) if moved else None,
            cpu_seconds=time.process_time() - self.cpu,
        )

    def trial(self) -> Estimate:
        """One capture and one step on a few examples, reckoned up to the whole run."""
        few = sorted(self.lessons, key=lambda lesson: lesson.tokens)[:: max(1, len(self.lessons) // _TRIED)][:_TRIED]
        clock = time.monotonic()
        for lesson, state in zip(few, self.stack.capture([lesson.sequence for lesson in few]), strict=True):
            lesson.state = state
        captured = time.monotonic() - clock
        with self.stack.attached():
            self._learn(few)
            clock = time.monotonic()
            self._learn(few)
        learnt = (time.monotonic() - clock) / len(few)
        # Anchors are asked, answered and captured, about three captures each; their loss reads the head twice.
        anchors = len(self.still) if self.recipe.kl_weight else 0
        step = learnt * (min(self.recipe.batch, len(self.lessons)) + 1.5 * min(self.recipe.anchors, anchors))
        seconds = captured / len(few) * (len(self.lessons) + 3 * anchors) + self.total * step
        tokens = sum(lesson.tokens for lesson in few)
        every = (len(self.lessons) + anchors) * tokens // len(few)
        every += sum(lesson.tokens for lesson in self._prose()) if anchors else 0
        held = self.held + every * sum(s.bytes for s in self._states(few)) // tokens
        most = held + self.step_bytes
        return Estimate(self.total, seconds, most if self.ram_budget is None else min(most, self.ram_budget))

    # -- interruption --------------------------------------------------------------------------------------------------

    def _key(self) -> str:
        """What makes a run this very run: continuing any other would not end with the same bytes."""
        import torch

        about = (
            self.tensors.identity.hex(),
            asdict(self.recipe),
            self.seed,
            self.total,
            self.ram_budget,
            [lesson.sequence for lesson in (*self.lessons, *self.anchors)],
            (torch.__version__, torch.get_num_threads(), str(self.tensors.model.device), str(self.tensors.model.dtype)),
        )
        return hashlib.sha256(repr(about).encode()).hexdigest()

    def _progress(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, note): everything that later steps depend on."""
        tensors = {f"weight.{i}": weight for i, weight in enumerate(self.stack.flat)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{i}.{name}": value for name, value in state.items()}
        note = {
            "losses": self.losses,
            "curve": [point.model_dump() for point in self.curve],
            "queue": self.queue,
            "order": self.order.getstate(),
            "seen": [None if lesson.losses is None else lesson.losses.tolist() for lesson in self.lessons],
            "moved": [anchor.moved for anchor in self.anchors],
            "cpu_seconds": time.process_time() - self.cpu,
        }
        return tensors, note

    def _resume(self, tensors: dict[str, torch.Tensor], note: dict[str, Any]) -> None:
        import torch

        device = self.tensors.model.device
        with torch.no_grad():
            for i, weight in enumerate(self.stack.flat):
                weight.copy_(tensors[f"weight.{i}"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "moment":
                number, _, moment = rest.partition(".")
                moments.setdefault(int(number), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.losses = list(note["losses"])
        self.curve = [Point(**point) for point in note["curve"]]
        self.queue = [list(part) for part in note["queue"]]
        version, state, gauss = note["order"]
        self.order.setstate((version, tuple(state), gauss))
        for lesson, seen in zip(self.lessons, note["seen"], strict=True):
            lesson.losses = None if seen is None else torch.tensor(seen, device=device)
        for anchor, moved in zip(self.anchors, note["moved"], strict=True):
            anchor.moved = moved
        self.cpu -= note["cpu_seconds"]


def _split(values: torch.Tensor, lessons: Sequence[Lesson]) -> list[torch.Tensor]:
    """Values of all targets, as those of each lesson."""
    import torch

    return list(torch.split(values, [lesson.targets for lesson in lessons]))
