"""For every adapter: as a conversation goes on, what a cache may keep of the request stays byte-equal.

Three turns share system, core and a growing history; the recalled block in the turn is another each time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem.provider import Options, Request
from agentmem.types import Message, Segment, ToolCall

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.bodies import BUILD, cacheable

TOOLS = ({"name": "look_up", "description": "d", "parameters": {"type": "object", "properties": {}}},)
SYSTEM = Segment(name="system", messages=(Message(role="system", content="Be kind."),), stable=True)
CORE = Segment(
    name="core",
    messages=(Message(role="user", content="<memories>facts</memories>"), Message(role="assistant", content="Noted.")),
    stable=True,
)


def asking(history: list[Message], recalled: str, question: str, options: Options) -> Request:
    turn = Message(role="user", content=f"<memories>{recalled}</memories>\n\n{question}", records=("r1",))
    segments = [SYSTEM, CORE]
    if history:
        segments.append(Segment(name="history", messages=tuple(history), stable=True))
    segments.append(Segment(name="turn", messages=(turn,), stable=False))
    return Request(segments=tuple(segments), tools=TOOLS, options=options, cache_key="k")


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
