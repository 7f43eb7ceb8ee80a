"""Late interaction: token vectors, compressed, and how well each query token finds its match in a passage.

The scores of ColBERT (Khattab and Zaharia 2020), over codes of 4 bits that native/maxsim.c reads in place. Knows the
codes and where those of a record are; knows nothing of texts, scopes or what a good sum of the scores is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agentmem._pure import kernels
from agentmem._pure.maxsim import tokens_pack
from agentmem.errors import Corrupt, InvalidInput, ProviderError

if TYPE_CHECKING:
    import numpy.typing as npt

    from .encoded import TokenVectors

    Scores = npt.NDArray[np.float32]

__all__ = ["pack", "pack_all", "scores"]


def pack(tokens: TokenVectors) -> bytes:
    """The codes of one passage's token vectors [tokens, dimension], 4 bits a number: an eighth of float32."""
    return pack_all([tokens])[0]


def pack_all(tokens: Sequence[TokenVectors]) -> list[bytes]:
    """`pack` for many passages at once. Raises `ProviderError` for what is no matrix of finite numbers."""
    if not tokens:
        return []
    try:
        return tokens_pack(np.concatenate(tokens), [len(one) for one in tokens])
    except ValueError as error:
        raise ProviderError(f"the embedder's token vectors can't be stored: {error}") from error


def scores(query: TokenVectors, packed: Sequence[bytes]) -> Scores:
    """Float32 [len(packed), query tokens]: of each query token, the largest product with a token of each passage.

    Raises `InvalidInput` for a query of no numbers, and `Corrupt` for bytes that are no codes of its dimension.
    """
    tokens = _query(query)
    found = np.empty((len(packed), len(tokens)), np.float32)
    starts = np.zeros(len(packed), np.int64)
    np.cumsum([len(one) for one in packed[:-1]], out=starts[1:])
    try:
        kernels().maxsim(tokens, b"".join(packed), starts, found)
    except ValueError as error:
        raise Corrupt(f"token vectors can't be read: {error}") from error
    return found


def _query(query: TokenVectors) -> Scores:
    tokens = np.ascontiguousarray(query, np.float32)
    if tokens.ndim != 2 or not np.isfinite(tokens).all():
        raise InvalidInput(f"query tokens are finite numbers [tokens, dimension], not the shape {tokens.shape}")
    return tokens
