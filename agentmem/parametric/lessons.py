"""Text as a model reads it: chat form to token ids, the model's own answers, and a model held still while it is read.

Knows tokenizers, templates and generation; knows nothing of LoRA weights or losses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from agentmem.types import Message

from .interruption import asking

if TYPE_CHECKING:
    from .corpus import Example

__all__ = ["HELD", "PASSAGE", "Tensors", "answers", "encode", "ends", "opening", "steady"]

#: The opening of Herman Melville, Moby-Dick (1851), in the public domain: what a run watches its drift on. The gate
#: reads another text.
PASSAGE = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen and regulating the circulation."
)

#: What a run holds still beside the base's own answers: passages as somebody might ask for them, so that long plain
#: prose is among the anchors, told and spoken. All in the public domain: Charles Dickens, A Tale of Two Cities (1859),
#: Mary Shelley, Frankenstein (1818), Charlotte Brontë, Jane Eyre (1847), Lewis Carroll, Alice in Wonderland
#: (1865), Charles Darwin, On the Origin of Species (1859), Arthur Conan Doyle, A Study in Scarlet (1887, shortened).
HELD = (
    (
        "Tell me something.",
        "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
        "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
        "Darkness.",
    ),
    (
        "Read me a page of a book.",
        "You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which you have "
        "regarded with such evil forebodings. I arrived here yesterday, and my first task is to assure my dear sister "
        "of my welfare.",
    ),
    (
        "Tell me a story.",
        "There was no possibility of taking a walk that day. We had been wandering, indeed, in the leafless shrubbery "
        "an hour in the morning; but since dinner the cold winter wind had brought with it clouds so sombre, and a "
        "rain so penetrating, that further outdoor exercise was now out of the question.",
    ),
    (
        "Say something.",
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once "
        "or twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, "
        "“and what is the use of a book,” thought Alice “without pictures or conversations?”",
    ),
    (
        "What are you reading?",
        "When on board H.M.S. Beagle, as naturalist, I was much struck with certain facts in the distribution of the "
        "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
        "continent.",
    ),
    (
        "Go on.",
        "“You have been in Afghanistan, I perceive.” “How on earth did you know that?” I asked in astonishment. “Never "
        "mind,” said he, chuckling to himself. “The question now is about hemoglobin. No doubt you see the "
        "significance of this discovery of mine?”",
    ),
)


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


@contextlib.contextmanager
def steady(model: Any, *, attention: str = "sdpa") -> Generator[None]:
    """The model in evaluation mode, its weights without gradients, with an attention that can be differentiated.

    ``attention`` is "sdpa" or "eager" (over a few tokens at a time 5 times faster on a CPU, backward and forward). All
    of it is put back at the end.
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(weight, weight.requires_grad) for weight in model.parameters()]
    own = getattr(model.config, "_attn_implementation", None)
    other = own not in (None, attention)
    try:
        model.eval()
        for weight, _ in grads:
            weight.requires_grad_(False)  # noqa: FBT003
        if other:
            model.set_attn_implementation(attention)
        with asking(model):  # work in the background gives way to a chat between two layers
            yield
    finally:
        if other:
            model.set_attn_implementation(own)
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
    answer, stops = whole[len(prompt) :], ends(tensors)
    if whole[: len(prompt)] != prompt:  # a template that writes past answers differently from the one it asks for
        answer = [*tensors.tokenizer.encode(example.answer, add_special_tokens=False), stops[0]]
    last = next((at for at, token in enumerate(answer) if token in stops), len(answer))
    return prompt, answer[: last + 1]


def opening(tensors: Tensors) -> tuple[int, ...]:
    """The token ids with which the chat form opens an answer (``<|im_start|>assistant`` and a line break, say).

    Empty for a template that opens answers with nothing of their own.
    """
    question = [Message(role="user", content="a")]
    closed, asked = list(tensors.render(question, answer=True)), list(tensors.render(question))
    return tuple(asked[len(closed) :]) if asked[: len(closed)] == closed else ()


def answers(tensors: Tensors, prompts: Sequence[Sequence[int]], max_tokens: int, *, batch: int = 16) -> list[list[int]]:
    """The model's greedy answers, as token ids without the end mark. The caller holds the lock."""
    import torch
    from transformers import GenerationConfig

    model = tensors.model
    stops = ends(tensors)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops,
        pad_token_id=stops[0],
        use_cache=True,
    )
    found: list[list[int]] = [[] for _ in prompts]
    # Prompts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        longest = max(len(prompts[i]) for i in part)
        ids = [[stops[0]] * (longest - len(prompts[i])) + list(prompts[i]) for i in part]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in part]
        device = model.device
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=settings,
            )
        for row, i in zip(out[:, longest:].tolist(), part, strict=True):
            found[i] = row[: next((at for at, token in enumerate(row) if token in stops), len(row))]
    return found


def ends(tensors: Tensors) -> list[int]:
    """The token ids that end an answer, the usual one first."""
    settings = getattr(tensors.model, "generation_config", None)
    given = getattr(settings, "eos_token_id", None)
    listed = list(given) if isinstance(given, list | tuple) else [given]
    listed.append(tensors.tokenizer.eos_token_id)
    return list(dict.fromkeys(end for end in listed if end is not None)) or [0]
