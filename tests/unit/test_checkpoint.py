"""The state of an interrupted run: whole, or passed over with a logged line."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import Full, TrainingError
from agentmem.parametric import checkpoint

TENSORS = {"weight.0": torch.arange(6.0).view(2, 3), "moment.0.step": torch.tensor(3.0)}
NOTE = {"losses": [1.5, 0.1], "moved": [float("inf")]}


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "state", "a", {"other": torch.zeros(1)}, {})
    checkpoint.save(tmp_path / "state", "a", TENSORS, NOTE)
    found = checkpoint.load(tmp_path / "state", "a")
    assert found is not None
    tensors, note = found
    assert note == NOTE
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in tensors.items())
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["run.safetensors"]
    checkpoint.clear(tmp_path / "state")
    assert checkpoint.load(tmp_path / "state", "a") is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_or_foreign_one_is_passed_over(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path / "state", "a", TENSORS, NOTE)
    file = tmp_path / "state" / "run.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    damaged: dict[str, bytes] = {"cut": bytes(content[:-9]), "flip": bytes(content), "empty": b"", "text": b"x" * 300}
    file.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING, logger="agentmem"):
        assert checkpoint.load(tmp_path / "state", "a") is None
    assert "damaged" in caplog.text
    checkpoint.save(tmp_path / "state", "a", TENSORS, NOTE)
    assert checkpoint.load(tmp_path / "state", "b") is None


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path / "state", "a", TENSORS, NOTE)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(Full):
        checkpoint.save(tmp_path / "state", "a", {}, {})
    found = checkpoint.load(tmp_path / "state", "a")
    assert found is not None
    assert found[1] == NOTE


def test_a_parent_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is gone"):
        checkpoint.save(tmp_path / "forgotten" / "state", "a", TENSORS, NOTE)
