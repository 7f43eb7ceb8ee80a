"""Anthropic's Messages, as a stand-in host reads and writes them, with the route that counts a request's tokens.

Knows the wire format of anthropic 2.x and refuses what the vendor refuses: unknown fields, a fifth marker, a longer
lifetime after a shorter one, a prewarm with a stream, thinking, a forced tool or a schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..cache_rules import CacheRules
from .host_cache import Piece, Prompt, Visit
from .host_exchange import Answer, Refused, canonical, names, one_of, sse, words

__all__ = ["Messages"]

FIELDS = names(
    "max_tokens messages model cache_control container diagnostics inference_geo metadata output_config service_tier "
    "speed stop_sequences stream system temperature thinking tool_choice tools top_k top_p"
)
COUNTED = names("messages model cache_control output_config speed system thinking tool_choice tools")
#: The fields of each block of a message, without ``type`` and ``cache_control``.
BLOCKS = {
    "text": ("text", "citations"),
    "image": ("source", "transformations"),
    "document": ("source", "title", "context", "citations"),
    "tool_use": ("id", "name", "input", "caller", "toolset_name"),
    "tool_result": ("tool_use_id", "content", "is_error", "toolset_name"),
    "thinking": ("thinking", "signature"),
    "redacted_thinking": ("data",),
}
TOOL = names(
    "name description input_schema type cache_control strict eager_input_streaming defer_loading allowed_callers "
    "input_examples"
)
LEVELS = ("tools", "system", "messages")
_STOP = {"stop": "end_turn", "length": "max_tokens", "tools": "tool_use"}


def _extra(name: str) -> Refused:
    return Refused(f"{name}: Extra inputs are not permitted")


class Messages:
    """``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

    path = "/v1/messages"
    stream_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> Prompt:
        """The prompt of a request, or `Refused`."""
        owner = _owner(headers)
        one_of(FIELDS, body, _extra)
        limit = body.get("max_tokens")
        if not isinstance(limit, int):
            raise Refused("max_tokens: Field required")
        if limit < 0 or (limit == 0 and not (rules and rules.prewarms)):
            raise Refused("max_tokens: Input should be greater than or equal to 1")
        if limit == 0:
            _check_prewarm(body)
        if body.get("temperature") is not None and body.get("top_p") is not None:
            raise Refused("`temperature` and `top_p` cannot both be specified for this model. Please use only one.")
        diagnostics = body.get("diagnostics")
        if diagnostics is not None:
            one_of(("previous_message_id",), diagnostics, lambda name: _extra(f"diagnostics.{name}"))
        pieces = self.pieces(body, rules)
        return Prompt(
            model=str(body.get("model")),
            owner=owner,
            pieces=tuple(pieces),
            compared={"model": body.get("model")},
            diagnose=diagnostics is not None,
            previous=(diagnostics or {}).get("previous_message_id"),
            max_tokens=limit,
            stop=tuple(body.get("stop_sequences") or ()),
            stream=bool(body.get("stream")),
            prewarm=limit == 0,
        )

    def count(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> list[Piece]:
        """The pieces of a request that is only counted."""
        _owner(headers)
        one_of(COUNTED, body, _extra)
        return self.pieces(body, rules)

    def pieces(self, body: Mapping[str, Any], rules: CacheRules | None) -> list[Piece]:
        """The prompt as the model reads it: tools, system, messages, each block with its marker."""
        messages = body.get("messages")
        if not body.get("model") or not isinstance(messages, list) or not messages:
            raise Refused("messages: at least one message is required")
        marks = _Marks(rules)
        pieces = [marks.piece(tool, "tools", _tool(tool, i)) for i, tool in enumerate(body.get("tools") or ())]
        system = body.get("system") or []
        blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
        pieces += [marks.piece(block, "system", _block(block, "system", ("text",))) for block in blocks]
        _check_turns(messages)
        for index, message in enumerate(messages):
            one_of(("role", "content"), message, lambda name, index=index: _extra(f"messages.{index}.{name}"))  # type: ignore[misc]
            for block in _content(message):
                text = _block(block, f"messages.{index}.content", tuple(BLOCKS))
                pieces.append(marks.piece(block, "messages", f"{message['role']} {text}"))
        return marks.automatic(_with_facts(pieces, body), body.get("cache_control"))

    def miss(self, prompt: Prompt, visit: Visit, earlier: Prompt | None) -> dict[str, Any] | None:
        """The vendor's diagnosis; the part that changed is named by its level."""
        if not prompt.diagnose or prompt.previous is None:
            return None
        if earlier is None:
            return {"cache_miss_reason": {"type": "previous_message_not_found"}}
        missed = {"cache_missed_input_tokens": visit.tokens - visit.read}
        if prompt.model != earlier.model:
            return {"cache_miss_reason": {"type": "model_changed", **missed}}
        last = max((i for i, piece in enumerate(earlier.pieces) if piece.lifetime is not None), default=-1)
        whole = earlier.pieces[: last + 1]
        for level in LEVELS:
            before = [(piece.facts, piece.content) for piece in whole if piece.level == level]
            now = [(piece.facts, piece.content) for piece in prompt.pieces if piece.level == level]
            grows = not whole or whole[-1].level == level  # the marked prefix ends here: more may follow
            if (now[: len(before)] if grows else now) != before:
                return {"cache_miss_reason": {"type": f"{level}_changed", **missed}}
            if grows:
                break
        return None if visit.read else {"cache_miss_reason": {"type": "unavailable"}}

    def refusal(self, error: Refused) -> dict[str, Any]:
        """An error's body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 500: "api_error"}
        return {"type": "error", "error": {"type": kinds.get(error.status, error.kind), "message": error.message}}

    def whole(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> dict[str, Any]:
        """A message."""
        message: dict[str, Any] = {
            "id": name,
            "type": "message",
            "role": "assistant",
            "model": body["model"],
            "content": _said(answer, name),
            "stop_reason": "refusal" if answer.refusal else _STOP[answer.finish],
            "stop_sequence": None,
            "usage": {**_usage(visit), "output_tokens": answer.tokens},
        }
        return {**message, "diagnostics": miss} if body.get("diagnostics") is not None else message

    def events(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> Iterator[bytes]:
        """The events of a streamed message."""
        whole = self.whole(body, answer, visit, name, miss)
        start = {**whole, "content": [], "stop_reason": None, "usage": {**_usage(visit), "output_tokens": 1}}
        yield sse({"type": "message_start", "message": start}, named=True)
        for index, block in enumerate(whole["content"]):
            hollow, deltas = _deltas(block)
            yield sse({"type": "content_block_start", "index": index, "content_block": hollow}, named=True)
            if index == 0:
                yield sse({"type": "ping"}, named=True)
            for delta in deltas:
                yield sse({"type": "content_block_delta", "index": index, "delta": delta}, named=True)
            yield sse({"type": "content_block_stop", "index": index}, named=True)
        delta = {"stop_reason": whole["stop_reason"], "stop_sequence": None}
        yield sse({"type": "message_delta", "delta": delta, "usage": {"output_tokens": answer.tokens}}, named=True)
        yield sse({"type": "message_stop"}, named=True)


class _Marks:
    """Counts the markers of one request and refuses what the vendor refuses."""

    def __init__(self, rules: CacheRules | None) -> None:
        self._rules = rules
        self._lifetimes: list[int] = []

    def piece(self, block: Mapping[str, Any], level: str, text: str) -> Piece:
        told = block.get("cache_control")
        return Piece(text.encode(), level, b"", None if told is None else self._taken(told))

    def _taken(self, told: Mapping[str, Any]) -> int | None:
        one_of(("type", "ttl"), told, lambda name: _extra(f"cache_control.{name}"))
        if told.get("type") != "ephemeral":
            raise Refused("cache_control.type: Input should be 'ephemeral'")
        if self._rules is None:
            return None
        known = [lifetime.name for lifetime in self._rules.lifetimes]
        ttl = told.get("ttl", known[0])
        if ttl not in known:
            raise Refused(f"cache_control.ttl: Input should be one of {known}")
        lifetime = known.index(ttl)
        if self._lifetimes and lifetime > self._lifetimes[-1]:
            before = known[self._lifetimes[-1]]
            raise Refused(
                f"a ttl='{ttl}' cache_control block must not come after a ttl='{before}' cache_control block."
            )
        self._lifetimes.append(lifetime)
        if len(self._lifetimes) > self._rules.marks:
            found = len(self._lifetimes)
            raise Refused(f"A maximum of {self._rules.marks} blocks with cache_control may be provided. Found {found}.")
        return lifetime

    def automatic(self, pieces: list[Piece], told: Mapping[str, Any] | None) -> list[Piece]:
        """The top-level marker: it stands on the last block, and must agree with a marker that stands there already."""
        if told is None or not pieces:
            return pieces
        last = pieces[-1].lifetime
        lifetime = self._taken(told) if last is None else _Marks(self._rules)._taken(told)
        if last is not None and lifetime != last:
            raise Refused("cache_control: the last block has a cache_control with another ttl")
        return [*pieces[:-1], replace(pieces[-1], lifetime=lifetime)]


def _owner(headers: Mapping[str, str]) -> str:
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ").strip()
    if not key:
        raise Refused("x-api-key header is required", status=401)
    if not headers.get("anthropic-version"):
        raise Refused("anthropic-version: header is required")
    return f"{key} {headers.get('anthropic-workspace-id', '')}"


def _check_prewarm(body: Mapping[str, Any]) -> None:
    forced = (body.get("tool_choice") or {}).get("type") in ("any", "tool")
    thinks = (body.get("thinking") or {}).get("type") in ("enabled", "adaptive")
    schema = bool((body.get("output_config") or {}).get("format"))
    wrong = {"stream": body.get("stream"), "thinking": thinks, "tool_choice": forced, "output_config.format": schema}
    for name, there in wrong.items():
        if there:
            raise Refused(f"max_tokens: 0 is not supported with {name}")


def _tool(tool: Mapping[str, Any], index: int) -> str:
    if tool.get("type") in (None, "custom"):  # the vendor's own tools have fields of their own
        one_of(TOOL, tool, lambda name: _extra(f"tools.{index}.{name}"))
        if not tool.get("name") or not isinstance(tool.get("input_schema"), Mapping):
            raise Refused(f"tools.{index}.input_schema: Field required")
    return canonical({name: value for name, value in tool.items() if name != "cache_control"})


def _block(block: Mapping[str, Any], where: str, kinds: Sequence[str]) -> str:
    """A block's bytes without its marker."""
    kind = str(block.get("type"))
    if kind not in kinds:
        raise Refused(f"{where}: Input tag '{kind}' found using 'type' does not match any of the expected tags")
    one_of((*BLOCKS[kind], "type", "cache_control"), block, lambda name: _extra(f"{where}.{kind}.{name}"))
    if kind == "text" and not block.get("text", "").strip():
        raise Refused(f"{where}: text content blocks must contain non-whitespace text")
    if "thinking" in kind and block.get("cache_control"):
        raise Refused(f"{where}: cache_control cannot be set for {kind} blocks")
    if kind == "text":
        return f"text {block['text']}"
    return canonical({name: value for name, value in block.items() if name != "cache_control"})


def _content(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def _check_turns(messages: Sequence[Mapping[str, Any]]) -> None:
    """Who speaks, and each call of a tool answered at once."""
    if messages[0].get("role") != "user":
        raise Refused('messages: first message must use the "user" role')
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        if message.get("role") not in ("user", "assistant"):
            raise Refused(f"messages.{index}.role: Input should be 'user' or 'assistant'")
        blocks = _content(message)
        if not blocks and index + 1 < len(messages):
            raise Refused(f"messages.{index}: all messages must have non-empty content")
        results = {block.get("tool_use_id") for block in blocks if block.get("type") == "tool_result"}
        if missing := waiting - results:
            raise Refused(
                f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(sorted(missing))}."
            )
        if strange := results - waiting:
            raise Refused(f"messages.{index}: unexpected `tool_use_id` found in `tool_result` blocks: {strange}.")
        waiting = {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}
    if waiting:
        raise Refused("messages: `tool_use` ids were found without `tool_result` blocks immediately after.")


def _with_facts(pieces: Sequence[Piece], body: Mapping[str, Any]) -> list[Piece]:
    """What voids a level's entries without adding a token stands at the level's first block."""
    config = body.get("output_config") or {}
    voids = {
        "system": {"format": config.get("format"), "speed": body.get("speed")},
        "messages": {
            "tool_choice": body.get("tool_choice"),
            "thinking": body.get("thinking"),
            "effort": config.get("effort"),
        },
    }
    facts = {level: canonical(told).encode() for level, told in voids.items() if any(told.values())}
    first = {level: next((i for i, p in enumerate(pieces) if p.level == level), -1) for level in facts}
    return [
        replace(piece, facts=facts[piece.level]) if first.get(piece.level) == i else piece
        for i, piece in enumerate(pieces)
    ]


def _usage(visit: Visit) -> dict[str, Any]:
    written = (*visit.written, 0, 0)
    return {
        "input_tokens": visit.uncached,
        "cache_creation_input_tokens": sum(visit.written),
        "cache_read_input_tokens": visit.read,
        "cache_creation": {"ephemeral_5m_input_tokens": written[0], "ephemeral_1h_input_tokens": written[1]},
        "service_tier": "standard",
    }


def _said(answer: Answer, name: str) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.thinking:
        blocks.append({"type": "thinking", "thinking": answer.thinking, "signature": f"signed-{name}"})
    if text := answer.text or answer.refusal:
        blocks.append({"type": "text", "text": text})
    for index, (called, arguments) in enumerate(answer.calls):
        blocks.append({"type": "tool_use", "id": f"toolu_{name}_{index}", "name": called, "input": dict(arguments)})
    return blocks


def _deltas(block: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A block as it begins, and what is added to it."""
    kind = block["type"]
    if kind == "text":
        return {**block, "text": ""}, [{"type": "text_delta", "text": word} for word in words(block["text"])]
    if kind == "thinking":
        deltas = [{"type": "thinking_delta", "thinking": word} for word in words(block["thinking"])]
        signed = {"type": "signature_delta", "signature": block["signature"]}
        return {**block, "thinking": "", "signature": ""}, [*deltas, signed]
    text = canonical(block["input"])
    halves = (text[: len(text) // 2], text[len(text) // 2 :])
    return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": part} for part in halves]
