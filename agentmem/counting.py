"""``count_tokens``: how many tokens a text or a whole request has for the chat model, and whether that is exact.

Knows which way of counting is at hand (the model's tokenizer, its vendor's endpoint, a calibrated estimate) and asks
the endpoint only where the caller wants the exact number: that is a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from . import images
from .errors import InvalidInput
from .flow import Count, Flow
from .plaintext.drafts import check_text, drafts, shown
from .provider import CountsRequests, Request
from .tokens import Calibration, request_tokens
from .types import Image, Message, Scope, Segment, TokenCount, ToolCall

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["count_tokens"]


def count_tokens(
    engine: Engine,
    content: Any,
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    exact: bool = False,
) -> Flow[TokenCount]:
    """How many tokens ``content`` has for the chat model.

    A str alone is counted as it is. Messages (a `Message`, a mapping, or a list of them), or a str with ``system`` or
    ``tools``, are counted as the request that they make, with what a chat format adds. ``exact=True`` counts a request
    in any case, at the vendor's counting endpoint where there is one. Raises `InvalidInput` for what is no message, and
    the errors of `ProviderError` from the endpoint.
    """
    provider = engine.provider
    asked = exact and isinstance(provider, CountsRequests)
    if isinstance(content, str) and system is None and not tools and not asked:
        text = check_text(content, "the content")
        if provider is not None and provider.capabilities.exact_tokens:
            return TokenCount(tokens=provider.count_tokens(text), exact=True)
        return _calibrated(engine, engine.count(text))
    request = _request(content, system, tools)
    if asked and isinstance(provider, CountsRequests):
        answer: TokenCount = yield Count(provider, request)
        if answer.exact:
            return answer
    # By the engine's count, as what was learned of the model's requests was (chat.py).
    return _calibrated(engine, request_tokens(request, engine.count))


def _calibrated(engine: Engine, tokens: int) -> TokenCount:
    if engine.provider is None:
        return TokenCount(tokens=tokens, exact=False)
    return Calibration(engine.database).count(engine.provider.name, tokens)


def _request(content: Any, system: str | None, tools: Sequence[Mapping[str, Any]] | None) -> Request:
    from .asking import checked_tools

    said = [_message(part) for part in (content if isinstance(content, (list, tuple)) else [content])]
    if not said:
        raise InvalidInput("there is no message to count: give a str, a message, or a list of them")
    segments = [Segment(name="turn", messages=tuple(said), stable=False)]
    if system is not None:
        head = Message(role="system", content=check_text(system, "system"))
        segments.insert(0, Segment(name="system", messages=(head,), stable=True))
    return Request(segments=tuple(segments), tools=checked_tools(tools))


def _message(part: Any) -> Message:
    if isinstance(part, Message):
        return part
    seen: tuple[Image, ...] = ()
    more: dict[str, Any] = {}
    if isinstance(part, Mapping):
        more = {name: part[name] for name in ("tool_calls", "tool_call_id") if part.get(name) is not None}
        part = {name: value for name, value in part.items() if name not in ("tool_calls", "tool_call_id")}
        if isinstance(part.get("content"), (list, tuple)):
            text, seen = images.split(part["content"])
            part["content"] = text
    [draft] = drafts(part, scope=Scope())
    try:
        calls = tuple(ToolCall.model_validate(call) for call in more.pop("tool_calls", ()))
        return Message(role=draft.role, content=draft.text, name=draft.name, images=seen, tool_calls=calls, **more)
    except (TypeError, ValidationError) as error:
        raise InvalidInput(f"the message {shown(part)} has tool calls that can't be understood") from error
