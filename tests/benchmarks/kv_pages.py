"""Writing and restoring the KV states of a prefix: page files against safetensors, torch.save and pickle.

Method: one process, torch on one thread (pages are written by up to four), bf16 states of random bits in the shape of
SmolLM2-135M (30 layers, 3 KV heads, dim 64), files in the page cache, each round runs every method once, medians over
the rounds. "into ready tensors": the states end in tensors that exist and were touched before; torch.load and
pickle.load make their own. Our restore maps, checks every checksum and copies. Nobody syncs unless the row says so.

    python tests/benchmarks/kv_pages.py [tokens] [rounds]

Results go to tests/benchmarks/results/kv_pages.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from agentmem import _pure
from agentmem.activation.identity import chain, digest, root
from agentmem.activation.pages import NewPage, Page, publish, stage_pages
from agentmem.activation.store import PageStore
from agentmem.database import Database

LAYERS, HEADS, DIM, GRID = 30, 3, 64, 256
IDENTITY = digest({"benchmark": 1})
SALT = b"benchmark"
RESULTS = Path(__file__).parent / "results" / "kv_pages.json"


def synced(path: Path) -> None:
    """Bring a file that someone else wrote to the disk, and its name."""
    for name in (path, path.parent):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Case:
    """The states, the room to restore them to, and each method as a function without arguments."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder = folder
        self.tokens = list(range(tokens))
        names = [f"{side}{layer}" for layer in range(LAYERS) for side in "kv"]
        shape = (HEADS, tokens, DIM)
        bits = torch.randint(-(1 << 15), 1 << 15, (len(names), *shape), dtype=torch.int16)
        # Each its own storage, as a cache has them: of a view the baselines would write all of what it looks at.
        self.states = {name: bits[i].clone().view(torch.bfloat16) for i, name in enumerate(names)}
        self.room = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names}
        self.bytes = bits.numel() * 2
        self.layers = list(zip(*[iter(self.arrays(self.states))] * 2, strict=True))
        self.keys, self.values = self.arrays(self.room)[::2], self.arrays(self.room)[1::2]
        self.parents = [root(IDENTITY, SALT, GRID), *chain(IDENTITY, SALT, self.tokens, GRID)]
        self.store = PageStore(Database(folder / "memory.db"), folder / "pages")
        self.view = self.store.view(SALT)
        (folder / "raw").mkdir()

    @staticmethod
    def arrays(tensors: dict[str, torch.Tensor]) -> list[Any]:
        """The tensors as buffers that share their memory."""
        return [tensor.view(torch.uint16).numpy() for tensor in tensors.values()]

    def clear(self) -> None:
        """Writes go to new files."""
        self.store.delete([entry.key for entry in self.store.entries()])
        for path in (self.folder / "raw").iterdir():
            path.unlink()

    def write_pages(self, *, durable: bool = False) -> None:
        folder = self.folder / "raw"
        new = [
            NewPage(
                identity=IDENTITY,
                parent=self.parents[number],
                number=number,
                tokens=self.tokens[number * GRID : (number + 1) * GRID],
                layers=self.layers,
                at=number * GRID,
            )
            for number in range(len(self.tokens) // GRID)
        ]
        staged = stage_pages(folder, new, durable=durable)
        publish([(path, folder / f"{i}.page") for i, path in enumerate(staged)], folder, durable=durable)

    def seal(self) -> None:
        assert self.view.seal(IDENTITY, self.tokens, 0, self.layers, [("r",)] * 10_000) == len(self.tokens) // GRID

    def safetensors(self) -> None:
        save_file(self.states, self.folder / "raw" / "states.safetensors")

    def torch(self) -> None:
        torch.save(self.states, self.folder / "raw" / "states.pt")

    def pickle(self) -> None:
        with (self.folder / "raw" / "states.pickle").open("wb") as file:
            pickle.dump(self.states, file)

    def then_sync(self, write: Callable[[], None], name: str) -> Callable[[], None]:
        def both() -> None:
            write()
            synced(self.folder / "raw" / name)

        return both

    def restore_pages(self) -> None:
        for number in range(len(self.tokens) // GRID):
            page = Page(self.folder / "raw" / f"{number}.page")
            page.read_layers(self.keys, self.values, number * GRID)
            page.close()

    def restore_store(self) -> None:
        pages = self.view.longest(IDENTITY, self.tokens)
        assert len(pages) == len(self.tokens) // GRID
        for page in pages:
            page.read_layers(self.keys, self.values, page.number * GRID)
            page.close()

    def load_safetensors(self) -> None:
        with safe_open(self.folder / "raw" / "states.safetensors", framework="pt") as file:
            for name, tensor in self.room.items():
                tensor.copy_(file.get_tensor(name))

    def load_torch(self) -> None:
        torch.load(self.folder / "raw" / "states.pt", weights_only=True)

    def load_pickle(self) -> None:
        with (self.folder / "raw" / "states.pickle").open("rb") as file:
            pickle.load(file)

    def copy(self) -> None:
        for name, tensor in self.room.items():
            tensor.copy_(self.states[name])

    def check(self) -> None:
        for name, tensor in self.room.items():
            assert torch.equal(tensor.view(torch.int16), self.states[name].view(torch.int16))
            tensor.zero_()


def measure(tokens: int, rounds: int) -> dict[str, Any]:
    """Medians in seconds of every method, and the ratios that matter."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        case = Case(Path(name), tokens)
        writes: dict[str, Callable[[], None]] = {
            "pages": case.write_pages,
            "safetensors.save_file": case.safetensors,
            "torch.save": case.torch,
            "pickle.dump": case.pickle,
            "pages, synced (what seal does)": lambda: case.write_pages(durable=True),
            "seal: pages, synced, rows committed": case.seal,
            "safetensors.save_file, synced": case.then_sync(case.safetensors, "states.safetensors"),
            "torch.save, synced": case.then_sync(case.torch, "states.pt"),
            "pickle.dump, synced": case.then_sync(case.pickle, "states.pickle"),
        }
        reads: dict[str, Callable[[], None]] = {
            "pages into ready tensors, checksums on": case.restore_pages,
            "store.longest and read_layers": case.restore_store,
            "safetensors into ready tensors": case.load_safetensors,
            "torch.load": case.load_torch,
            "pickle.load": case.load_pickle,
            "copy of tensors (limit)": case.copy,
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*writes, *reads)}
        for turn in range(rounds + 1):  # the first one warms up
            for label, method in writes.items():
                case.clear()
                started = time.perf_counter()
                method()
                taken = time.perf_counter() - started
                if turn:
                    seconds[label].append(taken)
            case.clear()
            for write in (case.write_pages, case.seal, case.safetensors, case.torch, case.pickle):
                write()
            for label, method in reads.items():
                started = time.perf_counter()
                method()
                taken = time.perf_counter() - started
                if turn:
                    seconds[label].append(taken)
                if "ready" in label or "store" in label:
                    case.check()
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        total = case.bytes
    return {
        "tokens": tokens,
        "bytes": total,
        "rounds": rounds,
        "kernels": f"{_pure.kernels().__name__} {_pure.kernels().cpu_level()}",
        "seconds": medians,
        "gigabytes_per_second": {name: total / taken / 1e9 for name, taken in medians.items()},
        "write_ratio": {
            name: medians[name] / medians["pages"] for name in ("safetensors.save_file", "torch.save", "pickle.dump")
        },
        "synced_write_ratio": {
            name: medians[f"{name}, synced"] / medians["pages, synced (what seal does)"]
            for name in ("safetensors.save_file", "torch.save", "pickle.dump")
        },
        "restore_ratio": {
            name: medians[name] / medians["pages into ready tensors, checksums on"]
            for name in ("torch.load", "pickle.load", "safetensors into ready tensors", "copy of tensors (limit)")
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=int, nargs="?", default=2048)
    parser.add_argument("rounds", type=int, nargs="?", default=15)
    options = parser.parse_args()
    result = measure(options.tokens, options.rounds)
    print(f"{result['bytes'] / 1e6:.0f} MB of states, {result['rounds']} rounds, {result['kernels']}")
    for name, speed in result["gigabytes_per_second"].items():
        print(f"  {name:45} {result['seconds'][name] * 1e3:8.1f} ms  {speed:6.2f} GB/s")
    for kind in ("write_ratio", "synced_write_ratio", "restore_ratio"):
        for name, ratio in result[kind].items():
            print(f"  {kind.replace('_', ' ')}: {ratio:5.2f} x {name}")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
