"""LoRA versions of one folder: immutable, named by content, gated, switched per scope, tied to the records they learnt.

Rows in ``memory.db`` are the truth, ``lora/<digest>/`` holds the files, which can be trained again. A version is in the
table only after its files are on the disk, and gone from the table before its files go, so ``kill -9`` at any point
leaves either all of a version or none. Knows rows and scopes; never computes with a tensor.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from agentmem.database import Database
from agentmem.errors import Full, InvalidInput, NotFound, ScopeError, StoreError, TrainingError
from agentmem.provider import LoraRef
from agentmem.types import Scope

from .activations import FOLLOWS, active_digests, answering, deactivate, last_used, named, own_digests, places
from .corpus import record_digest
from .folder import MANIFEST, VersionFolder
from .gate import GateReport
from .lora import CONFIG, WEIGHTS, save, write_file
from .versions import (
    LoraVersion,
    chunks,
    columns,
    judged_alike,
    manifest_of,
    scope_of,
    unfit_always,
    version_of,
    visible,
)

if TYPE_CHECKING:
    from .lora import Lora
    from .train import Trained

__all__ = ["MANIFEST", "RETRAIN", "LoraVersion", "Registry"]

#: The kind of job that a retired version leaves: train its shard again from the records that remain.
RETRAIN = "retrain"
_PUBLISHED = "SELECT digest FROM published"
_logger = logging.getLogger("agentmem")


class Registry:
    """The LoRA versions in ``folder``, with their rows in ``database``. ``clock()`` gives UTC seconds.

    ``budget`` is how many bytes of them may be on the disk; inactive ones go first to make room. Safe for many threads
    and processes. What an earlier process left half-done is cleared when this opens.
    """

    def __init__(
        self,
        database: Database,
        folder: str | os.PathLike[str],
        clock: Callable[[], float],
        *,
        budget: int | None = None,
    ) -> None:
        self._database = database
        self._files = VersionFolder(folder)
        self._clock = clock
        self._budget = budget
        self.sweep()

    # ---- versions

    def add(
        self,
        trained: Trained,
        *,
        scope: Scope,
        gate: GateReport,
        parents: Sequence[str] = (),
        left_out: Sequence[tuple[str, str]] = (),
        keep: Sequence[str] = (),
        run: str = "",
    ) -> LoraVersion:
        """Store a trained LoRA as a version of ``scope``; it is not active yet. Returns when it is safely on the disk.

        Adding the same one again gives the same version, measured by this ``gate``. ``keep`` are digests that must not
        make room for it, ``run`` the key by which `found` finds it again. Raises `TrainingError` if one of its records
        was forgotten or changed while it was trained, `Full` where the budget or the disk has no room for it,
        `StoreError` where it can't be written; then nothing is kept.
        """
        with self._files.guard(), self._files.staged() as staging:
            digest = save(staging, _signed(trained.lora, scope))
            version = LoraVersion(
                name=f"lora-{digest[:12]}",
                digest=digest,
                scope=scope,
                created=dt.datetime.fromtimestamp(self._clock(), dt.UTC),
                records=tuple(trained.records),
                left_out=tuple(left_out),
                base=trained.base,
                identity=trained.identity,
                gate=gate,
                state="ready" if gate.passed else "failed",
                parents=tuple(parents),
                bytes=sum((staging / name).stat().st_size for name in (CONFIG, WEIGHTS)),
                cpu_seconds=trained.cpu_seconds,
                seconds=trained.seconds,
                seed=trained.seed,
                recipe={**trained.recipe, "epochs": trained.epochs},
                curve=trained.curve,
                reproducible=trained.reproducible,
                activated=trained.lora.activated,
            )
            manifest = manifest_of(version, trained.records, run)
            write_file(staging / MANIFEST, manifest.encode())
            with self._database.write() as connection:
                _refuse_stale(connection, trained.records)
                found = connection.execute("SELECT * FROM loras WHERE digest = ?", (digest,)).fetchone()
                if found is not None and found["state"] != "retired" and self._files.sound(digest):
                    held = version_of(found, self._active_digests(scope))
                    if judged_alike(held.gate, gate.thresholds, filtered=gate.gated_intrusion is not None):
                        return held
                evicted = self._make_room(connection, version, {*keep, digest})
                self._files.publish(staging, digest)
                connection.execute(
                    "INSERT OR REPLACE INTO loras (digest, name, state, created, tenant, user, agent, session, "
                    "manifest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (digest, version.name, version.state, version.created.timestamp(), *columns(scope), manifest),
                )
                connection.executemany(
                    "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('lora', ?, ?)",
                    [(digest, record) for record in trained.records],
                )
        for name in evicted:
            self._files.delete(name)
        return version

    def found(self, run: str, scope: Scope) -> LoraVersion | None:
        """The version that a run of this key made, where it is still whole; None: it has to be trained."""
        rows = self._database.query(
            "SELECT * FROM loras WHERE state != 'retired' AND json_extract(manifest, '$.run') = ?", (run,)
        )
        sound = [row for row in rows if scope_of(row) == scope and self._files.sound(row["digest"])]
        return version_of(sound[0], self._active_digests(scope)) if sound else None

    @contextlib.contextmanager
    def run(self, key: str, contents: Mapping[str, str]) -> Generator[Path | None]:
        """Where a training run keeps its checkpoint; see `VersionFolder.run`. Raises `TrainingError` at once where one
        of its records is gone or changed already; no checkpoint of such a run stays."""
        with self._files.run(key, contents) as checkpoint:
            try:
                # Now that the folder says what is learnt: whatever is forgotten from here on finds it.
                _refuse_stale(self._database, dict(contents))
                yield checkpoint
            except TrainingError:
                self.drop_runs()
                raise

    def versions(self, scope: Scope) -> list[LoraVersion]:
        """The versions that this scope can see (its own, those beneath it, those of the levels above), newest first."""
        rows = self._database.query("SELECT * FROM loras ORDER BY created DESC, digest")
        active = self._active_digests(scope)
        return [version_of(row, active) for row in self._seen(rows, scope)]

    def get(self, version: str | LoraVersion, scope: Scope) -> LoraVersion:
        """A version by its name or digest, as it is now.

        Raises `NotFound` where this scope can't see such a version.
        """
        wanted = getattr(version, "digest", version)
        if not isinstance(wanted, str) or not wanted:
            raise InvalidInput(f"a LoRA version is named by its name or digest, not by a {type(wanted).__name__}")
        rows = self._database.query("SELECT * FROM loras WHERE digest = ? OR name = ?", (wanted, wanted))
        for row in self._seen(rows, scope):
            return version_of(row, self._active_digests(scope))
        raise NotFound(f"no LoRA version {wanted!r} in {scope}")

    # ---- what answers

    def active(self, scope: Scope) -> tuple[LoraVersion, ...]:
        """The versions that this scope answers with: those of its own newest activation, and of the levels above those
        that act here too (`activate`, `join`); without an activation of its own, what the level above answers with.

        Empty is the base model: nothing was activated, or what was is damaged (which is logged). A version that learnt
        a record which has ended since (``valid_until``, superseded) is retired here. One of a level above that learnt
        what this scope can't read (another user's records) acts there, never here.
        """
        digests = self._active_digests(scope)
        if not digests:
            return ()
        if ended := self._ended(digests):
            try:
                self.retire(list(ended), records=[record for records in ended.values() for record in records])
            except StoreError as error:  # a full disk must not keep anybody from an answer
                _logger.warning("a LoRA version that learnt what holds no longer could not be retired: %s", error)
        rows = {row["digest"]: row for row in self._seen(self._rows(digests), scope) if row["state"] != "retired"}
        found: list[LoraVersion] = []
        for digest in digests:
            if digest not in rows or digest in ended:
                continue
            try:
                self._files.check(digest)
            except (StoreError, NotFound) as error:
                _logger.warning("the LoRA version lora-%s is not used: %s", digest[:12], error)
                continue
            found.append(version_of(rows[digest], digests))
        return tuple(found)

    def refs(self, scope: Scope, *, identity: bytes | None, always: bool = False) -> tuple[LoraRef, ...]:
        """What a request of this scope carries as `Request.loras` on the base model ``identity``; empty for the base.

        A version that was trained on another base, or is damaged, is left out and logged; where ``identity`` is None
        the base is not compared (a server's, whose weights can't be seen). So is, with ``always`` (it would act on
        every request), one that passed its gate only because it acts on what concerns it.
        """
        found: list[LoraRef] = []
        for version in self.active(scope):
            if identity is not None and version.identity != identity.hex():
                _logger.warning("%s is not used: it was trained on another base model (%s)", version.name, version.base)
                continue
            if always and (why := unfit_always(version)):
                _logger.warning(
                    "%s is not used: its gate let it act only on what concerns it (%s): train it again with "
                    "lora_when = 'always'",
                    version.name,
                    "; ".join(why),
                )
                continue
            found.append(self.ref(version))
        return tuple(found)

    def ref(self, version: LoraVersion) -> LoraRef:
        """How a provider is told to answer with ``version``.

        Raises `Corrupt` for damaged files, `NotFound` where they are gone.
        """
        self._files.check(version.digest)
        path = str(self._files.path(version.digest))
        return LoraRef(
            name=version.name,
            digest=version.digest,
            path=path,
            records=version.records,
            activated=version.activated,
        )

    def activate(
        self, versions: Sequence[str | LoraVersion], scope: Scope, *, force: bool = False, follow: bool = False
    ) -> tuple[LoraVersion, ...]:
        """Answer with exactly these versions, their sum, in ``scope`` and beneath it from the next request on.

        None of them is the base model; with ``follow`` what the level above answers with acts beside them, whatever it
        is at the time. One transaction: all act or none. Raises `TrainingError` for a retired version,
        or one that failed its gate (unless ``force``, or it is active here already); `ScopeError` for one that was
        trained from a narrower scope, which would tell one user's facts to others; `Corrupt` for damaged files.
        """
        with self._database.write() as connection:  # as they are now, under the write lock
            found = {version.digest: version for version in (self.get(wanted, scope) for wanted in versions)}
            for version in found.values():
                self._admit(version, scope, force=force)
            connection.execute(
                "INSERT INTO activations (at, digest, tenant, user, agent, session) VALUES (?, ?, ?, ?, ?, ?)",
                (self._clock(), " ".join([FOLLOWS, *found] if follow else found), *columns(scope)),
            )
        return tuple(version.model_copy(update={"active": True}) for version in found.values())

    def join(
        self, versions: Sequence[str], scope: Scope, *, instead_of: Collection[str] = (), force: bool = False
    ) -> None:
        """Answer with these digests too, beside what answers in ``scope`` and in the place of ``instead_of``.

        What a level above answers with stays that level's to change: a rollback there takes it back here as well. Only
        where one of those is replaced, the others are held on to here. Errors as of `activate`.
        """
        with self._database.write():
            acting = [version.digest for version in self.active(scope)]
            own, follow = own_digests(self._database, scope)
            gone = {*instead_of, *versions}
            if follow and not gone.isdisjoint(set(acting) - set(own)):
                own, follow = acting, False
            self.activate(
                [*(d for d in acting if d in own and d not in gone), *versions], scope, force=force, follow=follow
            )

    def _admit(self, version: LoraVersion, scope: Scope, *, force: bool) -> None:
        if not scope.within(version.scope):
            raise ScopeError(f"{version.name} learnt records of {version.scope}: it can't answer for all of {scope}")
        if version.state == "retired":
            raise TrainingError(f"{version.name} is retired, a record it learnt is gone: train a new version")
        if version.state == "failed" and not (force or version.active):
            raise TrainingError(
                f"{version.name} did not pass its gate ({version.gate}): force=True activates it anyway"
            )
        self._files.check(version.digest)

    def rollback(self, scope: Scope) -> tuple[LoraVersion, ...]:
        """Undo the newest activation at this scope; returns what answers now, empty for the base model."""
        with self._database.write() as connection:
            connection.execute(
                "DELETE FROM activations WHERE id = (SELECT MAX(id) FROM activations WHERE "
                "tenant = ? AND user = ? AND agent = ? AND session = ?)",
                columns(scope),
            )
        return self.active(scope)

    # ---- forgetting

    def made_from(self, records: Sequence[str]) -> list[str]:
        """The digests of the versions that learnt any of these records."""
        found: set[str] = set()
        for part in chunks(records):
            marks = ", ".join("?" * len(part))
            sql = f"SELECT DISTINCT key FROM lineage WHERE kind = 'lora' AND record IN ({marks})"
            found.update(row["key"] for row in self._database.query(sql, part))
        return sorted(found)

    def taint(self, digests: Iterable[str], records: Sequence[str]) -> list[str]:
        """Take these versions out of use for good, in every scope, in the transaction that is open or one of its own.

        ``records`` are what was forgotten or changed. Of a version that answered somewhere, a job is left that trains
        its shard again without them. The files are deleted by `retire`, after the transaction. Rows stay as a trace,
        without the digests of what they learnt. Returns those that were not retired yet.
        """
        tainted: list[str] = []
        with self._database.write() as connection:
            for digest in digests:
                row = connection.execute("SELECT * FROM loras WHERE digest = ?", (digest,)).fetchone()
                if row is None:
                    continue
                if row["state"] != "retired":
                    tainted.append(digest)
                    manifest = {**json.loads(row["manifest"]), "contents": {}, "state": "retired"}
                    gone = sorted(set(records) & set(manifest["records"]))
                    if where := places(connection, digest):
                        note = {"places": where, "forced": row["state"] == "failed", "records": gone}
                        connection.execute(
                            "INSERT OR REPLACE INTO jobs (kind, record, state, note, at) VALUES (?, ?, 'queued', ?, ?)",
                            (RETRAIN, digest, json.dumps(note), self._clock()),
                        )
                    connection.execute(
                        "UPDATE loras SET state = 'retired', manifest = ? WHERE digest = ?",
                        (json.dumps(manifest, sort_keys=True), digest),
                    )
                deactivate(connection, digest)
                connection.execute("DELETE FROM lineage WHERE kind = 'lora' AND key = ?", (digest,))
        return tainted

    def retire(self, digests: Sequence[str], *, records: Sequence[str] = ()) -> list[str]:
        """`taint` and delete the files; returns those that were not retired yet. Safe to repeat: what was cut short is
        finished."""
        retired = self.taint(digests, records)
        for digest in digests:
            self._files.delete(digest)
        return retired

    def drop_runs(self) -> None:
        """Delete the checkpoints of interrupted runs that learnt a record which was forgotten or changed since."""
        self._files.drop_runs(self._stale)

    def sweep(self) -> None:
        """Delete what no version owns: a write or a run that was cut short, files of retired versions."""
        if not self._files.folder.is_dir():
            return
        with contextlib.suppress(StoreError), self._files.guard(wait=False) as free:
            if free:
                rows = self._database.query("SELECT digest FROM loras WHERE state != 'retired'")
                self._files.sweep({row["digest"] for row in rows}, self._stale)

    def _stale(self, contents: Mapping[str, str]) -> bool:
        try:
            _refuse_stale(self._database, dict(contents))
        except TrainingError:
            return True
        return False

    def _ended(self, digests: Sequence[str]) -> dict[str, list[str]]:
        """Of these versions those that learnt a record which holds no longer, with its id."""
        marks = ", ".join("?" * len(digests))
        rows = self._database.query(
            "SELECT key, record FROM lineage CROSS JOIN records ON id = record "
            f"WHERE kind = 'lora' AND key IN ({marks}) AND until_s <= ?",
            (*digests, self._clock()),
        )
        found: dict[str, list[str]] = {}
        for key, record in rows:
            found.setdefault(key, []).append(record)
        return found

    # ---- files

    def verify(self) -> list[str]:
        """Read every version in full and name what is damaged or belongs to nothing, with what to do about it."""
        problems: list[str] = []
        self._files.recheck()
        rows = self._database.query("SELECT * FROM loras ORDER BY created, digest")
        held = {row["digest"]: row for row in rows if row["state"] != "retired"}
        for digest, row in held.items():
            try:
                self._files.check(digest)
                if self._files.manifest(digest) != row["manifest"]:
                    problems.append(
                        f"LoRA version {row['name']}: its {MANIFEST} is not what the database says: train it again"
                    )
                learnt = set(version_of(row).records)
            except (StoreError, NotFound) as error:
                problems.append(f"LoRA version {row['name']}: {error}")
                continue
            except ValueError:
                problems.append(f"LoRA version {row['name']}: its row can't be read: restore a backup")
                continue
            sql = "SELECT record FROM lineage WHERE kind = 'lora' AND key = ?"
            if {found["record"] for found in self._database.query(sql, (digest,))} != learnt:
                problems.append(f"LoRA version {row['name']}: its lineage is not what it learnt: train it again")
        for row in self._database.query("SELECT digest FROM activations"):
            problems += [
                f"an activation names lora-{digest[:12]}, which is not there: activate another version"
                for digest in named(row)
                if digest not in held
            ]
        with self._files.guard() as _:  # what is being written now is no orphan
            held = {row["digest"]: row for row in self._database.query("SELECT digest FROM loras")}
            problems += [
                f"{self._files.path(name)} belongs to no LoRA version: reopen the memory to delete it"
                for name in self._files.names()
                if name not in held
            ]
        return list(dict.fromkeys(problems))

    def bytes(self) -> int:
        """Bytes on disk of all versions."""
        return self._files.bytes()

    # ---- rows

    def _make_room(self, connection: sqlite3.Connection, version: LoraVersion, keep: set[str]) -> list[str]:
        """Take the inactive versions that were longest not used out of the tables, until ``version`` fits the budget.

        Returns their digests: their files go after the commit. What is active anywhere stays, and what an engine was
        given, or forgetting would not find it there; else `Full`.
        """
        if self._budget is None:
            return []
        held = connection.execute("SELECT digest, created, manifest FROM loras WHERE state != 'retired'").fetchall()
        sizes = {row["digest"]: json.loads(row["manifest"])["bytes"] for row in held if row["digest"] != version.digest}
        used = {row["digest"]: row["created"] for row in held} | last_used(connection)
        total = sum(sizes.values()) + version.bytes
        evicted: list[str] = []
        held_on_to = keep | answering(connection) | {row["digest"] for row in connection.execute(_PUBLISHED)}
        for digest in sorted(set(sizes) - held_on_to, key=lambda digest: (used[digest], digest)):
            if total <= self._budget:
                break
            total -= sizes[digest]
            evicted.append(digest)
            deactivate(connection, digest)
            connection.execute("DELETE FROM lineage WHERE kind = 'lora' AND key = ?", (digest,))
            connection.execute("DELETE FROM loras WHERE digest = ?", (digest,))
        if total > self._budget:
            raise Full(
                f"the LoRA versions that are active or published and {version.name} take {total} bytes, lora_budget is "
                f"{self._budget}: raise it, or deactivate or unpublish a version"
            )
        if evicted:
            _logger.info("%d inactive LoRA versions made room (lora_budget is %d)", len(evicted), self._budget)
        return evicted

    def _rows(self, digests: Sequence[str]) -> list[sqlite3.Row]:
        marks = ", ".join("?" * len(digests))
        return self._database.query(f"SELECT * FROM loras WHERE digest IN ({marks})", digests)

    def _seen(self, rows: Sequence[sqlite3.Row], scope: Scope) -> list[sqlite3.Row]:
        """Those of these rows of ``loras`` that a handle of ``scope`` may use: of what the levels above learnt, only
        versions whose every record it may read. Sessions of one user share them; those without a user may be
        anybody's."""
        seen = [row for row in rows if visible(scope_of(row), scope)]
        above = [row["digest"] for row in seen if scope_of(row) != scope and scope.within(scope_of(row))]
        reader = scope.model_copy(update={"session": None}) if scope.user else scope
        strange: set[str] = set()
        for part in chunks(above):
            sql = (
                "SELECT DISTINCT key, tenant, user, agent, CASE WHEN user = '' THEN session ELSE '' END AS session "
                "FROM lineage CROSS JOIN records ON id = record "
                f"WHERE kind = 'lora' AND key IN ({', '.join('?' * len(part))})"
            )
            strange |= {row["key"] for row in self._database.query(sql, part) if not visible(scope_of(row), reader)}
        return [row for row in seen if row["digest"] not in strange]

    def _active_digests(self, scope: Scope) -> list[str]:
        return active_digests(self._database, scope)


def _signed(lora: Lora, scope: Scope) -> Lora:
    """The LoRA with its scope in its digest: one that two scopes trained from the same records is two versions.

    Mixed with the digest of the records, so that no scope name can be guessed from an exported file.
    """
    sign = hashlib.sha256(json.dumps([lora.notes.get("records", ""), *columns(scope)]).encode()).hexdigest()
    return replace(lora, notes={**lora.notes, "records": sign})


def _refuse_stale(source: sqlite3.Connection | Database, records: dict[str, str]) -> None:
    """A record that was forgotten or changed during the training must not come back through the weights."""
    ask = source.query if isinstance(source, Database) else source.execute
    for part in chunks(list(records)):
        marks = ", ".join("?" * len(part))
        for row in ask(f"SELECT record FROM tombstones WHERE record IN ({marks})", part):
            raise TrainingError(f"record {row['record']} was forgotten while it was learnt: train again without it")
        for row in ask(f"SELECT id, text FROM records WHERE id IN ({marks})", part):
            if record_digest(row["text"]) != records[row["id"]]:
                raise TrainingError(f"record {row['id']} was changed while it was learnt: train again")
