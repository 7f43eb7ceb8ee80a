"""What computing a prompt on the token grid costs: prefill in steps of 64 to 1,024 tokens against all at once.

    python tests/benchmarks/prefill_grid.py [--tokens 4096] [--rounds 3]

Method: the default local model in its default dtype, its own cache layers (buffers made once), text of Python's
documentation, every size once per round, in turn; medians. The default grid (`page_tokens`) is the smallest size within
5 % of one shot. Beside them, in the same rounds: all at once with transformers' own `DynamicCache`, and steps of the
default grid with every step sealed: its states encoded as an int8 page, the next steps attending to the pages in place.
Results go to tests/benchmarks/results/prefill_grid.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmem.provider import load

RESULTS = Path(__file__).parent / "results" / "prefill_grid.json"
SIZES = (64, 128, 256, 512, 1024)
GRID = 256
CODECS = ("int8", "k8v4", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    passage = import_module("first_token").passage  # beside this file
    provider: Any = load("local", {})
    engine = provider._ready()
    ids = engine.loaded.tokenizer(passage(provider, given.tokens + 64))["input_ids"][: given.tokens]
    assert engine.states.check()
    paged = import_module("agentmem.adapters.providers._local_attention").PagedCache

    def steps(size: int) -> None:
        cache = engine.states.empty(given.tokens)
        for start in range(0, given.tokens, size):
            engine.forward(ids[start : start + size], cache, (), None)

    def stock() -> None:
        engine.forward(ids, import_module("transformers").DynamicCache(), (), None)

    def sealed(codec: str) -> None:
        cache = paged(engine.states.shapes, engine.loaded.dtype, grid=GRID, codec=codec)
        for start in range(0, given.tokens, GRID):
            engine.forward(ids[start : start + GRID], cache, (), None)
            if cache.full:
                cache.seal()

    runs: dict[int | str, Callable[[], None]] = {size: functools.partial(steps, size) for size in SIZES}
    runs |= {given.tokens: functools.partial(steps, given.tokens), "DynamicCache at once": stock}
    runs |= {f"{codec}, sealed and in place": functools.partial(sealed, codec) for codec in CODECS}
    seconds: dict[int | str, list[float]] = {name: [] for name in runs}
    for turn in range(given.rounds + 1):  # the first one warms up
        for name, method in runs.items():
            started = time.perf_counter()
            method()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    one_shot = medians[given.tokens]
    base = medians["DynamicCache at once"]
    for name, taken in medians.items():
        label = name if isinstance(name, str) else f"{name:6} tokens a step"
        print(f"{label:26} {taken:7.3f} s, {taken / one_shot:5.2f} of one shot, {taken / base:5.2f} of DynamicCache's")
    fit = next((size for size in SIZES if medians[size] <= 1.05 * one_shot), None)
    print(f"smallest within 5 %: {fit}")
    RESULTS.parent.mkdir(exist_ok=True)
    result = {
        "tokens": given.tokens,
        "rounds": given.rounds,
        "median_s": {str(name): taken for name, taken in medians.items() if not isinstance(name, str)},
        "stock_one_shot_s": base,
        "in_place_s": {codec: medians[f"{codec}, sealed and in place"] for codec in CODECS},
        "in_place_to_stock": {codec: medians[f"{codec}, sealed and in place"] / base for codec in CODECS},
        "smallest_within_5_percent": fit,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
