"""Clients of the ``ollama`` package: ``chat``, with memory around it. ``generate`` and all else pass by.

Knows how a caller writes a chat (adapters/providers/ollama.py knows how agentmem does, and how answers are read).
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from agentmem.flow import arun, run
from agentmem.provider import Generation
from agentmem.types import Message
from agentmem.wrapped_turns import Asked, Ready, Recollection

from ..providers._http import is_loopback
from ..providers._tools import tool_call
from ..providers.ollama import Reader, parse_reply
from ._sdk import twin

__all__ = ["bind"]

_log = logging.getLogger("agentmem")

#: Seconds for which a server holds a model, and its prompts, where the request does not say: Ollama's own default.
HOLDS_S = 300.0

Json = dict[str, Any]


def bind(client: Any, memory: Recollection) -> tuple[Any, bool] | None:
    """A copy of the client whose chats go through memory, and whether it is asynchronous; None for another class."""
    import ollama

    for cls, make, asynchronous in ((ollama.Client, _chat, False), (ollama.AsyncClient, _achat, True)):
        if isinstance(client, cls):
            copy = twin(client)
            copy.__dict__["chat"] = make(copy, type(client).chat.__get__(copy), memory)
            return copy, asynchronous
    return None


def _chat(client: Any, chat: Callable[..., Any], memory: Recollection) -> Callable[..., Any]:
    @functools.wraps(chat)
    def chatted(model: str = "", messages: Any = None, **how: Any) -> Any:
        asked = _asked(client, model, messages := list(messages or ()))
        if asked is None:
            return chat(model, messages, **how)
        ready = run(memory.before(asked))
        with ready.sent(streams=bool(how.get("stream"))):
            answer = chat(model, _placed(messages, ready), **how)
            if how.get("stream"):
                return _heard(answer, ready, memory)
            if (generation := _whole(answer, ready)) is not None:
                run(memory.after(ready, generation))
        return answer

    return chatted


def _achat(client: Any, chat: Callable[..., Any], memory: Recollection) -> Callable[..., Any]:
    @functools.wraps(chat)
    async def chatted(model: str = "", messages: Any = None, **how: Any) -> Any:
        asked = _asked(client, model, messages := list(messages or ()))
        if asked is None:
            return await chat(model, messages, **how)
        ready = await arun(memory.before(asked))
        with ready.sent(streams=bool(how.get("stream"))):
            answer = await chat(model, _placed(messages, ready), **how)
            if how.get("stream"):
                return _aheard(answer, ready, memory)
            if (generation := _whole(answer, ready)) is not None:
                await arun(memory.after(ready, generation))
        return answer

    return chatted


def _heard(parts: Any, ready: Ready, memory: Recollection) -> Iterator[Any]:
    """The parts as they come; remembered when the last one was there."""
    reader = Reader()
    try:
        for part in parts:
            _take(reader, part, ready)
            yield part
    finally:
        with ready.sent(streams=False):
            parts.close()
            if (generation := _end(reader, ready)) is not None:
                run(memory.after(ready, generation))


async def _aheard(parts: Any, ready: Ready, memory: Recollection) -> AsyncIterator[Any]:
    """As `_heard`."""
    reader = Reader()
    try:
        async for part in parts:
            _take(reader, part, ready)
            yield part
    finally:
        with ready.sent(streams=False):
            await parts.aclose()
            if (generation := _end(reader, ready)) is not None:
                await arun(memory.after(ready, generation))


def _take(reader: Reader, part: Any, ready: Ready) -> None:
    ready.came()
    try:
        reader.add(_plain(part))
    except Exception as error:  # noqa: BLE001 - the caller's stream goes on
        _log.warning("a streamed answer is not remembered: it can't be read (%r)", error)


def _end(reader: Reader, ready: Ready) -> Generation | None:
    """The answer; None where it was cut or given up before its end."""
    if sys.is_finalizing():
        return None
    try:
        return _begun(whole, ready) if (whole := reader.end()) is not None else None
    except Exception as error:  # noqa: BLE001
        _log.warning("a streamed answer is not remembered: it can't be read (%r)", error)
        return None


def _whole(answer: Any, ready: Ready) -> Generation | None:
    try:
        return _begun(parse_reply(_plain(answer)), ready)
    except Exception as error:  # noqa: BLE001 - the caller has an answer, and must get it
        _log.warning("an answer is not remembered: it can't be read (%r)", error)
        return None


def _begun(generation: Generation, ready: Ready) -> Generation:
    """A model goes on where a last message of the assistant ends, and does not repeat it."""
    asked = ready.asked
    begun = "".join(message.content for message in asked.messages[asked.ends :])
    return dataclasses.replace(generation, text=begun + generation.text) if begun and generation.text else generation


# Reading what the caller wrote.


def _plain(thing: Any) -> Mapping[str, Any]:
    plain: Mapping[str, Any] = thing if isinstance(thing, Mapping) else thing.model_dump()
    return plain


def _asked(client: Any, model: str, messages: list[Any]) -> Asked | None:
    """The request as memory sees it; None where it can't be read: the server may well take it."""
    try:
        address = str(client._client.base_url)
        told = tuple(_message(_plain(message)) for message in messages)
        return Asked(model=f"ollama:{model}", messages=told, holds_s=None if is_loopback(address) else HOLDS_S)
    except Exception as error:  # noqa: BLE001
        _log.warning("a chat goes out without memories: it can't be read (%r)", error)
        return None


def _message(message: Mapping[str, Any]) -> Message:
    calls = [
        tool_call(None, call["function"]["name"], call["function"].get("arguments"))
        for call in message.get("tool_calls") or ()
    ]
    return Message(
        role=message["role"],
        content=message.get("content") or "",
        name=message.get("tool_name"),
        tool_calls=tuple(call.model_copy(update={"id": ""}) for call in calls),
    )


# Writing into copies of it.


def _placed(messages: list[Any], ready: Ready) -> list[Any]:
    """The messages with the note and the recalled block."""
    sent = list(messages)
    head = next((at for at, message in enumerate(sent) if _plain(message)["role"] != "system"), len(sent))
    note = ready.note
    if ready.place is not None:
        # A system message would put aside the one of the model's own file: without one the note stands by the block.
        block = ready.block if head or not note else f"{note}\n\n{ready.block}"
        sent[ready.place] = _with(sent[ready.place], f"{block}\n\n{_plain(sent[ready.place])['content']}")
    if note and head:
        sent[head - 1] = _with(sent[head - 1], f"{_plain(sent[head - 1]).get('content') or ''}\n\n{note}".lstrip())
    return sent


def _with(message: Any, content: str) -> Any:
    if isinstance(message, Mapping):
        return {**message, "content": content}
    return message.model_copy(update={"content": content})
