"""For every adapter: as a conversation goes on, what a cache may keep of the request stays byte-equal.

Three turns share system, core and a growing history; the recalled block in the turn is another each time.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.cache_rules import rules_for
from agentmem.provider import Options, Request
from agentmem.types import Message, Segment, ToolCall

TOOLS = ({"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}},)
SYSTEM = Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True)
CORE = Segment(
    name="core",
    messages=(Message(role="user", content="<memories>facts</memories>"), Message(role="assistant", content="Noted.")),
    stable=True,
)


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
    "ollama": lambda request: dict(_adapter("_ollama_chat").build_request(request, model="m", options={"num_ctx": 4096})),
    "llamacpp": lambda request: dict(_adapter("llamacpp").build_request(request, id_slot=0)),
}


def asking(history: list[Message], recalled: str, question: str, options: Options) -> Request:
    turn = Message(role="user", content=f"<memories>{recalled}</memories>\n\n{question}", records=("r1",))
    segments = [SYSTEM, CORE]
    if history:
        segments.append(Segment(name="history", messages=tuple(history), stable=True))
    segments.append(Segment(name="turn", messages=(turn,), stable=False))
    return Request(segments=tuple(segments), tools=TOOLS, options=options, cache_key="k")


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


@pytest.mark.parametrize("name", BUILD)
def test_three_turns_share_their_cacheable_prefix(name: str) -> None:
    history: list[Message] = []
    prefixes = []
    for turn in range(3):
        prefixes.append(cacheable(BUILD[name], asking(history, f"block {turn}", f"question {turn}", Options(seed=1))))
        call = ToolCall(id=f"c{turn}", name="look_up", arguments={"b": turn, "a": [1, "ü"]})
        history += [
            Message(role="user", content=f"question {turn}", name="Ana"),
            Message(role="assistant", content="", tool_calls=(call,)),
            Message(role="tool", content="found", tool_call_id=f"c{turn}", name="look_up"),
            Message(role="assistant", content=f"answer {turn}"),
        ]
    assert prefixes[1].startswith(prefixes[0])
    assert prefixes[2].startswith(prefixes[1])
    assert len(prefixes[0]) < len(prefixes[1]) < len(prefixes[2])


@pytest.mark.parametrize("name", BUILD)
@given(texts=st.lists(st.text(min_size=1, max_size=40), min_size=2, max_size=6), recalled=st.text(max_size=40))
def test_any_conversation_only_grows_at_its_end(name: str, texts: list[str], recalled: str) -> None:
    roles = ("user", "assistant")
    history = [Message(role=roles[i % 2], content=text) for i, text in enumerate(texts)]  # type: ignore[arg-type]
    shorter = cacheable(BUILD[name], asking(history[:-2], recalled, "q1", Options()))
    longer = cacheable(BUILD[name], asking(history, recalled[::-1], "q2", Options()))
    assert longer.startswith(shorter)


@pytest.mark.parametrize("name", BUILD)
def test_the_same_request_gives_the_same_bytes(name: str) -> None:
    request = asking([], "block", "question", Options(temperature=0.5))
    assert json.dumps(BUILD[name](request)) == json.dumps(BUILD[name](request))


def test_anthropics_markers_stand_at_the_ends_of_the_stable_segments() -> None:
    history = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    body = BUILD["anthropic"](asking(history, "block", "q", Options()))
    blocks = [*body["system"], *(block for message in body["messages"] for block in message["content"])]
    assert ["cache_control" in block for block in blocks] == [True, False, True, False, True, False]
