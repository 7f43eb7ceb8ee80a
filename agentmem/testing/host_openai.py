"""OpenAI's Chat Completions, embeddings and errors, as a stand-in host reads and writes them.

Knows the wire format of openai 3.x and refuses what the vendor refuses; decides nothing about caches but where a
request's marks stand.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..cache_rules import CacheRules
from .host_cache import Piece, Prompt, Visit
from .host_exchange import Answer, Refused, canonical, names, one_of, sse, words

__all__ = ["ChatCompletions", "cache_options", "embeddings", "marked", "miss", "refusal", "text_piece", "unknown"]

FIELDS = names(
    "messages model audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens "
    "max_tokens metadata modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier "
    "stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity "
    "web_search_options"
)
#: What other servers know beyond it, and none of OpenAI's models takes.
FOREIGN = frozenset(("top_k", "min_p", "cache_salt", "extra_key", "kv_transfer_params", "repetition_penalty"))
MESSAGE = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio", "function_call"))
PARTS = {
    "text": ("type", "text", "prompt_cache_breakpoint"),
    "image_url": ("type", "image_url", "prompt_cache_breakpoint"),
    "input_audio": ("type", "input_audio", "prompt_cache_breakpoint"),
    "file": ("type", "file", "prompt_cache_breakpoint"),
    "refusal": ("type", "refusal"),
}
#: Models that refuse ``max_tokens`` and want ``max_completion_tokens``.
NEWER = re.compile(r"(gpt-[5-9]|o\d)")
#: Explicit ends written by a request, with and without an implicit one.
WRITTEN = {"implicit": 3, "explicit": 4}


def unknown(name: str) -> Refused:
    """The vendor's answer to a field it does not know."""
    return Refused(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")


def refusal(error: Refused) -> dict[str, Any]:
    """An error's body."""
    return {"error": {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}}


def key_of(headers: Mapping[str, str]) -> str:
    """Who asks; refuses a request without a key."""
    key = headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not key:
        raise Refused(
            "You didn't provide an API key.", status=401, kind="invalid_request_error", code="invalid_api_key"
        )
    return key


def text_piece(role: str, text: str, *, first: bool = True) -> Piece:
    """A text as the model's format has it."""
    head = f"<|start|>{role}<|message|>" if first else "\n"
    return Piece(f"{head}{text}".encode(), "input")


def cache_options(body: Mapping[str, Any], rules: CacheRules | None, known: Sequence[str]) -> tuple[str, int]:
    """(mode, index of the default lifetime) of a request; refuses them for models that have no marks."""
    options = body.get("prompt_cache_options")
    if options is None:
        return "implicit", 0
    if rules is None or not rules.marked:
        raise Refused(
            "prompt_cache_options is not supported with this model.",
            param="prompt_cache_options",
            code="unsupported_parameter",
        )
    one_of(known, options, lambda name: unknown(f"prompt_cache_options.{name}"))
    mode = options.get("mode", "implicit")
    if mode not in WRITTEN:
        raise Refused(f"Invalid value: '{mode}'.", param="prompt_cache_options.mode", code="invalid_value")
    return mode, lifetime(options.get("ttl"), rules, "prompt_cache_options.ttl", 0)


def lifetime(name: Any, rules: CacheRules, param: str, default: int) -> int:
    """The index of a lifetime by its name."""
    if name is None:
        return default
    names = [lifetime.name for lifetime in rules.lifetimes]
    if name not in names:
        raise Refused(f"Invalid value: '{name}'. Supported values are: {names}.", param=param, code="invalid_value")
    return names.index(name)


def breakpoint_of(part: Mapping[str, Any], rules: CacheRules | None, default: int) -> int | None:
    """The lifetime of the mark on a content part; None where there is none."""
    told = part.get("prompt_cache_breakpoint")
    if told is None:
        return None
    param = "prompt_cache_breakpoint"
    if rules is None or not rules.marked:
        raise Refused(f"{param} is not supported with this model.", param=param, code="unsupported_parameter")
    one_of(("mode", "ttl"), told, lambda name: unknown(f"{param}.{name}"))
    if told.get("mode") != "explicit":
        raise Refused(f"Invalid value: '{told.get('mode')}'.", param=f"{param}.mode", code="invalid_value")
    return lifetime(told.get("ttl"), rules, f"{param}.ttl", default)


def marked(
    pieces: Sequence[Piece], rules: CacheRules | None, mode: str, default: int
) -> tuple[tuple[Piece, ...], bool]:
    """The pieces with the marks that count, and whether the request uses the cache at all.

    Of the explicit marks the latest three or four; in the implicit mode the prompt's end too.
    """
    if rules is None or not rules.marked:
        return tuple(pieces), True
    at = [i for i, piece in enumerate(pieces) if piece.lifetime is not None][-WRITTEN[mode] :]
    kept = [
        Piece(piece.content, piece.level, piece.facts, piece.lifetime if i in at else None)
        for i, piece in enumerate(pieces)
    ]
    if mode == "implicit" and kept and kept[-1].lifetime is None:
        kept[-1] = Piece(kept[-1].content, kept[-1].level, kept[-1].facts, default)
    return tuple(kept), mode == "implicit" or bool(at)


def head_pieces(settings: Mapping[str, Any], tools: Sequence[Any]) -> list[Piece]:
    """What stands before the messages: settings that the model is told, then the tools."""
    told = {name: value for name, value in settings.items() if value is not None}
    pieces = [Piece(f"<|settings|>{canonical(told)}".encode(), "settings")] if told else []
    for tool in tools:
        if "prompt_cache_breakpoint" in tool:
            raise unknown("tools[].prompt_cache_breakpoint")
        pieces.append(Piece(f"<|tool|>{canonical(tool)}".encode(), "tools"))
    return pieces


def miss(prompt: Prompt, visit: Visit, earlier: Prompt | None) -> dict[str, Any] | None:
    """The vendor's diagnosis against an earlier request; None where none was asked for."""
    if not prompt.diagnose:
        return None
    if earlier is None:
        return {"type": "comparison_response_not_found"}
    for name, value in prompt.compared.items():
        if value != earlier.compared.get(name):
            return {"type": "cache_miss", "reason": f"{name}_changed", "cache_missed_tokens": visit.tokens - visit.read}
    last = max((i for i, piece in enumerate(earlier.pieces) if piece.lifetime is not None), default=-1)
    before = [piece.content for piece in earlier.pieces[: last + 1]]
    if [piece.content for piece in prompt.pieces[: last + 1]] != before:
        return {"type": "cache_miss", "reason": "input_changed", "cache_missed_tokens": visit.tokens - visit.read}
    return {"type": "cache_hit"} if visit.read else {"type": "unavailable"}


class ChatCompletions:
    """``POST /chat/completions``. ``strict=False`` takes the fields of compatible servers too."""

    path = "/v1/chat/completions"
    stream_type = "text/event-stream"

    def __init__(self, *, vendor: str = "openai", strict: bool = True) -> None:
        self._vendor = vendor
        self._known = FIELDS if strict else FIELDS | FOREIGN

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> Prompt:
        """The prompt of a request, or `Refused`."""
        owner = key_of(headers)
        one_of(self._known, body, unknown)
        model = str(body.get("model") or "")
        if not model or not isinstance(body.get("messages"), list) or not body["messages"]:
            raise Refused("Missing required parameter: 'model' or 'messages'.", code="missing_required_parameter")
        if "max_tokens" in body and self._vendor == "openai" and NEWER.match(model):
            raise Refused(
                "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
                param="max_tokens",
                code="unsupported_parameter",
            )
        mode, default = cache_options(body, rules, ("mode", "ttl"))
        settings = {name: body.get(name) for name in ("response_format", "reasoning_effort", "verbosity")}
        pieces = head_pieces(settings, body.get("tools") or ())
        pieces += [piece for message in _checked(body["messages"]) for piece in _message(message, rules, default)]
        kept, caching = marked(pieces, rules, mode, default)
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is not None and limit < 1:
            raise Refused("Invalid value: must be at least 1.", param="max_completion_tokens", code="integer_below_min")
        stop = body.get("stop") or ()
        return Prompt(
            model=model,
            owner=owner,
            pieces=kept,
            route=str(body.get("prompt_cache_key") or body.get("cache_salt") or ""),
            caching=caching,
            max_tokens=limit,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stream=bool(body.get("stream")),
        )

    def miss(self, prompt: Prompt, visit: Visit, earlier: Prompt | None) -> None:
        """Chat Completions have no diagnosis."""

    def refusal(self, error: Refused) -> dict[str, Any]:
        """An error's body."""
        return refusal(error)

    def whole(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> dict[str, Any]:
        """A chat completion."""
        del miss
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text or None,
            "refusal": answer.refusal or None,
        }
        if answer.calls:
            message["tool_calls"] = _calls(answer, name)
        choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
        whole = {"id": name, "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}
        return {**whole, "usage": self._usage(answer, visit)}

    def events(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> Iterator[bytes]:
        """The chunks of a streamed one."""
        del miss
        head = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
            return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

        yield chunk({"role": "assistant", "content": ""})
        for word in words(answer.text):
            yield chunk({"content": word})
        if answer.refusal:
            yield chunk({"refusal": answer.refusal})
        for index, call in enumerate(_calls(answer, name)):
            text = call["function"]["arguments"]
            yield chunk({"tool_calls": [{**call, "index": index, "function": {**call["function"], "arguments": ""}}]})
            for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                yield chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
        yield chunk({}, _finish(answer))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield sse({**head, "choices": [], "usage": self._usage(answer, visit)})
        yield b"data: [DONE]\n\n"

    def _usage(self, answer: Answer, visit: Visit) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": visit.tokens,
            "completion_tokens": answer.tokens,
            "total_tokens": visit.tokens + answer.tokens,
        }
        if self._vendor == "deepseek":
            return {
                **usage,
                "prompt_cache_hit_tokens": visit.read,
                "prompt_cache_miss_tokens": visit.tokens - visit.read,
            }
        details = {"cached_tokens": visit.read, "cache_write_tokens": sum(visit.written)}
        return {**usage, "prompt_tokens_details": details}


def _finish(answer: Answer) -> str:
    return {"tools": "tool_calls"}.get(answer.finish, answer.finish)


def _calls(answer: Answer, name: str) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{name}_{index}",
            "type": "function",
            "function": {"name": called, "arguments": canonical(dict(arguments))},
        }
        for index, (called, arguments) in enumerate(answer.calls)
    ]


def _checked(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """The messages, each tool's result after its call and each call answered, as the vendor demands."""
    open_calls: set[str] = set()
    for index, message in enumerate(messages):
        one_of(MESSAGE, message, lambda name, index=index: unknown(f"messages[{index}].{name}"))  # type: ignore[misc]
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise Refused(f"Invalid value: '{role}'.", param=f"messages[{index}].role", code="invalid_value")
        if role == "tool" and message.get("tool_call_id") not in open_calls:
            raise Refused(
                "Invalid parameter: messages with role 'tool' must be a response to a preceding message with "
                "'tool_calls'.",
                param=f"messages[{index}].role",
            )
        if role == "tool":
            open_calls.discard(message["tool_call_id"])
        elif open_calls:
            raise Refused("An assistant message with 'tool_calls' must be followed by tool messages.")
        if not re.fullmatch(r"[^\s<|\\/>]{1,64}", message.get("name", "x")):
            raise Refused("Invalid 'name': string does not match pattern.", param=f"messages[{index}].name")
        if message.get("content") is None and not message.get("tool_calls") and not message.get("refusal"):
            raise Refused(
                "Invalid value for 'content': expected a string, got null.", param=f"messages[{index}].content"
            )
        open_calls |= {call["id"] for call in message.get("tool_calls") or ()}
        yield message
    if open_calls:
        raise Refused("An assistant message with 'tool_calls' must be followed by tool messages.")


def _message(message: Mapping[str, Any], rules: CacheRules | None, default: int) -> Iterator[Piece]:
    """One piece for each content part; the calls of tools as one more."""
    role = " ".join(str(message[name]) for name in ("role", "name", "tool_call_id") if message.get(name))
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    for index, part in enumerate(parts):
        if part.get("type") not in PARTS:
            raise Refused(f"Invalid value: '{part.get('type')}'.", param="messages[].content[].type")
        one_of(PARTS[part["type"]], part, lambda name: unknown(f"messages[].content[].{name}"))
        text = part["text"] if part["type"] == "text" else canonical({**part, "prompt_cache_breakpoint": None})
        piece = text_piece(role, text, first=index == 0)
        yield Piece(piece.content, piece.level, b"", breakpoint_of(part, rules, default))
    if message.get("tool_calls"):
        yield text_piece(f"{role} calls", canonical(message["tool_calls"]))


def embeddings(body: Mapping[str, Any]) -> dict[str, Any]:
    """Vectors that depend on the text alone: equal texts, equal vectors."""
    one_of(("input", "model", "dimensions", "encoding_format", "user"), body, unknown)
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    if not texts or len(texts) > 2048 or not all(isinstance(text, str) and text for text in texts):
        raise Refused("Invalid 'input': give 1 to 2048 texts, none of them empty.", param="input")
    rows = [vector(text, int(body.get("dimensions") or 16)) for text in texts]
    coded: list[Any] = [list(row) for row in rows]
    if body.get("encoding_format") == "base64":
        coded = [base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode() for row in rows]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(coded)]
    used = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return {"object": "list", "model": body["model"], "data": data, "usage": used}


def vector(text: str, dimensions: int) -> list[float]:
    """A text's vector of length 1."""
    raw = hashlib.shake_256(text.encode()).digest(2 * dimensions)
    numbers = [value / 32768 - 1 for value in struct.unpack(f"<{dimensions}H", raw)]
    length = sum(number * number for number in numbers) ** 0.5
    return [number / length for number in numbers]
