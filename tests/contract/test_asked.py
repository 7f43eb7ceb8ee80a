"""Past questions of a user as wordings of what they asked for, from chats over a scripted provider."""

from __future__ import annotations

import pytest

from agentmem import Memory
from agentmem.asked import questions
from agentmem.parametric.corpus import build
from agentmem.provider import Request
from agentmem.testing import ScriptedProvider
from agentmem.types import Record, Scope

ANSWERS = {
    "for a living": "You work as a glass blower.",
    "my dog": "It is Biscuit, your dog.",
    "weather": "Sunny, I think.",
    "my trade": "Nothing that I know of.",
}


def answer(request: Request) -> str:
    asked = request.segments[-1].messages[-1].content
    return next((said for part, said in ANSWERS.items() if part in asked), "I see.")


@pytest.fixture
def memory() -> Memory:
    return Memory(":memory:", model=ScriptedProvider(answer), embedder="hash")


def asked_of(memory: Memory, records: list[Record], user: str = "ana") -> dict[str, list[str]]:
    found = questions(memory._engine, Scope(user=user), records)
    return {id_: [record.text for record in of] for id_, of in found.items()}


def test_a_question_whose_reply_said_what_the_record_says_is_one_of_its_wordings(memory: Memory) -> None:
    with memory:
        ana = memory.scope(user="ana")
        job, dog = ana.add("I work as a glass blower.") + ana.add("My dog is called Biscuit.")
        for said in ("What work do I do for a living?", "Is the weather good?", "And how is my dog called?"):
            ana.chat(said)
        found = asked_of(memory, [job, dog])
        assert found[job.id] == ["What work do I do for a living?"]
        assert found.get(dog.id) == ["And how is my dog called?"]


def test_what_was_answered_with_something_else_is_not(memory: Memory) -> None:
    with memory:
        ana = memory.scope(user="ana")
        [job] = ana.add("I work as a glass blower.")
        ana.chat("What is my trade?")
        assert asked_of(memory, [job]) == {}


def test_what_others_asked_stays_theirs(memory: Memory) -> None:
    with memory:
        [job] = memory.add("I work as a glass blower.")
        memory.scope(user="bo").chat("What work do I do for a living?")
        assert asked_of(memory, [job]) == {}
        assert asked_of(memory, [job], user="bo") == {job.id: ["What work do I do for a living?"]}


def test_a_forgotten_question_is_gone(memory: Memory) -> None:
    with memory:
        ana = memory.scope(user="ana")
        [job] = ana.add("I work as a glass blower.")
        reply = ana.chat("What work do I do for a living?")
        ana.forget(reply.records[0])
        assert asked_of(memory, [job]) == {}


def test_they_become_training_examples(memory: Memory) -> None:
    with memory:
        ana = memory.scope(user="ana")
        [job] = ana.add("I work as a glass blower.")
        reply = ana.chat("Tell me, what work do I do for a living these days?")
        corpus = build([job], asked=questions(memory._engine, Scope(user="ana"), [job]))
        assert "Tell me, what work do I do for a living these days?" in {
            example.question for example in corpus.examples
        }
        assert set(corpus.records) == {job.id, reply.records[0]}
