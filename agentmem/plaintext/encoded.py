"""What an embedder is and what it returns: vectors of passages and of their tokens, checked before they are trusted.

Knows shapes, lengths and who offers what (an embedder may have no token vectors, and no idea of its own window). Knows
no embedder: those are in embed.py and encoders.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from agentmem.errors import InvalidInput, ProviderError

from .passages import by_characters

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vectors = npt.NDArray[np.float32]
    TokenVectors = npt.NDArray[np.float32] | npt.NDArray[np.float16]

__all__ = [
    "MAX_CHARACTERS",
    "Embedder",
    "Encoded",
    "TokenEmbedder",
    "aencode_with",
    "check_texts",
    "checked",
    "encode_with",
    "passages_with",
]

#: Longer texts are cut before they are tokenized: no local model here reads more than 512 tokens.
MAX_CHARACTERS = 16_384


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


@dataclass(frozen=True)
class Encoded:
    """What one pass of an encoder yields for n texts."""

    #: Pooled, float32 [n, dimension], rows of length 1.
    vectors: Vectors
    #: Per text [tokens, dimension], rows of length 1, without special tokens and the model's own prompt; float32 or
    #: float16. None where the embedder has none.
    tokens: list[TokenVectors] | None = None
    #: Per text and token: the characters [start, stop) of the text given that it stands for. A name put in front of a
    #: passage is part of the text given: spans below ``len(name) + 2`` are its tokens.
    spans: list[list[tuple[int, int]]] | None = None


@runtime_checkable
class TokenEmbedder(Embedder, Protocol):
    """An `Embedder` that also gives the vectors of single tokens and knows its window."""

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """`embed` and the token vectors of the same pass."""
        ...

    async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
        """The same as `encode`, without blocking the event loop."""
        ...

    def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:
        """Pieces [start, stop) of ``text``, in order and without gaps, that each fit the model beside ``name``."""
        ...


def encode_with(embedder: Embedder, texts: Sequence[str], *, query: bool = False) -> Encoded:
    """`TokenEmbedder.encode` where the embedder has it, else its `embed` alone. Checked: `ProviderError` if it lies."""
    if _has_tokens(embedder):
        return _consistent(embedder.encode(texts, query=query), len(texts), embedder)
    return Encoded(checked(embedder.embed(texts, query=query), len(texts), embedder.dimension, embedder.name))


async def aencode_with(embedder: Embedder, texts: Sequence[str], *, query: bool = False) -> Encoded:
    """The same as `encode_with`, without blocking the event loop."""
    if _has_tokens(embedder):
        return _consistent(await embedder.aencode(texts, query=query), len(texts), embedder)
    return Encoded(checked(await embedder.aembed(texts, query=query), len(texts), embedder.dimension, embedder.name))


def passages_with(embedder: Embedder | None, text: str, name: str | None = None) -> list[tuple[int, int]]:
    """Pieces [start, stop) of ``text`` for this embedder: by its tokens where it can count them, else by characters."""
    if _has_tokens(embedder):
        return embedder.passages(text, name)
    return by_characters(text)


def _has_tokens(embedder: Embedder | None) -> TypeGuard[TokenEmbedder]:
    """Looks at the methods alone: ``isinstance`` reads the properties too, and a hosted embedder's dimension costs a
    request."""
    return all(callable(getattr(embedder, name, None)) for name in ("encode", "aencode", "passages"))


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


def check_texts(texts: Sequence[str]) -> list[str]:
    """``texts`` as a list if all are str, else `InvalidInput`."""
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InvalidInput("an embedder takes a list of str")
    return list(texts)


def _consistent(encoded: Encoded, count: int, embedder: Embedder) -> Encoded:
    """``encoded`` if its parts fit each other; that numbers are finite is checked where they are used (late.py)."""
    vectors = checked(encoded.vectors, count, embedder.dimension, embedder.name)
    tokens, spans = encoded.tokens, encoded.spans
    if tokens is not None and (
        len(tokens) != count or any(one.ndim != 2 or one.shape[1] != tokens[0].shape[1] for one in tokens)
    ):
        raise ProviderError(f"embedder {embedder.name!r} returned token vectors that don't fit its {count} texts")
    if spans is not None and (tokens is None or [len(one) for one in spans] != [len(one) for one in tokens]):
        raise ProviderError(f"embedder {embedder.name!r} returned spans that don't fit its tokens")
    return Encoded(vectors, tokens, spans)
