"""Attention in place over compressed pages, against PyTorch's attention over the states as they are: the kernel alone.

    python tests/benchmarks/attention.py [--rounds 15] [--tokens 8192] [--short]

Shapes: that of the default model (30 layers, 9 query and 3 KV heads, dim 64) and that of an 8B model (32 and 8 heads,
dim 128; 8 of its 32 layers). The states are normal variables with a size per channel, bfloat16.

Method: a step is all layers in a row, so that what is read is larger than the caches. Every round runs each way once,
medians over the rounds, baselines in the same process and rounds; the first two rounds are not counted. Baselines:
- "cat + sdpa": a step of `DynamicCache`: new key and value appended by torch.cat, then scaled_dot_product_attention
  with the query heads of a KV head packed, as transformers does it.
- "sdpa": the same without the append, which is what a `StaticCache` costs at best.
- "read": the bytes of the int8 pages read once (their CRC32C by carry-less multiplication, or their xor, the faster).
- Prefill: 256 new tokens over 4,096 and over themselves, layer by layer; the baseline is torch's flash attention over
  the states as they are, with a causal part of its own, merged by log-sum-exp: neither side builds a mask.
"mapped" are pages in files, as the local provider has them; else they lie in memory as they were encoded.

Results go to tests/benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from agentmem import _pure

RESULTS = Path(__file__).parent / "results" / "attention.json"
GRID = 256
CODECS = {"raw": 0, "int8": 3, "k8v4": 4, "int4": 5}
IDS = (b"i" * 32, b"k" * 32, b"p" * 32)
TAIL = 128  # tokens of the tail when a step is measured: half a grid

Layers = list[tuple[torch.Tensor, torch.Tensor]]


class Shape(NamedTuple):
    """Of a model's attention."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    dim: int


SHAPES = (Shape("135M", 30, 9, 3, 64), Shape("8B", 8, 32, 8, 128))


def array(tensor: torch.Tensor) -> Any:
    """A bf16 tensor's memory."""
    return tensor.view(torch.int16).numpy()


def states_of(shape: Shape, tokens: int) -> Layers:
    generator = torch.Generator().manual_seed(0)

    def tensor() -> torch.Tensor:
        size = torch.randn((shape.kv_heads, 1, shape.dim), generator=generator).exp()
        return (torch.randn((shape.kv_heads, tokens, shape.dim), generator=generator) * size).to(torch.bfloat16)

    return [(tensor(), tensor()) for _ in range(shape.layers)]


class InPlace:
    """A prefix in one codec, and what a step of attention needs beside it."""

    def __init__(self, shape: Shape, states: Layers, codec: int, queries: int, folder: Path | None = None) -> None:
        kernels = _pure.kernels()
        self.layers = [(shape.kv_heads, shape.dim, shape.dim)] * shape.layers
        self.prefix = kernels.Prefix(3, self.layers)
        self.bodies = []
        keys, values = [array(k) for k, _ in states], [array(v) for _, v in states]
        tokens = np.zeros(GRID, np.int32)
        for at in range(0, keys[0].shape[1], GRID):
            table, body = kernels.page_encode(3, codec, GRID, keys, values, at, False)
            if folder is None:
                self.prefix.append_encoded(GRID, table, body)
                self.bodies.append(body)
                continue
            with (folder / f"{codec}-{at}").open("w+b") as file:
                number = at // GRID
                kernels.page_write_encoded(
                    file.fileno(), 3, GRID, number, *IDS, tokens, tuple(self.layers), table, body
                )
                self.prefix.append_page(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.queries = queries
        self.length = TAIL if queries == 1 else 0
        tails = torch.zeros(2, shape.layers, shape.kv_heads, self.length + queries, shape.dim, dtype=torch.bfloat16)
        self.tails = [[array(tail) for tail in side] for side in tails]
        self.out = array(torch.zeros(queries, shape.heads, shape.dim, dtype=torch.bfloat16))
        self.scale = 1 / math.sqrt(shape.dim)

    def step(self, query: Any, key: Any, value: Any, threads: int) -> None:
        """All layers."""
        attend = self.prefix.attend
        for layer, (tail_keys, tail_values) in enumerate(zip(*self.tails, strict=True)):
            attend(layer, query, key, value, tail_keys, tail_values, self.length, self.out, self.scale, 0, threads)


def medians(methods: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 2):
        for name, method in methods.items():
            started = time.perf_counter()
            method()
            if turn > 1:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def decode(shape: Shape, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """One new token over ``tokens`` and a tail."""
    torch.set_num_threads(threads)
    kernels = _pure.kernels()
    states = states_of(shape, tokens + TAIL)
    prefixes = [(k[:, :tokens].contiguous(), v[:, :tokens].contiguous()) for k, v in states]
    query = torch.randn(1, shape.heads, 1, shape.dim).to(torch.bfloat16)
    key, value = (torch.randn(1, shape.kv_heads, 1, shape.dim).to(torch.bfloat16) for _ in "kv")
    packed = query.view(1, shape.kv_heads, shape.heads // shape.kv_heads, shape.dim)
    new = array(query[0]), array(key[0]), array(value[0])

    def stock(*, append: bool) -> None:
        for k, v in states:
            keys, values = k[None], v[None]
            if append:
                keys, values = torch.cat([keys, key], -2), torch.cat([values, value], -2)
            scaled_dot_product_attention(packed, keys, values)

    with tempfile.TemporaryDirectory() as name:
        codecs = {codec: InPlace(shape, prefixes, number, 1) for codec, number in CODECS.items()}
        codecs["int8 mapped"] = InPlace(shape, prefixes, CODECS["int8"], 1, Path(name))
        bodies = codecs["int8"].bodies
        words = [np.frombuffer(body, np.uint64) for body in bodies]
        methods: dict[str, Callable[[], object]] = {
            "cat + sdpa": lambda: stock(append=True),
            "sdpa": lambda: stock(append=False),
            "read by crc": lambda: [kernels.crc32c(body) for body in bodies],
            "read by xor": lambda: [np.bitwise_xor.reduce(part) for part in words],
        }
        for codec, place in codecs.items():
            methods[codec] = lambda place=place: place.step(*new, threads)  # type: ignore[misc]
        took = medians(methods, rounds)
    read = min(took.pop("read by crc"), took.pop("read by xor"))
    size = sum(map(len, bodies))
    return {
        "shape": shape._asdict(),
        "tokens": tokens,
        "threads": threads,
        "seconds": took | {"read int8 once": read},
        "read_gb_s": size / read / 1e9,
        "bytes": {codec: place.prefix.bytes for codec, place in codecs.items()},
        "ratio": {
            codec: {"cat + sdpa": took["cat + sdpa"] / took[codec], "sdpa": took["sdpa"] / took[codec]}
            for codec in codecs
        },
        "int8_of_read_rate": read / took["int8"],
    }


def prefill(shape: Shape, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """256 new tokens over ``tokens``."""
    torch.set_num_threads(threads)
    states = states_of(shape, tokens)
    query = torch.randn(1, GRID, shape.heads, shape.dim).to(torch.bfloat16)
    key, value = (torch.randn(1, shape.kv_heads, GRID, shape.dim).to(torch.bfloat16) for _ in "kv")
    new = array(query[0]).transpose(1, 0, 2), array(key[0]), array(value[0])
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    group = shape.heads // shape.kv_heads
    one_of_each = [part.repeat_interleave(group, 1) for part in (key, value)]
    per_head = [tuple(part[None].repeat_interleave(group, 1) for part in pair) for pair in states]
    ours = query.transpose(1, 2)

    def stock() -> None:
        for keys, values in per_head:
            before, log_before = flash(ours, keys, values, 0.0, False)
            own, log_own = flash(ours, *one_of_each, 0.0, True)
            weight = torch.sigmoid(log_before - log_own)[..., None]
            torch.lerp(own.float(), before.float(), weight).to(torch.bfloat16)

    codecs = {codec: InPlace(shape, states, number, GRID) for codec, number in CODECS.items()}
    methods: dict[str, Callable[[], object]] = {"flash": stock}
    for codec, place in codecs.items():
        methods[codec] = lambda place=place: place.step(*new, threads)  # type: ignore[misc]
    took = medians(methods, rounds)
    return {
        "shape": shape._asdict(),
        "tokens": tokens,
        "threads": threads,
        "seconds": took,
        "ratio": {codec: took["flash"] / took[codec] for codec in codecs},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--short", action="store_true", help="the small shape and one thread only; writes nothing")
    asked = parser.parse_args()
    kernels = _pure.kernels()
    results: dict[str, Any] = {
        "machine": {"kernels": f"{kernels.__name__} {kernels.cpu_level()}", "cores": os.cpu_count()},
        "decode": [],
        "prefill": [],
    }
    levels = [level for level in kernels.cpu_levels() if level in {"avx512", "avx2", kernels.cpu_level()}]
    for shape in SHAPES[:1] if asked.short else SHAPES:
        for level in levels:
            kernels.set_cpu_level(level)
            for threads in (1,) if asked.short or level != levels[0] else (1, 2):
                row = decode(shape, asked.tokens, asked.rounds, threads) | {"level": level}
                results["decode"].append(row)
                ratios = ", ".join(
                    f"{codec} {each['cat + sdpa']:.2f} {each['sdpa']:.2f}" for codec, each in row["ratio"].items()
                )
                print(
                    f"decode {shape.name} {level} {threads} thread(s), faster than cat + sdpa, sdpa: {ratios}",
                    flush=True,
                )
                print(
                    f"  read {row['read_gb_s']:.1f} GB/s, int8 at {row['int8_of_read_rate']:.2f} of it;",
                    ", ".join(f"{name} {1e3 * took:.1f} ms" for name, took in row["seconds"].items()),
                    flush=True,
                )
        for level in levels:
            kernels.set_cpu_level(level)
            row = prefill(shape, 4096, max(3, asked.rounds // 3), 1) | {"level": level}
            results["prefill"].append(row)
            ratios = ", ".join(f"{codec} {ratio:.2f}" for codec, ratio in row["ratio"].items())
            print(f"prefill {shape.name} {level} 1 thread, faster than flash: {ratios}", flush=True)
            print("  " + ", ".join(f"{name} {1e3 * took:.1f} ms" for name, took in row["seconds"].items()), flush=True)
    kernels.set_cpu_level(levels[0])
    if not asked.short:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
