"""``count_tokens``: which way of counting is taken, and whether it is said to be exact."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from agentmem import counting
from agentmem.config import read
from agentmem.engine import Engine
from agentmem.errors import InvalidInput, Unavailable
from agentmem.flow import arun, run
from agentmem.provider import Capabilities, Request
from agentmem.testing import ScriptedProvider
from agentmem.tokens import Calibration, encoding
from agentmem.types import Image, Message, TokenCount


class Asked(ScriptedProvider):
    """A provider with an endpoint that counts; it says 1,000 for everything, or fails."""

    def __init__(self, *, exact_tokens: bool = False, fails: bool = False) -> None:
        capabilities = Capabilities(chat=True, tools=True, exact_tokens=exact_tokens)
        super().__init__(name="openai:gpt-4o" if exact_tokens else "scripted:m", capabilities=capabilities)
        self.asked: list[Request] = []
        self.fails = fails

    def count_request(self, request: Request) -> TokenCount:
        self.asked.append(request)
        if self.fails:
            raise Unavailable("not now")
        return TokenCount(tokens=1000, exact=True)

    async def acount_request(self, request: Request) -> TokenCount:
        return self.count_request(request)


@pytest.fixture
def provider() -> Asked:
    return Asked()


@pytest.fixture
def engine(provider: Asked) -> Iterator[Engine]:
    engine = Engine(read(path=":memory:", embedder="none"), provider=provider)
    yield engine
    engine.close()


def counted(engine: Engine, content: Any, **how: Any) -> TokenCount:
    return run(counting.count_tokens(engine, content, **how))


def test_a_text_alone_is_counted_by_the_models_own_tokenizer() -> None:
    engine = Engine(
        read(path=":memory:", embedder="none", model="openai:gpt-4o", providers={"openai": {"api_key": "k"}})
    )
    text = "Zürich's 2,048 flats — 東京 🦊"
    assert counted(engine, text) == TokenCount(tokens=len(encoding("o200k_base").encode(text)), exact=True)
    assert not counted(engine, [text]).exact
    engine.close()


def test_without_a_model_it_is_an_estimate() -> None:
    engine = Engine(read(path=":memory:", embedder="none"))
    assert counted(engine, "hello world") == TokenCount(tokens=2, exact=False)
    engine.close()


def test_what_was_learned_corrects_an_estimate(engine: Engine) -> None:
    for _ in range(9):
        Calibration(engine.database).note("scripted:m", 1000, 1200)
    learned = counted(engine, "hello " * 1000)
    assert abs(learned.tokens - 1200) <= 3
    assert not learned.exact
    assert learned.error is not None


def test_no_request_is_made_unless_the_exact_number_is_wanted(engine: Engine, provider: Asked) -> None:
    for content in ("Hi", [{"role": "user", "content": "Hi"}]):
        counted(engine, content)
    assert not provider.asked
    assert counted(engine, "Hi", system="Be kind.", exact=True) == TokenCount(tokens=1000, exact=True)
    roles = [message.role for segment in provider.asked[0].segments for message in segment.messages]
    assert roles == ["system", "user"]
    assert asyncio.run(arun(counting.count_tokens(engine, "Hi", exact=True))).tokens == 1000


def test_an_endpoint_that_fails_says_so(engine: Engine, provider: Asked) -> None:
    provider.fails = True
    with pytest.raises(Unavailable):
        counted(engine, "Hi", exact=True)


def test_every_form_of_a_message_is_understood(engine: Engine) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    plain = counted(engine, ["one two"]).tokens
    assert counted(engine, Message(role="user", content="one two")).tokens == plain
    assert counted(engine, {"role": "user", "content": "one two"}).tokens == plain
    assert counted(engine, {"role": "user", "content": [{"type": "text", "text": "one two"}]}).tokens == plain
    seen = counted(engine, Message(role="user", content="one two", images=(Image(url="https://example.org/a.png"),)))
    assert counted(engine, {"role": "user", "content": ["one two", image]}).tokens == seen.tokens == plain + 765
    calls = [{"id": "c", "name": "f", "arguments": {"a": 1}}]
    assert counted(engine, {"role": "assistant", "content": "one two", "tool_calls": calls}).tokens > plain
    assert counted(engine, "one two", tools=[{"name": "f"}]).tokens > plain


@pytest.mark.parametrize(
    ("content", "how"),
    [
        ([], {}),
        (5, {}),
        ({"role": "nobody", "content": "x"}, {}),
        ({"role": "user"}, {}),
        ({"role": "assistant", "content": "x", "tool_calls": [5]}, {}),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, {}),
        ("x", {"system": 5}),
        ("x", {"tools": "f"}),
        ("x", {"tools": [{"name": object()}]}),
        ("\ud800", {}),
    ],
)
def test_what_can_not_be_counted_is_refused(engine: Engine, content: Any, how: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        counted(engine, content, **how)
