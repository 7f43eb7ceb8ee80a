"""Recalled records as stored KV states: made behind made-up examples after an answer, composed into later prompts.

Knows how a record's states are computed, turned to another position and put into a cache; knows nothing of how they are
kept or of how good that is (_local_records_gate.py measures it). Approximate by nature: a composed record has not seen
the records before it. What is computed behind one is never kept as an exact prefix.

A record is computed behind the system text, the opening of the turn and three made-up records ("primed"); only its own
states are kept. Standing alone it would take the attention of a first record, which is most of the loss.
Computing the first tokens anew is LegoLink of EPIC (Hu et al. 2024, arXiv 2410.15332).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from agentmem.activation.identity import digest
from agentmem.activation.pages import Codec, encode
from agentmem.errors import AgentMemError
from agentmem.provider import LoraRef, RecordPages, Request
from agentmem.types import Segment

from ._local_device import as_array
from ._local_loras import plain
from ._local_prompt import Pieces, Prompt
from ._local_rotation import rotation, unlike

if TYPE_CHECKING:
    from ._local_generate import Engine

__all__ = ["EXAMPLES", "Primer", "Recall", "RecordStates", "Rows", "Step"]

log = logging.getLogger("agentmem")

#: Tokens of a record's beginning that the mode "repaired" computes anew in every turn.
REPAIRED = 16
#: Lines of fewer tokens stay text: they are computed in a moment, a page of 64 positions is more than their states, and
#: the default model confuses them when none has seen the others.
LEAST = 32
#: Records whose states are made after one answer, at most.
MADE_A_TURN = 4
#: (day, name, text) of made-up records. Mixed on purpose: a statement, questions, a thanks with a photo.
EXAMPLES = (
    (
        "2024-03-02",
        "Nora",
        "I finally repainted the kitchen last weekend, a pale yellow, and Tom put up the new shelves. It took us two "
        "whole days.",
    ),
    (
        "2024-03-09",
        "Felix",
        "Wow, that sounds lovely! I signed up for a pottery class on Thursdays. Have you ever tried that?",
    ),
    (
        "2024-03-21",
        "Nora",
        "Not yet, thanks for asking! My brother Leon is visiting from Lyon in May. [shares a photo: a small garden "
        "with a wooden bench]",
    ),
)

#: Keys and values of some positions, [layers, KV heads, positions, dim] each, keys as turned where they were computed.
Rows = tuple[torch.Tensor, torch.Tensor]
#: Runs the model on these next tokens, with these more of its own inputs; gives the last one's logits.
Step = Callable[[Sequence[int], Mapping[str, torch.Tensor] | None], torch.Tensor]


@dataclass(frozen=True)
class Primer:
    """What a record's states are computed behind: tokens of the system text, the turn's opening and the examples."""

    tokens: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class Part:
    """One recalled line: its record, its tokens, how often it was shown before, and its stored pages, if there are."""

    record: str
    tokens: list[int]
    shown: int
    pages: Sequence[Any] = ()


@dataclass(frozen=True)
class Recall:
    """A request's recalled lines, and what of them is stored. ``skip`` tokens of each are computed anew."""

    pages: RecordPages
    loras: tuple[LoraRef, ...]
    system: tuple[Segment, ...]
    pieces: Pieces
    primer: Primer
    identity: bytes
    subject: bytes
    skip: int
    passed: bool | None
    parts: tuple[Part, ...]

    @property
    def composed(self) -> bool:
        """Whether anything enters as stored states."""
        return any(part.pages for part in self.parts)

    @property
    def stored_tokens(self) -> int:
        """Tokens that do."""
        return sum(len(part.tokens) - self.skip for part in self.parts if part.pages)

    @property
    def prompt(self) -> Prompt:
        """The whole prompt in the tokens of its pieces."""
        head = self.pieces.head
        return Prompt(tokens=self.pieces.tokens, stable=head.stable, starts=head.starts)


class RecordStates:
    """The record states of one loaded model."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()  # of the primer's cache, which every making rewinds
        self._primed: tuple[bytes, Any] | None = None
        self._seen: deque[bytes] = deque(maxlen=16)
        self._gate: threading.Thread | None = None
        self._stop = threading.Event()
        self.rotation, self.refused = rotation(engine.loaded.model)
        self._told = False

    # -- a request -------------------------------------------------------------------------------------------------

    def recall(self, request: Request) -> Recall | None:
        """What of the request's recalled lines is stored; None where they enter as text for good."""
        pages = request.record_pages
        if pages is None or not request.recalled:
            return None
        if self.refused is None and not self._engine.states.check():
            self.refused = self._engine.states.miss
        if self.refused is not None:
            if not self._told:
                log.warning("recalled records stay text for %s: %s", self._engine.name, self.refused)
                self._told = True
            return None
        extra = request.options.extra.get("chat_template_kwargs")
        pieces = self._engine.template.pieces(request.segments, [line.line for line in request.recalled], extra)
        system = tuple(segment for segment in request.segments if segment.name == "system")
        primer = self.primer(pages, system, extra)
        if pieces is None or primer is None:
            log.debug("recalled records stay text: the chat template or the tokenizer changes them")
            return None
        skip = REPAIRED if pages.repaired else 0
        identity = digest(
            {
                "model": self._engine.identity(request.loras, pages.grid),
                "primer": primer.digest,
                "records": f"behind a primer, without their first {skip} tokens, 1",
            }
        )
        subject = digest({"record kv": identity, "codec": pages.codec})
        verdict = pages.verdict(subject)
        passed = verdict.get("passed")
        parts = []
        for line, tokens in zip(request.recalled, pieces.lines, strict=True):
            found = pages.find(identity, line.record, tokens[skip:]) if passed and len(tokens) >= LEAST else ()
            parts.append(Part(line.record, tokens, line.shown, _sound(found)))
        return Recall(
            pages=pages,
            loras=request.loras,
            system=system,
            pieces=pieces,
            primer=primer,
            identity=identity,
            subject=subject,
            skip=skip,
            passed=passed if isinstance(passed, bool) else None,
            parts=tuple(parts),
        )

    def primer(
        self, pages: RecordPages, system: tuple[Segment, ...], extra: Mapping[str, Any] | None = None
    ) -> Primer | None:
        """The primer behind this system text; None where the template doesn't keep its lines."""
        turn, lines = pages.lay_out(EXAMPLES, "x")
        pieces = self._engine.template.pieces((*system, *turn), lines, extra)
        if pieces is None:
            return None
        tokens = [*pieces.head.tokens, *(token for line in pieces.lines for token in line)]
        return Primer(tuple(tokens), digest({"primer": json.dumps(tokens)}))

    # -- composing -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def compose(self, recall: Recall, cache: Any, done: int, step: Step) -> torch.Tensor:
        """Logits after the prompt's last token. ``cache`` holds the first ``done`` tokens of the head; records enter it
        stored, the rest is computed.

        In a cache that is attended to in place the queries are turned, so that stored pages stay as they are. Else the
        pages are decoded into the cache and their keys turned there.
        """
        if hasattr(cache, "attach"):
            return self._attached(recall, cache, done, step)
        rows = [self._decoded(recall, part) if part.pages else None for part in recall.parts]
        return self.placed(
            cache,
            at=len(recall.pieces.head.tokens),
            before=recall.pieces.head.tokens[done:],
            lines=recall.pieces.lines,
            rows=rows,
            primer=recall.primer,
            skip=recall.skip,
            rest=recall.pieces.rest,
            step=step,
        )

    @torch.inference_mode()
    def placed(
        self,
        cache: Any,
        *,
        at: int,
        before: Sequence[int] = (),
        lines: Sequence[list[int]],
        rows: Sequence[Rows | None],
        primer: Primer,
        skip: int,
        rest: Sequence[int],
        step: Step,
    ) -> torch.Tensor:
        """As `compose`, for a cache of copies: ``rows[i]`` are the states of ``lines[i][skip:]``, None computes it.

        The first line stands at position ``at``, the tokens ``before`` right before it. All that is computed goes in
        one run of steps: a token sees what stands before it, wherever that came from.
        """
        fresh = list(enumerate(before, start=at - len(before)))
        for line, states in zip(lines, rows, strict=True):
            known = 0
            if states is not None:
                known = len(line) - skip
                keys = self.rotation.turned(states[0], at - len(primer.tokens))
                for layer, key, value in zip(cache.layers, keys, states[1], strict=True):
                    layer.place(at + skip, key, value)
            fresh += [(at + i, token) for i, token in enumerate(line[: len(line) - known])]
            at += len(line)
        tokens = [token for _, token in fresh] + list(rest)
        places = [place for place, _ in fresh] + list(range(at, at + len(rest)))
        logits = torch.empty(0)
        grid = 256
        for start in range(0, len(tokens), grid):
            part, where = tokens[start : start + grid], places[start : start + grid]
            # Behind all that is stored the model counts by itself.
            logits = step(part, self._scattered(cache, where) if start < len(fresh) else None)
        return logits

    def _scattered(self, cache: Any, places: Sequence[int]) -> dict[str, Any]:
        """Inputs of a pass whose tokens stand at these positions, some of them between stored ones."""
        where = torch.tensor(places, device=self._engine.loaded.device)
        for layer in cache.layers:
            layer.scatter(where)
        total = cache.get_seq_length()
        seen = torch.arange(total, device=where.device)[None] <= where[:, None]
        mask = torch.zeros(seen.shape, dtype=self._engine.loaded.dtype, device=where.device)
        mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)
        return {"position_ids": where[None], "attention_mask": mask[None, None]}

    def _decoded(self, recall: Recall, part: Part) -> Rows | None:
        """The states of a record's pages; None where they can't be read after all."""
        states, grid, count = self._engine.states, recall.pages.grid, len(part.pages)
        heads, key_dim, value_dim = states.shapes[0]
        keys, values = (
            torch.empty((len(states.shapes), heads, grid * count, dim), dtype=states.dtype)
            for dim in (key_dim, value_dim)
        )
        try:
            for number, page in enumerate(part.pages):
                page.read_layers([as_array(k) for k in keys], [as_array(v) for v in values], number * grid)
        except AgentMemError as error:
            log.warning("the KV states of a recalled record can't be read, it is computed: %s", error)
            return None
        length, device = len(part.tokens) - recall.skip, self._engine.loaded.device
        return keys[:, :, :length].to(device), values[:, :, :length].to(device)

    def _attached(self, recall: Recall, cache: Any, done: int, step: Step) -> torch.Tensor:
        """As `placed`, in place: as many records at once as the tail has room for what of them is computed."""
        from ._local_attention import Stretch, seeing

        grid, at = recall.pages.grid, len(recall.pieces.head.tokens)
        stretches: list[Stretch] = []
        records = 0  # that are attached next
        # What is computed next: token, position, and how many of these records stand before it.
        waiting = [(token, place, 0) for place, token in enumerate(recall.pieces.head.tokens[done:], start=done)]

        def compute() -> torch.Tensor:
            nonlocal records
            logits, attached = torch.empty(0), bool(stretches)
            standing = cache.attach(stretches) if attached else 0
            stretches.clear()
            while waiting:
                part = waiting[: cache.grid - cache.tail]
                del waiting[: len(part)]
                tokens, places, seen = zip(*part, strict=True)
                with seeing([standing + before for before in seen]) if attached else contextlib.nullcontext():
                    logits = step(tokens, {"position_ids": torch.tensor([places])})
            records = 0
            return logits

        for part in recall.parts:
            first = recall.skip if part.pages else len(part.tokens)
            # Behind what is sealed in between, a token could see records that stand after it.
            if len(waiting) + first > cache.grid:
                compute()
            waiting += [(token, at + i, records) for i, token in enumerate(part.tokens[:first])]
            if part.pages:
                if len(waiting) > cache.grid:
                    compute()
                cosine, sine = (a.numpy() for a in self.rotation.angles(at - len(recall.primer.tokens)))
                left = len(part.tokens) - first
                for page in part.pages:
                    stretches.append(Stretch(page.data, cosine, sine, 0, min(left, grid)))
                    left -= grid
                records += 1
            at += len(part.tokens)
        if len(waiting) + len(recall.pieces.rest) > cache.grid:
            compute()
        waiting += [(token, at + i, records) for i, token in enumerate(recall.pieces.rest)]
        return compute()

    # -- making ----------------------------------------------------------------------------------------------------

    def learn(self, recall: Recall, cancel: threading.Event | None) -> int:
        """After an answer: make the states of lines that were shown before; how many. Where nobody knows yet how well
        this model does with them, that is tried first, in the background, and until then they stay text. What fails is
        raised: the caller has an answer to keep."""
        hot = [p for p in recall.parts if p.shown > 0 and not p.pages and len(p.tokens) >= LEAST]
        if not hot or recall.passed is False:
            return 0
        if recall.passed is None:
            # A system text that is another in every turn is not worth a trial: nothing made behind it is used twice.
            if recall.primer.digest in self._seen:
                self._try(recall)
            self._seen.append(recall.primer.digest)
            return 0
        return sum(self._kept(recall, part, cancel) for part in hot[:MADE_A_TURN])

    def _kept(self, recall: Recall, part: Part, cancel: threading.Event | None) -> bool:
        started = time.perf_counter()
        rows = self.made(recall.primer, part.tokens, recall.loras, cancel)
        keys, values = (side[:, :, recall.skip :].cpu().contiguous() for side in rows)
        return recall.pages.keep(
            recall.identity,
            part.record,
            part.tokens[recall.skip :],
            [(as_array(key), as_array(value)) for key, value in zip(keys, values, strict=True)],
            learnt=[record for lora in plain(recall.loras) for record in lora.records],
            seconds=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def made(
        self, primer: Primer, line: Sequence[int], loras: Sequence[LoraRef], cancel: threading.Event | None
    ) -> Rows:
        """The states of a line's tokens, computed behind the primer."""
        engine = self._engine
        under = digest({"primer": primer.digest, "model": engine.identity(loras, 0)})
        start, end = len(primer.tokens), len(primer.tokens) + len(line)
        with self._lock:
            if self._primed is None or self._primed[0] != under:
                self._primed = None
                cache = engine.states.empty(start + 256)
                engine.forward(primer.tokens, cache, loras, cancel)
                self._primed = under, cache
            cache = self._primed[1]
            try:
                for layer in cache.layers:
                    layer.restored(start)
                engine.forward(line, cache, loras, cancel)
                keys, values = (
                    torch.stack([getattr(layer, side)[0, :, start:end] for layer in cache.layers])
                    for side in ("keys", "values")
                )
            except BaseException:
                self._primed = None  # it may hold half a line
                raise
        return keys, values

    def settled(self, rows: Rows, pages: RecordPages) -> Rows:
        """Rows as they come back from the pages' codec."""
        codec: Any = pages.codec
        return self._through(rows, codec, pages.grid) if codec in {"int8", "k8v4", "int4"} else rows

    def _through(self, rows: Rows, codec: Codec, grid: int) -> Rows:
        count = rows[0].shape[2]
        padded = [
            torch.cat([side, side[:, :, -1:].expand(-1, -1, -count % grid, -1)], dim=2).cpu().contiguous()
            for side in rows
        ]
        layers = [(as_array(key), as_array(value)) for key, value in zip(*padded, strict=True)]
        for at in range(0, padded[0].shape[2], grid):
            encode(layers, grid, at, codec, writeback=True)
        keys, values = (side[:, :, :count].to(rows[0].device) for side in padded)
        return keys, values

    # -- how good it is --------------------------------------------------------------------------------------------

    def _try(self, recall: Recall) -> None:
        with self._lock:
            if self._stop.is_set() or (self._gate is not None and self._gate.is_alive()):
                return
            self._gate = threading.Thread(target=self._tried, args=(recall,), name="agentmem record KV")
            self._gate.start()

    def _tried(self, recall: Recall) -> None:
        from ._local_records_gate import Stopped, judge

        def running() -> None:
            # Not a daemon, which the interpreter would stop in the middle of a pass; it leaves when everybody does.
            if self._stop.is_set() or not threading.main_thread().is_alive():
                raise Stopped

        try:
            running()
            reason = unlike(self.rotation, self._engine)
            if reason is not None:
                self.refused = reason
                recall.pages.note(recall.subject, {"passed": False, "reason": reason})
                log.warning("recalled records stay text for %s: %s", self._engine.name, reason)
                return
            judge(self, self._engine, recall, running)
        except Stopped:
            log.debug("the trial of recalled records as KV was stopped and will go on another time")
        except Exception as error:  # noqa: BLE001 - nobody waits for it, nor would hear of it
            log.warning("recalled records could not be tried as KV and stay text: %s: %s", type(error).__name__, error)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a trial that runs; whether none runs any more."""
        gate = self._gate
        if gate is not None:
            gate.join(timeout)
        return gate is None or not gate.is_alive()

    def close(self) -> None:
        """Stop a trial that runs, within a pass of the model."""
        self._stop.set()
        self.wait()
        self._primed = None


def _sound(pages: Sequence[Any]) -> Sequence[Any]:
    """The pages if all their states are good, else none: one that fails is put aside by its store."""
    try:
        for page in pages:
            if not page.verified:
                page.verify()
    except AgentMemError as error:
        log.warning("the KV states of a recalled record are damaged, it is computed: %s", error)
        return ()
    return pages
