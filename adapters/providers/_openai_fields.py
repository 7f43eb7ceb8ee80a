"""What both of OpenAI's APIs share: cache fields, schemas, images, usage. Pure functions.

Knows the vendor's fields; which of them a host takes is `Served`'s to say (_openai_hosts.py).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agentmem.errors import InvalidInput
from agentmem.provider import Mark, Request
from agentmem.types import Image, Message, Usage

from ._http import whole
from ._openai_hosts import Served

__all__ = [
    "breakpoint_at",
    "cache_fields",
    "cleared",
    "image_url",
    "messages_of",
    "named_schema",
    "parse_usage",
    "placed_marks",
    "strict_schema",
]


def messages_of(request: Request) -> list[Message]:
    """All messages, in the order of the prompt."""
    return [message for segment in request.segments for message in segment.messages]


# The prompt cache.


def cache_fields(request: Request, served: Served, *, responses: bool) -> dict[str, Any]:
    """The fields of a request that speak of its cache, apart from the breakpoints.

    A marked model is always told ``mode: explicit``: the vendor's own implicit breakpoint would write what is new in
    every turn. Diagnoses and prewarming are the Responses API's only.
    """
    fields: dict[str, Any] = {}
    if request.cache_key and served.keyed:
        key = request.cache_key  # at most 64 characters are taken
        fields["prompt_cache_key"] = key if len(key) <= 64 else hashlib.sha256(key.encode()).hexdigest()
    if not served.marked or served.rules is None:
        return fields
    options: dict[str, Any] = {"mode": "explicit"}
    if responses and served.rules.prewarms and request.options.max_tokens == 0:
        options["prewarm"] = True
    plan = request.cache
    if responses and served.rules.diagnoses and plan is not None and plan.diagnose and plan.previous:
        options["comparison_response_id"] = plan.previous
    return {**fields, "prompt_cache_options": options}


def placed_marks(
    request: Request, served: Served, messages: Sequence[Message], markable: Callable[[Message], bool]
) -> dict[int, str | None]:
    """Where the breakpoints stand: by a message's position, the lifetime's name (None: the host's shortest).

    A mark on a message that can't hold one stands on the last earlier one that can; two that meet there are one, for
    the longer time. Of more than the host writes the latest are kept.
    """
    if not served.marked or served.rules is None:
        return {}
    order = [lifetime.name for lifetime in served.rules.lifetimes]
    placed: dict[int, str | None] = {}
    for mark in _asked(request):
        at = min(mark.messages, len(messages)) - 1
        while at >= 0 and not markable(messages[at]):
            at -= 1
        if at >= 0:
            placed[at] = max(placed.get(at), mark.lifetime, key=lambda name: order.index(name) if name in order else -1)
    return dict(sorted(placed.items())[-(served.rules.marks or 4) :])


def _asked(request: Request) -> tuple[Mark, ...]:
    if request.cache is not None:
        return request.cache.marks
    marks: list[Mark] = []
    count = 0
    for segment in request.segments:
        count += len(segment.messages)
        if segment.stable:
            marks.append(Mark(messages=count))
    return tuple(marks)


def breakpoint_at(placed: Mapping[int, str | None], at: int) -> dict[str, Any]:
    """What the last part of the message at this position gets: its breakpoint, or nothing."""
    if at not in placed:
        return {}
    lifetime = placed[at]
    return {"prompt_cache_breakpoint": {"mode": "explicit", **({"ttl": lifetime} if lifetime else {})}}


# Schemas.

#: Keywords that the vendor's strict mode knows beside those that are handled one by one below.
_KNOWN = {
    *("type", "enum", "const", "title", "description", "pattern", "format", "minItems", "maxItems"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
#: Those that hold schemas, or values that are dropped: every property is given in strict mode, so none has a default.
_HANDLED = {"properties", "required", "additionalProperties", "items", "anyOf", "$ref", "$defs", "default", "$schema"}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}


def named_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """``name``, ``schema`` and ``strict`` as both APIs take them; strict wherever the schema can be followed strictly.

    Keys keep their order: a model writes the properties in that order.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", str(schema.get("title") or "answer")).strip("_")[:64] or "answer"
    strict = strict_schema(schema)
    return {"name": name, "schema": dict(schema) if strict is None else strict, "strict": strict is not None}


def strict_schema(schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """The schema in the vendor's strict subset, or None where it needs more than that.

    Every property becomes required and no other is allowed, so what follows the result follows ``schema`` too
    (Structured Outputs guide, "Supported schemas").
    """
    try:
        strict = _strict(schema)
    except _NotStrict:
        return None
    return strict if strict.get("type") == "object" and "anyOf" not in strict else None


class _NotStrict(Exception):
    pass


def _strict(schema: Any) -> dict[str, Any]:
    if not isinstance(schema, Mapping) or not set(schema) <= _KNOWN | _HANDLED:
        raise _NotStrict
    if "$ref" in schema:
        if not set(schema) <= {"$ref", "title", "description", "default"}:
            raise _NotStrict
        return {"$ref": schema["$ref"]}
    if schema.get("format", "date") not in _FORMATS:
        raise _NotStrict
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _KNOWN:
            made[key] = value
        elif key in ("properties", "$defs"):
            made[key] = {name: _strict(inner) for name, inner in value.items()}
        elif key == "items":
            made[key] = _strict(value)
        elif key == "anyOf":
            made[key] = [_strict(inner) for inner in value]
    kinds = schema.get("type", ())
    if kinds == "object" or "properties" in schema:
        if "properties" not in schema or schema.get("additionalProperties", False) is not False:
            raise _NotStrict  # any keys are allowed: strict mode has no such objects
        made["required"] = list(schema["properties"])
        made["additionalProperties"] = False
    elif (
        "object" in kinds
        or not {"type", "enum", "const", "anyOf"} & set(schema)
        or (kinds == "array" and "items" not in made)
    ):
        raise _NotStrict  # such a value may be anything
    return made


# Images and replies.


def image_url(image: Image) -> str:
    """Where the image lies, or its bytes as a data address."""
    if image.data is not None:
        return f"data:{image.media_type or 'image/png'};base64,{image.data}"
    if image.url is None:
        raise InvalidInput("an image has either data (base64, with its media_type) or a url")
    return image.url


def cleared(message: Message, *, tool: bool) -> Message:
    """The message, if its images stand where the vendor reads them; else `InvalidInput`."""
    if message.images and message.role != "user" and not (tool and message.role == "tool"):
        raise InvalidInput(f"an image can't stand in a message of the {message.role}; give it in one of the user")
    return message


def parse_usage(payload: Mapping[str, Any]) -> Usage:
    """The usage of either API. The count of the prompt includes cached tokens already.

    DeepSeek, Gemini and llama.cpp name cached tokens in other places.
    """
    usage = payload.get("usage") or {}
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    timings = payload.get("timings") or {}
    given = (
        details.get("cached_tokens"),
        usage.get("prompt_cache_hit_tokens"),
        usage.get("cached_content_token_count"),
        timings.get("cache_n"),
    )
    cached = next((whole(value) for value in given if value is not None), 0)
    prompt = whole(usage.get("prompt_tokens", usage.get("input_tokens")))
    written = whole(details.get("cache_write_tokens"))
    long_written = whole((details.get("cache_write_tokens_details") or {}).get("ttl_12h_tokens"))
    told_ms = timings.get("prompt_ms")
    prefill_ms = told_ms if isinstance(told_ms, int | float) and 0 <= told_ms < math.inf else None
    return Usage(
        input_tokens=prompt,
        cached_tokens=min(cached, prompt),
        written_tokens=min(written, prompt),
        written_long_tokens=min(long_written, written, prompt),
        output_tokens=whole(usage.get("completion_tokens", usage.get("output_tokens"))),
        first_token_s=None if prefill_ms is None else prefill_ms / 1000,
    )
