"""Ten chats take turns in the RAM of four: time to the first token of a turn, and what the process ever holds.

    python tests/benchmarks/small_machine.py [--chats 10] [--fit 4] [--tokens 4096] [--rounds 3] [--codec int8]

Every chat begins with a text of its own, of about ``--tokens`` tokens. Each round asks every chat one question of about
40 tokens, in an order that is shuffled anew each round; measured is the time from the call to the first piece of text.
- agentmem: one `Memory` with ``page_codec`` and a ``ram_budget`` of the bytes of ``--fit`` chats' pages.
- recomputing (the baseline): transformers alone, with the `DynamicCache` objects of the ``--fit`` chats used last kept
  in RAM, in bf16, which is twice their bytes; what fell out is computed again in one pass.
Each runs in a process of its own, and a third one with ``swap_in`` called for the next chat before its turn (untimed,
as while the user types). RSS is polled every 5 ms. "model" is its peak in a short chat of one step of the grid: the
interpreter, the weights, and what computing any step takes for a moment (the output layer alone 57 MB). What the ten
chats' peak is above that is compared with the ``ram_budget``.

The hard proof: the same turns in a process that may have no more address space (RLIMIT_AS) than its peak in that short
chat, plus the budget, one chat for what a running turn computes, and 128 MB; every turn must still find all its pages.
The control: with a budget for all chats under the same limit, pages can't be mapped any more. Results go to
tests/benchmarks/results/small_machine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmem import Memory

RESULTS = Path(__file__).parent / "results" / "small_machine.json"
SLACK = 128 << 20  # what the C library keeps of freed memory, and threads reserve


def status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field (VmRSS, VmSize, ...)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


class Watch(threading.Thread):
    """Polls this process's resident memory, files included; ``peak`` is in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.start()

    def run(self) -> None:
        with open("/proc/self/statm", encoding="ascii") as file:
            while True:
                file.seek(0)
                self.peak = max(self.peak, int(file.read().split()[1]) * self._page)
                time.sleep(0.005)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = status("VmRSS")


def turns(chats: int, rounds: int) -> list[list[int]]:
    """The order of the chats in each round; the same in every process."""
    order = random.Random(4)
    return [order.sample(range(chats), chats) for _ in range(rounds)]


def texts(provider: Any, chats: int, tokens: int) -> list[str]:
    passage = import_module("first_token").passage  # beside this file
    text = passage(provider, tokens)
    return [f"Chat {number}.\n\n{text}" for number in range(chats)]


def question(number: int) -> str:
    asked: tuple[str, ...] = import_module("first_token").QUESTIONS
    return asked[number % len(asked)]


class Ours:
    """Chats of one `Memory`."""

    def __init__(self, given: argparse.Namespace, folder: str) -> None:
        self.memory = Memory(
            folder,
            model="local",
            embedder="none",
            page_codec=given.codec,
            ram_budget=given.ram_budget,
            core_tokens=0,
        )
        self.engine: Any = self.memory._engine.provider
        self.texts: list[str] = []

    def turn(self, chat: int, number: int) -> dict[str, Any]:
        handle = self.memory.scope(user=f"user{chat}", session="s")
        started = time.perf_counter()
        stream = handle.chat(
            question(number), system=self.texts[chat], recall=False, remember=False, stream=True, max_tokens=2
        )
        next(iter(stream))
        seconds = time.perf_counter() - started
        for _ in stream:
            pass
        usage, cache = stream.reply.usage, stream.reply.cache
        in_place = cache.attended is not None
        return {
            "seconds": seconds,
            "cached": usage.cached_tokens,
            "tokens": usage.input_tokens,
            "in_place": in_place,
        }

    def ahead(self, chat: int) -> float:
        """Bring a chat's pages into RAM before its turn; its text is in no record, so they are named by their keys."""
        pages = self.memory._engine.pages
        return pages.swap_in(self.keys[chat]).seconds

    def note_keys(self) -> None:
        """Which pages are whose: of each chat, those that came with its first turn."""
        entries = self.memory.activation.entries()
        count = len(entries) // len(self.texts)
        assert count * len(self.texts) == len(entries), "every chat has as many pages"
        self.keys = [[e.key for e in entries[at : at + count]] for at in range(0, len(entries), count)]

    def held(self) -> int:
        return self.memory._engine.pages.bytes_mapped()


class Recomputing:
    """What one does without a store: the last chats' caches in RAM, the others computed again."""

    def __init__(self, given: argparse.Namespace, folder: str) -> None:
        from agentmem.provider import load

        self.engine: Any = load("local", {})
        self.texts: list[str] = []
        self._room = given.fit
        self._caches: OrderedDict[int, tuple[list[int], Any]] = OrderedDict()

    def turn(self, chat: int, number: int) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        engine = self.engine._ready()
        started = time.perf_counter()
        request = import_module("first_token").request
        tokens = list(engine.template.prompt(request(self.texts[chat], question(number), None).segments).tokens)
        known, cache = self._caches.pop(chat, ([], None))
        if cache is None:
            cache = DynamicCache()
        same = next((i for i, pair in enumerate(zip(known, tokens, strict=False)) if len({*pair}) > 1), len(known))
        if same < len(known):
            cache.crop(same - len(known))
        with torch.inference_mode():
            output = engine.loaded.model(
                input_ids=torch.tensor([tokens[same:]]), past_key_values=cache, use_cache=True, logits_to_keep=1
            )
        int(output.logits[0, -1].argmax())
        seconds = time.perf_counter() - started
        self._caches[chat] = tokens, cache
        while len(self._caches) > self._room:
            self._caches.popitem(last=False)
        return {"seconds": seconds, "cached": same, "tokens": len(tokens)}

    def held(self) -> int:
        caches = [cache for _, cache in self._caches.values()]
        return sum(part.nbytes for cache in caches for layer in cache.layers for part in (layer.keys, layer.values))


def child(given: argparse.Namespace) -> dict[str, Any]:
    """One system's turns, in this process."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        side: Any = Recomputing(given, folder) if given.child == "recomputing" else Ours(given, folder)
        side.texts = texts(side.engine, 1, 300)
        side.turn(0, 0)
        watch.restart()
        side.turn(0, 1)
        model, size = watch.peak, status("VmPeak")
        if given.child == "recomputing":
            side._caches.clear()
        else:
            side.memory.activation.evict()
        side.texts = texts(side.engine, given.chats, given.tokens)
        if given.limit:
            limit = size + given.limit + SLACK
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        watch.restart()
        begun = [side.turn(chat, 0) for chat in range(given.chats)]
        begin_peak = watch.peak
        if given.child == "swapped in ahead":
            time.sleep(0.2)  # a file that was written this very moment is not trusted yet
            side.note_keys()
        watch.restart()
        rows = []
        held = 0
        for number, order in enumerate(turns(given.chats, given.rounds), start=1):
            for chat in order:
                ahead = side.ahead(chat) if given.child == "swapped in ahead" else 0.0
                rows.append({**side.turn(chat, number), "ahead_s": ahead})
                held = max(held, side.held())
        return {
            "model_rss": model,
            "model_size": size,
            "peak_rss": watch.peak,
            "begin_peak_rss": begin_peak,
            "held": held,
            "begin_s": statistics.median(row["seconds"] for row in begun),
            "turn_s": statistics.median(row["seconds"] for row in rows),
            "turn_mean_s": statistics.mean(row["seconds"] for row in rows),
            "ahead_s": statistics.median(row["ahead_s"] for row in rows),
            "hits": sum(row["cached"] > 0.9 * given.tokens for row in rows),
            "turns": len(rows),
            "in_place": sum(row.get("in_place", False) for row in rows),
            "least_cached": min(row["cached"] for row in rows),
        }


def run(kind: str, given: argparse.Namespace, *, ram_budget: int, limit: int = 0) -> dict[str, Any]:
    """A child's result; a child that died for want of memory says so."""
    command = [sys.executable, __file__, "--child", kind, "--ram-budget", str(ram_budget), "--limit", str(limit)]
    for name in ("chats", "fit", "tokens", "rounds", "codec"):
        command += [f"--{name}", str(getattr(given, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["refused"] = done.stderr.count("can't be opened")
    return result


def chat_bytes(given: argparse.Namespace) -> int:
    """Bytes of one chat's pages, from a chat that was really written."""
    with tempfile.TemporaryDirectory() as folder:
        side = Ours(argparse.Namespace(codec=given.codec, ram_budget=None), folder)
        side.texts = texts(side.engine, 1, given.tokens)
        side.turn(0, 0)
        return sum(entry.bytes for entry in side.memory.activation.entries())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=10)
    parser.add_argument("--fit", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ram-budget", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(child(given)))
        return
    one = chat_bytes(given)
    budget = given.fit * one
    found = {kind: run(kind, given, ram_budget=budget) for kind in ("recomputing", "agentmem", "swapped in ahead")}
    room = budget + one
    found["agentmem under RLIMIT_AS"] = run("agentmem", given, ram_budget=budget, limit=room)
    found["control: budget of all chats under the same limit"] = run(
        "agentmem", given, ram_budget=given.chats * one, limit=room
    )
    base, ours = found["recomputing"], found["agentmem"]
    result: dict[str, Any] = {
        "chats": given.chats,
        "fit": given.fit,
        "tokens": given.tokens,
        "rounds": given.rounds,
        "codec": given.codec,
        "chat_bytes": one,
        "ram_budget": budget,
        "runs": found,
        "ratio": base["turn_s"] / ours["turn_s"],
        "ratio_of_means": base["turn_mean_s"] / ours["turn_mean_s"],
        "ratio_swapped_in": base["turn_s"] / found["swapped in ahead"]["turn_s"],
        "over_model": ours["peak_rss"] - ours["model_rss"],
    }
    print(f"{given.chats} chats of {given.tokens} tokens, {one / 1e6:.1f} MB each; RAM for {given.fit}")
    for kind, row in found.items():
        if "failed" in row:
            print(f"{kind}: {row['failed']}")
            continue
        print(
            f"{kind}: {row['turn_s'] * 1e3:.0f} ms to the first token (mean {row['turn_mean_s'] * 1e3:.0f}), "
            f"{row['hits']} of {row['turns']} turns found their prefix, "
            f"peak {(row['peak_rss'] - row['model_rss']) / 1e6:.1f} MB above the model's "
            f"{row['model_rss'] / 1e6:.0f} MB ({(row['begin_peak_rss'] - row['model_rss']) / 1e6:.1f} while the chats "
            "begin), "
            f"KV held {row['held'] / 1e6:.1f} MB, pages refused by the system {row['refused']}"
        )
    print(
        f"{result['ratio']:.1f}x less time a turn, {result['ratio_swapped_in']:.1f}x where swapped in ahead; "
        f"{result['over_model'] / 1e6:.1f} MB above the model, budget {budget / 1e6:.1f} MB"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
