"""Saved pages: a folder of page files with a list of their lineage, to be carried elsewhere and brought back.

Nothing in a saved folder is believed: names are made from checked keys, every page is verified as a copy of our own,
and the list carries a digest. Encrypted pages are copied as they are; without their page key only their container is
checked here, and the rest by whoever uses them with the key.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..database import Database
from ..errors import Corrupt, Full, Incompatible, InvalidInput, NotFound, StoreError
from .budget import Budget
from .catalog import Catalog, marks, parts
from .cipher import ContainerError, ForeignKey, PageCipher, key_name
from .eviction import PageRow
from .pages import Page, sync_folder

__all__ = ["Saved", "holding", "load", "note", "restore", "save"]

logger = logging.getLogger("agentmem")

FORMAT = 1
MANIFEST = "manifest.json"
#: No list of pages is longer than this: 8 million record ids.
MANIFEST_BYTES = 256 << 20

#: Where memory.db keeps the folders that pages were saved to.
FOLDERS = "saved pages"

_HEX = "^[0-9a-f]{64}$"


class Saved(BaseModel):
    """One page of a saved folder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    key: str = Field(pattern=_HEX)
    identity: str = Field(pattern=_HEX)
    parent: str = Field(pattern=_HEX)
    number: int = Field(ge=0, lt=1 << 32)
    bytes: int = Field(ge=1)
    pinned: bool
    records: list[str]
    codec: str = Field(default="raw", max_length=16)
    grid: int = Field(default=0, ge=0, le=1 << 16)


class Manifest(BaseModel):
    """The list of a saved folder; ``digest`` is the SHA-256 of its pages as canonical JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    digest: str
    pages: list[Saved]


class Entry(Protocol):
    """What `save` asks of a page (store.PageEntry)."""

    @property
    def key(self) -> str: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def codec(self) -> str: ...
    @property
    def records(self) -> tuple[str, ...]: ...


def _digest(pages: Sequence[Saved]) -> str:
    # Only what the list says: a field that came later is not in the digest of an older list.
    content = json.dumps([page.model_dump(exclude_unset=True) for page in pages], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _checked(path: Path, row: PageRow, cipher: PageCipher | None) -> None:
    """Raise `Corrupt` or `Incompatible` unless the file at ``path`` is this page, whole and undamaged."""
    try:
        page = Page(path, cipher)
    except ForeignKey:
        # Not ours to read: is it a whole container at least?
        try:
            key_name(path.read_bytes())
        except ContainerError as error:
            raise Corrupt(f"{path.name}: {error.args[1]}") from error
        found = (row.key, row.identity, row.parent, row.number, path.stat().st_size)
    else:
        page.verify()
        found = (page.name, page.identity, page.parent_name, page.number, page.stamp.size)
    if found != (row.key, row.identity, row.parent, row.number, row.bytes):
        raise Corrupt(f"{path.name} is not the page that the list names")


def save(entries: Sequence[Entry], catalog: Catalog, path: Path, cipher: PageCipher | None) -> int:
    """Copy the pages ``entries`` into the new folder ``path``; those that fail a check are left out."""
    path = path.absolute()
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InvalidInput(f"{path} exists and is not an empty folder: save to a new one")
        temporary.mkdir(mode=0o700, parents=True)
        pages: list[Saved] = []
        rows = catalog.rows()
        for entry in entries:
            name = f"{entry.key}.page"
            row = rows.get(bytes.fromhex(entry.key))
            try:
                if row is None:
                    raise FileNotFoundError("deleted meanwhile")
                _copy(catalog.folder / name, temporary / name, row.bytes)
                _checked(temporary / name, row, cipher)
            except (Corrupt, Incompatible, FileNotFoundError) as error:
                (temporary / name).unlink(missing_ok=True)
                logger.warning("KV page %s is not saved: %s", entry.key[:12], error)
                continue
            pages.append(
                Saved(
                    key=entry.key,
                    identity=row.identity.hex(),
                    parent=row.parent.hex(),
                    number=row.number,
                    bytes=row.bytes,
                    pinned=entry.pinned,
                    records=list(entry.records),
                    codec=row.codec,
                    grid=row.grid,
                )
            )
        manifest = Manifest(format=FORMAT, digest=_digest(pages), pages=pages)
        _write(temporary / MANIFEST, manifest.model_dump_json(indent=1).encode())
        sync_folder(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _store_error(error, f"KV pages can't be saved to {path}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
    return len(pages)


def note(database: Database, path: Path) -> None:
    """Remember that pages are saved to this folder; those that are gone are not remembered any longer."""
    with database.write() as connection:
        folders = {folder for folder in _folders(database) if Path(folder).exists()} | {str(path.absolute())}
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (FOLDERS, json.dumps(sorted(folders))))


def holding(database: Database, records: Sequence[str]) -> list[str]:
    """The folders with saved pages that were made from these records; also those whose list can't be read."""
    forgotten = set(records)
    found = []
    for folder in _folders(database):
        try:
            if any(forgotten.intersection(page.records) for page, _ in load(Path(folder))):
                found.append(folder)
        except NotFound:
            continue
        except StoreError:  # who knows
            found.append(folder)
    return found


def _folders(database: Database) -> list[str]:
    rows = database.query("SELECT value FROM meta WHERE key = ?", (FOLDERS,))
    return list(json.loads(rows[0]["value"])) if rows else []


def load(path: Path) -> list[tuple[Saved, Path]]:
    """The pages of a saved folder with their files, parents before children. The files are not looked at yet."""
    file = path / MANIFEST
    try:
        if file.stat().st_size > MANIFEST_BYTES:
            raise Corrupt(f"{file} is too long for a list of pages")
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"no KV pages were saved at {path}: there is no {MANIFEST}") from error
    except OSError as error:
        raise StoreError(f"{file} can't be read ({error.strerror})") from error
    except ValidationError as error:
        raise Corrupt(f"{file} is not a list of saved pages ({error.errors()[0]['msg']})") from error
    if manifest.format > FORMAT:
        raise Incompatible(
            f"{file} has format {manifest.format}, this agentmem reads up to {FORMAT}: install a newer one"
        )
    if _digest(manifest.pages) != manifest.digest:
        raise Corrupt(f"{file} fails its digest: which records its pages were made from is not certain")
    return [(page, path / f"{page.key}.page") for page in sorted(manifest.pages, key=lambda page: page.number)]


def restore(
    path: Path, database: Database, catalog: Catalog, budget: Budget, *, cipher: PageCipher | None, now: float
) -> int:
    """Bring back what may come back of a saved folder; how many pages are new (see `PageStore.restore`)."""
    saved = load(path)
    try:
        return _restored(saved, database, catalog, budget, cipher=cipher, now=now)
    except OSError as error:
        raise _store_error(error, f"saved KV pages can't be brought back to {catalog.folder}") from error


def _restored(
    pages: Sequence[tuple[Saved, Path]],
    database: Database,
    catalog: Catalog,
    budget: Budget,
    *,
    cipher: PageCipher | None,
    now: float,
) -> int:
    restored = 0
    for saved, file in pages:
        row = PageRow(
            key=bytes.fromhex(saved.key),
            identity=bytes.fromhex(saved.identity),
            parent=bytes.fromhex(saved.parent),
            number=saved.number,
            bytes=saved.bytes,
            created=now,
            used=now,
            uses=0,
            pinned=saved.pinned,
            codec=saved.codec,
            grid=saved.grid,
        )
        if catalog.bytes_of_files() + row.bytes > budget.total:
            logger.warning("no room in the budget of %d bytes for all saved KV pages", budget.total)
            break
        with catalog.locked(exclusive=False) as held:
            if not held:
                raise StoreError(f"another process holds {catalog.folder}: try again")
            if row.key in catalog.rows([row.key]) and catalog.path(row.key).exists():
                continue
            temporary = _fetched(row, file, catalog.folder, cipher)
            if temporary is None:
                continue
            try:
                if _entered(row, saved.records, database, catalog, budget):
                    restored += catalog.publish({row.key: temporary})
            finally:
                temporary.unlink(missing_ok=True)
    return restored


def _fetched(row: PageRow, file: Path, folder: Path, cipher: PageCipher | None) -> Path | None:
    """A verified copy of a saved page as a temporary file of ``folder``, or None (with a warning) if it is no good."""
    temporary = folder / f"{row.key.hex()}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            _copy(file, temporary, row.bytes)
            _checked(temporary, row, cipher)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (Corrupt, Incompatible, FileNotFoundError) as error:
        logger.warning("saved KV page %s is passed over: %s", row.key.hex()[:12], error)
        return None
    return temporary


def _entered(row: PageRow, records: Sequence[str], database: Database, catalog: Catalog, budget: Budget) -> bool:
    """Give a page its row and lineage, if its records and its parent are here and it fits."""
    with database.write() as connection:
        known = {
            found["id"]
            for part in parts(records)
            for found in database.query(
                f"SELECT id FROM records WHERE id IN ({marks(part)}) AND id NOT IN (SELECT record FROM tombstones)",
                part,
            )
        }
        if known != set(records) or (row.number > 0 and row.parent not in catalog.rows([row.parent])):
            return False
        budget.files = catalog.bytes_of_files() + row.bytes
        budget.refresh_copies()
        if budget.files > budget.total:
            return False
        catalog.insert(connection, row, records, replace=True)
    return True


def _copy(source: Path, target: Path, size: int) -> None:
    """A durable private copy of a file; `Corrupt` for what is no file or has another size."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != size:
            raise Corrupt(f"{source.name} has {status.st_size} bytes, not the {size} of the page that the list names")
        _write(target, file.read())


def _write(path: Path, content: object) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        left = memoryview(content)  # type: ignore[arg-type]
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _store_error(error: OSError, what: str) -> StoreError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return Full(f"{what}: no room ({error.strerror}); what was stored before is intact")
    return StoreError(f"{what} ({error.strerror}): check the path and its permissions")
