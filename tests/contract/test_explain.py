"""What ``explain`` says of a record, and what a reply says of its prompt, against what was done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentmem import AsyncMemory, InvalidInput, Memory, NotFound, economics, planning
from agentmem.errors import Locked
from agentmem.ledger.record_uses import RecordUses
from agentmem.provider import Capabilities
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import CacheUse, Hit, Record, Reply, TurnFacts, Usage


def memory(**settings: Any) -> Memory:
    return Memory(":memory:", model=ScriptedProvider(), embedder="hash", clock=FakeClock(), **settings)


def test_a_record_that_nobody_used_lives_in_the_plain_and_cost_nothing() -> None:
    with memory() as mem:
        [record] = mem.scope(user="ana").add("My dog is called Biscuit.")
        found = mem.explain(record)
        assert [place.kind for place in found.places] == ["plaintext"]
        assert (found.uses.shown, found.uses.recalled, found.uses.used) == (0, 0, 0)
        assert found.cost == 0
        assert found.verdict is not None
        assert found.verdict.now == "plain"
        assert found.costs
        text = str(found)
        assert "lives in\n  plaintext: user='ana', version 1" in text
        assert "shown to a model 0 times" in text


def test_uses_are_counted_as_they_happen() -> None:
    with memory() as mem:
        ana = mem.scope(user="ana")
        [record] = ana.add("My dog Biscuit sleeps on the sofa.")
        recalled = 0
        for _ in range(3):
            reply = ana.scope(session=f"s{recalled}").chat("Where does my dog Biscuit sleep?")
            recalled += record.id in [hit.record.id for hit in reply.recalled]
        assert recalled == 3
        uses = ana.explain(record.id).uses
        assert uses.requests == 3
        assert uses.shown == 3
        assert uses.recalled + uses.used >= 3
        assert uses.tokens > 0 or uses.used == 3
        assert uses.models == ("scripted:test",)
        later = ana.explain(record.id)
        assert later.cost is not None
        assert later.cost > 0


def test_turns_folded_away_are_told_as_the_beginning_of_the_history_moves() -> None:
    own = Capabilities(chat=True, kv="tensors", context_tokens=1024, exact_tokens=True)
    with Memory(":memory:", model=ScriptedProvider(capabilities=own), embedder="hash", clock=FakeClock()) as mem:
        ana = mem.scope(user="ana")
        told: list[tuple[str | None, int]] = []
        for number in range(90):
            facts = ana.chat(f"This is what I say in turn {number}, and it goes on for some more words.").facts
            assert facts is not None
            told.append((facts.start, facts.folded))
            if facts.start is not None:
                session = ana._conversation.session
                assert facts.folded == mem._engine.records.count_turns(session, before=facts.start)
        assert len(set(told)) > 3, "it never moved"
        assert told[-1][1] > 20


def test_what_it_cost_is_reckoned_from_what_was_computed_and_what_was_read() -> None:
    uses = RecordUses(shown=10, recalled=4, recalled_tokens=48)
    assert uses.tokens == 12
    cost, saved = uses.paid(uses.tokens, prefill=2.0, cached=0.5)
    assert cost == 48 * 2.0 + 6 * 12 * 0.5
    assert saved == 6 * 12 * 1.5
    assert RecordUses().paid(12, 2.0, 0.5) == (0, 0)


def test_a_core_is_named_with_its_scope_and_never_a_sibling_s() -> None:
    with memory() as mem:
        ana, ben = mem.scope(user="ana"), mem.scope(user="ben")
        [shared] = mem.add("The office closes at six.")
        with mem._engine.database.write() as connection:
            for user in ("ana", "ben"):
                connection.execute("INSERT INTO lineage VALUES ('core', ?, ?)", (f'["", "{user}", "", ""]', shared.id))
        assert [place.name for place in ana.explain(shared).places if place.kind == "core"] == ["user='ana'"]
        assert [place.name for place in ben.explain(shared).places if place.kind == "core"] == ["user='ben'"]
        assert len([place for place in mem.explain(shared).places if place.kind == "core"]) == 2


def test_lineage_of_texts_is_told_within_the_scope() -> None:
    with memory() as mem:
        ana = mem.scope(user="ana")
        said, fact = ana.add(["We moved to Porto in May, my sister too.", "Ana lives in Porto."])
        from agentmem.plaintext.lineage import link

        with mem._engine.database.write() as connection:
            link(connection, "record", [(fact.id, said.id)])
        assert ana.explain(fact).sources == (said.id,)
        assert ana.explain(said).derived == (fact.id,)
        assert f"written from {said.id}" in str(ana.explain(fact))


def test_what_can_not_be_seen_is_not_explained() -> None:
    with memory() as mem:
        [record] = mem.scope(user="ana").add("My dog is called Biscuit.")
        for unseen in (record.id, record, "nobody"):
            with pytest.raises(NotFound):
                mem.scope(user="ben").explain(unseen)
        for wrong in (None, 3, ["x"]):
            with pytest.raises(InvalidInput):
                mem.explain(wrong)  # type: ignore[arg-type]
        assert mem.explain(Hit(record=record, score=0.5)).record == record


def test_without_a_model_it_says_where_and_not_what_it_costs() -> None:
    with Memory(":memory:", embedder="none") as mem:
        [record] = mem.add("My dog is called Biscuit.")
        found = mem.explain(record)
        assert found.verdict is None
        assert found.cost is None
        assert "shown to a model 0 times" in str(found)


async def test_the_asynchronous_face_says_the_same() -> None:
    async with AsyncMemory(":memory:", model=ScriptedProvider(), embedder="none") as mem:
        [record] = await mem.add("My dog is called Biscuit.")
        assert (await mem.explain(record)).record == record


def test_pages_of_a_model_of_this_machine_are_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = f"local:{tiny_model(tmp_path / 'tiny')}"
    with Memory(tmp_path / "m", model=model, embedder="hash", page_tokens=16) as mem:
        ana = mem.scope(user="ana")
        first = ana.chat("My dog Biscuit sleeps on the sofa, every night.", max_tokens=4)
        ana.chat("And in the day?", max_tokens=4)
        found = ana.explain(first.records[0])
        [pages] = [place for place in found.places if place.kind == "pages"]
        assert pages.bytes == sum(
            entry.bytes for entry in ana.activation.entries() if first.records[0] in entry.records
        )
        assert found.unit == "seconds"
        assert found.saved is not None
        assert found.saved > 0  # in the second turn it was history, read from its pages


def test_lora_versions_that_learnt_it_are_told(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = f"local:{tiny_model(tmp_path / 'tiny')}"
    with Memory(tmp_path / "m", model=model, embedder="hash") as mem:
        ana = mem.scope(user="ana")
        [record] = ana.add("My dog is called Biscuit.")
        version = ana.parametric.train(epochs=1)
        [place] = [place for place in ana.explain(record).places if place.kind == "lora"]
        assert (place.name, place.bytes, place.active) == (version.name, version.bytes, False)
        assert "gate failed" in place.note  # random weights learn nothing in a step
        ana.parametric.activate(version, force=True)
        ana.chat("What is my dog called?", max_tokens=2)
        found = ana.explain(record)
        assert next(place for place in found.places if place.kind == "lora").active
        assert found.uses.answered == 1
        assert found.verdict is not None
        assert found.verdict.now == "lora"
        ana.update(record.id, text="My dog is called Rex.")
        assert not [place for place in ana.explain(record.id).places if place.kind == "lora"]


# ---- replies ---------------------------------------------------------------------------------------------------------


def test_a_reply_explains_itself() -> None:
    facts = TurnFacts(
        system_tokens=1500,
        core_tokens=200,
        history_tokens=3000,
        recalled_tokens=40,
        message_tokens=12,
        core=("a", "b"),
        used=("a",),
        folded=7,
        kept=True,
        decided="the core stands: 0.1 of 2 carried",
        unit="dollars",
        cost=0.001,
        bare=0.01,
    )
    hit = Hit(record=Record(id="r1", text="My dog is called Biscuit."), score=0.9, why={"words": 1.5, "meaning": -0.25})
    reply = Reply(
        text="Biscuit.",
        model="openai:m",
        usage=Usage(input_tokens=4752, cached_tokens=4700, total_s=1.0),
        cache=CacheUse(kind="auto", expected_tokens=4700, cached_tokens=4700),
        recalled=[hit],
        loras=("lora-abc",),
        facts=facts,
    )
    text = reply.explain()
    for told in (
        "openai:m: 4752 tokens in (4700 cached",
        "core 200 (2 records, 1 of them named by the search)",
        "history 3000 (7 turns folded away)",
        "recalled 40 (stays in the history)",
        "the prompt cost $0.001, $0.01 with nothing cached",
        "the core stands",
        "cache (auto): 4700 tokens cached, 4700 expected",
        "answered with lora-abc",
        "recalled 0.90 [r1] 'My dog is called Biscuit.' (words +1.50, meaning -0.25)",
    ):
        assert told in text
    assert str(reply) == "Biscuit."


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "can not be read"])
def test_a_stored_turn_keeps_its_reply_where_it_can_not_be_told_what_it_was_made_of(
    closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Memory(tmp_path, model=ScriptedProvider(lambda _: "Hello Ana."), embedder="hash") as mem:
        real = planning.explained

        def interrupted(engine: Any, *given: Any, **more: Any) -> Any:
            if closed:
                engine.database.close()
            else:
                monkeypatch.setattr(economics, "costs", locked)
            return real(engine, *given, **more)

        def locked(_: Any) -> Any:
            raise Locked("memory.db is locked")

        monkeypatch.setattr(planning, "explained", interrupted)
        reply = mem.scope(user="ana").chat("Hello, I am Ana.")
    assert (reply.text, reply.facts) == ("Hello Ana.", None)
    assert "could not be told" in caplog.text
    with Memory(tmp_path, embedder="hash") as mem:
        assert {record.id for record in mem.scope(user="ana").list()} == set(reply.records)


def test_a_chat_fills_in_what_its_request_was_made_of() -> None:
    with memory() as mem:
        ana = mem.scope(user="ana")
        ana.add("My dog Biscuit sleeps on the sofa.")
        ana.chat("Hello, I am Ana.")
        reply = ana.chat("Where does my dog Biscuit sleep?", system="You are kind.")
        facts = reply.facts
        assert facts is not None
        parts = facts.system_tokens + facts.core_tokens + facts.history_tokens
        assert facts.system_tokens > 0
        assert facts.message_tokens > 0
        assert facts.recalled_tokens > 0 or facts.core
        assert abs(parts + facts.recalled_tokens + facts.message_tokens - reply.usage.input_tokens) < 60
        assert facts.cost is None or facts.bare is None or facts.cost <= facts.bare * 1.5
        assert "cache (" in reply.explain()
