"""Generation on the local model: prefill, then the answer token by token, streamed.

Knows how a request becomes tokens and one pass of the model; knows nothing of files, loading, which states a prompt
needs (_local_run.py) or how tokens are chosen (_local_text.py).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from agentmem.activation.identity import digest
from agentmem.errors import InvalidInput, ProviderError, Rejected, Unavailable
from agentmem.provider import Generation, LoraRef, Request
from agentmem.types import Usage

from ._local_ahead import following
from ._local_heap import give_back
from ._local_in_place import InPlace
from ._local_kept import Tails
from ._local_kv import States
from ._local_loras import Loras, Starts, plain
from ._local_model import Loaded, Settings, compute_environment
from ._local_prompt import Template
from ._local_records import RecordStates
from ._local_run import Cancelled, Run, stop_if
from ._local_text import Sampler, Text
from ._local_trained import standing

__all__ = ["Cancelled", "Engine"]

log = logging.getLogger("agentmem")

#: Tokens of an answer where the request doesn't say.
DEFAULT_ANSWER = 256


class Engine:
    """A loaded model and everything that answers with it.

    Forward passes are one at a time under ``lock``; between two tokens it is free, so a stream that nobody reads on
    doesn't stop other requests, and each pass puts its own LoRA versions on the model first.
    """

    def __init__(self, loaded: Loaded, name: str, lock: threading.RLock, settings: Settings) -> None:
        self.loaded = loaded
        self.name = name
        self.lock = lock
        self.template = Template(loaded.tokenizer)
        model = loaded.model
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next((key for key in ("past_key_values", "cache_params") if key in parameters), None)
        self.options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.loras = Loras(model, loaded.content, lock, settings.lora_ram)
        self._ends = self._end_tokens()
        self._config = model.config.get_text_config(decoder=True)
        # Asked once: during a pass of ours it is another one for a moment.
        self._stock_attention = str(getattr(self._config, "_attn_implementation", ""))
        self.states = States(model, self._base_forward, loaded.device)
        self.records = RecordStates(self)
        self.in_place = InPlace(model, self._base_forward, self.states, loaded.device, settings.attention)
        self.tails = Tails()
        window: Any = getattr(self._config, "max_position_embeddings", None)
        self.window: int | None = window
        if isinstance(head := model.get_output_embeddings(), torch.nn.Linear):
            head.register_forward_pre_hook(_packed)

    def _end_tokens(self) -> frozenset[int]:
        generation_config = getattr(self.loaded.model, "generation_config", None)
        configured: Any = getattr(generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list | tuple) else [configured]
        found = [*several, self.loaded.tokenizer.eos_token_id, self.template.end_of_turn]
        return frozenset(int(token) for token in found if token is not None)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._ends

    @property
    def batches(self) -> bool:
        """Whether several sequences can go through the model at once, with a cache of ours."""
        return self._cache_name == "past_key_values" and self.states.gridded

    # -- one pass of the model -------------------------------------------------------------------------------------

    def _base_forward(self, tokens: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        return self.forward(tokens, cache, (), None)

    def forward(
        self,
        tokens: Sequence[int],
        cache: Any,
        loras: Sequence[LoraRef],
        cancel: threading.Event | None,
        *,
        keep: int | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
        starts: Starts | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Logits of the last of ``tokens``, float32 [vocabulary], and the cache with all of them in it.

        ``cache`` None is an empty one of the model's own kind. With ``keep`` the logits of so many last tokens, [keep,
        vocabulary]. ``inputs`` are more of the model's own. ``starts`` says from which of the tokens on activated LoRAs
        act, else none does. Raises `Unavailable` where memory runs out.
        """
        given = {self._cache_name: cache} if self._cache_name is not None and cache is not None else {}
        with (
            self.turn(cancel),
            self.loras.acting(loras, starts or {}),
            self._attention_of(cache),
            torch.inference_mode(),
        ):
            try:
                ids = torch.tensor([tokens], device=self.loaded.device)
                options = dict.fromkeys(self.options, keep or 1) | given | dict(inputs or {})
                output = self.loaded.model(input_ids=ids, use_cache=True, return_dict=True, **options)
                logits: torch.Tensor = output.logits[0, -1 if keep is None else slice(-keep, None)].float().cpu()
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise Unavailable(f"{self.name} ran out of memory on a prompt step of {len(tokens)} tokens") from error
        if bool(torch.isnan(logits).any()):
            raise ProviderError(f"{self.name} computed no valid numbers in {self.loaded.dtype}: set dtype = float32")
        return logits, getattr(output, self._cache_name) if self._cache_name is not None else None

    def _attention_of(self, cache: Any) -> contextlib.AbstractContextManager[None]:
        """Where a cache is attended to in place, the model does that while this is entered, and only then."""
        return cache.attending(self._config) if hasattr(cache, "attending") else contextlib.nullcontext()

    @contextlib.contextmanager
    def turn(self, cancel: threading.Event | None) -> Generator[None]:
        """The model is this thread's inside."""
        while not self.lock.acquire(timeout=0.05):
            stop_if(cancel)
        try:
            yield
        finally:
            self.lock.release()

    def identity(self, loras: Sequence[LoraRef], grid: int, attention: str | None = None) -> bytes:
        """Under what a KV page of this model is kept: everything that can change a bit of it but the tokens.

        ``attention`` is what computes it, where that is not the stock path.
        """
        # In their order: it is that of the sum, and floats don't add up to the same bits in every order.
        # Activated ones come after all that a page may hold.
        versions = json.dumps([(lora.digest, lora.scale) for lora in plain(loras)])
        return digest(
            {
                "model": self.loaded.content,
                "loras": versions,
                "layout": "every position of every layer, keys after rotary, grid from position 0, 1",
                "grid": grid,
                **compute_environment(self.loaded, attention or self._stock_attention),
            }
        )

    # -- a request -------------------------------------------------------------------------------------------------

    def stream(self, request: Request, cancel: threading.Event | None = None) -> Iterator[str | Generation]:
        """Pieces of the answer, then the `Generation`. Sealing pages waits until the last piece is out (or the reader
        leaves): it would only make someone wait for the next piece, and decoding doesn't touch the prompt's states."""
        options = request.options
        sampler = Sampler(options)
        request = replace(request, loras=self.loras.present(request.loras))
        if request.pages is not None and self.states.check():
            self.in_place.states(request.pages)  # trials of a model belong to loading it, which is no part of an answer
        started = time.perf_counter()
        prompt = self.template.prompt(request.segments, options.extra.get("chat_template_kwargs"))
        whole = prompt.tokens
        stand = standing(self, request, prompt)
        # Behind a trained prefix recalled records enter as text: two approximations in one prompt were never judged.
        recall = None if stand is not None else self.records.recall(request)
        if stand is not None:
            prompt = stand.prompt
        elif recall is not None and recall.composed:
            prompt, whole = recall.prompt, recall.prompt.tokens
        budget = self.budget(len(prompt.tokens), options.max_tokens)
        run = Run(self, request, prompt, budget, cancel, recall=recall, stand=stand)
        text = Text(self.loaded.tokenizer, (*options.stop, *self.template.stops))
        finish, count, first_s = "length", 0, None
        try:
            logits = run.prefill()
            while count < budget:
                token = sampler(logits, whole)
                first_s = time.perf_counter() - started if first_s is None else first_s
                if token in self._ends:
                    finish = "stop"
                    break
                count += 1
                if piece := text.push(token):
                    yield piece
                if text.stopped:
                    finish = "stop"
                    break
                if count < budget:
                    logits = run.answer_step(token)
            if piece := text.flush():
                yield piece
        finally:
            try:
                written = run.seal()
            finally:
                run.leave()
        if recall is not None:
            _afterwards("KV states of recalled records were not made", lambda: self.records.learn(recall, cancel))
        written += _afterwards(
            "the answer is read again with the next turn", lambda: self._ahead(run, request, text.text, cancel)
        )
        give_back()
        usage = Usage(
            input_tokens=len(whole),
            cached_tokens=run.cached if stand is None else max(run.cached, stand.tokens) + stand.saved,
            written_tokens=written,
            output_tokens=count,
            first_token_s=first_s,
            total_s=time.perf_counter() - started,
        )
        yield Generation(text=text.text, usage=usage, finish_reason=finish, miss=run.miss, attended=run.attended)

    def _ahead(self, run: Run, request: Request, answer: str, cancel: threading.Event | None) -> int:
        """Prefill the answer behind what the run keeps: the next turn's first token then waits for its message only.
        Returns how many tokens of pages that wrote."""
        after = following(request, answer) if run.keeps else None
        if after is None:
            return 0
        ahead: Run | None = None
        try:
            prompt = self.template.prompt(after.segments, after.options.extra.get("chat_template_kwargs"))
            if self.window is not None and len(prompt.tokens) >= self.window:
                return 0
            ahead = Run(self, after, prompt, 0, cancel, since=run.since)
            ahead.prefill()
            return ahead.seal()
        finally:
            if ahead is not None:
                ahead.leave()

    def budget(self, length: int, wanted: Any) -> int:
        """How many tokens an answer to a prompt of ``length`` tokens may have."""
        if wanted is not None and (isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0):
            raise InvalidInput(f"max_tokens is {wanted!r}; give a number of tokens, 0 for prefill only")
        budget: int = DEFAULT_ANSWER if wanted is None else wanted
        if self.window is None:  # some recurrent models have none
            return budget
        room = self.window - length
        if room < min(budget, 1):
            raise Rejected(
                f"the prompt has {length} tokens, the window of {self.name} is {self.window}, answer included: "
                "recall less, or start a new session"
            )
        return min(budget, room)


def _afterwards(lost: str, work: Callable[[], int]) -> int:
    """Work once the answer is out: whatever happens to it, the answer isn't lost. ``lost`` is said where it fails."""
    try:
        return work()
    except Cancelled:
        return 0
    except Exception as error:  # noqa: BLE001 - torch raises of any kind where memory runs out
        log.warning("%s: %s: %s", lost, type(error).__name__, error)
        return 0


def _packed(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The last position of a longer pass is a slice with strides of its own, for which torch copies the whole weight of
    the head (57 MB in the default model, 60 ms): given as a tensor of its own it does not."""
    if not given or given[0].shape[:2] != (1, 1):
        return given
    return (given[0].clone(memory_format=torch.contiguous_format), *given[1:])
