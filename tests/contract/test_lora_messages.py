"""What a user reads about LoRA versions: counts, names, reasons; and one that was judged for less is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.errors import InvalidInput, NotFound, TrainingError
from tests.reliability.learner import FACTS, learning, memory_of


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with learning(), memory_of(tmp_path / "m") as memory:
        yield memory


def test_what_was_judged_for_acting_when_recalled_does_not_act_always(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with learning(intrusion=0.5) as taught:
        with memory_of(tmp_path / "m") as memory:
            records = memory.scope(user="ana").add(list(FACTS))
            version = memory.scope(user="ana").parametric.train()
            assert version.active
        with memory_of(tmp_path / "m", lora_when="always") as memory:
            ana = memory.scope(user="ana")
            assert ana.chat("Hello there", remember=False).loras == ()
            assert "intrusion into unrelated and neighbour questions is 50.0%" in caplog.text
            ana.parametric.train(records=records)
            assert len(taught) == 2  # what is stored was judged for less: it is not given again


def test_what_passes_without_a_filter_acts_always(tmp_path: Path) -> None:
    with learning():
        with memory_of(tmp_path / "m") as memory:
            memory.scope(user="ana").add(list(FACTS))
            memory.scope(user="ana").parametric.train()
        with memory_of(tmp_path / "m", lora_when="always") as memory:
            assert len(memory.scope(user="ana").chat("Hello there", remember=False).loras) == 1


def test_one_that_was_forced_acts_always(tmp_path: Path) -> None:
    with learning(intrusion=0.5, passes=lambda corpus: False), memory_of(tmp_path / "m", lora_when="always") as memory:
        ana = memory.scope(user="ana")
        ana.add(list(FACTS))
        ana.parametric.activate(ana.parametric.train(), force=True)
        assert len(ana.chat("Hello there", remember=False).loras) == 1


def test_a_retired_version_is_no_sound_version_and_can_not_be_exported(memory: Memory, tmp_path: Path) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS))
    version = ana.parametric.train()
    assert memory.verify().loras == 1
    ana.forget(records[0].id)
    assert memory.verify().loras == 0
    with pytest.raises(TrainingError, match="is retired, a record it learnt is gone"):
        ana.parametric.export(version, tmp_path / "out")
    [waiting] = ana.parametric.receipts()
    assert str(waiting) == f"{version.name} is retired and waits for retrain(), without 1 records"


def test_versions_are_named_in_errors(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    ana.add(list(FACTS))
    version = ana.parametric.train()
    with pytest.raises(NotFound, match=f"^{version.name} was not published$"):
        ana.parametric.unpublish(version)
    with pytest.raises(InvalidInput, match="the LoRA version is '': give a version, its name or its digest"):
        ana.parametric.activate("")


def test_what_nobody_trusts_is_not_learnt_unless_somebody_approves(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [trusted] = ana.add([FACTS[0]])
    [page] = ana.add([FACTS[1]], source="https://example.org", trust="untrusted")
    version = ana.parametric.train(records=[trusted, page])
    assert version.records == (trusted.id,)
    assert [record for record, _ in version.left_out] == [page.id]
    assert ana.parametric.train(records=[page], approve=[page]).records == (page.id,)
