"""``scope.parametric.distil``: from a scope's core block to answers behind a trained prefix, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory
from agentmem.errors import ConfigError, InvalidInput, NotFound, TrainingError
from agentmem.parametric import prefix as distilled
from agentmem.parametric import prefix_gate

FACTS = tuple(
    f"My {thing} is called {name}."
    for thing, name in (
        *(("dog", "Biscuit"), ("cat", "Quill"), ("boat", "Morgenstern"), ("brother", "Anselm"), ("sister", "Ottilie")),
        *(("dentist", "Okonkwo"), ("doctor", "Halvorsen"), ("landlord", "Pettigrew"), ("gym", "Ironwood")),
        *(("bank", "Nordlys"), ("mother", "Rosalind"), ("daughter", "Ingrid"), ("horse", "Nutmeg")),
        *(("band", "Larkspur"), ("neighbour", "Fatima"), ("accountant", "Yusuf"), ("school", "Hollin")),
        ("cafe", "Kobo"),
    )
)  # fmt: skip


@pytest.fixture
def tiny(tiny_model: Callable[..., Path], tmp_path: Path) -> Iterator[Memory]:
    folder = tiny_model(tmp_path / "model", max_position_embeddings=8192)
    settings = {"device": "cpu", "dtype": "float32", "cache_dir": str(tmp_path / "cache")}
    with Memory(tmp_path / "memory", model=f"local:{folder}", embedder="hash", providers={"local": settings}) as memory:
        yield memory


def quick(monkeypatch: pytest.MonkeyPatch, gap: float = 100) -> None:
    recipe = distilled.PrefixRecipe(epochs=0.1, batch=4, general=1, least_steps=2, answer_tokens=2)
    monkeypatch.setattr(distilled, "RECIPE", recipe)
    monkeypatch.setattr(prefix_gate, "LIMITS", prefix_gate.PrefixThresholds(gap=gap, kl=100, lost=100))


def test_a_scope_without_a_core_block_has_nothing_to_distil(tiny: Memory) -> None:
    with pytest.raises(InvalidInput, match="no core block"):
        tiny.scope(user="ana").parametric.distil()


@pytest.mark.parametrize(("tokens", "why"), [(0, "multiple of 16"), (17, "multiple of 16"), (4096, "saves too little")])
def test_a_length_that_can_not_be_is_refused_before_any_work(tokens: int, why: str, tiny: Memory) -> None:
    ana = tiny.scope(user="ana")
    ana.add(list(FACTS[:9]))
    with pytest.raises(InvalidInput, match=why):
        ana.parametric.distil(tokens=tokens)


def test_it_needs_weights_and_room_for_pages(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    with Memory(tmp_path / "hosted", model="ollama:none", embedder="hash") as memory:
        memory.add(list(FACTS))
        with pytest.raises(ConfigError, match="model='local'"):
            memory.parametric.distil()
    folder = tiny_model(tmp_path / "model")
    with (
        Memory(tmp_path / "local", model=f"local:{folder}", embedder="hash", page_budget=0) as memory,
        pytest.raises(ConfigError, match="page_budget"),
    ):
        memory.parametric.distil()


def test_one_that_fails_its_gate_is_not_kept(tiny: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch, gap=-100)
    ana = tiny.scope(user="ana")
    ana.add(list(FACTS[:9]))
    made = ana.parametric.distil()
    assert not made.gate.passed
    assert not made.digest
    assert ana.parametric.prefixes() == []
    assert ana.activation.entries() == []


def served(scope: Any, **options: Any) -> Any:
    """What was attended to of a trained prefix; None where none stood for the head."""
    attended = scope.chat("What is my dog called?", remember=False, **options).cache.attended
    return attended if attended is not None and attended.trained_tokens else None


def test_it_answers_until_its_core_changes_or_it_is_dropped_or_forgotten(
    tiny: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    ana = tiny.scope(user="ana")
    records = ana.add(list(FACTS[:9]))
    made = ana.parametric.distil(tokens=32)
    assert made.gate.passed
    assert ana.parametric.prefixes() == [made]
    assert tiny.scope(user="bo").parametric.prefixes() == []
    assert sorted(made.records) == sorted(record.id for record in records)
    assert made.stands_for > 3 * made.tokens
    found = served(ana)
    assert (found.trained_tokens, found.stands_for) == (32, made.stands_for)
    assert served(tiny.scope(user="bo")) is None
    assert served(ana, system="Be brief.") is None
    assert tiny.verify().ok
    ana.parametric.drop_prefix(made.name)
    assert served(ana) is None
    with pytest.raises(NotFound, match=made.digest):
        ana.parametric.drop_prefix(made)
    again = ana.parametric.distil(tokens=32)
    assert again.digest == made.digest
    receipt = ana.forget(records[0].id)
    assert len(receipt.pages) >= 2
    assert ana.parametric.prefixes() == []
    assert served(ana) is None
    assert tiny._engine.database.query("SELECT key FROM meta WHERE key LIKE 'trained prefix%'") == []


def test_a_question_of_the_user_that_was_trained_takes_it_along_when_it_is_forgotten(
    tiny: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    ana = tiny.scope(user="ana")
    records = ana.add(list(FACTS[:9]))
    turn = ana.chat("Remind me, what is the name of my dog, the puppy?", max_tokens=2).records
    ana.update(turn[-1], text="Your dog is called Biscuit.")
    made = ana.parametric.distil(tokens=32)
    assert turn[0] in made.records
    assert {record.id for record in records} & set(made.records)
    ana.forget(turn[0])
    assert ana.parametric.prefixes() == []


def test_a_record_that_is_forgotten_while_it_is_distilled_is_not_kept(
    tiny: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    ana = tiny.scope(user="ana")
    records = ana.add(list(FACTS[:9]))
    judge = prefix_gate.judge

    def forget(*given: Any, **named: Any) -> Any:
        ana.forget(records[0].id)
        return judge(*given, **named)

    monkeypatch.setattr(prefix_gate, "judge", forget)
    assert ana.parametric.distil(tokens=32).digest == ""
    assert ana.parametric.prefixes() == []
    assert tiny._engine.database.query("SELECT key FROM meta WHERE key LIKE 'trained prefix%'") == []
    assert ana.activation.entries() == []


def test_an_interrupted_run_keeps_nothing(tiny: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    ana = tiny.scope(user="ana")
    ana.add(list(FACTS[:9]))
    monkeypatch.setattr(distilled._Run, "_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ana.parametric.distil(tokens=32)
    assert ana.parametric.prefixes() == []
    assert served(ana) is None


def test_a_model_with_windows_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", "mistral", max_position_embeddings=8192)
    with Memory(tmp_path / "memory", model=f"local:{folder}", embedder="hash") as memory:
        memory.add(list(FACTS[:9]))
        with pytest.raises(TrainingError, match="see every position"):
            memory.parametric.distil()


@pytest.mark.slow
def test_the_default_model_answers_behind_a_third_of_its_core_block(tmp_path: Path) -> None:
    local = {"local": {"threads": 1}}
    with Memory(tmp_path / "memory", model="local", embedder="hash", page_tokens=128, providers=local) as memory:
        ana = memory.scope(user="ana")
        ana.add(list(FACTS))
        made = ana.parametric.distil(tokens=80)
        assert made.gate.passed, str(made)
        assert 3 * made.tokens <= made.stands_for
        assert made.gate.ll_trained > made.gate.ll_truncated
        reply = ana.chat("What is my dog called?", remember=False)
        assert reply.cache.attended is not None
        assert reply.cache.attended.trained_tokens == made.tokens
        assert reply.usage.cached_tokens == made.stands_for
