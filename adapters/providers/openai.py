"""``openai:model``: OpenAI's Chat Completions through the official SDK, and the wire format that many servers share.

Knows the vendor's request, reply and errors; decides nothing about memory. Prefixes are cached by the vendor on its own
(``kv="auto"``): the request keeps them byte-equal and, to the official host only, names them by ``prompt_cache_key``.

Not possible here: prefill without generating, so ``max_tokens=0`` asks for one token and drops it (usage shows it).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agentmem.errors import ConfigError
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for
from agentmem.types import Message, Usage

from ._http import Failure, is_host, is_loopback, read_settings, sdk_failure
from ._remote import Remote
from ._tools import arguments_text, tool_call, tool_parts

__all__ = ["Reader", "build_request", "create", "parse_reply", "parse_usage"]

OFFICIAL = "https://api.openai.com/v1"
#: The longest time for which the vendor documents a prefix to be held: retention "24h", the default of older models.
HOLDS_S = 86400.0

SETTINGS: Mapping[str, type] = {
    "embedding_model": str,
    "embedding_dimensions": int,
    "organization": str,
    "project": str,
    "cache_fields": bool,
}


def create(model: str, settings: Mapping[str, Any]) -> OpenAI:
    """The provider for ``"openai:<model>"``.

    Settings: ``api_key`` (else OPENAI_API_KEY), ``base_url`` (else OPENAI_BASE_URL), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``embedding_model`` (text-embedding-3-small), ``embedding_dimensions``,
    ``organization``, ``project``, ``context_tokens``, and ``cache_fields=True`` to send prompt-cache fields to a host
    that is not OpenAI's.
    """
    importlib.import_module("openai")  # a missing package is told here, not at the first request

    values = read_settings("openai", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
    values["official"] = is_host(values["base_url"], "openai.com")
    values["api_key"] = values.get("api_key") or os.environ.get("OPENAI_API_KEY")
    if not model:
        raise ConfigError("name a model: 'openai:<model>'; model='local' needs no key and no network")
    if not values["api_key"]:
        if values["official"]:
            raise ConfigError(
                "openai: no key; set OPENAI_API_KEY or [providers.openai] api_key. "
                "model='local' needs no key and no network"
            )
        values["api_key"] = "none"
    return OpenAI(f"openai:{model}", model, values)


# Requests.


def build_request(
    request: Request,
    *,
    model: str,
    stream: bool = False,
    official: bool = True,
    cache_fields: bool | None = None,
    salted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The JSON body of ``POST /chat/completions``. Pure, and the same bytes for the same segments.

    ``official`` chooses OpenAI's own names of fields over those that every compatible server knows. ``salted`` are
    fields that separate the server's prefix cache (`openai_compatible.salt_fields`).
    """
    options = request.options
    messages = [_message(message, official) for segment in request.segments for message in segment.messages]
    body: dict[str, Any] = {"model": model, "messages": messages if official else _alternating(messages)}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    if options.max_tokens is not None:
        body["max_completion_tokens" if official else "max_tokens"] = max(1, options.max_tokens)
    for name in ("temperature", "top_p", "seed"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    if options.stop:
        body["stop"] = list(options.stop)
    if request.cache_key and (official if cache_fields is None else cache_fields):
        key = request.cache_key  # at most 64 characters are taken
        body["prompt_cache_key"] = key if len(key) <= 64 else hashlib.sha256(key.encode()).hexdigest()
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return {**body, **options.extra, **(salted or {})}


def _alternating(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring user messages as one: the chat templates of some models refuse two in a row. What stands before a
    growing end stays the same bytes."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] == "user":
            merged[-1] = {**merged[-1], "content": f"{merged[-1]['content']}\n\n{message['content']}"}
        else:
            merged.append(message)
    return merged


def _message(message: Message, official: bool) -> dict[str, Any]:
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name and official and message.role != "tool":
        body["name"] = re.sub(r"[\s<|\\/>]", "_", message.name)[:64]
    elif message.name and message.role == "user":  # the chat templates of other servers leave the field out
        body["content"] = f"{message.name}: {message.content}"
    if message.tool_calls:
        body["content"] = message.content or None
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_text(call)}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        body["tool_call_id"] = message.tool_call_id or ""
    return body


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in tool and tool["type"] != "function":
        return dict(tool)  # one of the vendor's own tools
    name, description, parameters = tool_parts(tool)
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    given = tool.get("function")
    if isinstance(given, Mapping) and "strict" in given:
        function["strict"] = given["strict"]
    return {"type": "function", "function": function}


# Replies.


def parse_reply(payload: Mapping[str, Any]) -> Generation:
    """A chat completion as a `Generation`. Raises KeyError or TypeError for what is no completion."""
    choice = payload["choices"][0]
    message = choice["message"]
    calls = [
        tool_call(call.get("id"), call["function"]["name"], call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
    ]
    return Generation(
        text=message.get("content") or message.get("refusal") or "",
        usage=parse_usage(payload),
        tool_calls=tuple(calls),
        finish_reason=choice.get("finish_reason"),
    )


def parse_usage(payload: Mapping[str, Any]) -> Usage:
    """The usage. ``prompt_tokens`` includes cached ones already; DeepSeek and llama.cpp name those in other places."""
    usage = payload.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    timings = payload.get("timings") or {}
    given = (details.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), timings.get("cache_n"))
    cached = next((int(value) for value in given if value is not None), 0)
    prompt = int(usage.get("prompt_tokens") or 0)
    prefill_ms = timings.get("prompt_ms")
    return Usage(
        input_tokens=prompt,
        cached_tokens=min(cached, prompt),
        written_tokens=int(details.get("cache_write_tokens") or 0),
        output_tokens=int(usage.get("completion_tokens") or 0),
        first_token_s=None if prefill_ms is None else prefill_ms / 1000,
    )


class Reader:
    """Puts the chunks of a streamed chat completion together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._calls: dict[int, dict[str, str]] = {}
        self._finish: str | None = None
        self._last: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> str:
        """The text in this chunk. Usage comes in a chunk without choices, on some servers with the last choice."""
        self._last.update({name: chunk[name] for name in ("usage", "timings") if chunk.get(name)})
        piece = ""
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            piece = delta.get("content") or delta.get("refusal") or ""
            for part in delta.get("tool_calls") or ():
                self._add_call(part)
            self._finish = choice.get("finish_reason") or self._finish
        if piece:
            self._text.append(piece)
        return piece

    def _add_call(self, part: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(part.get("index") or 0, {"id": "", "name": "", "arguments": ""})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""

    def end(self) -> Generation | None:
        """The whole, or None if no finish reason came: then the stream was cut."""
        if self._finish is None:
            return None
        return Generation(
            text="".join(self._text),
            usage=parse_usage(self._last).model_copy(update={"first_token_s": None}),
            tool_calls=tuple(tool_call(c["id"], c["name"], c["arguments"]) for _, c in sorted(self._calls.items())),
            finish_reason=self._finish,
        )


# Sending.


class OpenAI(Remote):
    """OpenAI's API, or another host that speaks it, through the ``openai`` SDK."""

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        holds = None if is_loopback(values["base_url"]) else HOLDS_S
        capabilities = Capabilities(
            chat=True,
            embeds=True,
            tools=True,
            kv="auto",
            context_tokens=values.get("context_tokens"),
            holds_prefix_s=holds,
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values
        self._official: bool = values["official"]
        default = "text-embedding-3-small" if self._official and "embed" not in model else model
        self._embedding_model: str = values.get("embedding_model") or default

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone: exact for OpenAI's own models, an estimate for others."""
        return counter_for(self._model).count(text)

    def _connect(self, *, asynchronous: bool) -> Any:
        import openai

        common: dict[str, Any] = {
            name: self._values.get(name) for name in ("api_key", "base_url", "organization", "project")
        }
        if asynchronous:
            http = openai.DefaultAsyncHttpxClient(timeout=self._timeout_s)
            return openai.AsyncOpenAI(**common, max_retries=0, timeout=self._timeout_s, http_client=http)
        client = openai.DefaultHttpxClient(timeout=self._timeout_s)
        return openai.OpenAI(**common, max_retries=0, timeout=self._timeout_s, http_client=client)

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        salt: Callable[[Request], Mapping[str, Any]] | None = self._values.get("salt")
        return build_request(
            request,
            model=self._model,
            stream=stream,
            official=self._official,
            cache_fields=self._values.get("cache_fields"),
            salted=None if salt is None else salt(request),
        )

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        own = ("model", "messages", "stream")
        rest = {name: value for name, value in body.items() if name not in own}
        return client.chat.completions.create(
            model=body["model"], messages=body["messages"], stream=body.get("stream", False), extra_body=rest
        )

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> Reader:
        return Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.to_dict()
        return plain

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        more: dict[str, Any] = {} if self._official else {"encoding_format": "float"}
        if (dimensions := self._values.get("embedding_dimensions")) is not None:
            more["dimensions"] = dimensions
        return client.embeddings.create(model=self._embedding_model, input=texts, **more)

    def _map(self, error: Exception) -> Failure | None:
        import openai

        return sdk_failure(openai, error, name=self.name, model=self._model, advice=self.advice)
