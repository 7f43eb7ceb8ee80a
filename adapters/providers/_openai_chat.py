"""OpenAI's Chat Completions, the wire format that many servers share: requests, replies, streams. Pure functions.

Knows the format; what of it a host takes is `Served`'s to say (_openai_hosts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from agentmem.provider import Generation, Request
from agentmem.types import Message, ToolCall

from ._openai_fields import (
    breakpoint_at,
    cache_fields,
    cleared,
    image_url,
    messages_of,
    named_schema,
    parse_usage,
    placed_marks,
)
from ._openai_hosts import Served, reasons
from ._tools import arguments_text, in_order, tool_call, tool_parts

__all__ = ["Reader", "build_request", "parse_reply", "tool_body"]

#: Fields of a tool call, not of the message, that go back to a host.
OF_CALLS = ("extra_content",)


def build_request(
    request: Request, served: Served, *, stream: bool = False, salted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON body of ``POST /chat/completions``. The same bytes for the same segments.

    ``salted`` are fields that separate the server's prefix cache (`openai_compatible.salt_fields`).
    """
    options, host = request.options, served.host
    said = messages_of(request)
    placed = placed_marks(request, served, said, lambda message: bool(message.content or message.images))
    messages = [_message(message, served, breakpoint_at(placed, at)) for at, message in enumerate(said)]
    body: dict[str, Any] = {
        "model": served.model,
        "messages": messages if host.own_names else _alternating(messages),
    }
    if request.tools:
        body["tools"] = [_tool(tool) for tool in in_order(request.tools)]
    if options.max_tokens is not None:
        body["max_completion_tokens" if host.own_names else "max_tokens"] = max(1, options.max_tokens)
    for name in ("temperature", "top_p", "seed"):
        if (value := getattr(options, name)) is not None and (name == "seed" or samples(request, served)):
            body[name] = value
    if options.stop:
        body["stop"] = list(options.stop)
    if options.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": named_schema(options.schema)}
    body |= cache_fields(request, served, responses=False)
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return {**body, **options.extra, **(salted or {})}


def samples(request: Request, served: Served) -> bool:
    """False where OpenAI's model refuses temperature and top_p, because it reasons and was not told not to."""
    extra = request.options.extra
    reasoning = extra.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, Mapping) else None
    effort = effort or extra.get("reasoning_effort")
    return served.host.vendor != "openai" or not reasons(served.model) or effort == "none"


def _alternating(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Neighbouring user messages as one: the chat templates of some models refuse two in a row. What stands before a
    growing end stays the same bytes."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] == "user":
            before, after = merged[-1]["content"], message["content"]
            if isinstance(before, str) and isinstance(after, str):
                merged[-1] = {**merged[-1], "content": f"{before}\n\n{after}"}
            else:
                merged[-1] = {**merged[-1], "content": [*_parts(before), *_parts(after)]}
        else:
            merged.append(message)
    return merged


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _message(message: Message, served: Served, marked: Mapping[str, Any]) -> dict[str, Any]:
    cleared(message, tool=False)
    text = message.content
    own_names = served.host.own_names
    body: dict[str, Any] = {"role": message.role}
    if message.name and own_names and message.role != "tool":
        body["name"] = re.sub(r"[\s<|\\/>]", "_", message.name)[:64]
    elif message.name and message.role == "user":  # the chat templates of other servers leave the field out
        text = f"{message.name}: {text}"
    body["content"] = text
    if message.images or (served.marked and text):
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": image_url(image)}} for image in message.images
        ]
        parts += _parts(text) if text else []
        parts[-1] |= marked
        body["content"] = parts
    if message.tool_calls:
        body["content"] = body["content"] or None
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments_text(call)}}
            for call in message.tool_calls
        ]
        if message.blocks_of == served.name:
            _give_back(body, message.blocks)
    if message.role == "tool":
        body["tool_call_id"] = message.tool_call_id or ""
    return body


def _give_back(body: dict[str, Any], blocks: Iterable[Mapping[str, Any]]) -> None:
    """Put what the host sent beside its calls back where it stood."""
    calls = {call["id"]: call for call in body["tool_calls"]}
    for block in blocks:
        owner = calls.get(block["call"]) if "call" in block else body
        if owner is not None:
            owner.update({name: value for name, value in block.items() if name != "call"})


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in tool and tool["type"] != "function":
        return dict(tool)  # one of the vendor's own tools
    return {"type": "function", "function": tool_body(tool)}


def tool_body(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A function as the vendor describes it; ``strict`` only where it was given."""
    name, description, parameters = tool_parts(tool)
    function: dict[str, Any] = {"name": name, "description": description, "parameters": parameters}
    given = tool.get("function", tool)
    if "strict" in given:
        function["strict"] = given["strict"]
    return function


# Replies.


def parse_reply(payload: Mapping[str, Any], served: Served | None = None) -> Generation:
    """A chat completion as a `Generation`. Raises KeyError or TypeError for what is no completion.

    With ``served`` its ``blocks`` hold what has to go back to that host with the results of tools.
    """
    choice = payload["choices"][0]
    message = choice["message"]
    given = message.get("tool_calls") or ()
    refusal = message.get("refusal")
    back = () if served is None else served.host.back
    blocks: list[dict[str, Any]] = []
    if given:
        of_message = {name: message[name] for name in back if name not in OF_CALLS and message.get(name)}
        blocks += [of_message] if of_message else []
    calls: list[ToolCall] = []
    for call in given:
        made = tool_call(call.get("id"), call["function"]["name"], call["function"].get("arguments"))
        calls.append(made)
        of_call = {name: call[name] for name in back if name in OF_CALLS and call.get(name)}
        blocks += [{"call": made.id, **of_call}] if of_call else []
    return Generation(
        text=message.get("content") or refusal or "",
        usage=parse_usage(payload),
        tool_calls=tuple(calls),
        finish_reason="content_filter" if refusal else choice.get("finish_reason"),
        id=payload.get("id") or None,
        blocks=tuple(blocks),
    )


class Reader:
    """Puts the chunks of a streamed chat completion together, into what the whole one would have been."""

    def __init__(self, served: Served | None = None) -> None:
        self._served = served
        self._message: dict[str, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish: str | None = None
        self._last: dict[str, Any] = {}

    def add(self, chunk: Mapping[str, Any]) -> str:
        """The text in this chunk. Usage comes in a chunk without choices, on some servers with the last choice."""
        self._last.update({name: chunk[name] for name in ("id", "usage", "timings") if chunk.get(name)})
        piece = ""
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice.get("delta") or {}
            piece = delta.get("content") or delta.get("refusal") or ""
            if not isinstance(piece, str):
                raise TypeError("a piece of text is no text")
            back = () if self._served is None else self._served.host.back
            for name in ("content", "refusal", *back):
                if isinstance(delta.get(name), str):
                    self._message.setdefault(name, []).append(delta[name])
            for part in delta.get("tool_calls") or ():
                self._add_call(part)
            self._finish = choice.get("finish_reason") or self._finish
        return piece

    def _add_call(self, part: Mapping[str, Any]) -> None:
        call = self._calls.setdefault(part.get("index") or 0, {"id": "", "function": {"name": "", "arguments": []}})
        function = part.get("function") or {}
        call["id"] = part.get("id") or call["id"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"].append(function.get("arguments") or "")
        call.update({name: part[name] for name in OF_CALLS if part.get(name)})

    def end(self) -> Generation | None:
        """The whole, or None if no finish reason came: then the stream was cut."""
        if self._finish is None:
            return None
        message: dict[str, Any] = {name: "".join(pieces) for name, pieces in self._message.items()}
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": "".join(call["function"]["arguments"])}}
            for _, call in sorted(self._calls.items())
        ]
        whole = {**self._last, "choices": [{"message": message, "finish_reason": self._finish}]}
        timings = self._last.get("timings")
        if timings:  # a stream's first token is timed here, not by the server
            whole["timings"] = {name: value for name, value in timings.items() if name != "prompt_ms"}
        return parse_reply(whole, self._served)
