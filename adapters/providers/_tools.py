"""Tool definitions and tool calls between agentmem's form and the vendors', as the same bytes each time.

Knows OpenAI's two spellings, which the others follow, and how a model's broken arguments are kept. Tools stand at the
head of every prompt: one that moved or was written otherwise would void a host's whole cache.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.types import ToolCall

__all__ = ["arguments_text", "canonical", "in_order", "tool_call", "tool_parts"]

#: Whose keys are names of the user's own; their order says in which order a model writes the values.
_NAMED = ("properties", "patternProperties")


def canonical(value: Any) -> str:
    """``value`` as compact JSON with sorted keys. Raises `InvalidInput` for what JSON can't hold."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{type(value).__name__} can't be written as JSON: {error}") from error


def in_order(tools: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The tools sorted by name, so that a registry built in another order gives the same prompt."""
    return sorted(tools, key=_place)


def _place(tool: Mapping[str, Any]) -> tuple[str, str]:
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    return str(name or ""), str(tool.get("type") or "")


def tool_parts(tool: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """Name, description and JSON schema of a tool in OpenAI's nested form, or flat with parameters or input_schema.

    The schema's keywords come in one order, whatever order they were given in.
    """
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidInput("a tool is a mapping with name, description and parameters (a JSON schema)")
    schema = inner.get("parameters") or inner.get("input_schema") or {"type": "object", "properties": {}}
    if not isinstance(schema, Mapping):
        raise InvalidInput(f"tool {name!r}: its parameters are a JSON schema, not {type(schema).__name__}")
    return name, str(inner.get("description") or ""), _sorted_keys(schema)


def _sorted_keys(schema: Any, *, named: bool = False) -> Any:
    """A JSON schema with its keywords in one order; the properties stay in the order in which they were given."""
    if isinstance(schema, Mapping):
        keys = schema if named else sorted(schema, key=str)
        return {key: _sorted_keys(schema[key], named=not named and key in _NAMED) for key in keys}
    return [_sorted_keys(item) for item in schema] if isinstance(schema, (list, tuple)) else schema


def arguments_text(call: ToolCall) -> str:
    """The arguments as the JSON text that OpenAI's format wants; the same bytes each time."""
    if call.arguments.keys() == {"_raw"}:
        return str(call.arguments["_raw"])
    return canonical(call.arguments)


def tool_call(call_id: str | None, name: str, arguments: str | Mapping[str, Any] | None) -> ToolCall:
    """A call with its arguments parsed; an id is made up where the vendor gives none.

    What is no JSON object is kept as ``{"_raw": text}``: the model wrote it, so the agent can show it its mistake, and
    the text goes back unchanged in the history.
    """
    if isinstance(arguments, Mapping):
        parsed: Any = dict(arguments)
    else:
        try:
            parsed = json.loads(arguments) if arguments else {}
        except ValueError:
            parsed = None
    if not isinstance(parsed, dict):
        parsed = {"_raw": arguments}
    return ToolCall(id=call_id or f"call_{uuid.uuid4().hex[:16]}", name=name, arguments=parsed)
