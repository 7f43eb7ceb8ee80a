"""One KV page as a file: written so that nobody sees half of one, mapped so that nobody trusts a bad one.

Knows the file (native/README.md has its bytes), its codecs and what its header claims; knows nothing of budgets,
tenants or lineage. An opened page has a sound header and a key that follows from its parent and tokens; its states are
checked by `Page.verify`, or while `Page.read_layers` copies them.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import mmap
import os
import secrets
import stat
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import _pure
from ..errors import Corrupt, Incompatible, InvalidInput
from .cipher import MAGIC, ForeignKey, PageCipher
from .identity import link, token_bytes

__all__ = [
    "CODECS",
    "DTYPES",
    "LOSSY",
    "Codec",
    "Encoded",
    "LayerShape",
    "Layout",
    "NewPage",
    "Page",
    "Stamp",
    "encode",
    "publish",
    "stage_pages",
    "sync_folder",
    "write_page",
]

Dtype = Literal["f32", "f16", "bf16"]
Codec = Literal["raw", "lossless", "dense", "int8", "k8v4", "int4"]

#: Numbers of the dtypes in a page's header.
DTYPES: dict[Dtype, int] = {"f32": 1, "f16": 2, "bf16": 3}
_NAMES: dict[int, Dtype] = {number: name for name, number in DTYPES.items()}
#: Numbers of the codecs in the table of extents (native/codec.h).
CODECS: dict[Codec, int] = {"raw": 0, "lossless": 1, "dense": 2, "int8": 3, "k8v4": 4, "int4": 5}
#: Codecs that change bits: a live run has to go on with what they give back.
LOSSY: frozenset[Codec] = frozenset({"int8", "k8v4", "int4"})
#: Buffers carry no bf16: its bits travel as 16-bit integers.
_FORMATS: dict[str, Dtype] = {"f": "f32", "e": "f16", "H": "bf16", "h": "bf16"}
#: Pages that are encoded or encrypted at once.
WRITERS = 4
#: Broken rules that say "not for this version", where every other says "damaged".
_FOREIGN = {"version", "dtype", "codec"}
#: What this process or the system is short of says nothing about a file.
_SHORT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


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
        """Length of such a page's file with raw states, which is the most that it has with any codec."""
        layers = self.shapes()
        for name, value in (
            (name, value) for layer in layers for name, value in zip(("heads", "K", "V"), layer, strict=True)
        ):
            if not 0 < value < 1 << 20:
                raise InvalidInput(f"a layer with {value} for its {name} can't be stored")
        try:
            return int(_pure.kernels().page_size(DTYPES[self.dtype], self.grid, layers))
        except ValueError as error:
            raise InvalidInput(f"no page has this layout: {error.args[-1]}") from error

    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(KV heads, dimensions of a key, of a value) of each layer."""
        return tuple((layer.kv_heads, layer.key_dim, layer.value_dim) for layer in self.layers)

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


@functools.lru_cache(maxsize=16)
def _layout(dtype: int, grid: int, layers: tuple[tuple[int, int, int], ...]) -> Layout:
    """The layout of a page's header. All pages of a model have the same, and making it takes most of opening a page."""
    return Layout(_NAMES[dtype], grid, tuple(LayerShape(*layer) for layer in layers))


class Stamp(NamedTuple):
    """What changes when a file does: device, inode, size, modification and change time in ns.

    The change time too: unlike the modification time no program sets it back.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in the answer of a stat."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class _Checked:
    """What is known of a page's states, shared by all who hold the page."""

    def __init__(self, *, whole: bool) -> None:
        self.whole = whole
        self.layers: set[int] = set()


class Page:
    """A page file whose header is sound: ``key``, ``parent``, ``identity``, ``number``, ``tokens``, ``layout``.

    ``data`` is the page read-only: a mapping of the file, which stays valid when the file is deleted or replaced; of an
    encrypted file its plain bytes in memory. ``stamp`` is the file's when it was opened, ``name`` and ``parent_name``
    are what a store calls the page and the one before it, ``seconds`` what opening and checking took so far.
    ``on_check`` is called once all states have proved good (with None) or when a check fails (with the error).

    Opening raises `Corrupt` for a damaged file, `Incompatible` for one of a newer format, `ForeignKey` for one that is
    encrypted under no key or another one than ``cipher``'s, OSError where it can't be opened. Against a program that
    cuts a mapped file short in place there is no defence (reading it then is a signal, SIGBUS, that ends the process):
    nothing here ever does that, files are only replaced and deleted; copies of encrypted pages are no mappings.
    """

    def __init__(self, path: Path, cipher: PageCipher | None = None) -> None:
        started = time.perf_counter()
        self.path = path
        self.on_check: Callable[[Page, Exception | None], None] | None = None
        self._kernels = _pure.kernels()
        # Without waiting: what stands there may be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            self.stamp = Stamp.of(status)
            if not stat.S_ISREG(status.st_mode):
                raise Corrupt(f"{path.name} is not a file")
            if status.st_size == 0:
                raise Corrupt(f"{path.name} is empty")
            self.encrypted = os.pread(descriptor, len(MAGIC), 0) == MAGIC
            self._data: Any = self._decrypted(descriptor, cipher) if self.encrypted else _mapped(descriptor)
            if not self.encrypted:
                # A part that can't be read is an error here; touching it later would be a signal that ends the process.
                self._kernels.prefault(self._data, descriptor)
            dtype, grid, self.number, self.identity, self.key, self.parent, packed, layers = self._kernels.page_parse(
                self._data
            )
        except ValueError as error:
            raise self._error(error) from error
        except OSError as error:
            if error.errno in _SHORT:
                raise
            raise Corrupt(f"{path.name} can't be read ({error.strerror})") from error
        finally:
            os.close(descriptor)
        if link(self.parent, packed) != self.key:
            raise Corrupt(f"{path.name}: its key does not follow from its parent and tokens")
        self.tokens = tuple(array("i", packed))
        self.layout = _layout(dtype, grid, layers)
        keyed = cipher if self.encrypted else None
        self.name = self.key if keyed is None else keyed.name(self.key)
        self.parent_name = self.parent if keyed is None else keyed.name(self.parent)
        if keyed is not None and self.name != _named(path):
            raise Corrupt(f"{path.name} holds another page than its name says")
        # The tag covers every byte that the container was made from.
        self._checked = _Checked(whole=self.encrypted)
        self.seconds = time.perf_counter() - started

    def _decrypted(self, descriptor: int, cipher: PageCipher | None) -> memoryview:
        if cipher is None:
            raise ForeignKey(f"{self.path.name} is encrypted: open the memory with its page_key")
        container = bytearray(self.stamp.size)
        view, done = memoryview(container), 0
        while done < len(container):
            count = os.preadv(descriptor, [view[done:]], done)
            if count == 0:
                raise Corrupt(f"{self.path.name} ends early")
            done += count
        return memoryview(cipher.open(container, _named(self.path))).toreadonly()

    def _error(self, error: ValueError) -> Corrupt | Incompatible:
        rule, words = error.args if len(error.args) == 2 else ("", str(error))
        message = f"{self.path.name}: {words}"
        if rule == "key":
            return ForeignKey(message)
        if rule in _FOREIGN:
            return Incompatible(f"{message}; it needs a newer agentmem")
        return Corrupt(message)

    @property
    def data(self) -> Any:
        """The page's bytes, read-only."""
        if self._data is None:
            raise InvalidInput(f"page {self.number} was closed")
        return self._data

    @property
    def verified(self) -> bool:
        """Whether every byte has proved good."""
        return self._checked.whole

    def share(self) -> Page:
        """Another handle on the same bytes: they stay in memory until the last handle is closed."""
        return copy.copy(self)

    def verify(self) -> None:
        """Check every byte of the file against its checksums; `Corrupt` names the layer, head and block that fail."""
        started = time.perf_counter()
        try:
            self._kernels.page_verify(self.data)
        except self._kernels.PageError as error:
            raise self._failed(error) from error
        self._good(range(len(self.layout.layers)), time.perf_counter() - started)

    def read_layers(self, keys: Sequence[Any], values: Sequence[Any], at: int, first: int = 0) -> None:
        """Copy K and V into arrays [kv_heads, positions, head_dim], to positions ``at .. at + grid``.

        ``keys`` and ``values`` hold the arrays of layers ``first`` .. in order: all or some. They are writable, of the
        page's dtype, and contiguous but for the heads. Layers that were not checked yet are checked on the way; then
        `Corrupt` leaves the arrays with undefined content. Raises `InvalidInput` for arrays that don't fit, before
        anything is copied.
        """
        started = time.perf_counter()
        options = (first,) if first else ()
        wanted = range(first, first + len(keys))
        known = self.verified or self._checked.layers.issuperset(wanted)
        try:
            self._kernels.page_read(self.data, keys, values, at, not known, *options)
        except self._kernels.PageError as error:
            raise self._failed(error) from error
        except (ValueError, TypeError, BufferError) as error:
            raise InvalidInput(f"page {self.number} can't be copied there: {error}") from error
        if not known:
            self._good(wanted, time.perf_counter() - started)

    def _good(self, layers: Iterable[int], seconds: float) -> None:
        self.seconds += seconds
        known, checked = self.verified, self._checked
        checked.layers.update(layers)
        checked.whole = known or len(checked.layers) == len(self.layout.layers)
        if checked.whole and not known and self.on_check is not None:
            self.on_check(self, None)

    def _failed(self, error: ValueError) -> Corrupt | Incompatible:
        self._checked.whole = False
        self._checked.layers.clear()
        found = self._error(error)
        if self.on_check is not None:
            self.on_check(self, found)
        return found

    def close(self) -> None:
        """Let the bytes go. They leave the memory when no other handle and no view of them is left."""
        self._data = None

    def __repr__(self) -> str:
        return f"Page(number={self.number}, key={self.key.hex()[:12]}, {self.layout.dtype}, grid={self.layout.grid})"


def _mapped(descriptor: int) -> mmap.mmap:
    # Without its own descriptor where Python can: a long context maps hundreds of pages.
    options = {"trackfd": False} if sys.version_info >= (3, 13) else {}
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ, **options)


def _named(path: Path) -> bytes:
    """The name of a page that a file's name begins with; nothing else is the name of an encrypted page."""
    try:
        return bytes.fromhex(path.name[:64])
    except ValueError:
        return b""


@dataclass(frozen=True)
class Encoded:
    """The states of one page as a codec left them: the table of extents, and the extents in one piece."""

    layout: Layout
    codec: Codec
    table: bytes
    body: bytearray


def encode(layers: Sequence[tuple[Any, Any]], grid: int, at: int, codec: Codec, *, writeback: bool = False) -> Encoded:
    """The states of positions ``at .. at + grid``, encoded; ``layers`` as in `NewPage`.

    With ``writeback`` the arrays, which must be writable, hold afterwards what the encoded states decode to: a live run
    goes on with the very bits that a restored one will read. Raises `InvalidInput` for arrays that can't be a page.
    """
    layout = Layout.of(layers, grid)
    try:
        table, body = _pure.kernels().page_encode(
            DTYPES[layout.dtype],
            CODECS[codec],
            grid,
            [pair[0] for pair in layers],
            [pair[1] for pair in layers],
            at,
            writeback,
        )
    except (ValueError, TypeError, BufferError) as error:
        raise InvalidInput(f"KV states at position {at} can't be encoded: {error}") from error
    return Encoded(layout, codec, table, body)


@dataclass(frozen=True, kw_only=True)
class NewPage:
    """What a page file is written from.

    ``len(tokens)`` is the grid; ``layers[i]`` is (K, V) of layer i, contiguous but for the heads, of shape [kv_heads,
    positions, head_dim], of which positions ``at .. at + grid`` go into the page. ``encoded``, where it is given, is
    what those were encoded to; else they are encoded when the page is written.
    """

    identity: bytes
    parent: bytes
    number: int
    tokens: Sequence[int]
    layers: Sequence[tuple[Any, Any]] = ()
    at: int = 0
    codec: Codec = "raw"
    encoded: Encoded | None = None


def _write(descriptor: int, page: NewPage, layout: Layout, key: bytes, packed: bytes) -> None:
    head = DTYPES[layout.dtype], layout.grid, page.number, page.identity, key, page.parent, packed
    encoded = page.encoded
    if encoded is None and page.codec != "raw":
        encoded = encode(page.layers, layout.grid, page.at, page.codec)
    if encoded is not None:
        _pure.kernels().page_write_encoded(descriptor, *head, layout.shapes(), encoded.table, encoded.body)
    else:
        # Straight from the tensors: no copy.
        keys, values = [pair[0] for pair in page.layers], [pair[1] for pair in page.layers]
        _pure.kernels().page_write(descriptor, *head, keys, values, page.at)


def _write_encrypted(
    descriptor: int, page: NewPage, layout: Layout, key: bytes, packed: bytes, *, cipher: PageCipher
) -> None:
    memory = os.memfd_create("agentmem page", os.MFD_CLOEXEC)  # plain bytes never touch a disk
    try:
        _write(memory, page, layout, key, packed)
        with _mapped(memory) as plain, memoryview(plain) as view:
            container = cipher.seal(view, cipher.name(key))
    finally:
        os.close(memory)
    with container, memoryview(container) as view:
        done = 0
        while done < len(view):
            done += os.write(descriptor, view[done:])


def _stage(folder: Path, page: NewPage, cipher: PageCipher | None, *, behind: bool) -> Path:
    """Write a whole page to a temporary file; ``behind`` begins to bring it to the disk."""
    layout = page.encoded.layout if page.encoded is not None else Layout.of(page.layers, len(page.tokens))
    packed = token_bytes(page.tokens)
    key = link(page.parent, packed)
    name = key if cipher is None else cipher.name(key)
    temporary = folder / f"{name.hex()}.{secrets.token_hex(8)}.tmp"
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            if cipher is None:
                _write(descriptor, page, layout, key, packed)
            else:
                _write_encrypted(descriptor, page, layout, key, packed, cipher=cipher)
            if behind:
                _pure.kernels().write_behind(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, (ValueError, TypeError, BufferError)) and not isinstance(error, InvalidInput):
            raise InvalidInput(f"KV states of page {page.number} can't be stored: {error}") from error
        raise
    return temporary


def stage_pages(
    folder: Path, pages: Sequence[NewPage], *, durable: bool = True, cipher: PageCipher | None = None
) -> list[Path]:
    """Write whole pages to temporary files of ``folder``, all or none; `publish` gives them their names.

    With ``durable`` the bytes are on disk at return, with ``cipher`` they are encrypted. Raises `InvalidInput` for
    states that can't be a page, OSError for a full disk or a read-only folder; then nothing is left behind. The disk
    writes one file while the next is made; codecs use several threads, while plain writing is as fast from one.
    """
    workers = min(len(pages), WRITERS) if cipher or any(page.codec != "raw" for page in pages) else 1
    staged: list[Path] = []
    try:
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                jobs = [pool.submit(_stage, folder, page, cipher, behind=durable) for page in pages]
            staged.extend(job.result() for job in jobs if job.exception() is None)
            for job in jobs:
                job.result()
        else:
            for page in pages:
                staged.append(_stage(folder, page, cipher, behind=durable))
        for path in staged if durable else ():
            _sync(path, os.O_RDONLY)
    except BaseException:
        for path in staged:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    return staged


def publish(staged: Iterable[tuple[Path, Path]], folder: Path, *, durable: bool = True) -> None:
    """Rename staged files to their names in ``folder``; with ``durable`` the names are on disk at return."""
    for temporary, final in staged:
        os.replace(temporary, final)
    if durable:
        sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Make the folder's names durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_page(path: Path, page: NewPage, *, durable: bool = True) -> None:
    """Write one page file, whole or not at all: `stage_pages` and `publish` in one."""
    [staged] = stage_pages(path.parent, [page], durable=durable)
    publish([(staged, path)], path.parent, durable=durable)
