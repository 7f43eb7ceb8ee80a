"""The stand-in hosts, driven by the real SDKs over real sockets: caches by the vendors' rules, refusals, streams."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import pytest

from agentmem.provider import Provider, load
from agentmem.testing import FakeClock, HostServer, ProviderSuite
from agentmem.testing.host_anthropic import BLOCKS
from agentmem.testing.host_anthropic import FIELDS as ANTHROPIC_FIELDS
from agentmem.testing.host_openai import FIELDS as CHAT_FIELDS
from agentmem.testing.host_responses import FIELDS as RESPONSES_FIELDS

#: About 1,500 tokens, and as many others.
LONG = "word " * 1500
OTHER = "term " * 1500
CLAUDE, GPT, OLDER = "claude-opus-5-5", "gpt-6.1-sol", "gpt-4o"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def host(clock: FakeClock) -> Iterator[HostServer]:
    with HostServer(clock=clock) as server:
        yield server


@pytest.fixture
def claude(host: HostServer) -> Iterator[Any]:
    import anthropic

    with anthropic.Anthropic(api_key="k", base_url=host.anthropic_url, max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(host: HostServer) -> Iterator[Any]:
    import openai

    with openai.OpenAI(api_key="k", base_url=host.openai_url, max_retries=0) as client:
        yield client


def block(text: str, ttl: str | None = None) -> dict[str, Any]:
    """A text block of Anthropic's, marked if a lifetime is named."""
    mark = {} if ttl is None else {"cache_control": {"type": "ephemeral", "ttl": ttl}}
    return {"type": "text", "text": text, **mark}


def ask(client: Any, *blocks: dict[str, Any], model: str = CLAUDE, **more: Any) -> Any:
    more.setdefault("max_tokens", 50)
    return client.messages.create(model=model, messages=[{"role": "user", "content": list(blocks)}], **more)


def tokens(message: Any) -> tuple[int, int, int, int]:
    """(read, written for five minutes, for an hour, in full)."""
    usage = message.usage
    split = usage.cache_creation
    return (
        usage.cache_read_input_tokens,
        split.ephemeral_5m_input_tokens,
        split.ephemeral_1h_input_tokens,
        usage.input_tokens,
    )


def part(text: str, ttl: str | None = None, *, marked: bool = True) -> dict[str, Any]:
    """A text part of OpenAI's Responses."""
    mark = {"mode": "explicit", **({} if ttl is None else {"ttl": ttl})}
    return {"type": "input_text", "text": text, **({"prompt_cache_breakpoint": mark} if marked else {})}


def respond(client: Any, *parts: dict[str, Any], model: str = GPT, **more: Any) -> Any:
    more.setdefault("prompt_cache_options", {"mode": "explicit"})
    return client.responses.create(model=model, input=[{"role": "user", "content": list(parts)}], **more)


def used(response: Any) -> tuple[int, int, int]:
    """(read, written, in full)."""
    usage = response.usage
    details = usage.input_tokens_details
    return details.cached_tokens, details.cache_write_tokens, usage.input_tokens - details.cached_tokens


# Anthropic.


def test_a_marked_prefix_is_written_then_read(claude: Any) -> None:
    read, short, long, full = tokens(ask(claude, block(LONG, "5m"), block("one")))
    assert (read, long) == (0, 0)
    assert short > 1500 > full
    assert tokens(ask(claude, block(LONG, "5m"), block("two")))[:2] == (short, 0)
    assert tokens(ask(claude, block(LONG), block("three")))[:2] == (0, 0)  # no mark, no cache
    assert tokens(ask(claude, block(OTHER, "5m")))[0] == 0


def test_entries_go_after_their_time_and_a_read_renews_them(claude: Any, clock: FakeClock) -> None:
    ask(claude, block(LONG, "5m"))
    for _ in range(3):
        clock.advance(299)
        assert tokens(ask(claude, block(LONG, "5m")))[0] > 1500
    clock.advance(300)
    assert tokens(ask(claude, block(LONG, "5m")))[0] == 0


def test_an_hour_outlives_five_minutes_and_each_is_billed_by_itself(claude: Any, clock: FakeClock) -> None:
    _, short, long, _ = tokens(ask(claude, block(LONG, "1h"), block(OTHER, "5m")))
    assert min(short, long) > 1500
    clock.advance(301)
    assert tokens(ask(claude, block(LONG, "1h"), block(OTHER, "5m")))[:3] == (long, short, 0)


def test_a_prefix_below_the_minimum_is_silently_not_kept(claude: Any) -> None:
    for _ in range(2):
        assert tokens(ask(claude, block("word " * 400, "5m")))[:3] == (0, 0, 0)
    assert tokens(ask(claude, block("word " * 800, "5m"), model="claude-opus-4-5-20251101"))[1] == 0  # 4,096 there


def test_a_mark_looks_back_over_twenty_blocks(claude: Any) -> None:
    for added, found in ((20, True), (21, False)):
        ask(claude, block(f"{added} {LONG}", "5m"))
        more = [block(f"b{i}") for i in range(added - 1)]
        read = tokens(ask(claude, block(f"{added} {LONG}"), *more, block("end", "5m")))[0]
        assert (read > 0) is found


def test_workspaces_models_and_bytes_share_nothing(host: HostServer, claude: Any) -> None:
    import anthropic

    ask(claude, block(LONG, "5m"))
    assert tokens(ask(claude, block(LONG, "5m"), model="claude-sonnet-5-5"))[0] == 0
    assert tokens(ask(claude, block(LONG + " ", "5m")))[0] == 0
    with anthropic.Anthropic(api_key="another", base_url=host.anthropic_url, max_retries=0) as stranger:
        assert tokens(ask(stranger, block(LONG, "5m")))[0] == 0


def test_what_stands_first_voids_what_follows(claude: Any) -> None:
    tool = {"name": "look", "description": "d", "input_schema": {"type": "object"}}
    marked = {"type": "ephemeral"}
    common: dict[str, Any] = {"system": [{"type": "text", "text": LONG, "cache_control": marked}], "tools": [tool]}
    ask(claude, block(OTHER, "5m"), **common)
    assert tokens(ask(claude, block(OTHER, "5m"), **common))[3] == 0
    read = tokens(ask(claude, block(OTHER, "5m"), **common, tool_choice={"type": "any"}))[0]
    assert 1500 < read < 2000  # the messages only
    assert tokens(ask(claude, block(OTHER, "5m"), system=common["system"]))[0] == 0


def test_the_automatic_mark_moves_with_the_conversation(claude: Any) -> None:
    marked = {"type": "ephemeral"}
    ask(claude, block(LONG), extra_body={"cache_control": marked})
    assert tokens(ask(claude, block(LONG), block("more"), extra_body={"cache_control": marked}))[0] > 1500


@pytest.mark.parametrize(
    ("blocks", "more", "told"),
    [
        ([block(f"{i}", "5m") for i in range(5)], {}, "maximum of 4"),
        ([block("a", "5m"), block("b", "1h")], {}, "must not come after"),
        ([block("a", "2h")], {}, "ttl"),
        ([block(" ")], {}, "non-whitespace"),
        ([block("a")], {"extra_body": {"seed": 7}}, "seed: Extra inputs"),
        ([block("a")], {"extra_body": {"top_p": 0.5, "temperature": 1.0}}, "cannot both"),
        ([block("a")], {"max_tokens": 0, "tool_choice": {"type": "any"}}, "max_tokens: 0"),
        ([block("a")], {"max_tokens": 0, "thinking": {"type": "enabled", "budget_tokens": 1024}}, "max_tokens: 0"),
        ([{"type": "tool_result", "tool_use_id": "x", "content": "y"}], {}, "tool_use_id"),
    ],
)
def test_anthropic_refuses(claude: Any, blocks: list[dict[str, Any]], more: dict[str, Any], told: str) -> None:
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match=told):
        ask(claude, *blocks, **more)


def test_a_prewarm_fills_the_cache_and_says_nothing(claude: Any) -> None:
    prewarm = ask(claude, block(LONG, "5m"), max_tokens=0)
    assert (prewarm.content, prewarm.usage.output_tokens) == ([], 0)
    assert tokens(ask(claude, block(LONG, "5m")))[0] > 1500


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "claude-sonnet-5-5"}, "model_changed"),
        ({"system": "Another."}, "system_changed"),
        ({"tools": [{"name": "t", "input_schema": {"type": "object"}}]}, "tools_changed"),
        ({}, None),
    ],
)
def test_anthropic_says_why_it_missed(
    claude: Any, host: HostServer, change: dict[str, Any], reason: str | None
) -> None:
    first = ask(claude, block(LONG, "5m"), system="Be kind.")
    more: dict[str, Any] = {"system": "Be kind.", **change}
    second = ask(claude, block(LONG, "5m"), **more, extra_body={"diagnostics": {"previous_message_id": first.id}})
    why = second.diagnostics and second.diagnostics.cache_miss_reason
    assert (why and why.type) == reason == host.requests[-1].miss
    assert why is None or why.cache_missed_input_tokens > 1500


def test_anthropic_diagnoses_changed_messages_and_unknown_answers(claude: Any) -> None:
    first = ask(claude, block(LONG, "5m"))
    for text, previous, reason in (
        (OTHER, first.id, "messages_changed"),
        (LONG, "msg_9", "previous_message_not_found"),
    ):
        told = {"diagnostics": {"previous_message_id": previous}}
        assert ask(claude, block(text, "5m"), extra_body=told).diagnostics.cache_miss_reason.type == reason


def test_anthropic_streams_texts_thoughts_and_calls(claude: Any, host: HostServer) -> None:
    host.reply = {
        "thinking": "hm hm",
        "text": "Let me see.",
        "tool_calls": [{"name": "look", "arguments": {"at": [1]}}],
    }
    with claude.messages.stream(model=CLAUDE, max_tokens=50, messages=[{"role": "user", "content": "Hi"}]) as stream:
        events = [event.type for event in stream]
        whole = stream.get_final_message()
    assert [b.type for b in whole.content] == ["thinking", "text", "tool_use"]
    assert (whole.content[1].text, whole.content[2].input, whole.stop_reason) == (
        "Let me see.",
        {"at": [1]},
        "tool_use",
    )
    assert (events[0], events[-1]) == ("message_start", "message_stop")
    counted = claude.messages.count_tokens(model=CLAUDE, messages=[{"role": "user", "content": "Hi"}])
    assert counted.input_tokens == whole.usage.input_tokens


# OpenAI.


def test_openai_writes_at_its_marks_exactly_and_bills_each_lifetime(gpt: Any, clock: FakeClock) -> None:
    first = respond(gpt, part(LONG, "12h"), part(OTHER), part("one", marked=False))
    details = first.usage.input_tokens_details.cache_write_tokens_details
    assert min(details.ttl_12h_tokens, details.ttl_30m_tokens) > 1500
    clock.advance(1801)
    read, written, _ = used(respond(gpt, part(LONG, "12h"), part(OTHER), part("two", marked=False)))
    assert (read, written) == (details.ttl_12h_tokens, details.ttl_30m_tokens)


def test_openai_explicit_mode_without_marks_caches_nothing_and_implicit_marks_the_end(gpt: Any) -> None:
    plain = part(LONG, marked=False)
    for _ in range(2):
        assert used(respond(gpt, plain))[:2] == (0, 0)
    assert used(respond(gpt, plain, prompt_cache_options={"mode": "implicit"}))[1] > 1500
    assert used(respond(gpt, plain, part("more", marked=False), prompt_cache_options={"mode": "implicit"}))[0] > 1500


def test_openai_writes_only_the_latest_four_marks(gpt: Any) -> None:
    parts = [part(f"{i} {LONG}") for i in range(6)]
    assert used(respond(gpt, *parts))[2] > 9000
    assert used(respond(gpt, parts[0]))[0] == used(respond(gpt, parts[1]))[0] == 0
    assert used(respond(gpt, *parts[:3]))[0] > 4500


def test_openai_routes_by_key_and_spills_what_comes_too_fast(clock: FakeClock) -> None:
    import openai

    with (
        HostServer(clock=clock, spills=True) as host,
        openai.OpenAI(api_key="k", base_url=host.openai_url, max_retries=0) as client,
    ):
        reads = [used(respond(client, part(LONG), prompt_cache_key="a"))[0] > 0 for _ in range(17)]
        assert reads == [False, *[True] * 14, False, True]
        assert used(respond(client, part(LONG), prompt_cache_key="b"))[0] == 0
        clock.advance(61)
        assert used(respond(client, part(LONG), prompt_cache_key="a"))[0] > 0


def test_older_openai_models_cache_by_themselves_in_steps_of_128(gpt: Any, clock: FakeClock) -> None:
    def ask_older(text: str) -> Any:
        messages = [{"role": "system", "content": LONG}, {"role": "user", "content": text}]
        return gpt.chat.completions.create(model=OLDER, messages=messages).usage.prompt_tokens_details

    first = ask_older("one")
    assert (first.cached_tokens, first.cache_write_tokens) == (0, 0)
    cached = ask_older("two").cached_tokens
    assert cached == 1024 + (1500 - 1024) // 128 * 128
    clock.advance(600)
    assert ask_older("three").cached_tokens == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt_cache_key": "b"}, "prompt_cache_key_changed"),
        ({"model": "gpt-5.6-sol"}, "model_changed"),
        ({"text": {"verbosity": "low"}}, "verbosity_changed"),
        ({"reasoning": {"effort": "high"}}, "reasoning_effort_changed"),
        ({"text": {"format": {"type": "json_object"}}}, "text_format_changed"),
        ({"tools": [{"type": "function", "name": "t", "parameters": {}, "strict": False}]}, "tools_changed"),
        ({}, None),
    ],
)
def test_openai_says_why_it_missed(gpt: Any, host: HostServer, change: dict[str, Any], reason: str | None) -> None:
    first = respond(gpt, part(LONG), prompt_cache_key="a")
    options = {"mode": "explicit", "comparison_response_id": first.id}
    second = respond(gpt, part(LONG), **{"prompt_cache_key": "a", **change}, prompt_cache_options=options)
    why = second.prompt_cache_diagnostics
    assert (why.type, getattr(why, "reason", None)) == ("cache_miss" if reason else "cache_hit", reason)
    assert host.requests[-1].miss == reason


def test_openai_prewarms(gpt: Any) -> None:
    response = respond(gpt, part(LONG), prompt_cache_options={"mode": "explicit", "prewarm": True})
    assert (response.output, response.usage.output_tokens) == ([], 0)
    assert used(respond(gpt, part(LONG)))[0] > 1500


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda c: respond(c, part("a"), extra_body={"stop": ["x"]}), "Unknown parameter: 'stop'"),
        (lambda c: respond(c, part("a"), max_output_tokens=2), "below the minimum"),
        (lambda c: respond(c, part("a"), model=OLDER), "not supported with this model"),
        (lambda c: respond(c, part("a", "1h")), "Invalid value: '1h'"),
        (
            lambda c: c.responses.create(model=GPT, input=[{"role": "assistant", "content": [part("a")]}]),
            "Invalid value",
        ),
        (lambda c: c.responses.create(model=GPT, input="a", previous_response_id="resp_1"), "not found"),
        (
            lambda c: c.chat.completions.create(
                model=GPT, messages=[{"role": "tool", "tool_call_id": "x", "content": "y"}]
            ),
            "preceding message",
        ),
        (
            lambda c: c.chat.completions.create(model=GPT, messages=[{"role": "user", "content": "a"}], max_tokens=5),
            "max_c",
        ),
        (
            lambda c: c.chat.completions.create(
                model=GPT, messages=[{"role": "user", "content": "a"}], extra_body={"cache_salt": "s"}
            ),
            "Unknown parameter",
        ),
    ],
)
def test_openai_refuses(gpt: Any, call: Callable[[Any], Any], told: str) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match=told):
        call(gpt)


def test_openai_streams_calls_and_counts(gpt: Any, host: HostServer) -> None:
    host.reply = {"text": "Let me see.", "tool_calls": [{"name": "look", "arguments": {"at": [1]}}]}
    with gpt.responses.stream(model=GPT, input="Hi") as stream:
        whole = stream.until_done().get_final_response()
    assert (whole.output_text, whole.output[1].arguments) == ("Let me see.", '{"at":[1]}')
    chunks = list(gpt.chat.completions.create(model=GPT, messages=[{"role": "user", "content": "Hi"}], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Let me see."
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    counted = gpt.responses.input_tokens.count(model=GPT, input="Hi")
    assert counted.input_tokens == whole.usage.input_tokens


def test_a_refusal_is_told_in_each_format(gpt: Any, claude: Any, host: HostServer) -> None:
    host.reply = {"refusal": "I can't."}
    assert gpt.responses.create(model=GPT, input="Hi").output[0].content[0].refusal == "I can't."
    chat = gpt.chat.completions.create(model=GPT, messages=[{"role": "user", "content": "Hi"}])
    assert chat.choices[0].message.refusal == "I can't."
    assert ask(claude, block("Hi")).stop_reason == "refusal"


def test_the_fields_known_here_are_those_of_the_sdks() -> None:
    import anthropic.types as a
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase as Chat
    from openai.types.responses.response_create_params import ResponseCreateParamsBase as Responses

    def names(kind: Any) -> set[str]:
        return set(kind.__annotations__) if not hasattr(kind, "__mro__") else set(get_type_hints(kind))

    assert names(Chat) | {"stream"} == CHAT_FIELDS
    assert names(Responses) | {"stream"} == RESPONSES_FIELDS
    from anthropic.types.message_create_params import MessageCreateParamsBase as Messages

    headers = {"user_profile_id", "workspace_id"}
    older = {"temperature", "top_k", "top_p"}  # models that take them are still served
    assert names(Messages) | {"stream"} | older == ANTHROPIC_FIELDS | headers
    for kind in ("text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"):
        words = "".join(word.title() for word in kind.split("_"))
        known = names(getattr(a, f"{words}BlockParam")) - {"type", "cache_control"}
        assert known == set(BLOCKS[kind]), kind


# Ollama.


def test_ollama_counts_the_whole_prompt_and_a_hit_shows_in_its_time_only(host: HostServer, clock: FakeClock) -> None:
    import ollama

    client = ollama.Client(host=host.ollama_url)

    def chat(text: str, **more: Any) -> Any:
        return client.chat("m", [{"role": "system", "content": LONG}, {"role": "user", "content": text}], **more)

    cold, warm = chat("one"), chat("two")
    assert cold.prompt_eval_count == warm.prompt_eval_count > 1500
    assert warm.prompt_eval_duration < cold.prompt_eval_duration / 10
    assert chat("three", options={"num_ctx": 99}).prompt_eval_duration > 1e9  # loaded anew
    clock.advance(301)
    assert chat("four", keep_alive="1h").prompt_eval_duration > 1e9
    clock.advance(3599)
    assert chat("five").prompt_eval_duration < 1e9
    assert "".join(line.message.content for line in chat("six", stream=True)) == "Understood."
    client._client.close()


# Time.


def test_an_entry_can_be_read_only_once_the_answer_that_wrote_it_began(clock: FakeClock) -> None:
    import anthropic

    together = threading.Barrier(4, timeout=10)

    def reply(body: Any) -> str:
        if len(body["messages"][0]["content"]) > 1:
            together.wait()
        return "Fine."

    with (
        HostServer(clock=clock, delay_s=0.3, reply=reply) as host,
        anthropic.Anthropic(api_key="k", base_url=host.anthropic_url, max_retries=0) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        replies = list(pool.map(lambda i: ask(client, block(LONG, "5m"), block(str(i))), range(4)))
        assert [tokens(reply)[0] for reply in replies] == [0, 0, 0, 0]
        assert tokens(ask(client, block(LONG, "5m")))[0] > 1500


# The conformance suite, against the real SDKs.


def openai_at(host: HostServer, **settings: Any) -> Any:
    return load(f"openai:{GPT}", {"api_key": "k", "base_url": host.openai_url, "host": "openai", **settings})


class HostedSuite(ProviderSuite):
    prefix_words = 3000
    max_tokens = 40

    @pytest.fixture
    def served(self) -> Iterator[HostServer]:
        with HostServer(reply="one two three four") as host:
            yield host


class TestAnthropicAtAHost(HostedSuite):
    @pytest.fixture
    def provider(self, served: HostServer) -> Iterator[Provider]:
        with_key = {"api_key": "k", "base_url": served.anthropic_url}
        provider = load(f"anthropic:{CLAUDE}", with_key)
        yield provider
        provider.close()


class TestResponsesAtAHost(HostedSuite):
    @pytest.fixture
    def provider(self, served: HostServer) -> Iterator[Provider]:
        provider = openai_at(served)
        yield provider
        provider.close()

    def test_max_tokens_limits_the_answer(self, provider: Provider) -> None:
        # The vendor takes no limit below 16.
        assert provider.generate(self.request(max_tokens=2)).usage.output_tokens <= 16


class TestChatCompletionsAtAHost(HostedSuite):
    @pytest.fixture
    def provider(self, served: HostServer) -> Iterator[Provider]:
        provider = openai_at(served, api="chat")
        yield provider
        provider.close()


class TestOllamaAtAHost(HostedSuite):
    reports_cached = False

    @pytest.fixture
    def provider(self, served: HostServer) -> Iterator[Provider]:
        provider = load("ollama:m", {"base_url": served.ollama_url})
        yield provider
        provider.close()
