"""Clients of the ``anthropic`` package: ``messages.create``, ``parse`` and ``stream``, with memory around them.

Knows how a caller writes those requests (adapters/providers/ knows how agentmem does, and how answers are read). The
beta endpoints, their tool runner among them, batches and token counts pass by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agentmem.provider import Generation
from agentmem.types import Message
from agentmem.wrapped_turns import Asked, Ready, Recollection

from ..providers._anthropic_replies import Reader, parse_reply
from ..providers._http import is_loopback
from ..providers._tools import canonical, tool_call
from ._sdk import Reads, bound

__all__ = ["bind"]

#: Seconds for which an entry is held after its last use, with the marker's default lifetime of five minutes.
HOLDS_S = 300.0
#: The shortest lifetime by its name in the rules; a marker without a ``ttl`` is of it.
SHORT = "5m"
#: Parts that take no marker.
UNMARKED = ("thinking", "redacted_thinking")

Json = dict[str, Any]


def bind(client: Any, memory: Recollection) -> tuple[Any, bool] | None:
    """A copy of the client whose chats go through memory, and whether it is asynchronous; None for another class."""
    import anthropic

    for names, asynchronous in (
        (("Anthropic", "AnthropicBedrock", "AnthropicVertex"), False),
        (("AsyncAnthropic", "AsyncAnthropicBedrock", "AsyncAnthropicVertex"), True),
    ):
        classes = tuple(getattr(anthropic, name) for name in names if hasattr(anthropic, name))
        if isinstance(client, classes):
            return bound(client, memory, {"/v1/messages": Messages}, asynchronous=asynchronous), asynchronous
    return None


class Messages:
    """A request of ``POST /v1/messages``."""

    def __init__(self, body: Mapping[str, Any], client: Any) -> None:
        self._body = dict(body)
        given = {name: value for name, value in body.items() if _given(value)}
        self._system = given.get("system")
        if not isinstance(self._system, str | None):
            self._system = [_plain(block) for block in self._system]
        self._tools = [_plain(tool) for tool in given.get("tools") or ()]
        self._moving = given.get("cache_control")  # the vendor's own mark, which moves with the last block
        self._messages = [_read(message) for message in given["messages"]]
        told = [(at, one) for at, message in enumerate(self._messages) for one in _told(message)]
        self._places = [at for at, _ in told]
        self._marks = bool(self._moving) or any(
            isinstance(block, Mapping) and "cache_control" in block
            for blocks in (self._tools, self._system, *(message["content"] for message in self._messages))
            if isinstance(blocks, list)
            for block in blocks
        )
        self.asked = Asked(
            model=f"anthropic:{given.get('model') or ''}",
            messages=tuple(message for _, message in told),
            head=canonical([self._tools, self._system]),
            kv="breakpoints",
            holds_s=None if is_loopback(str(client.base_url)) else HOLDS_S,
            marked=self._marks,
        )

    def placed(self, ready: Ready, _: Recollection, /) -> Json:
        """The body with the note, the recalled block and marks."""
        messages = list(self._messages)
        system = [{"type": "text", "text": self._system}] if isinstance(self._system, str) else self._system or []
        body = {**self._body, "messages": messages}
        if ready.place is not None:
            at = self._places[ready.place]
            if self._moving and at == len(messages) - 1:
                # Moved to the end of the caller's own words: behind the block it would never be found again.
                messages[at] = _ended(messages[at], self._moving)
                del body["cache_control"]
            messages[at] = _with_block(messages[at], ready)
        if ready.note:
            system = _with_note([block for block in system if block.get("text")], ready.note)
        for count, lifetime in ready.marked.marks if ready.marked is not None else ():
            mark = _mark(lifetime)
            if count and (end := self._end(count)) >= 0:
                messages[end] = _ended(messages[end], mark)
            elif not count and system:
                system = [*system[:-1], {**system[-1], "cache_control": mark}]
        if system:
            body["system"] = system
        return body

    def _end(self, count: int) -> int:
        """The message that ends this prefix; the one before where it ends between the results of tools and a text."""
        within = count < len(self._places) and self._places[count] == self._places[count - 1]
        return self._places[count - 1] - within

    def whole(self, payload: Mapping[str, Any]) -> Generation | None:
        """The answer, with the beginning that the caller wrote for it."""
        return self._begun(parse_reply(payload))

    def reader(self) -> Reads:
        """For the events of a stream."""
        return _Continued(self)

    def _begun(self, generation: Generation) -> Generation:
        """The API goes on where a last message of the assistant ends, and does not repeat it."""
        begun = "".join(message.content for message in self.asked.messages[self.asked.ends :])
        return (
            dataclasses.replace(generation, text=begun + generation.text) if begun and generation.text else generation
        )

    def hides(self, _: Mapping[str, Any], /) -> bool:
        """Nothing: every stream tells its usage."""
        return False


class _Continued(Reader):
    """A stream's reader whose whole begins as the caller began it."""

    def __init__(self, route: Messages) -> None:
        super().__init__()
        self._route = route

    def end(self) -> Generation | None:
        whole = super().end()
        return None if whole is None else self._route._begun(whole)


# Reading what the caller wrote.


def _given(value: Any) -> bool:
    """False for the SDK's own words for an argument that was left out."""
    return value is not None and type(value).__name__ not in ("Omit", "NotGiven")


def _plain(block: Any) -> Any:
    """A block as a mapping; callers also hand back the SDK's own objects."""
    return block.to_dict() if hasattr(block, "to_dict") else block


def _read(message: Any) -> Json:
    message = _plain(message)
    content = message["content"]
    return {**message, "content": content if isinstance(content, str) else [_plain(block) for block in content]}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    blocks = [_plain(block) for block in content or ()]
    return "\n".join(block["text"] for block in blocks if block.get("type") == "text")


def _told(message: Mapping[str, Any]) -> list[Message]:
    """A message as ours: results of tools are messages of their own, before the text that follows them."""
    role, content = message["role"], message["content"]
    blocks = [] if isinstance(content, str) else content
    if role == "assistant":
        calls = [tool_call(b["id"], b["name"], b["input"]) for b in blocks if b.get("type") == "tool_use"]
        return [Message(role="assistant", content=_text(content), tool_calls=tuple(calls))]
    results = [
        Message(role="tool", content=_text(block.get("content")), tool_call_id=block.get("tool_use_id"))
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    text = _text(content)
    return [*results, Message(role=role, content=text)] if text or not results else results


# Writing into copies of it.


def _blocks(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _mark(lifetime: str | None) -> Json:
    return {"type": "ephemeral", **({} if lifetime in (None, SHORT) else {"ttl": lifetime})}


def _ended(message: Mapping[str, Any], mark: Any) -> Json:
    """The message with a marker on its last block that takes one."""
    blocks = _blocks(message["content"])
    for at in range(len(blocks) - 1, -1, -1):
        kind, text = blocks[at].get("type"), blocks[at].get("text", " ")
        if kind not in UNMARKED and text:
            blocks[at] = {**blocks[at], "cache_control": mark}
            return {**message, "content": blocks}
    return dict(message)


def _with_note(system: list[Json], note: str) -> list[Json]:
    """The system part with the note at its end, within the mark that ends it."""
    mark: Json = {}
    if system and "cache_control" in system[-1]:
        last = dict(system[-1])
        mark["cache_control"] = last.pop("cache_control")
        system = [*system[:-1], last]
    return [*system, {"type": "text", "text": note, **mark}]


def _with_block(message: Mapping[str, Any], ready: Ready) -> Json:
    """The message with the recalled block before its text, or behind it where the caller marks prefixes."""
    content = message["content"]
    if isinstance(content, str):
        texts = (content, ready.block) if ready.behind else (ready.block, content)
        return {**message, "content": "\n\n".join(texts)}
    first = next((at for at, block in enumerate(content) if block.get("type") == "text"), len(content))
    at = len(content) if ready.behind else first
    return {**message, "content": [*content[:at], {"type": "text", "text": ready.block}, *content[at:]]}
