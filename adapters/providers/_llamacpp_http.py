"""Sends requests to a llama-server and reads what it streams, through httpx.

Knows the server's event streams and how it tells of an error; nothing of what is asked.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from ._llamacpp_server import Call

__all__ = ["ErrorEvent", "asend", "event_of", "post", "send"]


class ErrorEvent(Exception):
    """An error that the server sends inside a stream that had begun well."""

    @property
    def status(self) -> int:
        code = self.args[0].get("code") if isinstance(self.args[0], Mapping) else None
        return code if isinstance(code, int) and code >= 400 else 500

    def __str__(self) -> str:
        return str(self.args[0].get("message") if isinstance(self.args[0], Mapping) else self.args[0])


def post(client: Any, path: str, body: Mapping[str, Any], *, stream: bool) -> Any:
    """The answer's JSON, or an iterator of a stream's events; awaitable if the client is async."""
    import httpx

    if isinstance(client, httpx.AsyncClient):
        return _aevents(client, path, body) if stream else _ajson(client, path, body)
    return _events(client, path, body) if stream else _json(client.post(path, json=body))


def send(client: Any, step: Call) -> Any:
    """The JSON answer to one call."""
    return _json(client.request(step.method, step.path, json=step.body))


async def asend(client: Any, step: Call) -> Any:
    """`send`, awaited."""
    return _json(await client.request(step.method, step.path, json=step.body))


def _json(response: Any) -> Any:
    response.raise_for_status()
    return response.json()


async def _ajson(client: Any, path: str, body: Mapping[str, Any]) -> Any:
    return _json(await client.post(path, json=body))


def _events(client: Any, path: str, body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    with client.stream("POST", path, json=body) as response:
        if not response.is_success:  # redirects too
            response.read()
        response.raise_for_status()
        for line in response.iter_lines():
            if (event := event_of(line)) is not None:
                yield event


async def _aevents(client: Any, path: str, body: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    async def events() -> AsyncIterator[Mapping[str, Any]]:
        async with client.stream("POST", path, json=body) as response:
            if not response.is_success:  # redirects too
                await response.aread()
            response.raise_for_status()
            async for line in response.aiter_lines():
                if (event := event_of(line)) is not None:
                    yield event

    return events()


def event_of(line: str) -> Mapping[str, Any] | None:
    """The JSON of one line of a server-sent event stream; the server writes one event per line."""
    if line.startswith("error:"):
        raise ErrorEvent(json.loads(line.removeprefix("error:")))
    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
    if not data or data == "[DONE]":
        return None
    event: Mapping[str, Any] = json.loads(data)
    if "error" in event:
        raise ErrorEvent(event["error"])
    return event
