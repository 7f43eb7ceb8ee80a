"""``memory.id``, beside ``memory.db``: which database belongs here and how far it had come.

SQLite opens an emptied file, an older copy or a log without its end without a word. These 32 bytes are what it is held
against: written after each commit, so that they are never ahead of what is durable. Knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import zlib

__all__ = ["Watermark"]

#: Mark, format, identity of the database, number, and the CRC-32 of what is before it; little-endian.
LAYOUT = struct.Struct("<4sI8sQII")
MARK, FORMAT = b"AMID", 1


class Watermark:
    """The file at ``path``. Its writes are no promise of their own: lost or late ones only make it see less."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._file: int | None = None
        self._identity = b""

    def read(self) -> tuple[bytes, int] | None:
        """(identity, number), None where there is no such file. `ValueError` where it is damaged, `OSError` too."""
        try:
            with open(self.path, "rb") as file:
                return _parsed(file.read(LAYOUT.size + 1))
        except FileNotFoundError:
            return None

    def start(self, identity: bytes, number: int) -> None:
        """Write for this database from now on, at least ``number``."""
        with self._lock:
            self._close()
            self._identity = identity
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        self.raise_to(number)

    def raise_to(self, number: int) -> None:
        """Note that ``number`` is durable, unless another process noted more."""
        with self._lock:
            if self._file is None:
                return
            try:
                identity, noted = _parsed(os.pread(self._file, LAYOUT.size + 1, 0))
                if identity == self._identity and noted >= number:
                    return
            except ValueError:  # new or damaged: written anew
                os.ftruncate(self._file, 0)
            content = LAYOUT.pack(MARK, FORMAT, self._identity, number, 0, 0)[:-4]
            os.pwrite(self._file, content + struct.pack("<I", zlib.crc32(content)), 0)

    def sync(self) -> None:
        """Make what was noted durable, so that it also holds after a power cut."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)

    def close(self) -> None:
        """Let go of the file; safe to call twice."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _parsed(content: bytes) -> tuple[bytes, int]:
    if len(content) != LAYOUT.size or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError("its checksum does not fit")
    mark, version, identity, number, _, _ = LAYOUT.unpack(content)
    if mark != MARK or version != FORMAT:
        raise ValueError("it has another format")
    return identity, number
