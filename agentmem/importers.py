"""Reads what other memories left behind: mem0's local stores, ChatGPT's export, plain JSON lines.

Knows those formats and turns what they hold into drafts under ids that depend on their source alone, so that a second
import adds nothing. Knows nothing of the database that they go into. Files are read as data: nothing is unpickled, no
link is followed.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import logging
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import AgentMemError, InvalidInput, ScopeError, StoreError
from .pickles import State, read_pickle
from .plaintext.drafts import Draft, Redact, check_text, drafts, moment, narrow, redacted, shown, utc_seconds
from .types import Record, Scope

__all__ = ["FORMATS", "Imported", "detect", "read", "read_file"]

FORMATS = ("agentmem", "mem0", "chatgpt", "jsonl")
MAX_BYTES = 1 << 30
#: The only class that a point of Qdrant's local store is an object of.
POINT = "qdrant_client.http.models.models.PointStruct"
SQLITE = b"SQLite format 3\0"
#: What a payload of mem0 holds beside the user's own metadata.
MEM0_KEYS = {
    *("data", "hash", "created_at", "updated_at", "text_lemmatized", "role", "actor_id", "expiration_date"),
    *("user_id", "agent_id", "run_id"),
}
ROLES = ("system", "user", "assistant", "tool")
_log = logging.getLogger("agentmem")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """One memory from elsewhere: its id here, what is to be stored, and its earlier versions, oldest first."""

    id: str
    draft: Draft
    older: tuple[Record, ...] = ()


def read_file(path: Path) -> bytes:
    """The bytes of a regular file, `StoreError` where it can't be read, `InvalidInput` for a link, pipe or device."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if path.is_symlink():
            raise InvalidInput(f"{path} is a link: give the file itself") from error
        raise StoreError(f"can't read {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise InvalidInput(f"{path} is no regular file")
        if found.st_size > MAX_BYTES:
            raise InvalidInput(f"{path} has {found.st_size} bytes, the most is {MAX_BYTES}: split it")
        try:
            return file.read()
        except OSError as error:
            raise StoreError(f"can't read {path}: {error.strerror}") from error


def detect(path: Path) -> str:
    """Which of `FORMATS` a file or folder is in."""
    if path.is_dir():
        return "chatgpt" if (path / "conversations.json").is_file() else "mem0"
    data = read_file(path)
    if data.startswith(SQLITE) or path.suffix == ".pkl":
        return "mem0"
    if not data.strip():
        raise InvalidInput(f"{path} is empty: there is nothing to load")
    first = data.split(b"\n", 1)[0]
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(first)
        if isinstance(line, dict) and line.get("format") == "agentmem-records":
            return "agentmem"
        if isinstance(line, dict) and "docstore" not in line and "mapping" not in line:
            return "jsonl"
    with contextlib.suppress(ValueError, RecursionError):
        whole = json.loads(data)
        if isinstance(whole, dict) and "docstore" in whole:
            return "mem0"
        if _conversations(whole):
            return "chatgpt"
    return "jsonl"


def read(path: Path, scope: Scope, format: str, redact: Redact | None = None) -> list[Imported]:
    """What a file or folder in one of the foreign formats holds, all of it fit to be stored in ``scope``.

    Raises `InvalidInput` for what can't be understood and `ScopeError` for what belongs to somebody outside ``scope``.
    """
    if path.is_symlink():
        raise InvalidInput(f"{path} is a link: give the file or folder itself")
    make = {"mem0": _mem0, "chatgpt": _chatgpt, "jsonl": _jsonl}[format]
    found: dict[str, Imported] = {}
    for item in make(path, _Maker(path, scope, redact)):
        found.setdefault(item.id, item)
    return list(found.values())


class _Maker:
    """Makes an `Imported` of what a format says, with errors that name the place."""

    def __init__(self, path: Path, scope: Scope, redact: Redact | None) -> None:
        self._path = path
        self._scope = scope
        self._redact = redact

    def make(
        self,
        where: str,
        source: str,
        key: str,
        message: Mapping[str, Any],
        *,
        levels: Mapping[str, Any],
        older: tuple[tuple[str, Any], ...] = (),
        valid_until: Any = None,
    ) -> Imported:
        """``key`` names it at its ``source``, uniquely and for good; ``older`` are (text, time) of earlier versions."""
        try:
            scope = narrow(self._scope, **{level: value for level, value in levels.items() if value not in (None, "")})
            [draft] = drafts(
                dict(message),
                scope=scope,
                source=source,
                valid_until=valid_until,
                redact=self._redact,
            )
            past = tuple(
                Record(
                    id="past",
                    text=check_text(text if self._redact is None else redacted(self._redact, text)),
                    created=moment(when, "a version's time"),
                )
                for text, when in older
                if text.strip()
            )
        except ScopeError as error:
            raise ScopeError(f"{self._path}, {where}: {error}") from error
        except (AgentMemError, ValueError) as error:
            raise InvalidInput(f"{self._path}, {where}: not a memory ({error})") from error
        said = max(0, int(utc_seconds(draft.at) * 1000)) if draft.at else 0
        names = json.dumps([source, key, [value for _, value in scope.levels()]])
        digest = hashlib.blake2b(names.encode(), digest_size=10).hexdigest()
        return Imported(id=f"{min(said, 2**48 - 1):012x}{digest}", draft=draft, older=past)


def _json(path: Path, data: bytes, what: str = "") -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}{what}: not JSON ({error})") from error


# ---- plain JSON lines ------------------------------------------------------------------------------------------------


def _jsonl(path: Path, maker: _Maker) -> Iterator[Imported]:
    """``{"text" or "content", "role"?, "name"?, "at"?, "metadata"?, "id"?, "user"?, "agent"?, "session"?}`` a line."""
    known = {"text", "content", "role", "name", "at", "metadata", "id", "tenant", "user", "agent", "session"}
    seen: Counter[str] = Counter()
    for number, line in enumerate(read_file(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        said = _json(path, line, f", {where}")
        if isinstance(said, str):
            said = {"text": said}
        if not isinstance(said, dict) or ("text" in said) == ("content" in said):
            raise InvalidInput(f"{path}, {where}: give an object with text or content (one of them)")
        if unknown := [key for key in said if key not in known]:
            raise InvalidInput(
                f"{path}, {where}: the key {shown(unknown[0])} is not known: use {', '.join(sorted(known))}, "
                "or put it in metadata"
            )
        message = {"role": said.get("role", "user"), "content": said.get("text", said.get("content"))}
        message |= {key: said[key] for key in ("name", "at", "metadata") if said.get(key) is not None}
        content = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        key = json.dumps(said["id"]) if said.get("id") is not None else f"{content} {seen[content]}"
        seen[content] += 1
        levels = {level: said.get(level) for level in ("tenant", "user", "agent", "session")}
        yield maker.make(where, "import", key, message, levels=levels)


# ---- ChatGPT ---------------------------------------------------------------------------------------------------------


def _conversations(value: Any) -> list[Any]:
    """The conversations of an export, if this is one."""
    listed = value if isinstance(value, list) else [value]
    return listed if listed and all(isinstance(item, dict) and "mapping" in item for item in listed) else []


def _chatgpt(path: Path, maker: _Maker) -> Iterator[Imported]:
    file = path / "conversations.json" if path.is_dir() else path
    listed = _json(file, read_file(file))
    if listed == []:
        return
    if not (found := _conversations(listed)):
        raise InvalidInput(f"{file} is no list of ChatGPT's conversations")
    for number, conversation in enumerate(found):
        where = f"conversation {number}"
        id_ = conversation.get("conversation_id") or conversation.get("id")
        if not isinstance(id_, str) or not isinstance(conversation["mapping"], dict):
            raise InvalidInput(f"{file}, {where}: it has no id or no mapping of messages")
        title = conversation.get("title")
        title = title.strip()[:120] if isinstance(title, str) else ""
        session = f"{title} ({id_})" if title else id_
        for node in _branch(conversation):
            yield from _message(f"{where}, message {shown(node.get('id'))}", id_, session, node, maker)


def _branch(conversation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages of the branch that was shown last, from its beginning: edits and retries are other branches."""
    mapping = conversation["mapping"]
    at = conversation.get("current_node")
    if at not in mapping:
        # Old exports have none: the newest leaf ends the branch.
        leaves = [key for key, node in mapping.items() if isinstance(node, dict) and not node.get("children")]
        at = max(leaves, key=lambda key: _created(mapping[key]), default=None)
    branch: list[Mapping[str, Any]] = []
    seen: set[Any] = set()
    while isinstance(at, str) and at in mapping and at not in seen:
        seen.add(at)
        node = mapping[at]
        if not isinstance(node, dict):
            break
        branch.append({"id": at, **node})
        at = node.get("parent")
    return branch[::-1]


def _created(node: Mapping[str, Any]) -> float:
    message = node.get("message")
    when = message.get("create_time") if isinstance(message, dict) else None
    return float(when) if isinstance(when, (int, float)) and not isinstance(when, bool) else 0.0


def _message(where: str, conversation: str, session: str, node: Mapping[str, Any], maker: _Maker) -> Iterator[Imported]:
    message = node.get("message")
    if not isinstance(message, dict):
        return
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else None
    hidden = isinstance(message.get("metadata"), dict) and message["metadata"].get(
        "is_visually_hidden_from_conversation"
    )
    if role not in ROLES or role == "system" or hidden or not isinstance(content, dict):
        return
    parts = content.get("parts") if isinstance(content.get("parts"), list) else [content.get("text")]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts or ()]
    text = "\n".join(part for part in texts if isinstance(part, str) and part.strip())
    text = text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if not text.strip():
        return
    said: dict[str, Any] = {"role": role, "content": text}
    if when := _created(node):
        try:
            said["at"] = dt.datetime.fromtimestamp(when, dt.UTC)
        except (ValueError, OverflowError, OSError) as error:
            raise InvalidInput(f"{where}: its create_time {when} is no time") from error
    # A handle that has a session of its own takes everything into it.
    levels = {"session": session} if maker._scope.session is None else {}
    yield maker.make(where, "chatgpt", f"{conversation}/{node['id']}", said, levels=levels)


# ---- mem0 ------------------------------------------------------------------------------------------------------------


def _mem0(path: Path, maker: _Maker) -> Iterator[Imported]:
    """A folder with its stores, or one of the files: Qdrant's local collection, FAISS's docstore, ``history.db``."""
    files = _mem0_files(path)
    if not files:
        raise InvalidInput(
            f"{path} holds no store of mem0: no storage.sqlite, no docstore beside a .faiss, no history.db"
        )
    histories = [history for file in files if (history := _tables(file, _history)) is not None]
    past = {memory: versions for history in histories for memory, versions in history.items()}
    stores = [store for file in files if (store := _payloads(file)) is not None]
    if not stores:
        # All that a lost vector store leaves. Whose the memories were is not in it.
        for memory, versions in past.items():
            *older, (text, _) = versions
            said = {"role": "user", "content": text, "at": versions[0][1]}
            yield maker.make(f"memory {memory}", "mem0", memory, said, levels={}, older=tuple(older))
        return
    stored = {memory: payload for store in stores for memory, payload in store.items()}
    for memory, payload in stored.items():
        role = payload.get("role")
        said = {"role": role if role in ROLES else "user", "content": payload.get("data", payload.get("memory"))}
        own = {key: value for key, value in payload.items() if key not in MEM0_KEYS}
        said |= {"name": payload.get("actor_id") or None, "at": payload.get("created_at"), "metadata": own}
        levels = {level: payload.get(key) for level, key in zip(("user", "agent", "session"), _WHOSE, strict=True)}
        older = tuple(past.get(memory, ())[:-1])
        ends = payload.get("expiration_date")
        yield maker.make(f"memory {memory}", "mem0", memory, said, levels=levels, older=older, valid_until=ends)
    if lost := past.keys() - stored.keys():
        _log.warning("%d memories of %s are in its history only, with nobody's name: not imported", len(lost), path)


_WHOSE = ("user_id", "agent_id", "run_id")


def _mem0_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            docstore = file.suffix in (".json", ".pkl") and file.with_suffix(".faiss").exists()
            if name in ("storage.sqlite", "history.db") or docstore:
                found.append(file)
    return found


def _payloads(file: Path) -> dict[str, dict[str, Any]] | None:
    """The payloads in a file by memory id; None if it holds none of that kind."""
    data = read_file(file)
    if data.startswith(SQLITE):
        points: dict[str, dict[str, Any]] | None = _tables(file, _points)
        return points
    value = read_pickle(data) if file.suffix == ".pkl" else _json(file, data)
    if isinstance(value, tuple) and value:  # the older docstore: (docstore, index_to_id)
        value = {"docstore": value[0]}
    docstore = value.get("docstore") if isinstance(value, dict) else None
    if not isinstance(docstore, dict) or not all(isinstance(payload, dict) for payload in docstore.values()):
        raise InvalidInput(f"{file} is no docstore of mem0")
    return {str(memory): payload for memory, payload in docstore.items()}


def _tables(file: Path, read: Callable[[sqlite3.Connection], Any]) -> Any:
    """What ``read`` makes of a foreign SQLite file, opened read-only; None if it is none, or lacks the table."""
    if not read_file(file).startswith(SQLITE):
        return None
    try:
        address = f"{file.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            return read(connection)
    except sqlite3.Error as error:
        raise InvalidInput(f"{file} can't be read as a store of mem0 ({error})") from error


def _has(connection: sqlite3.Connection, table: str) -> bool:
    found = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return connection.execute(found, (table,)).fetchone() is not None


def _points(connection: sqlite3.Connection) -> dict[str, dict[str, Any]] | None:
    if not _has(connection, "points"):
        return None
    found: dict[str, dict[str, Any]] = {}
    for (blob,) in connection.execute("SELECT point FROM points ORDER BY rowid"):
        point = read_pickle(blob, classes=[POINT]) if isinstance(blob, bytes) else None
        if type(point) is not State or not isinstance(point.get("payload"), dict):
            raise InvalidInput("a point of Qdrant's store has no payload")
        found[str(point.get("id"))] = point["payload"]
    return found


def _history(connection: sqlite3.Connection) -> dict[str, list[tuple[str, Any]]] | None:
    """Every memory that was not deleted, with its texts and their times, oldest first."""
    if not _has(connection, "history"):
        return None
    found: dict[str, list[tuple[str, Any]]] = {}
    rows = "SELECT memory_id, new_memory, event, coalesce(updated_at, created_at) FROM history ORDER BY rowid"
    for memory, text, event, when in connection.execute(rows):
        if event == "DELETE":
            found.pop(memory, None)
        elif isinstance(text, str) and text.strip():
            found.setdefault(str(memory), []).append((text, when))
    return found
