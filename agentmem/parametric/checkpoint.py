"""The state of an interrupted run on the disk: one file, written whole or not at all, read only by the run it is of.

Knows tensors, a JSON note and a key; knows nothing of training. safetensors, never pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import TrainingError

from .lora import disk_error, flush_folder, write_file

if TYPE_CHECKING:
    import torch

__all__ = ["clear", "load", "save"]

_FILE = "run.safetensors"
_log = logging.getLogger("agentmem")


def save(folder: Path, key: str, tensors: Mapping[str, torch.Tensor], note: Mapping[str, Any]) -> None:
    """Put the state of the run ``key`` in the place of what ``folder`` held before, flushed to the disk.

    ``folder`` is made if its parent exists; a parent that is gone (what was being learnt was forgotten) is a
    `TrainingError`. `Full` for a full disk: the state before is intact.
    """
    from safetensors.torch import save as written

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(note)
    content = written(plain, {"key": key, "note": text, "sha256": _digest(plain, text)})
    fresh = folder / f"{_FILE}.new"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_file(fresh, content)
        os.replace(fresh, folder / _FILE)
        flush_folder(folder)
    except FileNotFoundError as error:
        raise TrainingError(f"{folder} is gone: what was being learnt was forgotten meanwhile, or removed") from error
    except OSError as error:
        raise disk_error(error, folder) from error


def load(folder: Path, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(tensors, note) of the run ``key``; None where there is no state, or that of another run, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load as parsed

    try:
        content = (folder / _FILE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("the checkpoint in %s can't be read (%s): the run starts over", folder, error)
        return None
    try:
        tensors = parsed(content)
        length = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + length])["__metadata__"]
        note = json.loads(about["note"])
        sound = about["sha256"] == _digest(tensors, about["note"]) and isinstance(note, dict)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        _log.warning("the checkpoint in %s is damaged (%s): the run starts over", folder, error)
        return None
    if not sound:
        _log.warning("the checkpoint in %s is damaged (its digest differs): the run starts over", folder)
        return None
    if about.get("key") != key:
        _log.warning("the checkpoint in %s is of another corpus, recipe or seed: the run starts over", folder)
        return None
    return tensors, note


def clear(folder: Path) -> None:
    """Remove the state."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)


def _digest(tensors: Mapping[str, torch.Tensor], note: str) -> str:
    import torch

    sha = hashlib.sha256(note.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
