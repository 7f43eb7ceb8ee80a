"""What `adapters/providers/llamacpp.py` adds to OpenAI's format: pure functions, no socket."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from agentmem.provider import load
from agentmem.testing import chat_request

adapter = importlib.import_module("agentmem.adapters.providers.llamacpp")

NOWHERE = "http://127.0.0.1:9/v1/"


def test_a_request_asks_for_the_prefix_cache_and_maybe_a_slot() -> None:
    body = adapter.build_request(chat_request("Hi", cache_key="k", max_tokens=3), id_slot=2)
    assert body == {
        "model": "default",
        "messages": [{"role": "user", "content": "Hi"}],
        "cache_prompt": True,
        "id_slot": 2,
        "max_tokens": 3,
    }
    assert "id_slot" not in adapter.build_request(chat_request("Hi"))
    assert adapter.build_request(chat_request("Hi", extra={"cache_prompt": False}))["cache_prompt"] is False


def test_a_reply_tells_cached_tokens_and_the_time_to_read_the_prompt() -> None:
    reply = adapter.parse_reply(
        {
            "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 20, "completion_tokens": 1},
            "timings": {"cache_n": 15, "prompt_n": 5, "prompt_ms": 120.0},
        }
    )
    assert (reply.usage.input_tokens, reply.usage.cached_tokens, reply.usage.first_token_s) == (20, 15, 0.12)


def test_a_server_that_is_down_does_not_hinder_making_the_provider() -> None:
    provider: Any = load("llamacpp:", {"base_url": NOWHERE})
    assert provider.name == "llamacpp:default"
    assert provider.capabilities.context_tokens is None
    assert str(provider._sync_client().base_url) == "http://127.0.0.1:9"
    provider.close()


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ('data: {"a": 1}', {"a": 1}),
        ("data: [DONE]", None),
        (": keep-alive", None),
        ("", None),
    ],
)
def test_lines_of_a_stream(line: str, event: object) -> None:
    assert adapter._event(line) == event


@pytest.mark.parametrize(
    "line", ['data: {"error": {"code": 400, "message": "no"}}', 'error: {"code": 400, "message": "no"}']
)
def test_errors_in_a_stream_are_raised(line: str) -> None:
    with pytest.raises(adapter._ErrorEvent, match="no") as caught:
        adapter._event(line)
    assert caught.value.status == 400
