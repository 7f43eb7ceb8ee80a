"""A reply as it comes, piece by piece: what ``chat(stream=True)`` gives, sync and async.

Knows flows and their drivers; knows nothing of what a turn does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import Self

from .errors import AgentMemError
from .flow import Flow, astream, stream
from .types import Reply

__all__ = ["AsyncReplyStream", "ReplyStream"]


def _kept(pieces: Generator[str, None, Reply], replies: list[Reply]) -> Generator[str, None, None]:
    replies.append((yield from pieces))


class ReplyStream:
    """The pieces of a reply as they come; ``.reply`` is the whole `Reply` once they have all come.

    A turn is remembered when its last piece has come. Closed before that (``close``, leaving a ``with`` block, dropping
    it), the request is given up and nothing is remembered.
    """

    def __init__(self, flow: Flow[Reply]) -> None:
        self._replies: list[Reply] = []
        # Not a method: a generator that held this object would be a circle, and dropping it would end nothing until the
        # collector came by, which may be while httpcore holds the very lock that ending a response takes.
        self._pieces = _kept(stream(flow), self._replies)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def reply(self) -> Reply:
        """The whole reply; what has not come yet is waited for."""
        for _ in self._pieces:
            pass
        if not self._replies:
            raise AgentMemError("the stream was closed before its end: there is no reply")
        return self._replies[0]

    def close(self) -> None:
        """Give the rest up."""
        self._pieces.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncReplyStream:
    """The pieces of a reply as they come; ``await .reply()`` is the whole `Reply`.

    A turn is remembered when its last piece has come. Closed or cancelled before that, the request is given up and
    nothing is remembered. Use it in ``async with`` where the loop over it may be left early.
    """

    def __init__(self, flow: Flow[Reply]) -> None:
        self._replies: list[Reply] = []
        self._pieces: AsyncGenerator[str, None] = astream(flow, self._replies.append)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._pieces

    async def __anext__(self) -> str:
        return await anext(self._pieces)

    async def reply(self) -> Reply:
        """The whole reply; what has not come yet is waited for."""
        async for _ in self._pieces:
            pass
        if not self._replies:
            raise AgentMemError("the stream was closed before its end: there is no reply")
        return self._replies[0]

    async def close(self) -> None:
        """Give the rest up."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
