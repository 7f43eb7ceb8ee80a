"""What a provider that works with KV states asks of the places where they are kept, as protocols.

Pages of prefixes, slot files of servers, states of single records, trained prefixes: activation/ has them all. Knows
nothing of how they are kept, nor of what a provider does with them (provider.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .types import Segment

__all__ = [
    "HoldsSlots",
    "Pages",
    "PrefixPages",
    "RecordPages",
    "SavedSlot",
    "SealedPage",
    "Slots",
    "TrainedPrefix",
]


class SealedPage(Protocol):
    """KV states of one step of the token grid, read-only, as a page store hands them out."""

    @property
    def key(self) -> bytes:
        """What the store calls it."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids that the states are of."""
        ...


class Pages(Protocol):
    """What a provider with ``kv="tensors"`` asks of the page store that comes with a request (activation/store.py)."""

    @property
    def grid(self) -> int:
        """Tokens per page."""
        ...

    def longest(self, identity: bytes, tokens: Sequence[int]) -> Sequence[SealedPage]:
        """The stored pages of the longest prefix of ``tokens`` under ``identity``, from position 0 on; may be empty.

        Never raises for a missing, damaged or foreign page: that page and all after it are simply not returned. States
        may prove damaged only when they are read: that raises `Corrupt`, and the prefix ends before that page.
        """
        ...

    def forgotten(self, records: Collection[str]) -> Collection[str]:
        """Which of these records were forgotten, by any process; all of them where that can't be asked. Never raises.

        What a provider keeps of prompts beside the pages asks it before it keeps or uses something.
        """
        ...

    @property
    def codec(self) -> str:
        """How new pages are stored."""
        ...

    @property
    def lossy(self) -> bool:
        """Whether pages are stored with a codec that changes bits: then `encode` every page once it is computed."""
        ...

    def encode(self, layers: Sequence[tuple[Any, Any]], at: int) -> Any:
        """With a lossy codec: the page of positions ``at .. at + grid`` as `seal` wants it in ``encoded``.

        ``layers`` as in `seal`, writable; the arrays then hold what the page decodes to, so that the live run goes on
        with the bits of a restored one. With an exact codec it does nothing and returns None.
        """
        ...

    def seal(
        self,
        identity: bytes,
        tokens: Sequence[int],
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
        *,
        encoded: Sequence[Any] | None = None,
        seconds: float | None = None,
    ) -> int:
        """Keep the full pages ``first ..`` of the prefix ``tokens``; returns how many pages were written.

        ``layers[i]`` is (K, V) of layer i: buffers (numpy arrays; bf16 as uint16 views), contiguous but for the heads,
        of shape [kv_heads, positions, head_dim] that hold positions ``first * grid ..``. ``records[j]`` are the ids of
        the records that page ``first + j`` was made from (all that stand in the prompt up to its end). ``encoded[j]``
        is what `encode` gave for that page: needed with a lossy codec. Where it is given ``layers`` may be empty.
        ``seconds`` is what computing all of them took, where it was measured. Never raises for a full disk or a
        read-only folder: it logs and returns 0.
        """
        ...


@dataclass(frozen=True)
class SavedSlot:
    """A saved slot as `Slots` found it: its file's name, how many tokens it holds, and whether they are a
    conversation's head (system and core) that other conversations begin with too."""

    name: str
    tokens: int
    head: bool


class Slots(Protocol):
    """What a provider with ``kv="slots"`` asks of the store of slot files (activation/slots.py), as one tenant.

    ``folder`` is where the server saves its slots; ``facts`` are all that a slot's content depends on beside its
    tokens. Nothing here raises for a file or folder that can't be used: that is a miss, and logged.
    """

    @property
    def step(self) -> int:
        """Tokens by which a prefix grows before it is saved again."""
        ...

    @property
    def tenant(self) -> bytes:
        """Opaque; equal for requests that may share a slot."""
        ...

    def longest(self, folder: Path, facts: Mapping[str, str | int], tokens: Sequence[int]) -> SavedSlot | None:
        """The longest saved slot whose tokens begin ``tokens``, by its manifest alone."""
        ...

    def sound(self, folder: Path, facts: Mapping[str, str | int], tokens: Sequence[int], saved: SavedSlot) -> bool:
        """True if the file is, byte for byte, what its manifest says; else it is put aside. Reads the whole file."""
        ...

    def reserve(
        self, folder: Path, facts: Mapping[str, str | int], tokens: Sequence[int], records: Sequence[str]
    ) -> str | None:
        """The name to save a slot under that was made from these records; their lineage is on disk before any KV is."""
        ...

    def keep(
        self,
        folder: Path,
        facts: Mapping[str, str | int],
        tokens: Sequence[int],
        *,
        size: int,
        head: bool,
        records: Sequence[str],
        instead_of: str | None = None,
    ) -> bool:
        """Take in the file that was saved under the reserved name; the file ``instead_of`` goes."""
        ...

    def discard(self, folder: Path, name: str) -> None:
        """Delete this file and all that speaks of it."""
        ...

    def helps(self, facts: Mapping[str, str | int]) -> bool:
        """False once restored slots of this model and server have twice saved no computing."""
        ...

    def judge(self, facts: Mapping[str, str | int], *, helped: bool) -> None:
        """Note whether the tokens of a restored slot were really reused."""
        ...


@runtime_checkable
class HoldsSlots(Protocol):
    """A provider that holds states of prompts in memory has this too: in a server's slots, or between two turns."""

    def erase_slots(self) -> int:
        """Erase what is held in memory so; returns of how many conversations or slots that was. Never raises."""
        ...


class RecordPages(Protocol):
    """What a provider with ``kv="tensors"`` asks of the place where KV states of single records are kept
    (activation/records.py), as one tenant. Nothing here raises for a file or folder that can't be used."""

    @property
    def repaired(self) -> bool:
        """Whether the first tokens of every record are to be computed in each turn."""
        ...

    @property
    def grid(self) -> int:
        """Tokens per page."""
        ...

    @property
    def codec(self) -> str:
        """How pages are stored."""
        ...

    def lay_out(self, said: Sequence[tuple[str, str, str]], text: str) -> tuple[tuple[Segment, ...], tuple[str, ...]]:
        """A turn of ``text`` with made-up records (day, name, what was said), laid out as real ones are: its segments
        without the system's, and the records' lines."""
        ...

    def find(self, identity: bytes, record: str, tokens: Sequence[int]) -> Sequence[Any]:
        """The sealed pages of this record's tokens, all of them, the last one padded; empty if one is missing."""
        ...

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
        """Keep the states of this record's ``tokens``, ``layers`` as in `Pages.seal`; ``learnt`` are other records that
        they were made from. False where they could not be kept."""
        ...

    def verdict(self, subject: bytes) -> Mapping[str, Any]:
        """What was noted of this subject (a model and how records are composed for it); empty if nothing was."""
        ...

    def note(self, subject: bytes, verdict: Mapping[str, Any]) -> None:
        """Note this of the subject, instead of what was noted before."""
        ...


class TrainedPrefix(Protocol):
    """KV states that were learnt to stand for the head of a prompt."""

    @property
    def digest(self) -> str:
        """Of its states."""
        ...

    @property
    def tokens(self) -> int:
        """Positions that it takes."""
        ...

    @property
    def stands_for(self) -> int:
        """Tokens of the head that it takes the place of."""
        ...

    @property
    def records(self) -> tuple[str, ...]:
        """Ids of the records that it was made from."""
        ...

    @property
    def pages(self) -> Sequence[Any]:
        """Its states, in order."""
        ...


class PrefixPages(Protocol):
    """What a provider with ``kv="tensors"`` asks of the place where trained prefixes are kept (activation/trained.py),
    as one tenant."""

    def find(self, base: bytes, tokens: Sequence[int]) -> TrainedPrefix | None:
        """The one for the longest head that ``tokens`` begin with, under the model ``base``. Never raises."""
        ...
