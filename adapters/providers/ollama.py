"""``ollama:model``: an Ollama server through the official client.

Knows the client's calls and replies. Ollama keeps the last prompt's KV states by itself (``kv="auto"``): requests keep
the prefix byte-equal, the model's options constant (another ``num_ctx`` reloads the model) and ``keep_alive`` set or
planned. It reports no cached tokens, so ``cached_tokens`` stays 0; reuse shows only in ``prompt_eval_duration``, and
what that says is an estimate and called so (`_ollama_estimates.py`).

Tested with the real client against a shim of Ollama's API over llama.cpp's server, not against Ollama itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentmem.errors import ConfigError
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for
from agentmem.types import Message, Usage

from ._http import Clock, Failure, connection_failed, from_status, is_loopback, read_settings
from ._ollama_estimates import AUTO, KeepAlive, Reuse, seconds, sent
from ._remote import Remote
from ._tools import tool_call, tool_parts

__all__ = ["Reader", "Timed", "build_request", "create", "parse_reply", "parse_usage"]

DEFAULT = "http://127.0.0.1:11434"
#: Names in `Options.extra` that are fields of a chat request; every other one is an option of the model.
FIELDS = ("format", "think", "logprobs", "top_logprobs")

#: What "for ever" is told as: a server that never unloads is still started again some day.
FOREVER_S = 30 * 86400.0

SETTINGS: Mapping[str, type] = {
    "keep_alive": str,
    "keep_alive_max": str,
    "num_ctx": int,
    "options": dict,
    "embedding_model": str,
    "think": bool,
}


def create(model: str, settings: Mapping[str, Any]) -> Ollama:
    """The provider for ``"ollama:<model>"``.

    Settings: ``base_url`` (else OLLAMA_HOST), ``api_key`` (else OLLAMA_API_KEY), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``keep_alive`` ("5m"), ``num_ctx`` (also the window that prompts are laid out for),
    ``options`` (a table of model options, constant over all requests), ``think``, ``embedding_model`` (else the model).

    ``keep_alive="auto"`` plans for how long the model stays loaded from the gaps between this provider's requests: at
    least 5 minutes, at most ``keep_alive_max`` ("1h"), never shorter than it was.
    """
    importlib.import_module("ollama")  # a missing package is told here, not at the first request

    values = read_settings("ollama", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OLLAMA_HOST") or DEFAULT
    values["api_key"] = values.get("api_key") or os.environ.get("OLLAMA_API_KEY")
    for name in ("keep_alive", "keep_alive_max"):
        told = values.get(name)
        if told is not None and seconds(told) is None and (name, told) != ("keep_alive", AUTO):
            raise ConfigError(f'ollama: {name} is {told!r}; write a duration such as "10m", "-1" for ever')
    if not model:
        raise ConfigError("name a model: 'ollama:<model>', as `ollama list` shows it; model='local' needs no server")
    return Ollama(f"ollama:{model}", model, values)


# Requests.


def build_request(
    request: Request,
    *,
    model: str,
    stream: bool = False,
    keep_alive: str = "5m",
    options: Mapping[str, Any] | None = None,
    think: bool | None = None,
) -> dict[str, Any]:
    """The JSON body of ``POST /api/chat``. Pure. ``options`` are the constant ones; sampling options are added to them.

    Prefill alone is not possible, so ``max_tokens=0`` asks for one token. A user's ``name`` is written before the text:
    the API has no field for it.
    """
    wanted = request.options
    extra = dict(wanted.extra)
    tuned: dict[str, Any] = dict(options or {})
    for name, value in (("temperature", wanted.temperature), ("top_p", wanted.top_p), ("seed", wanted.seed)):
        if value is not None:
            tuned[name] = value
    if wanted.max_tokens is not None:
        tuned["num_predict"] = max(1, wanted.max_tokens)
    if wanted.stop:
        tuned["stop"] = list(wanted.stop)
    body: dict[str, Any] = {
        "model": model,
        "messages": _messages(request),
        "stream": stream,
        "keep_alive": sent(extra.pop("keep_alive", keep_alive)),
    }
    if think is not None:
        body["think"] = think
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    body.update({name: extra.pop(name) for name in FIELDS if name in extra})
    body["options"] = {**tuned, **extra.pop("options", {}), **extra}
    return body


def _messages(request: Request) -> list[dict[str, Any]]:
    names: dict[str, str] = {}  # of the tools, by call: a result names its tool here, not its call
    messages: list[dict[str, Any]] = []
    for segment in request.segments:
        for message in segment.messages:
            names.update({call.id: call.name for call in message.tool_calls})
            messages.append(_message(message, names))
    return messages


def _message(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    text = message.content
    if message.role == "user" and message.name:
        text = f"{message.name}: {text}"
    body: dict[str, Any] = {"role": message.role, "content": text}
    if message.tool_calls:
        body["tool_calls"] = [{"function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    if message.role == "tool":
        body["tool_name"] = message.name or names.get(message.tool_call_id or "", "tool")
    return body


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    name, description, parameters = tool_parts(tool)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# Replies.


@dataclass(frozen=True, kw_only=True)
class Timed(Generation):
    """A generation with the seconds that the server says it took to read the prompt; 0 if it did not say."""

    prompt_s: float = 0.0


def parse_reply(payload: Mapping[str, Any]) -> Timed:
    """A chat reply as a `Generation`. Raises KeyError or TypeError for what is none."""
    message = payload["message"]
    calls = tuple(
        tool_call(None, call["function"]["name"], call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
    )
    reason = payload.get("done_reason")
    return Timed(
        text=message.get("content") or "",
        usage=parse_usage(payload),
        tool_calls=calls,
        finish_reason="tool_calls" if calls else reason,
        prompt_s=(payload.get("prompt_eval_duration") or 0) / 1e9,
    )


def parse_usage(payload: Mapping[str, Any]) -> Usage:
    """The usage: the whole prompt, no cached tokens (Ollama does not tell), the time it took to read the prompt."""
    nanoseconds = (payload.get("load_duration") or 0) + (payload.get("prompt_eval_duration") or 0)
    return Usage(
        input_tokens=int(payload.get("prompt_eval_count") or 0),
        output_tokens=int(payload.get("eval_count") or 0),
        first_token_s=nanoseconds / 1e9 if nanoseconds else None,
    )


class Reader:
    """Puts the lines of a streamed chat together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: list[Any] = []
        self._last: Mapping[str, Any] = {}

    def add(self, line: Mapping[str, Any]) -> str:
        """The text in this line."""
        message = line.get("message") or {}
        self._calls += message.get("tool_calls") or ()
        self._last = line
        piece: str = message.get("content") or ""
        if piece:
            self._text.append(piece)
        return piece

    def end(self) -> Generation | None:
        """The whole, or None if no line said ``done``: then the stream was cut."""
        if not self._last.get("done"):
            return None
        message = {"content": "".join(self._text), "tool_calls": self._calls}
        return parse_reply({**self._last, "message": message})


# Sending.


class Ollama(Remote):
    """An Ollama server, through the ``ollama`` client."""

    advice = "is Ollama running at base_url (OLLAMA_HOST)? model='local' needs no server"

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        self._options: dict[str, Any] = dict(values.get("options", {}))
        if "num_ctx" in values:
            self._options["num_ctx"] = values["num_ctx"]
        capabilities = Capabilities(
            chat=True,
            embeds=True,
            tools=True,
            kv="auto",
            context_tokens=values.get("context_tokens") or self._options.get("num_ctx"),
            holds_prefix_s=None if is_loopback(values["base_url"]) else _holds(values),
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values
        self._keep_alive = KeepAlive(values.get("keep_alive", "5m"), values.get("keep_alive_max", "1h"))
        self._reuse = Reuse()

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, an estimate: Ollama has no route that counts."""
        return counter_for(self._model).count(text)

    def _connect(self, *, asynchronous: bool) -> Any:
        import ollama

        key = self._values["api_key"]
        common: dict[str, Any] = {"host": self._values["base_url"], "timeout": self._timeout_s}
        common["headers"] = {"Authorization": f"Bearer {key}"} if key else None
        if asynchronous:
            return ollama.AsyncClient(**common)
        return ollama.Client(**common)

    # The faces, with what is inferred of reuse.

    def _answer(self, request: Request, clock: Clock) -> Generation:
        return self._inferred(request, super()._answer(request, clock))

    async def _aanswer(self, request: Request, clock: Clock) -> Generation:
        return self._inferred(request, await super()._aanswer(request, clock))

    def _pieces(self, request: Request, clock: Clock) -> Generator[str | Generation, None, None]:
        with contextlib.closing(super()._pieces(request, clock)) as pieces:
            for piece in pieces:
                yield self._inferred(request, piece) if isinstance(piece, Generation) else piece

    async def _apieces(self, request: Request, clock: Clock) -> AsyncGenerator[str | Generation, None]:
        async with contextlib.aclosing(super()._apieces(request, clock)) as pieces:
            async for piece in pieces:
                yield self._inferred(request, piece) if isinstance(piece, Generation) else piece

    def _inferred(self, request: Request, generation: Generation) -> Generation:
        usage = generation.usage
        prompt_s = generation.prompt_s if isinstance(generation, Timed) else 0.0
        prompt = json.dumps([request.tools and list(map(dict, request.tools)), _messages(request)], default=str)
        estimate = self._reuse.estimate(prompt, usage.input_tokens, prompt_s)
        return Generation(
            text=generation.text,
            usage=usage.model_copy(update={"estimated_cached_tokens": estimate}),
            tool_calls=generation.tool_calls,
            finish_reason=generation.finish_reason,
            miss=generation.miss,
        )

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(
            request,
            model=self._model,
            stream=stream,
            keep_alive=self._keep_alive.next(),
            options=self._options,
            think=self._values.get("think"),
        )

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        return client.chat(**body)

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> Reader:
        return Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.model_dump()
        return plain

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        model = self._values.get("embedding_model", self._model)
        return client.embed(model=model, input=texts, keep_alive=sent(self._keep_alive.now))

    def _vectors(self, payload: Mapping[str, Any]) -> list[Any]:
        return list(payload["embeddings"])

    def _map(self, error: Exception) -> Failure | None:
        import httpx
        import ollama

        if isinstance(error, ollama.ResponseError):
            cause = error.__context__  # the client hides the answer there
            headers = cause.response.headers if isinstance(cause, httpx.HTTPStatusError) else None
            status = error.status_code if error.status_code > 0 else 500  # -1: an error line inside a stream
            hints = {404: f"`ollama pull {self._model}` fetches a model"}
            return from_status(self.name, status, error.error, headers=headers, body=error.error, hints=hints)
        if isinstance(error, (ConnectionError, httpx.HTTPError)):
            return connection_failed(self.name, error.__context__ or error, self.advice)
        return Failure(ConfigError(f"{self.name}: {error}")) if isinstance(error, ollama.RequestError) else None


def _holds(values: Mapping[str, Any]) -> float:
    """Seconds for which a server elsewhere may hold a prompt: as long as the model may stay loaded."""
    told = values.get("keep_alive", "5m")
    longest = seconds(values.get("keep_alive_max", "1h") if told == AUTO else told)
    return FOREVER_S if longest is None or longest < 0 else max(300.0, longest)
