"""What a caller hands to ``chat``, as values: options, tools, the new message; and what the model said, to be stored.

Raises `InvalidInput` for what can't be sent or stored, before anything is. Knows no prompt and no provider.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from . import images, prompt
from .engine import Engine
from .errors import InvalidInput
from .plaintext.drafts import Draft, check_metadata, check_text, drafts, dump_metadata, shown
from .plaintext.records import TURN, new_id
from .provider import Generation, Options
from .types import Image, Message, Scope

__all__ = ["asked", "checked_tools", "json_schema", "options_of", "parsed", "reply_drafts"]

_log = logging.getLogger("agentmem")

#: A JSON schema, or a pydantic class whose schema it is.
Schema = type[BaseModel] | Mapping[str, Any]


def options_of(values: Mapping[str, Any]) -> Options:
    """Keyword options as `Options`; names it does not know go to the vendor's request as ``extra``."""
    known = {field.name for field in dataclasses.fields(Options)} - {"extra"}
    mine = {name: value for name, value in values.items() if name in known}
    extra = values.get("extra", {})
    if not isinstance(extra, Mapping):
        raise InvalidInput(f"extra is a {type(extra).__name__}: give a mapping of the vendor's own options")
    extra = {**extra, **{name: value for name, value in values.items() if name not in known and name != "extra"}}
    stop = () if mine.get("stop") is None else mine["stop"]
    mine["stop"] = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    if not all(isinstance(text, str) and text for text in mine["stop"]):
        raise InvalidInput(f"stop is {shown(stop)}: give a str or a list of them")
    for name, least in (("max_tokens", 0), ("seed", -(2**63))):
        value = mine.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63):
            raise InvalidInput(f"{name} is {shown(value)}: give a whole number" + " of 0 or more" * (least == 0))
    for name in ("temperature", "top_p"):
        value = mine.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2):
            raise InvalidInput(f"{name} is {shown(value)}: give a number from 0 to 2")
    return Options(**mine, extra=extra)


def checked_tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    """The tool definitions, none for None."""
    if tools is None:
        return ()
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidInput(f"tools is {shown(tools)}: give a list of tool definitions (mappings)")
    try:
        json.dumps([dict(tool) for tool in tools]).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"a tool can't be written as JSON: {error}") from error
    return tuple(tools)


def json_schema(schema: Any) -> Mapping[str, Any] | None:
    """The JSON schema that an answer has to follow, of a schema or a pydantic class; None for None."""
    if schema is None:
        return None
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        return schema.model_json_schema()
    if isinstance(schema, Mapping) and schema:
        try:
            json.dumps(dict(schema)).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidInput(f"the schema can't be written as JSON: {error}") from error
        return schema
    raise InvalidInput(f"schema is {shown(schema)}: give a JSON schema (a mapping) or a pydantic class")


def parsed(schema: Any, text: str) -> Any:
    """The answer as its schema says; None where the model did not follow it (the text is there all the same)."""
    try:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            return schema.model_validate_json(text)
        return TypeAdapter(Any).validate_json(text)
    except ValidationError as error:
        _log.warning("the answer does not follow the schema; errors: %d", error.error_count())
        return None


def asked(engine: Engine, message: Any, session: Scope) -> list[tuple[Draft, Message]]:
    """The new message (or the results of several tools), as what will be remembered and as what enters the prompt.

    A tool's result names its call in ``tool_call_id``, which is kept in the metadata.
    """
    found = [_said(engine, part, session) for part in (message if isinstance(message, (list, tuple)) else [message])]
    roles = [said.role for _, said in found]
    if roles != ["user"] and (not roles or set(roles) != {"tool"}):
        raise InvalidInput("chat takes one message of the user, or the results of tools; store others with add")
    return found


def _said(engine: Engine, message: Any, session: Scope) -> tuple[Draft, Message]:
    call_id = None
    seen: tuple[Image, ...] = ()
    if isinstance(message, Message):
        call_id, seen = message.tool_call_id, message.images
    elif isinstance(message, Mapping) and "tool_call_id" in message:
        message = dict(message)
        call_id = message.pop("tool_call_id")
    if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple)):
        text, seen = images.split(message["content"])
        message = {**message, "content": text}
    if call_id is not None:
        check_text(call_id, "tool_call_id")
    metadata = {"tool_call_id": call_id} if call_id is not None else None
    # The model reads what will be remembered: the next turn's prompt then begins with the very same text.
    [draft] = _drafts(engine, [message], session, metadata)
    said = Message(role=draft.role, content=draft.text, name=draft.name, images=seen, tool_call_id=call_id)
    return draft, said.model_copy(update={"records": (new_id(),)})


def reply_drafts(engine: Engine, generation: Generation, session: Scope, model: str) -> list[Draft]:
    """What the model said, as a draft; none if it said nothing that can be stored."""
    calls: Any = _storable([call.model_dump() for call in generation.tool_calls])
    text = _storable(generation.text) if generation.text.strip() else prompt.calls_text(generation.tool_calls)
    if not text.strip():
        return []
    said = {"role": "assistant", "content": text}
    try:
        [draft] = _drafts(engine, said, session, {"tool_calls": calls} if calls else None)
        if calls and generation.blocks:
            # A vendor that thinks before it calls wants its thoughts back with the results, byte for byte: sealed by
            # it, they are not gone over by redaction.
            kept = {**json.loads(draft.metadata), "blocks": _storable(generation.blocks), "blocks_of": model}
            draft = dataclasses.replace(draft, metadata=dump_metadata(check_metadata(kept)))
        return [draft]
    except InvalidInput as error:  # a model may write anything: the answer has come and must not be lost for it
        _log.warning("the answer's tool calls are not remembered: %s", error)
        return _drafts(engine, said, session)


def _drafts(engine: Engine, said: Any, session: Scope, metadata: Mapping[str, Any] | None = None) -> list[Draft]:
    """What is said in this moment, unless the message itself says when: a later turn must know how old it is."""
    now = dt.datetime.fromtimestamp(engine.clock(), dt.UTC)
    return drafts(said, scope=session, metadata=metadata, at=now, source=TURN, redact=engine.redact)


def _storable(value: Any) -> Any:
    """What a model wrote, without the characters and numbers that can't be stored."""
    if isinstance(value, str):
        return value.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, (list, tuple)) else value
