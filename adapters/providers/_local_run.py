"""The KV states of one request: prefill on the token grid with page reuse, what is sealed, what is kept for the next.

Knows which states of a prompt are restored, computed and stored, in steps whose bits don't depend on what was; knows
nothing of sampling, of how a prompt is laid out or how pages are stored.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from agentmem.provider import Request
from agentmem.types import Attended

from ._local_device import NotLoaded
from ._local_in_place import PagedStates
from ._local_kept import Kept
from ._local_kv import GRID, States
from ._local_loras import Starts, calls, plain
from ._local_prompt import Prompt
from ._local_records import Recall
from ._local_trained import Standing

if TYPE_CHECKING:
    from ._local_generate import Engine

__all__ = ["Cancelled", "Run", "stop_if"]

log = logging.getLogger("agentmem")

#: Room made at once for an answer's KV states; a longer one makes the buffers grow.
_AHEAD = 512


class Cancelled(BaseException):
    """The caller gave this generation up. Never leaves the provider."""


class Run:
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
        since: int | None = None,
    ) -> None:
        #: How often kept states had been let go of when this turn began.
        self.since = engine.tails.drops if since is None else since
        self._engine = engine
        self._pages = request.pages
        self._tenant = request.tenant
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
            self._engine.tails.sweep(self._pages.forgotten)
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
        records = frozenset(self._prompt.records(end))
        # One may have been forgotten between the reading of the records and the beginning of this run.
        if self._pages is None or self._pages.forgotten(records):
            return
        tokens = tuple(self._prompt.tokens[:end])
        rows = self._cache.tail_rows(end - start)
        self._engine.tails.keep(Kept(self._identity, self._tenant, tokens, start, rows, seconds, records), self.since)

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
        stop_if(self._cancel)
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
        except Exception as error:  # noqa: BLE001 - an answer is not lost for them, whatever failed
            log.warning("KV pages of %d tokens were not kept: %s: %s", len(tokens), type(error).__name__, error)
            return 0


def stop_if(cancel: threading.Event | None) -> None:
    """Raise `Cancelled` if the caller gave up."""
    if cancel is not None and cancel.is_set():
        raise Cancelled
