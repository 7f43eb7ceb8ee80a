"""A disk that loses what was not synced: read from a trace of system calls, rebuilt as it may be found after a cut.

What a file's writes promise holds from its next fsync on; until then each 512-byte sector of each write may be there or
not, in any order. Changes of names (create, rename, unlink) last from the next fsync of their folder on; until then
some first ones of them may. Harder on a program than common file systems are.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["CALLS", "Disk", "Said", "events"]

#: What has to be traced: ``strace -f -xx -s 10000000 -e trace=...``.
CALLS = (
    "openat,open,creat,close,dup,dup2,dup3,lseek,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,"
    "sync_file_range,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"
)
SECTOR = 512
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)\) += (-?\d+)")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>(.*)$")


@dataclass
class Said:
    """A line that the program wrote to its standard output."""

    line: bytes


@dataclass
class File:
    """What is certainly on the disk, and what was written since: (offset, bytes), or a new length."""

    durable: bytes = b""
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)

    def found(self, chance: random.Random, keep: float) -> bytes:
        """The content after a cut: each sector of the pending writes with probability ``keep``."""
        content = bytearray(self.durable)
        for write in self.pending:
            if isinstance(write, int):
                if chance.random() < keep:
                    _resize(content, write)
                continue
            offset, data = write
            whole = chance.random()
            at = 0
            while at < len(data):
                step = SECTOR - (offset + at) % SECTOR
                if whole < keep * 0.7 or chance.random() < keep:
                    _put(content, offset + at, data[at : at + step])
                at += step
        return bytes(content)

    def now(self) -> bytes:
        """The content as the running program sees it."""
        content = bytearray(self.durable)
        for write in self.pending:
            if isinstance(write, int):
                _resize(content, write)
            else:
                _put(content, *write)
        return bytes(content)


def _resize(content: bytearray, length: int) -> None:
    del content[length:]
    content += bytes(length - len(content))


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset + len(data):
        content += bytes(offset + len(data) - len(content))
    content[offset : offset + len(data)] = data


class Disk:
    """The files beneath one folder."""

    def __init__(self) -> None:
        self._files: dict[str, File] = {}
        self._names: dict[str, File] = {}
        self._renamed: dict[str, list[tuple[str, File | None]]] = {}

    def open(self, path: str, *, create: bool, truncate: bool) -> File | None:
        if path not in self._files:
            if not create:
                return None
            self._name(path, File())
        file = self._files[path]
        if truncate and file.now():
            file.pending.append(0)
        return file

    def _name(self, path: str, file: File | None) -> None:
        if file is None:
            self._files.pop(path, None)
        else:
            self._files[path] = file
        self._renamed.setdefault(str(Path(path).parent), []).append((path, file))

    def rename(self, old: str, new: str) -> None:
        file = self._files.get(old)
        if file is not None:
            self._name(new, file)
            self._name(old, None)

    def unlink(self, path: str) -> None:
        if path in self._files:
            self._name(path, None)

    def sync(self, file: File) -> None:
        file.durable, file.pending = file.now(), []

    def sync_folder(self, path: str) -> None:
        self._apply(self._names, self._renamed.pop(path, []))

    @staticmethod
    def _apply(names: dict[str, File], changes: list[tuple[str, File | None]]) -> None:
        for path, file in changes:
            if file is None:
                names.pop(path, None)
            else:
                names[path] = file

    def after_a_cut(self, chance: random.Random) -> dict[str, bytes]:
        """The files as they may be found, by path."""
        names = dict(self._names)
        for changes in self._renamed.values():
            kept = chance.choice([0, len(changes), chance.randint(0, len(changes))])
            self._apply(names, changes[:kept])
        keep = chance.choice([0.0, 0.5, 0.9, 1.0])
        return {path: file.found(chance, keep) for path, file in names.items()}


def events(trace: Path, folder: str) -> Iterator[tuple[Disk, Said | str]]:
    """The disk after each traced call that changed or synced something beneath ``folder``, or said something."""
    disk = Disk()
    open_files: dict[int, tuple[str, File | None]] = {}
    offsets: dict[int, int] = {}
    for name, arguments, result in _calls(trace):
        if result < 0:
            continue
        texts = [_bytes(text) for text in re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)]
        number = int(arguments.split(",")[0]) if arguments[:1].isdigit() else -1
        path, file = open_files.get(number, ("", None))
        if name in ("openat", "open", "creat"):
            opened = texts[0].decode()
            if opened.startswith(folder):
                made = disk.open(opened, create="O_CREAT" in arguments, truncate="O_TRUNC" in arguments)
                open_files[result], offsets[result] = (opened, made), 0
            else:
                open_files.pop(result, None)
            continue
        if name == "write" and number == 1:
            yield disk, Said(texts[0])
            continue
        if name in ("rename", "renameat", "renameat2") and texts[0].decode().startswith(folder):
            disk.rename(texts[0].decode(), texts[1].decode())
        elif name in ("unlink", "unlinkat") and texts[0].decode().startswith(folder):
            disk.unlink(texts[0].decode())
        elif number not in open_files:
            continue
        elif name == "close":
            del open_files[number]
            continue
        elif name == "lseek":
            offsets[number] = result
            continue
        elif name in ("fsync", "fdatasync"):
            disk.sync_folder(path) if file is None else disk.sync(file)
        elif file is None:
            continue
        elif name == "pwrite64":
            file.pending.append((int(arguments.rsplit(",", 1)[1]), texts[0][:result]))
        elif name == "write":
            file.pending.append((offsets[number], texts[0][:result]))
            offsets[number] += result
        elif name == "fallocate":
            _, _, offset, length = (int(part) for part in arguments.split(","))
            file.pending.append(max(len(file.now()), offset + length))
        elif name == "ftruncate":
            file.pending.append(int(arguments.rsplit(",", 1)[1]))
        else:
            raise AssertionError(f"{name}({arguments[:80]}) is not understood")
        yield disk, f"{name} {path.removeprefix(folder)}"


def _calls(trace: Path) -> Iterator[tuple[str, str, int]]:
    """(call, arguments, result) in the order in which they ended."""
    unfinished: dict[tuple[str, str], str] = {}
    with trace.open(encoding="ascii") as lines:
        for line in lines:
            text = line.rstrip("\n")
            if text.endswith("<unfinished ...>"):
                thread, call = text.split(None, 1)
                unfinished[thread, call.split("(")[0]] = text.removesuffix("<unfinished ...>").rstrip()
                continue
            if resumed := _RESUMED.match(text):
                text = unfinished.pop((resumed[1], resumed[2])) + resumed[3]
            if found := _CALL.match(text):
                yield found[2], found[3], int(found[4])


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))
