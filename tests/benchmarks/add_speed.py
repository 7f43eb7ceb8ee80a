"""Adding records whose vectors are given: agentmem against mem0 with its local stores, in the same run.

    python tests/benchmarks/add_speed.py [--records 10000] [--seconds 60] [--json FILE]

Both get the same texts and, by an embedder that only looks them up, the same vectors of 384 numbers. mem0 runs with
``infer=False`` (verbatim, no language model), its ``history.db`` and its local Qdrant or FAISS store in a folder;
telemetry is off. Each side runs in a process of its own with all texts in one call ("batch") and with a call for each
("single"); a side that needs longer than ``--seconds`` is stopped there, between two calls of up to a hundred texts,
and its rate is that of what it did. Measured is the time of the calls; each side makes its data durable as it does by
itself (agentmem syncs the disk once a call, mem0 4 to 9 times a record), so that "single" is about how often a side
waits for the disk. Needs mem0ai (and faiss) for the comparison; agentmem alone runs without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "add_speed.json"
DIMENSION = 384
#: Texts of one call. mem0 takes those of a list one by one, so that the clock can be looked at in between.
TOGETHER = {
    "agentmem": {"batch": 10_000, "single": 1},
    **{f"mem0-{store}": {"batch": 100, "single": 1} for store in ("qdrant", "faiss")},
}
WARM_UP = "a first record, before the clock runs"


def texts(count: int) -> list[str]:
    """Sentences of 8 to 30 words."""
    random = np.random.default_rng(0)
    words = [f"{syllable}{number}" for number in range(200) for syllable in ("ka", "lo", "mi", "ren", "tu")]
    return [
        f"{number}: " + " ".join(words[i] for i in random.integers(0, len(words), random.integers(8, 31)))
        for number in range(count)
    ]


class Given:
    """An embedder that looks vectors up."""

    name, digest, dimension = "given", "given", DIMENSION

    def __init__(self, known: Sequence[str]) -> None:
        vectors = np.random.default_rng(1).normal(size=(len(known), DIMENSION)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        self.vectors = dict(zip(known, vectors, strict=True))
        self.lists: dict[str, list[float]] = {text: vector.tolist() for text, vector in self.vectors.items()}

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        return np.stack([self.vectors[text] for text in texts])

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        return self.embed(texts)


class ForMem0:
    """The same, as mem0 calls it."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        return self.given.lists[text]

    def embed_batch(self, texts: list[str], memory_action: str | None = None) -> list[list[float]]:
        return [self.given.lists[text] for text in texts]


def agentmem(folder: str, given: Given, known: list[str], together: int, seconds: float) -> tuple[int, float]:
    """(how many were added, in how many seconds)."""
    from agentmem import Memory

    with Memory(folder, embedder=given) as memory:
        scope = memory.scope(user="ana", session="one")
        scope.add(WARM_UP)
        started = time.perf_counter()
        for first in range(0, len(known), together):
            if time.perf_counter() - started > seconds:
                return first, time.perf_counter() - started
            scope.add(known[first : first + together])
        return len(known), time.perf_counter() - started


def mem0(folder: str, given: Given, known: list[str], together: int, seconds: float, store: str) -> tuple[int, float]:
    """The same for mem0 with one of its local stores."""
    os.environ |= {"MEM0_TELEMETRY": "False", "OPENAI_API_KEY": "none", "MEM0_DIR": folder}
    stores = {"path": f"{folder}/{store}", "embedding_model_dims": DIMENSION, "collection_name": "records"}
    if store == "qdrant":
        stores["on_disk"] = True
    config = {"vector_store": {"provider": store, "config": stores}, "history_db_path": f"{folder}/history.db"}
    memory: Any = import_module("mem0").Memory.from_config(config)
    memory.embedding_model = ForMem0(given)
    memory.add(WARM_UP, user_id="ana", run_id="one", infer=False)
    started = time.perf_counter()
    for first in range(0, len(known), together):
        if time.perf_counter() - started > seconds:
            return first, time.perf_counter() - started
        messages = [{"role": "user", "content": text} for text in known[first : first + together]]
        memory.add(messages, user_id="ana", run_id="one", infer=False)
    return len(known), time.perf_counter() - started


def one(side: str, count: int, seconds: float) -> None:
    """Measure a side in this process; the result goes to stdout as JSON."""
    known = texts(count)
    given = Given([*known, WARM_UP])
    name, kind = side.split(":")
    together = TOGETHER[name][kind]
    with tempfile.TemporaryDirectory(prefix="agentmem-add-") as folder:
        if name == "agentmem":
            added, took = agentmem(folder, given, known, together, seconds)
        else:
            added, took = mem0(folder, given, known, together, seconds, name.removeprefix("mem0-"))
    sys.stdout.write(json.dumps({"side": side, "added": added, "seconds": took, "ms_each": 1000 * took / added}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one(options.side, options.records, options.seconds)
        return
    rows = []
    for side in ("agentmem:batch", "agentmem:single", "mem0-qdrant:batch", "mem0-qdrant:single", "mem0-faiss:batch"):
        command = [sys.executable, __file__, "--side", side, *("--records", str(options.records))]
        done = subprocess.run(
            [*command, "--seconds", str(options.seconds)], capture_output=True, text=True, check=False, timeout=900
        )
        if done.returncode:
            print(f"{side}: not measured: {done.stderr.strip().splitlines()[-1:]}")
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    each = {row["side"]: row["ms_each"] for row in rows}
    ratios = {
        f"{other} / {mine}": each[other] / each[mine]
        for mine in ("agentmem:batch", "agentmem:single")
        for other in each
        if mine in each and other.startswith("mem0") and other.endswith(mine.split(":")[1])
    }
    print({key: round(value, 1) for key, value in ratios.items()})
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
