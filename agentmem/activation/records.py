"""KV states of single recalled records, kept as pages of their own beside the prefixes' in one store.

Knows how a record of any length becomes pages of 64 tokens, and where verdicts are noted; knows nothing of models, of
prompts or of when composing such states is good enough (the provider tries that). Budget, lineage, `forget`,
quarantine, encryption and the tenant's salt are those of every page.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..database import Database
from ..errors import StoreError
from ..types import Segment
from .identity import digest
from .pages import Page
from .tenant import TenantPages

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["RecordPages"]

logger = logging.getLogger("agentmem")

LayOut = Callable[[Sequence[tuple[str, str, str]], str], tuple[tuple[Segment, ...], tuple[str, ...]]]


class RecordPages:
    """One tenant's record states (`agentmem.provider.RecordPages`); ``pages`` is its view with a grid of `GRID`.

    A record's states stand under an identity of their own: what they were computed under, the record's id and its
    length in tokens. So neither a record of the same text nor the padding of the last page can be taken for it, and an
    updated record, whose tokens are others, never finds its old states.
    """

    #: Tokens of a page: one block of every codec.
    GRID = 64

    def __init__(self, pages: TenantPages, database: Database, *, repaired: bool, lay_out: LayOut) -> None:
        self._lay_out = lay_out  # `agentmem.prompt.made_up`
        self._pages = pages
        self._database = database
        self.repaired = repaired

    @property
    def grid(self) -> int:
        """Tokens per page."""
        return self._pages.grid

    @property
    def codec(self) -> str:
        """How pages are stored."""
        return self._pages.codec

    def lay_out(self, said: Sequence[tuple[str, str, str]], text: str) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
        """A turn of ``text`` with made-up records (day, name, what was said), laid out as real ones are: its segments
        without the system's, and the records' lines."""
        return self._lay_out(said, text)

    def find(self, identity: bytes, record: str, tokens: Sequence[int]) -> list[Page]:
        """All pages of these tokens of the record, the last one padded; empty if one is missing. Never raises."""
        padded = _padded(tokens, self.grid)
        if not padded:
            return []
        found = self._pages.longest(_own(identity, record, len(tokens)), padded)
        return found if len(found) == len(padded) // self.grid else []

    def keep(
        self,
        identity: bytes,
        record: str,
        tokens: Sequence[int],
        layers: Sequence[tuple[Any, Any]],
        *,
        learnt: Sequence[str] = (),
        seconds: float | None = None,
    ) -> bool:
        """Keep the states of the record's ``tokens``; False where they could not be kept, which is logged.

        ``layers[i]`` is (K, V) of layer i, [kv_heads, len(tokens), head_dim], as `TenantPages.seal` takes them.
        ``learnt`` are other records that shaped them (those of a LoRA), ``seconds`` is what computing them took. A
        forgotten record's are not kept.
        """
        padded = _padded(tokens, self.grid)
        if not padded:
            return False
        count = len(padded) // self.grid
        whole = [(_filled(key, len(padded)), _filled(value, len(padded))) for key, value in layers]
        encoded = [self._pages.encode(whole, number * self.grid) for number in range(count)]
        lineage = tuple(dict.fromkeys((record, *learnt)))
        self._pages.seal(
            _own(identity, record, len(tokens)),
            padded,
            0,
            whole,
            [lineage] * count,
            encoded=encoded if self._pages.lossy else None,
            seconds=seconds,
        )
        return bool(self.find(identity, record, tokens))

    def verdict(self, subject: bytes) -> dict[str, Any]:
        """What `note` noted of this subject; empty if nothing was, or where it can't be read."""
        try:
            rows = self._database.query("SELECT value FROM meta WHERE key = ?", (_named(subject),))
            found = json.loads(rows[0]["value"]) if rows else {}
        except (StoreError, ValueError) as error:
            logger.warning("how well recalled records do as KV can't be looked up: %s", error)
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, subject: bytes, verdict: Mapping[str, Any]) -> None:
        """Note this of the subject, instead of what was noted before; where nothing can be written that is logged."""
        try:
            with self._database.write() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_named(subject), json.dumps(dict(verdict)))
                )
        except StoreError as error:
            logger.warning("how well recalled records do as KV can't be noted: %s", error)


def _named(subject: bytes) -> str:
    return f"record kv {subject.hex()}"


def _own(identity: bytes, record: str, count: int) -> bytes:
    return digest({"records": identity, "record": record, "tokens": count})


def _padded(tokens: Sequence[int], grid: int) -> list[int]:
    """Whole pages of tokens; the last token fills the last page up."""
    return [*tokens, *([tokens[-1]] * (-len(tokens) % grid))] if tokens else []


def _filled(states: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.generic]:
    """The states with their last row repeated: it widens no group of a quantised block."""
    import numpy as np

    missing = length - states.shape[1]
    return np.ascontiguousarray(np.pad(states, ((0, 0), (0, missing), (0, 0)), mode="edge"))
