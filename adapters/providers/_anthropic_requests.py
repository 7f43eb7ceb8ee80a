"""What a request is written as in Anthropic's Messages format, and where its prefixes are marked.

Pure: no socket, no SDK, no clock. Which prefixes are to be kept is the plan's to say (`CachePlan`); its marks become
``cache_control`` in the form, number and order that the API takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.provider import Mark, Request
from agentmem.types import Image, Message, ToolCall

from ._http import whole
from ._tools import canonical, in_order, tool_parts

__all__ = ["PLAIN", "build_count", "build_request"]

#: The API requires a limit; this one applies when the options name none.
MAX_TOKENS = 1024
#: Markers that one request may carry.
BREAKPOINTS = 4
#: The shortest lifetime by its name in the rules; a marker without a ``ttl`` is of it.
SHORT = "5m"
#: Parts of an answer that are built anew from the message that holds it; all others go back as they came.
PLAIN = ("text", "tool_use")
#: Parts that take no marker.
UNMARKED = ("thinking", "redacted_thinking")
#: Fields of a request that the counting endpoint takes.
COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control")

Json = dict[str, Any]


def build_request(request: Request, *, model: str, stream: bool = False) -> Json:
    """The JSON body of ``POST /v1/messages``: the same bytes for the same request.

    System messages at the head become ``system`` blocks; a later one becomes fenced text of the user, since most models
    take no other. A user's ``name`` is written before the text: the API has no field for it. ``max_tokens=0`` fills the
    cache only, and goes without what the API refuses beside it (thinking, a forced tool, an answer's format). Raises
    `InvalidInput` for a mark behind the last message, and for images that are neither a user's nor a tool's.
    """
    options = request.options
    extra = dict(options.extra)
    tools = [_tool(tool) for tool in in_order(request.tools)]
    system, messages, ends = _laid_out(request, f"anthropic:{model}", tools)
    taken = ("cache_control" in extra) + sum("cache_control" in tool for tool in tools)
    _mark(ends, _marks(request), BREAKPOINTS - taken)
    body: Json = {"model": model, "max_tokens": _limit(options.max_tokens, extra), "messages": messages}
    if system:
        body["system"] = system
    if tools:
        body["tools"] = tools
    for name in ("temperature", "top_p"):
        if (value := getattr(options, name)) is not None:
            body[name] = value
    if options.stop:
        body["stop_sequences"] = list(options.stop)
    if request.cache is not None and request.cache.diagnose:
        # Without an earlier answer this only says that the next request will ask.
        body["diagnostics"] = {"previous_message_id": request.cache.previous}
    if stream:
        body["stream"] = True
    body |= extra
    if options.schema is not None:
        form = {"type": "json_schema", "schema": dict(options.schema)}
        body["output_config"] = {**body.get("output_config", {}), "format": form}
    return _prefill(body) if body["max_tokens"] == 0 else body


def build_count(request: Request, *, model: str) -> Json:
    """The JSON body of ``POST /v1/messages/count_tokens`` for what `build_request` would send."""
    body = build_request(request, model=model)
    return {name: value for name, value in body.items() if name in COUNTED}


def _limit(asked: int | None, extra: Mapping[str, Any]) -> int:
    if asked is not None:
        return asked
    thinking = extra.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    return MAX_TOKENS + whole(budget)  # the limit holds for thoughts and answer together


def _prefill(body: Json) -> Json:
    kept = {name: value for name, value in body.items() if name not in ("stream", "thinking")}
    if isinstance(choice := kept.get("tool_choice"), Mapping) and choice.get("type") in ("any", "tool"):
        del kept["tool_choice"]
    if isinstance(told := kept.get("output_config"), Mapping):
        kept["output_config"] = {name: value for name, value in told.items() if name != "format"}
        if not kept["output_config"]:
            del kept["output_config"]
    return kept


def _laid_out(request: Request, name: str, tools: list[Json]) -> tuple[list[Json], list[Json], list[Json | None]]:
    """The system blocks, the messages, and the block that ends the first n messages, for every n."""
    system: list[Json] = []
    messages: list[Json] = []
    ends: list[Json | None] = [tools[-1] if tools else None]
    for segment in request.segments:
        for message in segment.messages:
            blocks = _blocks(message, name, at_head=not messages)
            if message.role == "system" and not messages:
                system += blocks
            elif blocks:  # the API refuses empty text
                _append(messages, "assistant" if message.role == "assistant" else "user", blocks)
            ends.append(next((block for block in reversed(blocks) if block["type"] not in UNMARKED), ends[-1]))
    return system, messages, ends


def _append(messages: list[Json], role: str, blocks: list[Json]) -> None:
    results = role == "user" and blocks[0]["type"] == "tool_result"
    if results and messages and messages[-1]["role"] == "user" and messages[-1]["content"][0]["type"] == "tool_result":
        messages[-1]["content"] += blocks  # the results of one answer's calls must stand in one message
    else:
        messages.append({"role": role, "content": blocks})


def _blocks(message: Message, name: str, *, at_head: bool) -> list[Json]:
    text = message.content
    if message.role == "system" and not at_head:
        text = f"<system>\n{text}\n</system>"
    if message.role == "user" and message.name:
        text = f"{message.name}: {text}"
    if message.images and message.role not in ("user", "tool"):
        raise InvalidInput(f"Anthropic's API takes no images from the {message.role}: give them in a user's message")
    shown: list[Json] = [_image(image) for image in message.images]
    if text.strip():
        shown.append({"type": "text", "text": text})
    if message.role == "tool":
        content = shown if message.images else text
        return [{"type": "tool_result", "tool_use_id": message.tool_call_id or "", "content": content}]
    calls = [_call(call) for call in message.tool_calls]
    if not calls or not message.blocks or message.blocks_of != name:
        return shown + calls
    theirs = [dict(block) for block in message.blocks]
    if any(block.get("type") in PLAIN for block in theirs):  # thoughts stood between the calls: the whole, in its order
        asked = {call.id for call in message.tool_calls}
        return [block for block in theirs if block.get("type") != "tool_use" or block.get("id") in asked]
    return theirs + shown + calls


def _call(call: ToolCall) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(canonical(call.arguments))}


def _image(image: Image) -> Json:
    if image.data is not None:
        return {"type": "image", "source": {"type": "base64", "media_type": image.media_type, "data": image.data}}
    return {"type": "image", "source": {"type": "url", "url": image.url}}


def _tool(tool: Mapping[str, Any]) -> Json:
    own = "type" in tool and tool["type"] not in ("function", "custom")
    if own or ("input_schema" in tool and "function" not in tool):
        return dict(tool)  # one of the vendor's own tools, or one in the vendor's own form
    name, description, schema = tool_parts(tool)
    return {"name": name, "description": description, "input_schema": schema}


def _marks(request: Request) -> Sequence[Mark]:
    if request.cache is not None:
        return request.cache.marks
    marks: list[Mark] = []
    messages = 0
    for segment in request.segments:
        messages += len(segment.messages)
        if segment.stable:
            marks.append(Mark(messages=messages))
    return marks


def _mark(ends: Sequence[Json | None], marks: Sequence[Mark], room: int) -> None:
    """Mark the last ``room`` of these ends. A longer lifetime behind a shorter one is refused by the API, so it is
    asked for as the shorter."""
    chosen: dict[int, tuple[Json, str]] = {}
    short = False
    for mark in marks:
        if not 0 <= mark.messages < len(ends):
            raise InvalidInput(f"a prefix of {mark.messages} messages is marked, the request has {len(ends) - 1}")
        block = ends[mark.messages]
        if block is None or id(block) in chosen or "cache_control" in block:
            continue
        lifetime = SHORT if short or mark.lifetime is None else mark.lifetime
        short = short or lifetime == SHORT
        chosen[id(block)] = block, lifetime
    for block, lifetime in list(chosen.values())[-room:] if room > 0 else ():
        block["cache_control"] = {"type": "ephemeral"} if lifetime == SHORT else {"type": "ephemeral", "ttl": lifetime}
