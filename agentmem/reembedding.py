"""A change of embedder while the old index serves: all records are embedded again, then the folder turns over.

Batch by batch, each committed, so that it can be interrupted and goes on where it stopped; other processes add and
search meanwhile, in the old space, and turn over at their next use.
"""

from __future__ import annotations

import shutil

from .engine import Engine
from .flow import Flow
from .flows import BATCH, catch_up, embedded, note_embeddings
from .progress import progress
from .types import Scope, Usage

__all__ = ["reembed"]


def reembed(engine: Engine) -> Flow[int]:
    """Embed every record by the embedder of the settings and turn to it; returns how many records that were."""
    target, served = engine.serving.target(), engine.serving.now()
    if target is None or served is None or served.space == target.space:
        return (yield from catch_up(engine))
    done = 0
    with progress("embedding again") as moved:
        while True:
            while rows := engine.records.pending(target.space, limit=BATCH):
                noted: list[Usage] = []
                vectors = yield from embedded(engine, [(text, name) for _, text, name in rows], noted, by=target)
                assert vectors is not None
                with engine.database.write():
                    done += engine.records.embed_rows(rows, vectors, target.space)
                    note_embeddings(engine, Scope(), noted)
                if moved:
                    moved(done, engine.records.count(Scope()))
            with engine.database.write():
                # What another process added since is embedded first: nobody may lose a record for a moment.
                if not engine.records.pending(target.space, limit=1):
                    engine.serving.turn_over(target.space)
                    break
    # Files of the old vectors: the index is derived, and the new one is built from the database at its next use.
    shutil.rmtree(engine.folder / "index", ignore_errors=True)
    return done
