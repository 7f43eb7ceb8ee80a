"""How a LoRA version is told to the engine that answers with it: its reference, its name there, how it gets there.

Values and protocols only; knows no engine and no file's content.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from .errors import InvalidInput

__all__ = ["PUBLISHED", "HoldsLoras", "LoraRef", "PublishedLora", "TakesLoras", "as_one", "served_name"]

#: The folder, in a memory's own, of files that were made for engines to read from there.
PUBLISHED = "published"


@dataclass(frozen=True, kw_only=True)
class LoraRef:
    """One LoRA version to answer with: its name, the SHA-256 digest of its content, its PEFT folder, its scale.

    ``records`` are the ids of what it learnt: lineage of every KV page that is made under it. ``activated`` are the
    token ids that call it (aLoRA, arXiv 2504.12397): it acts only from the last place on where they stand in the
    prompt, and KV pages, which end before that, are the base's. Empty: it acts on every token.
    """

    name: str
    digest: str
    path: str
    scale: float = 1.0
    records: tuple[str, ...] = ()
    activated: tuple[int, ...] = ()

    @property
    def served_name(self) -> str:
        """See `served_name`."""
        return served_name(self.name, self.digest)


def served_name(name: str, digest: str) -> str:
    """What a LoRA version is called at a server or in an exported file: ``name-<first 16 hex digits of its digest>``.

    Servers tell LoRAs apart by name, in their KV caches too. A name that changes with the content makes a retrained
    LoRA another one there. Characters that a file or URL can't hold become ``_``.
    """
    if not re.fullmatch(r"[0-9a-f]{16,}", digest):
        raise InvalidInput(f"{digest!r} is no digest of a LoRA version: give its SHA-256 in hex")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "lora"
    return f"{plain[:64]}-{digest[:16]}"


def as_one(loras: Sequence[LoraRef]) -> LoraRef:
    """What these versions are called where they act as one: the version itself, or a sum with a digest of its own.

    The sum's ``path`` is empty: it is a file only where one was made.
    """
    if len(loras) == 1 and loras[0].scale == 1.0:
        return loras[0]
    if not loras:
        raise InvalidInput("no LoRA version is none, not a sum")
    named = json.dumps(sorted([lora.digest, lora.scale] for lora in loras))
    return LoraRef(
        name="sum",
        digest=hashlib.sha256(named.encode()).hexdigest(),
        path="",
        records=tuple(dict.fromkeys(record for lora in loras for record in lora.records)),
        activated=loras[0].activated,
    )


@runtime_checkable
class HoldsLoras(Protocol):
    """A provider that keeps LoRA versions in its memory has this too."""

    def drop_loras(self, digests: Sequence[str]) -> None:
        """Let go of these versions, wherever they are loaded or act. Loads no model, and never raises for versions that
        it doesn't hold."""
        ...


@runtime_checkable
class TakesLoras(Protocol):
    """A provider whose engine runs elsewhere and gets LoRA versions by being told of them."""

    def publish_lora(self, name: str, file: Path) -> PublishedLora:
        """Make the engine know a version as ``name``. ``file`` is what it is to read, in the form of
        `Capabilities.lora_format`; it stays where it is. Safe to repeat. Raises `ProviderError` and its kin."""
        ...

    def unpublish_lora(self, name: str) -> None:
        """Make the engine forget it; nothing where it knows none. Raises `ProviderError` and its kin where it stays."""
        ...

    def served_loras(self, loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
        """Which of these versions the engine can answer one request with now; empty where it can't be asked. Of an
        engine that takes one at a time: all of them where their sum was published, else the first that it has."""
        ...


@dataclass(frozen=True, kw_only=True)
class PublishedLora:
    """What came of `TakesLoras.publish_lora`: the name that the engine knows the version by, whether it serves it
    already, and what is left to do where it doesn't."""

    served: str
    ready: bool = True
    to_do: str | None = None
