"""Long work shows where it stands in a terminal, and stays silent in a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("learning") as moved:
        assert moved is None
    assert capsys.readouterr() == ("", "")


def test_embedding_again_shows_a_bar_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Memory(tmp_path / "m", embedder="none") as memory:
        memory.add([f"fact {n}" for n in range(600)])
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Memory(tmp_path / "m", embedder="hash") as memory:
        assert memory.plaintext.embed() == 600
        assert memory.verify().ok
    assert "embedding" in terminal.getvalue()
