"""`agentmem.wrap` around the real clients of three SDKs, sync and async, whole and streamed, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import itertools
import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
import pytest
from pydantic import BaseModel

import agentmem
from agentmem import BudgetExceeded, InvalidInput, Memory, ScopeError
from agentmem.prompt import MEMORY_NOTE
from agentmem.testing import HostServer, ScriptedProvider

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.loopback import Loopback, json_reply, raw_reply, stream_reply
from servers.sdk_calls import (
    CLAUDE,
    CLAUDES,
    GPT,
    LLAMA,
    OLLAMA,
    OPENAI,
    WAYS,
    WHOLE,
    Sdk,
    aclaude_create,
    aclaude_stream,
    aopenai_stream,
    assistant,
    closing_clients,
    done,
    openai_create,
    openai_stream,
    responses_create,
    user,
)

FACT = "I'm allergic to peanuts."
QUESTION = "What am I allergic to, peanuts or walnuts?"
ANSWER = "Peanuts, you said."
STREAMED = [(sdk, ask) for sdk, ask in WAYS if ask.__name__.endswith(("_stream", "_helper"))]
every_way = pytest.mark.parametrize(("sdk", "ask"), WAYS, ids=[ask.__name__ for _, ask in WAYS])
every_sdk = pytest.mark.parametrize(("sdk", "ask"), WHOLE, ids=[sdk.name for sdk, _ in WHOLE])


class Said(BaseModel):
    """An answer with a schema."""

    text: str


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    with closing_clients():
        yield


def turns(memory: Memory) -> list[tuple[str, str]]:
    return [(record.role, record.text) for record in memory.list(limit=1000) if record.source == "chat"]


def uses(memory: Memory) -> list[Any]:
    return memory._engine.database.query("SELECT * FROM uses WHERE verb = 'chat' ORDER BY id")


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


@every_way
def test_a_chatbot_gains_memory_by_one_line(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    client = sdk.client(host, ask)
    bot = agentmem.wrap(client, memory, session="s")
    assert type(bot) is type(client)
    messages = [user(QUESTION)]
    asked = copy.deepcopy(messages)
    assert done(ask(bot, messages)) == ANSWER
    assert messages == asked
    sent = text_of(sdk.said(host.requests[-1].body)[-1])
    assert FACT in sent
    assert sent.startswith(("<memories>", MEMORY_NOTE))
    assert sent.endswith(QUESTION)
    assert MEMORY_NOTE in json.dumps(host.requests[-1].body)
    assert turns(memory) == [("user", QUESTION), ("assistant", ANSWER)]
    [use] = uses(memory)
    assert use["input"] == host.requests[-1].usage.input_tokens > 0
    assert use["output"] > 0
    assert use["session"] == "s"


@every_way
def test_what_stands_before_a_turn_is_byte_equal_in_the_next(
    sdk: Sdk, ask: Any, host: HostServer, memory: Memory
) -> None:
    client = sdk.client(host, ask)
    bot = agentmem.wrap(client, memory, session="s", cache=False)
    messages = [user("Hello, I walk my dog every morning.")]

    async def talk() -> None:
        for question in ("Which nuts am I allergic to? Peanuts?", QUESTION, "And what do I do every morning?"):
            answer = ask(bot, messages)
            messages.extend((assistant(answer if isinstance(answer, str) else await answer), user(question)))
        answer = ask(bot, messages)
        messages.append(assistant(answer if isinstance(answer, str) else await answer))

    done(talk())
    bodies = [request.body for request in host.requests]
    for before, now in itertools.pairwise(bodies):
        kept = len(before[sdk.field]) - 1
        assert json.dumps(now[sdk.field][:kept]) == json.dumps(before[sdk.field][:kept])
        assert {**now, sdk.field: None} == {**before, sdk.field: None}
    assert turns(memory) == [(message["role"], message["content"]) for message in messages]


def answering(*script: Any) -> Any:
    """A server that answers by this script, with the addresses of a host."""
    server = Loopback(*script)
    server.__dict__.update(openai_url=server.url + "/v1", anthropic_url=server.url, ollama_url=server.url)
    return server


def asked_again(host: HostServer) -> httpx.Response:
    """What the host answers to its last request, as it stands on the wire."""
    noted = host.requests[-1]
    with httpx.Client() as http:
        keys = {"authorization": "Bearer x", "x-api-key": "x", "anthropic-version": "2023-06-01"}
        return http.post(host.anthropic_url + noted.path, json=noted.body, headers=keys)


ERRORS = (openai.OpenAIError, anthropic.AnthropicError, ollama.ResponseError, httpx2.HTTPError, httpx.HTTPError)


@every_way
def test_of_an_error_nothing_is_remembered_and_it_is_the_sdks_own(sdk: Sdk, ask: Any, memory: Memory) -> None:
    with answering(json_reply({"error": "overloaded"}, 500)) as host:
        bot = agentmem.wrap(sdk.client(host, ask), memory)
        with pytest.raises(ERRORS, match=r"500|overloaded"):
            done(ask(bot, [user(QUESTION)]))
    assert turns(memory) == []
    assert not memory._engine.activity.busy()
    assert not memory._engine.activity.busy()


@pytest.mark.parametrize(("sdk", "ask"), STREAMED, ids=[ask.__name__ for _, ask in STREAMED])
def test_of_a_stream_that_is_cut_nothing_is_remembered(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    done(ask(sdk.client(host, ask), [user("Hi!")]))
    end = "\n" if sdk is OLLAMA else "\n\n"
    pieces = [piece + end for piece in asked_again(host).text.split(end) if piece]
    assert len(pieces) > 3
    kind = "application/x-ndjson" if sdk is OLLAMA else "text/event-stream"
    with answering(stream_reply(pieces[:2], kind=kind, cut=True)) as cut:
        bot = agentmem.wrap(sdk.client(cut, ask), memory)
        with contextlib.suppress(*ERRORS, RuntimeError, AssertionError, AttributeError):  # as the SDK takes a cut
            done(ask(bot, [user(QUESTION)]))
    assert turns(memory) == []
    assert not memory._engine.activity.busy()


@every_way
def test_broken_memory_breaks_no_call(
    sdk: Sdk, ask: Any, host: HostServer, memory: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    bot = agentmem.wrap(sdk.client(host, ask), memory)
    memory.close()
    with caplog.at_level(logging.WARNING, "agentmem"):
        assert done(ask(bot, [user(QUESTION)])) == ANSWER
    assert text_of(host.requests[-1].body[sdk.field][-1]) == QUESTION
    assert "without memories" in caplog.text
    assert "not remembered" in caplog.text


@every_way
def test_work_in_the_background_waits_for_its_turns(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    activity, seen = memory._engine.activity, []

    def reply(_: Any) -> str:
        seen.append(activity.busy())
        return ANSWER

    host.reply = reply
    assert done(ask(agentmem.wrap(sdk.client(host, ask), memory), [user(QUESTION)])) == ANSWER
    assert seen == [True]
    assert not activity.busy()


def test_the_turn_of_a_stream_is_over_when_it_is_closed(host: HostServer, memory: Memory) -> None:
    activity = memory._engine.activity
    create: Any = agentmem.wrap(OPENAI.client(host, openai_stream), memory).chat.completions.create
    for reads in (False, True):
        stream = create(model=GPT, messages=[{"role": "user", "content": QUESTION}], stream=True)
        if reads:
            next(iter(stream))
        assert activity.busy()
        stream.close()
        del stream
        gc.collect()  # the class that was made for it is a circle
        assert not activity.busy()


@every_sdk
def test_a_spent_budget_stops_the_request(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    memory.budget(0.0)
    with pytest.raises(BudgetExceeded):
        ask(agentmem.wrap(sdk.client(host, ask), memory), [user(QUESTION)])
    assert host.requests == []


@every_sdk
def test_the_callers_client_and_its_class_stay_as_they_were(
    sdk: Sdk, ask: Any, host: HostServer, memory: Memory
) -> None:
    client = sdk.client(host, ask)
    ask(client, [user("Warm it up.")])
    before, of_class = dict(vars(client)), dict(vars(type(client)))
    bot: Any = agentmem.wrap(client, memory)
    ask(bot, [user(QUESTION)])
    assert dict(vars(client)) == before
    assert dict(vars(type(client))) == of_class
    ask(client, [user("Not remembered.")])
    assert "Not remembered." not in str(turns(memory))
    assert isinstance(bot, type(client))
    assert bot._client is client._client


@every_sdk
def test_a_question_asked_again_is_remembered_once(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    bot = agentmem.wrap(sdk.client(host, ask), memory, session="s")
    messages = [user(QUESTION)]
    ask(bot, messages)
    ask(bot, messages)
    assert turns(memory) == [("user", QUESTION), ("assistant", ANSWER), ("assistant", ANSWER)]
    ask(bot, [*messages, assistant(ANSWER), user(QUESTION)])  # said once more: that is a turn of its own
    assert [role for role, _ in turns(memory)][3:] == ["user", "assistant"]


@every_sdk
def test_what_the_messages_hold_is_not_recalled(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    bot = agentmem.wrap(sdk.client(host, ask), memory, session="s")
    ask(bot, [user(FACT), assistant("Noted."), user(QUESTION)])
    assert "<memories>\n" not in text_of(sdk.said(host.requests[-1].body)[-1])
    ask(bot, [user(QUESTION)])
    assert FACT in text_of(sdk.said(host.requests[-1].body)[-1])


@every_sdk
def test_a_turn_that_only_tells_recalls_few_records(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    memory.add([f"My dog Rex ate {food} in the park." for food in ("ham", "tofu", "rice", "figs", "corn", "kale")])
    bot = agentmem.wrap(sdk.client(host, ask), memory, session="s", remember=False)
    for text, least, most in (("What did my dog Rex eat in the park?", 6, 6), ("My dog Rex ate in the park.", 1, 3)):
        done(ask(bot, [user(text)]))
        assert least <= json.dumps(host.requests[-1].body).count("My dog Rex ate ") - text.count("Rex ate ") <= most


@every_sdk
def test_recall_and_remember_can_be_off(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    client = sdk.client(host, ask)
    ask(agentmem.wrap(client, memory, recall=False), [user(QUESTION)])
    assert FACT not in json.dumps(host.requests[-1].body)
    assert MEMORY_NOTE not in json.dumps(host.requests[-1].body)
    ask(agentmem.wrap(client, memory, remember=False), [user(QUESTION)])
    assert FACT in json.dumps(host.requests[-1].body)
    assert len(turns(memory)) == 2
    assert len(uses(memory)) == 2


@every_sdk
def test_a_copy_for_each_user_knows_only_that_user(sdk: Sdk, ask: Any, host: HostServer) -> None:
    with Memory(":memory:", embedder="hash") as memory:
        bot: Any = agentmem.wrap(sdk.client(host, ask), memory)
        ana, ben = bot.scope(user="ana"), bot.scope(user="ben")
        ask(ana, [user("My locker has the number 4711.")])
        ask(
            ben.with_options(timeout=5.0) if hasattr(ben, "with_options") else ben, [user("What is the locker number?")]
        )
        assert "4711" not in json.dumps(host.requests[-1].body)
        ask(ana.scope(session="later"), [user("What is the locker number?")])
        assert len(memory.scope(user="ana").list()) == 4
        assert len(memory.scope(user="ben").list()) == 2
        assert ana.memory.search("locker")[0].record.text.startswith("My locker")
        with pytest.raises(ScopeError):
            ana.scope(user="ben")


def test_a_chat_goes_on_with_what_the_client_was_told(host: HostServer) -> None:
    provider = ScriptedProvider(["Fine."])
    with Memory(":memory:", embedder="none", model=provider) as memory:
        ana = memory.scope(user="ana", session="s")
        openai_create(agentmem.wrap(OPENAI.sync(host), ana), [user("I planted tulips.")])
        ana.chat("And now?")
        said = [message.content for segment in provider.requests[-1].segments for message in segment.messages]
        assert said[-3:] == ["I planted tulips.", ANSWER, "And now?"]


# Streams.


def test_an_abandoned_stream_leaves_nothing(host: HostServer, memory: Memory) -> None:
    bot: Any = agentmem.wrap(OPENAI.sync(host), memory)
    with bot.chat.completions.create(model=GPT, messages=[user(QUESTION)], stream=True) as stream:
        next(stream)
    del stream
    claude: Any = agentmem.wrap(CLAUDES.sync(host), memory)
    with claude.messages.stream(model=CLAUDE, max_tokens=64, messages=[user(QUESTION)]) as events:
        next(events.text_stream)
    del events
    parts = agentmem.wrap(OLLAMA.sync(host), memory).chat(LLAMA, [user(QUESTION)], stream=True)
    next(parts)
    parts.close()
    assert turns(memory) == []


async def test_a_cancelled_stream_leaves_nothing(host: HostServer, memory: Memory) -> None:
    bot: Any = agentmem.wrap(OPENAI.amake(host), memory)
    host.delay_s = 5.0
    task = asyncio.create_task(aopenai_stream(bot, [user(QUESTION)]))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await bot.close()
    assert turns(memory) == []


def test_a_stream_left_after_its_last_word_is_remembered(host: HostServer, memory: Memory) -> None:
    bot: Any = agentmem.wrap(OPENAI.sync(host), memory)
    for chunk in bot.chat.completions.create(model=GPT, messages=[user(QUESTION)], stream=True):
        if chunk.choices[0].finish_reason:
            break
    assert turns(memory) == [("user", QUESTION), ("assistant", ANSWER)]


@pytest.mark.parametrize("counted", [False, True])
def test_a_stream_has_the_events_that_the_caller_asked_for(host: HostServer, memory: Memory, *, counted: bool) -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if counted else {}
    client = OPENAI.sync(host)

    def events(of: Any) -> list[Any]:
        stream = of.chat.completions.create(model=GPT, messages=[user("Hi!")], stream=True, **more)
        assert isinstance(stream, openai.Stream)
        return [chunk.model_dump(exclude={"id", "created"}) for chunk in stream]

    plain, heard = events(client), events(agentmem.wrap(client, memory))
    for event in (*plain, *heard):
        event["usage"] = event["usage"] and "counted"  # how many tokens that were differs by the note
    assert heard == plain
    assert uses(memory)[0]["input"] > 0


# The whole client.


def test_everything_else_of_a_client_works(host: HostServer, memory: Memory) -> None:
    with agentmem.wrap(OPENAI.sync(host), memory) as bot:
        assert bot.embeddings.create(model="text-embedding-3-small", input="x").data
        raw = bot.chat.completions.with_raw_response.create(model=GPT, messages=[user(QUESTION)])
        assert raw.headers["content-type"].startswith("application/json")
        assert raw.parse().choices[0].message.content == ANSWER
        assert len(turns(memory)) == 2
        again = bot.with_options(max_retries=1)
        assert again.max_retries == 1
        assert openai_create(again, [user("My cat is Mia.")]) == ANSWER
        assert len(turns(memory)) == 4
        host.reply = '{"text": "parsed"}'
        parsed = bot.chat.completions.parse(model=GPT, messages=[user("So?")], response_format=Said)
        assert parsed.choices[0].message.parsed == Said(text="parsed")
        assert turns(memory)[-1] == ("assistant", '{"text": "parsed"}')
    assert bot.is_closed()
    claude = agentmem.wrap(CLAUDES.sync(host), memory)
    asked: Any = [user(QUESTION)]
    assert claude.messages.count_tokens(model=CLAUDE, messages=asked).input_tokens > 0
    assert MEMORY_NOTE not in json.dumps(host.requests[-1].body)


def test_what_the_host_holds_is_not_recalled_again(host: HostServer, memory: Memory) -> None:
    responses_create(OPENAI.sync(host), [user("Hi!")])
    payload = asked_again(host).json()
    with answering(*(json_reply({**payload, "id": f"resp_{number}"}) for number in (1, 2, 3))) as holding:
        bot = agentmem.wrap(OPENAI.sync(holding), memory, session="s")
        bot.responses.create(model=GPT, input=QUESTION)
        bot.responses.create(model=GPT, input="Peanuts or walnuts, what of the two?", previous_response_id="resp_1")
        bot.responses.create(model=GPT, input=QUESTION, previous_response_id="resp_2")
        sent = [json.dumps(body) for body in holding.bodies]
    assert [FACT in body for body in sent] == [True, False, False]
    assert ["<memories>\\n" in body for body in sent] == [True, False, False]
    assert [role for role, _ in turns(memory)] == ["user", "assistant"] * 3


# What is refused, and what happens at once.


@pytest.mark.parametrize("thing", [None, "openai", 3, openai, openai.OpenAI, openai.OpenAI.chat, Path()])
def test_what_is_no_client_is_refused(thing: Any, memory: Memory) -> None:
    with pytest.raises(InvalidInput, match=r"openai\.OpenAI"):
        agentmem.wrap(thing, memory)


def test_bad_memories_and_scopes_are_refused(host: HostServer, memory: Memory, tmp_path: Path) -> None:
    client = OPENAI.sync(host)
    nobody: Any = None
    nothing: Any = 3
    with pytest.raises(InvalidInput, match="give a folder"):
        agentmem.wrap(client, nothing)
    with pytest.raises(ScopeError, match="user=None"):
        agentmem.wrap(client, memory, user=nobody)
    with pytest.raises(InvalidInput, match="wrapped already"):
        agentmem.wrap(agentmem.wrap(client, memory), memory)
    (tmp_path / "file").write_text("x")
    with pytest.raises(agentmem.StoreError):
        agentmem.wrap(client, tmp_path / "file")


def test_a_memory_opened_for_a_client_closes_with_it(host: HostServer, tmp_path: Path) -> None:
    with agentmem.wrap(OPENAI.sync(host), tmp_path / "m", user="ana") as bot:
        openai_create(bot, [user("My cat is Mia.")])
    with Memory(tmp_path / "m") as memory:
        assert turns(memory) == [("user", "My cat is Mia."), ("assistant", ANSWER)]

    async def again() -> None:
        async with agentmem.wrap(CLAUDES.amake(host), tmp_path / "m", user="ana") as claude:
            await aclaude_create(claude, [user("What is my cat called, Mia?")])

    done(again())
    assert "My cat is Mia." in json.dumps(host.requests[-1].body)


def test_many_threads_share_a_client(host: HostServer, memory: Memory) -> None:
    bot: Any = agentmem.wrap(OPENAI.sync(host), memory)
    failed: list[BaseException] = []

    def talk(number: int) -> None:
        try:
            mine = bot.scope(user=f"user {number}")
            for turn in range(3):
                assert openai_stream(mine, [user(f"Turn {turn} of {number}.")]) == ANSWER
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for number in range(6):
        mine = [record for record in memory.scope(user=f"user {number}").list() if record.source == "chat"]
        assert [record.text for record in mine if record.role == "user"] == [f"Turn {t} of {number}." for t in range(3)]


async def test_a_begun_answer_is_remembered_whole(host: HostServer, memory: Memory) -> None:
    host.reply = " and walnuts."
    bot = agentmem.wrap(CLAUDES.amake(host), memory)
    with contextlib.suppress(anthropic.BadRequestError):
        await aclaude_stream(bot, [user("Which nuts?"), assistant("Peanuts")])
        assert turns(memory) == [("user", "Which nuts?"), ("assistant", "Peanuts and walnuts.")]
    await bot.close()


async def test_many_tasks_share_a_client(host: HostServer, memory: Memory) -> None:
    bot: Any = agentmem.wrap(OPENAI.amake(host), memory.scope(agent="coach"))
    assert isinstance(bot.memory, agentmem.AsyncScopedMemory)
    mine = [bot.scope(user=f"user {number}", session="s") for number in range(8)]
    asked = [aopenai_stream(one, [user(f"I am number {number}.")]) for number, one in enumerate(mine)]
    assert await asyncio.gather(*asked) == [ANSWER] * 8
    for number, one in enumerate(mine):
        said = [record.text for record in await one.memory.list() if record.source == "chat"]
        assert said == [f"I am number {number}.", ANSWER]
    await bot.close()


def test_a_stored_prompt_keeps_its_instructions(host: HostServer, memory: Memory) -> None:
    responses_create(OPENAI.sync(host), [user("Hi!")])
    with answering(json_reply(asked_again(host).json())) as holding:
        agentmem.wrap(OPENAI.sync(holding), memory).responses.create(prompt={"id": "pmpt_1"}, input=QUESTION)
        [body] = holding.bodies
    assert "instructions" not in body
    assert text_of(body["input"][0]).startswith(MEMORY_NOTE)
    assert FACT in text_of(body["input"][0])


def test_streams_leave_nothing_behind(host: HostServer, memory: Memory) -> None:
    bot = agentmem.wrap(OPENAI.sync(host), memory, remember=False)
    for _ in range(20):
        openai_stream(bot, [user("Hi!")])
    gc.collect()
    assert len(openai.Stream.__subclasses__()) < 5


def test_what_hides_personal_data_hides_it_here(host: HostServer) -> None:
    with Memory(":memory:", embedder="none", redact="email") as memory:
        openai_create(agentmem.wrap(OPENAI.sync(host), memory), [user("Write to ana@example.org about the tulips.")])
        assert "ana@example.org" in json.dumps(host.requests[-1].body)  # the caller's own words are sent as they are
        assert "ana@example.org" not in str(turns(memory))
        assert "tulips" in str(turns(memory))


async def test_raw_answers_are_remembered_too(host: HostServer, memory: Memory) -> None:
    async with agentmem.wrap(OPENAI.amake(host), memory) as bot:
        raw = await bot.chat.completions.with_raw_response.create(model=GPT, messages=[user("One?")])
        assert raw.parse().choices[0].message.content == ANSWER
    async with agentmem.wrap(CLAUDES.amake(host), memory) as claude:
        told = await claude.messages.with_raw_response.create(model=CLAUDE, max_tokens=9, messages=[user("Two?")])
        assert told.headers["content-type"].startswith("application/json")
        asked: Any = {"model": CLAUDE, "max_tokens": 9, "messages": [user("Three?")]}
        async with claude.messages.with_streaming_response.create(**asked) as response:
            assert ANSWER in await response.text()
    assert turns(memory) == [("user", "One?"), ("assistant", ANSWER), ("user", "Two?"), ("assistant", ANSWER)]


@pytest.mark.parametrize(("sdk", "ask"), WHOLE, ids=[sdk.name for sdk, _ in WHOLE])
def test_messages_that_can_be_read_once_are_sent_whole(sdk: Sdk, ask: Any, host: HostServer, memory: Memory) -> None:
    bot = agentmem.wrap(sdk.client(host, ask), memory)
    ask(bot, iter([user("Hello."), assistant("Hi!"), user(QUESTION)]))
    assert [text_of(message)[-6:] for message in sdk.said(host.requests[-1].body)] == ["Hello.", "Hi!", "lnuts?"]
    assert len(turns(memory)) == 2


def test_copies_made_for_each_request_share_what_is_in_mind(host: HostServer, memory: Memory) -> None:
    responses_create(OPENAI.sync(host), [user("Hi!")])
    payload = asked_again(host).json()
    with answering(*(json_reply({**payload, "id": f"resp_{number}"}) for number in (1, 2, 3))) as holding:
        bot: Any = agentmem.wrap(OPENAI.sync(holding), memory)
        bot.scope(user="ana", session="s").responses.create(model=GPT, input=QUESTION)
        again: Any = {"model": GPT, "input": "Peanuts or walnuts, what of the two?", "previous_response_id": "resp_1"}
        bot.scope(user="ana", session="s").responses.create(**again)
        bot.scope(user="ben", session="s").responses.create(**again)
        assert [FACT in json.dumps(body) for body in holding.bodies] == [True, False, True]


def test_a_raw_answer_that_is_none_is_the_callers_to_see(memory: Memory) -> None:
    with answering(raw_reply(b"{not json")) as broken:
        bot: Any = agentmem.wrap(OPENAI.sync(broken), memory)
        raw = bot.chat.completions.with_raw_response.create(model=GPT, messages=[user(QUESTION)])
        assert raw.http_response.text == "{not json"
    assert turns(memory) == []
