"""The pages of one tenant, as a provider sees them (`agentmem.provider.Pages`).

Knows the tenant's salt and whether pages may be kept; everything else is the store's.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from .pages import LOSSY, Codec, Encoded, Page, encode

if TYPE_CHECKING:
    from .store import PageStore

__all__ = ["TenantPages"]


class TenantPages:
    """What `PageStore.view` gives out."""

    def __init__(self, store: PageStore, salt: bytes, *, writable: bool, grid: int) -> None:
        self._store = store
        self._salt = salt
        self._writable = writable
        self._grid = grid

    @property
    def grid(self) -> int:
        """Tokens per page."""
        return self._grid

    @property
    def codec(self) -> Codec:
        """How new pages are stored."""
        return self._store.codec

    @property
    def lossy(self) -> bool:
        """Whether pages are stored with a codec that changes bits: then `encode` each as soon as it is computed."""
        return self._store.codec in LOSSY

    def longest(self, identity: bytes, tokens: Sequence[int]) -> list[Page]:
        """The pages of the longest stored prefix of ``tokens``, in order from position 0; may be empty.

        Costs two queries, and reading the headers; the states are checked while `Page.read_layers` copies them, unless
        they are known to be good. Never raises for a page that is missing or damaged. A page whose states prove damaged
        raises `Corrupt` from ``read_layers``, is put aside by the store, and ends the prefix.
        """
        return self._store.longest(self._salt, identity, tokens, self._grid)

    def forgotten(self, records: Collection[str]) -> Collection[str]:
        """Which of these records were forgotten, by any process; all of them where that can't be asked. One query."""
        return self._store.forgotten(records)

    def encode(self, layers: Sequence[tuple[Any, Any]], at: int) -> Encoded | None:
        """The page of positions ``at .. at + grid`` for `seal`, with a lossy codec; the arrays then hold its decoding.

        ``layers`` as in `seal`, but writable. With an exact codec it does nothing and gives None: `seal` encodes by
        itself. Raises `InvalidInput` for arrays that can't be a page.
        """
        if not self.lossy:
            return None
        return encode(layers, self.grid, at, self._store.codec, writeback=True)

    def seal(
        self,
        identity: bytes,
        tokens: Sequence[int],
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
        *,
        encoded: Sequence[Encoded | None] | None = None,
        seconds: float | None = None,
    ) -> int:
        """Keep the full pages ``first ..`` of ``tokens``; returns how many were written.

        ``layers[i]`` is (K, V) of layer i, [kv_heads, positions, head_dim], holding positions ``first * grid ..``;
        ``records[j]`` are the records that page ``first + j`` was made from, ``encoded[j]`` what `encode` gave for it
        (needed with a lossy codec; where it is given no ``layers`` are needed), ``seconds`` what computing all of them
        took, where that is known. A page made from a forgotten record, and all after it, are not kept. A full disk or a
        read-only folder is logged and gives 0. Raises `InvalidInput` for arrays that can't be a page.
        """
        if not self._writable:
            return 0
        return self._store.seal(
            self._salt,
            identity,
            tokens,
            grid=self._grid,
            first=first,
            layers=layers,
            records=records,
            encoded=encoded,
            seconds=seconds,
        )
