"""Export and load: records in and out as JSON lines, and in from other memories (importers.py).

An export has a header, then one object per record: the record, its older versions, what it was written from and what it
superseded; on request its vectors. Pages and LoRA versions are not in it: they are derived.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from . import importers
from .engine import Engine
from .errors import Incompatible, InvalidInput, NotFound, ProviderError, ScopeError, StoreError
from .flow import Flow
from .flows import catch_up
from .plaintext import lineage
from .plaintext.drafts import Draft, Redact, check_path, draft_of, shown
from .plaintext.records import ID, new_id
from .plaintext.rows import Passages
from .types import Record, Scope

if TYPE_CHECKING:
    from .plaintext.encoded import Embedder

__all__ = ["export", "load"]

#: 2 added what a record was written from and superseded, and vectors. 1 is read too.
FORMAT = 2
PAGE = 500
_log = logging.getLogger("agentmem")


def export(engine: Engine, scope: Scope, path: str | os.PathLike[str], *, vectors: bool = False) -> int:
    """Write the records of this scope and beneath it to ``path`` (0600, replaced as a whole); returns how many.

    ``vectors`` adds those of the current embedder, so that whoever loads the file with the same one embeds nothing.
    """
    target = check_path(path)
    space = engine.space if vectors else None
    embedder = engine.embedder if space is not None else None
    temporary = target.parent / f".{target.name}.{new_id()}.tmp"
    written = 0
    try:
        with os.fdopen(os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "w", encoding="utf-8") as file:
            file.write(
                json.dumps({"format": "agentmem-records", "version": FORMAT, "embedder": _named(embedder)}) + "\n"
            )
            for page in _pages(engine, scope):
                for line in _lines(engine, scope, page, space):
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


def _named(embedder: Embedder | None) -> dict[str, Any] | None:
    if embedder is None:
        return None
    return {"name": embedder.name, "digest": embedder.digest, "dimension": embedder.dimension}


def _pages(engine: Engine, scope: Scope) -> Iterator[list[Record]]:
    after = None
    while page := engine.records.list(scope, limit=PAGE, after=after):
        yield [record for record in page if record.scope.within(scope)]
        after = page[-1].id


def _lines(engine: Engine, scope: Scope, page: Sequence[Record], space: int | None) -> Iterator[dict[str, Any]]:
    ids = [record.id for record in page]
    sources = lineage.sources(engine.database, ids)
    superseded: dict[str, list[str]] = {}
    for newer, older_id in lineage.edges(engine.database, ids):
        superseded.setdefault(newer, []).append(older_id)
    passages = {} if space is None else _passages(engine, ids, space)
    told: list[tuple[str, Mapping[str, Any]]] = [("from", sources), ("supersedes", superseded), ("passages", passages)]
    for record in page:
        try:
            *older, _ = engine.records.history(record.id, scope)
        except NotFound:  # forgotten by another process this very moment
            continue
        line: dict[str, Any] = {
            "record": record.model_dump(mode="json"),
            "older": [version.model_dump(mode="json") for version in older],
        }
        for name, value in told:
            if record.id in value:
                line[name] = value[record.id]
        yield line


def _passages(engine: Engine, ids: Sequence[str], space: int) -> dict[str, list[list[Any]]]:
    rows = engine.database.query(
        "SELECT records.id, vectors.start, vectors.stop, vectors.vector, tokens.codes FROM json_each(?) AS wanted"
        " CROSS JOIN records ON records.id = wanted.value"
        " CROSS JOIN vectors ON vectors.space = ? AND vectors.seq = records.seq"
        " LEFT JOIN tokens ON tokens.space = vectors.space AND tokens.seq = vectors.seq AND tokens.part = vectors.part"
        " ORDER BY vectors.seq, vectors.part",
        (json.dumps(list(ids)), space),
    )
    found: dict[str, list[list[Any]]] = {}
    for row in rows:
        blobs = [None if blob is None else base64.b64encode(blob).decode() for blob in (row["vector"], row["codes"])]
        found.setdefault(row["id"], []).append([row["start"], row["stop"], *blobs])
    return found


# ---- load ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One record to bring in. ``passages`` is None where its text has to be embedded here."""

    id: str
    draft: Draft
    older: Sequence[Record] = ()
    origins: Sequence[str] = ()
    supersedes: Sequence[str] = ()
    passages: Passages | None = None


def load(engine: Engine, scope: Scope, path: str | os.PathLike[str], format: str = "auto") -> Flow[int]:
    """Bring records in, all of a file in one transaction; returns how many were new.

    The whole file is read and checked before anything is written. Records that exist here, or were forgotten here, are
    passed over, so a call can be repeated. What comes without vectors is embedded afterwards.
    """
    source = check_path(path)
    if format not in ("auto", *importers.FORMATS):
        raise InvalidInput(f"format is {shown(format)}: use auto, {', '.join(importers.FORMATS)}")
    chosen = importers.detect(source) if format == "auto" else format
    if chosen == "agentmem":
        lines = _read(source, scope, engine.redact, engine.embedder)
    else:
        items = importers.read(source, scope, chosen, engine.redact)
        lines = [_Line(id=item.id, draft=item.draft, older=item.older) for item in items]
    # Asked ahead of the transaction: a new space may cost a request to its embedder.
    space = engine.space if any(line.passages is not None for line in lines) else None
    with engine.database.write() as connection:
        known = _known(engine, [line.id for line in lines])
        new = [line for line in lines if line.id not in known]
        # In the order of the file: it is the order of arrival that everything else goes by.
        for embedded, run in groupby(new, key=lambda line: line.passages is not None):
            batch = list(run)
            engine.records.insert(
                [line.draft for line in batch],
                _joined([line.passages for line in batch if line.passages is not None]) if embedded else None,
                space if embedded else None,
                ids=[line.id for line in batch],
                older=[line.older for line in batch],
            )
        # A file may name any id: only what this scope sees is linked with.
        named = {id_ for line in new for id_ in (*line.origins, *line.supersedes)}
        seen = {line.id for line in lines} | {record.id for record in engine.records.named(sorted(named), scope)}
        for kind, field in (("record", "origins"), ("supersedes", "supersedes")):
            pairs = [(line.id, id_) for line in new for id_ in getattr(line, field) if id_ in seen]
            lineage.link(connection, kind, pairs)
    try:
        yield from catch_up(engine)
    except ProviderError as error:
        _log.warning("what was loaded has no vectors yet, the embedder failed: %s", error)
    return len(new)


def _known(engine: Engine, ids: Sequence[str]) -> set[str]:
    """Those of these ids that a record has, or had before it was forgotten."""
    rows = engine.database.query(
        "SELECT wanted.value AS id FROM json_each(?) AS wanted WHERE EXISTS (SELECT 1 FROM records WHERE id = value)"
        " OR EXISTS (SELECT 1 FROM tombstones WHERE record = value)",
        (json.dumps(list(ids)),),
    )
    return {row["id"] for row in rows}


def _joined(passages: Sequence[Passages]) -> Passages:
    import numpy as np

    codes = [code for some in passages for code in some.codes or ()]
    vectors = np.concatenate([some.vectors for some in passages])
    return Passages([span for some in passages for span in some.spans], vectors, codes if codes else None)


def _read(path: Path, scope: Scope, redact: Redact | None, embedder: Embedder | None) -> list[_Line]:
    """The records of an export, each fit to be stored."""
    try:
        lines = importers.read_file(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text") from error
    header = _parsed(path, 1, lines[0])
    if header.get("format") != "agentmem-records":
        raise InvalidInput(f"{path} is not an export of agentmem: its first line has no format")
    if header.get("version") not in (1, FORMAT):
        raise Incompatible(
            f"{path} has export version {header.get('version')!r}; this version of agentmem reads 1 to {FORMAT}"
        )
    same = embedder is not None and header.get("embedder") == _named(embedder)
    found: dict[str, _Line] = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        parsed = _parsed(path, number, line)
        try:
            record = Record.model_validate(parsed["record"])
            older = [Record.model_validate(version) for version in parsed["older"]]
            draft, *past = [draft_of(version, redact) for version in (record, *older)]
            passages = None
            # Vectors of an unredacted text tell what it said.
            if same and embedder is not None and "passages" in parsed and draft.text == record.text:
                passages = _passages_of(parsed["passages"], draft, embedder.dimension)
        except (KeyError, TypeError, ValueError, ValidationError, ScopeError) as error:
            raise InvalidInput(f"{path}, line {number}: not a record ({error})") from error
        if not ID.fullmatch(record.id) or record.id in found:
            raise InvalidInput(f"{path}, line {number}: its id is malformed or came before")
        if not record.scope.within(scope):
            raise ScopeError(f"{path}, line {number}: its scope ({record.scope}) is outside this handle's ({scope})")
        found[record.id] = _Line(
            id=record.id,
            draft=draft,
            older=[
                version.model_copy(update={"text": kept.text, "metadata": json.loads(kept.metadata)})
                for version, kept in zip(older, past, strict=True)
            ],
            origins=_listed(path, number, parsed, "from"),
            supersedes=_listed(path, number, parsed, "supersedes"),
            passages=passages,
        )
    return list(found.values())


def _listed(path: Path, number: int, line: dict[str, Any], key: str) -> list[str]:
    ids = line.get(key, [])
    if not isinstance(ids, list) or not all(isinstance(id_, str) and ID.fullmatch(id_) for id_ in ids):
        raise InvalidInput(f"{path}, line {number}: {key} is no list of record ids")
    return ids


def _passages_of(listed: Any, draft: Draft, dimension: int) -> Passages | None:
    """A record's passages from an export; None where there are none, `ValueError` where they don't fit its text."""
    import numpy as np

    if not listed:
        return None
    spans, vectors, codes = [], [], []
    for start, stop, vector, code in listed:
        if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= len(draft.text):
            raise ValueError(f"its passage {shown((start, stop))} lies outside its text")
        blob = base64.b64decode(vector, validate=True)
        if len(blob) != 4 * dimension:
            raise ValueError(f"a vector has {len(blob)} bytes, {4 * dimension} were expected")
        spans.append((start, stop))
        vectors.append(np.frombuffer(blob, "<f4"))
        codes.append(None if code is None else base64.b64decode(code, validate=True))
    matrix = np.stack(vectors).astype(np.float32)
    if not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
        raise ValueError("a vector is all zeros or holds NaN or infinity")
    kept = [code for code in codes if code is not None]
    return Passages([spans], matrix, kept if len(kept) == len(codes) else None)


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise InvalidInput(f"{path}, line {number}: not a JSON object")
    return parsed
