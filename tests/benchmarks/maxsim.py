"""Late interaction over 2-bit token vectors, against PyTorch over float32 ones: time, memory, recall.

    python tests/benchmarks/maxsim.py [--rounds 15] [--short] [--shared ../shared]

Method: one thread each. Passages of 10 to 50 tokens of 384 dimensions, random unit vectors; a query of 6 to 12 tokens.
Every round runs each way once, medians over the rounds, the first two are not counted.
- "torch": torch.matmul(query, tokens.T) and the largest of each passage, by numpy's maximum.reduceat or torch's
  segment_reduce, or by amax over passages padded to one length: the fastest of the three in the median.
- "ours": `late.scores` without its join of the bytes: the kernel of agentmem/_native over all passages in one buffer,
  per instruction set. Encoding the query is part of it.
- "store": `TokenStore.match` of 400 of 1,000 records, all in RAM.

Recall: the turns and questions of LoCoMo's development split (skipped where ``shared`` has no data), scored by late
interaction alone, sum over the query's words weighted by their idf, stop words left out; float32 and codes alike. Then
the whole search in its default configuration, on LoCoMo and PrefEval, with the store's scores computed from what the
encoder gave instead of the codes ("exact").

Results go to tests/benchmarks/results/maxsim.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmem import _native
from agentmem._pure.late import tokens_shape
from agentmem.database import Database
from agentmem.plaintext import embed, late
from agentmem.plaintext.late import TokenStore, pack_all

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results" / "maxsim.json"
STOP_WORDS = """a an the of to in on at and or for with is was were are be been do does did has have had it its his her
their he she they i you my your we our this that these those from by as what when where who which why how will would
could should can not no so if"""


def units(random: np.random.Generator, count: int) -> Any:
    rows = random.standard_normal((count, 384), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(some) for name, some in seconds.items()}


def speed(passages: int, queries: int, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    counts = random.integers(10, 51, passages)
    rows, query = units(random, int(counts.sum())), units(random, queries)
    packed = pack_all(np.split(rows, np.cumsum(counts)[:-1]))
    data, sizes = b"".join(packed), [len(one) for one in packed]
    starts = np.cumsum([0, *sizes[:-1]])
    offsets = np.cumsum([0, *counts[:-1]])
    tensor, asked, lengths = torch.from_numpy(rows), torch.from_numpy(query), torch.from_numpy(counts)

    def reduceat() -> Any:
        return np.maximum.reduceat(torch.matmul(asked, tensor.T).numpy(), offsets, axis=1)

    def segments() -> Any:
        return torch.segment_reduce(torch.matmul(tensor, asked.T), "max", lengths=lengths, axis=0)

    def ours(kernels: Any, level: str) -> Callable[[], Any]:
        def run() -> Any:
            kernels.set_cpu_level(level)
            found = np.empty((passages, queries), np.float32)
            kernels.maxsim(query, data, starts, found)
            return found

        return run

    ways: dict[str, Callable[[], Any]] = {"torch, reduceat": reduceat, "torch, segment_reduce": segments}
    padded = torch.zeros(passages, 50, 384)
    mask = torch.full((passages, 50), -math.inf)
    for row, (place, count) in enumerate(zip(offsets.tolist(), counts.tolist(), strict=True)):
        padded[row, :count], mask[row, :count] = tensor[place : place + count], 0
    flat = padded.view(-1, 384)
    ways["torch, padded"] = lambda: (torch.matmul(asked, flat.T).view(queries, passages, 50) + mask).amax(dim=2)
    levels = [level for level in _native.cpu_levels() if level not in ("sse4.2", "scalar")] or ["scalar"]
    ways |= {level: ours(_native, level) for level in levels}
    expected = ways[_native.cpu_levels()[0]]()
    assert all((ways[level]() == expected).all() for level in ways if not level.startswith("torch"))
    assert np.abs(expected - reduceat().T).max() < 0.2
    found = medians(ways, rounds)
    torch_s = min(some for name, some in found.items() if name.startswith("torch"))
    return {
        "passages": passages,
        "tokens": int(counts.sum()),
        "query_tokens": queries,
        "median_s": found,
        "times_faster_than_torch": {name: torch_s / some for name, some in found.items() if "torch" not in name},
        "memory_of_float32": len(data) / rows.nbytes,
    }


def store(rounds: int) -> dict[str, float]:
    random = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "memory.db")
        codes = pack_all([units(random, int(count)) for count in random.integers(10, 51, 1000)])
        rows = [(seq + 1, 1, 0, one, zlib.crc32(one)) for seq, one in enumerate(codes)]
        with database.write() as connection:
            connection.executemany(
                "INSERT INTO tokens (seq, space, part, codes, checksum) VALUES (?, ?, ?, ?, ?)", rows
            )
        held, query, seqs = TokenStore(database, 1), units(random, 8), random.permutation(1000)[:400] + 1
        started = time.perf_counter()
        held.match(query, seqs)
        cold = time.perf_counter() - started
        found = medians({"warm": lambda: held.match(query, seqs)}, 10 * rounds)
        database.close()
    return {"first_s": cold, "median_s": found["warm"], "bytes_in_ram": held.bytes}


def word(text: str, start: int, stop: int) -> str:
    """The whole word that the characters are in."""
    while start and text[start - 1].isalnum():
        start -= 1
    while stop < len(text) and text[stop].isalnum():
        stop += 1
    return text[start:stop].lower()


def recall(shared: Path) -> dict[str, Any]:
    sys.path.insert(0, str(shared / "eval"))
    from datasets_io import LOADERS  # type: ignore[import-not-found]

    embedder = embed.load("minilm")
    assert embedder is not None
    kernels: Any = _native
    stop = set(STOP_WORDS.split())
    kinds = ("float32", "2 bits")
    found: dict[str, dict[int, list[float]]] = {kind: {1: [], 5: [], 10: [], 20: []} for kind in kinds}
    for case in LOADERS["locomo"](str(shared / "data")):
        texts = [f"{item['speaker']}: {item['text']}" for item in case["items"]]
        asked = [question["text"] for question in case["questions"]]
        held, query = embed.encode_with(embedder, texts), embed.encode_with(embedder, asked, query=True)
        assert held.tokens is not None
        assert held.spans is not None
        assert query.tokens is not None
        assert query.spans is not None
        seen = Counter(
            piece
            for text, spans in zip(texts, held.spans, strict=True)
            for piece in {text[start:stop].lower() for start, stop in spans}
        )
        rows = np.concatenate(held.tokens).astype(np.float32)
        offsets = np.cumsum([0, *(len(one) for one in held.tokens[:-1])])
        packed = pack_all(held.tokens)
        data, starts = b"".join(packed), np.cumsum([0, *(len(one) for one in packed[:-1])])
        for question, tokens, spans in zip(case["questions"], query.tokens, query.spans, strict=True):
            text = question["text"]
            pieces = [text[start:stop].lower() for start, stop in spans]
            idf = [math.log(1 + (len(texts) + 0.5) / (seen[piece] + 0.5)) for piece in pieces]
            kept = [
                piece.isalnum() and word(text, *span) not in stop for piece, span in zip(pieces, spans, strict=True)
            ]
            weights = np.array(idf, np.float32) * (kept if any(kept) else 1)
            used = np.ascontiguousarray(tokens[weights > 0], np.float32)
            exact = np.maximum.reduceat(used @ rows.T, offsets, axis=1).T
            coded: Any = np.empty((len(texts), len(used)), np.float32)
            kernels.maxsim(used, data, starts, coded)
            for kind, scores in zip(kinds, (exact, coded), strict=True):
                order = np.argsort(-(scores @ weights[weights > 0]), kind="stable")
                hits = [case["items"][place]["id"] in question["gold"] for place in order[:20]]
                for k, shares in found[kind].items():
                    shares.append(sum(hits[:k]) / len(question["gold"]))
    means = {
        kind: {f"@{k}": 100 * statistics.mean(some) for k, some in shares.items()} for kind, shares in found.items()
    }
    change = {k: means["2 bits"][k] - value for k, value in means["float32"].items()}
    return {"data": "LoCoMo, development split", "questions": len(found["2 bits"][1]), **means, "change": change}


def exactly(held: dict[bytes, Any]) -> Callable[[Any, Any, Any], Any]:
    """Instead of `late._score`: the scores by the vectors that the codes were made from."""

    def score(query: Any, data: Any, starts: Any) -> Any:
        found = np.zeros((len(starts), len(query)), np.float32)
        for row, start in enumerate(starts.tolist()):
            rows = held[data[start : start + tokens_shape(data, start)[2]].tobytes()]
            if len(rows):
                found[row] = (query @ rows.T).max(axis=1)
        return found

    return score


def whole_search(shared: Path, data: str, exact: bool) -> dict[str, float]:
    sys.path.insert(0, str(shared / "eval"))
    LOADERS = importlib.import_module("datasets_io").LOADERS
    from retrieval_system import AgentMem  # type: ignore[import-not-found]

    held: dict[bytes, Any] = {}
    pack = late.pack_all

    def kept(tokens: Any) -> list[bytes]:
        packed = pack(tokens)
        held.update(zip(packed, (one.astype(np.float32) for one in tokens), strict=True))
        return packed

    found: dict[int, list[float]] = {1: [], 5: [], 10: [], 20: []}
    with pytest.MonkeyPatch.context() as patch:
        if exact:
            patch.setattr(late, "pack_all", kept)
            patch.setattr(late, "_score", exactly(held))
        system = AgentMem()
        for case in LOADERS[data](str(shared / "data")):
            system.reset()
            system.add(case["items"])
            for question in case["questions"]:
                ids = [hit["ids"][0] for hit in system.search(question["text"], 20)]
                for k, shares in found.items():
                    shares.append(len(question["gold"].intersection(ids[:k])) / len(question["gold"]))
        system.reset()
    return {f"@{k}": 100 * statistics.mean(shares) for k, shares in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--short", action="store_true", help="a small shape only, nothing written")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    options = parser.parse_args()
    torch.set_num_threads(1)
    best = _native.cpu_level()
    shapes = [(700, 8)] if options.short else [(400, 8), (700, 6), (700, 8), (700, 12), (20_000, 8)]
    result: dict[str, Any] = {
        "method": " ".join((__doc__ or "").split("Method: ")[1].split("Results go")[0].split()),
        "cpu_level": best,
        "speed": [speed(passages, queries, options.rounds) for passages, queries in shapes],
    }
    _native.set_cpu_level(best)
    result["store"] = store(options.rounds)
    if (options.shared / "data" / "locomo").is_dir() and not options.short:
        result["recall"] = recall(options.shared)
        result["whole_search"] = {
            f"{data}, {'exact' if exact else '2 bits'}": whole_search(options.shared, data, exact)
            for data in ("locomo", "prefeval")
            for exact in (True, False)
        }
    text = json.dumps(result, indent=1)
    if not options.short:
        RESULTS.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
