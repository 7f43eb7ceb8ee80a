"""Generation on the local model: prefill on the token grid with page reuse, then the answer token by token, streamed.

Knows how a request becomes tokens and what is computed for it; knows nothing of files, loading, how pages are stored or
how tokens are chosen (_local_text.py).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from agentmem.activation.identity import digest
from agentmem.errors import AgentMemError, InvalidInput, ProviderError, Rejected, Unavailable
from agentmem.provider import Generation, LoraRef, Request
from agentmem.types import Attended, Usage

from ._local_ahead import following
from ._local_device import NotLoaded
from ._local_in_place import InPlace, PagedStates
from ._local_kept import Kept, Tails
from ._local_kv import GRID, States
from ._local_loras import Loras, Starts, calls, plain
from ._local_model import Loaded, Settings, compute_environment
from ._local_prompt import Prompt, Template
from ._local_records import Recall, RecordStates
from ._local_text import Sampler, Text
from ._local_trained import Standing, standing

__all__ = ["Cancelled", "Engine"]

log = logging.getLogger("agentmem")

#: Tokens of an answer where the request doesn't say.
DEFAULT_ANSWER = 256
#: Room made at once for an answer's KV states; a longer one makes the buffers grow.
_AHEAD = 512


class Cancelled(BaseException):
    """The caller gave this generation up. Never leaves the provider."""


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
            _stop_if(cancel)
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
        run = _Run(self, request, prompt, budget, cancel, recall=recall, stand=stand)
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
            self.records.learn(recall, cancel)
        written += self._ahead(run, request, text.text, cancel)
        usage = Usage(
            input_tokens=len(whole),
            cached_tokens=run.cached if stand is None else max(run.cached, stand.tokens) + stand.saved,
            written_tokens=written,
            output_tokens=count,
            first_token_s=first_s,
            total_s=time.perf_counter() - started,
        )
        yield Generation(text=text.text, usage=usage, finish_reason=finish, miss=run.miss, attended=run.attended)

    def _ahead(self, run: _Run, request: Request, answer: str, cancel: threading.Event | None) -> int:
        """Prefill the answer behind what the run keeps: the next turn's first token then waits for its message only.
        Returns how many tokens of pages that wrote."""
        after = following(request, answer) if run.keeps else None
        if after is None:
            return 0
        prompt = self.template.prompt(after.segments, after.options.extra.get("chat_template_kwargs"))
        if self.window is not None and len(prompt.tokens) >= self.window:
            return 0
        ahead = _Run(self, after, prompt, 0, cancel)
        try:
            ahead.prefill()
            return ahead.seal()
        except AgentMemError as error:  # the answer is out: what was to help the next one must not lose it
            log.warning("the answer is read again with the next turn: %s", error)
            return 0
        finally:
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


class _Run:
    """The KV states of one request, from the stored pages to the last token."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        prompt: Prompt,
        budget: int,
        cancel: threading.Event | None,
        *,
        recall: Recall | None = None,
        stand: Standing | None = None,
    ) -> None:
        self._engine = engine
        self._pages = request.pages
        self._tenant = request.tenant
        self._since = engine.tails.drops
        self._states: States | PagedStates = engine.states
        self._loras = request.loras
        self._calls = calls(self._loras, prompt.tokens)
        self._prompt = prompt
        self._capacity = len(prompt.tokens) + min(budget, _AHEAD)
        self._cancel = cancel
        self._grid = GRID if request.pages is None else request.pages.grid
        self._placed = 0 if stand is None else stand.tokens
        self._identity = b""
        self._cache: Any = None
        self._all: list[int] = []
        self._done = 0
        self._stand = stand
        self._recall = recall if recall is not None and recall.composed else None
        self._exact = len(
            prompt.tokens if self._recall is None else self._recall.pieces.head.tokens
        )  # what follows was computed behind composed states: never kept
        self._first = 0
        self._refilled = 0  # where the states that were kept from the last turn end
        self._encoded: dict[int, Any] = {}  # what the codec made of the pages that this run computed
        self._seconds: dict[int, float] = {}  # and how long computing each took
        self.cached = 0
        self.miss: str | None = None

    def prefill(self) -> torch.Tensor:
        """Logits after the prompt's last token. On the grid from position 0, whatever was restored: equal steps give
        equal bits. The last step is always computed, so a prompt that ends with a page computes that page again."""
        stock, tokens, grid = self._engine.states, self._prompt.tokens, self._grid
        if self._pages is not None and not stock.check():
            self.miss, self._pages = stock.miss, None
        if self._pages is not None:
            paged = self._engine.in_place.states(self._pages)
            self._states = stock if paged is None else paged
            attention = None if paged is None else paged.attention
            self._identity = self._engine.identity(self._loras, grid, attention)
            if self._stand is not None:
                self._identity = self._stand.identity(self._identity)
            stored = self._pages.longest(self._identity, tokens)
            known = next((i for i, page in enumerate(stored) if not self._matches(page, i)), len(stored))
            wanted = min(known, (self._exact - 1) // grid)
            self._cache, self.cached = self._states.restore(stored[:wanted], grid, self._capacity)
            self._first = known if self.cached == wanted * grid else self.cached // grid
        else:
            self._cache = stock.empty(self._capacity)
        self._done = self.cached
        self._refill()
        self._stand_in()
        if self._recall is None:
            return self.prefill_to(len(tokens))
        # What of the head is no whole step goes into one pass with what follows the records.
        self.prefill_to(self._exact - self._exact % grid)
        logits = self._engine.records.compose(self._recall, self._cache, self._done, self._composed_step)
        self._done = len(tokens)
        return logits

    def prefill_to(self, end: int) -> torch.Tensor:
        """Logits after the prompt's token ``end - 1``, from what is done already: on the grid, the last step short."""
        stock, tokens, grid = self._engine.states, self._prompt.tokens, self._grid
        logits = torch.empty(0)
        while self._done < end:
            part = tokens[self._done : min(end, self._done + self._room())]
            started = time.perf_counter()
            try:
                logits = self.step(part)
            except NotLoaded as error:  # a page that was still on its way to the device
                log.warning("KV pages could not be read, all is computed again: %s", error)
                self.leave()
                self._cache, self.cached, self._first, self._done = stock.empty(self._capacity), 0, 0, 0
                self._refilled = 0
                self._stand_in()
                continue
            number, on_grid = divmod(self._done, grid)
            self._seconds[number] = self._seconds.get(number, 0.0) + time.perf_counter() - started
            self._keep(len(part), self._seconds[number])
            # The step behind a trained prefix begins within a page, whose other states were placed; so does the step
            # behind what was kept from the last turn.
            whole = not on_grid or self._done in (self._placed, self._refilled)
            if self._pages is not None and whole and (self._done + len(part)) % grid == 0:
                self._encoded[number] = self._states.settle(self._pages, self._cache, number)
            else:
                self._seal_tail()
            self._done += len(part)
        return logits

    @property
    def keeps(self) -> bool:
        """Whether states behind the last whole page are kept for the next turn."""
        return self._least is not None

    @property
    def _least(self) -> int | None:
        """How many tokens a step has to have at least so that its states may be kept for the next turn, and be taken
        from the last one; None where none may."""
        if self._recall is not None or self._stand is not None or plain(self._loras):
            return None
        return self._states.steady if isinstance(self._states, PagedStates) else None

    @property
    def _kept_end(self) -> int:
        """States of tokens from here on are never kept: they may change, or stand behind composed records or under an
        activated LoRA."""
        return min(self._prompt.stable, self._exact, *self._calls.values())

    def _refill(self) -> None:
        """Go on behind what the last turn left, so far that a step of the least size remains, also of the page."""
        least, start = self._least, self._done
        if least is None:
            return
        found = self._engine.tails.find(self._identity, self._tenant, self._prompt.tokens, start)
        if found is None:
            return
        tail, count = found
        count = min(count, self._kept_end - start, len(self._prompt.tokens) - start - least, self._grid - least)
        if count > 0:
            self._cache.refill(tail.rows, count)
            self._done = self.cached = self._refilled = start + count
            self._seconds[start // self._grid] = tail.seconds * count / (len(tail.tokens) - start)

    def _keep(self, count: int, seconds: float) -> None:
        """Keep what of the last page is stable, once the step of ``count`` tokens that ends it was computed; computing
        that page so far took ``seconds``."""
        least, end = self._least, self._kept_end
        start = end // self._grid * self._grid
        if least is None or count < least or not max(self._done, start) < end <= self._done + count:
            return
        tokens = tuple(self._prompt.tokens[:end])
        rows = self._cache.tail_rows(end - start)
        self._engine.tails.keep(Kept(self._identity, self._tenant, tokens, start, rows, seconds), self._since)

    def _stand_in(self) -> None:
        """Put what was not restored of a trained prefix into the cache, step by step of the grid as if computed."""
        stand, grid = self._stand, self._grid
        while stand is not None and self._pages is not None and self._done < stand.tokens:
            count = min(stand.tokens - self._done, grid - self._done % grid)
            stand.place(self._cache, self._done, count, self._engine.states.dtype, self._engine.loaded.device)
            self._done += count
            if self._done % grid == 0:
                number = self._done // grid - 1
                self._encoded[number] = self._states.settle(self._pages, self._cache, number)

    def _room(self) -> int:
        """Tokens of the next step of prefill at most."""
        if isinstance(self._states, PagedStates):
            return int(self._cache.grid - self._cache.tail)
        if self._engine.states.gridded:
            return self._grid - self._done % self._grid
        return len(self._prompt.tokens)

    def _seal_tail(self) -> None:
        """What does not end with a step of the grid (a long answer) is held in compressed pages too, but never kept."""
        if isinstance(self._states, PagedStates) and self._cache.full:
            self._cache.seal()

    def _matches(self, page: Any, number: int) -> bool:
        return tuple(page.tokens) == tuple(self._prompt.tokens[number * self._grid : (number + 1) * self._grid])

    def step(self, tokens: Sequence[int], inputs: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits after these next tokens. ``inputs`` are more of the model's own."""
        _stop_if(self._cancel)
        self._all += tokens
        # A model without a cache of any kind reads everything again.
        given = self._all if self._engine._cache_name is None else tokens
        more: dict[str, Any] = {} if inputs is None else {"inputs": inputs}
        if self._calls:
            more["starts"] = self._starts(len(given), inputs)
        logits, self._cache = self._engine.forward(given, self._cache, self._loras, self._cancel, **more)
        return logits

    def _starts(self, count: int, inputs: Mapping[str, torch.Tensor] | None) -> Starts:
        """From which of the next ``count`` tokens on activated LoRAs act: counted from the pass's end, since composed
        records leave gaps before it, but never behind an invocation."""
        if inputs is not None:
            end = int(inputs["position_ids"][0, -1]) + 1
        elif hasattr(self._cache, "get_seq_length"):
            end = int(self._cache.get_seq_length()) + count
        else:
            end = len(self._all)
        return {invocation: (max(count - end + start, 0),) for invocation, start in self._calls.items()}

    def _composed_step(self, tokens: Sequence[int], inputs: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        logits = self.step(tokens, inputs)
        self._seal_tail()
        return logits

    def answer_step(self, token: int) -> torch.Tensor:
        """Logits after this token of the answer."""
        logits = self.step([token])
        self._seal_tail()
        return logits

    @property
    def attended(self) -> Attended | None:
        """What was attended to in place, or came as KV states of records, if anything did."""
        stand = self._stand
        trained = {} if stand is None else {"trained_tokens": stand.tokens, "stands_for": stand.stands_for}
        if isinstance(self._states, PagedStates) and self._cache is not None:
            attended: Attended = self._cache.attended().model_copy(update=trained)
            return attended if attended.tokens or trained else None  # else all of it was still in the tail
        if stand is not None and self._pages is not None:
            return Attended(codec=self._pages.codec, trained_tokens=stand.tokens, stands_for=stand.stands_for)
        if self._recall is not None:
            return Attended(codec=self._recall.pages.codec, record_tokens=self._recall.stored_tokens)
        return None

    def leave(self) -> None:
        """At the end, whatever happened."""
        self._states.leave(self._cache)

    def seal(self) -> int:
        """Store the pages that this run computed and that lie wholly in the stable prefix; how many tokens that is."""
        if self._pages is None:
            return 0
        # No page holds what an activated LoRA made.
        last = min(self._prompt.stable, self._done, self._exact, *self._calls.values()) // self._grid
        if last <= self._first:
            return 0
        tokens = self._prompt.tokens[: last * self._grid]
        # What a LoRA learnt has shaped every state that was computed under it.
        learnt = {record for lora in plain(self._loras) for record in lora.records}
        records = [
            tuple(dict.fromkeys((*self._prompt.records((number + 1) * self._grid), *sorted(learnt))))
            for number in range(self._first, last)
        ]
        try:
            return self._states.seal(
                self._pages,
                self._identity,
                self._cache,
                tokens=tokens,
                first=self._first,
                records=records,
                encoded=[self._encoded.get(number) for number in range(self._first, last)],
                seconds=sum(self._seconds.get(number, 0.0) for number in range(self._first, last)),
            )
        except AgentMemError as error:  # the memory was closed while an answer was still being read
            log.warning("KV pages of %d tokens were not kept: %s", len(tokens), error)
            return 0


def _packed(_: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The last position of a longer pass is a slice with strides of its own, for which torch copies the whole weight of
    the head (57 MB in the default model, 60 ms): given as a tensor of its own it does not."""
    if not given or given[0].shape[:2] != (1, 1):
        return given
    return (given[0].clone(memory_format=torch.contiguous_format), *given[1:])


def _stop_if(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled
