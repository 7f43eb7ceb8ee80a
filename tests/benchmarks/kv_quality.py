"""What the quantised codecs cost and save: next-token KL, perplexity, top-1 agreement, bytes, speed.

Method. Quality: SmolLM2-135M computes in fp32 over real English (licence texts of Debian). The KV states of a prefix go
through the shipped codec, block by block of 64 tokens; then the model reads the next tokens of the text in one pass
(teacher-forced) over the decoded states. Its next-token distributions are compared with those over untouched states:
once with fp32 states, once with states rounded to bf16 (for codec and reference alike). The row "bf16" is that rounding
alone. KL(reference, codec) is in nats, mean and largest over the tokens.

In place: the model in bf16, and again in fp32, reads the whole text from its beginning by attention in place, in steps
of the grid, pages sealed at every step, and then the next tokens of the text, eight at a time (teacher-forced). The
reference is the stock path, in the same steps with a `DynamicCache` and torch's sdpa kernel; "eager" is the stock path
with transformers' other exact implementation. Its KL to the reference is the noise that any exact implementation makes:
the bar for int8 is 1.5 times that of bf16.

Speed: the states of the first text in bf16, one thread, each round runs every method once, medians. The torch
expression is the int8 scheme with the same groups in whole-tensor operations: over all layers at once, and layer by
layer, where its intermediate results stay in the processor's cache; the ratio is given to both. Ours makes pages of 256
tokens and reads them back into ready arrays, with checksums, which torch does not.

    python tests/benchmarks/kv_quality.py [prefix] [tokens] [rounds]

Results go to tests/benchmarks/results/kv_quality.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agentmem import _pure
from agentmem.provider import load

TEXTS = ("GPL-3", "GFDL-1.3", "MPL-2.0")
LICENCES = Path("/usr/share/common-licenses")
CODECS = {"int8": 3, "K8V4": 4, "int4": 5}
F32, BF16 = 1, 3
BLOCK, GRID = 64, 256
#: Tokens that are read at a time behind the prefix, attended in place.
STEP = 8
RESULTS = Path(__file__).parent / "results" / "kv_quality.json"
#: What the codecs must stay below: mean KL in nats, share of the bytes of bf16.
BARS = {"int8": (0.001, 0.53), "K8V4": (0.002, 0.42), "int4": (0.01, 0.32)}

States = list[tuple[torch.Tensor, torch.Tensor]]  # per layer K and V [1, heads, tokens, dim]


def as_array(tensor: torch.Tensor) -> Any:
    """Shares the memory; bf16 as uint16."""
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def through(codec: int, dtype: int, states: States) -> tuple[States, int]:
    """The states as they come back from a codec, and the bytes that were kept."""
    kernels, kept, result = _pure.kernels(), 0, []
    for key, value in states:
        decoded = torch.empty_like(key), torch.empty_like(value)
        arrays = [as_array(tensor.contiguous()) for tensor in (key, value, *decoded)]
        for head in range(key.shape[1]):
            for at in range(0, key.shape[2], BLOCK):
                blocks = [np.ascontiguousarray(array[0, head, at : at + BLOCK]) for array in arrays]
                data = kernels.block_encode(codec, dtype, *blocks[:2])
                kernels.block_decode(codec, dtype, data, *blocks[2:])
                for array, block in zip(arrays[2:], blocks[2:], strict=True):
                    array[0, head, at : at + BLOCK] = block
                kept += len(data)
        result.append(decoded)
    return result, kept


class Reader:
    """A model over one text: the states of its prefix, and what it says of the next tokens over given states."""

    def __init__(self, model: Any, ids: list[int], prefix: int) -> None:
        self.model, self.prefix = model, prefix
        self.ids = torch.tensor([ids])
        with torch.inference_mode():
            cache = model(input_ids=self.ids[:, :prefix], use_cache=True).past_key_values
        self.states: States = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def log_probabilities(self, states: States) -> torch.Tensor:
        """[tokens, vocabulary]; the states are read as fp32, whatever they are kept in."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        with torch.inference_mode():
            for layer, (key, value) in enumerate(states):
                cache.update(key.float(), value.float(), layer)
            logits = self.model(input_ids=self.ids[:, self.prefix : -1], past_key_values=cache).logits[0]
            return torch.log_softmax(logits.float(), -1)

    @property
    def targets(self) -> torch.Tensor:
        """The tokens that came, [tokens]."""
        return self.ids[0, self.prefix + 1 :]


def perplexity(targets: torch.Tensor, log_probabilities: torch.Tensor) -> float:
    return float(log_probabilities.gather(1, targets[:, None]).mean().neg().exp())


def compared(targets: torch.Tensor, reference: torch.Tensor, got: torch.Tensor) -> dict[str, float]:
    """KL, perplexity and agreement of what the model says over two kinds of states."""
    divergence = (reference.exp() * (reference - got)).sum(-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "perplexity": perplexity(targets, got),
        "perplexity_change": perplexity(targets, got) / perplexity(targets, reference) - 1,
        "top1": float((reference.argmax(-1) == got.argmax(-1)).double().mean()),
    }


def quality(reader: Reader) -> dict[str, Any]:
    """Every codec over one text."""
    rounded = [(key.bfloat16(), value.bfloat16()) for key, value in reader.states]
    plain, coarse = reader.log_probabilities(reader.states), reader.log_probabilities(rounded)
    raw = sum(key.nbytes + value.nbytes for key, value in rounded)
    rows: dict[str, Any] = {"bf16": {"fp32": compared(reader.targets, plain, coarse), "bytes": 1.0}}
    for name, codec in CODECS.items():
        exact, kept = through(codec, F32, reader.states)
        again, same = through(codec, BF16, rounded)
        assert kept == same  # of fixed size, whatever the dtype
        rows[name] = {
            "fp32": compared(reader.targets, plain, reader.log_probabilities(exact)),
            "bf16": compared(reader.targets, coarse, reader.log_probabilities(again)),
            "bytes": kept / raw,
        }
    return {"perplexity": perplexity(reader.targets, plain), "codecs": rows}


def read_on(engine: Any, ids: list[int], prefix: int, attention: str) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] of the next tokens, everything computed one way from the beginning."""
    from transformers import DynamicCache

    model, config = engine.loaded.model, engine.loaded.model.config
    before = config._attn_implementation
    paged = attention not in ("sdpa", "eager")
    cache: Any = DynamicCache()
    if paged:
        cached = import_module("agentmem.adapters.providers._local_attention").PagedCache
        cache = cached(engine.states.shapes, engine.loaded.dtype, grid=GRID, codec=attention)
    else:
        config._attn_implementation = attention
    found = []
    ends = [*range(GRID, prefix, GRID), *range(prefix, len(ids) - 1, STEP), len(ids) - 1]
    try:
        with torch.inference_mode(), cache.attending(config) if paged else contextlib.nullcontext():
            for start, end in zip([0, *ends], ends, strict=False):
                logits = model(input_ids=torch.tensor([ids[start:end]]), past_key_values=cache, use_cache=True).logits
                if paged and cache.full:
                    cache.seal()
                if start >= prefix:
                    found.append(torch.log_softmax(logits[0].float(), -1))
    finally:
        config._attn_implementation = before
    return torch.cat(found)


def in_place(texts: dict[str, list[int]], prefix: int, dtype: str) -> dict[str, Any]:
    """Every codec attended in place, and the noise of exact attention, over all texts."""
    provider: Any = load("local", {"dtype": dtype, "threads": 1})
    engine = provider._ready()
    assert engine.states.check()
    rows: dict[str, dict[str, Any]] = {}
    for name, ids in texts.items():
        reference = read_on(engine, ids, prefix, "sdpa")
        for kind in ("eager", "raw", "int8", "k8v4", "int4"):
            got = read_on(engine, ids, prefix, kind)
            rows.setdefault(kind, {})[name] = compared(torch.tensor(ids[prefix + 1 :]), reference, got)
    noise = statistics.mean(row["kl_mean"] for row in rows["eager"].values())
    means = {kind: statistics.mean(row["kl_mean"] for row in found.values()) for kind, found in rows.items()}
    return {
        "dtype": dtype,
        "texts": rows,
        "kl_mean": means,
        "to_noise": {kind: mean / noise for kind, mean in means.items() if kind != "eager"},
    }


def torch_encode(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The int8 scheme in torch: [..., tokens, dim] to codes, scales and minima."""
    keys = key.float().reshape(*key.shape[:-2], -1, BLOCK, key.shape[-1])
    minimum = keys.amin(-2, keepdim=True)
    scale = (keys.amax(-2, keepdim=True) - minimum) / 255
    codes = ((keys - minimum) / scale).round().to(torch.uint8)
    values = value.float()
    per_token = values.abs().amax(-1, keepdim=True) / 127
    return codes, minimum.half(), scale.half(), (values / per_token).round().to(torch.int8), per_token.half()


def torch_decode(*encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Back to bf16."""
    codes, minimum, scale, signed, per_token = encoded
    keys = (codes.float() * scale.float() + minimum.float()).flatten(-3, -2)
    return keys.bfloat16(), (signed.float() * per_token.float()).bfloat16()


def speed(states: States, rounds: int) -> dict[str, Any]:
    """Gigabytes of bf16 states per second of every method at every instruction set, and the ratios to torch."""
    kernels = _pure.kernels()
    states = [(key[0].bfloat16().contiguous(), value[0].bfloat16().contiguous()) for key, value in states]
    keys, values = ([as_array(pair[i]) for pair in states] for i in (0, 1))
    tokens = keys[0].shape[1] // GRID * GRID
    stacked = tuple(torch.stack([pair[i][:, :tokens] for pair in states]) for i in (0, 1))
    total = sum(tensor.nbytes for tensor in stacked)
    whole = torch_encode(*stacked)
    layered = [torch_encode(*pair) for pair in zip(*stacked, strict=True)]

    room = [[np.zeros_like(array) for array in side] for side in (keys, values)]
    identity = bytes(32)
    layers = tuple((array.shape[0], array.shape[2], array.shape[2]) for array in keys)

    def page(codec: int, at: int) -> bytes:
        table, body = kernels.page_encode(BF16, codec, GRID, keys, values, at, False)
        with tempfile.TemporaryFile() as file:
            ids = np.zeros(GRID, np.int32)
            digests = (identity, identity, identity)
            kernels.page_write_encoded(file.fileno(), BF16, GRID, at // GRID, *digests, ids, layers, table, body)
            file.seek(0)
            return file.read()

    pages = {codec: [page(codec, at) for at in range(0, tokens, GRID)] for codec in CODECS.values()}

    def encode_pages(codec: int) -> None:
        for at in range(0, tokens, GRID):
            kernels.page_encode(BF16, codec, GRID, keys, values, at, False)

    def read_pages(codec: int) -> None:
        for number, data in enumerate(pages[codec]):
            kernels.page_read(data, *room, number * GRID, True)

    copies = [torch.zeros_like(tensor) for tensor in stacked]
    methods: dict[str, Callable[[], object]] = {
        "torch encode, all layers at once": lambda: torch_encode(*stacked),
        "torch encode, by layer": lambda: [torch_encode(*pair) for pair in zip(*stacked, strict=True)],
        "torch decode, all layers at once": lambda: torch_decode(*whole),
        "torch decode, by layer": lambda: [torch_decode(*each) for each in layered],
        "copy of the states (limit)": lambda: [
            tensor.copy_(other) for tensor, other in zip(copies, stacked, strict=True)
        ],
    }
    before = kernels.cpu_level()
    levels = [level for level in kernels.cpu_levels() if level != "sse4.2"]  # has no code of its own here

    def at_level(level: str, method: Callable[[int], None], codec: int) -> Callable[[], None]:
        def run() -> None:
            kernels.set_cpu_level(level)
            method(codec)

        return run

    for level in levels:
        for name, codec in CODECS.items():
            methods[f"{name} encode, {level}"] = at_level(level, encode_pages, codec)
            methods[f"{name} decode, {level}"] = at_level(level, read_pages, codec)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):  # the first one warms up
        for name, method in methods.items():
            started = time.perf_counter()
            method()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    kernels.set_cpu_level(before)
    rates = {name: total / statistics.median(taken) / 1e9 for name, taken in seconds.items()}
    return {
        "bytes": total,
        "rounds": rounds,
        "gigabytes_per_second": rates,
        "int8_ratio": {
            f"{level}, to torch {way}": {
                kind: rates[f"int8 {kind}, {level}"] / rates[f"torch {kind}, {way}"] for kind in ("encode", "decode")
            }
            for level in levels
            for way in ("all layers at once", "by layer")
        },
    }


def measure(prefix: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Quality over each text, speed over the first."""
    torch.set_num_threads(1)
    loaded = load("local", {"dtype": "float32"}).tensors()
    texts: dict[str, Any] = {}
    rates: dict[str, Any] = {}
    all_ids = {
        name: loaded.tokenizer((LICENCES / name).read_text("utf-8"))["input_ids"][: prefix + tokens + 1]
        for name in TEXTS
    }
    for name, ids in all_ids.items():
        reader = Reader(loaded.model, ids, prefix)
        if not rates:
            rates = speed(reader.states, rounds)
        texts[name] = quality(reader)
    means = {
        codec: {
            "kl_mean": statistics.mean(text["codecs"][codec]["fp32"]["kl_mean"] for text in texts.values()),
            "kl_worst_text": max(text["codecs"][codec]["fp32"]["kl_mean"] for text in texts.values()),
            "kl_mean_to_bf16": statistics.mean(text["codecs"][codec]["bf16"]["kl_mean"] for text in texts.values()),
            "bytes": texts[TEXTS[0]]["codecs"][codec]["bytes"],
            "bars": BARS[codec],
        }
        for codec in CODECS
    }
    kernels = _pure.kernels()
    return {
        "prefix": prefix,
        "tokens": tokens,
        "kernels": f"{kernels.__name__} {kernels.cpu_level()}",
        "codecs": means,
        "texts": texts,
        "in_place": [in_place(all_ids, prefix, dtype) for dtype in ("bfloat16", "float32")],
        "speed": rates,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=int, nargs="?", default=2048)
    parser.add_argument("tokens", type=int, nargs="?", default=512)
    parser.add_argument("rounds", type=int, nargs="?", default=9)
    options = parser.parse_args()
    result = measure(options.prefix, options.tokens, options.rounds)
    for text, found in result["texts"].items():
        print(f"{text}: perplexity {found['perplexity']:.3f}")
        for codec, row in found["codecs"].items():
            for reference in ("fp32", "bf16"):
                if reference in row:
                    got = row[reference]
                    print(
                        f"  {codec:5} against {reference}  KL mean {got['kl_mean']:.6f} max {got['kl_max']:.5f}  "
                        f"perplexity {got['perplexity_change']:+.3%}  top-1 {got['top1']:.4f}  bytes {row['bytes']:.4f}"
                    )
    for codec, mean in result["codecs"].items():
        most, share = mean["bars"]
        print(f"{codec}: KL {mean['kl_mean']:.6f} (bar {most}), {mean['bytes']:.4f} of the bytes of bf16 (bar {share})")
    for found in result["in_place"]:
        print(f"attended in place, {found['dtype']}; noise of exact attention {found['kl_mean']['eager']:.6f} nats")
        for kind, ratio in found["to_noise"].items():
            rows = found["texts"][kind].values()
            change = max(abs(row["perplexity_change"]) for row in rows)
            top = min(row["top1"] for row in rows)
            print(
                f"  {kind:5} KL {found['kl_mean'][kind]:.6f}, {ratio:.2f} x the noise; perplexity within {change:.3%}, "
                f"top-1 the same {top:.1%} (eager {min(row['top1'] for row in found['texts']['eager'].values()):.1%})"
            )
    for name, rate in result["speed"]["gigabytes_per_second"].items():
        print(f"  {name:40} {rate:6.2f} GB/s")
    for name, ratio in result["speed"]["int8_ratio"].items():
        print(f"  int8 {name}: encode {ratio['encode']:.1f} x, decode {ratio['decode']:.1f} x")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
