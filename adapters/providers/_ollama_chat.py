"""Ollama's chat format: what a request is written as, and what a reply, its counts and a stream's lines say.

Pure: no socket, no SDK. The prefix stays byte-equal: tools in one order, arguments in one spelling, options as they are
set for all requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.provider import Generation, Request
from agentmem.types import Image, Message, Usage

from ._http import whole
from ._ollama_estimates import sent
from ._tools import canonical, in_order, tool_call, tool_parts

__all__ = ["Reader", "Timed", "build_request", "parse_reply", "parse_usage"]

#: Names in `Options.extra` that are fields of a chat request; every other one is an option of the model.
FIELDS = ("format", "think", "logprobs", "top_logprobs")


def build_request(
    request: Request,
    *,
    model: str,
    stream: bool = False,
    keep_alive: str = "5m",
    options: Mapping[str, Any] | None = None,
    think: bool | None = None,
) -> dict[str, Any]:
    """The JSON body of ``POST /api/chat``. ``options`` are the constant ones; sampling options are added to them.

    Prefill alone is not possible, so ``max_tokens=0`` asks for one token. A user's ``name`` is written before the text:
    the API has no field for it. Raises `InvalidInput` for an image that is only an address: Ollama fetches none.
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
        "messages": _messages(request, f"ollama:{model}"),
        "stream": stream,
        "keep_alive": sent(extra.pop("keep_alive", keep_alive)),
    }
    if think is not None:
        body["think"] = think
    if request.tools:
        body["tools"] = [_tool(tool) for tool in in_order(request.tools)]
    body.update({name: extra.pop(name) for name in FIELDS if name in extra})
    if wanted.schema is not None:
        body["format"] = dict(wanted.schema)
    body["options"] = {**tuned, **extra.pop("options", {}), **extra}
    return body


def _messages(request: Request, writer: str) -> list[dict[str, Any]]:
    names: dict[str, str] = {}  # of the tools, by call: a result names its tool here, not its call
    messages: list[dict[str, Any]] = []
    for segment in request.segments:
        for message in segment.messages:
            names.update({call.id: call.name for call in message.tool_calls})
            messages.append(_message(message, names, writer))
    return messages


def _message(message: Message, names: Mapping[str, str], writer: str) -> dict[str, Any]:
    text = message.content
    if message.role == "user" and message.name:
        text = f"{message.name}: {text}"
    body: dict[str, Any] = {"role": message.role, "content": text}
    if message.images:
        body["images"] = [_image(image) for image in message.images]
    if message.tool_calls:
        if message.blocks_of == writer:  # templates of thinking models show thoughts until the question is answered
            body |= {name: text for block in message.blocks for name, text in block.items() if name == "thinking"}
        body["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(canonical(call.arguments))}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        body["tool_name"] = message.name or names.get(message.tool_call_id or "", "tool")
    return body


def _image(image: Image) -> str:
    if image.data is None:
        raise InvalidInput(f"Ollama fetches no images: give the bytes of {str(image.url)[:200]!r} as base64 data")
    return image.data


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    name, description, parameters = tool_parts(tool)
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


# Replies.


@dataclass(frozen=True, kw_only=True)
class Timed(Generation):
    """A generation with the seconds that the server says it took to read the prompt, and whether it counted the
    prompt's tokens; 0 and False if it did not say."""

    prompt_s: float = 0.0
    counted: bool = False


def parse_reply(payload: Mapping[str, Any]) -> Timed:
    """A chat reply as a `Generation`. Raises KeyError or TypeError for what is none."""
    message = payload["message"]
    calls = tuple(
        tool_call(None, call["function"]["name"], call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
    )
    reason = payload.get("done_reason")
    thoughts = message.get("thinking")
    usage = parse_usage(payload)
    return Timed(
        text=message.get("content") or "",
        usage=usage,
        tool_calls=calls,
        finish_reason="tool_calls" if calls else reason,
        blocks=({"thinking": thoughts},) if calls and thoughts else (),
        prompt_s=whole(payload.get("prompt_eval_duration")) / 1e9,
        counted=usage.input_tokens > 0,
    )


def parse_usage(payload: Mapping[str, Any]) -> Usage:
    """The usage: the whole prompt (0 where the server left it out: then it is unknown), no cached tokens (Ollama does
    not tell), the time it took to read the prompt."""
    nanoseconds = whole(payload.get("load_duration")) + whole(payload.get("prompt_eval_duration"))
    return Usage(
        input_tokens=whole(payload.get("prompt_eval_count")),
        output_tokens=whole(payload.get("eval_count")),
        first_token_s=nanoseconds / 1e9 if nanoseconds else None,
    )


class Reader:
    """Puts the lines of a streamed chat together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[Any] = []
        self._last: Mapping[str, Any] = {}

    def add(self, line: Mapping[str, Any]) -> str:
        """The text in this line."""
        message = line.get("message") or {}
        self._calls += message.get("tool_calls") or ()
        self._thoughts.append(message.get("thinking") or "")
        self._last = line
        piece: str = message.get("content") or ""
        if piece:
            self._text.append(piece)
        return piece

    def end(self) -> Generation | None:
        """The whole, or None if no line said ``done``: then the stream was cut."""
        if not self._last.get("done"):
            return None
        message = {"content": "".join(self._text), "thinking": "".join(self._thoughts), "tool_calls": self._calls}
        return parse_reply({**self._last, "message": message})
