"""What computing a prompt on the token grid costs: prefill in steps of 64 to 1,024 tokens against all at once.

    python tests/benchmarks/prefill_grid.py [--tokens 4096] [--rounds 3]

Method: the default local model in its default dtype, its own cache layers (buffers made once), text of Python's
documentation, every size once per round, in turn; medians. The default grid (`page_tokens`) is the smallest size within
5 % of one shot. Results go to tests/benchmarks/results/prefill_grid.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmem.provider import load

RESULTS = Path(__file__).parent / "results" / "prefill_grid.json"
SIZES = (64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    passage = import_module("first_token").passage  # beside this file
    provider: Any = load("local", {})
    engine = provider._ready()
    ids = engine.loaded.tokenizer(passage(provider, given.tokens + 64))["input_ids"][: given.tokens]
    seconds: dict[int, list[float]] = {size: [] for size in (*SIZES, given.tokens)}
    for turn in range(given.rounds + 1):  # the first one warms up
        for size, runs in seconds.items():
            cache = engine.states.empty(given.tokens)
            started = time.perf_counter()
            for start in range(0, given.tokens, size):
                engine.forward(ids[start : start + size], cache, (), None)
            if turn:
                runs.append(time.perf_counter() - started)
    medians = {size: statistics.median(runs) for size, runs in seconds.items()}
    one_shot = medians[given.tokens]
    for size, taken in medians.items():
        print(f"{size:6} tokens a step: {taken:7.3f} s, {taken / one_shot:5.2f} of one shot")
    fit = next(size for size, taken in medians.items() if taken <= 1.05 * one_shot)
    print(f"smallest within 5 %: {fit}")
    RESULTS.parent.mkdir(exist_ok=True)
    result = {"tokens": given.tokens, "rounds": given.rounds, "median_s": medians, "smallest_within_5_percent": fit}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
