"""Clients of the ``openai`` package: Chat Completions and Responses, with memory around them.

Knows how a caller writes those requests (adapters/providers/ knows how agentmem does, and how answers are read).
Requests of other endpoints, and calls without an answer of their own (``background``), pass by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from agentmem.cache_rules import rules_for, vendors
from agentmem.provider import Generation
from agentmem.types import Message
from agentmem.wrapped_turns import Asked, Ready, Recollection

from ..providers import _openai_chat, _openai_responses
from ..providers._http import is_loopback
from ..providers._openai_hosts import HOLDS_S, Served, host_for
from ..providers._tools import canonical, tool_call
from ._sdk import Reads, Routes, bound

__all__ = ["bind"]

HEAD = ("system", "developer")
BREAKPOINT = "prompt_cache_breakpoint"

Json = dict[str, Any]


def bind(client: Any, memory: Recollection) -> tuple[Any, bool] | None:
    """A copy of the client whose chats go through memory, and whether it is asynchronous; None for another class."""
    import openai

    routes: Routes = {"/chat/completions": Chat, "/responses": Responses}
    for cls, asynchronous in ((openai.OpenAI, False), (openai.AsyncOpenAI, True)):
        if isinstance(client, cls):
            return bound(client, memory, routes, asynchronous=asynchronous), asynchronous
    return None


class _OpenAIRoute:
    """What both endpoints share: whose model it is, what its cache wants."""

    asked: Asked

    def __init__(self, body: Mapping[str, Any], client: Any) -> None:
        self.body = body
        self._address = str(client.base_url)
        host = host_for(self._address, None)
        vendor = host.vendor or vendors(self._address)
        model = str(body.get("model") or "")
        name = f"{vendor or 'openai_compatible'}:{model}"
        self.served = Served(model=model, name=name, host=host, rules=rules_for(name) if vendor else None)
        self._marks = False

    def _asked(self, messages: Sequence[Message], head: Any, previous: str | None = None) -> Asked:
        own = self.served.marked and not self.body.get("prompt_cache_options")
        return Asked(
            model=self.served.name,
            messages=tuple(messages),
            head=canonical([self.body.get("tools"), head]),
            kv="breakpoints" if own else "auto",
            holds_s=None if is_loopback(self._address) else HOLDS_S,
            previous=previous,
            marked=self._marks,
        )

    def _keyed(self, body: Json, memory: Recollection) -> None:
        """Give the request the scope's routing key where it has none and the host takes one."""
        if memory.cache and self.served.keyed and not body.get("prompt_cache_key"):
            body["prompt_cache_key"] = memory.cache_key

    def _ends(self, ready: Ready) -> dict[int, Json]:
        """Where breakpoints stand: by the message of `Asked.messages` (-1: the system part), the last ones first asked
        for. The model's own words hold none, so those before them do."""
        can = [at for at, said in enumerate(self.asked.messages) if said.role != "assistant" and said.content]
        found: dict[int, Json] = {}
        for count, lifetime in ready.marked.marks if ready.marked is not None else ():
            at = max((at for at in can if at < count), default=-1)
            found.setdefault(at, {"mode": "explicit", **({"ttl": lifetime} if lifetime else {})})
        return found


class Chat(_OpenAIRoute):
    """A request of ``POST /chat/completions``."""

    def __init__(self, body: Mapping[str, Any], client: Any) -> None:
        super().__init__(body, client)
        self._messages: list[Any] = list(body["messages"])
        # The system part stands at the head; whatever else the caller wrote is conversation.
        self._head = next((i for i, m in enumerate(self._messages) if m["role"] not in HEAD), len(self._messages))
        self._marks = _marked(self._messages, "content")
        self.asked = self._asked(
            [_chat_message(message) for message in self._messages[self._head :]], self._messages[: self._head]
        )
        # Without a count of tokens the ledger knows nothing of a stream: the vendor is asked for one, unseen.
        counted = self.served.host.vendor == "openai" or is_loopback(self._address)
        self._counts = bool(body.get("stream")) and counted and not body.get("stream_options")

    def placed(self, ready: Ready, memory: Recollection, /) -> Json:
        """The body with the note, the recalled block, marks and the routing key."""
        body = {**self.body, "messages": list(self._messages)}
        messages = body["messages"]
        if ready.place is not None:
            at = self._head + ready.place
            messages[at] = _with_block(messages[at], ready, "text")
        if ready.note and self._head:
            messages[self._head - 1] = _with_note(messages[self._head - 1], ready.note, "text")
        self._keyed(body, memory)
        if ready.marked is not None:
            body["prompt_cache_options"] = {"mode": "explicit"}
            marks = {self._head + at: mark for at, mark in self._ends(ready).items()}
            for at, message in enumerate(messages):
                if message["role"] != "assistant":
                    messages[at] = _in_parts(message, "content", "text", marks.get(at))
        if ready.note and not self._head:
            messages.insert(0, {"role": "system", "content": ready.note})
        if self._counts:
            body["stream_options"] = {"include_usage": True}
        return body

    def whole(self, payload: Mapping[str, Any]) -> Generation | None:
        """The first choice."""
        return _openai_chat.parse_reply(payload)

    def reader(self) -> Reads:
        """For the chunks of a stream."""
        return _openai_chat.Reader()

    def hides(self, event: Mapping[str, Any], /) -> bool:
        """The chunk that brings the count which only we asked for."""
        return self._counts and not event.get("choices") and bool(event.get("usage"))


class Responses(_OpenAIRoute):
    """A request of ``POST /responses``. Where the host holds the conversation, only what is new is seen."""

    def __init__(self, body: Mapping[str, Any], client: Any) -> None:
        super().__init__(body, client)
        given = body.get("input")
        self._items: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else list(given or ())
        told = [(at, message) for at, item in enumerate(self._items) if (message := _item_message(item)) is not None]
        self._places = [at for at, _ in told]
        conversation = body.get("conversation")
        held = conversation.get("id") if isinstance(conversation, Mapping) else conversation
        self._held = body.get("previous_response_id") or held
        self._marks = _marked(self._items, "content", "output")
        self.asked = self._asked([message for _, message in told], body.get("instructions"), self._held)

    def placed(self, ready: Ready, memory: Recollection, /) -> Json:
        """The body with the note, the recalled block, marks and the routing key."""
        body = {**self.body, "input": list(self._items)}
        items = body["input"]
        told = body.get("instructions")
        if body.get("prompt") and not told:
            # Instructions would put aside those of the caller's stored prompt: the note stands by the block.
            ready = replace(ready, block=f"{ready.note}\n\n{ready.block}", note="")
        if ready.place is not None:
            at = self._places[ready.place]
            items[at] = _with_block(items[at], ready, "input_text")
        if ready.note:
            body["instructions"] = f"{told}\n\n{ready.note}" if told else ready.note
        self._keyed(body, memory)
        if ready.marked is not None:
            body["prompt_cache_options"] = {"mode": "explicit"}
            marks = {self._places[at]: mark for at, mark in self._ends(ready).items() if at >= 0}
            for at in self._places:
                if items[at].get("role") != "assistant" and items[at].get("type") != "function_call":
                    part = "output" if items[at].get("type") == "function_call_output" else "content"
                    items[at] = _in_parts(items[at], part, "input_text", marks.get(at))
        return body

    def whole(self, payload: Mapping[str, Any]) -> Generation | None:
        """The response, once it has ended."""
        if payload.get("status") not in (None, "completed", "incomplete"):
            return None  # in the background, or failed
        return _openai_responses.parse_reply(payload)

    def reader(self) -> Reads:
        """For the events of a stream."""
        return _openai_responses.Reader()

    def hides(self, _: Mapping[str, Any], /) -> bool:
        """Nothing: every stream of this endpoint tells its usage."""
        return False


# Reading what the caller wrote.


def _text(content: Any) -> str:
    """The text of a message's content: a str, or parts of which some are text."""
    if isinstance(content, str):
        return content
    parts = content or ()
    return "\n".join(part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _chat_message(message: Mapping[str, Any]) -> Message:
    role = message["role"]
    calls = [
        tool_call(call.get("id"), call["function"]["name"], call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
        if call.get("function")
    ]
    return Message(
        role="tool" if role == "function" else "system" if role in HEAD else role,
        content=_text(message.get("content")),
        name=message.get("name") if role == "user" else None,
        tool_calls=tuple(calls),
        tool_call_id=message.get("tool_call_id"),
    )


def _item_message(item: Mapping[str, Any]) -> Message | None:
    kind = item.get("type") or "message"
    if kind == "function_call":
        call = tool_call(item.get("call_id"), item["name"], item.get("arguments"))
        return Message(role="assistant", content="", tool_calls=(call,))
    if kind == "function_call_output":
        return Message(role="tool", content=_text(item.get("output")), tool_call_id=item.get("call_id"))
    if kind != "message":
        return None  # reasoning, references to items that the host holds, its own tools
    role = item["role"]
    return Message(role="system" if role in HEAD else role, content=_text(item.get("content")))


# Writing into copies of it.


def _marked(messages: Sequence[Mapping[str, Any]], *names: str) -> bool:
    """Whether the caller marks prefixes itself."""
    contents = (message.get(name) for message in messages for name in names)
    return any(
        isinstance(part, Mapping) and BREAKPOINT in part
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def _parts(content: Any, kind: str) -> list[Any]:
    return [{"type": kind, "text": content}] if isinstance(content, str) else list(content or ())


def _in_parts(message: Mapping[str, Any], name: str, kind: str, mark: Json | None) -> Json:
    """The message with its content as parts, as it is written with a breakpoint at its end and without."""
    parts = _parts(message.get(name), kind)
    if mark and parts:
        parts[-1] = {**parts[-1], BREAKPOINT: mark}
    return {**message, name: parts} if parts else dict(message)


def _with_note(message: Mapping[str, Any], note: str, kind: str) -> Json:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": f"{content}\n\n{note}" if content else note}
    parts = _parts(content, kind)
    mark: Json = {}
    if parts and BREAKPOINT in parts[-1]:  # it ends the system part, and the note is one more piece of that
        last = parts[-1] = dict(parts[-1])
        mark[BREAKPOINT] = last.pop(BREAKPOINT)
    return {**message, "content": [*parts, {"type": kind, "text": note, **mark}]}


def _with_block(message: Mapping[str, Any], ready: Ready, kind: str) -> Json:
    """The message with the recalled block before its text, or behind it where the caller marks prefixes."""
    content = message.get("content")
    if isinstance(content, str):
        texts = (content, ready.block) if ready.behind else (ready.block, content)
        return {**message, "content": "\n\n".join(texts)}
    parts = _parts(content, kind)
    first = next((i for i, part in enumerate(parts) if isinstance(part, Mapping) and "text" in part), len(parts))
    at = len(parts) if ready.behind else first
    return {**message, "content": [*parts[:at], {"type": kind, "text": ready.block}, *parts[at:]]}
