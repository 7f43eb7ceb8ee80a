"""The body that each adapter makes of a request, and what of it a cache may keep."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

from agentmem.cache_rules import rules_for
from agentmem.provider import Request

__all__ = ["BUILD", "cacheable"]


def _adapter(name: str) -> Any:
    return importlib.import_module(f"agentmem.adapters.providers.{name}")


def _openai(api: str, model: str, **host: Any) -> Callable[[Request], dict[str, Any]]:
    hosts = _adapter("_openai_hosts")
    official = {"host": hosts.OPENAI, "rules": rules_for(f"openai:{model}")}
    served = hosts.Served(model=model, **(official if host.get("official") else {}))
    return lambda request: dict(_adapter(f"_openai_{api}").build_request(request, served))


#: The body that each adapter builds from a request.
BUILD: dict[str, Callable[[Request], dict[str, Any]]] = {
    "openai": _openai("responses", "gpt-6-sol", official=True),
    "openai_chat": _openai("chat", "gpt-4o", official=True),
    "openai_marked_chat": _openai("chat", "gpt-6-sol", official=True),
    "openai_compatible": _openai("chat", "m"),
    "anthropic": lambda request: dict(_adapter("_anthropic_requests").build_request(request, model="m")),
    "ollama": lambda request: dict(
        _adapter("_ollama_chat").build_request(request, model="m", options={"num_ctx": 4096})
    ),
    "llamacpp": lambda request: dict(_adapter("llamacpp").build_request(request, id_slot=0)),
}


def cacheable(build: Callable[[Request], dict[str, Any]], request: Request) -> str:
    """Canonical JSON of all that stands before the turn's message, without cache markers (they may move).

    The list of messages is left open at its end, so that a longer request can start with a shorter one's text.
    """
    body = build(request)
    listed = "input" if "input" in body else "messages"
    head = {name: value for name, value in body.items() if name not in (listed, "prompt_cache_options")}
    text = json.dumps(_unmarked([head, body[listed][:-1]]), sort_keys=True)
    return text.removesuffix("]]")


def _unmarked(value: Any) -> Any:
    """Without cache markers. A text by itself and a single part with that text are rendered the same by a host."""
    if isinstance(value, dict):
        bare = {name: item for name, item in value.items() if name not in ("cache_control", "prompt_cache_breakpoint")}
        if isinstance(bare.get("content"), str) and "role" in bare:
            bare["content"] = [{"type": "text", "text": bare["content"]}]
        if bare.get("type") in ("input_text", "output_text"):
            bare["type"] = "text"
        return {name: _unmarked(item) for name, item in bare.items()}
    return [_unmarked(item) for item in value] if isinstance(value, list) else value
