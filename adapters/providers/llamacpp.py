"""``llamacpp:model``: llama.cpp's ``llama-server`` over HTTP.

Knows the server's own fields and routes beside OpenAI's format: ``cache_prompt``, ``id_slot``, ``timings.cache_n``,
``/tokenize``, ``/props``. The server keeps the KV states of its slots in memory and reuses the longest common prefix
(``kv="auto"``, cached tokens are reported). With the setting ``slot_dir`` its slots are saved to files, restored and
erased as well (``kv="slots"``); which and when is `_llamacpp_slots.py`'s to say.

LoRA adapters are those that the server was started with, chosen per request by the option ``lora=[{"id": 0, "scale":
1.0}]``. ``loras`` is not a capability: a GGUF file does not say which of our LoRA versions it was made from.
``max_tokens=0`` makes the server generate one token, which is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from agentmem.errors import AgentMemError, ConfigError
from agentmem.provider import Capabilities, Generation, Request

from . import _openai_chat as _openai
from ._http import Clock, Failure, connection_failed, from_status, is_loopback, read_settings
from ._llamacpp_slots import Call, End, SlotPlanner, Turn, advance, digest_cache
from ._openai_hosts import HOLDS_S, Served
from ._remote import Remote

__all__ = ["build_request", "create", "parse_reply"]

logger = logging.getLogger("agentmem")

T = TypeVar("T")

DEFAULT = "http://127.0.0.1:8080"
#: Counts kept, so that a prompt's unchanged parts are not sent to be counted again.
COUNTS = 4096
#: Seconds that the question for the context window may take when the provider is made.
PROBE_S = 2.0
#: Seconds that erasing the slots may take in all; one that is busy is erased before its next use.
ERASE_S = 5.0

SETTINGS: Mapping[str, type] = {
    "id_slot": int,
    "slot_dir": str,
    "model_file": str,
    "rope": str,
    "cache_types": str,
}

#: What may come of a server's unexpected reply or folder while a slot is prepared.
UNPLANNED = (AgentMemError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError)

#: A server's answer is read by OpenAI's rules; the cached tokens are in ``usage`` and in ``timings``.
parse_reply = _openai.parse_reply


def create(model: str, settings: Mapping[str, Any]) -> LlamaCpp:
    """The provider for ``"llamacpp:<model>"``; the model's name matters only to a server that has several.

    Settings: ``base_url`` (else LLAMACPP_BASE_URL, else http://127.0.0.1:8080), ``api_key`` (else LLAMA_API_KEY, the
    server's own variable), ``id_slot`` (the slot to use), ``timeout_s`` (120, over all attempts), ``max_retries`` (2),
    ``context_tokens`` (else asked of the server, once, here). For embeddings the server must run with ``--embedding``
    and a pooling type.

    ``slot_dir`` is the folder that llama-server was started with as ``--slot-save-path``, on this machine; then slots
    are saved there and restored. ``model_file`` names the model's file where the server's own path can't be read from
    here. ``rope`` and ``cache_types`` are texts that name what the server was started with and does not report (a
    trial prefill is compared in any case).
    """
    importlib.import_module("httpx")  # a missing package is told here, not at the first request

    values = read_settings("llamacpp", settings, SETTINGS)
    if values.get("slot_dir") is not None and not values["slot_dir"]:
        raise ConfigError("llamacpp: slot_dir is empty; give llama-server's --slot-save-path, or leave it out")
    base_url = values.get("base_url") or os.environ.get("LLAMACPP_BASE_URL") or DEFAULT
    values["base_url"] = base_url.rstrip("/").removesuffix("/v1")
    values["api_key"] = values.get("api_key") or os.environ.get("LLAMA_API_KEY")
    return LlamaCpp(f"llamacpp:{model or 'default'}", model or "default", values)


def build_request(
    request: Request, *, model: str = "default", stream: bool = False, id_slot: int | None = None
) -> dict[str, Any]:
    """The JSON body of ``POST /v1/chat/completions``. Pure."""
    body = _openai.build_request(request, Served(model=model), stream=stream)
    own: dict[str, Any] = {"cache_prompt": True}
    if id_slot is not None:
        own["id_slot"] = id_slot
    return {**own, **body}


class LlamaCpp(Remote):
    """A running ``llama-server``, through httpx."""

    advice = "is llama-server running at base_url (LLAMACPP_BASE_URL)? model='local' needs no server"

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        capabilities = Capabilities(
            chat=True,
            embeds=True,
            tools=True,
            kv="slots" if values.get("slot_dir") else "auto",
            context_tokens=values.get("context_tokens"),
            holds_prefix_s=None if is_loopback(values["base_url"]) else HOLDS_S,
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._counts_lock = threading.RLock()
        self._planner: SlotPlanner | None = None
        if values.get("slot_dir"):
            model_file = values.get("model_file")
            self._planner = SlotPlanner(
                name,
                Path(values["slot_dir"]).expanduser().absolute(),
                lambda request: self._build(request, stream=False),
                told={"rope": values.get("rope", ""), "cache types": values.get("cache_types", "")},
                model_file=None if model_file is None else Path(model_file).expanduser(),
                id_slot=values.get("id_slot"),
                cache=digest_cache(),
            )
        if capabilities.context_tokens is None:
            self.capabilities = replace(capabilities, context_tokens=self._window())

    def _window(self) -> int | None:
        """Tokens of one slot's context, or None while the server can't say."""
        try:
            client = self._sync_client()
            props = self._sync(Clock(PROBE_S), lambda: _json(client.get("/props")), retries=0)
            return int(props["default_generation_settings"]["n_ctx"])
        except (AgentMemError, KeyError, TypeError, ValueError):
            return None

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, exact: asked of the server's ``/tokenize``, the last counts kept."""
        with self._counts_lock:
            if text in self._counts:
                self._counts.move_to_end(text)
                return self._counts[text]
        client = self._sync_client()
        body = {"content": text, "add_special": False}
        reply = self._sync(Clock(self._timeout_s), lambda: _json(client.post("/tokenize", json=body)))
        count = self._understood(lambda: len(reply["tokens"]))
        with self._counts_lock:
            self._counts[text] = count
            if len(self._counts) > COUNTS:
                self._counts.popitem(last=False)
        return count

    # The faces, where a slot is chosen, restored or saved before the request and its reuse is checked after it.

    def _answer(self, request: Request, clock: Clock) -> Generation:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            return super()._answer(request, clock)
        try:
            self._plan(planner, turn, clock)
            return planner.after(turn, _later(super()._answer(_placed(turn), clock), turn.took_s))
        finally:
            planner.done(turn)

    async def _aanswer(self, request: Request, clock: Clock) -> Generation:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            return await super()._aanswer(request, clock)
        try:
            await self._aplan(planner, turn, clock)
            return planner.after(turn, _later(await super()._aanswer(_placed(turn), clock), turn.took_s))
        finally:
            planner.done(turn)

    def _pieces(self, request: Request, clock: Clock) -> Generator[str | Generation, None, None]:
        planner, turn = self._planner, _turn(request)
        if planner is None or turn is None:
            yield from super()._pieces(request, clock)
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
                reply, failure = self._sync(clock, partial(_call, self._sync_client(), call), retries=0), None
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
                reply = await self._async(clock, partial(_acall, self._async_client(), call), retries=0)
                failure = None
            except AgentMemError as error:
                reply, failure = None, error
        return call.value

    def _connect(self, *, asynchronous: bool) -> Any:
        import httpx

        key = self._values["api_key"]
        common: dict[str, Any] = {
            "base_url": self._values["base_url"],
            "timeout": self._timeout_s,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }
        if asynchronous:
            return httpx.AsyncClient(**common)
        return httpx.Client(**common)

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(request, model=self._model, stream=stream, id_slot=self._values.get("id_slot"))

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        return _post(client, "/v1/chat/completions", body, stream=bool(body.get("stream")))

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        return _post(client, "/v1/embeddings", {"model": self._model, "input": texts}, stream=False)

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> _openai.Reader:
        return _openai.Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing
        return plain

    def _map(self, error: Exception) -> Failure | None:
        import httpx

        if isinstance(error, _ErrorEvent):
            return from_status(self.name, error.status, error, body=error.args[0])
        if isinstance(error, httpx.HTTPStatusError):
            response = error.response
            try:
                body: Any = response.json()
                detail = body["error"]["message"]
            except (KeyError, TypeError, ValueError):
                body = detail = response.text
            hints = {501: "start llama-server with --embedding and --pooling mean"}
            return from_status(
                self.name, response.status_code, detail, headers=response.headers, body=body, hints=hints
            )
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
            return connection_failed(self.name, error, self.advice)
        return None


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


class _ErrorEvent(Exception):
    """An error that the server sends inside a stream that had begun well."""

    @property
    def status(self) -> int:
        code = self.args[0].get("code") if isinstance(self.args[0], Mapping) else None
        return code if isinstance(code, int) and code >= 400 else 500

    def __str__(self) -> str:
        return str(self.args[0].get("message") if isinstance(self.args[0], Mapping) else self.args[0])


def _post(client: Any, path: str, body: Mapping[str, Any], *, stream: bool) -> Any:
    """The answer's JSON, or an iterator of a stream's events; awaitable if the client is async."""
    import httpx

    if isinstance(client, httpx.AsyncClient):
        return _aevents(client, path, body) if stream else _ajson(client, path, body)
    return _events(client, path, body) if stream else _json(client.post(path, json=body))


def _call(client: Any, call: Call) -> Any:
    return _json(client.request(call.method, call.path, json=call.body))


async def _acall(client: Any, call: Call) -> Any:
    return _json(await client.request(call.method, call.path, json=call.body))


def _json(response: Any) -> Any:
    response.raise_for_status()
    return response.json()


async def _ajson(client: Any, path: str, body: Mapping[str, Any]) -> Any:
    return _json(await client.post(path, json=body))


def _events(client: Any, path: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    with client.stream("POST", path, json=body) as response:
        if response.is_error:
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            if (event := _event(line)) is not None:
                yield event


async def _aevents(client: Any, path: str, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    async def events() -> AsyncIterator[Mapping[str, Any]]:
        async with client.stream("POST", path, json=body) as response:
            if response.is_error:
                await response.aread()
            response.raise_for_status()
            async for line in response.aiter_lines():
                if (event := _event(line)) is not None:
                    yield event

    return events()


def _event(line: str) -> Mapping[str, Any] | None:
    """The JSON of one line of a server-sent event stream; the server writes one event per line."""
    if line.startswith("error:"):
        raise _ErrorEvent(json.loads(line.removeprefix("error:")))
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    if not data or data == "[DONE]":
        return None
    event: Mapping[str, Any] = json.loads(data)
    if "error" in event:
        raise _ErrorEvent(event["error"])
    return event
