"""Types of the C extension (native/module.c). agentmem/_pure/ has the same functions and bytes."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

class PageError(ValueError):
    """A page file or a layout breaks the rule ``args[0]``; ``args[1]`` says it in words."""

def crc32c(data: Buffer, value: int = 0, /) -> int: ...
def tokens_encode(rows: Buffer, scales: Buffer, codes: Buffer, /) -> None: ...
def maxsim(query: Buffer, data: Buffer, starts: Buffer, out: Buffer, /) -> None: ...
def cpu_level() -> str: ...
def cpu_levels() -> tuple[str, ...]: ...
def set_cpu_level(name: str, /) -> None: ...
def page_size(dtype: int, grid: int, layers: tuple[tuple[int, int, int], ...], /) -> int: ...
def page_write(
    fd: int,
    dtype: int,
    grid: int,
    number: int,
    identity: Buffer,
    key: Buffer,
    parent: Buffer,
    tokens: Buffer,
    keys: Sequence[Any],
    values: Sequence[Any],
    at: int,
    /,
) -> int: ...
def page_parse(
    data: Buffer, /
) -> tuple[int, int, int, bytes, bytes, bytes, bytes, tuple[tuple[int, int, int], ...]]: ...
def page_verify(data: Buffer, /) -> None: ...
def page_read(
    data: Buffer, keys: Sequence[Any], values: Sequence[Any], at: int, check: bool = True, first: int = 0, /
) -> None: ...
def page_encode(
    dtype: int, codec: int, grid: int, keys: Sequence[Any], values: Sequence[Any], at: int, writeback: bool, /
) -> tuple[bytes, bytearray]: ...
def page_write_encoded(
    fd: int,
    dtype: int,
    grid: int,
    number: int,
    identity: Buffer,
    key: Buffer,
    parent: Buffer,
    tokens: Buffer,
    layers: tuple[tuple[int, int, int], ...],
    table: Buffer,
    body: Buffer,
    /,
) -> int: ...
def block_encode(codec: int, dtype: int, key: Buffer, value: Buffer, /) -> bytes | None: ...
def block_decode(codec: int, dtype: int, data: Buffer, key: Buffer, value: Buffer, /) -> None: ...
def prefault(data: Buffer, fd: int = -1, /) -> None: ...
def reserve(data: Buffer, /) -> None: ...
def write_behind(fd: int, /) -> None: ...
def bm25_lengths(rows: tuple[Any, Any, Any, Any, Any], sessions: Any, /) -> tuple[int, int, int, int]: ...
def bm25_scores(
    terms: tuple[Any, Any, Any],
    rows: tuple[Any, Any, Any, Any, Any],
    lengths: tuple[Any, tuple[int, int, int, int]],
    scores: tuple[Any, Any, Any],
    /,
) -> list[tuple[float, float, float]]: ...

class Prefix:
    """KV states that queries attend to where they lie: segments of blocks of pages. Keeps their buffers.

    Any number of threads may attend at once; appending while one does is a ValueError.
    """

    def __new__(cls, dtype: int, layers: Sequence[tuple[int, int, int]], /) -> Prefix: ...
    def append_page(self, data: Buffer, first: int = 0, count: int = -1, /) -> None: ...
    def append_encoded(self, grid: int, table: Buffer, body: Buffer, first: int = 0, count: int = -1, /) -> None: ...
    def begin_segment(self, cosine: Buffer, sine: Buffer, /) -> None: ...
    def truncate_segments(self, count: int, /) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def attend(
        self,
        layer: int,
        query: Any,
        key: Any,
        value: Any,
        tail_keys: Any,
        tail_values: Any,
        length: int,
        out: Any,
        scale: float,
        window: int,
        threads: int,
        seen: Buffer | None = None,
        /,
    ) -> None: ...
