"""Which embedder's vectors answer in a folder: the one in the settings, or the one that made what is there.

A folder that was embedded by another model goes on with that one, as long as it can be loaded and is the very same,
until all is embedded again (reembedding.py) and the folder turns over in one transaction (``meta.serving_space``).
Every process asks at each use, so all turn over together. Knows no vectors and no index.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import Settings
from .database import Database
from .errors import AgentMemError, Incompatible

if TYPE_CHECKING:
    from .plaintext.embed import Embedder

__all__ = ["Served", "Serving"]

_log = logging.getLogger("agentmem")
_KEY = "serving_space"


@dataclass(frozen=True)
class Served:
    """An embedder and its vector space in this folder."""

    embedder: Embedder
    _serving: Serving
    _adopt: bool = False
    _seen: int | None = None

    @property
    def space(self) -> int:
        """The number of the space (``spaces``), made if it is new. Asked late: a hosted embedder knows how long its
        vectors are only by its first answer."""
        space = self._serving.opened(self.embedder)
        if self._adopt and space != self._seen:
            self._serving.mark(space, instead_of=self._seen)
        return space


class Serving:
    """The embedders of one folder. ``embedder`` is given where the caller has one as an object."""

    def __init__(self, database: Database, settings: Settings, embedder: Embedder | None) -> None:
        self._database = database
        self._settings = settings
        self._chosen = embedder
        self.known = embedder is not None
        self._lock = threading.RLock()
        self._served: dict[int | None, Served] = {}
        self._told = False

    @property
    def chosen(self) -> Embedder | None:
        """The embedder of the settings, or None where search is lexical only."""
        with self._lock:
            if not self.known:
                from .plaintext import embed

                self._chosen = embed.load(self._settings.embedder, self._settings.providers)
                self.known = True
            return self._chosen

    def now(self) -> Served | None:
        """What answers at this moment, None where search is lexical only.

        Raises `Incompatible` where the folder holds another embedder's vectors and ``reembed`` is off.
        """
        # No lock is held while the database is asked: a thread inside a transaction asks this too.
        chosen = self.chosen
        if chosen is None:
            return None
        serving = self._marked()
        served = self._served.get(serving)
        if served is None:
            served = self._find(chosen, serving)
            self._served[serving] = served
        return served

    def target(self) -> Served | None:
        """The embedder of the settings and its space, made if it is new."""
        chosen = self.chosen
        return None if chosen is None else Served(chosen, self)

    def turn_over(self, space: int) -> None:
        """Let this space answer from now on, in the caller's transaction, and drop the vectors of all others."""
        with self._database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, str(space)))
            for table in ("vectors", "tokens"):
                connection.execute(f"DELETE FROM {table} WHERE space != ?", (space,))

    def _marked(self) -> int | None:
        rows = self._database.query("SELECT value FROM meta WHERE key = ?", (_KEY,))
        return int(rows[0]["value"]) if rows else None

    def _find(self, chosen: Embedder, serving: int | None) -> Served:
        others = self._database.query(
            "SELECT id, name, digest FROM spaces WHERE digest != ? AND id IN (SELECT space FROM vectors)"
            " ORDER BY id = ? DESC, id DESC",
            (chosen.digest, serving),
        )
        mine = self._database.query(
            "SELECT id, id IN (SELECT space FROM vectors) AS used FROM spaces WHERE digest = ?", (chosen.digest,)
        )
        # A folder from before there was a mark: whoever opens it with the embedder of its vectors goes on with them.
        if not others or (mine and (mine[0]["id"] == serving or (serving is None and mine[0]["used"]))):
            return Served(chosen, self, _adopt=True, _seen=serving)
        if not self._settings.reembed:
            raise Incompatible(
                f"{self._database.path} was embedded by {others[0]['name']!r}, not {chosen.name!r}: open it with that "
                "embedder, or set reembed=True to embed its records again"
            )
        old = self._loaded(others[0]["name"], others[0]["digest"])
        if old is None:
            return Served(chosen, self)
        if not self._told:
            _log.warning(
                "%s was embedded by %s, which goes on answering: call plaintext.reembed() to turn to %s",
                self._database.path,
                old.name,
                chosen.name,
            )
            self._told = True
        return Served(old, self)

    def _loaded(self, name: str, digest: str) -> Embedder | None:
        """The embedder of this name if it is still the one with this digest."""
        from .plaintext import embed

        try:
            found = embed.load(name, self._settings.providers)
        except AgentMemError as error:
            _log.warning("%s can't be loaded any more (%s): records are embedded again", name, error)
            return None
        return found if found is not None and found.digest == digest else None

    def opened(self, embedder: Embedder) -> int:
        """The number of this embedder's space, made if it is new."""
        found = self._database.query("SELECT id FROM spaces WHERE digest = ?", (embedder.digest,))
        if found:
            return int(found[0]["id"])
        from .plaintext.index import open_space

        return open_space(self._database, embedder.name, embedder.digest, embedder.dimension)

    def mark(self, space: int, *, instead_of: int | None) -> None:
        """Let this space answer from now on, unless another process said something else meanwhile."""
        if self._marked() == instead_of:
            with self._database.write() as connection:
                if self._marked() == instead_of:
                    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_KEY, str(space)))
