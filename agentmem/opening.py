"""Opening a memory and narrowing a handle: what both faces (memory.py, async_memory.py) check before they exist.

Knows which arguments a user may give; the settings themselves are in config.py, the parts of an open folder in
engine.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from . import config as configuration
from .engine import Engine
from .errors import ConfigError, InvalidInput, ScopeError
from .plaintext.drafts import check_path, narrow
from .plaintext.redact import redactor
from .provider import Provider
from .types import Scope

if TYPE_CHECKING:
    import os

    from .plaintext.drafts import Redact
    from .plaintext.embed import Embedder

__all__ = ["NOT_GIVEN", "narrowed", "opened"]


class _NotGiven:
    """The default of a scope level; None is refused: a missing name must not widen a handle to everybody's memory."""

    def __repr__(self) -> str:
        return "NOT_GIVEN"


NOT_GIVEN: Any = _NotGiven()


def narrowed(scope: Scope, **levels: Any) -> Scope:
    """``scope`` with the levels that were given; `ScopeError` for None and for a level bound to another value."""
    given = {level: value for level, value in levels.items() if value is not NOT_GIVEN}
    for level, value in given.items():
        if value is None:
            raise ScopeError(f"{level}=None: give the {level}'s name, or leave {level} out to reach all of them")
    if not given:
        raise ScopeError("scope() needs at least one of tenant=, user=, agent=, session=")
    return narrow(scope, **given)


def opened(
    *,
    path: str | os.PathLike[str] | None,
    model: str | Provider | None,
    embedder: str | Embedder | None,
    config: str | os.PathLike[str] | None,
    clock: Callable[[], float] | None,
    settings: Mapping[str, Any],
) -> Engine:
    """The engine behind a new root handle: strings go through the configuration, objects are taken as they are."""
    if not (model is None or isinstance(model, (str, Provider))):
        raise ConfigError(f"model is a {type(model).__name__}: give a str such as 'local', or a Provider")
    if not (embedder is None or isinstance(embedder, str) or callable(getattr(embedder, "embed", None))):
        raise ConfigError(f"embedder is a {type(embedder).__name__}: give a str such as 'default', or an Embedder")
    if not (clock is None or callable(clock)):
        raise ConfigError(f"clock is a {type(clock).__name__}: give a function that returns seconds since 1970")
    try:
        file = None if config is None else check_path(config, "config")
        folder = None if path is None else str(check_path(path, "path"))
    except InvalidInput as error:
        raise ConfigError(str(error)) from error
    chosen = dict(settings)
    redact: Any = chosen.pop("redact", None)
    hook: Redact | None = None
    if callable(redact):
        hook = cast("Redact", redact)
    elif redact is not None:
        redactor(redact)
        chosen["redact"] = (redact,) if isinstance(redact, str) else tuple(redact)
    read = configuration.read(
        file,
        path=folder,
        model=model if isinstance(model, str) else None,
        embedder=embedder if isinstance(embedder, str) else None,
        **chosen,
    )
    more: dict[str, Any] = {} if clock is None else {"clock": clock}
    if hook is not None:
        more["redact"] = hook
    return Engine(
        read,
        provider=None if isinstance(model, str) else model,
        embedder=None if isinstance(embedder, str) else embedder,
        **more,
    )
