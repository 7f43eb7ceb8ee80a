"""Every adapter against a misbehaving server: the real SDKs over real sockets, with errors, cuts, drips and cancels."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import ConfigError, InvalidInput, ProviderError, RateLimited, Rejected, Unavailable
from agentmem.provider import Generation, load
from agentmem.testing import chat_request

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.loopback import (
    Behaviour,
    Loopback,
    drip,
    echo_headers,
    events,
    free_port,
    json_reply,
    ndjson,
    raw_reply,
    silence,
    stream_reply,
)

KEY = "sk-test-0123456789abcdef"
REQUEST = chat_request("Say hello.", system="Be kind.", max_tokens=8)


@dataclass(frozen=True)
class Vendor:
    """How one adapter is reached, and what its vendor answers."""

    name: str
    path: str
    reply: dict[str, Any]
    stream: list[str]
    stream_error: list[str]
    kind: str = "text/event-stream"

    def load(self, url: str, **settings: Any) -> Any:
        chosen = {"api_key": KEY, "base_url": url + self.path, "max_retries": 0, "context_tokens": 4096, **settings}
        return load(self.name, chosen)

    def streams(self, pieces: list[str] | None = None, **how: Any) -> Behaviour:
        return stream_reply(self.stream if pieces is None else pieces, kind=self.kind, **how)


def _chunk(**delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


_USAGE = {"prompt_tokens": 12, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 8}}
_CHAT: dict[str, Any] = {
    "reply": {
        "id": "1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello you"}, "finish_reason": "stop"}],
        "usage": _USAGE,
    },
    "stream": events(
        [
            _chunk(role="assistant", content=""),
            _chunk(content="Hello "),
            _chunk(content="you"),
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": _USAGE},
        ]
    ),
    "stream_error": events([_chunk(content="Hello "), {"error": {"message": "overloaded", "type": "server_error"}}]),
}
_CLAUDE_USAGE = {"input_tokens": 4, "cache_read_input_tokens": 8, "output_tokens": 2}
_START = {"type": "message_start", "message": {"id": "1", "type": "message", "content": [], "usage": _CLAUDE_USAGE}}
_BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}


def _delta(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}


_LAST = {"done": True, "done_reason": "stop", "prompt_eval_count": 12, "eval_count": 2, "prompt_eval_duration": 5}


def _line(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "message": {"role": "assistant", "content": text}, "done": False, **more}


VENDORS = [
    Vendor("openai:m", "/v1", **_CHAT),
    Vendor("openai_compatible:m", "/v1", **_CHAT),
    Vendor("llamacpp:m", "", **_CHAT),
    Vendor(
        "anthropic:m",
        "",
        reply={
            "id": "1",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [{"type": "text", "text": "Hello you"}],
            "stop_reason": "end_turn",
            "usage": _CLAUDE_USAGE,
        },
        stream=events(
            [
                _START,
                _BLOCK,
                _delta("Hello "),
                _delta("you"),
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
                {"type": "message_stop"},
            ],
            named=True,
            done=None,
        ),
        stream_error=events(
            [
                _START,
                _BLOCK,
                _delta("Hello "),
                {"type": "error", "error": {"type": "overloaded_error", "message": "busy"}},
            ],
            named=True,
            done=None,
        ),
    ),
    Vendor(
        "ollama:m",
        "",
        reply=_line("Hello you", **_LAST),
        stream=ndjson([_line("Hello "), _line("you"), _line("", **_LAST)]),
        stream_error=ndjson([_line("Hello "), {"error": "overloaded"}]),
        kind="application/x-ndjson",
    ),
]
ERROR = {"error": {"message": "not like this", "type": "invalid_request_error", "code": None}}


@pytest.fixture(params=VENDORS, ids=lambda vendor: vendor.name.partition(":")[0])
def vendor(request: pytest.FixtureRequest) -> Vendor:
    chosen: Vendor = request.param
    return chosen


@contextlib.contextmanager
def served(vendor: Vendor, *script: Behaviour, **settings: Any) -> Generator[tuple[Any, Loopback]]:
    with Loopback(*script) as server:
        provider = vendor.load(server.url, **settings)
        try:
            yield provider, server
        finally:
            provider.close()


def in_loop(provider: Any, work: Any) -> Any:
    async def inside() -> Any:
        try:
            return await work
        finally:
            await provider.aclose()

    return asyncio.run(inside())


async def collected(pieces: Any) -> list[Any]:
    return [piece async for piece in pieces]


def test_a_reply_and_its_usage(vendor: Vendor) -> None:
    with served(vendor, json_reply(vendor.reply)) as (provider, server):
        reply = provider.generate(REQUEST)
        again = in_loop(provider, provider.agenerate(REQUEST))
    assert (reply.text, reply.finish_reason) == (again.text, again.finish_reason) == ("Hello you", "stop")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (12, 2)
    assert reply.usage.cached_tokens == (0 if vendor.name.startswith("ollama") else 8)
    assert reply.usage.total_s > 0
    assert KEY in str(server.got[0].headers)


def test_a_stream_and_its_usage(vendor: Vendor) -> None:
    with served(vendor, vendor.streams()) as (provider, _):
        pieces = list(provider.stream(REQUEST))
        again = in_loop(provider, collected(provider.astream(REQUEST)))
    assert pieces[:-1] == again[:-1] == ["Hello ", "you"]
    whole = pieces[-1]
    assert (whole.text, whole.usage.input_tokens, whole.finish_reason) == ("Hello you", 12, "stop")
    assert 0 < whole.usage.first_token_s <= whole.usage.total_s


def test_the_sent_body_is_the_built_one(vendor: Vendor) -> None:
    request = chat_request("Hi", system="S", cache_key="k", temperature=0.5, extra={"top_k": 3})
    with served(vendor, json_reply(vendor.reply)) as (provider, server):
        provider.generate(request)
        built = provider._build(request, stream=False)
    assert built.items() <= server.bodies[0].items()


@pytest.mark.parametrize(("status", "kind"), [(400, Rejected), (401, Rejected), (403, Rejected), (404, Rejected)])
def test_refusals_are_not_repeated(vendor: Vendor, status: int, kind: type[ProviderError]) -> None:
    with served(vendor, json_reply(ERROR, status, request_id="r1"), max_retries=2) as (provider, server):
        with pytest.raises(kind, match=f"{vendor.name} answered {status}.*not like this") as caught:
            provider.generate(REQUEST)
        with pytest.raises(kind):
            in_loop(provider, provider.agenerate(REQUEST))
    assert caught.value.status == status
    assert caught.value.__cause__ is not None
    assert "not like this" in str(caught.value.body)
    assert len(server.got) == 2


def test_a_key_that_the_server_repeats_is_nowhere_in_the_error(vendor: Vendor) -> None:
    with served(vendor, echo_headers(401)) as (provider, server):
        with pytest.raises(Rejected, match="check its key") as caught:
            provider.generate(REQUEST)
        assert KEY in str(server.got[0].headers)
        shown = "".join(traceback.format_exception(caught.value)) + repr(provider) + repr(caught.value.body)
    assert "***" in shown
    assert KEY not in shown


def test_a_rate_limit_tells_when_to_come_back(vendor: Vendor) -> None:
    with (
        served(vendor, json_reply(ERROR, 429, retry_after="7")) as (provider, server),
        pytest.raises(RateLimited) as caught,
    ):
        provider.generate(REQUEST)
    assert (caught.value.retry_after, caught.value.status, len(server.got)) == (7.0, 429, 1)


def test_a_rate_limit_is_waited_out(vendor: Vendor) -> None:
    script = json_reply(ERROR, 429, retry_after="0.1"), json_reply(vendor.reply)
    with served(vendor, *script, max_retries=1) as (provider, server):
        assert provider.generate(REQUEST).text == "Hello you"
    assert len(server.got) == 2
    assert server.got[1].at - server.got[0].at >= 0.1


def test_a_wait_that_ends_after_the_deadline_is_not_begun(vendor: Vendor) -> None:
    with served(vendor, json_reply(ERROR, 429, retry_after="60"), max_retries=2, timeout_s=5) as (provider, server):
        started = time.monotonic()
        with pytest.raises(RateLimited):
            provider.generate(REQUEST)
    assert time.monotonic() - started < 2
    assert len(server.got) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_a_storm_of_server_errors_costs_a_known_number_of_requests(vendor: Vendor, retries: int) -> None:
    with served(vendor, json_reply(ERROR, 503, retry_after="0"), max_retries=retries) as (provider, server):
        calls: list[Callable[[], Any]] = [lambda: provider.generate(REQUEST), lambda: next(provider.stream(REQUEST))]
        calls.append(lambda: in_loop(provider, provider.agenerate(REQUEST)))
        for call in calls:
            with pytest.raises(Unavailable, match=" answered 503"):
                call()
    assert len(server.got) == 3 * (1 + retries)


def test_a_cut_stream_is_told_and_not_begun_again(vendor: Vendor) -> None:
    cut = vendor.streams(vendor.stream[:3], cut=True)
    with served(vendor, cut, max_retries=2) as (provider, server):
        pieces = []
        with pytest.raises(Unavailable):
            pieces.extend(provider.stream(REQUEST))
        with pytest.raises(Unavailable):
            in_loop(provider, collected(provider.astream(REQUEST)))
    assert len(server.got) == 2
    assert not [piece for piece in pieces if isinstance(piece, Generation)]


def test_a_stream_that_ends_well_but_too_early_was_cut(vendor: Vendor) -> None:
    until = next(i for i, piece in enumerate(vendor.stream) if "you" in piece) + 1
    ended = vendor.streams(vendor.stream[:until])
    with served(vendor, ended) as (provider, _), pytest.raises(Unavailable, match="before its last event"):
        list(provider.stream(REQUEST))


def test_an_error_inside_a_stream_is_raised(vendor: Vendor) -> None:
    with served(vendor, vendor.streams(vendor.stream_error), max_retries=2) as (provider, server):
        pieces = provider.stream(REQUEST)
        assert next(pieces) == "Hello "
        with pytest.raises(Unavailable, match=r"overloaded|busy"):
            next(pieces)
    assert len(server.got) == 1


@pytest.mark.parametrize("content", [b"<html>", b'{"choices": [', b"{}", b"[]", b"null", b'"text"', b'{"choices": []}'])
def test_a_reply_that_makes_no_sense_is_unavailable(vendor: Vendor, content: bytes) -> None:
    with served(vendor, raw_reply(content)) as (provider, _):
        with pytest.raises(Unavailable):
            provider.generate(REQUEST)
        with pytest.raises(Unavailable):
            in_loop(provider, provider.agenerate(REQUEST))


@pytest.mark.parametrize("behaviour", [drip(3), silence(3)], ids=["drip", "silence"])
def test_the_deadline_holds_whatever_the_server_does(vendor: Vendor, behaviour: Behaviour) -> None:
    with served(vendor, behaviour, timeout_s=0.4, max_retries=2) as (provider, server):
        calls: list[Callable[[], Any]] = [
            lambda: provider.generate(REQUEST),
            lambda: in_loop(provider, provider.agenerate(REQUEST)),
        ]
        for call in calls:
            started = time.monotonic()
            with pytest.raises(Unavailable, match=r"timeout_s=0\.4"):
                call()
            assert time.monotonic() - started < 1.5
    assert len(server.got) == 2


def test_the_deadline_holds_inside_a_stream_but_the_consumers_time_is_free(vendor: Vendor) -> None:
    pieces = [vendor.stream[2 if vendor.name == "anthropic:m" else 1]] * 100
    slow = vendor.stream[:2] + pieces if vendor.name == "anthropic:m" else pieces
    with served(vendor, vendor.streams(slow, gap_s=0.1), timeout_s=0.6) as (provider, _):
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"timeout_s=0\.6"):
            list(provider.stream(REQUEST))
        assert time.monotonic() - started < 2
    with served(vendor, vendor.streams(), timeout_s=0.6) as (provider, _):
        stream = provider.stream(REQUEST)
        next(stream)
        time.sleep(0.8)
        *_, whole = stream
        assert whole.text == "Hello you"
        assert whole.usage.total_s < 0.6


def test_a_server_that_is_not_there_is_unavailable_and_says_what_to_check(vendor: Vendor) -> None:
    provider = vendor.load(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="base_url"):
        provider.generate(REQUEST)
    with pytest.raises(Unavailable, match="base_url"):
        in_loop(provider, provider.agenerate(REQUEST))


def test_after_a_cancel_nothing_more_is_sent(vendor: Vendor) -> None:
    async def cancelled(provider: Any, server: Loopback) -> None:
        task = asyncio.create_task(provider.agenerate(REQUEST))
        await asyncio.to_thread(server.reached.wait, 5)
        await asyncio.sleep(0.1)  # now it waits for the next attempt
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.7)

    with served(vendor, json_reply(ERROR, 500), max_retries=5) as (provider, server):
        in_loop(provider, cancelled(provider, server))
    assert len(server.got) == 1


def test_a_stream_left_early_is_closed(vendor: Vendor) -> None:
    endless = [*vendor.stream[:3], *[vendor.stream[2]] * 500]
    with served(vendor, vendor.streams(endless, gap_s=0.02)) as (provider, server):
        pieces = provider.stream(REQUEST)
        next(pieces)
        pieces.close()
        assert server.left.wait(5)
        server.left.clear()

        async def leave() -> None:
            async with contextlib.aclosing(provider.astream(REQUEST)) as stream:
                async for _ in stream:
                    break
            for _ in range(200):
                if server.left.is_set():
                    return
                await asyncio.sleep(0.02)

        in_loop(provider, leave())
        assert server.left.is_set()


def test_close_ends_it_and_may_be_repeated(vendor: Vendor) -> None:
    with served(vendor, json_reply(vendor.reply)) as (provider, server):
        provider.generate(REQUEST)

        async def use_and_close() -> None:
            await provider.agenerate(REQUEST)
            provider.close()  # inside the running loop: closed by a task
            await asyncio.sleep(0.1)
            await provider.aclose()

        asyncio.run(use_and_close())
        provider.close()
        other = vendor.load(server.url)

        async def use_and_close_from_a_thread() -> None:
            await other.agenerate(REQUEST)
            await asyncio.to_thread(other.close)  # as AsyncMemory does; nothing is left open when it returns

        asyncio.run(use_and_close_from_a_thread())
        with pytest.raises(ConfigError, match="closed"):
            provider.generate(REQUEST)
    gc.collect()  # an open socket would be an error here (filterwarnings)


def test_each_event_loop_has_connections_of_its_own(vendor: Vendor) -> None:
    with served(vendor, json_reply(vendor.reply)) as (provider, server):

        async def use() -> Any:
            try:
                return await provider.agenerate(REQUEST)
            finally:
                client = provider._async_client()
                await (client.aclose() if hasattr(client, "aclose") else client.close())

        for _ in range(3):
            assert asyncio.run(use()).text == "Hello you"
    assert len(server.got) == 3


def test_a_forked_child_does_not_use_its_parents_sockets(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(vendor, json_reply(vendor.reply)) as (provider, _):
        parents = provider._sync_client()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            childs = provider._sync_client()
            assert childs is not parents
            provider.close()
        client = getattr(parents, "_client", parents)
        assert not client.is_closed
        client.close()


def test_what_can_not_be_written_as_json_is_refused(vendor: Vendor) -> None:
    bad = chat_request("Hi", extra={"top_k": object()})
    with served(vendor, json_reply(vendor.reply)) as (provider, server):
        with pytest.raises((InvalidInput, ConfigError)):
            provider.generate(bad)
        with pytest.raises(InvalidInput):
            provider.generate(chat_request("\ud800"))
    assert not server.got


@pytest.mark.parametrize("name", ["openai:m", "openai_compatible:m", "llamacpp:m", "ollama:m"])
def test_embeddings_are_sent_in_batches_and_checked(name: str) -> None:
    vendor = next(vendor for vendor in VENDORS if vendor.name == name)

    def behave(handler: Any, got: Any) -> None:
        texts = got.body["input"]
        rows = [[float(len(text)), 1.0] for text in texts]
        data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
        json_reply({"embeddings": rows, "object": "list", "model": "m", "data": data[::-1]})(handler, got)

    with served(vendor, behave) as (provider, server):
        texts = ["x" * n for n in range(200)]
        rows = provider.embed(texts)
        assert rows.shape == (200, 2)
        assert rows[:, 0].tolist() == list(range(200))
        assert in_loop(provider, provider.aembed(texts)).tolist() == rows.tolist()
    assert [len(body["input"]) for body in server.bodies] == [128, 72, 128, 72]
    short = json_reply(
        {"embeddings": [[1.0]], "object": "list", "model": "m", "data": [{"index": 0, "embedding": [1.0]}]}
    )
    with served(vendor, short) as (provider, _), pytest.raises(Unavailable, match="1 vectors for 2 texts"):
        provider.embed(["a", "b"])


def test_logs_do_not_hold_the_key(vendor: Vendor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    with served(vendor, json_reply(vendor.reply)) as (provider, _):
        provider.generate(REQUEST)
    assert KEY not in caplog.text
