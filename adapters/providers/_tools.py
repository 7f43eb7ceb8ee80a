"""Tool definitions and tool calls between agentmem's form and the vendors'.

Knows OpenAI's two spellings, which the others follow, and how a model's broken arguments are kept.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.types import ToolCall

__all__ = ["arguments_text", "tool_call", "tool_parts"]


def tool_parts(tool: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """Name, description and JSON schema of a tool in OpenAI's nested form, or flat with parameters or input_schema."""
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise InvalidInput("a tool is a mapping with name, description and parameters (a JSON schema)")
    schema = inner.get("parameters") or inner.get("input_schema") or {"type": "object", "properties": {}}
    return name, str(inner.get("description") or ""), schema


def arguments_text(call: ToolCall) -> str:
    """The arguments as the JSON text that OpenAI's format wants; the same bytes each time."""
    if call.arguments.keys() == {"_raw"}:
        return str(call.arguments["_raw"])
    return json.dumps(call.arguments, ensure_ascii=False)


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
