"""How a LoRA version is told to the engine that answers with it: its reference, its name there, how it gets there.

Values and protocols only; knows no engine and no file's content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from .errors import InvalidInput

__all__ = ["HoldsLoras", "LoraRef", "PublishedLora", "TakesLoras", "served_name"]


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

    def publish_lora(self, lora: LoraRef, file: Path) -> PublishedLora:
        """Make the engine know this version under its `served_name`. ``file`` is what it is to read, in the form of
        `Capabilities.lora_format`; it stays where it is. Safe to repeat. Raises `ProviderError` and its kin."""
        ...

    def unpublish_lora(self, lora: LoraRef) -> None:
        """Make the engine forget this version; nothing where it knows none. Raises `ProviderError` where it stays."""
        ...


@dataclass(frozen=True, kw_only=True)
class PublishedLora:
    """What came of `TakesLoras.publish_lora`: the name that the engine knows the version by, whether it serves it
    already, and what is left to do where it doesn't."""

    served: str
    ready: bool = True
    to_do: str | None = None
