"""Chats through the real SDKs against hosts that keep their vendors' cache rules: planned, expected, read, paid.

The host matches rendered bytes by code of its own (agentmem.testing), so what comes back as cached says that the
planner's picture of it, the adapter's bytes and the ledger agree.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from genai_prices import Usage as Priced
from genai_prices import calc_price
from pydantic import BaseModel

from agentmem import BudgetExceeded, ConfigError, InvalidInput, Memory, Reply
from agentmem.testing import FakeClock, HostServer

SYSTEM = " ".join(
    f"House rule {number}: be kind and brief, and never promise what is not known." for number in range(90)
)
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAA"
    "DUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
#: Model, settings of its provider, how the host is dressed, what genai-prices calls it.
MODELS = {
    "anthropic:claude-sonnet-5-5": ({}, "openai", ("anthropic", "claude-sonnet-5-5")),
    "openai:gpt-6-sol": ({"host": "openai"}, "openai", ("openai", "gpt-6-sol")),
    "openai:gpt-4o": ({"host": "openai"}, "openai", ("openai", "gpt-4o")),
    "openai_compatible:deepseek-v4-flash": ({"host": "deepseek"}, "deepseek", ("deepseek", "deepseek-v4-flash")),
}


class Hosted:
    """A memory whose model is at a stand-in host, and the host."""

    def __init__(self, folder: Path, model: str) -> None:
        settings, dressed, self.priced = MODELS[model]
        self.clock = FakeClock(1_767_600_000.0)
        self.host = HostServer(clock=self.clock, reply=self._reply, openai=dressed)
        self.model, self.folder, self._settings = model, folder, settings
        self.turns = 0

    def _reply(self, body: Any) -> str:
        self.turns += 1
        return f"Answer {self.turns}: that sounds fine, and I have written it down for you."

    def open(self, **settings: Any) -> Memory:
        scheme = self.model.split(":")[0]
        url = self.host.anthropic_url if scheme == "anthropic" else self.host.openai_url
        table = {"base_url": url, "api_key": "k", **self._settings}
        given: dict[str, Any] = {"system": SYSTEM, "providers": {scheme: table}, **settings}
        return Memory(self.folder, model=self.model, embedder="hash", clock=self.clock, **given)

    def talk(self, memory: Any, turns: int, *, gap: float = 30.0) -> list[Reply]:
        replies = []
        for _ in range(turns):
            replies.append(
                memory.chat(f"Note {self.turns}: my shelf number {self.turns} holds {self.turns + 3} books.")
            )
            self.clock.advance(gap)
        return replies


@pytest.fixture(params=MODELS)
def hosted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hosted]:
    made = Hosted(tmp_path / "m", request.param)
    with made.host:
        yield made


def test_what_is_expected_of_the_cache_comes_from_it(hosted: Hosted) -> None:
    with hosted.open() as memory:
        replies = hosted.talk(memory.scope(user="ana"), 6)
        hosted.clock.advance(86_400)
        replies += hosted.talk(memory.scope(user="ana"), 6)
    assert [entry.status for entry in hosted.host.requests] == [200] * 12
    assert [reply.cache.reason for reply in replies] == [None] * 12
    for reply in (*replies[1:6], *replies[7:]):
        assert reply.cache.expected_tokens > 1000
        assert reply.usage.cached_tokens >= 0.9 * reply.cache.expected_tokens
        assert reply.usage.cached_tokens > 0.6 * reply.usage.input_tokens
    assert replies[0].usage.cached_tokens == replies[6].usage.cached_tokens == 0


def test_a_prefix_outlives_the_process(hosted: Hosted) -> None:
    last: list[Reply] = []
    for _ in range(3):
        with hosted.open() as memory:
            last = hosted.talk(memory.scope(user="ana", session="s"), 2)
    assert last[0].usage.cached_tokens > 0.8 * last[0].usage.input_tokens


def test_the_bill_is_genai_prices_to_the_cent(hosted: Hosted) -> None:
    then = dt.datetime.fromtimestamp(hosted.clock(), dt.UTC)  # some hosts' prices depend on the hour
    with hosted.open() as memory:
        replies = hosted.talk(memory.scope(user="ana"), 5)
        [line] = [line for line in memory.report().lines if line.verb == "chat"]
    vendor, name = hosted.priced
    priced = [
        calc_price(
            Priced(
                input_tokens=usage.input_tokens,
                cache_read_tokens=usage.cached_tokens,
                cache_write_tokens=usage.written_tokens,
                output_tokens=usage.output_tokens,
            ),
            model_ref=name,
            provider_id=vendor,
            genai_request_timestamp=then,
        ).total_price
        for usage in (reply.usage for reply in replies)
        if not usage.written_long_tokens
    ]
    if len(priced) == len(replies):
        assert line.money == pytest.approx(float(sum(priced)), abs=1e-9)
    assert line.saved_money is not None
    assert line.saved_money > 0


def test_what_the_user_forgets_leaves_the_next_request(hosted: Hosted) -> None:
    with hosted.open() as memory:
        ana = memory.scope(user="ana")
        ana.chat("My safe opens with the word xylophone.")
        hosted.talk(ana, 2)
        [secret] = [record for record in ana.list() if "xylophone" in record.text]
        ana.forget(secret.id)
        hosted.talk(ana, 1)
    assert "xylophone" in str(hosted.host.requests[1].body)
    assert "xylophone" not in str(hosted.host.requests[-1].body)


def test_no_scope_name_reaches_the_host(hosted: Hosted) -> None:
    with hosted.open() as memory:
        hosted.talk(memory.scope(tenant="acme-corp", user="zebedee"), 2)
    sent = str([(entry.body, dict(entry.headers)) for entry in hosted.host.requests])
    assert "zebedee" not in sent
    assert "acme-corp" not in sent


def test_a_spent_budget_sends_nothing(hosted: Hosted) -> None:
    with hosted.open() as memory:
        ana = memory.scope(user="ana")
        ana.budget(0.000_000_1)
        hosted.talk(ana, 1)
        with pytest.raises(BudgetExceeded):
            hosted.talk(ana, 1)
        assert len(hosted.host.requests) == 1
        assert len(ana.list()) == 2  # what was said before stays
        ana.budget(None)
        hosted.talk(ana, 1)


@pytest.mark.parametrize("cache", ["fixed", "off"])
def test_the_planner_can_be_left_out(hosted: Hosted, cache: str) -> None:
    with hosted.open(cache=cache) as memory:
        replies = hosted.talk(memory.scope(user="ana"), 4)
    marked = hosted.model in ("anthropic:claude-sonnet-5-5", "openai:gpt-6-sol")
    read = [reply.usage.cached_tokens > 1000 for reply in replies]
    assert read == ([False] * 4 if cache == "off" and marked else [False, True, True, True])


def test_a_prefix_is_filled_ahead_only_where_it_pays(hosted: Hosted) -> None:
    with hosted.open() as memory:
        ana = memory.scope(user="ana")
        hosted.talk(ana, 1)
        marked = hosted.model.startswith("anthropic") or hosted.model.endswith("6-sol")
        alone = ana.activation.prime(parallel=1)
        many = ana.activation.prime(parallel=8)
        assert alone.input_tokens == 0
        assert (many.input_tokens > 1000) == marked
        assert (ana.activation.warm_every(1200) is None) == (not hosted.model.startswith("anthropic"))


def test_what_the_user_knows_of_a_host_counts(tmp_path: Path) -> None:
    hosted = Hosted(tmp_path / "m", "anthropic:claude-sonnet-5-5")
    with hosted.host, hosted.open(rules={"anthropic:claude-sonnet-5-5": {"minimum": 50_000}}) as memory:
        replies = hosted.talk(memory, 3)
    assert [reply.usage.written_tokens for reply in replies] == [0, 0, 0]
    with pytest.raises(ConfigError, match="minimun"), hosted.open(rules={"anthropic:*": {"minimun": 1}}) as memory:
        memory.chat("hello")


def test_an_answer_by_a_schema_comes_parsed(hosted: Hosted) -> None:
    class Snack(BaseModel):
        name: str
        kcal: int

    hosted.host.reply = '{"name": "apple", "kcal": 52}'
    with hosted.open() as memory:
        if not memory._engine.chat_provider().capabilities.schemas:
            with pytest.raises(ConfigError, match="schema"):
                memory.chat("A snack, please.", schema=Snack)
            return
        reply = memory.chat("A snack, please.", schema=Snack)
        assert reply.parsed == Snack(name="apple", kcal=52)
        as_json = memory.chat("Another.", schema=Snack.model_json_schema())
        assert as_json.parsed == {"name": "apple", "kcal": 52}
        hosted.host.reply = "no JSON at all"
        assert memory.chat("And now?", schema=Snack).parsed is None
        with pytest.raises(InvalidInput):
            memory.chat("x", schema=7)  # type: ignore[call-overload]


def test_an_image_is_seen_in_its_turn_and_its_text_remembered(hosted: Hosted) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    with hosted.open() as memory:
        if not memory._engine.chat_provider().capabilities.images:
            with pytest.raises(ConfigError, match="images"):
                memory.chat({"role": "user", "content": parts})
            return
        memory.chat({"role": "user", "content": parts})
        memory.chat("And what was it?")
        assert [record.text for record in memory.list()][:1] == ["What is this?"]
        with pytest.raises(InvalidInput):
            memory.chat({"role": "user", "content": [{"type": "audio"}]})
    first, second = (str(entry.body) for entry in hosted.host.requests)
    assert PIXEL.split(",")[1] in first
    assert PIXEL.split(",")[1] not in second


def test_what_another_user_sent_is_expected_only_where_no_routing_key_parts_them(tmp_path: Path) -> None:
    for model, shared in (("anthropic:claude-sonnet-5-5", True), ("openai:gpt-6-sol", False)):
        hosted = Hosted(tmp_path / model.partition(":")[0], model)
        with hosted.host, hosted.open() as memory:
            hosted.talk(memory.scope(user="ana"), 3)
            [first] = hosted.talk(memory.scope(user="ben"), 1)
            assert (first.cache.expected_tokens > 0) is shared
            assert first.cache.reason is None
