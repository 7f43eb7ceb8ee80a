"""Ollama's API, as a stand-in host reads and writes it: chats as lines of JSON, embeddings, what a model can do.

Knows the wire format of ollama 0.5 and later. Like the real server it ignores fields it does not know, counts the whole
prompt whether it was cached or not, and lets a cache hit show only in the time that reading the prompt took.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..cache_rules import CacheRules
from .host_cache import Piece, Prompt, Visit
from .host_exchange import Answer, Refused, canonical, words
from .host_openai import vector

__all__ = ["Chat", "embed", "show", "tags"]

#: Nanoseconds that reading one uncached token takes, and a cached one.
READ_NS, CACHED_NS = 1_000_000, 1_000
#: The window that ``/api/show`` tells.
WINDOW = 32768
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
#: Kept for ever (keep_alive below 0), in seconds.
FOREVER_S = 1e12


class Chat:
    """``POST /api/chat``."""

    path = "/api/chat"
    stream_type = "application/x-ndjson"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> Prompt:
        """The prompt of a request, or `Refused`."""
        del rules
        if not body.get("model"):
            raise Refused("model is required")
        options = body.get("options") or {}
        limit = options.get("num_predict")
        stop = options.get("stop") or ()
        tools = [Piece(f"<|tool|>{canonical(tool)}".encode(), "tools") for tool in body.get("tools") or ()]
        return Prompt(
            model=f"{body['model']} {options.get('num_ctx')}",  # another window loads the model anew
            owner=headers.get("authorization", ""),
            pieces=(*tools, *(_piece(message) for message in body.get("messages") or ())),
            seconds=_seconds(body.get("keep_alive", "5m")),
            max_tokens=None if limit is None or limit < 0 else limit,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stream=bool(body.get("stream", True)),
        )

    def miss(self, prompt: Prompt, visit: Visit, earlier: Prompt | None) -> None:
        """Ollama has no diagnosis."""

    def refusal(self, error: Refused) -> dict[str, Any]:
        """An error's body."""
        return {"error": error.message}

    def whole(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> dict[str, Any]:
        """A chat's reply."""
        del name, miss
        return {**_line(body, answer.text or answer.refusal, answer), **_end(answer, visit)}

    def events(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> Iterator[bytes]:
        """The lines of a streamed one."""
        del name, miss
        for word in words(answer.text or answer.refusal):
            yield json.dumps({**_line(body, word), "done": False}).encode() + b"\n"
        if answer.calls:
            yield json.dumps({**_line(body, "", answer), "done": False}).encode() + b"\n"
        yield json.dumps({**_line(body, ""), **_end(answer, visit)}).encode() + b"\n"


def _piece(message: Mapping[str, Any]) -> Piece:
    rest = {name: message[name] for name in ("tool_calls", "tool_name", "images") if message.get(name)}
    text = f"<|start|>{message.get('role')}<|message|>{message.get('content') or ''}{canonical(rest) if rest else ''}"
    return Piece(text.encode(), "messages")


def _seconds(told: Any) -> float:
    """A duration as Ollama takes it: seconds, or "5m", "1h30m"; for ever below 0."""
    text = str(told)
    if re.fullmatch(r"-?\d+(\.\d+)?", text):
        value = float(text)
    elif re.fullmatch(r"-?(\d+(\.\d+)?(ns|us|ms|s|m|h))+", text):
        value = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ns|us|ms|s|m|h)", text))
        value = -value if text.startswith("-") else value
    else:
        raise Refused(f'time: invalid duration "{text}"')
    return FOREVER_S if value < 0 else value


def _line(body: Mapping[str, Any], text: str, answer: Answer | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if answer is not None and answer.thinking:
        message["thinking"] = answer.thinking
    if answer is not None and answer.calls:
        message["tool_calls"] = [{"function": {"name": n, "arguments": dict(given)}} for n, given in answer.calls]
    return {"model": body["model"], "created_at": "2026-01-01T00:00:00Z", "message": message}


def _end(answer: Answer, visit: Visit) -> dict[str, Any]:
    reading = visit.read * CACHED_NS + (visit.tokens - visit.read) * READ_NS
    counts = {"prompt_eval_count": visit.tokens, "prompt_eval_duration": reading, "eval_count": answer.tokens}
    done = "length" if answer.finish == "length" else "stop"
    return {
        "done": True,
        "done_reason": done,
        "total_duration": reading,
        "load_duration": 0,
        **counts,
        "eval_duration": 1,
    }


def embed(body: Mapping[str, Any]) -> dict[str, Any]:
    """``POST /api/embed``: vectors that depend on the text alone."""
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    return {"model": body["model"], "embeddings": [vector(text, 16) for text in texts], "prompt_eval_count": len(texts)}


def show(body: Mapping[str, Any]) -> dict[str, Any]:
    """``POST /api/show``."""
    del body
    return {
        "details": {"family": "llama", "format": "gguf", "parameter_size": "1B", "quantization_level": "Q4_K_M"},
        "model_info": {"general.architecture": "llama", "llama.context_length": WINDOW},
        "capabilities": ["completion", "tools", "vision"],
        "template": "{{ .Prompt }}",
        "modified_at": "2026-01-01T00:00:00Z",
    }


def tags() -> dict[str, Any]:
    """``GET /api/tags`` and ``/api/ps``: no model is listed, any name is answered."""
    return {"models": []}
