"""Saved pages: a folder of page files with a list of their lineage, to be carried elsewhere and brought back.

Knows the folder; decides nothing about what may come back (store.py does). Nothing in a saved folder is believed: names
are made from checked keys, every page is verified as a copy of our own, and the list carries a digest.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import Corrupt, Full, Incompatible, InvalidInput, NotFound, StoreError
from .pages import Page, sync_folder

__all__ = ["Saved", "fetch", "load", "save"]

logger = logging.getLogger("agentmem")

FORMAT = 1
MANIFEST = "manifest.json"
#: No list of pages is longer than this: 8 million record ids.
MANIFEST_BYTES = 256 << 20

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
    def records(self) -> tuple[str, ...]: ...


def _digest(pages: Sequence[Saved]) -> str:
    content = json.dumps([page.model_dump() for page in pages], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def save(entries: Sequence[Entry], folder: Path, path: Path) -> int:
    """Copy the pages ``entries`` of ``folder`` into the new folder ``path``; those that fail a check are left out."""
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InvalidInput(f"{path} exists and is not an empty folder: save to a new one")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        temporary.mkdir(mode=0o700, parents=True)
        pages: list[Saved] = []
        for entry in entries:
            name = f"{entry.key}.page"
            try:
                page = Page(folder / name)
                page.verify()
            except (Corrupt, Incompatible, FileNotFoundError) as error:
                logger.warning("KV page %s is not saved: %s", entry.key[:12], error)
                continue
            _write(temporary / name, page.data)
            pages.append(
                Saved(
                    key=page.key.hex(),
                    identity=page.identity.hex(),
                    parent=page.parent.hex(),
                    number=page.number,
                    bytes=len(page.data),
                    pinned=entry.pinned,
                    records=list(entry.records),
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


def fetch(saved: Saved, file: Path, folder: Path) -> Path | None:
    """A verified copy of a saved page as a temporary file of ``folder``, or None (with a warning) if it is no good."""
    temporary = folder / f"{saved.key}.{secrets.token_hex(8)}.tmp"
    try:
        try:
            source = Page(file)
            _write(temporary, source.data)
            copy = Page(temporary)
            copy.verify()
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (Corrupt, Incompatible, FileNotFoundError) as error:
        logger.warning("saved KV page %s is passed over: %s", saved.key[:12], error)
        return None
    except OSError as error:
        raise _store_error(error, f"saved KV pages can't be brought back to {folder}") from error
    found = (copy.key.hex(), copy.identity.hex(), copy.parent.hex(), copy.number, len(copy.data))
    if found != (saved.key, saved.identity, saved.parent, saved.number, saved.bytes):
        logger.warning("saved KV page %s is passed over: it is not the page that the list names", saved.key[:12])
        temporary.unlink(missing_ok=True)
        return None
    return temporary


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
