"""Trains a LoRA on a corpus, on the model that is already loaded, and leaves that model as it was.

Knows tensors and the recipe; knows nothing of records, scopes or files. The recipe (measured in tests/benchmarks/
teach_facts.py): loss on answers only; LoRA on every Linear of the top third of the layers, whose inputs are computed
once, since nothing below them changes; KL to the base model's own answers on unrelated questions, so that the rest
stays still; answer tokens that are already known are dropped from the loss (token threshold, arXiv 2605.30260).
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from agentmem.errors import InvalidInput, TrainingError
from agentmem.types import Message

from .corpus import Corpus, Example
from .lora import Delta, Lora, base_only

if TYPE_CHECKING:
    import torch

__all__ = ["RECIPE", "Recipe", "Tensors", "Trained", "answers", "encode", "steady", "train"]


class Tensors(Protocol):
    """What training asks of a loaded model: `adapters.providers.local.Tensors` is one."""

    @property
    def model(self) -> Any:
        """A transformers causal language model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    @property
    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Held while the model is used; reentrant."""
        ...

    @property
    def identity(self) -> bytes:
        """The digest of the base: weights, tokenizer, template."""
        ...

    @property
    def name(self) -> str:
        """The base's name, for people."""
        ...

    def render(self, messages: Sequence[Message], *, answer: bool = False) -> list[int]:
        """Token ids of a conversation in the chat form, up to where the assistant begins to answer.

        With ``answer`` the last message is that answer, and the ids go on to the end of its turn.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run. ``threshold`` is the loss in nats below which an answer token counts as known."""

    rank: int = 8
    alpha: float = 16.0
    #: Part of the layers that is trained, from the top.
    layers: float = 1 / 3
    rate: float = 2e-3
    batch: int = 15
    #: Anchors per step, and the weight of their KL term (each direction).
    anchors: int = 8
    kl_weight: float = 2.0
    #: Tokens of the base's own answer to an anchor that are held still.
    anchor_tokens: int = 12
    threshold: float = 0.1
    warmup: int = 2
    #: A few facts are known after a few steps; the rest need some more of them to come to stand still again.
    least_steps: int = 32
    clip: float = 1.0


RECIPE = Recipe()


@dataclass(frozen=True)
class Trained:
    """A trained LoRA in memory and how it came about. ``losses`` holds the answer loss of each step, in nats per token.

    ``records`` maps the ids of the records that it learnt to the digests of their content. ``cpu_seconds`` counts the
    whole process while it trained, ``seconds`` is wall time.
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


def train(
    tensors: Tensors,
    corpus: Corpus,
    *,
    seed: int = 0,
    epochs: int = 16,
    recipe: Recipe = RECIPE,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Trained:
    """Teach ``corpus`` to a new LoRA; the model itself is unchanged afterwards, also when this raises.

    Holds the model's lock for the whole run (about a second per step on one core for a 135M model). ``progress(done,
    total)`` is called after every step; ``stop()`` before each: when it says true, or on Ctrl-C, the run ends and
    nothing is kept. The same corpus, seed, thread count and library versions give the same weights.

    Raises `InvalidInput` for an empty corpus, and `TrainingError` when the model's architecture is not understood,
    the loss is not finite, or the run was stopped.
    """
    if not corpus.examples:
        raise InvalidInput(
            "nothing to train on: no record states something that can be asked for (see Corpus.left_out)"
        )
    if epochs < 1:
        raise InvalidInput(f"epochs is {epochs}: at least 1")
    clock, cpu = time.monotonic(), time.process_time()
    with tensors.lock, steady(tensors.model), base_only(tensors.model):
        run = _Run(tensors, recipe, seed)
        losses = run.learn(corpus, epochs, progress, stop)
        lora = run.lora(tensors, corpus)
    return Trained(
        lora=lora,
        losses=tuple(losses),
        cpu_seconds=time.process_time() - cpu,
        seconds=time.monotonic() - clock,
        seed=seed,
        epochs=epochs,
        recipe=asdict(recipe),
        identity=tensors.identity.hex(),
        base=tensors.name,
        records=dict(corpus.records),
    )


@contextlib.contextmanager
def steady(model: Any) -> Generator[None]:
    """The model in evaluation mode, its weights without gradients, with an attention that can be differentiated.

    All of it is put back at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(weight, weight.requires_grad) for weight in model.parameters()]
    attention = getattr(model.config, "_attn_implementation", None)
    own = attention not in (None, "eager", "sdpa")
    try:
        model.eval()
        for weight, _ in grads:
            weight.requires_grad_(False)  # noqa: FBT003
        if own:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if own:
            model.set_attn_implementation(attention)
        for weight, wanted in grads:
            weight.requires_grad_(wanted)
        for module, mode in modes:
            module.training = mode


def encode(tensors: Tensors, example: Example) -> tuple[list[int], list[int]]:
    """(prompt, answer) as token ids in the model's chat form; the answer ends as an assistant's turn ends."""
    messages = [Message(role="user", content=example.question)]
    if example.system is not None:
        messages.insert(0, Message(role="system", content=example.system))
    prompt = list(tensors.render(messages))
    if not example.answer:
        return prompt, []
    whole = list(tensors.render([*messages, Message(role="assistant", content=example.answer)], answer=True))
    answer, ends = whole[len(prompt) :], _ends(tensors)
    if whole[: len(prompt)] != prompt:  # a template that writes past answers differently from the one it asks for
        answer = [*tensors.tokenizer.encode(example.answer, add_special_tokens=False), ends[0]]
    last = next((at for at, token in enumerate(answer) if token in ends), len(answer))
    return prompt, answer[: last + 1]


def answers(tensors: Tensors, prompts: Sequence[Sequence[int]], max_tokens: int, *, batch: int = 16) -> list[list[int]]:
    """The model's greedy answers, as token ids without the end mark. The caller holds the lock."""
    import torch
    from transformers import GenerationConfig

    model = tensors.model
    ends = _ends(tensors)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
    )
    found: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = max(len(prompts[i]) for i in part)
        ids = [[ends[0]] * (longest - len(prompts[i])) + list(prompts[i]) for i in part]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part]
        device = model.device
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
        for row, i in zip(out[:, longest:].tolist(), part, strict=True):
            found[i] = row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
    return found


def _ends(tensors: Tensors) -> list[int]:
    settings = getattr(tensors.model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    listed = list(ends) if isinstance(ends, list | tuple) else [ends]
    listed.append(tensors.tokenizer.eos_token_id)
    return list(dict.fromkeys(end for end in listed if end is not None)) or [0]


@dataclass
class _Batch:
    """Sequences whose way through the frozen lower layers is already computed.

    ``inputs`` [sequences, positions, hidden] enters the first trained layer, ``calls`` are the other arguments of each
    trained layer. ``rows`` and ``positions`` pick where an answer token is predicted, ``targets`` says which one;
    ``base`` [picked, hidden] is what the base model's last layer makes of them (kept for anchors only),
    ``moved`` how far the LoRA had moved them when last seen.
    """

    inputs: torch.Tensor
    calls: list[dict[str, Any]]
    rows: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    base: torch.Tensor | None = None
    moved: float = math.inf


class _Run:
    """One training run: the LoRA's weights, the layers that they sit on, and the steps."""

    def __init__(self, tensors: Tensors, recipe: Recipe, seed: int) -> None:
        import torch

        self.tensors, self.recipe, self.model = tensors, recipe, tensors.model
        self.decoder = self.model.get_decoder()
        self.layers: Any = getattr(self.decoder, "layers", None)
        self.norm: Any = getattr(self.decoder, "norm", None)
        self.head = self.model.get_output_embeddings()
        if self.layers is None or self.norm is None or self.head is None or not len(self.layers):
            raise TrainingError(
                f"{tensors.name} ({type(self.model).__name__}) has no layers, norm and head where Llama-like models "
                "have them: this training can't follow it"
            )
        self.checked = False
        self.first = len(self.layers) - max(1, round(len(self.layers) * recipe.layers))
        prefix = next(name for name, module in self.model.named_modules() if module is self.layers)
        self.order = random.Random(seed)  # noqa: S311
        chance = torch.Generator().manual_seed(seed)
        self.weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.modules: dict[str, Any] = {}
        for number in range(self.first, len(self.layers)):
            for name, module in self.layers[number].named_modules():
                if isinstance(module, torch.nn.Linear):
                    path = f"{prefix}.{number}.{name}"
                    self.modules[path] = module
                    self.weights[path] = self._start(module, chance)
        if not self.weights:
            raise TrainingError(f"{tensors.name}: its layers hold no Linear modules to train")

    def _start(self, module: torch.nn.Linear, chance: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """A uniform as PEFT draws it (kaiming, a = sqrt 5), B zero: the first step starts at the base model."""
        import torch

        bound = 1 / math.sqrt(module.in_features)
        a = (torch.rand(self.recipe.rank, module.in_features, generator=chance) * 2 - 1) * bound
        device = module.weight.device
        b = torch.zeros(module.out_features, self.recipe.rank, device=device)
        return a.to(device).requires_grad_(), b.requires_grad_()

    def lora(self, tensors: Tensors, corpus: Corpus) -> Lora:
        made_from = repr(sorted(corpus.records.items()))
        notes = {"base": tensors.identity.hex(), "records": _sha(made_from)}
        weights = {path: (a.detach().cpu(), b.detach().cpu()) for path, (a, b) in self.weights.items()}
        return Lora(self.recipe.rank, self.recipe.alpha, tensors.name, weights, notes)

    def learn(
        self, corpus: Corpus, epochs: int, progress: Callable[[int, int], None] | None, stop: Callable[[], bool] | None
    ) -> list[float]:
        import torch

        lessons, anchors = self._prepare(corpus)
        total = max(epochs * len(lessons), self.recipe.least_steps)
        flat = [tensor for pair in self.weights.values() for tensor in pair]
        optimizer = torch.optim.AdamW(flat, lr=self.recipe.rate, weight_decay=0.0)
        hooks = self._attach()
        losses: list[float] = []
        try:
            while len(losses) < total:
                if not len(losses) % len(lessons):
                    self.order.shuffle(lessons)
                if stop is not None and stop():
                    raise TrainingError(f"training was stopped after step {len(losses)} of {total}: nothing was kept")
                for group in optimizer.param_groups:
                    group["lr"] = self._rate(len(losses), total)
                optimizer.zero_grad(set_to_none=True)
                losses.append(self._step(lessons[len(losses) % len(lessons)], self._anchor(anchors, len(losses))))
                torch.nn.utils.clip_grad_norm_(flat, self.recipe.clip)
                optimizer.step()
                if progress is not None:
                    progress(len(losses), total)
        finally:
            for hook in hooks:
                hook.remove()
        return losses

    def _anchor(self, anchors: Sequence[_Batch], step: int) -> _Batch | None:
        """Every other step the anchors that moved most when last seen, else the next in turn."""
        if not anchors:
            return None
        return max(anchors, key=lambda batch: batch.moved) if step % 2 else anchors[step // 2 % len(anchors)]

    def _rate(self, step: int, total: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.recipe.warmup:
            return self.recipe.rate * (step + 1) / (self.recipe.warmup + 1)
        done = (step - self.recipe.warmup) / max(1, total - self.recipe.warmup)
        return self.recipe.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def _attach(self) -> list[Any]:
        """Hooks that compute what serving computes (lora.Delta), with A and B as leaves of the graph."""
        scale = self.recipe.alpha / self.recipe.rank

        def hook(path: str) -> Callable[..., Any]:
            a, b = self.weights[path]

            def add(module: Any, inputs: Any, output: Any) -> Any:
                return Delta(a.t(), b.t() * scale)(module, inputs, output)

            return add

        return [module.register_forward_hook(hook(path)) for path, module in self.modules.items()]

    def _step(self, lesson: _Batch, anchor: _Batch | None) -> float:
        """Gradients of one step; returns the mean loss over all answer tokens."""
        import torch
        from torch.nn import functional

        losses = functional.cross_entropy(self._logits(lesson), lesson.targets, reduction="none")
        unknown = (losses.detach() >= self.recipe.threshold).float()
        loss = (losses * unknown).sum() / unknown.sum().clamp(min=1.0)
        mean = float(losses.detach().mean())
        if not math.isfinite(mean):
            raise TrainingError("the loss is not finite: nothing was kept; a lower rate or float32 weights may help")
        if bool(unknown.any()):
            loss.backward()  # type: ignore[no-untyped-call]
        if anchor is not None:
            with torch.no_grad():
                base = functional.log_softmax(self.head(anchor.base).float(), dim=-1)
            here = functional.log_softmax(self._logits(anchor), dim=-1)
            # KL in both directions: KL(base || here) alone hardly minds a learnt fact beside the base's own answers,
            # KL(here || base) alone hardly minds a lost one. Measured: the sum halves intrusion at equal recall.
            divergence = ((here - base) * (here.exp() - base.exp())).sum() / len(anchor.rows)
            anchor.moved = float(divergence.detach())
            (divergence * self.recipe.kl_weight).backward()  # type: ignore[no-untyped-call]
        return mean

    def _logits(self, batch: _Batch) -> torch.Tensor:
        """Float32 logits at the picked positions."""
        return self.head(self._last(batch)).float()  # type: ignore[no-any-return]

    def _last(self, batch: _Batch) -> torch.Tensor:
        """What enters the head at the picked positions [picked, hidden], through the trained layers only."""
        hidden = batch.inputs
        for layer, call in zip(self.layers[self.first :], batch.calls, strict=True):
            out = layer(hidden, **call)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.norm(hidden[batch.rows, batch.positions])  # type: ignore[no-any-return]

    def _prepare(self, corpus: Corpus) -> tuple[list[_Batch], list[_Batch]]:
        import torch

        lessons = [encode(self.tensors, example) for example in corpus.examples]
        prompts = [encode(self.tensors, example)[0] for example in (*corpus.neighbours, *corpus.anchors)]
        said = answers(self.tensors, prompts, self.recipe.anchor_tokens) if prompts else []
        end = _ends(self.tensors)[0]
        # What follows a short answer is its end mark: that the base stops there is held still too.
        held = [
            (p, a if len(a) == self.recipe.anchor_tokens else [*a, end]) for p, a in zip(prompts, said, strict=True)
        ]
        self.order.shuffle(lessons)
        parts = [self._captured(group) for group in self._groups(lessons, self.recipe.batch)]
        # Anchors of a kind share a batch (the corpus lists those about other people first), so that the ones that move
        # can be seen to again.
        size = self.recipe.anchors
        still = [self._captured(held[start : start + size]) for start in range(0, len(held), size)]
        with torch.no_grad():
            for batch in still:
                batch.base = self._last(batch)
        return parts, still

    def _groups(self, pairs: Sequence[Any], size: int) -> list[list[Any]]:
        """Batches of nearly equal size, fixed for the run."""
        count = max(1, math.ceil(len(pairs) / size))
        return [part for i in range(count) if (part := list(pairs[i::count]))]

    def _captured(self, pairs: Sequence[tuple[list[int], list[int]]]) -> _Batch:
        """One pass of the base model over a batch, keeping what enters its trained layers.

        Sequences are padded on the right: under a causal mask nothing before the padding sees it.
        """
        import torch

        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = [[*prompt, *answer, *[0] * (longest - len(prompt) - len(answer))] for prompt, answer in pairs]
        picked = [(row, len(p) + at - 1, token) for row, (p, a) in enumerate(pairs) for at, token in enumerate(a)]
        calls: list[dict[str, Any]] = []
        inputs: list[torch.Tensor] = []

        def keep(_module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            named = dict(named)
            hidden = arguments[0] if arguments else named.pop("hidden_states")
            inputs.append(hidden) if not inputs else None
            calls.append({**named, "past_key_values": None, "use_cache": False})

        device = self.model.device
        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.layers[self.first :]]
        try:
            with torch.no_grad():
                tokens = torch.tensor(ids, device=device)
                logits = None if self.checked else self.model(input_ids=tokens, use_cache=False).logits
                if self.checked:
                    self.decoder(input_ids=tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        rows, positions, targets = (torch.tensor(column, device=device) for column in zip(*picked, strict=True))
        batch = _Batch(inputs[0], calls, rows, positions, targets)
        if logits is not None:
            with torch.no_grad():
                ours = self._logits(batch)
            if not torch.allclose(ours, logits[rows, positions].float(), rtol=0.02, atol=0.2):
                raise TrainingError(
                    f"{self.tensors.name} ({type(self.model).__name__}) computes more than its layers, norm and head "
                    "in turn: this training can't follow it"
                )
            self.checked = True
        return batch


def _sha(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
