"""What `adapters/providers/llamacpp.py` adds to OpenAI's format: pure functions, no socket."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.activation.slots import SlotStore
from agentmem.database import Database
from agentmem.provider import Generation, load
from agentmem.testing import chat_request
from agentmem.types import Usage

adapter = importlib.import_module("agentmem.adapters.providers.llamacpp")
planning = importlib.import_module("agentmem.adapters.providers._llamacpp_slots")
sending = importlib.import_module("agentmem.adapters.providers._llamacpp_http")
files = importlib.import_module("agentmem.adapters.providers._llamacpp_files")
server = importlib.import_module("agentmem.adapters.providers._llamacpp_server")

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
    assert sending.event_of(line) == event


@pytest.mark.parametrize(
    "line", ['data: {"error": {"code": 400, "message": "no"}}', 'error: {"code": 400, "message": "no"}']
)
def test_errors_in_a_stream_are_raised(line: str) -> None:
    with pytest.raises(sending.ErrorEvent, match="no") as caught:
        sending.event_of(line)
    assert caught.value.status == 400


def planner_in(folder: Path) -> Any:
    asked = server.LlamaServer("llamacpp:m", folder, lambda _: {}, told={})
    return planning.SlotPlanner("llamacpp:m", asked, files.SlotFiles("llamacpp:m", folder))


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_what_a_slot_holds_is_not_known_after_two_requests_at_once(tmp_path: Path, first_to_end: int) -> None:
    planner = planner_in(tmp_path)
    process = server.Process("mark", 1, None, adapters=False)
    slots = SlotStore(Database(":memory:"), step=16, budget_bytes=1)
    turns = [files.Turn(chat_request("Hi"), slots.view(tenant)) for tenant in (b"a", b"b")]
    assert [planner._choose(turn, process, None, "") for turn in turns] == [True, False]
    turns[0].live = files.Live((1, 2), b"a", "")
    for turn in turns if first_to_end == 0 else turns[::-1]:
        planner.after(turn, Generation(text="", usage=Usage(input_tokens=3, output_tokens=1)))
        planner.done(turn)
    assert planner._live == {}


def test_where_pages_are_encrypted_it_is_said_that_slots_are_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"llamacpp": {"base_url": NOWHERE, "slot_dir": str(tmp_path / "slots")}}
    with Memory(tmp_path / "m", model="llamacpp:m", embedder="none", providers=settings, page_key="ab" * 32) as memory:
        assert not memory._engine.slots.announce(tmp_path / "slots", "name", [])
    assert "can't be encrypted" in caplog.text


def test_a_stream_may_be_ended_by_the_collector_while_its_planner_works(tmp_path: Path) -> None:
    planner = planner_in(tmp_path)
    slots = SlotStore(Database(":memory:"), step=16, budget_bytes=1).view(b"a")
    turns = [files.Turn(chat_request("Hi"), slots) for _ in range(2)]
    process = server.Process("mark", 1, None, adapters=False)

    def left() -> Iterator[None]:
        try:
            planner._choose(turns[0], process, None, "")
            yield
        finally:
            planner.done(turns[0])

    class Collecting(tuple[int, ...]):
        def __len__(self) -> int:  # asked for under the planner's lock
            gc.collect()
            return 0

    circle: list[Any] = [left()]
    next(circle[0])
    circle.append(circle)  # only the collector finds it
    planner._live[0] = files.Live(Collecting(), slots.tenant, "")
    del circle
    worker = threading.Thread(target=planner._choose, args=(turns[1], process, None, ""), daemon=True)
    worker.start()
    worker.join(10)
    assert not worker.is_alive()
    planner.done(turns[1])
    assert planner._busy == {0: 0}
