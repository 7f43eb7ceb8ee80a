"""One KV page as a file: written so that nobody sees half of one, mapped so that nobody trusts a bad one.

Knows the file (native/README.md has its bytes) and what its header claims; knows nothing of budgets, tenants or
lineage. A mapped page has a sound header and a key that follows from its parent and tokens; `Page.verify` checks the
rest.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import sys
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import _pure
from ..errors import Corrupt, Incompatible, InvalidInput
from .identity import link, token_bytes

__all__ = [
    "DTYPES",
    "LayerShape",
    "Layout",
    "NewPage",
    "Page",
    "publish",
    "stage_page",
    "stage_pages",
    "sync_folder",
    "write_page",
]

Dtype = Literal["f32", "f16", "bf16"]

#: Numbers of the dtypes in a page's header.
DTYPES: dict[Dtype, int] = {"f32": 1, "f16": 2, "bf16": 3}
_NAMES: dict[int, Dtype] = {number: name for name, number in DTYPES.items()}
#: Buffers carry no bf16: its bits travel as 16-bit integers.
_FORMATS: dict[str, Dtype] = {"f": "f32", "e": "f16", "H": "bf16", "h": "bf16"}
#: Pages that are written at once. More than cores, because a sync is mostly waiting.
WRITERS = 4
#: Broken rules that say "not for this version", where every other says "damaged".
_FOREIGN = {"version", "dtype", "codec"}


@dataclass(frozen=True)
class LayerShape:
    """KV heads, and the dimensions of a key and of a value, of one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Layout:
    """The shape of a page: dtype of compute, tokens per page, and the layers. Raises `InvalidInput` if impossible."""

    dtype: Dtype
    grid: int
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if not 0 < self.grid < 1 << 20 or len(self.layers) > 1 << 16:
            raise InvalidInput(f"grid {self.grid} or {len(self.layers)} layers: too many or too few")
        _ = self.page_bytes

    @property
    def page_bytes(self) -> int:
        """Length of such a page's file."""
        layers = tuple((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in self.layers)
        for name, value in (
            (name, value) for layer in layers for name, value in zip(("heads", "K", "V"), layer, strict=True)
        ):
            if not 0 < value < 1 << 20:
                raise InvalidInput(f"a layer with {value} for its {name} can't be stored")
        try:
            return int(_pure.kernels().page_size(DTYPES[self.dtype], self.grid, layers))
        except ValueError as error:
            raise InvalidInput(f"no page has this layout: {error.args[-1]}") from error

    @classmethod
    def of(cls, layers: Sequence[tuple[Any, Any]], grid: int) -> Layout:
        """The layout of K and V buffers [kv_heads, positions, head_dim]: float32, float16, or bf16 as integers."""
        views = [(memoryview(key), memoryview(value)) for key, value in layers]
        formats = {view.format.lstrip("@=<") for pair in views for view in pair}
        if len(formats) != 1 or not formats <= _FORMATS.keys():
            raise InvalidInput(
                f"KV buffers of format {', '.join(sorted(formats)) or 'none'}: give all float32, all float16, "
                f"or all bf16 as uint16"
            )
        shapes = []
        for i, (key, value) in enumerate((tuple(k.shape or ()), tuple(v.shape or ())) for k, v in views):
            if len(key) != 3 or len(value) != 3 or key[:2] != value[:2]:
                raise InvalidInput(
                    f"layer {i}: K {list(key)} and V {list(value)} must be [kv_heads, positions, head_dim]"
                )
            shapes.append(LayerShape(key[0], key[2], value[2]))
        return cls(_FORMATS[formats.pop()], grid, tuple(shapes))


class Page:
    """A mapped page file whose header is sound: ``key``, ``parent``, ``identity``, ``number``, ``tokens``, ``layout``.

    ``data`` is the read-only mapping. It stays valid when the file is deleted or replaced. Opening maps the file and
    reads its header; it raises `Corrupt` for a damaged file, `Incompatible` for one of a newer format, OSError where
    it can't be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kernels = _pure.kernels()
        self.verified = False
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if os.fstat(descriptor).st_size == 0:
                raise Corrupt(f"{path.name} is empty")
            # Without its own descriptor where Python can: a long context maps hundreds of pages.
            options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self.data = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, **options)
        finally:
            os.close(descriptor)
        try:
            # A part that can't be read is an error here; touching it later would be a signal that ends the process.
            self._kernels.prefault(self.data)
            dtype, grid, self.number, self.identity, self.key, self.parent, packed, layers = self._kernels.page_parse(
                self.data
            )
        except OSError as error:
            raise Corrupt(f"{path.name} can't be read ({error.strerror})") from error
        except ValueError as error:
            raise self._error(error) from error
        if link(self.parent, packed) != self.key:
            raise Corrupt(f"{path.name}: its key does not follow from its parent and tokens")
        self.tokens = tuple(array("i", packed))
        self.layout = Layout(_NAMES[dtype], grid, tuple(LayerShape(*layer) for layer in layers))

    def _error(self, error: ValueError) -> Corrupt | Incompatible:
        rule, words = error.args
        message = f"{self.path.name}: {words}"
        if rule in _FOREIGN:
            return Incompatible(f"{message}; it needs a newer agentmem")
        return Corrupt(message)

    def verify(self) -> None:
        """Check every byte of the file against its checksums; `Corrupt` names the layer, head and block that fail."""
        try:
            self._kernels.page_verify(self.data)
        except self._kernels.PageError as error:
            raise self._error(error) from error
        self.verified = True

    def read_layers(self, keys: Sequence[Any], values: Sequence[Any], at: int) -> None:
        """Copy every layer's K and V into arrays [kv_heads, positions, head_dim], to positions ``at .. at + grid``.

        The arrays are writable, of the page's dtype, and contiguous but for the heads. A page that was not verified
        yet is verified on the way; then `Corrupt` leaves the arrays with undefined content. Raises `InvalidInput` for
        arrays that don't fit, before anything is copied.
        """
        try:
            self._kernels.page_read(self.data, keys, values, at, not self.verified)
        except self._kernels.PageError as error:
            raise self._error(error) from error
        except (ValueError, TypeError, BufferError) as error:
            raise InvalidInput(f"page {self.number} can't be copied there: {error}") from error
        self.verified = True

    def close(self) -> None:
        """Unmap the file, unless someone still holds a view of it: then that happens when the view goes."""
        with contextlib.suppress(BufferError):
            self.data.close()

    def __repr__(self) -> str:
        return f"Page(number={self.number}, key={self.key.hex()[:12]}, {self.layout.dtype}, grid={self.layout.grid})"


@dataclass(frozen=True, kw_only=True)
class NewPage:
    """What a page file is written from.

    ``len(tokens)`` is the grid; ``layers[i]`` is (K, V) of layer i, contiguous but for the heads, of shape [kv_heads,
    positions, head_dim], of which positions ``at .. at + grid`` go into the page.
    """

    identity: bytes
    parent: bytes
    number: int
    tokens: Sequence[int]
    layers: Sequence[tuple[Any, Any]]
    at: int = 0


def stage_page(folder: Path, page: NewPage, *, durable: bool = True) -> Path:
    """Write a whole page to a temporary file of ``folder`` and return its path; `publish` gives it its name.

    With ``durable`` the bytes are on disk at return. Raises `InvalidInput` before anything is written, OSError for a
    full disk or a read-only folder; then nothing is left behind.
    """
    layout = Layout.of(page.layers, len(page.tokens))
    packed = token_bytes(page.tokens)
    key = link(page.parent, packed)
    temporary = folder / f"{key.hex()}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            _pure.kernels().page_write(
                descriptor,
                DTYPES[layout.dtype],
                layout.grid,
                page.number,
                page.identity,
                key,
                page.parent,
                packed,
                [pair[0] for pair in page.layers],
                [pair[1] for pair in page.layers],
                page.at,
            )
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, (ValueError, TypeError, BufferError)):
            raise InvalidInput(f"KV states of page {page.number} can't be stored: {error}") from error
        raise
    return temporary


def stage_pages(folder: Path, pages: Sequence[NewPage], *, durable: bool = True) -> list[Path]:
    """`stage_page` of each, all or none, a few at once: checksums use several cores, syncs share the journal."""
    if len(pages) <= 1:
        return [stage_page(folder, page, durable=durable) for page in pages]
    with ThreadPoolExecutor(min(len(pages), WRITERS)) as pool:
        jobs = [pool.submit(stage_page, folder, page, durable=durable) for page in pages]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    if errors:
        for job in jobs:
            if job.exception() is None:
                with contextlib.suppress(OSError):
                    job.result().unlink()
        raise errors[0]
    return [job.result() for job in jobs]


def publish(staged: Iterable[tuple[Path, Path]], folder: Path, *, durable: bool = True) -> None:
    """Rename staged files to their names in ``folder``; with ``durable`` the names are on disk at return."""
    for temporary, final in staged:
        os.replace(temporary, final)
    if durable:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_page(path: Path, page: NewPage, *, durable: bool = True) -> None:
    """Write one page file, whole or not at all: `stage_page` and `publish` in one."""
    publish([(stage_page(path.parent, page, durable=durable), path)], path.parent, durable=durable)
