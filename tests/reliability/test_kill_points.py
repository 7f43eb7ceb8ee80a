"""``kill -9`` at the named points of learning, promoting, publishing and forgetting, each by itself.

test_kill_training.py kills anywhere; here a process dies exactly between two steps that must not come apart.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from agentmem import Memory
from agentmem.loras import PUBLISHED
from tests.reliability.learner import FACTS, learning, memory_of

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))  # tests/ is no package

from servers.vllm_double import BASE, VllmDouble

pytestmark = pytest.mark.slow


def _die(*_: object, **__: object) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _killed(work: Callable[..., None], *given: Any) -> None:
    """Run ``work`` in a process of its own, which kills itself in the middle."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["agentmem", "tests.reliability.learner", "torch"])
    process = processes.Process(target=work, args=given)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


# ---- promoting


def _promote(folder: str, point: str) -> None:
    with learning(), memory_of(folder) as memory, mock.patch(point, _die):
        memory.scope(user="ana").parametric.train()


@pytest.mark.parametrize(
    "point",
    [
        "agentmem.parametric.folder.VersionFolder.publish",  # its files are written, under a private name
        "agentmem.parametric.registry.Registry.join",  # it is stored and acts nowhere
        "agentmem.parametric.registry.Registry._admit",  # in the middle of its activation
    ],
)
def test_until_it_is_promoted_the_old_version_answers_and_then_the_new_one_beside_it(
    point: str, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    with learning(), memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        ana.add(FACTS[0])
        old = ana.parametric.train().digest
        ana.add(FACTS[1])
    _killed(_promote, str(folder), point)
    with learning(), memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        assert [version.digest for version in ana.parametric.active()] == [old]
        assert memory.verify().problems == []
        new = ana.parametric.train().digest
        assert [version.digest for version in ana.parametric.active()] == [old, new]
        names = {path.name for path in (folder / "lora").iterdir() if not path.name.startswith(".lock")}
        assert names == {old, new}


# ---- remembering


def _chat(folder: str, model: str, point: str) -> None:
    with Memory(folder, model=f"local:{model}", embedder="none", page_tokens=16, core_tokens=0) as memory:
        ana = memory.scope(user="ana", session="s")
        ana.chat("What grows here?", recall=False, max_tokens=20)
        with mock.patch(point, _die):
            ana.chat("Plums would be nice, wouldn't they? Or rather quinces?", recall=False, max_tokens=20)


def test_pages_of_a_turn_that_dies_before_it_is_stored_go_once_it_must_be_over(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = tiny_model(tmp_path / "model", max_position_embeddings=2048)
    _killed(_chat, str(tmp_path / "m"), str(model), "agentmem.plaintext.records.Records.insert")
    ahead = 0.0
    settings: dict[str, Any] = {"embedder": "none", "page_tokens": 16, "core_tokens": 0}
    with Memory(tmp_path / "m", model=f"local:{model}", clock=lambda: time.time() + ahead, **settings) as memory:
        told = {record.id for record in memory.list()}
        assert len(told) == 2
        pages = memory._engine.pages
        whole = {entry.key for entry in pages.entries() if told.issuperset(entry.records)}
        assert len(pages.entries()) > len(whole) > 0, "the turn that died left no page"
        ahead = 4000.0
        memory.consolidate()
        assert whole <= {entry.key for entry in pages.entries()}
        assert all(told.issuperset(entry.records) for entry in pages.entries())
        assert memory.verify().problems == []


# ---- forgetting


def _forget(folder: str, point: str, record: str) -> None:
    with learning(), memory_of(folder) as memory, mock.patch(point, _die):
        memory.scope(user="ana").forget(record)


@pytest.mark.parametrize(
    ("point", "gone"),
    [
        ("agentmem.parametric.registry.deactivate", False),  # tainted and queued, not committed
        ("agentmem.plaintext.lineage.forget_links", False),
        ("agentmem.engine.Engine.finish_erasures", True),  # committed, its files are there
        ("agentmem.parametric.folder.VersionFolder.delete", True),
        ("agentmem.forgetting.withdraw", True),
    ],
)
def test_a_record_its_version_and_the_job_to_learn_again_go_together_or_not_at_all(
    point: str, gone: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    with learning(), memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        records = ana.add(list(FACTS[:3]))
        old = ana.parametric.train().digest
    _killed(_forget, str(folder), point, records[0].id)
    with learning(), memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        held = {record.id for record in ana.list()}
        active = [version.digest for version in ana.parametric.active()]
        waiting = [proof.retired for proof in ana.parametric.receipts()]
        assert (records[0].id in held, active, waiting) == ((False, [], [old]) if gone else (True, [old], []))
        assert (folder / "lora" / old).exists() == (not gone)
        assert memory.verify().problems == []
        if gone:
            [proof] = ana.parametric.retrain()
            assert proof.forgotten == (records[0].id,)
            assert [version.digest for version in ana.parametric.active()] == [proof.version]


# ---- learning again


def _retrain(folder: str, point: str) -> None:
    with learning(), memory_of(folder) as memory, mock.patch(point, _die):
        memory.scope(user="ana").parametric.retrain()


@pytest.mark.parametrize("point", ["agentmem.retraining._put", "agentmem.retraining._write"])
def test_a_shard_that_was_learnt_again_takes_its_place_and_its_receipt_at_once(point: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with learning(), memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        records = ana.add(list(FACTS[:3]))
        ana.parametric.train()
        ana.forget(records[0].id)
    _killed(_retrain, str(folder), point)
    with learning() as taught, memory_of(folder) as memory:
        ana = memory.scope(user="ana")
        assert ana.parametric.active() == ()
        assert [proof.state for proof in ana.parametric.receipts()] == ["queued"]
        [proof] = ana.parametric.retrain()
        assert taught == [], "it was stored already: only its promotion was lost"
        assert [version.digest for version in ana.parametric.active()] == [proof.version]


# ---- publishing


@pytest.fixture
def vllm() -> Iterator[VllmDouble]:
    with VllmDouble() as server:
        yield server


def _publish(folder: str, url: str, point: str, versions: list[str]) -> None:
    with _at(folder, url) as memory:
        if point == "told":
            provider: Any = memory._engine.provider
            tell = provider.publish_lora

            def told(name: str, file: Path) -> None:
                tell(name, file)
                _die()

            provider.publish_lora = told
            memory.parametric.publish(versions)
        with mock.patch(point, _die):
            memory.parametric.publish(versions)


def _at(folder: str | Path, url: str) -> Memory:
    table = {"base_url": f"{url}/v1", "max_retries": 0}
    return Memory(folder, model=f"vllm:{BASE}", embedder="none", providers={"vllm": table})


@pytest.mark.parametrize(
    ("point", "files", "loaded"),
    [
        ("agentmem.publishing._note", False, False),
        ("agentmem.publishing._written", False, False),
        ("agentmem.parametric.export.flush_folder", True, False),  # the sum's file is written
        ("told", True, True),  # the engine has it, and nobody heard
    ],
)
def test_a_version_is_at_no_engine_and_in_no_file_that_forgetting_does_not_know(
    point: str, files: bool, loaded: bool, vllm: VllmDouble, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    with learning(), memory_of(folder, lora_shard=1, lora_activated=False) as memory:
        records = memory.add(list(FACTS[:2]))
        memory.parametric.train()
        versions = [version.digest for version in memory.parametric.active()]
    _killed(_publish, str(folder), vllm.url, point, versions)
    given = folder / PUBLISHED
    assert bool(vllm.loaded) == loaded
    assert (given.is_dir() and any(given.iterdir())) == files
    with _at(folder, vllm.url) as memory:
        receipt = memory.forget(records[0].id)
        assert receipt.loras
        assert receipt.hosted == []
        assert vllm.loaded == {}
        assert not given.is_dir() or not any(given.iterdir())
        assert memory._engine.database.query("SELECT * FROM published") == []
