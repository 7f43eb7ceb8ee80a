"""What Anthropic's Messages API says: a whole reply, its usage, and the events of a streamed one.

Pure: no socket, no SDK. Thoughts are not shown; where the vendor wants them back with the results of tools they are
handed on as they came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from agentmem.provider import Generation
from agentmem.types import Usage

from ._anthropic_requests import PLAIN
from ._http import whole
from ._tools import tool_call

__all__ = ["Reader", "parse_reply", "parse_usage"]

#: The deltas that make a part longer, and where their text stands.
GROWS = {"text_delta": "text", "thinking_delta": "thinking", "input_json_delta": "partial_json"}

FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}

Json = dict[str, Any]


def parse_reply(payload: Mapping[str, Any]) -> Generation:
    """A message as a `Generation`. Raises KeyError, TypeError or ValueError for what is no whole message."""
    blocks: list[Mapping[str, Any]] = list(payload["content"])
    stopped = payload["stop_reason"]
    if not isinstance(stopped, str):
        raise ValueError("the message does not say why it ended")
    calls = [block for block in blocks if block["type"] == "tool_use"]
    text = "".join(block["text"] for block in blocks if block["type"] == "text")
    return Generation(
        text=text or _refusal(payload),
        usage=parse_usage(payload.get("usage") or {}),
        tool_calls=tuple(tool_call(block["id"], block["name"], block["input"]) for block in calls),
        finish_reason=FINISH.get(stopped, stopped),
        miss=_miss(payload),
        id=payload.get("id"),
        blocks=_to_give_back(blocks) if calls else (),
    )


def _refusal(payload: Mapping[str, Any]) -> str:
    """The vendor's words where the model was kept from answering."""
    details = payload.get("stop_details") or {}
    return str(details.get("explanation") or "") if payload.get("stop_reason") == "refusal" else ""


def _miss(payload: Mapping[str, Any]) -> str | None:
    reason = (payload.get("diagnostics") or {}).get("cache_miss_reason") or {}
    if not (kind := reason.get("type")):
        return None
    missed = whole(reason.get("cache_missed_input_tokens"))
    return f"{kind} (about {missed} tokens missed)" if missed else str(kind)


def _to_give_back(blocks: Sequence[Mapping[str, Any]]) -> tuple[Json, ...]:
    """The parts that the API wants back, unchanged and in their place: thoughts above all.

    Where they all stand before the text and the calls they are enough; else it is the whole answer.
    """
    own = [dict(block) for block in blocks if block["type"] not in PLAIN]
    if [dict(block) for block in blocks[: len(own)]] == own:
        return tuple(own)
    return tuple(dict(block) for block in blocks if block["type"] != "text" or block["text"])


def parse_usage(usage: Mapping[str, Any]) -> Usage:
    """The usage. The vendor's ``input_tokens`` leaves out what was read from or written to a cache; ours counts all."""
    read = whole(usage.get("cache_read_input_tokens"))
    written = whole(usage.get("cache_creation_input_tokens"))
    long = whole((usage.get("cache_creation") or {}).get("ephemeral_1h_input_tokens"))
    return Usage(
        input_tokens=whole(usage.get("input_tokens")) + read + written,
        cached_tokens=read,
        written_tokens=written,
        written_long_tokens=min(long, written),
        output_tokens=whole(usage.get("output_tokens")),
    )


class Reader:
    """Puts the events of a streamed message together, into the form of a whole one."""

    def __init__(self) -> None:
        self._message: Json = {"usage": {}}
        self._blocks: dict[int, Json] = {}
        self._parts: dict[int, list[str]] = {}
        self._said = False
        self._stopped = False

    def add(self, event: Mapping[str, Any]) -> str:
        """The text in this event. What it does not know is passed over, as the vendor asks of clients."""
        piece = ""
        if self._stopped:
            return ""  # what comes after the last event belongs to no answer
        kind = event["type"]
        if kind == "message_start":
            self._take(event["message"])
        elif kind == "content_block_start":
            self._blocks[event["index"]] = dict(event["content_block"])
            self._parts[event["index"]] = []
            piece = event["content_block"].get("text") or ""
        elif kind == "content_block_delta":
            piece = self._grow(event["index"], event["delta"])
        elif kind == "message_delta":
            self._take({**event["delta"], "usage": event.get("usage")})
            piece = "" if self._said else _refusal(self._message)
        elif kind == "message_stop":
            self._stopped = True
        self._said = self._said or bool(piece)
        return piece

    def _take(self, fields: Mapping[str, Any]) -> None:
        usage = {name: value for name, value in (fields.get("usage") or {}).items() if value is not None}
        self._message["usage"].update(usage)
        self._message.update({name: value for name, value in fields.items() if name != "usage" and value is not None})

    def _grow(self, index: int, delta: Mapping[str, Any]) -> str:
        block, kind = self._blocks[index], delta["type"]
        if kind in GROWS:
            self._parts[index].append(delta[GROWS[kind]])
        elif kind == "signature_delta":
            block["signature"] = (block.get("signature") or "") + delta["signature"]
        elif kind == "citations_delta":
            block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
        return delta["text"] if kind == "text_delta" else ""

    def end(self) -> Generation | None:
        """The whole, or None if the last event never came: then the stream was cut."""
        if not self._stopped:
            return None
        blocks = [_grown(block, "".join(self._parts[at])) for at, block in sorted(self._blocks.items())]
        return parse_reply({**self._message, "content": blocks})


def _grown(block: Json, written: str) -> Json:
    """A part with all that its deltas brought. A call's broken arguments are kept as they are written."""
    kind = block["type"]
    if not written:
        return block
    if kind in ("text", "thinking"):
        return {**block, kind: (block.get(kind) or "") + written}
    return {**block, "input": tool_call(None, "", written).arguments if kind == "tool_use" else json.loads(written)}
