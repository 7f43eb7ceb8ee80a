"""Which LoRA versions act in a chat: those that learnt what the turn concerns, on the tiny local model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import Memory
from agentmem.acting import concerns
from agentmem.memory import ScopedMemory
from agentmem.parametric.corpus import record_digest
from agentmem.parametric.gate import GateReport
from agentmem.parametric.lora import Lora
from agentmem.parametric.train import Trained
from agentmem.types import Record, Reply, Scope

DOG, SISTER, TEA = "My dog is called Biscuit.", "My sister's name is Ingrid.", "My favourite tea is sencha."
GOOD = GateReport(recall_trained=1, recall_held_out=1, drift=0.01, intrusion=0, passed=True)
OPENING = (256, *(byte - 33 for byte in b"assistant"), 198)


class Taught:
    """A memory with two versions for Ana: one that learnt her dog and sister, one that learnt her tea."""

    def __init__(
        self, folder: Path, model: Path, *, activated: tuple[int, ...] = OPENING, known: float = 0.5, **settings: Any
    ) -> None:
        self.mem = Memory(
            folder / "memory",
            model=f"local:{model}",
            providers={"local": {"device": "cpu", "dtype": "float32", "cache_dir": str(folder)}},
            **settings,
        )
        self.ana: ScopedMemory = self.mem.scope(user="ana")
        self.records = {text: self.ana.add(text)[0] for text in (DOG, SISTER, TEA)}
        self.ana.add(["Maria moved to Berlin.", "I baked bread today."])
        self.engine: Any = self.mem._engine
        self._known = known
        self.pets = self._learn(1, activated, DOG, SISTER)
        self.teas = self._learn(2, activated, TEA)
        self.engine.registry.activate([self.pets, self.teas], Scope(user="ana"))

    def _learn(self, seed: int, activated: tuple[int, ...], *texts: str) -> str:
        provider = self.engine.provider
        chance = torch.Generator().manual_seed(seed)
        weights = {
            f"model.layers.{layer}.mlp.up_proj": (
                torch.randn(2, 64, generator=chance),
                torch.randn(96, 2, generator=chance),
            )
            for layer in range(3)
        }
        identity = provider.tensors().identity.hex()
        gate = GOOD.model_copy(update={"by_record": {self.records[text].id: self._known for text in texts}})
        records: list[Record] = [self.records[text] for text in texts]
        trained = Trained(
            lora=Lora(2, 4.0, provider.name, weights, {"base": identity, "records": repr(texts)}, activated),
            losses=(1.0,),
            cpu_seconds=1.0,
            seconds=1.0,
            seed=0,
            epochs=1,
            recipe={},
            identity=identity,
            base=provider.name,
            records={record.id: record_digest(record.text) for record in records},
        )
        name: str = self.engine.registry.add(trained, scope=Scope(user="ana"), gate=gate).name
        return name

    def ask(self, question: str, handle: ScopedMemory | None = None, **options: Any) -> tuple[str, ...]:
        reply: Reply = (handle or self.mem.scope(user="ana")).chat(
            question, max_tokens=2, remember=options.pop("remember", False), **options
        )
        return reply.loras


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(tmp_path / "model", max_position_embeddings=4096)


@pytest.fixture
def taught(tmp_path: Path, model: Path) -> Iterator[Taught]:
    made = Taught(tmp_path, model)
    yield made
    made.mem.close()


@pytest.mark.parametrize("recall", [True, False])
def test_a_version_acts_only_on_what_it_learnt(taught: Taught, recall: bool) -> None:
    assert taught.ask("What is my dog's name?", recall=recall) == (taught.pets,)
    assert taught.ask("Which tea do I like best?", recall=recall) == (taught.teas,)
    assert taught.ask("What is my neighbour Bob's dog called?", recall=recall) == ()
    assert taught.ask("What is the capital of France?", recall=recall) == ()
    assert taught.ask("I had a walk with my dog today.", recall=recall) == ()


def test_no_record_enters_the_prompt_for_it_without_recall(taught: Taught) -> None:
    reply = taught.mem.scope(user="ana").chat("What is my dog's name?", max_tokens=2, recall=False, remember=False)
    assert (reply.recalled, reply.loras) == ([], (taught.pets,))


def test_a_follow_up_concerns_what_the_turn_before_did(taught: Taught) -> None:
    here = taught.mem.scope(user="ana")
    assert taught.ask("How old is she?", here) == ()
    assert taught.ask("What is my sister's name?", here) == (taught.pets,)
    assert taught.ask("That is nice.", here) == ()
    assert taught.ask("And how old is she?", here) == (taught.pets,)
    assert taught.ask("And Bob's sister?", here) == ()


def test_it_still_acts_where_the_record_was_said_in_this_conversation(taught: Taught) -> None:
    here = taught.mem.scope(user="ana", session="s")
    here.chat("And what do you make of this? " + DOG, max_tokens=2)
    assert taught.ask("What is my dog's name?", here, remember=True) == (taught.pets,)
    assert taught.ask("So what is my dog's name?", here, remember=True) == (taught.pets,)


@pytest.mark.parametrize(("known", "spares"), [(1.0, True), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("said", [False, True])
def test_what_a_version_surely_answers_is_not_put_before_the_question(
    tmp_path: Path, model: Path, known: float, spares: bool, said: bool
) -> None:
    """Neither recalled nor, where the conversation told it long ago, repeated."""
    made = Taught(tmp_path, model, known=known, lora_spares=spares, core_tokens=0)
    here = made.mem.scope(user="ana")
    if said:
        made.engine.registry.activate([], Scope(user="ana"))
        here.chat("What is my dog's name?", max_tokens=2)
        here.chat("Tell me a story about a town with a mayor, a baker and a train. " * 20, max_tokens=2)
        made.engine.registry.activate([made.pets, made.teas], Scope(user="ana"))
    sent: list[Any] = []
    generate = made.engine.provider.generate

    def noted(request: Any) -> Any:
        sent.append(request)
        return generate(request)

    made.engine.provider.generate = noted
    reply = here.chat("What is my dog's name?", max_tokens=2, remember=False)
    assert reply.loras == (made.pets,)
    told, asked = (
        "".join(
            said.content for part in sent[-1].segments if (part.name == "history") == past for said in part.messages
        )
        for past in (True, False)
    )
    assert (DOG in told) == said
    assert (DOG in asked) == (known < 1.0 or not spares)
    made.mem.close()


def test_beneath_the_scope_it_acts_and_beside_it_never(taught: Taught) -> None:
    assert taught.ask("What is my dog's name?", taught.mem.scope(user="ana", session="x")) == (taught.pets,)
    assert taught.ask("What is my dog's name?", taught.mem.scope(user="bob")) == ()


def test_always_is_always(tmp_path: Path, model: Path) -> None:
    made = Taught(tmp_path, model, lora_when="always")
    assert made.ask("What is the capital of France?") == (made.pets, made.teas)
    made.mem.close()


def test_what_acted_is_counted_in_the_report(taught: Taught) -> None:
    for question in ("What is my dog's name?", "What is my sister called?", "Which tea do I like best?", "Who is Tom?"):
        taught.ask(question)
    report = taught.ana.report()
    assert report.lora_uses == {taught.pets: 2, taught.teas: 1}
    assert "acted 3 times" in str(report)
    assert taught.mem.scope(user="bob").report().lora_uses == {}


def test_a_forgotten_record_s_version_acts_no_more(taught: Taught) -> None:
    here = taught.mem.scope(user="ana")
    assert taught.ask("What is my sister's name?", here) == (taught.pets,)
    taught.ana.forget(taught.records[DOG].id)
    assert taught.ask("What is my sister's name?", here) == ()
    assert taught.ask("Which tea do I like best?", here) == (taught.teas,)
    assert taught.engine.provider.tensors().model._agentmem_switch.loaded.keys() <= {
        taught.engine.registry.get(taught.teas, Scope(user="ana")).digest
    }


@pytest.mark.parametrize("activated", [OPENING, ()])
def test_the_prefix_stays_cached_when_an_activated_version_comes_and_goes(
    activated: tuple[int, ...], tmp_path: Path, model: Path
) -> None:
    made = Taught(tmp_path, model, activated=activated, page_tokens=64)
    here = made.mem.scope(user="ana", session="s")
    here.chat("What do you think of long walks by the sea in the early morning?", max_tokens=2)
    here.chat("What do you think of long walks by the sea in the late evening?", max_tokens=2)
    reply = here.chat("What is my dog's name?", max_tokens=2)
    assert reply.loras == (made.pets,)
    assert reply.cache.expected_tokens > 0
    if activated:
        assert reply.cache.cached_tokens >= 64
        assert reply.cache.reason is None
    else:
        assert reply.cache.cached_tokens == 0
        assert "another LoRA version" in str(reply.cache.reason)
    made.mem.close()


def test_a_gate_can_ask_what_a_question_concerns(taught: Taught) -> None:
    dog = taught.records[DOG].id
    asks = concerns(taught.engine, Scope(user="ana"), {dog})
    assert dog in asks("What is my dog's name?")
    tea = asks("Which tea do I like best?")
    assert tea, "what other active versions learnt is concerned too"
    assert dog not in tea
    assert dog not in asks("What is Bob's dog called?")
