"""Bytes on disk of what is remembered, measured on real rows: a small memory is written and its growth is read off.

Knows the tables and the shape of vectors; knows no user and no price.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..activation.turns import Turn
from ..database import Database
from ..plaintext.drafts import drafts
from ..plaintext.index import EXACT, open_space
from ..plaintext.late import pack
from ..plaintext.records import Records
from ..plaintext.rows import Passages
from ..types import Scope

__all__ = ["DIMENSION", "EXACT", "Sizes", "measured"]

#: Numbers in a vector of the packaged embedder (minilm).
DIMENSION = 384
#: Characters of a token of English text, about.
TOKEN_CHARACTERS = 4
#: Rows of each kind that are written to measure.
ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on disk: of a record's text with its words and keys, of its vector, of its token codes, of a ledger's row;
    of a vector in the lists of a large index (8-bit codes), which a tenant has above `EXACT` vectors."""

    record: float
    vector: float
    codes: float
    use: float
    listed: float = DIMENSION + 8
    exact: int = EXACT


@lru_cache(maxsize=64)
def measured(record_tokens: int, *, rows: int = ROWS) -> Sizes:
    """What records of this many tokens take in SQLite: four folders are written, each with one kind of row more."""
    steps = [_written(record_tokens, rows, kinds) for kinds in range(4)]
    record, vector, codes, use = (
        max(after - before, 0) / rows
        for before, after in zip([_written(record_tokens, 0, 0), *steps], steps, strict=False)
    )
    return Sizes(record=record, vector=vector, codes=codes, use=use)


def _written(tokens: int, rows: int, kinds: int) -> int:
    """Bytes of a database with so many records; with vectors from 1 kind on, token codes from 2, uses at 3."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, 4)) for _ in range(2_000)]
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "memory.db")
        try:
            records = Records(database, time.time)
            picks = rng.integers(0, len(words), (rows, max(tokens * TOKEN_CHARACTERS // 5, 1)))
            texts = [" ".join(words[pick] for pick in row) for row in picks]
            made = drafts([{"role": "user", "content": text} for text in texts], scope=Scope(user="somebody"))
            passages = None
            if kinds and rows:
                space = open_space(database, "measured", "measured", DIMENSION)
                matrix = rng.normal(size=(rows, DIMENSION)).astype(np.float32)
                codes = None
                if kinds > 1:
                    part = rng.normal(size=(tokens, DIMENSION)).astype(np.float32)
                    codes = [pack(part)] * rows
                passages = Passages([[(0, len(text))] for text in texts], matrix, codes, space)
            records.insert(made, passages)
            if kinds > 2:
                _use(database, rows)
            database.compact()
            return int(database.query("PRAGMA page_count")[0][0]) * int(database.query("PRAGMA page_size")[0][0])
        finally:
            database.close()


def _use(database: Database, rows: int) -> None:
    """Rows of the ledger, as a chat writes them."""
    turn = Turn(id="0" * 32, at=1.0, session="0" * 32, system=1_500, core=0, message=40, reply=150)
    told = turn.model_dump_json()
    with database.write() as connection:
        connection.executemany(
            "INSERT INTO uses (at, verb, model, tenant, user, agent, session, input, cached, written, output, first_s,"
            " total_s, bytes, expected, money, uncached_money, turn)"
            " VALUES (?, 'chat', 'openai:gpt-6.1-sol', '', 'somebody', '', ?, 2000, 1500, 200, 150, .5, 4.2, 0, 1500,"
            " .001, .004, ?)",
            [(1.75e9 + n * 10.123, "0" * 32, told) for n in range(rows)],
        )
