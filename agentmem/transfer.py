"""Export and load: records in and out as JSON lines.

A file has a header, then one object per record with its older versions.

Everything needed to rebuild the records is in the file; vectors, pages and LoRA versions are not, they are derived.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from .engine import Engine
from .errors import Incompatible, InvalidInput, ScopeError, StoreError
from .flow import Flow
from .flows import BATCH, embedded, note_embeddings
from .plaintext.drafts import Draft, check_path, draft_of
from .plaintext.records import ID, new_id
from .types import Record, Scope, Usage

__all__ = ["export", "load"]

FORMAT = 1
PAGE = 500


def export(engine: Engine, scope: Scope, path: str | os.PathLike[str]) -> int:
    """Write the records of this scope and beneath it to ``path`` (0600, replaced as a whole); returns how many."""
    target = check_path(path)
    temporary = target.parent / f".{target.name}.{new_id()}.tmp"
    written = 0
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps({"format": "agentmem-records", "version": FORMAT}) + "\n")
            for record in _all(engine, scope):
                older = [version.model_dump(mode="json") for version in engine.records.history(record.id, scope)[:-1]]
                line = {"record": record.model_dump(mode="json"), "older": older}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(f"can't write {target}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # half an export is as private as a whole one
            temporary.unlink(missing_ok=True)
    return written


def _all(engine: Engine, scope: Scope) -> Iterator[Record]:
    after = None
    while page := engine.records.list(scope, limit=PAGE, after=after):
        yield from (record for record in page if record.scope.within(scope))
        after = page[-1].id


def load(engine: Engine, scope: Scope, path: str | os.PathLike[str]) -> Flow[int]:
    """Bring exported records back under their ids; returns how many were new.

    The whole file is read and checked before anything is written. Records that exist here, or were forgotten here, are
    passed over, so that an interrupted call can be repeated. Raises `ScopeError` for a record outside this handle's
    scope, `InvalidInput` for a line that is none.
    """
    found = _read(check_path(path), scope)
    new = [line for line in found.values() if not engine.records.known(line.record.id)]
    for first in range(0, len(new), BATCH):
        batch = new[first : first + BATCH]
        drafts = [line.draft for line in batch]
        noted: list[Usage] = []
        vectors = yield from embedded(engine, [(draft.text, draft.name) for draft in drafts], noted)
        ids, older, space = [line.record.id for line in batch], [line.older for line in batch], engine.space
        with engine.database.write():
            engine.records.insert(drafts, vectors, space, ids=ids, older=older)
            note_embeddings(engine, scope, noted)
    return len(new)


class _Line(NamedTuple):
    record: Record
    older: list[Record]
    draft: Draft


def _read(path: Path, scope: Scope) -> dict[str, _Line]:
    """The records of a file by id, each fit to be stored."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise StoreError(f"can't read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text") from error
    header = _parsed(path, 1, lines[0])
    if header.get("format") != "agentmem-records":
        raise InvalidInput(f"{path} is not an export of agentmem: its first line has no format")
    if header.get("version") != FORMAT:
        raise Incompatible(
            f"{path} has export version {header.get('version')!r}; this version of agentmem reads {FORMAT}"
        )
    found: dict[str, _Line] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        parsed = _parsed(path, number, line)
        try:
            record = Record.model_validate(parsed["record"])
            older = [Record.model_validate(version) for version in parsed["older"]]
            draft, *_ = [draft_of(version) for version in (record, *older)]
        except (KeyError, TypeError, ValidationError, InvalidInput, ScopeError) as error:
            raise InvalidInput(f"{path}, line {number}: not a record ({error})") from error
        if not ID.fullmatch(record.id) or record.id in found:
            raise InvalidInput(f"{path}, line {number}: its id is malformed or came before")
        if not record.scope.within(scope):
            raise ScopeError(f"{path}, line {number}: its scope ({record.scope}) is outside this handle's ({scope})")
        found[record.id] = _Line(record, older, draft)
    return found


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InvalidInput(f"{path}, line {number}: not a JSON object")
    return parsed
