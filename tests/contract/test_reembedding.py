"""A change of embedder: the old vectors answer until all is embedded again, and the folder turns over at once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from agentmem import AsyncMemory, Memory
from agentmem.errors import Incompatible
from agentmem.plaintext.encoders import HashEmbedder


class Other(HashEmbedder):
    """Another embedder, which can't be loaded by its name."""

    def __init__(self, dimension: int = 64) -> None:
        super().__init__(dimension)
        self.name = "other"
        self.digest = f"{7:064x}"
        self.texts: list[str] = []
        self.fail_after = 1 << 30

    def encode(self, texts: Any, *, query: bool = False) -> Any:
        if len(self.texts) >= self.fail_after:
            raise KeyboardInterrupt
        self.texts += list(texts)
        return super().encode(texts, query=query)


def spaces(memory: Memory) -> dict[str, int]:
    rows = memory._engine.database.query(
        "SELECT name, count(vectors.seq) AS held FROM spaces LEFT JOIN vectors ON space = spaces.id GROUP BY name"
    )
    return {row["name"]: row["held"] for row in rows}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Memory(tmp_path / "memory", embedder="hash") as memory:
        memory.add([f"number {n} is about tea" for n in range(300)])
    return tmp_path / "memory"


def test_the_old_embedder_serves_until_all_is_embedded_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = Other()
    with caplog.at_level(logging.WARNING), Memory(folder, embedder=other) as memory:
        memory.add("number 300 is about coffee")
        assert memory._engine.embedder is not other
        assert other.texts == []
        assert spaces(memory) == {"hash": 301}
        assert "reembed()" in caplog.text
        assert memory.plaintext.reembed() == 301
        assert memory._engine.embedder is other
        assert spaces(memory) == {"hash": 0, "other": 301}
        memory.add("number 301 is about milk")
        assert spaces(memory)["other"] == 302
        assert memory.plaintext.reembed() == 0
        assert memory.verify().ok


def test_interrupted_it_goes_on_where_it_stopped(folder: Path) -> None:
    other = Other()
    other.fail_after = 1
    with Memory(folder, embedder=other) as memory, pytest.raises(KeyboardInterrupt):
        memory.plaintext.reembed()
    again = Other()
    with Memory(folder, embedder=again) as memory:
        assert memory._engine.embedder is not again
        assert spaces(memory) == {"hash": 300, "other": 256}
        assert memory.plaintext.reembed() == 44
        assert len(again.texts) == 44


def test_a_process_with_the_old_setting_turns_over_too(folder: Path) -> None:
    with Memory(folder, embedder=Other()) as old, Memory(folder, embedder="hash") as new:
        # The other way round: what can't be loaded by name is what the folder turns to.
        old.plaintext.reembed()
        assert spaces(old) == {"hash": 0, "other": 300}
        new.add("one more")
        old.add("and another")
        assert spaces(old)["other"] >= 301
    with Memory(folder, embedder="hash") as memory:
        assert memory.plaintext.embed() >= 0
        assert memory.verify().ok


def test_both_processes_follow_where_both_can_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem.plaintext import embed

    loaded = embed.load
    monkeypatch.setattr(embed, "load", lambda name, providers: Other() if name == "other" else loaded(name, providers))
    with Memory(folder, embedder="other") as one, Memory(folder, embedder="hash") as two:
        two.add("in the old space")
        one.plaintext.reembed()
        two.add("in the new space")
        assert spaces(two) == {"hash": 0, "other": 302}
        assert two._engine.space == one._engine.space


def test_an_embedder_that_is_gone_is_replaced_at_the_next_search(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder=Other()) as memory:
        memory.add("tea")
    with Memory(tmp_path, embedder="hash") as memory:
        assert memory.plaintext.embed() == 1
        assert spaces(memory) == {"other": 1, "hash": 1}


def test_where_it_is_refused_nothing_changes(folder: Path) -> None:
    with Memory(folder, embedder=Other(), reembed=False) as memory, pytest.raises(Incompatible, match="hash"):
        memory.add("x")


async def test_the_async_face_reembeds(folder: Path) -> None:
    async with AsyncMemory(folder, embedder=Other()) as memory:
        assert await memory.plaintext.reembed() == 300
