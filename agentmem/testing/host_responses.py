"""OpenAI's Responses, as a stand-in host reads and writes them, with the route that counts a request's tokens.

Knows the wire format of openai 3.x and refuses what the vendor refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..cache_rules import CacheRules
from .host_cache import Piece, Prompt, Visit
from .host_exchange import Answer, Refused, canonical, names, one_of, sse, words
from .host_openai import breakpoint_of, cache_options, head_pieces, key_of, marked, miss, refusal, text_piece, unknown

__all__ = ["Responses"]

FIELDS = names(
    "access_programs background background_options context_management conversation image include input instructions "
    "max_output_tokens max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt "
    "prompt_cache_key prompt_cache_options prompt_cache_retention reasoning safety_identifier service_tier store "
    "stream stream_options temperature text tool_choice tools top_logprobs top_p truncation user"
)
#: Fields of the route that counts.
COUNTED = names(
    "conversation input instructions model parallel_tool_calls personality previous_response_id reasoning text "
    "tool_choice tools truncation"
)
#: What the content of a message may hold, by its role, and the fields of each part.
INPUT = {
    "input_text": ("type", "text", "prompt_cache_breakpoint"),
    "input_image": ("type", "image_url", "file_id", "detail", "prompt_cache_breakpoint"),
    "input_file": ("type", "file_data", "file_id", "file_url", "filename", "detail", "prompt_cache_breakpoint"),
}
OUTPUT = {"output_text": ("type", "text", "annotations", "logprobs"), "refusal": ("type", "refusal")}
MESSAGE = ("type", "role", "content", "id", "status", "phase")
#: The fields of an item that is no message.
ITEMS = {
    "function_call": ("type", "id", "call_id", "name", "arguments", "status"),
    "function_call_output": ("type", "id", "call_id", "output", "status"),
    "reasoning": ("type", "id", "summary", "content", "encrypted_content", "status"),
}
#: The smallest limit that the vendor takes.
LEAST_OUTPUT = 16


class Responses:
    """``POST /responses`` and ``/responses/input_tokens``."""

    path = "/v1/responses"
    stream_type = "text/event-stream"

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> Prompt:
        """The prompt of a request, or `Refused`."""
        owner = key_of(headers)
        one_of(FIELDS, body, unknown)
        model = str(body.get("model") or "")
        if not model or not body.get("input"):
            raise Refused("Missing required parameter: 'model' or 'input'.", code="missing_required_parameter")
        if body.get("previous_response_id"):
            raise Refused(
                f"Previous response with id '{body['previous_response_id']}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        limit = body.get("max_output_tokens")
        if limit is not None and limit < LEAST_OUTPUT:
            raise Refused(
                f"Invalid 'max_output_tokens': {limit} is below the minimum {LEAST_OUTPUT}.",
                param="max_output_tokens",
                code="integer_below_min_value",
            )
        mode, default = cache_options(body, rules, ("mode", "ttl", "prewarm", "comparison_response_id"))
        options = body.get("prompt_cache_options") or {}
        text, reasoning = body.get("text") or {}, body.get("reasoning") or {}
        compared = {
            "model": model,
            "prompt_cache_key": body.get("prompt_cache_key"),
            "tools": canonical(body.get("tools") or []),
            "text_format": canonical(text.get("format")),
            "reasoning_effort": reasoning.get("effort"),
            "verbosity": text.get("verbosity"),
        }
        kept, caching = marked(self.pieces(body, rules, default), rules, mode, default)
        return Prompt(
            model=model,
            owner=owner,
            pieces=kept,
            route=str(body.get("prompt_cache_key") or ""),
            caching=caching,
            compared=compared,
            diagnose=bool(options.get("comparison_response_id")),
            previous=options.get("comparison_response_id"),
            max_tokens=0 if options.get("prewarm") else limit,
            stream=bool(body.get("stream")),
            prewarm=bool(options.get("prewarm")),
        )

    def count(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> list[Piece]:
        """The pieces of a request that is only counted."""
        key_of(headers)
        one_of(COUNTED, body, unknown)
        return self.pieces(body, rules, 0)

    def pieces(self, body: Mapping[str, Any], rules: CacheRules | None, default: int) -> list[Piece]:
        """The prompt as the model reads it."""
        text, reasoning = body.get("text") or {}, body.get("reasoning") or {}
        settings = {"format": text.get("format"), "verbosity": text.get("verbosity"), "effort": reasoning.get("effort")}
        pieces = head_pieces(settings, body.get("tools") or ())
        if body.get("instructions"):
            pieces.append(text_piece("developer", body["instructions"]))
        told = body.get("input") or ()
        items = [{"role": "user", "content": told}] if isinstance(told, str) else told
        _check_calls(items)
        for index, item in enumerate(items):
            pieces += _item(item, index, rules, default)
        return pieces

    def miss(self, prompt: Prompt, visit: Visit, earlier: Prompt | None) -> dict[str, Any] | None:
        """The vendor's diagnosis."""
        return miss(prompt, visit, earlier)

    def refusal(self, error: Refused) -> dict[str, Any]:
        """An error's body."""
        return refusal(error)

    def whole(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> dict[str, Any]:
        """A response."""
        cut = answer.finish == "length" and not _prewarms(body)
        response: dict[str, Any] = {
            "id": name,
            "object": "response",
            "created_at": 1,
            "model": body["model"],
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": body.get("tools") or [],
            "output": [] if _prewarms(body) else _output(answer, name),
            "usage": _usage(answer, visit),
        }
        return response if miss is None else {**response, "prompt_cache_diagnostics": miss}

    def events(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> Iterator[bytes]:
        """The events of a streamed response, numbered."""
        whole = self.whole(body, answer, visit, name, miss)
        number = 0

        def event(kind: str, **fields: Any) -> bytes:
            nonlocal number
            number += 1
            return sse({"type": f"response.{kind}", "sequence_number": number - 1, **fields}, named=True)

        begun = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        yield event("created", response=begun)
        yield event("in_progress", response=begun)
        for index, item in enumerate(whole["output"]):
            at: dict[str, Any] = {"output_index": index, "item_id": item["id"]}
            hollow = {**item, "status": "in_progress"}
            hollow.update({"content": []} if item["type"] == "message" else {})
            hollow.update({"arguments": ""} if item["type"] == "function_call" else {})
            yield event("output_item.added", output_index=index, item=hollow)
            if item["type"] == "function_call":
                text = item["arguments"]
                for part in (text[: len(text) // 2], text[len(text) // 2 :]):
                    yield event("function_call_arguments.delta", delta=part, **at)
                yield event("function_call_arguments.done", arguments=text, name=item["name"], **at)
            for number_of, part in enumerate(item["content"] if item["type"] == "message" else ()):
                yield from _part_events(event, part, {**at, "content_index": number_of})
            yield event("output_item.done", output_index=index, item=item)
        yield event("incomplete" if whole["status"] == "incomplete" else "completed", response=whole)


def _part_events(event: Any, part: Mapping[str, Any], at: Mapping[str, Any]) -> Iterator[bytes]:
    kind, field = ("output_text", "text") if part["type"] == "output_text" else ("refusal", "refusal")
    yield event("content_part.added", part={**part, field: ""}, **at)
    more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
    for word in words(part[field]):
        yield event(f"{kind}.delta", delta=word, **at, **more)
    yield event(f"{kind}.done", **{field: part[field]}, **at, **more)
    yield event("content_part.done", part=part, **at)


def _prewarms(body: Mapping[str, Any]) -> bool:
    return bool((body.get("prompt_cache_options") or {}).get("prewarm"))


def _output(answer: Answer, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    if answer.thinking:
        items.append({"type": "reasoning", "id": f"rs_{name}", "summary": [], "encrypted_content": answer.thinking})
    parts: list[dict[str, Any]] = []
    if answer.refusal:
        parts.append({"type": "refusal", "refusal": answer.refusal})
    elif answer.text or not answer.calls:
        parts.append({"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []})
    if parts:
        message = {"type": "message", "id": f"msg_{name}", "role": "assistant", "content": parts}
        items.append({**message, "status": "incomplete" if answer.finish == "length" else "completed"})
    for index, (called, arguments) in enumerate(answer.calls):
        identity = {"id": f"fc_{name}_{index}", "call_id": f"call_{name}_{index}"}
        call = {"name": called, "arguments": canonical(dict(arguments)), "status": "completed"}
        items.append({"type": "function_call", **identity, **call})
    return items


def _usage(answer: Answer, visit: Visit) -> dict[str, Any]:
    written = (*visit.written, 0, 0)
    details = {
        "cached_tokens": visit.read,
        "cache_write_tokens": sum(visit.written),
        "cache_write_tokens_details": {"ttl_30m_tokens": written[0], "ttl_12h_tokens": written[1]},
    }
    return {
        "input_tokens": visit.tokens,
        "input_tokens_details": details,
        "output_tokens": answer.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": visit.tokens + answer.tokens,
    }


def _check_calls(items: Sequence[Mapping[str, Any]]) -> None:
    called = [item.get("call_id") for item in items if item.get("type") == "function_call"]
    answered = [item.get("call_id") for item in items if item.get("type") == "function_call_output"]
    for call in answered:
        if call not in called:
            raise Refused(f"No tool call found for function call output with call_id {call}.", param="input")
    for call in called:
        if call not in answered:
            raise Refused(f"No tool output found for function call {call}.", param="input")


def _item(item: Mapping[str, Any], index: int, rules: CacheRules | None, default: int) -> Iterator[Piece]:
    kind = item.get("type", "message")
    if kind == "message":
        one_of(
            ("type", "role", "content", "id", "status", "phase"), item, lambda name: unknown(f"input[{index}].{name}")
        )
        role = item.get("role")
        if role not in ("user", "system", "developer", "assistant"):
            raise Refused(f"Invalid value: '{role}'.", param=f"input[{index}].role", code="invalid_value")
        yield from _content(str(role), item.get("content"), OUTPUT if role == "assistant" else INPUT, rules, default)
        return
    if kind not in ITEMS:
        raise Refused(f"Invalid value: '{kind}'.", param=f"input[{index}].type", code="invalid_value")
    one_of(ITEMS[kind], item, lambda name: unknown(f"input[{index}].{name}"))
    if kind == "function_call_output" and not isinstance(item.get("output"), str):
        yield from _content(f"tool {item['call_id']}", item.get("output"), INPUT, rules, default)
        return
    said = {
        name: item[name] for name in ("call_id", "name", "arguments", "output", "encrypted_content") if name in item
    }
    yield text_piece(kind, canonical(said))


def _content(
    role: str, content: Any, known: Mapping[str, Sequence[str]], rules: CacheRules | None, default: int
) -> Iterator[Piece]:
    if isinstance(content, str):
        yield text_piece(role, content)
        return
    if not content:
        raise Refused("Invalid 'content': empty.", param="input[].content")
    for index, part in enumerate(content):
        kind = part.get("type")
        if kind not in known:
            raise Refused(
                f"Invalid value: '{kind}'. Supported values are: {list(known)}.",
                param=f"input[].content[{index}]",
                code="invalid_value",
            )
        one_of(known[kind], part, lambda name: unknown(f"input[].content[].{name}"))
        text = part["text"] if "text" in part else canonical({**part, "prompt_cache_breakpoint": None})
        piece = text_piece(role, text, first=index == 0)
        yield Piece(piece.content, piece.level, b"", breakpoint_of(part, rules, default))
