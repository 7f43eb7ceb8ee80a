"""What the local provider counts and refuses, by its own tokenizer and template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import Rejected
from agentmem.provider import CountsRequests, Options, Request, load
from agentmem.testing import chat_request
from agentmem.types import Image, Message, Segment, TokenCount


@pytest.fixture
def provider(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Any]:
    folder = tiny_model(tmp_path / "model")
    one = load(f"local:{folder}", {"cache_dir": str(tmp_path / "cache"), "device": "cpu"})
    yield one
    one.close()


def test_a_counted_request_is_as_long_as_the_prompt_that_is_read(provider: Any) -> None:
    request = chat_request("What is it?", system="You are kind.", max_tokens=1)
    protocol: Any = CountsRequests
    assert isinstance(provider, protocol)
    assert provider.capabilities.exact_tokens
    counted = provider.count_request(request)
    assert provider._engine is None  # the weights were not needed
    assert counted == TokenCount(tokens=provider.generate(request).usage.input_tokens, exact=True)
    assert asyncio.run(provider.acount_request(request)) == counted


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (chat_request("Hi", schema={"type": "object"}), "schema"),
        (Request(segments=chat_request("Hi").segments, tools=({"name": "f"},)), "tools"),
        (
            Request(
                segments=(
                    Segment(
                        name="turn",
                        messages=(
                            Message(role="user", content="Hi", images=(Image(url="https://example.com/a.png"),)),
                        ),
                        stable=False,
                    ),
                ),
                options=Options(),
            ),
            "images",
        ),
    ],
)
def test_what_it_can_not_is_refused_and_not_left_out(provider: Any, request_: Request, why: str) -> None:
    able = provider.capabilities
    assert (able.images, able.schemas, able.tools, able.cache) == (False, False, False, None)
    with pytest.raises(Rejected, match=why):
        provider.generate(request_)
    with pytest.raises(Rejected, match=why):
        provider.count_request(request_)
