"""OpenAI's Responses API: requests, replies, streams. Pure functions.

Nothing is stored at the host (``store`` is false): the whole conversation goes with each request, with the reasoning
items that a model needs back with the results of its tools, encrypted as it sent them. The system text is an input
message, since ``instructions`` can't hold a breakpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.provider import Generation, Request
from agentmem.types import Message, ToolCall

from ._http import from_status
from ._openai_chat import samples, tool_body
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
from ._openai_hosts import Served, may_reason
from ._tools import arguments_text, in_order, tool_call

__all__ = ["Reader", "build_count", "build_request", "parse_reply"]

#: Fewer tokens of an answer are refused.
LEAST_OUTPUT = 16
#: Fields of a request that its count depends on: what the counting endpoint takes.
COUNTED = ("model", "input", "tools", "tool_choice", "text", "reasoning", "parallel_tool_calls", "truncation")
#: What an HTTP error of that kind would have as its status, for errors told inside a reply.
STATUS = {"rate_limit_exceeded": 429, "invalid_prompt": 400, "invalid_image": 400}


def build_request(
    request: Request, served: Served, *, stream: bool = False, salted: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON body of ``POST /responses``. The same bytes for the same segments.

    ``seed`` is not known there and left out; fewer than 16 tokens can't be asked for, so a smaller ``max_tokens`` is
    16. Chat Completions' ``reasoning_effort`` and ``verbosity`` are understood in ``extra``. ``salted`` as in
    `_openai_chat.build_request`.
    """
    options = request.options
    if options.stop:
        raise InvalidInput(
            "the Responses API has no stop texts: leave them out, or set [providers.openai] api = 'chat'"
        )
    said = messages_of(request)
    placed = placed_marks(request, served, said, _markable)
    items = [item for at, message in enumerate(said) for item in _items(message, served, breakpoint_at(placed, at))]
    body: dict[str, Any] = {"model": served.model, "input": items, "store": False}
    if request.tools:
        body["tools"] = [_tool(tool) for tool in in_order(request.tools)]
        if served.host.own_names and may_reason(served.model):
            body["include"] = ["reasoning.encrypted_content"]
    cache = cache_fields(request, served, responses=True)
    if options.max_tokens is not None and not cache.get("prompt_cache_options", {}).get("prewarm"):
        body["max_output_tokens"] = max(LEAST_OUTPUT, options.max_tokens)
    for name in ("temperature", "top_p"):
        if (value := getattr(options, name)) is not None and samples(request, served):
            body[name] = value
    body |= cache
    if stream:
        body["stream"] = True
    extra = dict(options.extra)
    if (effort := extra.pop("reasoning_effort", None)) is not None:
        body["reasoning"] = {"effort": effort}
    if options.schema is not None:
        body["text"] = {"format": {"type": "json_schema", **named_schema(options.schema)}}
    if (verbosity := extra.pop("verbosity", None)) is not None:
        body["text"] = {**body.get("text", {}), "verbosity": verbosity}
    for name in ("reasoning", "text"):  # what is told in the API's own form stands beside what was put there
        if name in body and isinstance(extra.get(name), Mapping):
            extra[name] = {**body[name], **extra[name]}
    return {**body, **extra, **(salted or {})}


def build_count(request: Request, served: Served) -> dict[str, Any]:
    """The JSON body of ``POST /responses/input_tokens`` for the same request."""
    body = build_request(request, served)
    return {name: body[name] for name in COUNTED if name in body}


def _markable(message: Message) -> bool:
    """The model's own words are output items, and those hold no breakpoint."""
    return message.role != "assistant" and bool(message.content or message.images)


def _items(message: Message, served: Served, marked: Mapping[str, Any]) -> list[dict[str, Any]]:
    cleared(message, tool=True)
    if message.role == "assistant":
        return _answer(message, served)
    text = message.content
    if message.name and message.role == "user":
        text = f"{message.name}: {text}"
    content: Any = text
    if message.images or (served.marked and text):
        content = [{"type": "input_image", "detail": "auto", "image_url": image_url(image)} for image in message.images]
        content += [{"type": "input_text", "text": text}] if text else []
        content[-1] |= marked
    if message.role == "tool":
        return [{"type": "function_call_output", "call_id": message.tool_call_id or "", "output": content}]
    return [{"role": message.role, "content": content}]


def _answer(message: Message, served: Served) -> list[dict[str, Any]]:
    """An earlier answer: its text, its calls, and where the same model wrote it and called tools its reasoning, each
    where it stood."""
    calls = {call.id: call for call in message.tool_calls}
    blocks = message.blocks if calls and message.blocks_of == served.name else ()
    items: list[dict[str, Any]] = []
    told = False
    for block in blocks:
        if block.get("type") == "message" and message.content and not told:
            items.append({"role": "assistant", "content": message.content, **_but(block, "type")})
            told = True
        elif block.get("type") == "function_call" and block.get("call_id") in calls:
            items.append(_call(calls.pop(block["call_id"])))
        elif block.get("type") == "reasoning":
            items.append(dict(block))
    if message.content and not told:
        items.append({"role": "assistant", "content": message.content})
    return items + [_call(call) for call in calls.values()]


def _but(block: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != name}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": arguments_text(call)}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in tool and tool["type"] != "function":
        return dict(tool)  # one of the vendor's own tools
    # Left out, strict would mean true here, which few schemas are written for.
    return {"type": "function", "strict": False, **tool_body(tool)}


# Replies.


def parse_reply(payload: Mapping[str, Any], served: Served | None = None) -> Generation:
    """A response as a `Generation`. Raises KeyError or TypeError for what is none, and the error that a failed one
    tells of."""
    status, error = payload.get("status"), payload.get("error")
    if status == "failed" or error:
        raise _failed(error or {}, served)
    texts: list[str] = []
    refused = False
    calls: list[ToolCall] = []
    blocks: list[dict[str, Any]] = []
    reasoned = False
    for item in payload["output"]:
        if item["type"] == "message":
            for part in item.get("content") or ():
                texts.append(part.get("text") or part.get("refusal") or "")
                refused = refused or part.get("type") == "refusal"
            blocks.append({"type": "message", **({"phase": item["phase"]} if item.get("phase") else {})})
        elif item["type"] == "function_call":
            calls.append(tool_call(item.get("call_id"), item["name"], item.get("arguments")))
            blocks.append({"type": "function_call", "call_id": calls[-1].id})
        elif item["type"] == "reasoning":
            blocks.append({name: value for name, value in item.items() if name != "status" and value is not None})
            reasoned = True
    return Generation(
        text="".join(texts),
        usage=parse_usage(payload),
        tool_calls=tuple(calls),
        finish_reason=_finish(payload, calls, refused=refused),
        miss=_miss(payload.get("prompt_cache_diagnostics")),
        id=payload.get("id") or None,
        blocks=tuple(blocks) if reasoned and calls else (),
    )


def _finish(payload: Mapping[str, Any], calls: Sequence[ToolCall], *, refused: bool) -> str:
    reason = (payload.get("incomplete_details") or {}).get("reason")
    if refused or reason == "content_filter":
        return "content_filter"
    if reason is not None:
        return "length" if reason == "max_output_tokens" else str(reason)
    if (status := payload.get("status") or "completed") not in ("completed", "incomplete"):
        return str(status)  # cancelled, or queued where the caller asked for that
    return "tool_calls" if calls else "stop"


def _failed(error: Mapping[str, Any], served: Served | None) -> Exception:
    name = served.name if served is not None and served.name else "openai"
    code = str(error.get("code") or "server_error")
    status = STATUS.get(code, 400 if code.startswith(("invalid_", "image_", "unsupported_")) else 500)
    return from_status(name, status, error.get("message") or code, body=dict(error)).error


def _miss(diagnosis: Mapping[str, Any] | None) -> str | None:
    if not diagnosis or diagnosis.get("type") in ("cache_hit", "unavailable"):
        return None
    if diagnosis.get("type") != "cache_miss":
        return str(diagnosis.get("type"))
    missed = diagnosis.get("cache_missed_tokens")
    return str(diagnosis.get("reason")) + (f" ({missed} tokens missed)" if missed else "")


class Reader:
    """Puts the events of a streamed response together."""

    def __init__(self, served: Served | None = None) -> None:
        self._served = served
        self._pieces: list[str] = []
        self._items: dict[int, Mapping[str, Any]] = {}
        self._response: Mapping[str, Any] | None = None

    def add(self, event: Mapping[str, Any]) -> str:
        """The text in this event."""
        kind = event.get("type")
        if kind in ("response.output_text.delta", "response.refusal.delta"):
            piece = event["delta"]
            if not isinstance(piece, str):
                raise TypeError("a piece of text is no text")
            self._pieces.append(piece)
            return piece
        if kind == "response.output_item.done":
            self._items[event.get("output_index", len(self._items))] = event["item"]  # llama-server numbers none
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._response = event["response"]
        elif kind == "error":
            raise _failed(event, self._served)
        return ""

    def end(self) -> Generation | None:
        """The whole, or None if its last event did not come: then the stream was cut."""
        if self._response is None:
            return None
        whole = dict(self._response)
        if not whole.get("output"):  # some servers leave it out at the end: the items came one by one
            whole["output"] = [item for _, item in sorted(self._items.items())]
        return parse_reply(whole, self._served)
