"""``anthropic:model``: Anthropic's Messages API through the official SDK.

Knows the vendor's request, reply, events and errors. The ends of stable segments are marked with ``cache_control``
(``kv="breakpoints"``); the API ignores a marker on a prefix that is too short to cache.

Of the options, ``seed`` has no counterpart and is ignored; ``temperature`` and ``top_p`` are sent, though some newer
models refuse them. Thinking blocks are not kept, so thinking together with tools is not supported.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from agentmem.errors import ConfigError
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for
from agentmem.types import Message, Usage

from ._http import Failure, is_host, is_loopback, read_settings, sdk_failure
from ._remote import Remote
from ._tools import tool_call, tool_parts

__all__ = ["Reader", "build_request", "create", "parse_reply", "parse_usage"]

OFFICIAL = "https://api.anthropic.com"
#: Seconds for which an entry is held after its last use, with the marker's default TTL of five minutes.
HOLDS_S = 300.0
#: The API requires a limit; this one applies when the options name none.
MAX_TOKENS = 1024
#: Markers that one request may carry.
BREAKPOINTS = 4

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


def create(model: str, settings: Mapping[str, Any]) -> Anthropic:
    """The provider for ``"anthropic:<model>"``.

    Settings: ``api_key`` (else ANTHROPIC_API_KEY), ``base_url`` (else ANTHROPIC_BASE_URL), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``context_tokens``.
    """
    importlib.import_module("anthropic")  # a missing package is told here, not at the first request

    values = read_settings("anthropic", settings, {})
    values["base_url"] = values.get("base_url") or os.environ.get("ANTHROPIC_BASE_URL") or OFFICIAL
    values["api_key"] = values.get("api_key") or os.environ.get("ANTHROPIC_API_KEY")
    if not model:
        raise ConfigError("name a model: 'anthropic:<model>'; model='local' needs no key and no network")
    if not values["api_key"]:
        if is_host(values["base_url"], "anthropic.com"):
            raise ConfigError(
                "anthropic: no key; set ANTHROPIC_API_KEY or [providers.anthropic] api_key. "
                "model='local' needs no key and no network"
            )
        values["api_key"] = "none"
    return Anthropic(f"anthropic:{model}", model, values)


# Requests.


def build_request(request: Request, *, model: str, stream: bool = False) -> dict[str, Any]:
    """The JSON body of ``POST /v1/messages``, with a cache marker at the end of each stable segment. Pure.

    System messages at the head become ``system`` blocks; a later one becomes fenced text of the user, since most models
    take no other. A user's ``name`` is written before the text: the API has no field for it.
    """
    options = request.options
    system: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for segment in request.segments:
        last: dict[str, Any] | None = None
        for message in segment.messages:
            blocks = _blocks(message, at_head=not messages)
            if not blocks:
                continue  # the API refuses empty text
            last = blocks[-1]
            if message.role == "system" and not messages:
                system += blocks
            else:
                _append(messages, "assistant" if message.role == "assistant" else "user", blocks)
        if segment.stable and last is not None:
            ends.append(last)
    for block in ends[-BREAKPOINTS:]:
        block["cache_control"] = {"type": "ephemeral"}
    limit = MAX_TOKENS if options.max_tokens is None else options.max_tokens
    body: dict[str, Any] = {"model": model, "max_tokens": limit, "messages": messages}
    if system:
        body["system"] = system
    if request.tools:
        body["tools"] = [_tool(tool) for tool in request.tools]
    for name in ("temperature", "top_p"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    if options.stop:
        body["stop_sequences"] = list(options.stop)
    if stream:
        body["stream"] = True
    return {**body, **options.extra}


def _append(messages: list[dict[str, Any]], role: str, blocks: list[dict[str, Any]]) -> None:
    results = role == "user" and blocks[0]["type"] == "tool_result"
    if results and messages and messages[-1]["role"] == "user" and messages[-1]["content"][0]["type"] == "tool_result":
        messages[-1]["content"] += blocks  # the results of one answer's calls must stand in one message
    else:
        messages.append({"role": role, "content": blocks})


def _blocks(message: Message, *, at_head: bool) -> list[dict[str, Any]]:
    text = message.content
    if message.role == "tool":
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id or "", "content": text}]
    if message.role == "system" and not at_head:
        text = f"<system>\n{text}\n</system>"
    if message.role == "user" and message.name:
        text = f"{message.name}: {text}"
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text.strip() else []
    for call in message.tool_calls:
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments})
    return blocks


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in tool and tool["type"] not in ("function", "custom"):
        return dict(tool)  # one of the vendor's own tools
    name, description, schema = tool_parts(tool)
    return {"name": name, "description": description, "input_schema": schema}


# Replies.


def parse_reply(payload: Mapping[str, Any]) -> Generation:
    """A message as a `Generation`. Raises KeyError or TypeError for what is no message."""
    blocks = payload["content"]
    stopped = payload.get("stop_reason")
    diagnostics = payload.get("diagnostics") or {}
    return Generation(
        text="".join(block["text"] for block in blocks if block["type"] == "text"),
        usage=parse_usage(payload["usage"]),
        tool_calls=tuple(
            tool_call(block["id"], block["name"], block["input"]) for block in blocks if block["type"] == "tool_use"
        ),
        finish_reason=_FINISH.get(stopped, stopped) if stopped else None,
        miss=(diagnostics.get("cache_miss_reason") or {}).get("type"),
    )


def parse_usage(usage: Mapping[str, Any]) -> Usage:
    """The usage. The vendor's ``input_tokens`` leaves out what was read from or written to a cache; ours counts all."""
    read = int(usage.get("cache_read_input_tokens") or 0)
    written = int(usage.get("cache_creation_input_tokens") or 0)
    return Usage(
        input_tokens=int(usage.get("input_tokens") or 0) + read + written,
        cached_tokens=read,
        written_tokens=written,
        output_tokens=int(usage.get("output_tokens") or 0),
    )


class Reader:
    """Puts the events of a streamed message together, into the form of a whole one."""

    def __init__(self) -> None:
        self._message: dict[str, Any] = {"usage": {}}
        self._blocks: dict[int, dict[str, Any]] = {}
        self._stopped = False

    def add(self, event: Mapping[str, Any]) -> str:
        """The text in this event."""
        kind = event["type"]
        if kind == "message_start":
            self._take(event["message"])
        elif kind == "content_block_start":
            self._blocks[event["index"]] = {**event["content_block"], "parts": []}
            return self._part(event["index"], event["content_block"])
        elif kind == "content_block_delta":
            return self._part(event["index"], event["delta"])
        elif kind == "message_delta":
            self._take({**event["delta"], "usage": event.get("usage")})
        elif kind == "message_stop":
            self._stopped = True
        return ""

    def _take(self, fields: Mapping[str, Any]) -> None:
        usage = {name: value for name, value in (fields.get("usage") or {}).items() if value is not None}
        self._message["usage"].update(usage)
        self._message.update({name: value for name, value in fields.items() if name != "usage" and value is not None})

    def _part(self, index: int, delta: Mapping[str, Any]) -> str:
        text = delta.get("text") or ""
        self._blocks[index]["parts"].append(text or delta.get("partial_json") or "")
        return text

    def end(self) -> Generation | None:
        """The whole, or None if the last event never came: then the stream was cut."""
        if not self._stopped:
            return None
        blocks = []
        for _, block in sorted(self._blocks.items()):
            whole = "".join(block["parts"])
            if block["type"] == "tool_use":
                blocks.append({**block, "input": whole or block.get("input") or {}})
            elif block["type"] == "text":
                blocks.append({**block, "text": whole})
        return parse_reply({**self._message, "content": blocks})


# Sending.


class Anthropic(Remote):
    """Anthropic's API, or another host that speaks it, through the ``anthropic`` SDK."""

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        capabilities = Capabilities(
            chat=True,
            tools=True,
            kv="breakpoints",
            context_tokens=values.get("context_tokens"),
            holds_prefix_s=None if is_loopback(values["base_url"]) else HOLDS_S,
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, an estimate: the vendor's tokenizer is behind a request per count."""
        return counter_for(self._model).count(text)

    def _connect(self, *, asynchronous: bool) -> Any:
        import anthropic

        common: dict[str, Any] = {name: self._values[name] for name in ("api_key", "base_url")}
        if asynchronous:
            http = anthropic.DefaultAsyncHttpxClient(timeout=self._timeout_s)
            return anthropic.AsyncAnthropic(**common, max_retries=0, timeout=self._timeout_s, http_client=http)
        client = anthropic.DefaultHttpxClient(timeout=self._timeout_s)
        return anthropic.Anthropic(**common, max_retries=0, timeout=self._timeout_s, http_client=client)

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(request, model=self._model, stream=stream)

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        own = ("model", "messages", "max_tokens", "stream")
        rest = {name: value for name, value in body.items() if name not in own}
        return client.messages.create(
            model=body["model"],
            messages=body["messages"],
            max_tokens=body["max_tokens"],
            stream=body.get("stream", False),
            timeout=self._timeout_s,
            extra_body=rest,
        )

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> Reader:
        return Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.to_dict()
        return plain

    def _map(self, error: Exception) -> Failure | None:
        import anthropic

        return sdk_failure(anthropic, error, name=self.name, model=self._model, advice=self.advice)
