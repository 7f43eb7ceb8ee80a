"""What may be remembered: turns the caller's input into drafts, or refuses it before anything is written.

Knows the accepted shapes, sizes and values of text, metadata, dates and scopes. Knows nothing of the database: whatever
passes here is stored and comes back exactly as it was given.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from agentmem.errors import InvalidInput, ScopeError
from agentmem.types import LEVELS, Message, Record, Role, Scope

__all__ = [
    "Draft",
    "Redact",
    "check_k",
    "check_metadata",
    "check_path",
    "check_scope",
    "check_text",
    "check_value",
    "draft_of",
    "drafts",
    "dump_metadata",
    "moment",
    "narrow",
    "redacted",
    "redacted_metadata",
    "shown",
    "utc_seconds",
]

Trust = Literal["trusted", "untrusted"]
MAX_TEXT_BYTES = 16 * 1024 * 1024
MAX_METADATA_BYTES = 1024 * 1024
MAX_METADATA_DEPTH = 64
MAX_SCOPE_BYTES = 512
MAX_NAME_BYTES = 512
MAX_SOURCE_BYTES = 4096

MESSAGE_KEYS = frozenset({"role", "content", "name", "at", "metadata"})
ROLES: tuple[str, ...] = get_args(Role)
#: Takes out of a text what must not be kept (redact.py, or the user's own).
Redact = Callable[[str], str]
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 80
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A record that is fit to be stored. ``metadata`` is the JSON text of the mapping."""

    text: str
    scope: Scope
    role: Role = "user"
    name: str | None = None
    at: dt.datetime | None = None
    valid_from: dt.datetime | None = None
    valid_until: dt.datetime | None = None
    metadata: str = "{}"
    source: str | None = None
    trust: Trust = "trusted"

    @property
    def passage(self) -> str:
        """The text as an embedder should read it: with the speaker's name in front, where there is one."""
        return passage(self.text, self.name)


def passage(text: str, name: str | None) -> str:
    """``"name: text"``: who said a thing is part of its meaning."""
    return f"{name}: {text}" if name else text


def drafts(
    content: object,
    *,
    scope: Scope,
    metadata: Mapping[str, Any] | None = None,
    at: dt.datetime | str | None = None,
    valid_from: dt.datetime | str | None = None,
    valid_until: dt.datetime | str | None = None,
    source: str | None = None,
    trust: str | None = None,
    redact: Redact | None = None,
) -> list[Draft]:
    """The drafts of ``content``: a str, a `Message`, a mapping, or a list of those.

    A mapping is ``{"role", "content", "name"?, "at"?, "metadata"?}``. The arguments ``metadata`` and ``at`` hold for
    all messages; a message's own win over them. ``trust`` is "trusted" or "untrusted", by default what the role says;
    ``redact`` goes over texts, names and the strings in metadata. Pure but for that. Raises `InvalidInput` or
    `ScopeError` for the first thing that can't be stored exactly.
    """
    check_scope(scope)
    if trust not in (None, "trusted", "untrusted"):
        raise InvalidInput(f"trust is {shown(trust)}: give 'trusted' or 'untrusted', or leave it out")
    shared = check_metadata(metadata)
    start, end = moment(valid_from, "valid_from"), moment(valid_until, "valid_until")
    if start is not None and end is not None and utc_seconds(end) <= utc_seconds(start):
        raise InvalidInput(f"valid_until {end.isoformat()} must lie after valid_from {start.isoformat()}")
    if source is not None:
        source = _line(source, "source", MAX_SOURCE_BYTES)
    said = moment(at, "at")
    messages = content if isinstance(content, (list, tuple)) else [content]
    found: list[Draft] = []
    for number, message in enumerate(messages):
        where = f"message {number}" if isinstance(content, (list, tuple)) else "the content"
        role, text, name, own_at, own_metadata = _parts(message, where)
        text = check_text(text, f"the text of {where}")
        name = None if name is None else _line(name, f"the name of {where}", MAX_NAME_BYTES)
        told = {**shared, **check_metadata(own_metadata)}
        if redact is not None:
            text = check_text(redacted(redact, text), f"the redacted text of {where}")
            name = name and _line(redacted(redact, name), f"the redacted name of {where}", MAX_NAME_BYTES)
            told = redacted_metadata(redact, told)
        found.append(
            Draft(
                text=text,
                scope=scope,
                role=role,
                name=name,
                at=said if own_at is None else moment(own_at, f"at of {where}"),
                valid_from=start,
                valid_until=end,
                metadata=dump_metadata(told),
                source=source,
                # What a tool returned was written by a stranger; everything else by the application or its user.
                trust="untrusted" if trust == "untrusted" or (trust is None and role == "tool") else "trusted",
            )
        )
    return found


def redacted(redact: Redact, text: str) -> str:
    """What ``redact`` leaves of ``text``. A hook that fails is an `InvalidInput`: nothing may be kept unredacted."""
    try:
        left = redact(text)
    except Exception as error:  # the user's own code
        raise InvalidInput(f"the redact hook failed ({type(error).__name__}), nothing was stored: mend it") from error
    if not isinstance(left, str):
        raise InvalidInput(f"the redact hook gave a {type(left).__name__}, nothing was stored: it must return a str")
    return str.__str__(left)


def redacted_metadata(redact: Redact, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata`` with ``redact`` over every string in it but the keys."""
    return check_metadata(_redacted_json(redact, check_metadata(metadata)))


def _redacted_json(redact: Redact, value: Any) -> Any:
    if isinstance(value, str):
        return redacted(redact, value)
    if isinstance(value, dict):
        return {key: _redacted_json(redact, item) for key, item in value.items()}
    return [_redacted_json(redact, item) for item in value] if isinstance(value, list) else value


def draft_of(record: Record, redact: Redact | None = None) -> Draft:
    """The draft of a record from outside (an export), checked like any other input. Trust is never raised."""
    message = {key: getattr(record, key) for key in ("role", "name", "at", "metadata")}
    [draft] = drafts(
        {**message, "content": record.text},
        scope=record.scope,
        valid_from=record.valid_from,
        valid_until=record.valid_until,
        source=record.source,
        redact=redact,
    )
    return replace(draft, trust="untrusted") if record.trust == "untrusted" else draft


def _parts(message: object, where: str) -> tuple[Role, object, object, Any, Any]:
    """(role, text, name, at, metadata) of one message, the last four as yet unchecked."""
    if isinstance(message, str):
        return "user", message, None, None, None
    if isinstance(message, Message):
        return message.role, message.content, message.name, None, None
    if isinstance(message, Mapping):
        unknown = [key for key in message if key not in MESSAGE_KEYS]
        if unknown:
            raise InvalidInput(f"{where} has the key {shown(unknown[0])}: use {', '.join(sorted(MESSAGE_KEYS))}")
        for key in ("role", "content"):
            if key not in message:
                raise InvalidInput(f"{where} lacks {key!r}: a message is {{'role': ..., 'content': ...}}")
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidInput(f"{where} has the role {shown(role)}: use one of {', '.join(ROLES)}")
        return cast(Role, role), message["content"], message.get("name"), message.get("at"), message.get("metadata")
    raise InvalidInput(f"{where} is a {type(message).__name__}: give a str, a message mapping, or a list of them")


def check_text(text: object, what: str = "the text") -> str:
    """``text`` if it is a str that can be stored exactly and is not blank, else `InvalidInput`."""
    if not isinstance(text, str):
        raise InvalidInput(f"{what} is a {type(text).__name__}: give a str")
    text = str.__str__(text)
    if not text.strip():
        raise InvalidInput(f"{what} is empty or blank: there is nothing to work on")
    return _storable(text, what, MAX_TEXT_BYTES)


def shown(value: object) -> str:
    """``value`` in an error message: short, and safe for values of any size or depth."""
    try:
        return _SHOWN.repr(value)
    except ValueError:  # an int of more digits than Python converts
        return f"<{type(value).__name__}>"


def _line(value: object, what: str, most: int) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidInput(f"{what} is {shown(value)}: give a non-empty str or leave it out")
    return _storable(str.__str__(value), what, most)


def _storable(text: str, what: str, most: int) -> str:
    if "\0" in text:
        raise InvalidInput(f"{what} has a NUL character at position {text.index(chr(0))}: remove it")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"{what} has the lone surrogate {text[error.start]!a} at position {error.start}: it is no Unicode text"
        ) from error
    if size > most:
        raise InvalidInput(f"{what} has {size} bytes in UTF-8, the most is {most}: split it")
    return text


def check_value(text: str, what: str = "a value of where") -> str:
    """``text`` if it is something that a stored text may equal, else `InvalidInput`."""
    return _storable(str.__str__(text), what, MAX_METADATA_BYTES)


def moment(value: object, what: str) -> dt.datetime | None:
    """A point in time from a datetime or an ISO 8601 string. A naive one stays naive and is compared as UTC."""
    if value is None:
        return None
    if isinstance(value, (str, dt.datetime)):
        try:
            return dt.datetime.fromisoformat(value if isinstance(value, str) else value.isoformat())
        except ValueError as error:
            raise InvalidInput(f"{what} is {shown(value)}: write it like 2026-03-31 or 2026-03-31T14:00:00Z") from error
    raise InvalidInput(f"{what} is a {type(value).__name__}: give a datetime or an ISO 8601 string")


def utc_seconds(when: dt.datetime) -> float:
    """Seconds since 1970-01-01 UTC; a naive time counts as UTC. Exact over the years 1 to 9999."""
    return ((when if when.tzinfo else when.replace(tzinfo=dt.UTC)) - EPOCH) / dt.timedelta(seconds=1)


def check_metadata(metadata: object) -> dict[str, Any]:
    """``metadata`` as a dict if JSON gives it back exactly: str keys; str, int, float, bool, None, list or dict inside.

    Refuses what JSON would alter (tuples, other key types, subclasses) as well as what it can't hold (NaN, infinities,
    bytes, dates, cycles), more than 64 levels and more than 1 MiB.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidInput(f"metadata is a {type(metadata).__name__}: give a mapping with str keys")
    plain = dict(metadata)
    left = MAX_METADATA_BYTES
    pending: list[tuple[object, int]] = [(plain, 1)]
    while pending:
        value, depth = pending.pop()
        left -= 1
        if depth > MAX_METADATA_DEPTH:
            raise InvalidInput(f"metadata is nested deeper than {MAX_METADATA_DEPTH} levels, or contains itself")
        if left < 0 or len(pending) > MAX_METADATA_BYTES:
            raise InvalidInput(
                f"metadata is larger than {MAX_METADATA_BYTES} bytes: store the bulk elsewhere, keep a reference"
            )
        if type(value) is dict:
            for key in value:
                if type(key) is not str:
                    raise InvalidInput(f"metadata has the key {shown(key)} of type {type(key).__name__}: keys are str")
                _check_leaf(key)
            pending.extend((item, depth + 1) for item in value.values())
        elif type(value) is list:
            pending.extend((item, depth + 1) for item in value)
        else:
            _check_leaf(value)
    dump_metadata(plain)
    return plain


def _check_leaf(value: object) -> None:
    if type(value) is str:
        _storable(value, "a metadata text", MAX_METADATA_BYTES)
    elif type(value) is float:
        if not math.isfinite(value):
            raise InvalidInput(f"metadata holds {value}: JSON has no such number")
    elif value is not None and type(value) not in (bool, int):
        raise InvalidInput(f"metadata holds a {type(value).__name__} ({shown(value)}): JSON can't give it back")


def dump_metadata(metadata: dict[str, Any]) -> str:
    """The JSON text under which checked metadata is stored."""
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        json.loads(text)
    except ValueError as error:  # an int of more digits than Python converts
        raise InvalidInput(f"metadata can't be written as JSON: {error}") from error
    if len(text.encode()) > MAX_METADATA_BYTES:
        raise InvalidInput(
            f"metadata is larger than {MAX_METADATA_BYTES} bytes: store the bulk elsewhere, keep a reference"
        )
    return text


def check_scope(scope: Scope) -> Scope:
    """``scope`` if each level is None or a usable str, else `ScopeError`. Values are taken as they are."""
    if not isinstance(scope, Scope):
        raise ScopeError(f"the scope is a {type(scope).__name__}: give a Scope")
    for level, value in scope.levels():
        _check_level(level, value)
    return scope


def _check_level(level: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ScopeError(f"the scope's {level} is a {type(value).__name__} ({shown(value)}): give a str")
    if not value:
        raise ScopeError(f"the scope's {level} is an empty str: give a name, or leave the level out")
    try:
        return _storable(str.__str__(value), f"the scope's {level}", MAX_SCOPE_BYTES)
    except InvalidInput as error:
        raise ScopeError(str(error)) from error


def narrow(scope: Scope, **levels: object) -> Scope:
    """The scope beneath ``scope`` with the given levels set; None leaves a level as it is.

    Raises `ScopeError` for a malformed value, an unknown level, and a level that ``scope`` has set to another value: a
    handle can't be turned to a sibling.
    """
    values = {level: value for level, value in scope.levels() if value is not None}
    for level, value in levels.items():
        if level not in LEVELS:
            raise ScopeError(f"{shown(level)} is no scope level: use {', '.join(LEVELS)}")
        checked = _check_level(level, value)
        if checked is None:
            continue
        if values.get(level, checked) != checked:
            raise ScopeError(f"this handle is bound to {level}={values[level]!r} and can't reach {level}={checked!r}")
        values[level] = checked
    return check_scope(Scope(**values))


def check_path(path: object, what: str = "the path") -> Path:
    """``path`` if it is a str or path that can name a file or folder, else `InvalidInput`."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        raise InvalidInput(f"{what} is a {type(path).__name__}: give a str or a path")
    return Path(_line(name, what, MAX_SOURCE_BYTES))


def check_k(k: object, what: str = "k", *, least: int = 1) -> int:
    """``k`` if it is an int of at least ``least``, else `InvalidInput`. How many there are bounds it from above."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise InvalidInput(f"{what} is {shown(k)}: give an int of at least {least}")
    if k < least:
        raise InvalidInput(f"{what} is {max(k, -(2**63))}: give an int of at least {least}")
    return min(int(k), 2**62)
