"""The folder ``lora/``: a sub-folder per version named by its digest, and checkpoints of runs that are not done.

Knows files, locks and what a crash may leave of them; knows nothing of rows and scopes. A version's folder is written
under a private name, flushed and then renamed, so that a name never stands for half of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path

from agentmem.errors import Corrupt, NotFound, StoreError

from .lora import CONFIG, WEIGHTS, content_digest, disk_error, flush_folder, write_file

__all__ = ["MANIFEST", "VersionFolder"]

MANIFEST = "manifest.json"
_NEW = ".new-"
_RUN = ".run-"
_LEARNT = "records.json"
#: Seconds after which the checkpoint of an interrupted run is no longer waited for.
_RUN_KEPT_S = 7 * 86_400.0


class VersionFolder:
    """The files of LoRA versions. Safe for many threads and processes."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        #: What was checked: digest to (inode, size, mtime) of its files, so that a check costs a stat after the first.
        self._checked: dict[str, tuple[tuple[int, int, int], ...]] = {}

    def path(self, digest: str) -> Path:
        """Where the version of this digest is."""
        return self.folder / digest

    # ---- versions

    def check(self, digest: str) -> None:
        """Raise `NotFound` or `Corrupt` unless the files are exactly what ``digest`` names."""
        path = self.path(digest)
        try:
            stats = [os.stat(path / name) for name in (CONFIG, WEIGHTS)]
        except OSError as error:
            raise NotFound(f"the files of lora-{digest[:12]} are gone: train it again") from error
        seen = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
        if self._checked.get(digest) == seen:
            return
        if content_digest(path) != digest:
            raise Corrupt(f"the files of lora-{digest[:12]} are damaged (digest differs): train it again")
        self._checked[digest] = seen

    def sound(self, digest: str) -> bool:
        """Whether the files are what ``digest`` names."""
        try:
            self.check(digest)
        except (StoreError, NotFound):
            return False
        return True

    def recheck(self) -> None:
        """Read every file in full at its next check."""
        self._checked.clear()

    def manifest(self, digest: str) -> str | None:
        """The text of a version's manifest file; None where it is gone or can't be read."""
        try:
            return (self.path(digest) / MANIFEST).read_text("utf-8")
        except (OSError, ValueError):
            return None

    @contextlib.contextmanager
    def staged(self) -> Generator[Path]:
        """A private folder to write into; gone at the end unless it was renamed."""
        staging = self.folder / f"{_NEW}{uuid.uuid4().hex}"
        try:
            staging.mkdir(mode=0o700)
            yield staging
        except OSError as error:
            raise disk_error(error, staging) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def publish(self, staging: Path, digest: str) -> None:
        """Give the finished folder its name. Its row is committed after this, under the same guard."""
        target = self.path(digest)
        if target.exists():  # a damaged or retired one of the same content
            self.delete(digest)
        flush_folder(staging)
        staging.rename(target)
        flush_folder(self.folder)

    def delete(self, name: str) -> None:
        """Delete a version's folder, or whatever else has this name here; nothing where there is none."""
        path = self.folder / name
        self._checked.pop(name, None)
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise disk_error(error, path) from error

    @contextlib.contextmanager
    def guard(self, *, wait: bool = True) -> Generator[bool]:
        """One process at a time between writing files and committing their row. Freed by the system if it dies."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        with _locked(self.folder / ".lock", wait=wait) as free:
            yield free

    def names(self) -> list[str]:
        """The digests that have a folder here."""
        if not self.folder.is_dir():
            return []
        return sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))

    def sweep(self, owned: Collection[str], stale: Callable[[Mapping[str, str]], bool]) -> None:
        """Delete what no version owns and the checkpoints of runs whose records are ``stale``. The guard is held."""
        for entry in self.folder.iterdir():
            if entry.name.startswith(_RUN):
                if self._run_is_over(entry, stale):
                    self.delete(entry.name)
            elif entry.name not in owned and entry.name != ".lock":
                self.delete(entry.name)

    def bytes(self, digest: str | None = None) -> int:
        """Bytes on disk of one version, or of all of them."""
        total = 0
        for path in self.folder.glob("*/*" if digest is None else f"{digest}/*"):
            with contextlib.suppress(FileNotFoundError):  # another process retired it just now
                total += path.stat().st_size if path.is_file() else 0
        return total

    # ---- runs

    @contextlib.contextmanager
    def run(self, key: str, contents: Mapping[str, str]) -> Generator[Path | None]:
        """Where a run of this key keeps its checkpoint; None while another process has the same run under way.

        An exception leaves the checkpoint for the next call of the same run, a normal end deletes it. ``contents`` maps
        the records that it learns to the digests of their texts, so that forgetting one deletes it too.
        """
        folder = self.folder / f"{_RUN}{key}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, folder) from error
        with _locked(folder / ".lock", wait=False) as free:
            if not free:
                yield None
                return
            try:
                write_file(folder / _LEARNT, json.dumps(dict(contents)).encode())
            except OSError as error:
                raise disk_error(error, folder) from error
            yield folder / "state"
            self.delete(folder.name)

    def drop_runs(self, stale: Callable[[Mapping[str, str]], bool]) -> None:
        """Delete the checkpoints of runs whose records are ``stale``, also of one that is under way: it then ends."""
        for entry in self.folder.glob(f"{_RUN}*"):
            if (contents := _learnt(entry)) and stale(contents):
                self.delete(entry.name)

    def _run_is_over(self, entry: Path, stale: Callable[[Mapping[str, str]], bool]) -> bool:
        if (contents := _learnt(entry)) and stale(contents):
            return True
        try:
            newest = max(path.stat().st_mtime for path in (entry, *entry.iterdir()))
        except OSError:
            return False  # it ends just now
        # One that doesn't say what it learns may be about to; nobody could tell whether it has to be forgotten.
        return time.time() - newest > (_RUN_KEPT_S if contents else 60.0)


def _learnt(entry: Path) -> dict[str, str]:
    """The records of a run, with the digests of their texts; none where that can't be read."""
    try:
        found = json.loads((entry / _LEARNT).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Generator[bool]:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
