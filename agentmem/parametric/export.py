"""LoRA versions as files for other engines: a PEFT folder, a GGUF file, several versions summed into one.

Knows the versions' folders and the forms that engines read; knows no registry, no scope and no engine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentmem.errors import Corrupt, InvalidInput, StoreError
from agentmem.loras import LoraRef, as_one

from .gguf import write_gguf
from .lora import CONFIG, WEIGHTS, Lora, content_digest, disk_error, flush_folder, load, save, write_file

__all__ = ["FORMATS", "export_gguf", "export_peft", "summed"]

#: What a version can be written as.
FORMATS = ("peft", "gguf")
_MANIFEST = "manifest.json"


def export_peft(loras: Sequence[LoraRef], path: str | os.PathLike[str]) -> Path:
    """Write these versions as the PEFT folder ``path``, which must not exist or be empty; returns it.

    One version at scale 1 keeps its bytes, and so its digest; several become their exact sum. ``manifest.json`` says
    under which ``served_name`` an engine should know it. Raises `NotFound` or `Corrupt` for damaged versions, `Full`
    or `StoreError` where the folder can't be written.
    """
    target = Path(path)
    _refuse_taken(target)
    refs = _several(loras)
    told: dict[str, Any]
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        if len(refs) == 1 and refs[0].scale == 1.0:
            source = Path(refs[0].path)
            for name in (CONFIG, WEIGHTS):
                write_file(target / name, (source / name).read_bytes())
            if content_digest(target) != refs[0].digest:
                raise Corrupt(f"the files of {refs[0].name} in {source} are damaged: train it again")
            told = _manifest(source)
        else:
            save(target, summed(refs))
            told = {"versions": [{"name": ref.name, "digest": ref.digest, "scale": ref.scale} for ref in refs]}
        told["served_name"] = as_one(refs).served_name
        write_file(target / _MANIFEST, json.dumps(told, sort_keys=True).encode())
        flush_folder(target)
    except OSError as error:
        raise disk_error(error, target) from error
    return target


def export_gguf(loras: Sequence[LoraRef], path: str | os.PathLike[str], config: Any) -> Path:
    """Write these versions as one GGUF file for a base of this transformers ``config``; returns the file.

    ``path`` is the file, or a folder in which it is named by its digest (``<served name>.gguf``), by which our
    ``llamacpp:`` provider knows it again. Errors as in `export_peft`, and `TrainingError` where GGUF has no name for
    what was trained.
    """
    target = Path(path)
    refs = _several(loras)
    served = as_one(refs).served_name
    try:
        if target.suffix != ".gguf":
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            target = target / f"{served}.gguf"
        elif not target.parent.is_dir():
            target.parent.mkdir(mode=0o700, parents=True)
    except OSError as error:
        raise disk_error(error, target) from error
    return write_gguf(target, summed(refs), config, name=served, digest=",".join(ref.digest for ref in refs))


def summed(loras: Sequence[LoraRef]) -> Lora:
    """One LoRA that does what these do together: their ranks side by side (PEFT's ``cat``), which is exact.

    Raises `InvalidInput` for versions of several bases, or where some are activated and others are not.
    """
    parts = [load(ref.path, digest=ref.digest) for ref in loras]
    first = parts[0]
    if len(parts) == 1 and loras[0].scale == 1.0:
        return first
    import torch

    for part in parts:
        if (part.base, part.activated) != (first.base, first.activated):
            raise InvalidInput(
                "these LoRA versions can't be summed into one: they were trained on several bases, or some of them "
                "act on the answer only; export each by itself"
            )
    rank = sum(part.rank for part in parts)
    tensors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in sorted({path for part in parts for path in part.tensors}):
        downs, ups = [], []
        for ref, part in zip(loras, parts, strict=True):
            held = part.tensors.get(path)
            if held is None:  # PEFT wants one rank for all modules
                shapes = next(other.tensors[path] for other in parts if path in other.tensors)
                held = torch.zeros(part.rank, shapes[0].shape[1]), torch.zeros(shapes[1].shape[0], part.rank)
            downs.append(held[0])
            ups.append(held[1] * (ref.scale * part.alpha / part.rank))
        tensors[path] = torch.cat(downs), torch.cat(ups, dim=1)
    notes = {"base": first.notes["base"]} if "base" in first.notes else {}
    # alpha = rank: the factors are in B already.
    return Lora(rank, float(rank), first.base, tensors, notes, first.activated)


def _several(loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
    refs = tuple(sorted(loras, key=lambda ref: ref.digest))
    if not refs:
        raise InvalidInput("no LoRA version to export: name one")
    if len({ref.digest for ref in refs}) != len(refs):
        raise InvalidInput("a LoRA version was named twice")
    return refs


def _refuse_taken(target: Path) -> None:
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidInput(f"{target} exists and is not an empty folder: export to a new one")
    except OSError as error:
        raise StoreError(f"{target} can't be looked into ({error.strerror or error})") from error


def _manifest(source: Path) -> dict[str, Any]:
    try:
        told = json.loads((source / _MANIFEST).read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{source / _MANIFEST} can't be read: train this version again") from error
    return dict(told) if isinstance(told, Mapping) else {}
