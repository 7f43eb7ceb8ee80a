"""`agentmem.wrap` and the hosts' prompt caches: runs of tools keep their prefix, marks are found again."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

import agentmem
from agentmem import Memory
from agentmem.testing import FakeClock, HostServer

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.sdk_calls import (
    CLAUDES,
    OPENAI,
    TOOLS,
    Sdk,
    assistant,
    claude_create,
    claude_tools,
    closing_clients,
    openai_text,
    openai_tools,
    responses_tools,
    user,
)

FACT = "I'm allergic to peanuts."
QUESTION = "What am I allergic to, peanuts or walnuts?"
ANSWER = "Peanuts, you said."
SYSTEM = "You are kind. " * 400


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    with closing_clients():
        yield


def turns(memory: Memory) -> list[tuple[str, str]]:
    return [(record.role, record.text) for record in memory.list(limit=1000) if record.source == "chat"]


@pytest.fixture
def host() -> Iterator[HostServer]:
    with HostServer(reply=ANSWER) as server:
        yield server


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory(":memory:", embedder="hash") as memory:
        memory.add(FACT)
        yield memory


def text_of(message: Any) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "\n\n".join(part.get("text", "") for part in content)


def calls_once(body: Any) -> Any:
    """A model that asks for the weather, twice in a row, before it answers."""
    said = json.dumps(body.get("messages") or body.get("input"))
    results = sum(said.count(f'"{word}": "sunny"') for word in ("content", "output"))
    calls = {"tool_calls": [{"name": "weather", "arguments": {"city": f"Porto {results}"}}]}
    return ANSWER if results == 2 else calls


@pytest.mark.parametrize(("sdk", "talk"), TOOLS, ids=[sdk.name for sdk, _ in TOOLS])
def test_a_run_of_tools_is_remembered_once_and_keeps_its_memories(
    sdk: Sdk, talk: Any, host: HostServer, memory: Memory
) -> None:
    host.reply = calls_once
    messages: list[Any] = [user(QUESTION)]
    talk(agentmem.wrap(sdk.sync(host), memory, session="s", cache=False), messages)
    calls = ("assistant", "[calls weather]")
    assert turns(memory) == [
        ("user", QUESTION), calls, ("tool", "sunny"), calls, ("tool", "sunny"), ("assistant", ANSWER)
    ]  # fmt: skip
    bodies = [request.body for request in host.requests]
    assert len(bodies) == 3
    for before, now in itertools.pairwise(bodies):
        sent = before[sdk.field]
        assert json.dumps(now[sdk.field][: len(sent)]) == json.dumps(sent)
    assert FACT in text_of(sdk.said(bodies[-1])[0])
    stored = [record for record in memory.list() if record.source == "chat"]
    assert stored[1].metadata["tool_calls"][0]["arguments"] == {"city": "Porto 0"}


# The hosts' caches.


def test_claudes_prefixes_are_marked_and_read(host: HostServer, memory: Memory) -> None:
    bot = agentmem.wrap(CLAUDES.sync(host), memory)
    messages: list[Any] = []
    for question in ("I walk my dog every morning. " * 60, QUESTION, "And which nuts may I eat?", "So, peanuts?"):
        messages.append(user(question))
        messages.append(assistant(claude_create(bot, messages, system=SYSTEM)))
    for request in host.requests:
        assert 1 <= json.dumps(request.body).count("cache_control") <= 4
    read = [request.usage.cached_tokens for request in host.requests]
    assert 0 == read[0] < read[1] < read[2] < read[3]
    assert read[3] > 0.9 * (host.requests[2].usage.input_tokens - 100)


@pytest.mark.parametrize("moving", [False, True])
def test_the_callers_own_marks_are_found_again(host: HostServer, memory: Memory, *, moving: bool) -> None:
    bot = agentmem.wrap(CLAUDES.sync(host), memory)
    mark: Any = {"type": "ephemeral"}
    messages: list[Any] = []
    for question in ("I walk my dog every morning. " * 60, QUESTION, "And which nuts may I eat, peanuts?"):
        last = {"role": "user", "content": [{"type": "text", "text": question, "cache_control": mark}]}
        sent = [*messages, user(question) if moving else last]
        answer = claude_create(bot, sent, system=SYSTEM, **({"cache_control": mark} if moving else {}))
        messages += [{"role": "user", "content": [{"type": "text", "text": question}]}, assistant(answer)]
        assert json.dumps(host.requests[-1].body).count("cache_control") == 1
    read = [request.usage.cached_tokens for request in host.requests]
    assert 0 == read[0] < read[1] < read[2]
    assert FACT in json.dumps(host.requests[1].body)


@pytest.mark.parametrize("damage", ["{", "[]", '{"marks": 3, "history": "x"}'])
def test_what_was_kept_of_marks_may_be_damaged(host: HostServer, memory: Memory, damage: str) -> None:
    bot = agentmem.wrap(CLAUDES.sync(host), memory)
    for question in ("I walk my dog every morning. " * 60, QUESTION):
        claude_create(bot, [user(question)], system=SYSTEM)
        with memory._engine.database.write() as connection:
            connection.execute("UPDATE layouts SET state = ?", (damage,))
    assert FACT in json.dumps(host.requests[-1].body)
    assert "cache_control" in json.dumps(host.requests[-1].body)
    [row] = memory._engine.database.query("SELECT COUNT(*) AS uses FROM uses WHERE verb = 'chat'")
    assert row["uses"] == 2


def test_marks_can_be_refused(host: HostServer, memory: Memory) -> None:
    claude_create(agentmem.wrap(CLAUDES.sync(host), memory, cache=False), [user(QUESTION)], system=SYSTEM)
    assert "cache_control" not in json.dumps(host.requests[-1].body)


class _Redirected(httpx2.HTTPTransport):
    """The vendor's own address, answered by the loopback host."""

    def __init__(self, host: HostServer) -> None:
        super().__init__()
        self._port = int(host.anthropic_url.rpartition(":")[2])

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=self._port)
        return super().handle_request(request)


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_a_model_that_wants_breakpoints_reads_its_prefix(host: HostServer, memory: Memory, *, responses: bool) -> None:
    http = httpx2.Client(transport=_Redirected(host))
    bot: Any = agentmem.wrap(openai.OpenAI(api_key="x", http_client=http, max_retries=0), memory.scope(user="ana"))
    messages: list[Any] = [{"role": "system", "content": SYSTEM}]
    for question in ("I walk my dog every morning. " * 60, QUESTION, "And which nuts may I eat?", "So, peanuts?"):
        messages.append(user(question))
        if responses:
            text = bot.responses.create(model="gpt-5.6-luna", input=messages).output_text
        else:
            text = openai_text(bot.chat.completions.create(model="gpt-5.6-luna", messages=messages))
        messages.append(assistant(text))
    keys = {request.body["prompt_cache_key"] for request in host.requests}
    assert len(keys) == 1
    assert "ana" not in keys.pop()
    for request in host.requests:
        assert json.dumps(request.body).count("prompt_cache_breakpoint") <= 4
    read = [request.usage.cached_tokens for request in host.requests]
    assert read[3] > read[2] > 1024
    assert FACT in json.dumps(host.requests[1].body)
    noted = memory._engine.database.query("SELECT cached, written, model FROM uses WHERE verb = 'chat' ORDER BY id")
    told = [(request.usage.cached_tokens, request.usage.written_tokens) for request in host.requests]
    assert [(row["cached"], row["written"]) for row in noted] == told
    assert {row["model"] for row in noted} == {"openai:gpt-5.6-luna"}
    receipt = memory.forget(where={}, everything=True)
    assert receipt.hosted  # the vendor may still hold what was sent
    bot.close()


def calls_often(rounds: int) -> Any:
    """A model that asks for the weather so many times before it answers."""

    def reply(body: Any) -> Any:
        said = body.get("messages") or body.get("input")
        since = max(at for at, message in enumerate(said) if "peanuts" in json.dumps(message).lower())
        results = json.dumps(said[since:]).count("sunny")
        if results >= rounds:
            return ANSWER
        return {"tool_calls": [{"name": "weather", "arguments": {"city": f"Porto {results}"}}]}

    return reply


def read_shares(host: HostServer) -> list[float]:
    """Of each request, the share of the one before it that was read from the cache."""
    sizes = [request.usage for request in host.requests]
    return [now.cached_tokens / before.input_tokens for before, now in itertools.pairwise(sizes)]


def test_a_long_run_of_tools_reads_what_it_wrote(host: HostServer, memory: Memory) -> None:
    """More blocks than a mark looks back over: the ends of earlier requests are marked again."""
    host.reply = calls_often(14)
    bot = agentmem.wrap(CLAUDES.sync(host), memory)
    messages: list[Any] = [user("I walk my dog. " * 400), assistant("Noted, with pleasure."), user(QUESTION)]
    claude_tools(bot, messages)
    messages += [assistant(ANSWER), user("So peanuts it was?")]
    claude_tools(bot, messages)
    shares = read_shares(host)
    assert len(shares) == 29
    assert all(share > 0.9 for share in [*shares[1:14], *shares[16:]])
    assert host.requests[15].usage.cached_tokens > 1000  # the next turn finds the history before the run
    assert max(json.dumps(request.body).count("cache_control") for request in host.requests) <= 4


@pytest.mark.parametrize("talk", [openai_tools, responses_tools], ids=["chat", "responses"])
def test_a_run_of_tools_reads_its_breakpoints(host: HostServer, memory: Memory, talk: Any) -> None:
    host.reply = calls_often(5)
    http = httpx2.Client(transport=_Redirected(host))
    bot: Any = agentmem.wrap(openai.OpenAI(api_key="x", http_client=http, max_retries=0), memory)
    messages: list[Any] = [user("I walk my dog. " * 400), assistant("Noted, with pleasure."), user(QUESTION)]
    talk(bot, messages, model="gpt-5.6-luna")
    assert all(share > 0.85 for share in read_shares(host)[1:])
    bot.close()


def bill(host: HostServer) -> tuple[float, int]:
    """What Claude's prompts cost, in uncached input tokens, and how many tokens they had."""
    price, tokens = 0.0, 0
    for request in host.requests:
        used = request.usage
        fresh = used.input_tokens - used.cached_tokens - used.written_tokens
        price += fresh + 0.1 * used.cached_tokens + 1.25 * used.written_tokens + 0.75 * used.written_long_tokens
        tokens += used.input_tokens
    return price, tokens


@pytest.mark.parametrize(
    ("gap_s", "share"),
    [(60.0, 0.35), (1200.0, 0.5), (90_000.0, 1.1)],
    ids=["each minute", "each twenty minutes", "each day"],
)
def test_prefixes_are_kept_for_as_long_as_that_pays(gap_s: float, share: float) -> None:
    clock = FakeClock()
    with HostServer(reply=ANSWER, clock=clock) as host, Memory(":memory:", embedder="none", clock=clock) as memory:
        client = CLAUDES.sync(host)
        messages: list[Any] = []
        for number in range(14):
            bot: Any = agentmem.wrap(client, memory, user="ana", session="s")  # as after a restart
            messages.append(user(f"Turn {number}. " + "I walk my dog every morning. " * 30))
            messages.append(assistant(claude_create(bot, messages, system=SYSTEM)))
            clock.advance(gap_s)
        price, tokens = bill(host)
    assert price / tokens < share


@pytest.mark.parametrize(("cache", "marks"), [("off", 0), ("fixed", 3)])
def test_the_setting_says_how_prefixes_are_marked(host: HostServer, cache: Any, marks: int) -> None:
    with Memory(":memory:", embedder="none", cache=cache) as memory:
        messages = [user("One."), assistant("A."), user("Two."), assistant("B."), user("Three.")]
        claude_create(agentmem.wrap(CLAUDES.sync(host), memory), messages, system=SYSTEM)
    assert json.dumps(host.requests[-1].body).count("cache_control") == marks


def test_a_host_of_another_vendor_has_its_own_prices(memory: Memory) -> None:
    with HostServer(reply=ANSWER, openai="deepseek", strict=False) as host:
        http = httpx2.Client(transport=_Redirected(host))
        client = openai.OpenAI(api_key="x", base_url="https://api.deepseek.com/v1", http_client=http, max_retries=0)
        bot = agentmem.wrap(client, memory)
        asked: Any = [user(QUESTION)]
        bot.chat.completions.create(model="deepseek-v4-flash", messages=asked)
        bot.close()
    [row] = memory._engine.database.query("SELECT model, money FROM uses WHERE verb = 'chat'")
    assert row["model"] == "deepseek:deepseek-v4-flash"
    assert row["money"] > 0


def test_what_is_forgotten_during_a_run_of_tools_is_not_shown_again(host: HostServer, memory: Memory) -> None:
    host.reply = calls_often(2)
    bot: Any = agentmem.wrap(OPENAI.sync(host), memory)
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages: list[Any] = [user(QUESTION)]
    for _ in range(2):
        answer = bot.chat.completions.create(model="gpt-4.1", messages=messages, tools=tools).choices[0].message
        call = answer.tool_calls[0].id
        messages += [answer, {"role": "tool", "tool_call_id": call, "content": "sunny"}]
        memory.forget([record.id for record in memory.list() if record.text == FACT])
    assert [FACT in json.dumps(request.body) for request in host.requests] == [True, False]
