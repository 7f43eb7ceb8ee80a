"""`wrap`: a vendor's own client, with memory around its chat calls.

Finds the adapter by the package that the client's class comes from (adapters/clients/) and the handle that it remembers
under. Knows no wire format; what is recalled and remembered is decided in wrapped_turns.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .async_memory import AsyncScopedMemory
from .errors import InvalidInput
from .memory import Memory, ScopedMemory
from .opening import NOT_GIVEN
from .wrapped_turns import Recollection

if TYPE_CHECKING:
    from collections.abc import Callable

    from .engine import Engine

__all__ = ["wrap"]

C = TypeVar("C")

#: What a wrapped client carries beside its own attributes.
MARK = "_agentmem"
#: Methods by which the SDKs make a client from another.
COPIERS = ("copy", "with_options", "with_middleware")
#: What a copy has in its own dictionary that is not the client's.
OWN = frozenset({MARK, "memory", "scope", "close", "post", "chat", *COPIERS})
KINDS = "openai.OpenAI, anthropic.Anthropic or ollama.Client, or the async one of each"


class Binding(Protocol):
    """What a file in adapters/clients/ offers as ``bind``: a copy of the client whose chat calls go through
    ``memory``, and whether the client is asynchronous; None for what is no client of that SDK."""

    def __call__(self, client: Any, memory: Recollection) -> tuple[Any, bool] | None: ...


def wrap(
    client: C,
    memory: str | os.PathLike[str] | ScopedMemory | AsyncScopedMemory = "./memory",
    *,
    tenant: str = NOT_GIVEN,
    user: str = NOT_GIVEN,
    agent: str = NOT_GIVEN,
    session: str = NOT_GIVEN,
    recall: bool = True,
    remember: bool = True,
    cache: bool = True,
) -> C:
    """A copy of an SDK's client that remembers: the same class, the same calls, the same answers and streams.

    ``client`` is an ``openai.OpenAI`` (``chat.completions.create``, ``parse``, ``stream``, ``responses.*``),
    ``anthropic.Anthropic`` (``messages.create``, ``parse``, ``stream``) or ``ollama.Client`` (``chat``), or the async
    one of each. It is not changed, and shares its connections with the copy; everything else of it works as before.
    ``memory`` is a folder, or a `Memory` or a handle of one; the levels narrow it as `Memory.scope` does. Without a
    session the turns go to a session of their own, for the life of the copy.

    What was recalled stands, quoted, before the text of the user's last message in what is sent (behind it where the
    caller marked that message for the host's cache); the caller's messages are not touched, and all before it stays
    byte-equal from turn to turn. The user's turn, tool results and the answer are remembered when the answer is whole;
    of a failed or abandoned call nothing is. What fails in memory is logged and never breaks a call; a spent budget
    raises `BudgetExceeded`. With ``cache`` prefixes are marked for the host's cache where it wants marks and the caller
    set none, and requests carry the scope's opaque routing key where the host takes one.

    The copy has two attributes more: ``memory``, the handle, and ``scope(user=..., session=...)``, a copy for a scope
    beneath this one, for servers with many users. Of calls whose answer the caller reads from the wire itself
    (``with_streaming_response``) no answer is remembered. Closing a copy closes its connections, and the memory if it
    was given as a folder.

    Raises `InvalidInput` for what is no such client, and as `Memory` does.
    """
    if MARK in getattr(client, "__dict__", ()):
        raise InvalidInput("this client is wrapped already: its scope(user=...) gives a copy for another scope")
    bind = _binding(client)
    with contextlib.ExitStack() as undo:
        owned: Memory | None = None
        if isinstance(memory, (str, os.PathLike)):
            memory = owned = Memory(memory)
            undo.callback(owned.close)
        handle = _handle(memory, tenant=tenant, user=user, agent=agent, session=session)
        remembering = Recollection(handle, recall=bool(recall), remember=bool(remember), cache=bool(cache))
        bound = _bound(client, bind, remembering)
        if owned is not None:
            _close_too(bound, owned._engine)
        undo.pop_all()
    return bound


def _binding(client: Any) -> Binding:
    """The function of the adapter that knows this client's class."""
    if not isinstance(client, type):
        for cls in type(client).__mro__:
            package = cls.__module__.partition(".")[0]
            module = f"{__package__}.adapters.clients.{package}"
            if package.startswith("_") or package in ("builtins", "agentmem", "typing", "abc"):
                continue
            try:
                found: Binding = importlib.import_module(module).bind
            except ModuleNotFoundError as error:
                if error.name != module:
                    raise
            else:
                return found
    raise InvalidInput(f"wrap takes a client: {KINDS}; this is {_what(client)}")


def _what(client: Any) -> str:
    return f"the class {client.__name__}" if isinstance(client, type) else f"a {type(client).__name__}"


def _handle(memory: Any, **levels: str) -> Any:
    """The handle of the scope that is meant; the given one itself where nothing narrows it."""
    if not (hasattr(memory, "_engine") and hasattr(memory, "_conversation")):
        raise InvalidInput(f"memory is a {type(memory).__name__}: give a folder, a Memory or a handle of one")
    given = {level: value for level, value in levels.items() if value is not NOT_GIVEN}
    return memory.scope(**given) if given else memory


def _bound(client: C, bind: Binding, remembering: Recollection) -> C:
    """The client's copy, with ``memory`` and ``scope`` beside its own attributes."""
    found = bind(client, remembering)
    if found is None:
        raise InvalidInput(f"wrap takes a client: {KINDS}; this is {_what(client)}")
    bound, asynchronous = found
    _face(remembering, asynchronous=asynchronous)

    def scope(*, tenant: str = NOT_GIVEN, user: str = NOT_GIVEN, agent: str = NOT_GIVEN, session: str = NOT_GIVEN) -> C:
        """A copy of this client for a scope beneath its own; `ScopeError` as `Memory.scope` says."""
        inner = remembering.handle.scope(tenant=tenant, user=user, agent=agent, session=session)
        narrow: C = _bound(_unwrapped(bound), bind, remembering.narrowed(inner))
        return narrow

    own: dict[str, Any] = {MARK: remembering, "memory": remembering.handle, "scope": scope}
    for name in COPIERS:
        if hasattr(type(client), name):
            own[name] = _copier(bound, name, bind, remembering)
    bound.__dict__.update(own)
    kept: C = bound
    return kept


def _copier(bound: Any, name: str, bind: Binding, remembering: Recollection) -> Callable[..., Any]:
    """The client's own method of this name, whose result remembers too."""

    def copier(*arguments: Any, **options: Any) -> Any:
        return _bound(getattr(_unwrapped(bound), name)(*arguments, **options), bind, remembering)

    return copier


def _unwrapped(bound: Any) -> Any:
    """A client of the same state without memory."""
    plain = object.__new__(type(bound))
    plain.__dict__.update({name: value for name, value in vars(bound).items() if name not in OWN})
    return plain


def _face(remembering: Recollection, *, asynchronous: bool) -> None:
    """Give the recollection the face of memory that its client has, over the same conversation."""
    handle = remembering.handle
    if asynchronous == isinstance(handle, AsyncScopedMemory):
        return
    turned: Any = (AsyncScopedMemory if asynchronous else ScopedMemory)(handle._engine, handle._scope)
    turned._conversation = handle._conversation
    remembering.handle = turned


def _close_too(bound: Any, engine: Engine) -> None:
    """Closing the client closes the memory that was opened for it."""
    close = bound.close

    def closed() -> None:
        try:
            close()
        finally:
            engine.close()

    async def aclosed() -> None:
        try:
            await close()
        finally:
            await asyncio.to_thread(engine.close)

    bound.__dict__["close"] = aclosed if inspect.iscoroutinefunction(close) else closed
