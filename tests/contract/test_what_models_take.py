"""What a model can't do is refused before anything is sent or stored; what its host counted is learned from."""

from __future__ import annotations

from typing import Any

import pytest

from agentmem import ConfigError, Memory
from agentmem.provider import Capabilities, Generation, Request
from agentmem.testing import ScriptedProvider
from agentmem.tokens import counter_for, request_tokens
from agentmem.types import Usage

TOOL = {"name": "weather", "description": "The weather.", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/dog.png"}}
SEEN = {"role": "user", "content": [{"type": "text", "text": "What is this?"}, IMAGE]}


@pytest.mark.parametrize(
    ("lacks", "message", "more", "said"),
    [
        ("tools", "Hello.", {"tools": [TOOL]}, "takes no tools"),
        ("schemas", "Hello.", {"schema": SCHEMA}, "by a schema"),
        ("images", SEEN, {}, "reads no images"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_model_lacks_is_refused_before_anything_is_sent(
    lacks: str, message: Any, more: dict[str, Any], said: str, *, stream: bool
) -> None:
    for able in (True, False):
        can: dict[str, Any] = {"tools": True, "schemas": True, "images": True, lacks: able}
        model = ScriptedProvider(lambda _: "{}", capabilities=Capabilities(chat=True, **can))
        with Memory(":memory:", model=model, embedder="none") as memory:

            def ask(memory: Memory = memory) -> None:
                reply = memory.chat(message, stream=stream, **more)
                assert list(reply)

            if able:
                ask()
                assert len(model.requests) == 1
                continue
            with pytest.raises(ConfigError, match=said):
                ask()
            assert model.requests == []
            assert memory.list() == []


class Dear(ScriptedProvider):
    """A host that counts half as many tokens again as the estimate."""

    def generate(self, request: Request) -> Generation:
        answer = super().generate(request)
        estimate = request_tokens(request, counter_for(self.name).count)
        return Generation(text=answer.text, usage=Usage(input_tokens=round(estimate * 1.5), output_tokens=1))


def test_counts_are_learned_from_what_the_host_counted() -> None:
    model = Dear(lambda _: "Yes.", name="host:model", capabilities=Capabilities(chat=True, exact_tokens=False))
    text = "How many words does this long sentence have? " * 20
    with Memory(":memory:", model=model, embedder="none") as memory:
        before = memory.count_tokens(text)
        for number in range(30):
            memory.scope(user="ana", session=str(number)).chat(text)
        after = memory.count_tokens(text)
    assert not before.exact
    assert not after.exact
    assert str(before) == f"about {before.tokens} tokens"
    assert str(after).endswith("% off)")
    assert after.tokens == pytest.approx(1.5 * before.tokens, rel=0.03)
