"""A provider whose requests are prepared by questions to their server: which slot and which LoRAs each is computed in.

Drives the planner's steps over the provider's own calls, sync and async; nothing about slots may break a chat. Without
a planner the slots are the server's own business, and only the LoRAs of each request are named.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from agentmem.errors import AgentMemError
from agentmem.provider import Generation, Request

from ._http import Clock
from ._llamacpp_files import Turn
from ._llamacpp_http import asend, send
from ._llamacpp_loras import Told, scales
from ._llamacpp_server import LISTED, Call, End, advance
from ._llamacpp_slots import SlotPlanner
from ._remote import Remote

__all__ = ["Pins", "Slotted"]

logger = logging.getLogger("agentmem")

T = TypeVar("T")

#: Seconds that erasing the slots may take in all; one that is busy is erased before its next use.
ERASE_S = 5.0
#: What may come of a server's unexpected reply or folder while a slot is prepared.
UNPLANNED = (AgentMemError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError)
#: Seconds for which a server without adapters is not asked again by requests that want none: one that was started
#: again with some applies them by itself until then.
NONE_S = 30.0


class Pins:
    """Names the adapters of every request to one server whose slots are its own business."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._ask_from = math.inf
        self._last: str | None = None

    def told(self, adapters: Told) -> None:
        """What the server listed just now: from when on requests that want no version ask for it too."""
        self._ask_from = 0.0 if adapters else time.monotonic() + NONE_S

    def before(self, request: Request) -> Generator[Call, Any, Request]:
        """The request with the scale of every adapter, and without reuse where the last one had other scales.

        As it is where the server has no adapters, or can't be asked: then it is the base that answers. The server
        itself drops a slot's states when a request names other scales than the last one that named any; the states
        that an unnamed request left, or another client's change of the server's scales, it keeps.
        """
        if not request.loras and time.monotonic() < self._ask_from:
            return request
        try:
            told = yield LISTED
        except AgentMemError as error:
            if request.loras:
                logger.warning("%s answers without LoRA versions, its adapters can't be listed: %s", self._name, error)
            told = ()
        self.told(told)
        if not told:
            return request
        extra = dict(request.options.extra)
        wanted = scales(told, request.loras, extra.get("lora"))
        files = {int(one["id"]): str(one["path"]) for one in told}
        acting = json.dumps(sorted([files.get(number, ""), scale] for number, scale in wanted.items() if scale))
        with self._lock:
            same, self._last = acting == self._last, acting
        if not same:
            extra["cache_prompt"] = False
        extra["lora"] = [{"id": number, "scale": scale} for number, scale in sorted(wanted.items())]
        return replace(request, options=replace(request.options, extra=extra))


class Slotted(Remote):
    """The faces of a `Remote` whose server has slots and LoRAs; without a ``_planner`` its slots are left alone."""

    _planner: SlotPlanner | None = None
    _pins: Pins

    def _answer(self, request: Request, clock: Clock) -> Generation:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            return super()._answer(self._run(self._pins.before(request), clock), clock)
        try:
            self._plan(planner, turn, clock)
            return planner.after(turn, _later(super()._answer(_placed(turn), clock), turn.took_s))
        finally:
            planner.done(turn)

    async def _aanswer(self, request: Request, clock: Clock) -> Generation:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            return await super()._aanswer(await self._arun(self._pins.before(request), clock), clock)
        try:
            await self._aplan(planner, turn, clock)
            return planner.after(turn, _later(await super()._aanswer(_placed(turn), clock), turn.took_s))
        finally:
            planner.done(turn)

    def _pieces(self, request: Request, clock: Clock) -> Generator[str | Generation, None, None]:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            yield from super()._pieces(self._run(self._pins.before(request), clock), clock)
            return
        try:
            self._plan(planner, turn, clock)
            with contextlib.closing(super()._pieces(_placed(turn), clock)) as pieces:
                for piece in pieces:
                    yield planner.after(turn, piece) if isinstance(piece, Generation) else piece
        finally:
            planner.done(turn)

    async def _apieces(self, request: Request, clock: Clock) -> AsyncGenerator[str | Generation, None]:
        planner, turn = self._planner, _turn(request)
        try:
            if planner is not None and turn is not None:
                await self._aplan(planner, turn, clock)
                request = _placed(turn)
            else:
                request = await self._arun(self._pins.before(request), clock)
            async with contextlib.aclosing(super()._apieces(request, clock)) as pieces:
                async for piece in pieces:
                    if planner is not None and turn is not None and isinstance(piece, Generation):
                        yield planner.after(turn, piece)
                    else:
                        yield piece
        finally:
            if planner is not None and turn is not None:
                planner.done(turn)

    def erase_slots(self) -> int:
        """Erase what the server's slots hold in memory; returns how many were erased. Never raises."""
        if self._planner is None:
            return 0
        steps = self._planner.erase()
        try:
            return self._run(steps, Clock(min(ERASE_S, self._timeout_s)))
        except (AgentMemError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: its slots can't be erased now, each will be before its next use: %s", self.name, error)
            return 0

    def _plan(self, planner: SlotPlanner, turn: Turn, clock: Clock) -> None:
        started = time.monotonic()
        try:
            self._run(planner.before(turn), clock)
        except UNPLANNED as error:
            self._unplanned(turn, error)
        turn.took_s = time.monotonic() - started

    async def _aplan(self, planner: SlotPlanner, turn: Turn, clock: Clock) -> None:
        started = time.monotonic()
        try:
            await self._arun(planner.before(turn), clock)
        except UNPLANNED as error:
            self._unplanned(turn, error)
        turn.took_s = time.monotonic() - started

    def _unplanned(self, turn: Turn, error: Exception) -> None:
        """Nothing about slots may break a chat: the request goes on as its plan stands."""
        turn.miss = turn.miss or f"the server's slots could not be used: {error}"
        logger.warning("%s: the slots are left as they are for this request: %s", self.name, error)

    def _run(self, steps: Generator[Call, Any, T], clock: Clock) -> T:
        """Send what the steps ask for, each once, within the clock of the whole request."""
        reply: Any = None
        failure: AgentMemError | None = None
        call = advance(steps, reply, failure)
        while isinstance(call, Call):
            try:
                reply, failure = self._sync(clock, partial(send, self._sync_client(), call), retries=0), None
            except AgentMemError as error:
                reply, failure = None, error
            call = advance(steps, reply, failure)
        return call.value

    async def _arun(self, steps: Generator[Call, Any, T], clock: Clock) -> T:
        """`_run`, awaited. A step reads and checks files, so it runs beside the event loop."""
        reply: Any = None
        failure: AgentMemError | None = None
        while not isinstance(call := await _beside(partial(advance, steps, reply, failure)), End):
            try:
                reply = await self._async(clock, partial(asend, self._async_client(), call), retries=0)
                failure = None
            except AgentMemError as error:
                reply, failure = None, error
        return call.value


def _turn(request: Request) -> Turn | None:
    return None if request.slots is None else Turn(request, request.slots)


def _placed(turn: Turn) -> Request:
    """The request with the fields that put it into its slot."""
    options = turn.request.options
    return replace(turn.request, options=replace(options, extra={**options.extra, **turn.fields}))


def _later(generation: Generation, took_s: float) -> Generation:
    """A whole reply's time to the first token is the server's own, which knows nothing of what went before."""
    usage = generation.usage
    if usage.first_token_s is None:
        return generation
    return replace(generation, usage=usage.model_copy(update={"first_token_s": usage.first_token_s + took_s}))


async def _beside(work: Callable[[], T]) -> T:
    """Run in a thread. A cancelled caller waits for its end, so that no step runs behind what comes after it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
