"""What reaches a prompt of what is found: the best passage of a long text, when it was said; token vectors are used."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from agentmem import Memory, flows
from agentmem.flow import run
from agentmem.plaintext.embed import HashEmbedder
from agentmem.plaintext.encoded import Encoded
from agentmem.plaintext.passages import by_characters
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Scope

FILLER = ["The meeting about budgets took hours.", "Nobody agreed on the colour of chairs.", "Lunch was mild."]
NEEDLE = "The password of the old safe is heliotrope."
MINUTES = " ".join([*FILLER * 40, NEEDLE, *FILLER * 40])
QUESTION = "What is the password of the safe?"


class WithTokens(HashEmbedder):
    """Hashed words, each also as a token of its own."""

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        words = [text.split() for text in texts]
        spans = [[(text.index(word), text.index(word) + len(word)) for word in text.split()] for text in texts]
        return Encoded(self.embed(texts, query=query), [self.embed(each) for each in words], spans)

    async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        return self.encode(texts, query=query)

    def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:
        return by_characters(text)


def tokened() -> Any:
    return WithTokens()


@pytest.fixture(params=["none", "hash", "tokens"])
def model_and_memory(request: pytest.FixtureRequest) -> Iterator[tuple[ScriptedProvider, Memory]]:
    model = ScriptedProvider(lambda _: "Yes.")
    embedder = tokened() if request.param == "tokens" else request.param
    with Memory(":memory:", model=model, embedder=embedder) as memory:
        memory.add(MINUTES, source="minutes")
        memory.add(["I'm allergic to peanuts.", "My sister lives in Rome."])
        yield model, memory


def test_a_long_text_stands_in_the_context_by_its_best_passage(
    model_and_memory: tuple[ScriptedProvider, Memory],
) -> None:
    context = model_and_memory[1].context(QUESTION)
    assert NEEDLE in context.text
    assert context.hits[0].record.text == MINUTES
    assert 50 < context.tokens < 400
    assert "\u2026 " in context.text


def test_a_long_text_stands_in_the_prompt_by_its_best_passage(
    model_and_memory: tuple[ScriptedProvider, Memory],
) -> None:
    model, memory = model_and_memory
    reply = memory.chat(QUESTION)
    assert reply.recalled[0].record.text == MINUTES
    shown = "".join(message.content for part in model.requests[-1].segments for message in part.messages)
    assert NEEDLE in shown
    assert len(shown) < len(MINUTES) / 2


def test_every_passage_has_its_token_vectors_and_a_search_weighs_them() -> None:
    with Memory(":memory:", embedder=tokened()) as memory:
        memory.add(MINUTES)
        memory.add("My sister lives in Rome.")
        rows = memory._engine.database.query(
            "SELECT count(*), count(tokens.codes) FROM vectors LEFT JOIN tokens USING (space, seq, part)"
        )[0]
        assert rows[0] == rows[1] > 5
        [best, other] = memory.search(QUESTION, explain=True)
        assert NEEDLE in best.passage
        assert best.why["signal.tokens"] > other.why["signal.tokens"]
        assert np.isfinite(list(best.why.values())).all()


def test_a_recalled_line_says_when_it_was_said_or_since_when_it_holds() -> None:
    clock = FakeClock(dt.datetime(2026, 3, 1, 9, tzinfo=dt.UTC).timestamp())
    model = ScriptedProvider(lambda _: "Noted.")
    with Memory(":memory:", model=model, embedder="hash", clock=clock) as memory:
        memory.scope(session="one").chat("My flight to Oslo leaves tomorrow.")
        memory.scope(session="two").chat({"role": "user", "content": "I packed a red hat.", "at": "2026-02-02"})
        memory.add("Ana lives in Porto.", valid_from="2025-09-01")
        asked = ("When does the flight leave?", "Who packed a hat?", "Where does Ana live?")
        lines = "\n".join(memory.context(question).text for question in asked)
    assert '- 2026-03-01 user: "My flight to Oslo leaves tomorrow."' in lines
    assert '- 2026-02-02 user: "I packed a red hat."' in lines
    assert '- 2025-09-01 user: "Ana lives in Porto."' in lines


def test_what_the_model_reads_anyway_has_no_say_in_what_is_recalled() -> None:
    facts = ["My sister lives in Porto.", "I am allergic to peanuts.", "I run on Sundays."]
    said = ["Hi, where does the day go?", "Where does my sister live, I asked.", "My sister, my sister!"]
    with Memory(":memory:", embedder=tokened()) as alone, Memory(":memory:", embedder=tokened()) as talked:
        alone.add(facts)
        talked.add(facts)
        turns = talked.add(said)
        expected = alone.search("Where does my sister live?")
        engine = talked._engine
        ids = {turn.id for turn in turns}
        found = run(flows.search(engine, Scope(), "Where does my sister live?", without=ids))
        assert [(hit.record.text, hit.score) for hit in found] == [(hit.record.text, hit.score) for hit in expected]


def test_a_turn_that_only_tells_recalls_few_records_and_a_question_all_that_speak_for_it() -> None:
    model = ScriptedProvider(lambda _: "Nice.")
    with Memory(":memory:", model=model, embedder="hash", recall_k=6) as memory:
        ana = memory.scope(user="ana")
        ana.add([f"My dog Rex ate {food} in the park." for food in ("ham", "tofu", "rice", "figs", "corn", "kale")])
        asked = ana.chat("What did my dog Rex eat in the park?", remember=False)
        told = ana.chat("My dog Rex ate something in the park.", remember=False)
        assert len(asked.recalled) == 6
        assert 0 < len(told.recalled) <= 3
