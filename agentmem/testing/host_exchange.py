"""What every stand-in host shares: the answer it is to give, how it refuses, how an exchange is noted.

Knows no vendor and no socket.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..cache_rules import CacheRules
from ..tokens import encoding
from ..types import Usage
from .host_cache import Prompt, Visit, tokens_of

__all__ = ["Answer", "HostRequest", "Refused", "Wire", "canonical", "chosen", "names", "one_of", "sse", "words"]


class Refused(Exception):
    """The host answers with an error: the vendor's type of it, the field that it is about, a short name."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind, self.param, self.code = message, status, kind, param, code


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model says: text, calls of tools as (name, arguments), a refusal, thoughts. ``finish`` is "stop",
    "length" or "tools"; ``tokens`` is its length."""

    text: str = ""
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    refusal: str = ""
    thinking: str = ""
    finish: str = "stop"
    tokens: int = 0


@dataclass(kw_only=True)
class HostRequest:
    """One request as a host got it. ``usage`` is what it was told, in this SDK's convention; ``miss`` the reason for a
    cache miss where it was asked for one; ``at`` the host's clock. A refused one has its ``status`` and no usage."""

    path: str
    body: Any
    headers: Mapping[str, str]
    at: float
    status: int = 200
    usage: Usage = field(default_factory=Usage)
    miss: str | None = None
    prompt: Prompt | None = None


class Wire(Protocol):
    """One endpoint's format. Pure."""

    #: The path's last parts, as they follow the host's address.
    path: str
    #: What a stream is sent as.
    stream_type: str

    def read(self, body: Mapping[str, Any], headers: Mapping[str, str], rules: CacheRules | None) -> Prompt:
        """The prompt of a request, or `Refused`."""
        ...

    def miss(self, prompt: Prompt, visit: Visit, earlier: Prompt | None) -> dict[str, Any] | None:
        """The vendor's diagnosis against an earlier request, as its reply has it; None where none was asked for."""
        ...

    def whole(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> dict[str, Any]:
        """The reply's body; ``name`` is its id."""
        ...

    def events(self, body: Mapping[str, Any], answer: Answer, visit: Visit, name: str, miss: Any) -> Iterator[bytes]:
        """The streamed reply, an event at a time."""
        ...

    def refusal(self, error: Refused) -> dict[str, Any]:
        """An error's body."""
        ...


def chosen(reply: Any, body: Mapping[str, Any], prompt: Prompt) -> Answer:
    """The answer that ``HostServer.reply`` names, cut at a stop text and at ``max_tokens``."""
    said: Any = reply(body) if callable(reply) else reply
    told: Mapping[str, Any] = {"text": said} if isinstance(said, str) else said
    text, finish = str(told.get("text", "")), "stop"
    ends = [at for stop in prompt.stop if (at := text.find(stop)) >= 0]
    text = text[: min(ends, default=len(text))]
    if prompt.max_tokens is not None and tokens_of(text) > prompt.max_tokens:
        codec = encoding("o200k_base")
        text = codec.decode(codec.encode(text, disallowed_special=())[: prompt.max_tokens])
        finish = "length"
    calls = tuple((call["name"], call.get("arguments", {})) for call in told.get("tool_calls", ()))
    if calls:
        finish = "tools"
    thinking, refusal = str(told.get("thinking", "")), str(told.get("refusal", ""))
    tokens = sum(map(tokens_of, (text, thinking, refusal, *(canonical(call) for call in calls))))
    return Answer(text=text, calls=calls, refusal=refusal, thinking=thinking, finish=finish, tokens=tokens)


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def names(text: str) -> frozenset[str]:
    """The words of a list of names."""
    return frozenset(text.split())


def words(text: str) -> list[str]:
    """The text in pieces as a stream sends them."""
    parts = text.split(" ")
    return [part if i == 0 else f" {part}" for i, part in enumerate(parts)] if text else []


def sse(payload: Mapping[str, Any], *, named: bool = False) -> bytes:
    """One server-sent event."""
    head = f"event: {payload['type']}\n" if named else ""
    return f"{head}data: {json.dumps(payload)}\n\n".encode()


def one_of(known: Sequence[str] | frozenset[str], body: Mapping[str, Any], refuse: Callable[[str], Refused]) -> None:
    """Refuse the first field that the vendor does not know."""
    for name in body:
        if name not in known:
            raise refuse(name)
