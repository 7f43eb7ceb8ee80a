"""LoRA versions of one folder: immutable, named by content, gated, switched per scope, tied to the records they learnt.

Rows in ``memory.db`` are the truth, ``lora/<digest>/`` holds the files, which can be trained again. A version is in the
table only after its files are on the disk, and gone from the table before its files go, so ``kill -9`` at any point
leaves either all of a version or none. Knows files, rows and scopes; never computes with a tensor.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from agentmem.database import Database
from agentmem.errors import Corrupt, InvalidInput, NotFound, ScopeError, StoreError, TrainingError
from agentmem.provider import LoraRef
from agentmem.types import LEVELS, Scope, Value

from .corpus import record_digest
from .gate import GateReport
from .lora import CONFIG, WEIGHTS, content_digest, disk_error, flush_folder, save, write_file

if TYPE_CHECKING:
    from .lora import Lora
    from .train import Trained

__all__ = ["MANIFEST", "LoraVersion", "Registry"]

MANIFEST = "manifest.json"
_NEW = ".new-"
_logger = logging.getLogger("agentmem")


class LoraVersion(Value):
    """One trained LoRA. ``name`` is ``lora-`` and the first twelve digits of ``digest``, the SHA-256 of its two files.

    ``records`` are the ids of the records that it learnt, ``base`` is the model's name and ``identity`` the digest of
    its weights. ``active``: the scope that was asked about answers with it. ``state`` is ``failed`` where the gate
    was not passed and ``retired`` where a record that it learnt was forgotten or changed (its files are gone).
    """

    name: str
    digest: str
    scope: Scope
    created: dt.datetime
    records: tuple[str, ...]
    base: str
    identity: str
    gate: GateReport
    state: Literal["ready", "failed", "retired"]
    active: bool = False
    bytes: int
    cpu_seconds: float
    seed: int = 0
    recipe: dict[str, Any] = Field(default_factory=dict)

    def __str__(self) -> str:
        mark = " (active)" if self.active else ""
        return (
            f"{self.name}{mark}: {self.state}, {len(self.records)} records of {self.scope}, on {self.base}, "
            f"{self.bytes / 1e6:.2f} MB, {self.cpu_seconds:.0f} CPU-seconds; gate {self.gate}"
        )


class Registry:
    """The LoRA versions in ``folder``, with their rows in ``database``. ``clock()`` gives UTC seconds.

    Safe for many threads and processes. What an earlier process left half-done is cleared when this opens.
    """

    def __init__(self, database: Database, folder: str | os.PathLike[str], clock: Callable[[], float]) -> None:
        self._database = database
        self._folder = Path(folder)
        self._clock = clock
        #: What was checked: digest to (inode, size, mtime) of its files, so that a check costs a stat after the first.
        self._checked: dict[str, tuple[tuple[int, int, int], ...]] = {}
        self.sweep()

    # ---- versions

    def add(self, trained: Trained, *, scope: Scope, gate: GateReport) -> LoraVersion:
        """Store a trained LoRA as a version of ``scope``; it is not active yet. Returns when it is safely on the disk.

        Adding the same one again gives the same version. Raises `TrainingError` if one of its records was forgotten or
        changed while it was trained, `Full` or `StoreError` where it can't be written; then nothing is kept.
        """
        with self._guard(), self._staged() as staging:
            digest = save(staging, _signed(trained.lora, scope))
            version = LoraVersion(
                name=f"lora-{digest[:12]}",
                digest=digest,
                scope=scope,
                created=dt.datetime.fromtimestamp(self._clock(), dt.UTC),
                records=tuple(trained.records),
                base=trained.base,
                identity=trained.identity,
                gate=gate,
                state="ready" if gate.passed else "failed",
                bytes=sum((staging / name).stat().st_size for name in (CONFIG, WEIGHTS)),
                cpu_seconds=trained.cpu_seconds,
                seed=trained.seed,
                recipe={**trained.recipe, "epochs": trained.epochs},
            )
            manifest = json.dumps({"contents": trained.records, **version.model_dump(mode="json")}, sort_keys=True)
            write_file(staging / MANIFEST, manifest.encode())
            with self._database.write() as connection:
                _refuse_stale(connection, trained.records)
                found = connection.execute("SELECT * FROM loras WHERE digest = ?", (digest,)).fetchone()
                if found is not None and found["state"] != "retired" and self._sound(digest):
                    return _version(found, self._active_digest(scope))
                self._publish(staging, digest)
                connection.execute(
                    "INSERT OR REPLACE INTO loras (digest, name, state, created, tenant, user, agent, session, "
                    "manifest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (digest, version.name, version.state, version.created.timestamp(), *_columns(scope), manifest),
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('lora', ?, ?)",
                    [(digest, record) for record in trained.records],
                )
        return version

    def versions(self, scope: Scope) -> list[LoraVersion]:
        """The versions that this scope can see (its own, those beneath it, those of the levels above), newest first."""
        rows = self._database.query("SELECT * FROM loras ORDER BY created DESC, digest")
        active = self._active_digest(scope)
        return [_version(row, active) for row in rows if _visible(_scope(row), scope)]

    def get(self, version: str | LoraVersion, scope: Scope) -> LoraVersion:
        """A version by its name or digest, as it is now.

        Raises `NotFound` where this scope can't see such a version.
        """
        wanted = getattr(version, "digest", version)
        if not isinstance(wanted, str) or not wanted:
            raise InvalidInput(f"a LoRA version is named by its name or digest, not by {wanted!r}")
        for row in self._database.query("SELECT * FROM loras WHERE digest = ? OR name = ?", (wanted, wanted)):
            if _visible(_scope(row), scope):
                return _version(row, self._active_digest(scope))
        raise NotFound(f"no LoRA version {wanted!r} in {scope}")

    # ---- what answers

    def active(self, scope: Scope) -> LoraVersion | None:
        """The version that this scope answers with: its own newest activation, else that of the nearest level above it.

        None is the base model: nothing was activated, or what was is damaged (which is logged).
        """
        digest = self._active_digest(scope)
        if not digest:
            return None
        rows = self._database.query("SELECT * FROM loras WHERE digest = ? AND state != 'retired'", (digest,))
        if not rows:
            return None
        try:
            self._check(digest)
        except (StoreError, NotFound) as error:
            _logger.warning("the LoRA version lora-%s is not used: %s", digest[:12], error)
            return None
        return _version(rows[0], digest)

    def refs(self, scope: Scope, *, identity: bytes) -> tuple[LoraRef, ...]:
        """What a request of this scope carries as `Request.loras` on the base model ``identity``; empty for the base.

        A version that was trained on another base, or is damaged, is left out and logged: the answer is then the
        base's.
        """
        version = self.active(scope)
        if version is None:
            return ()
        if version.identity != identity.hex():
            _logger.warning("%s is not used: it was trained on another base model (%s)", version.name, version.base)
            return ()
        return (self.ref(version),)

    def ref(self, version: LoraVersion) -> LoraRef:
        """How a provider is told to answer with ``version``.

        Raises `Corrupt` for damaged files, `NotFound` where they are gone.
        """
        self._check(version.digest)
        path = str(self._path(version.digest))
        return LoraRef(name=version.name, digest=version.digest, path=path, records=version.records)

    def activate(self, version: str | LoraVersion | None, scope: Scope, *, force: bool = False) -> LoraVersion | None:
        """Answer with ``version`` in ``scope`` and beneath it from the next request on; None is the base model.

        Raises `TrainingError` for a retired version, or one that failed its gate (unless ``force``); `ScopeError` for
        one that was trained from a narrower scope, which would tell one user's facts to others; `Corrupt` for damaged
        files.
        """
        found = None if version is None else self.get(version, scope)
        with self._database.write() as connection:
            if found is not None:
                found = self.get(found.digest, scope)  # as it is now, under the write lock
                if not scope.within(found.scope):
                    raise ScopeError(
                        f"{found.name} learnt records of {found.scope}: it can't answer for all of {scope}"
                    )
                if found.state == "retired":
                    raise TrainingError(f"{found.name} is retired, a record it learnt is gone: train a new version")
                if found.state == "failed" and not force:
                    raise TrainingError(
                        f"{found.name} did not pass its gate ({found.gate}): force=True activates it anyway"
                    )
                self._check(found.digest)
            connection.execute(
                "INSERT INTO activations (at, digest, tenant, user, agent, session) VALUES (?, ?, ?, ?, ?, ?)",
                (self._clock(), found.digest if found else "", *_columns(scope)),
            )
        return None if found is None else found.model_copy(update={"active": True})

    def rollback(self, scope: Scope) -> LoraVersion | None:
        """Undo the newest activation at this scope; returns what answers now, None for the base model."""
        with self._database.write() as connection:
            connection.execute(
                "DELETE FROM activations WHERE id = (SELECT MAX(id) FROM activations WHERE "
                "tenant = ? AND user = ? AND agent = ? AND session = ?)",
                _columns(scope),
            )
        return self.active(scope)

    # ---- forgetting

    def made_from(self, records: Sequence[str]) -> list[str]:
        """The digests of the versions that learnt any of these records."""
        found: set[str] = set()
        for part in _chunks(records):
            marks = ", ".join("?" * len(part))
            sql = f"SELECT DISTINCT key FROM lineage WHERE kind = 'lora' AND record IN ({marks})"
            found.update(row["key"] for row in self._database.query(sql, part))
        return sorted(found)

    def retire(self, digests: Sequence[str]) -> list[str]:
        """Take these versions out of use for good, in every scope, and delete their files; returns those that were
        not yet.

        Their rows stay as a trace, without the digests of what they learnt. Safe to repeat: what was cut short is
        finished.
        """
        retired: list[str] = []
        with self._database.write() as connection:
            for digest in digests:
                row = connection.execute("SELECT * FROM loras WHERE digest = ?", (digest,)).fetchone()
                if row is None:
                    continue
                if row["state"] != "retired":
                    retired.append(digest)
                    manifest = {**json.loads(row["manifest"]), "contents": {}, "state": "retired"}
                    connection.execute(
                        "UPDATE loras SET state = 'retired', manifest = ? WHERE digest = ?",
                        (json.dumps(manifest, sort_keys=True), digest),
                    )
                _deactivate(connection, digest)
                connection.execute("DELETE FROM lineage WHERE kind = 'lora' AND key = ?", (digest,))
        for digest in digests:
            self._checked.pop(digest, None)
            self._delete(self._path(digest))
        return retired

    def sweep(self) -> None:
        """Delete what no version owns: a write that was cut short, files of retired versions."""
        if not self._folder.is_dir():
            return
        with contextlib.suppress(StoreError), self._guard(wait=False) as free:
            if not free:
                return
            rows = self._database.query("SELECT digest FROM loras WHERE state != 'retired'")
            owned = {row["digest"] for row in rows} | {".lock"}
            for entry in self._folder.iterdir():
                if entry.name not in owned:
                    self._delete(entry)

    # ---- files

    def export(self, version: str | LoraVersion, path: str | os.PathLike[str], *, scope: Scope | None = None) -> Path:
        """Copy a version as a PEFT folder (with its manifest) to ``path``, which must not exist or be empty."""
        found = self.get(version, Scope() if scope is None else scope)
        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise InvalidInput(f"{target} exists and is not an empty folder: export to a new one")
        self._check(found.digest)
        source = self._path(found.digest)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, WEIGHTS, MANIFEST):
                write_file(target / name, (source / name).read_bytes())
            flush_folder(target)
        except OSError as error:
            raise disk_error(error, target) from error
        if content_digest(target) != found.digest:
            raise Corrupt(f"{source} changed while it was copied: train {found.name} again")
        return target

    def verify(self) -> list[str]:
        """Read every version in full and name what is damaged, with what to do about it."""
        problems: list[str] = []
        self._checked.clear()
        for row in self._database.query("SELECT digest, name FROM loras WHERE state != 'retired' ORDER BY created"):
            try:
                self._check(row["digest"])
            except (StoreError, NotFound) as error:
                problems.append(f"LoRA version {row['name']}: {error}")
        return problems

    def bytes(self) -> int:
        """Bytes on disk of all versions."""
        total = 0
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process retired it just now
                total += path.stat().st_size
        return total

    def _path(self, digest: str) -> Path:
        return self._folder / digest

    def _check(self, digest: str) -> None:
        """Raise `NotFound` or `Corrupt` unless the files are exactly what ``digest`` names."""
        path = self._path(digest)
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

    def _sound(self, digest: str) -> bool:
        try:
            self._check(digest)
        except (StoreError, NotFound):
            return False
        return True

    @contextlib.contextmanager
    def _staged(self) -> Generator[Path]:
        """A private folder to write into; gone at the end unless it was renamed."""
        staging = self._folder / f"{_NEW}{uuid.uuid4().hex}"
        try:
            staging.mkdir(mode=0o700)
            yield staging
        except OSError as error:
            raise disk_error(error, staging) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _publish(self, staging: Path, digest: str) -> None:
        """Give the finished folder its name. Its row is committed after this, under the same guard."""
        target = self._path(digest)
        if target.exists():  # a damaged or retired one of the same content
            self._delete(target)
        flush_folder(staging)
        staging.rename(target)
        flush_folder(self._folder)

    def _delete(self, path: Path) -> None:
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise disk_error(error, path) from error

    @contextlib.contextmanager
    def _guard(self, *, wait: bool = True) -> Generator[bool]:
        """One process at a time between writing files and committing their row. Freed by the system if it dies."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise disk_error(error, self._folder) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    # ---- rows

    def _active_digest(self, scope: Scope) -> str:
        for level in _upwards(scope):
            rows = self._database.query(
                "SELECT digest FROM activations WHERE tenant = ? AND user = ? AND agent = ? AND session = ? "
                "ORDER BY id DESC LIMIT 1",
                _columns(level),
            )
            if rows:
                return str(rows[0]["digest"])
        return ""


def _version(row: sqlite3.Row, active: str) -> LoraVersion:
    fields = json.loads(row["manifest"])
    fields.pop("contents", None)
    fields.update(state=row["state"], active=row["digest"] == active)
    return LoraVersion.model_validate(fields)


def _signed(lora: Lora, scope: Scope) -> Lora:
    """The LoRA with its scope in its digest: one that two scopes trained from the same records is two versions.

    Mixed with the digest of the records, so that no scope name can be guessed from an exported file.
    """
    sign = hashlib.sha256(json.dumps([lora.notes.get("records", ""), *_columns(scope)]).encode()).hexdigest()
    return replace(lora, notes={**lora.notes, "records": sign})


def _upwards(scope: Scope) -> Iterator[Scope]:
    """The scope itself, then without its session, agent, user and tenant in turn."""
    yield scope
    for level in reversed(LEVELS):
        if getattr(scope, level) is not None:
            scope = scope.model_copy(update={level: None})
            yield scope


def _visible(version: Scope, scope: Scope) -> bool:
    return version.within(scope) or scope.within(version)


def _scope(row: sqlite3.Row) -> Scope:
    return Scope(**{level: row[level] or None for level in LEVELS})


def _columns(scope: Scope) -> tuple[str, ...]:
    return tuple(value or "" for _, value in scope.levels())


def _chunks(values: Sequence[str], size: int = 500) -> Iterator[list[str]]:
    for start in range(0, len(values), size):
        yield list(values[start : start + size])


def _refuse_stale(connection: sqlite3.Connection, records: dict[str, str]) -> None:
    """A record that was forgotten or changed during the training must not come back through the weights."""
    for part in _chunks(list(records)):
        marks = ", ".join("?" * len(part))
        gone = connection.execute(f"SELECT record FROM tombstones WHERE record IN ({marks})", part).fetchone()
        if gone is not None:
            raise TrainingError(f"record {gone['record']} was forgotten while it was learnt: train again without it")
        for row in connection.execute(f"SELECT id, text FROM records WHERE id IN ({marks})", part):
            if record_digest(row["text"]) != records[row["id"]]:
                raise TrainingError(f"record {row['id']} was changed while it was learnt: train again")


def _deactivate(connection: sqlite3.Connection, digest: str) -> None:
    """Where ``digest`` was the newest of several activations, the base follows it: an older version never returns by
    itself."""
    columns = "tenant, user, agent, session"
    # With MAX(id), SQLite takes the bare columns from that row: the newest activation of each scope.
    newest = connection.execute(
        f"SELECT at, digest, {columns}, MAX(id), SUM(digest != ?) AS others FROM activations GROUP BY {columns}",
        (digest,),
    ).fetchall()
    connection.execute("DELETE FROM activations WHERE digest = ?", (digest,))
    connection.executemany(
        f"INSERT INTO activations (at, digest, {columns}) VALUES (?, '', ?, ?, ?, ?)",
        [(row["at"], *(row[level] for level in LEVELS)) for row in newest if row["digest"] == digest and row["others"]],
    )
