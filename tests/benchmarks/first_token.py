"""Time to the first token with and without reuse of a prompt's KV states, on the default local model.

    python tests/benchmarks/first_token.py [--rounds 5] [--prefix 2048 4096 7680] [--codec raw int8]

For each length of prefix, which is a whole number of pages (one that ends inside a page computes the rest of it again,
128 tokens on average), with another question of about 40 tokens in every round:
- no reuse (the baseline): the whole prompt is computed;
- stock live reuse: what transformers' users do today: the prefix's `DynamicCache` is kept in memory, copied for each
  question (generation writes into it), and the question computed on the copy;
- stock live, cut back: the same without the copy: the very cache takes the question, and is cut back to the prefix
  after the clock stopped. The fastest that stock transformers can be, for one question at a time;
- live reuse: the prefix was computed earlier in this process and is read from its KV pages;
- restored: the same, in a new process per round. Importing and loading the model, and one short unrelated answer to
  warm it up, are not counted: a process does that once.
The last two with every codec: raw pages are copied into the model's cache, int8 pages are attended to in place. All
are measured in turn, round by round; medians are printed, and ratios to the baseline of the same run. Page files
are in the operating system's cache, as after a restart of a program (not of the machine). Text is the documentation of
Python's own library.

Then the price of a miss: a prompt of the first length that meets an empty store, answered with 16 tokens, its pages
written and synced, against the same with activation memory off. Results go to
tests/benchmarks/results/first_token.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.provider import Options, Provider, Request, load
from agentmem.types import Message, Segment

RESULTS = Path(__file__).parent / "results" / "first_token.json"
MODULES = ("argparse", "logging", "pathlib", "datetime", "collections", "threading", "subprocess", "json", "decimal")
QUESTIONS = (
    "From the documentation above, name one function that you would use to read a value from a file, say what it "
    "returns when there is nothing left to read, and give an example of at most two lines.",
    "Which of the classes described above may be used from several threads at the same time, and what has the caller "
    "to take care of when one of them raises an exception half-way? Please answer shortly.",
    "Choose any one of the parameters that are explained above, say what its default value is, and tell me what would "
    "go wrong in a larger program if somebody changed it without looking at the other ones.",
    "Explain to a person who has never programmed what the very first part of the text above is about, in one "
    "sentence without any technical word, and then in a second one with as many as you like.",
    "What do the parts of the text above have in common, what sets the last one apart from the others, and in which "
    "order would you read them if you only had ten minutes before a first day at work?",
)


def passage(provider: Provider, tokens: int) -> str:
    """Documentation of Python's library, of about so many tokens."""
    parts: list[str] = []
    length = 0
    for name in MODULES:
        module = import_module(name)
        for member in (
            module,
            *(value for _, value in sorted(vars(module).items()) if inspect.isroutine(value) or inspect.isclass(value)),
        ):
            text = inspect.getdoc(member)
            if not text or text in parts:
                continue
            count = provider.count_tokens(text)
            if length + count > tokens:
                text = text[: max(0, tokens - length) * len(text) // count]
            parts.append(text)
            length += count
            if length >= tokens:
                return "\n\n".join(parts)
    raise SystemExit(f"this Python's documentation has only {length} tokens in {', '.join(MODULES)}")


def cut(provider: Any, text: str, tokens: int) -> str:
    """The beginning of a text with which the stable part of the prompt has so many tokens, or a few more."""
    template, low, high = provider._ready().template, 0, len(text)
    while low < high:
        middle = (low + high) // 2
        if template.prompt(request(text[:middle], "Hello!", None).segments).stable < tokens:
            low = middle + 1
        else:
            high = middle
    return text[:low]


def request(text: str, question: str, pages: Any) -> Request:
    segments = (
        Segment(name="system", messages=(Message(role="system", content=text),), stable=True),
        Segment(name="turn", messages=(Message(role="user", content=question),), stable=False),
    )
    return Request(segments=segments, options=Options(max_tokens=1), pages=pages)


def measure(provider: Provider, text: str, question: str, pages: Any) -> dict[str, Any]:
    usage = provider.generate(request(text, question, pages)).usage
    return {"seconds": usage.first_token_s, "tokens": usage.input_tokens, "cached": usage.cached_tokens}


class Pages:
    """The page store in a folder, open inside ``with``."""

    def __init__(self, folder: Path, codec: Any) -> None:
        self._folder = folder
        self._codec = codec

    def __enter__(self) -> Any:
        self._database = Database(self._folder / "memory.db")
        self._store = PageStore(self._database, self._folder / "pages", codec=self._codec)
        return self._store.view(b"benchmark")

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._database.close()


def restored(folder: Path, question: str, codec: str) -> dict[str, Any]:
    """The measurement in a new process, which is this file with ``--restore``."""
    command = [sys.executable, __file__, "--restore", str(folder), "--question", question, "--codec", codec]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def in_new_process(folder: Path, question: str, codec: str) -> None:
    provider = load("local", {})
    with Pages(folder, codec) as pages:
        text = (folder / "text").read_text("utf-8")
        measure(provider, "Be brief.", "Hello!", pages)  # an unrelated prompt: nothing of it is reused
        json.dump(measure(provider, text, question, pages), sys.stdout)


class Stock:
    """Today's practice: the prefix's cache kept as an object, copied for every question."""

    def __init__(self, provider: Any, text: str) -> None:
        import torch
        from transformers import DynamicCache

        self._torch, self._engine = torch, provider._ready()
        self._prefix = self._tokens(text, "")
        ends = [
            i
            for i, pair in enumerate(zip(self._prefix, self._tokens(text, "Hello!"), strict=False))
            if len({*pair}) > 1
        ]
        self._prefix = self._prefix[: ends[0] if ends else len(self._prefix)]
        self._cache = DynamicCache()
        for start in range(0, len(self._prefix), 512):
            self._forward(self._prefix[start : start + 512], self._cache)

    def _tokens(self, text: str, question: str) -> list[int]:
        return list(self._engine.template.prompt(request(text, question, None).segments).tokens)

    def _forward(self, tokens: list[int], cache: Any) -> Any:
        with self._torch.inference_mode():
            ids = self._torch.tensor([tokens], device=self._engine.loaded.device)
            return self._engine.loaded.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def measure(self, text: str, question: str, *, copied: bool) -> dict[str, Any]:
        started = time.perf_counter()
        tokens = self._tokens(text, question)
        assert tokens[: len(self._prefix)] == self._prefix
        cache = copy.deepcopy(self._cache) if copied else self._cache
        output = self._forward(tokens[len(self._prefix) :], cache)
        int(output.logits[0, -1].argmax())
        seconds = time.perf_counter() - started
        if not copied:
            cache.crop(len(self._prefix) - len(tokens))
        return {"seconds": seconds, "tokens": len(tokens), "cached": len(self._prefix)}


def label(kind: str, codec: str) -> str:
    """What a row of these pages is called; raw ones have the plain name."""
    return kind if codec == "raw" else f"{codec} {kind}"


def run(provider: Provider, tokens: int, rounds: int, codecs: list[str]) -> dict[str, Any]:
    text = cut(provider, passage(provider, tokens + 64), tokens)
    kinds: dict[str, list[dict[str, Any]]] = {"no reuse": [], "stock live reuse": [], "stock live, cut back": []}
    kinds |= {label(kind, codec): [] for codec in codecs for kind in ("live reuse", "restored")}
    with contextlib.ExitStack() as stack:
        folders = {codec: Path(stack.enter_context(tempfile.TemporaryDirectory())) for codec in codecs}
        stores = {codec: stack.enter_context(Pages(folder, codec)) for codec, folder in folders.items()}
        for codec, pages in stores.items():
            (folders[codec] / "text").write_text(text, "utf-8")
            provider.generate(request(text, "Hello!", pages))
        stock = Stock(provider, text)
        for number in range(rounds):
            question = QUESTIONS[number % len(QUESTIONS)]
            kinds["no reuse"].append(measure(provider, text, question, None))
            kinds["stock live reuse"].append(stock.measure(text, question, copied=True))
            kinds["stock live, cut back"].append(stock.measure(text, question, copied=False))
            for codec, pages in stores.items():
                kinds[label("live reuse", codec)].append(measure(provider, text, question, pages))
                kinds[label("restored", codec)].append(restored(folders[codec], question, codec))
        size = {
            codec: sum(path.stat().st_size for path in (folder / "pages").glob("*.page"))
            for codec, folder in folders.items()
        }
    medians = {kind: statistics.median(item["seconds"] for item in items) for kind, items in kinds.items()}
    base, last = medians["no reuse"], kinds[label("restored", codecs[0])]
    return {
        "prefix": tokens,
        "prompt": statistics.median(item["tokens"] for item in last),
        "cached": statistics.median(item["cached"] for item in last),
        "page_bytes": size[codecs[0]],
        "bytes_by_codec": size,
        "median_s": medians,
        "ratio": {kind: base / seconds for kind, seconds in medians.items()},
        "to_stock": {
            kind: {stock: medians[stock] / seconds for stock in ("stock live reuse", "stock live, cut back")}
            for kind, seconds in medians.items()
            if kind.endswith(("live reuse", "restored")) and not kind.startswith("stock")
        },
        "runs_s": {kind: [item["seconds"] for item in items] for kind, items in kinds.items()},
    }


def price_of_a_miss(provider: Provider, tokens: int, rounds: int, codec: str) -> dict[str, Any]:
    """The same run with an empty store and with none, in turn."""
    text = passage(provider, tokens)
    seconds: dict[str, list[float]] = {"off": [], "no hit": []}
    for number in range(rounds):
        asked = request(f"{number}. {text}", QUESTIONS[number % len(QUESTIONS)], None)
        with tempfile.TemporaryDirectory() as name, Pages(Path(name), codec) as pages:
            for kind, given in (("off", None), ("no hit", pages))[:: 1 if number % 2 else -1]:
                started = time.perf_counter()
                usage = provider.generate(replace(asked, pages=given, options=Options(max_tokens=16))).usage
                seconds[kind].append(time.perf_counter() - started)
                assert usage.cached_tokens == 0
                assert bool(usage.written_tokens) == (given is not None)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {"prompt": tokens, "median_s": medians, "ratio": medians["no hit"] / medians["off"], "runs_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefix", type=int, nargs="+", default=[2048, 4096, 7680])
    parser.add_argument("--codec", nargs="+", default=["raw", "int8"])
    parser.add_argument("--restore", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--question", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.restore is not None:
        in_new_process(given.restore, given.question, given.codec[0])
        return
    provider = load("local", {})
    measure(provider, "Be brief.", "Hello!", None)
    import torch

    tensors = provider.tensors()
    results = [run(provider, tokens, max(3, given.rounds), given.codec) for tokens in given.prefix]
    miss = price_of_a_miss(provider, given.prefix[0], max(3, given.rounds), given.codec[0])
    machine = {
        "model": provider.name,
        "dtype": str(tensors.dtype),
        "device": str(tensors.device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "rounds": max(3, given.rounds),
        "codec": given.codec,
    }
    print(
        f"{provider.name} in {tensors.dtype}, {machine['threads']} of {machine['cores']} cores; "
        f"medians of {machine['rounds']}"
    )
    for result in results:
        print(f"{result['prompt']:.0f} tokens, {result['cached']:.0f} of them from pages")
        for kind, seconds in result["median_s"].items():
            stock = "".join(f", {ratio:.2f} x {name}" for name, ratio in result["to_stock"].get(kind, {}).items())
            print(f"  {kind:22} {seconds:8.3f} s, {result['ratio'][kind]:6.1f} x no reuse{stock}")
    print(f"a run without any hit takes {miss['ratio']:.3f} of the same run with activation memory off")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine, "results": results, "miss": miss}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
