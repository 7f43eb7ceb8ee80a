"""Decoding of the whole default model over a long prompt: attention in place against transformers' own caches.

    python tests/benchmarks/decode.py [--tokens 2048 7936] [--blocks 4] [--block 16] [--threads 1 2]

The states of one prefill (text of Python's documentation, in steps of 512 with a `DynamicCache`) are put into every
kind of cache: `DynamicCache`, `StaticCache` (not compiled), `QuantizedCache` (fp8; 4 bits of optimum-quanto where that
is installed), and pages of each codec attended in place. Then each decodes greedily, ``--block`` tokens at a time, in
turn, ``--blocks`` times; medians over all tokens of milliseconds a token. All go through the same call
(`Engine.forward`). One run per number of threads, in a process of its own, pinned to as many cores.
- "no attention" is the floor: the same model with an attention function that returns zeros. What a cache takes above it
  is its attention.
- `DynamicCache` concatenates all states for every token. How dear that is depends on where the C library gets the
  memory: in all rows but one it keeps what it once had (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), which is the
  fastest that `DynamicCache` can be; "as it comes" is the same cache in a process without these settings, where every
  concatenation may wait for fresh memory of the system.
- Without a mask transformers 5.23 asks sdpa for grouped heads (`enable_gqa`), which is several times slower than packed
  heads on a CPU without AMX; `StaticCache`, which has a mask, gets packed ones. Both rows are what users get.
- Bytes are those of the states held at the end, against `DynamicCache` with as many tokens: of the pages, and with the
  memory pages of the tail, which holds up to one page of positions in the compute dtype.
Results go to tests/benchmarks/results/decode.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "decode.json"
GRID = 256
CODECS = ("int8", "k8v4", "int4", "raw")
QUANTIZED = {"fp8": {}, "quanto": {"nbits": 4}}
FLOOR = "no attention"


class Prompt:
    """The default model, and the states of one prompt."""

    def __init__(self, tokens: int, threads: int) -> None:
        import torch

        from agentmem.provider import load

        self.torch = torch
        provider: Any = load("local", {"threads": threads})
        self.engine = provider._ready()
        self.model = self.engine.loaded.model
        passage = import_module("first_token").passage  # beside this file
        text = passage(provider, tokens + 64)
        self.ids = self.engine.loaded.tokenizer(text)["input_ids"][: tokens + 1]
        self.states: list[tuple[Any, Any]] = []
        cache = self.dynamic()
        for start in range(0, tokens, 512):
            self.engine.forward(self.ids[start : min(start + 512, tokens)], cache, (), None)
        self.states = [(layer.keys, layer.values) for layer in cache.layers]

    def dynamic(self) -> Any:
        from transformers import DynamicCache

        return self.filled(DynamicCache())

    def static(self) -> Any:
        from transformers import StaticCache

        return self.filled(StaticCache(config=self.model.config, max_cache_len=len(self.ids) + 256))

    def quantized(self, backend: str) -> Any:
        from transformers import QuantizedCache

        return self.filled(QuantizedCache(backend, self.model.config, **QUANTIZED[backend]))

    def filled(self, cache: Any) -> Any:
        with self.torch.inference_mode():
            for layer, (key, value) in enumerate(self.states):
                cache.update(key.clone(), value.clone(), layer)
        return cache

    def paged(self, codec: Any) -> Any:
        from agentmem.activation.pages import encode

        adapters = "agentmem.adapters.providers"
        paged = import_module(f"{adapters}._local_attention").PagedCache
        as_array = import_module(f"{adapters}._local_device").as_array
        shapes = [(key.shape[1], key.shape[3], value.shape[3]) for key, value in self.states]
        cache = paged(shapes, self.states[0][0].dtype, grid=GRID, codec=codec)
        arrays = [(as_array(key[0]), as_array(value[0])) for key, value in self.states]
        for at in range(0, len(self.ids) - 1, GRID):
            cache.append_encoded(encode(arrays, GRID, at, codec))
        return cache

    def nothing(self) -> Any:
        """A cache that counts its tokens and holds none, and attention that gives zeros."""
        from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
        from transformers.cache_utils import DynamicLayer

        torch = self.torch

        class Counted(DynamicLayer):  # type: ignore[no-untyped-call]
            def __init__(self, length: int) -> None:
                super().__init__()  # type: ignore[no-untyped-call]
                self.is_initialized, self.length = True, length

            def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
                self.length += key_states.shape[2]
                return key_states, value_states

            def get_seq_length(self) -> int:
                return self.length

        def zeros(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
            return torch.zeros(1, query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype), None

        AttentionInterface.register("no_attention", zeros)
        AttentionMaskInterface.register("no_attention", lambda **_: None)
        cache: Any = DynamicCache()
        cache.layers = [Counted(len(self.ids) - 1) for _ in self.states]
        return cache


class Decoding:
    """Greedy decoding over one cache, a block of tokens at a time."""

    def __init__(self, prompt: Prompt, cache: Any, *, floor: bool = False) -> None:
        self._prompt, self._floor = prompt, floor
        self.cache = cache
        self._next = prompt.ids[-1]
        self.seconds: list[float] = []

    def block(self, tokens: int, *, timed: bool) -> None:
        engine, config = self._prompt.engine, self._prompt.model.config
        before = config._attn_implementation
        if self._floor:
            config._attn_implementation = "no_attention"
        try:
            for _ in range(tokens):
                started = time.perf_counter()
                if getattr(self.cache, "full", False):
                    self.cache.seal()
                logits, _ = engine.forward([self._next], self.cache, (), None)
                self._next = int(logits.argmax())
                if timed:
                    self.seconds.append(time.perf_counter() - started)
        finally:
            config._attn_implementation = before


def measure(tokens: int, threads: int, blocks: int, block: int, only: str | None) -> dict[str, Any]:
    """Milliseconds a token and bytes of every cache, in this process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    prompt = Prompt(tokens, threads)
    makers: dict[str, Callable[[], Any]] = {"DynamicCache": prompt.dynamic, "StaticCache": prompt.static}
    makers |= {f"in place, {codec}": functools.partial(prompt.paged, codec) for codec in CODECS}
    makers |= {f"QuantizedCache, {backend}": functools.partial(prompt.quantized, backend) for backend in QUANTIZED}
    makers[FLOOR] = prompt.nothing
    missing: dict[str, str] = {}
    runs: dict[str, Decoding] = {}
    for name, make in makers.items():
        if only is not None and name != only:
            continue
        try:
            runs[name] = Decoding(prompt, make(), floor=name == FLOOR)
            runs[name].block(3, timed=False)
        except (ImportError, AttributeError) as error:
            if not name.startswith("QuantizedCache"):
                raise
            missing[name] = str(error).strip().splitlines()[0]
            runs.pop(name, None)
    prompt.states = []
    for _ in range(blocks):
        for run in runs.values():
            run.block(block, timed=True)
    result: dict[str, Any] = {"tokens": tokens, "threads": threads, "decoded": blocks * block, "missing": missing}
    result["ms"] = {name: statistics.median(run.seconds) * 1e3 for name, run in runs.items()}
    result["bytes"] = {}
    for name, run in runs.items():
        if name.startswith("in place"):
            pages, tail = run.cache.prefix.bytes, run.cache.tail_bytes
            result["bytes"][name] = {
                "of_pages": pages / (run.cache.prefix.tokens * run.cache.position_bytes),
                "with_tail": (pages + tail) / (run.cache.get_seq_length() * run.cache.position_bytes),
            }
    return result


def run(tokens: int, threads: int, given: argparse.Namespace, *, only: str | None = None) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", "--tokens", str(tokens), "--threads", str(threads)]
    command += ["--blocks", str(given.blocks), "--block", str(given.block), *(["--only", only] if only else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if not only:
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 7936])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if any(tokens % GRID for tokens in given.tokens):
        parser.error(f"--tokens: whole pages of {GRID}")
    if given.child:
        print(json.dumps(measure(given.tokens[0], given.threads[0], given.blocks, given.block, given.only)))
        return
    results = []
    for threads in given.threads:
        for tokens in given.tokens:
            found = run(tokens, threads, given)
            plain = run(tokens, threads, given, only="DynamicCache")
            found["ms"]["DynamicCache, as it comes"] = plain["ms"]["DynamicCache"]
            ms, floor = found["ms"], found["ms"][FLOOR]
            found["ratio"] = {
                name: {other: ms[other] / ms[name] for other in ms if not other.startswith(("in place", FLOOR))}
                for name in ms
                if name.startswith("in place")
            }
            found["attention_ms"] = {name: taken - floor for name, taken in ms.items() if name != FLOOR}
            results.append(found)
            print(f"{tokens} tokens, {threads} thread(s), medians of {found['decoded']} tokens")
            for name, taken in ms.items():
                held = found["bytes"].get(name)
                note = f", bytes {held['of_pages']:.3f}, with the tail {held['with_tail']:.3f}" if held else ""
                print(
                    f"  {name:28} {taken:7.1f} ms a token, attention {taken - floor:6.1f}, "
                    f"{ms['DynamicCache'] / taken:5.2f} x DynamicCache{note}"
                )
            for name, why in found["missing"].items():
                print(f"  {name}: {why}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"results": results}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
