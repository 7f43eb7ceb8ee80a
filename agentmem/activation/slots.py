"""Saved slots of a server that owns its KV (llama.cpp): which file may be restored, which is kept, what must go.

Knows one folder's files, a manifest of ours beside each, the budget and the lineage; knows nothing of HTTP or models.
What a slot's content depends on comes as named facts and is part of the file's name. A file is given out only when its
manifest and its every byte are as they were written: foreign, damaged or doubtful is a miss. The server writes the
files; the records that one is made from are in memory.db before it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._pure import kernels
from ..database import Database
from ..errors import StoreError
from ..provider import SavedSlot
from .identity import digest, token_bytes

__all__ = ["SlotStore", "TenantSlots"]

logger = logging.getLogger("agentmem")

Facts = Mapping[str, str | int]

#: Many values bound as one JSON list.
LISTED = "SELECT value FROM json_each(?)"
#: ``<root>-<tokens>.slot``: digests of (identity, tenant) and of the tokens under it. Nothing can be read from a name.
NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{32})\.slot")
#: A manifest is smaller; a larger file is none of ours.
MANIFEST_BYTES = 65536
#: Bytes read at once for a checksum.
CHUNK = 4 << 20
#: A file without a manifest that is older than this was left by a process that died while it was saved.
ABANDONED_S = 3600.0
#: The folder inside a slot folder for files that failed a check, and how many of the newest stay there.
ASIDE, ASIDE_KEPT = "damaged", 2
#: Restores without effect after which a model and server are only kept warm.
FAILURES = 2


class TenantSlots:
    """The saved slots as one tenant sees them (`agentmem.provider.Slots`)."""

    def __init__(self, store: SlotStore, salt: bytes) -> None:
        self._store = store
        self._salt = salt

    @property
    def step(self) -> int:
        """Tokens by which a prefix grows before it is saved again."""
        return self._store.step

    @property
    def tenant(self) -> bytes:
        """Opaque; equal for requests that may share a slot."""
        return self._salt

    def longest(self, folder: Path, facts: Facts, tokens: Sequence[int]) -> SavedSlot | None:
        """The longest saved slot whose tokens begin ``tokens``, by its manifest alone; costs one look at the folder."""
        root = self._root(facts)
        found: list[tuple[int, str, bool]] = []
        for file in _listed(folder, f"{root.hex()[:32]}-*.slot.json"):
            name = file.name.removesuffix(".json")
            manifest = _read(file)
            if manifest is None and not file.exists():  # another process removed it this moment
                continue
            if manifest is None or not (folder / name).is_file():
                self._store.put_aside(folder, name, "its manifest or its file is missing or damaged")
                continue
            count = manifest["tokens"]
            if 0 < count <= len(tokens) and name == _name(root, tokens[:count]):
                if manifest["facts"] != dict(facts) or manifest["name"] != name:
                    self._store.put_aside(folder, name, "its manifest is another slot's")
                    continue
                found.append((count, name, manifest["head"]))
        if not found:
            return None
        count, name, head = max(found)
        return SavedSlot(name, count, head)

    def sound(self, folder: Path, facts: Facts, tokens: Sequence[int], saved: SavedSlot) -> bool:
        """True if the file is, byte for byte, what its manifest says; else it is put aside. Reads the whole file."""
        manifest = _read(folder / f"{saved.name}.json")
        why = "its manifest is damaged"
        if manifest is not None:
            held = tokens[: saved.tokens]
            told = (manifest["name"], manifest["facts"], manifest["tokens"], manifest["ids"])
            if told != (_name(self._root(facts), held), dict(facts), len(held), _ids(held)):
                why = "its manifest is another slot's"
            else:
                fault = _fault(folder / saved.name, manifest)
                if fault is None:
                    with contextlib.suppress(OSError):  # the order of eviction; a read-only folder has none
                        os.utime(folder / f"{saved.name}.json")
                    return True
                why = fault
        self._store.put_aside(folder, saved.name, why)
        return False

    def reserve(self, folder: Path, facts: Facts, tokens: Sequence[int], records: Sequence[str]) -> str | None:
        """The name to save a slot under that was made from these records; None if it may not be saved.

        The lineage is committed before the server writes a byte, so that no KV of a record is ever without it.
        """
        name = _name(self._root(facts), tokens)
        return name if self._store.announce(folder, name, records) else None

    def keep(
        self,
        folder: Path,
        facts: Facts,
        tokens: Sequence[int],
        *,
        size: int,
        head: bool,
        records: Sequence[str],
        instead_of: str | None = None,
    ) -> bool:
        """Take in the file of ``size`` bytes that was saved under the reserved name; the file ``instead_of`` goes."""
        name = _name(self._root(facts), tokens)
        try:
            found, crc = _checksum(folder / name)
            if not 0 < found == size:
                raise OSError(0, f"it has {found} bytes, the server wrote {size}")
            manifest = {
                "format": 1,
                "name": name,
                "facts": dict(facts),
                "tokens": len(tokens),
                "ids": _ids(tokens),
                "head": head,
                "bytes": size,
                "crc32c": crc,
            }
            _write(folder / f"{name}.json", {**manifest, "digest": _digest(manifest)})
            if self._store.forgotten(records):  # while the server was writing
                self.discard(folder, name)
                return False
        except (OSError, StoreError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("the slot saved in %s is not kept (%s); the chat goes on without it", folder, reason)
            self.discard(folder, name)
            return False
        if instead_of is not None and instead_of != name:
            self.discard(folder, instead_of)
        self._store.keep_budget(folder, but=name)
        return True

    def discard(self, folder: Path, name: str) -> None:
        """Delete this file, its manifest and its lineage."""
        self._store.remove([name], [folder])

    def helps(self, facts: Facts) -> bool:
        """False once restored slots of this model and server have `FAILURES` times saved no computing."""
        return self._store.failures(digest(dict(facts))) < FAILURES

    def judge(self, facts: Facts, *, helped: bool) -> None:
        """Note whether the tokens of a restored slot were really reused."""
        self._store.note(digest(dict(facts)), helped=helped)

    def _root(self, facts: Facts) -> bytes:
        """SHA-256 of the identity and the tenant's salt: another tenant's files can't be found or probed."""
        return hashlib.sha256(
            b"agentmem slot 1\0" + digest(dict(facts)) + len(self._salt).to_bytes(8, "little") + self._salt
        ).digest()


class SlotStore:
    """The slot files of one memory, in whatever folders its servers save them, under one byte budget per folder.

    ``step`` is in tokens, ``budget_bytes`` in bytes of slot files; least recently used goes first.
    """

    def __init__(
        self, database: Database, *, step: int, budget_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.step = step
        self.budget_bytes = budget_bytes
        self._database = database
        self._clock = clock
        for folder in self._folders():
            self._tidy(folder)

    def view(self, salt: bytes) -> TenantSlots:
        """The slots under one tenant's salt."""
        return TenantSlots(self, salt)

    def made_from(self, records: Sequence[str]) -> list[str]:
        """The names of all slot files made from these records."""
        rows = self._database.query(
            f"SELECT DISTINCT key FROM lineage WHERE kind = 'slot' AND record IN ({LISTED}) ORDER BY key",
            [json.dumps(list(records))],
        )
        return [row["key"] for row in rows]

    def delete(self, names: Sequence[str]) -> None:
        """Delete these files wherever this memory ever had slots saved."""
        self.remove(names, self._folders())

    def size(self) -> int:
        """Bytes of all slot files in the folders of this memory."""
        return sum(_size(file) for folder in self._folders() for file in _listed(folder, "*.slot"))

    def verify(self) -> tuple[int, list[str]]:
        """Read every saved slot; how many are sound, and a sentence for each that is damaged.

        Those of other memories that save to the same folder count too: from its name nobody can tell whose a file is.
        Damaged ones are put aside as a use of them would do.
        """
        sound, problems = 0, []
        for folder in self._folders():
            for file in _listed(folder, "*.slot.json"):
                name = file.name.removesuffix(".json")
                manifest = _read(file)
                fault = "its manifest is damaged" if manifest is None else _fault(folder / name, manifest)
                if fault is None:
                    sound += 1
                elif file.exists():  # else it was deleted this moment
                    problems.append(f"{folder / name}: {fault}")
                    self.put_aside(folder, name, fault)
        return sound, sorted(problems)

    # ---- what a tenant's view asks

    def announce(self, folder: Path, name: str, records: Sequence[str]) -> bool:
        """Commit the lineage of a file that is about to be written; False if that may not or can't be."""
        if self.budget_bytes == 0:
            return False
        try:
            with self._database.write() as connection:
                if self.forgotten(records):
                    return False
                connection.executemany(
                    "INSERT OR IGNORE INTO lineage (kind, key, record) VALUES ('slot', ?, ?)",
                    [(name, record) for record in dict.fromkeys(records)],
                )
                known = [str(path) for path in self._folders()]
                if str(folder) not in known:
                    connection.execute(
                        "INSERT OR REPLACE INTO meta VALUES ('slot folders', ?)", (json.dumps([*known, str(folder)]),)
                    )
        except StoreError as error:
            logger.warning("a slot is not saved, its lineage can't be written: %s", error)
            return False
        return True

    def forgotten(self, records: Iterable[str]) -> bool:
        """True if one of these records was forgotten."""
        found = self._database.query(
            f"SELECT record FROM tombstones WHERE record IN ({LISTED}) LIMIT 1", [json.dumps(list(records))]
        )
        return bool(found)

    def remove(self, names: Sequence[str], folders: Sequence[Path]) -> None:
        """Delete these files in these folders, and their lineage."""
        names = [name for name in names if NAME.fullmatch(name)]
        left: set[str] = set()
        for folder in folders:
            for name in names:
                for path in (folder / f"{name}.json", folder / name, folder / ASIDE / name):
                    try:
                        path.unlink(missing_ok=True)
                    except OSError as error:
                        left.add(name)
                        logger.warning("slot file %s can't be deleted (%s): delete it by hand", path, error.strerror)
        try:
            with self._database.write() as connection:
                connection.executemany(
                    "DELETE FROM lineage WHERE kind = 'slot' AND key = ?",
                    [(name,) for name in names if name not in left],
                )
        except StoreError as error:
            logger.warning("the lineage of deleted slots can't be dropped: %s", error)

    def put_aside(self, folder: Path, name: str, why: str) -> None:
        """Take a file that failed a check out of use. Its lineage stays: forgetting deletes it there too."""
        logger.warning("slot file %s is put aside, computing anew: %s", name, why)
        aside = folder / ASIDE
        try:
            (folder / f"{name}.json").unlink(missing_ok=True)
            if (folder / name).exists():
                aside.mkdir(mode=0o700, exist_ok=True)
                os.replace(folder / name, aside / name)
            kept = sorted(_listed(aside, "*.slot"), key=_age, reverse=True)
            self.remove([file.name for file in kept[ASIDE_KEPT:]], [folder])
        except OSError as error:
            logger.warning("slot file %s can't be put aside (%s); it stays unused", name, error.strerror)

    def keep_budget(self, folder: Path, *, but: str) -> None:
        """Delete the least recently used files of a folder until it is within the budget."""
        held = sorted(_listed(folder, "*.slot.json"), key=_age, reverse=True)
        total = 0
        gone: list[str] = []
        for file in held:
            name = file.name.removesuffix(".json")
            total += _size(folder / name)
            if total > self.budget_bytes:
                gone.append(name)
        if but in gone and gone != [but]:
            gone.remove(but)  # the newest is what the next turn needs; equal time stamps must not cost it
        if gone:
            self.remove(gone, [folder])

    def failures(self, identity: bytes) -> int:
        """How often in a row a restore under this identity was without effect."""
        try:
            rows = self._database.query("SELECT value FROM meta WHERE key = ?", (_judged(identity),))
        except StoreError as error:
            logger.warning("what restored slots were worth can't be read: %s", error)
            return 0
        return int(rows[0]["value"]) if rows else 0

    def note(self, identity: bytes, *, helped: bool) -> None:
        """Count a restore that had no effect; one that had some starts the count anew."""
        count = self.failures(identity)
        if helped and not count:
            return
        try:
            with self._database.write() as connection:
                connection.execute(
                    "INSERT OR REPLACE INTO meta VALUES (?, ?)", (_judged(identity), str(0 if helped else count + 1))
                )
        except StoreError as error:
            logger.warning("what a restored slot was worth can't be noted: %s", error)

    def _folders(self) -> list[Path]:
        rows = self._database.query("SELECT value FROM meta WHERE key = 'slot folders'")
        return [Path(folder) for folder in json.loads(rows[0]["value"])] if rows else []

    def _tidy(self, folder: Path) -> None:
        """Remove what a killed process left: files without a manifest, manifests without a file."""
        now = time.time()
        for file in [*_listed(folder, "*.slot"), *_listed(folder, "*.slot.json"), *_listed(folder, ".slot-*.tmp")]:
            other = file.with_suffix("") if file.suffix == ".json" else Path(f"{file}.json")
            if not other.exists() and now - _age(file) > ABANDONED_S:
                with contextlib.suppress(OSError):
                    file.unlink(missing_ok=True)


def _judged(identity: bytes) -> str:
    return f"slots judged {identity.hex()[:32]}"


def _name(root: bytes, tokens: Sequence[int]) -> str:
    held = hashlib.sha256(b"agentmem slot tokens 1\0" + root + token_bytes(tokens)).hexdigest()
    return f"{root.hex()[:32]}-{held[:32]}.slot"


def _ids(tokens: Sequence[int]) -> str:
    return hashlib.sha256(token_bytes(tokens)).hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _listed(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder that have a name of ours (or a temporary one); none of a folder that can't be read."""
    try:
        return [
            path
            for path in folder.glob(pattern)
            if NAME.fullmatch(path.name.removesuffix(".json")) or path.name.endswith(".tmp")
        ]
    except OSError:
        return []


def _age(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _checksum(file: Path) -> tuple[int, int]:
    """Size and CRC32C of a file, read in chunks: never mapped, since a file cut short under a mapping kills."""
    crc32c = kernels().crc32c
    buffer = memoryview(bytearray(CHUNK))
    size = crc = 0
    with open(file, "rb", buffering=0) as source:
        while count := source.readinto(buffer):
            crc = crc32c(buffer[:count], crc)
            size += count
    return size, crc


def _fault(file: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the bytes of a saved slot; None if they are as its manifest says."""
    try:
        told = _checksum(file)
    except OSError as error:
        return f"it can't be read ({error.strerror})"
    return None if told == (manifest["bytes"], manifest["crc32c"]) else "its bytes are not those that were saved"


#: What a manifest holds beside its digest.
FIELDS: Mapping[str, type] = {
    "format": int,
    "name": str,
    "facts": dict,
    "tokens": int,
    "ids": str,
    "head": bool,
    "bytes": int,
    "crc32c": int,
}


def _read(file: Path) -> dict[str, Any] | None:
    """A manifest that is whole and unchanged, else None."""
    try:
        with open(file, "rb") as source:
            content = source.read(MANIFEST_BYTES + 1)
        manifest = json.loads(content) if len(content) <= MANIFEST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or set(manifest) != {*FIELDS, "digest"}:
        return None
    told = manifest.pop("digest")
    typed = all(type(manifest[name]) is kind for name, kind in FIELDS.items())
    return manifest if typed and manifest["format"] == 1 and told == _digest(manifest) else None


def _write(file: Path, manifest: Mapping[str, Any]) -> None:
    handle, name = tempfile.mkstemp(prefix=".slot-", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as target:
            json.dump(manifest, target)
            target.flush()
            os.fsync(target.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
