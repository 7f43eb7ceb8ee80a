"""Writes what the adapters send for one rich request, as bytes: ``python tests/golden/requests/write_requests.py DIR``.

A change of these files is a change that voids every user's cached prompts once: say so in CHANGELOG.md.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from agentmem.cache_rules import rules_for
from agentmem.provider import CachePlan, Mark, Options, Request
from agentmem.types import Image, Message, Segment, ToolCall

hosts = importlib.import_module("agentmem.adapters.providers._openai_hosts")
NAMES = {"city", "unit", "days", "hours"}

#: Made from a set: its order differs between processes.
CALL = ToolCall(id="c1", name="look_up", arguments={name: {"a": 1, "ü": [name]} for name in NAMES})
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "at": {"type": "integer"}}}
TOOLS = {
    "look_up": {"name": "look_up", "description": "Weather", "parameters": SCHEMA},
    "forecast": {"type": "function", "function": {"name": "forecast", "parameters": SCHEMA}},
    "note": {"name": "note", "input_schema": dict.fromkeys(("title", "type"), "object")},
}


def request() -> Request:
    """A request with all that a request may have."""
    told = [
        Message(role="user", content="Hi", name="Ana", images=(Image(data="aGk=", media_type="image/png"),)),
        Message(role="assistant", content="I look.", tool_calls=(CALL,)),
        Message(role="tool", content="rain", tool_call_id="c1"),
        Message(role="assistant", content="It rains.\n"),
    ]
    return Request(
        segments=(
            Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True),
            Segment(name="history", messages=tuple(told), stable=True),
            Segment(name="turn", messages=(Message(role="user", content="Tomorrow? \u2603"),), stable=False),
        ),
        tools=tuple(TOOLS[name] for name in set(TOOLS)),
        options=Options(max_tokens=64, seed=7, schema={"title": "Answer", **SCHEMA}),
        cache=CachePlan(marks=(Mark(messages=1, lifetime="12h"), Mark(messages=5)), previous="resp_0", diagnose=True),
        cache_key="0123456789abcdef",
        tenant="t",
    )


def bodies() -> dict[str, Any]:
    """The body that each of OpenAI's formats makes of it, by a name."""
    chat = importlib.import_module("agentmem.adapters.providers._openai_chat")
    responses = importlib.import_module("agentmem.adapters.providers._openai_responses")
    made: dict[str, Any] = {}
    for model in ("gpt-4.1", "gpt-5.6-sol"):
        name = f"openai:{model}"
        served = hosts.Served(model=model, name=name, host=hosts.OPENAI, rules=rules_for(name))
        made[f"openai-chat-{model}"] = chat.build_request(request(), served, stream=True)
        made[f"openai-responses-{model}"] = responses.build_request(request(), served, stream=True)
    made["openai-compatible"] = chat.build_request(request(), hosts.Served(model="m", name="openai_compatible:m"))
    return made


def main(folder: str) -> None:
    """Write a file for each."""
    for name, body in bodies().items():
        (Path(folder) / f"{name}.json").write_bytes(json.dumps(body, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
