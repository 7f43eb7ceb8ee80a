"""Digests that say how KV states were computed, and the chain of page keys that follows from them.

Knows hashing and nothing of models: which facts make an identity is the provider's to say. Every encoding is tagged and
length-prefixed, so that no two different inputs give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InvalidInput, StoreError

__all__ = ["chain", "digest", "file_digest", "link", "root", "token_bytes"]

#: A file that changed this shortly before it was hashed may change again without a new time stamp, so it isn't cached.
SETTLED_NS = 2_000_000_000


def digest(fields: Mapping[str, bytes | str | int | float]) -> bytes:
    """SHA-256 over named fields, independent of their order: 32 bytes.

    Values of different types differ even where they print alike (``1``, ``1.0``, ``"1"``, ``b"1"``, ``True``). Raises
    `InvalidInput` for a value of another type.
    """
    state = hashlib.sha256(b"agentmem identity 1\0" + struct.pack("<Q", len(fields)))
    for name in sorted(fields):
        value = fields[name]
        # bool before int: it is a subclass.
        if isinstance(value, bool):
            tag, content = b"t", str(int(value)).encode()
        elif isinstance(value, int):
            tag, content = b"i", str(value).encode()
        elif isinstance(value, float):
            tag, content = b"f", struct.pack("<d", value)
        elif isinstance(value, str):
            tag, content = b"s", value.encode("utf-8", "surrogatepass")
        elif isinstance(value, bytes):
            tag, content = b"b", value
        else:
            raise InvalidInput(f"identity field {name!r} is a {type(value).__name__}: give bytes, str, int or float")
        encoded = name.encode("utf-8", "surrogatepass")
        state.update(struct.pack("<Q", len(encoded)) + encoded + tag + struct.pack("<Q", len(content)) + content)
    return state.digest()


def file_digest(path: Path | str, cache: Path | None = None) -> str:
    """SHA-256 of a file's bytes, or of a folder's files by their sorted relative names: 64 hex digits.

    ``cache`` is a folder: a digest is kept there and used again as long as path, size, times and inode stay the same
    (about 1 s per 2 GB is saved). Raises `StoreError` if the file can't be read.
    """
    path = Path(path)
    known = _Known(cache)
    try:
        if path.is_dir():
            state = hashlib.sha256(b"agentmem folder 1\0")
            for name in sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()):
                encoded = os.fsencode(name)
                state.update(struct.pack("<Q", len(encoded)) + encoded + bytes.fromhex(known.digest(path / name)))
            result = state.hexdigest()
        else:
            result = known.digest(path)
    except OSError as error:
        raise StoreError(f"{path} can't be read for its digest ({error.strerror}): check the path") from error
    known.save()
    return result


class _Known:
    """Digests of unchanged files, in one JSON file of a cache folder. A cache that can't be read or written is none."""

    def __init__(self, folder: Path | None) -> None:
        self._file = None if folder is None else folder / "digests.json"
        self._entries: dict[str, tuple[list[int], str]] = {}
        self._new: dict[str, tuple[list[int], str]] = {}
        if self._file is not None:
            self._entries = _read(self._file)

    def digest(self, path: Path) -> str:
        name = os.path.realpath(path)
        before = _stamp(os.stat(name))
        entry = self._entries.get(name)
        if entry is not None and entry[0] == before:
            return entry[1]
        started = time.time_ns()
        with open(name, "rb") as file:
            result = hashlib.file_digest(file, "sha256").hexdigest()
        after = _stamp(os.stat(name))
        if before == after and started - max(before[1], before[2]) > SETTLED_NS:
            self._new[name] = (before, result)
        return result

    def save(self) -> None:
        if self._file is None or not self._new:
            return
        # Read again: another process may have added its own meanwhile. A lost race costs one more hashing.
        entries = {**_read(self._file), **self._new}
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="digests.", suffix=".tmp", dir=self._file.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(entries, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(name, self._file)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


def _read(file: Path) -> dict[str, tuple[list[int], str]]:
    """The entries of a digest cache that have the right form; none of a missing or damaged one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries: dict[str, tuple[list[int], str]] = {}
    for name, entry in content.items() if isinstance(content, dict) else ():
        match entry:
            case [[int(a), int(b), int(c), int(d)], str(hexes)] if len(hexes) == 64 and _is_hex(hexes):
                entries[name] = ([a, b, c, d], hexes)
            case _:
                continue
    return entries


def _is_hex(text: str) -> bool:
    return all(character in "0123456789abcdef" for character in text)


def _stamp(status: os.stat_result) -> list[int]:
    # The change time too: unlike the modification time no program sets it back.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32. Raises `InvalidInput` for one that is negative or too large."""
    try:
        packed = array("i", tokens)
    except (OverflowError, TypeError) as error:
        raise InvalidInput(f"token ids must be integers below 2**31 ({error})") from error
    if packed and min(packed) < 0:
        raise InvalidInput(f"token ids can't be negative: {min(packed)}")
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def root(identity: bytes, salt: bytes, grid: int) -> bytes:
    """The parent key of every page 0: SHA-256 over identity, tenant salt and grid."""
    if len(identity) != 32:
        raise InvalidInput(f"an identity has 32 bytes, not {len(identity)}: make it with digest()")
    return hashlib.sha256(
        b"agentmem chain 1\0" + identity + struct.pack("<QQ", grid, len(salt)) + salt, usedforsecurity=True
    ).digest()


def link(parent: bytes, tokens: bytes) -> bytes:
    """The key of the page with these `token_bytes` behind the page ``parent``."""
    return hashlib.sha256(b"agentmem page 1\0" + parent + tokens).digest()


def chain(identity: bytes, salt: bytes, tokens: Sequence[int], grid: int) -> list[bytes]:
    """The keys of the full pages of ``tokens``, in order: 32 bytes each.

    A key says all that its page depends on: identity, tenant salt, grid and every token up to the page's end.
    """
    packed = token_bytes(tokens)
    step = 4 * grid
    key = root(identity, salt, grid)
    keys = []
    for start in range(0, len(packed) - step + 1, step):
        key = link(key, packed[start : start + step])
        keys.append(key)
    return keys
