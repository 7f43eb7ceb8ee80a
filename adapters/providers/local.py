"""``local:``: a transformers model in this process, answering without a network, with KV pages and LoRA versions.

Knows the provider contract, threads and cancellation; how files, prompts, KV states and sampling work is in the modules
beside it. torch is imported when the model is first used.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentmem.errors import ConfigError, Rejected, Unavailable
from agentmem.provider import Capabilities, Generation, Request
from agentmem.types import TokenCount

from ._local_model import DEFAULT, Settings, context_tokens, counter, find, load, load_tokenizer, prepare

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from ._local_generate import Engine
    from ._local_prompt import Template

__all__ = ["LocalProvider", "Tensors", "create"]

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """The loaded model, for training. Hold ``lock`` while the model is changed, and leave it as it was.

    ``identity`` is the digest of the base without any LoRA: weights, architecture, tokenizer and chat template, the
    same on every machine, device and dtype. ``render(messages, answer=False)`` gives the token ids up to where the
    assistant begins to answer; with ``answer=True`` the last message is the answer and the ids go on to the end of its
    turn.
    """

    model: Any
    tokenizer: Any
    lock: threading.RLock
    device: torch.device
    dtype: torch.dtype
    identity: bytes
    name: str
    render: Callable[..., list[int]]


class LocalProvider:
    """A local model. Made cheaply; files are converted and loaded at the first use that needs them.

    Seconds in `Usage` don't include loading the model, which happens once. Options: ``temperature`` None or 0 takes the
    likeliest token; ``extra`` may hold ``top_k``, ``repetition_penalty`` and ``chat_template_kwargs``.
    """

    def __init__(self, model: str, settings: Mapping[str, Any]) -> None:
        self._settings = Settings.parse(settings)
        self._path = find(model)
        self.name = f"local:{model or DEFAULT}"
        self.capabilities = Capabilities(
            chat=True,
            kv="tensors",
            loras=True,
            activated_loras=True,
            summed_loras=True,
            lora_loading="process",
            lora_format="peft",
            trains=True,
            context_tokens=context_tokens(self._path),
            exact_tokens=True,
        )
        self._loading = threading.RLock()
        self._lock = threading.RLock()
        self._folder: Path | None = None
        self._counter: Callable[[str], int] | None = None
        self._template: Template | None = None
        self._engine: Engine | None = None
        self._closed = False

    # -- loading ---------------------------------------------------------------------------------------------------

    def _prepared(self) -> Path:
        with self._loading:
            self._refuse_if_closed()
            if self._folder is None:
                self._folder = prepare(self._path, self._settings)
            return self._folder

    def _ready(self) -> Engine:
        engine = self._engine
        if engine is None:
            with self._loading:
                folder = self._prepared()
                if self._engine is None:
                    from ._local_generate import Engine

                    loaded = load(folder, self._settings, load_tokenizer(folder))
                    self._engine = Engine(loaded, self.name, self._lock, self._settings)
                engine = self._engine
        return engine

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise Unavailable(f"{self.name} is closed: make a new one")

    # -- the provider ----------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> Generation:
        """The whole answer. Raises `Rejected` for a prompt longer than the window."""
        return self._collected(request, None)

    def stream(self, request: Request) -> Iterator[str | Generation]:
        """Pieces of text, then the `Generation`. Nothing runs between two pieces."""
        return self._streamed(request, None)

    async def agenerate(self, request: Request) -> Generation:
        """As `generate`, in a worker thread. Cancelling stops it at its next token."""
        cancel = threading.Event()
        return await _in_thread(lambda: self._collected(request, cancel), cancel)

    async def astream(self, request: Request) -> AsyncIterator[str | Generation]:
        """As `stream`, each step in a worker thread. Cancelling stops it at its next token."""
        cancel = threading.Event()
        pieces = self._streamed(request, cancel)
        try:
            while (piece := await _in_thread(lambda: next(pieces, None), cancel)) is not None:
                yield piece
        finally:
            await _in_thread(pieces.close, cancel)

    def _streamed(self, request: Request, cancel: threading.Event | None) -> Generator[str | Generation]:
        self._refuse(request)
        return self._begun(request, cancel)

    def _refuse(self, request: Request) -> None:
        if request.tools:
            raise Rejected(f"{self.name} takes no tools")
        if request.options.schema is not None:
            raise Rejected(f"{self.name} can't answer by a schema")
        if any(message.images for segment in request.segments for message in segment.messages):
            raise Rejected(f"{self.name} reads no images")

    def _begun(self, request: Request, cancel: threading.Event | None) -> Generator[str | Generation]:
        yield from self._ready().stream(request, cancel)

    def _collected(self, request: Request, cancel: threading.Event | None) -> Generation:
        for piece in self._streamed(request, cancel):
            if isinstance(piece, Generation):
                return piece
        raise AssertionError("a stream ends with its Generation")

    def generate_batch(self, requests: Sequence[Request]) -> list[Generation]:
        """The whole answers, in the order of the requests, computed together: each is what `generate` gives, up to
        rounding.

        Requests may carry other LoRA versions each. On a CPU a batch of short prompts costs a fraction of one by one;
        prompts are computed whole, so none of them reads or writes KV pages. Raises as `generate`, for all.
        """
        for request in requests:
            self._refuse(request)
        engine = self._ready()
        if not engine.batches:
            return [self._collected(request, None) for request in requests]
        from ._local_batch import answered

        return answered(engine, requests)

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Raises `ConfigError`: a chat model gives no useful vectors."""
        del texts
        raise ConfigError(f"{self.name} doesn't embed: choose an embedder, for example embedder='default'")

    async def aembed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Raises `ConfigError`, as `embed`."""
        return self.embed(texts)

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` by the model's own tokenizer, without special tokens."""
        count = self._counter
        if count is None:
            count = self._counter = counter(self._prepared())
        return count(text)

    def count_request(self, request: Request) -> TokenCount:
        """Tokens of the whole prompt as the model's chat template writes it; loads the tokenizer, not the weights."""
        self._refuse(request)
        template = self._template
        if template is None:
            from ._local_prompt import Template

            template = self._template = Template(load_tokenizer(self._prepared()))
        prompt = template.prompt(request.segments, request.options.extra.get("chat_template_kwargs"))
        return TokenCount(tokens=len(prompt.tokens), exact=True)

    async def acount_request(self, request: Request) -> TokenCount:
        """As `count_request`, in a worker thread."""
        return await asyncio.to_thread(self.count_request, request)

    def tensors(self) -> Tensors:
        """The loaded model, for training."""
        engine = self._ready()
        loaded = engine.loaded
        return Tensors(
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            lock=self._lock,
            device=loaded.device,
            dtype=loaded.dtype,
            identity=loaded.content,
            name=self.name,
            render=engine.template.render,
        )

    def drop_loras(self, digests: Sequence[str]) -> None:
        """Let go of these LoRA versions, wherever they are loaded or act."""
        engine = self._engine
        if engine is not None:
            engine.loras.drop(digests)

    def erase_slots(self) -> int:
        """Let go of the states that live conversations left in memory; returns how many conversations those were."""
        engine = self._engine
        return 0 if engine is None else engine.tails.drop()

    def close(self) -> None:
        """Let go of the model's memory. Later calls raise `Unavailable`; safe to call twice."""
        with self._loading:
            self._closed = True
            if self._engine is not None:
                self._engine.records.close()
            self._engine = self._counter = self._template = None


async def _in_thread(work: Callable[[], _Result], cancel: threading.Event) -> _Result:
    """``work`` in a worker thread. A cancellation is told to it, and goes on only when the thread is done."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancel.set()
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:  # cancelled again: the thread is on its way out already
                continue
        if not task.cancelled():
            task.exception()  # taken, so that asyncio doesn't report it as lost
        raise


def create(model: str, settings: Mapping[str, Any]) -> LocalProvider:
    """The provider for ``local:<model>``: ``smollm2`` (the default), a model folder or a .gguf file.

    Raises `MissingDependency` with the command to install what is missing, `ConfigError` for a wrong path or setting.
    """
    return LocalProvider(model, settings)
