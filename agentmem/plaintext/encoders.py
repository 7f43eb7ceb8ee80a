"""The embedders of this machine: hashed words, a static table, BERT models in folders.

Knows how each turns texts into vectors of passages and tokens, and how long a passage its model reads. Knows nothing of
settings and of what is installed (embed.py). Weights are read at the first text.
"""

from __future__ import annotations

import abc
import asyncio
import hashlib
import importlib
import json
import re
import threading
import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import ConfigError

from .encoded import MAX_CHARACTERS, Encoded, check_texts, checked
from .passages import by_characters, by_tokens

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .encoded import TokenVectors, Vectors

__all__ = ["FolderEmbedder", "HashEmbedder", "SentenceTransformersEmbedder", "StaticEmbedder", "bert_plan"]

#: Tokens that a passage aims at where its text does not fit whole (MiniLM reads 256).
AIM = 200
#: Characters tokenized at once when a long text is cut: what a tokenizer keeps of them is a hundred times as large.
SLICE = 65_536

_WORD = re.compile(r"\w+")


class HashEmbedder:
    """Words and their letter triples, hashed into 256 dimensions (Weinberger et al. 2009, the hashing trick).

    Needs no weights and is the same on every machine: for tests, and where nothing else is installed. It sees spelling,
    not meaning. Its tokens are words.
    """

    def __init__(self, dimension: int = 256) -> None:
        self.dimension = dimension
        self.name = "hash"
        self.digest = _digest(f"hash 1 {dimension}")

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:  # noqa: ARG002 - one space for both
        """Float32 [len(texts), dimension] with rows of length 1."""
        import numpy as np

        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(check_texts(texts)):
            for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or [text]:
                vectors[row] += _hashed(word, self.dimension)
            if not vectors[row].any():
                vectors[row, zlib.crc32(text.encode()) % self.dimension] = 1
        return checked(vectors, len(texts), self.dimension, self.name)

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """The same as `embed`."""
        return self.embed(texts, query=query)

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """`embed`, and the vector of each word."""
        vectors = self.embed(texts, query=query)
        words = [list(_WORD.finditer(text)) for text in texts]
        tokens: list[TokenVectors] = [
            _rows([_hashed(unicodedata.normalize("NFKC", word[0]).casefold(), self.dimension) for word in some], self)
            for some in words
        ]
        return Encoded(vectors, tokens, [[word.span() for word in some] for some in words])

    async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """The same as `encode`."""
        return self.encode(texts, query=query)

    def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:  # noqa: ARG002 - any length will do
        """Pieces [start, stop) of ``text`` by characters: hashing has no window, but a long text is no single point."""
        return by_characters(text)


def _hashed(word: str, dimension: int) -> npt.NDArray[np.float32]:
    return (_known_word if len(word) <= 64 else _known_word.__wrapped__)(word, dimension)


@lru_cache(maxsize=4096)
def _known_word(word: str, dimension: int) -> npt.NDArray[np.float32]:
    """The features of a word: itself and its letter triples. All numbers are multiples of a half, so sums are exact."""
    import numpy as np

    vector = np.zeros(dimension, np.float32)
    marked = f"<{word}>"
    triples = ((marked[start : start + 3], 0.5) for start in range(len(marked) - 2))
    for feature, weight in ((word, 1.0), *triples):
        code = zlib.crc32(feature.encode())
        vector[code % dimension] += weight if code & 0x80000000 else -weight
    vector.flags.writeable = False
    return vector


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

        texts = check_texts(texts)
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


class _LocalTokens(_Local):
    """A local embedder that has a vector for each token, and a tokenizer to count with."""

    @cached_property
    @abc.abstractmethod
    def _whole(self) -> int:
        """Tokens of the longest text that is read whole, without the special ones."""

    @cached_property
    @abc.abstractmethod
    def _counting(self) -> Any:
        """The tokenizer without a limit."""

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str], query: bool) -> Encoded:
        """Vectors, and token vectors, of any length."""

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """`embed` and the token vectors of the same pass."""
        import numpy as np

        texts = check_texts(texts)
        if not texts:
            return Encoded(np.empty((0, self.dimension), np.float32), [], [])
        with self._lock:
            found = self._encode(texts, query)
        return Encoded(checked(found.vectors, len(texts), self.dimension, self.name), found.tokens, found.spans)

    async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """The same as `encode`, in another thread."""
        return await asyncio.to_thread(self.encode, texts, query=query)

    def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:
        """Pieces [start, stop) of ``text`` that each fit the model's window beside ``name``; of about 200 tokens."""
        whole = self._whole
        # A character has at most a few tokens: most texts need not be counted.
        if 4 * (len(text) + len(name or "")) <= whole:
            return [(0, len(text))]
        # Without the lock: counting a long text must not keep a query waiting, and a tokenizer may be shared.
        if name:
            whole = max(whole - len(self._ends(f"{name}: ")), whole // 4)
        return by_tokens(text, self._ends(text), whole=whole, aim=min(AIM, whole))

    def _ends(self, text: str) -> list[int]:
        """Where the tokens of ``text`` end. A word on the edge of a slice may count as two."""
        ends: list[int] = []
        for start in range(0, len(text), SLICE):
            found = self._counting.encode(text[start : start + SLICE], add_special_tokens=False)
            ends.extend(start + stop for _, stop in found.offsets)
        return ends


class FolderEmbedder(_LocalTokens):
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
        plan = bert_plan(folder)
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

    @cached_property
    def _counting(self) -> Any:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._path / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer

    @cached_property
    def _whole(self) -> int:
        prompt = self._counting.encode(self._plan.get("passage", ""))  # with the special tokens
        return max(int(self._plan["tokens"]) - len(prompt.ids), 2)

    def _embed(self, texts: Sequence[str], query: bool) -> Any:
        return self._model.embed(self._prompted(texts, query)[1])

    def _encode(self, texts: Sequence[str], query: bool) -> Encoded:
        prompt, prompted = self._prompted(texts, query)
        return Encoded(*self._model.encode(prompted, skip=len(prompt), half=not query))

    def _prompted(self, texts: Sequence[str], query: bool) -> tuple[str, list[str]]:
        prompt = self._plan.get("query" if query else "passage", "")
        return prompt, [(prompt + text)[:MAX_CHARACTERS] for text in texts]


class StaticEmbedder(_LocalTokens):
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
    def _table(self) -> Any:
        from safetensors.numpy import load_file

        return load_file(self._weights)["embedding.weight"].astype("float32")

    @cached_property
    def _counting(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self._tokenizer))

    @cached_property
    def _whole(self) -> int:
        return 256  # It has no window, but the mean of more words says little of each.

    def _tokens(self, texts: Sequence[str]) -> list[Any]:
        shortened = [text[:MAX_CHARACTERS] for text in texts]
        return list(self._counting.encode_batch(shortened, add_special_tokens=False))

    def _embed(self, texts: Sequence[str], query: bool) -> Any:  # noqa: ARG002 - one space for both
        import numpy as np

        table = self._table
        return np.stack([table[item.ids or [0]].mean(axis=0) for item in self._tokens(texts)])

    def _encode(self, texts: Sequence[str], query: bool) -> Encoded:  # noqa: ARG002
        import numpy as np

        table, found = self._table, self._tokens(texts)
        vectors = np.stack([table[item.ids or [0]].mean(axis=0) for item in found])
        return Encoded(vectors, [_rows(table[item.ids], self) for item in found], [item.offsets for item in found])


class SentenceTransformersEmbedder(_Local):
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


def _rows(vectors: Any, embedder: _Local | HashEmbedder) -> npt.NDArray[np.float32]:
    """Float32 [n, dimension] with rows of length 1; a row of zeros stays one, and so has no likeness to anything."""
    import numpy as np

    matrix: npt.NDArray[np.float32] = np.array(vectors, np.float32).reshape(-1, embedder.dimension)
    lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    matrix /= lengths
    return matrix


@cache
def _computes_bfloat16() -> bool:
    """True where matrix products in bfloat16 are faster than in float32; without such units they are much slower."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def bert_plan(folder: Path) -> dict[str, Any] | None:
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


def _digest(how: str, *files: Path) -> str:
    digest = hashlib.sha256(how.encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
