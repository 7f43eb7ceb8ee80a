"""Search at 1,000, 100,000 and 1,000,000 records, against FTS5 and FAISS alone over the same texts and vectors.

    python tests/benchmarks/search_scale.py [--sizes 1000 100000] [--queries 200] [--folder FOLDER] [--json FILE]

Records are turns of sessions of 20: words by Zipf's law, a vector of 384 numbers near one of 2,000 centres, token
vectors of the size a turn has. A query is six words of a record and a vector near that record's. Encoding a query is
in neither side. Queries alternate between the two, in one process; times are medians.
- baseline: FTS5's OR query (``ORDER BY bm25 LIMIT 100``), FAISS's 100 nearest (``IndexFlatIP`` up to 131,072 vectors,
  above it the very inverted lists of agentmem's index, read with FAISS alone), reciprocal rank fusion, ten rows read.
- agentmem: `Searcher.search`, everything: scope, validity, BM25 of turns, windows and sessions, vectors, neighbours,
  late interaction, fusion, ten checked records. ``words`` is the same without vectors; ``candidates`` is only what the
  indexes take (view, mask, BM25, vectors).
Times are by the clock; ``work`` is the time of the process itself, which other processes of the machine disturb less.
``first`` is the first search of a fresh process, which reads the catalog. ``after add`` is a search that follows a
commit. A folder that is given is kept and used again. Last, where ``--shared`` has the data, a real conversation and
the questions about it: common words have long postings, made-up rare ones have short ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from retrieval_system import filled as filled_memory  # type: ignore[import-not-found]

from agentmem._pure.late import HEADER, VERSION, row_bytes
from agentmem.database import Database
from agentmem.plaintext import index as indexes
from agentmem.plaintext.catalog import Catalog
from agentmem.plaintext.drafts import drafts
from agentmem.plaintext.encoded import Encoded, encode_with
from agentmem.plaintext.index import VectorIndex, open_space
from agentmem.plaintext.late import TokenStore
from agentmem.plaintext.postings import terms
from agentmem.plaintext.records import Records
from agentmem.plaintext.rows import Passages
from agentmem.plaintext.search import Searcher
from agentmem.plaintext.words import Words
from agentmem.types import Scope

RESULTS = Path(__file__).parent / "results" / "search_scale.json"
DIMENSION, CENTRES, SESSION, BATCH = 384, 2000, 20, 10_000
#: Words of the vocabulary, and how many of the most frequent ones stand for stop words: no query has one.
VOCABULARY, STOP = 200_000, 100
SCOPE = Scope(user="ana")


def word(number: int) -> str:
    """A made-up word for each number."""
    letters, number, text = "etaoinshrdlucmfwypvbgk", number + 22, ""
    while number:
        number, rest = divmod(number, len(letters))
        text += letters[rest]
    return text


class Corpus:
    """Texts, vectors and codes of token vectors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.words = [word(number) for number in range(VOCABULARY)]
        shares = 1 / (np.arange(1, VOCABULARY + 1) + 2.7) ** 1.07
        self.shares = np.cumsum(shares / shares.sum())
        self.centres = np.random.default_rng(0).normal(size=(CENTRES, DIMENSION)).astype(np.float32)

    def texts(self, count: int) -> list[str]:
        lengths = self.random.integers(5, 40, count)
        numbers = np.searchsorted(self.shares, self.random.random(int(lengths.sum()))).tolist()
        ends = np.cumsum(lengths).tolist()
        return [
            " ".join(self.words[number] for number in numbers[end - length : end])
            for end, length in zip(ends, lengths.tolist(), strict=True)
        ]

    def vectors(self, count: int) -> Any:
        near = self.centres[self.random.integers(0, CENTRES, count)]
        vectors = near + self.random.normal(size=(count, DIMENSION)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def codes(self, texts: list[str]) -> list[bytes]:
        found = []
        for text in texts:
            tokens = 1 + text.count(" ")
            scales = np.full(tokens, 8000, "<u2").tobytes()
            found.append(HEADER.pack(VERSION, 0, DIMENSION, tokens) + scales + self.random.bytes(tokens * _ROW))
        return found


_ROW = row_bytes(DIMENSION)


def filled(folder: Path, count: int) -> tuple[Database, int, float]:
    """The store of this many records, made if it is not there; its space, and how long making it took."""
    folder.mkdir(parents=True, exist_ok=True)
    database = Database(folder / "memory.db")
    space = open_space(database, "made up", "made up", DIMENSION)
    records, held = Records(database), database.query("SELECT count(*) FROM records")[0][0]
    started = time.perf_counter()
    for first in range(held, count, BATCH):
        corpus = Corpus(first)
        some = min(BATCH, count - first)
        texts = corpus.texts(some)
        passages = Passages([[(0, len(text))] for text in texts], corpus.vectors(some), corpus.codes(texts))
        made = []
        for at in range(0, some, SESSION):
            scope = Scope(user="ana", session=f"session {(first + at) // SESSION}")
            turns = texts[at : at + SESSION]
            made += drafts(
                [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(turns)], scope=scope
            )
        records.insert(made, passages, space)
        if sys.stderr.isatty():
            print(f"\r{first + some:,} records", end="", file=sys.stderr)
    return database, space, time.perf_counter() - started


def queries(database: Database, space: int, count: int, number: int) -> Iterator[tuple[str, Any, Any]]:
    """(words, vector, token vectors) of queries, each about one record."""
    random = np.random.default_rng(7)
    common = {word(n) for n in range(STOP)}
    for seq in random.choice(np.arange(1, count + 1), number).tolist():
        [[text]] = database.query("SELECT text FROM records WHERE seq = ?", (seq,))
        [[blob]] = database.query("SELECT vector FROM vectors WHERE space = ? AND seq = ?", (space, seq))
        words = [w for w in dict.fromkeys(text.split()) if w not in common]
        picked = random.permutation(words)[:6].tolist() or [text.split()[0]]
        vector = np.frombuffer(blob, np.float32) + random.normal(size=DIMENSION).astype(np.float32) * 0.03
        tokens = random.normal(size=(len(picked) + 2, DIMENSION)).astype(np.float32)
        tokens /= np.linalg.norm(tokens, axis=1, keepdims=True)
        yield " ".join(picked), vector / np.linalg.norm(vector), tokens


class Baseline:
    """FTS5 and FAISS, joined by reciprocal rank fusion."""

    def __init__(self, database: Database, space: int, count: int, folder: Path) -> None:
        self.database = database
        self.index: Any
        lists = list((folder / "index").glob("*.ivf"))
        if lists:
            manifest = json.loads(next((folder / "index").glob("*.json")).read_text())
            self.index = faiss.read_index(str(lists[0]), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            self.index.nprobe = manifest["probes"]
            return
        self.index = faiss.IndexFlatIP(DIMENSION)
        for first in range(0, count, BATCH):
            rows = database.query(
                "SELECT vector FROM vectors WHERE space = ? AND seq > ? AND seq <= ? ORDER BY seq",
                (space, first, first + BATCH),
            )
            self.index.add(np.frombuffer(b"".join(row[0] for row in rows), np.float32).reshape(-1, DIMENSION))

    def search(self, words: str, vector: Any, k: int = 10) -> list[Any]:
        either = " OR ".join(f'"{one}"' for one in words.split())
        found = self.database.query(
            "SELECT rowid FROM records_fts WHERE records_fts MATCH ? ORDER BY bm25(records_fts) LIMIT 100", (either,)
        )
        _, near = self.index.search(vector[None], 100)
        scores: dict[int, float] = {}
        for listed in ([row[0] for row in found], (near[0] + 1).tolist()):
            for rank, seq in enumerate(listed):
                scores[seq] = scores.get(seq, 0.0) + 1 / (60 + rank)
        best = sorted(scores, key=scores.__getitem__, reverse=True)[:k]
        return self.database.query(f"SELECT * FROM records WHERE seq IN ({','.join('?' * len(best))})", best)


class Ours:
    """agentmem's search over the same folder."""

    def __init__(self, database: Database, space: int, folder: Path) -> None:
        self.records = Records(database)
        self.searcher = Searcher(database, self.records)
        self.index = VectorIndex(database, folder / "index", space, DIMENSION)
        self.tokens = TokenStore(database, space)
        self.catalog, self.words = Catalog(database), Words()

    def search(self, words: str, vector: Any, tokens: Any) -> int:
        encoded = Encoded(vector[None], [tokens], None)
        options: dict[str, Any] = {"index": self.index, "tokens": self.tokens, "scope": SCOPE, "k": 10}
        return len(self.searcher.search(words, encoded, now=time.time(), **options))

    def lexical(self, words: str) -> int:
        return len(self.searcher.search(words, scope=SCOPE, k=10, now=time.time()))

    def candidates(self, words: str, vector: Any) -> int:
        view = self.catalog.view(None)
        allowed = view.allowed(SCOPE, time.time())
        lexical = self.words.score(view, self.words.stems(words), allowed)
        places, _ = self.index.search(vector, 200, view, allowed)
        return len(lexical.best(200)) + len(places)


def timed(call: Callable[..., object], *arguments: Any) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


class Clock:
    """Seconds by the clock and of this process's own work, of each call by name."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.work: dict[str, list[float]] = {}

    def time(self, name: str, call: Callable[..., object], *arguments: Any) -> None:
        before = time.process_time()
        self.wall.setdefault(name, []).append(timed(call, *arguments))
        self.work.setdefault(name, []).append(time.process_time() - before)


def measured(folder: Path, count: int, number: int) -> dict[str, Any]:
    """All times of one size, in milliseconds but for what says seconds."""
    database, space, making = filled(folder, count)
    ours = Ours(database, space, folder)
    asked = list(queries(database, space, count, number + 5))
    # Reading vectors and making lists is what a store does once in its life; reading the catalog once a process.
    building = timed(ours.index.compact)
    opening = timed(ours.index.count)
    first = timed(ours.search, *asked[0])
    baseline = Baseline(database, space, count, folder)
    for words, vector, tokens in asked[:5]:
        baseline.search(words, vector)
        ours.search(words, vector, tokens)
        ours.candidates(words, vector)
        ours.lexical(words)
    clock = Clock()
    for at, (words, vector, tokens) in enumerate(asked[5:]):
        clock.time("baseline", baseline.search, words, vector)
        clock.time("agentmem", ours.search, words, vector, tokens)
        clock.time("candidates", ours.candidates, words, vector)
        clock.time("words", ours.lexical, words)
        if at % 10 == 0:
            corpus = Corpus(10**9 + at)
            made = drafts(corpus.texts(1), scope=Scope(user="ana", session="last"))
            ours.records.insert(made, corpus.vectors(1), space)
            clock.time("after add", ours.search, words, vector, tokens)
    row = {name: 1000 * statistics.median(values) for name, values in clock.wall.items()}
    work = {
        f"{name} work": 1000 * statistics.median(clock.work[name]) for name in ("baseline", "agentmem", "candidates")
    }
    worst = {
        f"{name} p95": 1000 * statistics.quantiles(clock.wall[name], n=20)[-1] for name in ("baseline", "agentmem")
    }
    result = {
        "records": count,
        **row,
        **worst,
        **work,
        "ratio": row["agentmem"] / row["baseline"],
        "ratio of work": work["agentmem work"] / work["baseline work"],
        "first_s": first,
        "opening_s": opening,
        "building_s": building,
        "making_s": making,
        "lists": ours.index.facts()[-1],
    }
    ours.index.close()
    database.close()
    return result


def conversation(shared: Path, number: int) -> dict[str, Any]:
    """The same of a real conversation: the longest of LoCoMo's development split and the questions about it."""
    sys.path.insert(0, str(shared / "eval"))
    cases = importlib.import_module("datasets_io").LOADERS["locomo"](str(shared / "data"))
    case = max(cases, key=lambda one: len(one["items"]))
    memory, _ = filled_memory(case["items"])
    with memory:
        engine = memory._engine
        assert engine.embedder is not None
        assert engine.space is not None
        count = len(case["items"])
        baseline = Baseline(engine.database, engine.space, count, engine.folder)
        clock = Clock()
        for at, question in enumerate(case["questions"][: number + 5]):
            encoded = encode_with(engine.embedder, [question["text"]], query=True)
            words = " ".join(terms(question["text"]))

            def ours(text: str = question["text"], encoded: Encoded = encoded) -> int:
                found = engine.searcher.search(
                    text,
                    encoded,
                    index=engine.index,
                    tokens=engine.tokens,
                    scope=Scope(user="benchmark"),
                    k=10,
                    now=time.time(),
                )
                return len(found)

            for _ in range(3):
                clock.time("baseline" if at >= 5 else "warming", baseline.search, words, encoded.vectors[0])
                clock.time("agentmem" if at >= 5 else "warming", ours)
    row = {name: 1000 * statistics.median(values) for name, values in clock.wall.items() if name != "warming"}
    work = {f"{name} work": 1000 * statistics.median(clock.work[name]) for name in row}
    ratios = {
        "ratio": row["agentmem"] / row["baseline"],
        "ratio of work": work["agentmem work"] / work["baseline work"],
    }
    return {"records": f"{count} turns of LoCoMo", **row, **work, **ratios}


def show(row: dict[str, Any]) -> None:
    """One size's numbers in one line."""
    print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--shared", type=Path, default=Path(__file__).resolve().parents[3] / "shared")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="agentmem-scale-"))
    rows = []
    try:
        for count in options.sizes:
            rows.append(measured(folder / str(count), count, options.queries))
            show(rows[-1])
        if options.shared.is_dir():
            rows.append(conversation(options.shared, options.queries))
            show(rows[-1])
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    options.json.parent.mkdir(exist_ok=True)
    machine = {"cores": os.cpu_count(), "exact up to": indexes.EXACT}
    options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
