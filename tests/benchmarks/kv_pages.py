"""Writing and restoring the KV states of a prefix: page files against safetensors, torch.save and pickle.

    python tests/benchmarks/kv_pages.py [--tokens 512 2048 4096 7936] [--rounds 9] [--large]

The states are real: the default local model's, in bfloat16, over the documentation of Python's library. ``--large``
adds 1 GiB of normal variables in the shape of an 8B model (32 layers, 8 KV heads, dim 128, 8,192 tokens).

Method: files are in the operating system's page cache, every round runs each method once, medians over the rounds, each
baseline in the same process and rounds as ours. torch has one thread unless the row says so.
- Writing: new files every time. Ours writes one file per 256 tokens, with checksums, from at most four threads.
  safetensors writes one file of tensors, torch.save the same dictionary, pickle a `DynamicCache`. "plain write" is the
  kernel's limit: as many bytes by one write call into one new file whose blocks were reserved. A row "synced" syncs the
  file and its folder; there the baseline is a plain write of as many bytes and a sync.
- Restoring: in a new process, after one round that is not counted, into tensors that exist and were touched before;
  torch.load and pickle.load make their own, safetensors copies from its mapping. Ours opens, maps, checks every
  checksum and decodes, as the local provider does. "copy" is the limit: the same tensors copied within memory. Once
  with one thread, once with as many as there are cores, for torch (whose waiting threads sleep: OMP_WAIT_POLICY) and
  for us.
- Codecs: bytes on disk against the raw states, encoding and decoding in memory in GB/s of raw states on one thread,
  and against a copy of as many bytes.

Results go to tests/benchmarks/results/kv_pages.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agentmem import _pure
from agentmem.activation.identity import chain, digest, root
from agentmem.activation.pages import CODECS, Codec, NewPage, Page, publish, stage_pages

GRID = 256
IDENTITY = digest({"benchmark": 1})
RESULTS = Path(__file__).parent / "results" / "kv_pages.json"
LARGE = (32, 8, 8192, 128)

Layers = list[tuple[torch.Tensor, torch.Tensor]]


def real_states(tokens: int) -> Layers:
    """KV states of the default local model over English text: K and V [3, tokens, 64] of its 30 layers, bf16."""
    from agentmem.provider import load

    passage = import_module("first_token").passage  # beside this file

    torch.set_num_threads(os.cpu_count() or 1)
    provider = load("local", {"dtype": "bfloat16"})
    loaded = provider.tensors()
    ids = loaded.tokenizer(passage(provider, tokens + 64))["input_ids"][:tokens]
    assert len(ids) == tokens
    with torch.inference_mode():
        cache = loaded.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1).past_key_values
    states = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
    provider.close()
    return states


def synthetic_states(layers: int, heads: int, tokens: int, dim: int) -> Layers:
    """Normal variables, each channel of a size of its own, as KV states have them."""
    generator = torch.Generator().manual_seed(0)

    def tensor() -> torch.Tensor:
        size = torch.randn((heads, 1, dim), generator=generator).exp()
        return (torch.randn((heads, tokens, dim), generator=generator) * size).to(torch.bfloat16)

    return [(tensor(), tensor()) for _ in range(layers)]


def arrays(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """bf16 tensors as buffers that share their memory."""
    return [tensor.view(torch.int16).numpy().view(np.uint16) for tensor in tensors]


def synced(*paths: Path) -> None:
    for name in paths:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def new_pages(states: Layers, codec: Codec) -> list[NewPage]:
    tokens = list(range(states[0][0].shape[1]))
    parents = [root(IDENTITY, b"", GRID), *chain(IDENTITY, b"", tokens, GRID)]
    layers = list(zip(arrays([k for k, _ in states]), arrays([v for _, v in states]), strict=True))
    return [
        NewPage(
            identity=IDENTITY,
            parent=parents[number],
            number=number,
            tokens=tokens[number * GRID : (number + 1) * GRID],
            layers=layers,
            at=number * GRID,
            codec=codec,
        )
        for number in range(len(tokens) // GRID)
    ]


def write_pages(folder: Path, states: Layers, codec: Codec = "raw", *, durable: bool = False) -> None:
    staged = stage_pages(folder, new_pages(states, codec), durable=durable)
    publish([(path, folder / f"{i}.page") for i, path in enumerate(staged)], folder, durable=durable)


def plain_write(path: Path, image: memoryview) -> None:
    """The kernel's part alone: reserve, one write."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.posix_fallocate(descriptor, 0, len(image))
    done = 0
    while done < len(image):
        done += os.write(descriptor, image[done:])
    os.close(descriptor)


class Seconds:
    """Times of named methods, round by round."""

    def __init__(self) -> None:
        self._all: dict[str, list[float]] = {}

    def time(self, name: str, method: Callable[[], object]) -> None:
        started = time.perf_counter()
        method()
        self._all.setdefault(name, []).append(time.perf_counter() - started)

    def medians(self) -> dict[str, float]:
        """Without the first round, which warms up."""
        return {name: statistics.median(values[1:]) for name, values in self._all.items()}


def cache_of(states: Layers) -> Any:
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    for layer, (key, value) in enumerate(states):
        cache.update(key[None], value[None], layer)
    return cache


def named(states: Layers) -> dict[str, torch.Tensor]:
    return {f"{side}{i}": part for i, pair in enumerate(states) for side, part in zip("kv", pair, strict=True)}


def writing(folder: Path, states: Layers, rounds: int) -> dict[str, float]:
    seconds, tensors, cache = Seconds(), named(states), cache_of(states)
    size = sum(part.nbytes for pair in states for part in pair)
    image = memoryview(b"\7" * size)

    def pickled() -> None:
        with (folder / "pickle").open("wb") as file:
            pickle.dump(cache, file)

    def write_and_sync() -> None:
        plain_write(folder / "plain", image)
        synced(folder / "plain", folder)

    methods: dict[str, Callable[[], object]] = {
        "pages": lambda: write_pages(folder, states),
        "safetensors.save_file": lambda: save_file(tensors, folder / "safetensors"),
        "torch.save": lambda: torch.save(tensors, folder / "torch"),
        "pickle of DynamicCache": pickled,
        "plain write (limit)": lambda: plain_write(folder / "plain", image),
        "pages, synced": lambda: write_pages(folder, states, durable=True),
        "plain write, synced": write_and_sync,
    }
    for _ in range(rounds + 1):
        for name, method in methods.items():
            for path in folder.iterdir():
                path.unlink()
            os.sync()  # what others left to write must not be counted here
            seconds.time(name, method)
    return seconds.medians()


def restoring(folder: Path, rounds: int, threads: int) -> dict[str, float]:
    """In this process, which is a new one: files as `prepare` left them."""
    torch.set_num_threads(threads)
    leading = import_module("agentmem.adapters.providers._local_kv")._leading
    shape = json.loads((folder / "shape.json").read_text())
    room = [tuple(torch.zeros(shape[1:], dtype=torch.bfloat16) for _ in "kv") for _ in range(shape[0])]
    tensors = named(room)  # type: ignore[arg-type]
    spare = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    keys, values = arrays([k for k, _ in room]), arrays([v for _, v in room])

    def pages(codec: str) -> None:
        opened = [Page(folder / codec / f"{number}.page") for number in range(shape[2] // GRID)]
        assert leading(opened, lambda page, number: page.read_layers(keys, values, number * GRID)) == len(opened)
        for page in opened:
            page.close()

    def safetensors() -> None:
        with safe_open(folder / "safetensors", framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def pickled() -> None:
        with (folder / "pickle").open("rb") as file:
            pickle.load(file)

    def copy() -> None:
        for name, tensor in tensors.items():
            spare[name].copy_(tensor)

    methods: dict[str, Callable[[], object]] = {f"pages, {codec}": partial(pages, codec) for codec in CODECS}
    methods |= {
        "safetensors into ready tensors": safetensors,
        "torch.load": lambda: torch.load(folder / "torch", weights_only=True),
        "pickle.load": pickled,
        "copy (limit)": copy,
    }
    seconds = Seconds()
    for _ in range(rounds + 1):
        for name, method in methods.items():
            seconds.time(name, method)
    pages("raw")
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    for exact in ("lossless", "dense"):
        pages(exact)
        assert all(
            torch.equal(kept[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in tensors.items()
        )
    safetensors()
    assert all(torch.equal(kept[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in tensors.items())
    return seconds.medians()


def coding(folder: Path, states: Layers, rounds: int) -> dict[str, dict[str, float]]:
    """Sizes on disk, and speed in memory: one page encoded, and read back from memory into ready arrays."""
    kernels = _pure.kernels()
    size = sum(part.nbytes for pair in states for part in pair)
    keys, values = arrays([k for k, _ in states]), arrays([v for _, v in states])
    room = tuple(
        arrays([torch.zeros_like(pair[side]) for pair in states]) for side in (0, 1)
    )  # aligned as torch aligns
    flat, spare = torch.zeros(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    numbers = range(states[0][0].shape[1] // GRID)
    files = {codec: [(folder / codec / f"{i}.page").read_bytes() for i in numbers] for codec in CODECS}
    seconds = Seconds()

    def encode(codec: Codec) -> None:
        for i in numbers:
            kernels.page_encode(3, CODECS[codec], GRID, keys, values, i * GRID, False)

    def decode(codec: Codec) -> None:
        for i in numbers:
            kernels.page_read(files[codec][i], *room, i * GRID, True)

    for _ in range(rounds + 1):
        seconds.time("copy", lambda: spare.copy_(flat))
        for codec in CODECS:
            seconds.time(f"encode {codec}", partial(encode, codec))
            seconds.time(f"decode {codec}", partial(decode, codec))
    medians = seconds.medians()
    return {
        codec: {
            "bytes": sum(map(len, files[codec])) / size,
            "encode_gb_s": size / medians[f"encode {codec}"] / 1e9,
            "decode_gb_s": size / medians[f"decode {codec}"] / 1e9,
            "decode_of_copy": medians["copy"] / medians[f"decode {codec}"],
        }
        for codec in CODECS
    }


def prepare(folder: Path, states: Layers) -> None:
    """Every file that `restoring` reads."""
    for codec in CODECS:
        (folder / codec).mkdir()
        write_pages(folder / codec, states, codec)
    tensors = named(states)
    save_file(tensors, folder / "safetensors")
    torch.save(tensors, folder / "torch")
    with (folder / "pickle").open("wb") as file:
        pickle.dump(cache_of(states), file)
    (folder / "shape.json").write_text(json.dumps([len(states), *states[0][0].shape]))


def measure(label: str, states: Layers, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    size = sum(part.nbytes for pair in states for part in pair)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "new").mkdir()
        wrote = writing(folder / "new", states, rounds)
        for path in (folder / "new").iterdir():
            path.unlink()
        prepare(folder, states)
        coded = coding(folder, states, rounds)
        read, quiet = {}, {**os.environ, "OMP_WAIT_POLICY": "passive"}
        for threads in (1, os.cpu_count() or 1):
            command = [sys.executable, __file__, "--restore", str(folder), "--rounds", str(rounds)]
            child = subprocess.run(
                [*command, "--threads", str(threads)], capture_output=True, text=True, check=True, env=quiet
            )
            read[threads] = json.loads(child.stdout)
    writers = ("safetensors.save_file", "torch.save", "pickle of DynamicCache", "plain write (limit)")
    readers = ("torch.load", "pickle.load", "safetensors into ready tensors", "copy (limit)")
    return {
        "states": label,
        "bytes": size,
        "rounds": rounds,
        "write_seconds": wrote,
        "write_ratio": {name: wrote[name] / wrote["pages"] for name in writers},
        "synced_write_ratio": {"plain write, synced": wrote["plain write, synced"] / wrote["pages, synced"]},
        "restore": [
            {
                "threads": threads,
                "seconds": took,
                "raw_ratio": {name: took[name] / took["pages, raw"] for name in readers},
                "int8_ratio": {name: took[name] / took["pages, int8"] for name in readers},
            }
            for threads, took in read.items()
        ],
        "codecs": coded,
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['states']}: {result['bytes'] / 1e6:.0f} MB, {result['rounds']} rounds")

    def speeds(seconds: dict[str, float]) -> None:
        for name, taken in seconds.items():
            print(f"  {name:34} {taken * 1e3:9.2f} ms  {result['bytes'] / taken / 1e9:6.2f} GB/s")

    def ratios(label: str, found: dict[str, float]) -> None:
        print(f"  {label}: " + ", ".join(f"{value:.2f}x {name}" for name, value in found.items()))

    speeds(result["write_seconds"])
    ratios("write", result["write_ratio"])
    ratios("write, synced", result["synced_write_ratio"])
    for restore in result["restore"]:
        print(f"  restored in a new process with {restore['threads']} threads:")
        speeds(restore["seconds"])
        ratios("raw", restore["raw_ratio"])
        ratios("int8", restore["int8_ratio"])
    for codec, row in result["codecs"].items():
        print(
            f"  {codec:9} {row['bytes']:.3f} of the bytes ({1 / row['bytes']:.2f}x), encode {row['encode_gb_s']:5.2f}, "
            f"decode {row['decode_gb_s']:5.2f} GB/s ({row['decode_of_copy']:.2f} of a copy)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 2048, 4096, 7936])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--large", action="store_true", help="also 1 GiB in the shape of an 8B model")
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.restore is not None:
        json.dump(restoring(given.restore, given.rounds, given.threads), sys.stdout)
        return
    results = [measure(f"SmolLM2-135M, {tokens} tokens", real_states(tokens), given.rounds) for tokens in given.tokens]
    if given.large:
        results.append(measure("synthetic 8B shape, 8192 tokens", synthetic_states(*LARGE), 3))
    kernels = _pure.kernels()
    for result in results:
        show(result)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {"kernels": f"{kernels.__name__} {kernels.cpu_level()}", "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
