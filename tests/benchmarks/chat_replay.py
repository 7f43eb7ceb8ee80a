"""A whole conversation, turn by turn, with the default local model: time and memory against transformers alone.

    python tests/benchmarks/chat_replay.py [--turns 32] [--lines 1] [--answer 32] [--codec int8] [--data ...]

A development conversation of LoCoMo is replayed as a chat: each turn says the next ``--lines`` lines of it, the model
answers with exactly ``--answer`` tokens (greedy; its end of turn is ignored, so that all do the same work), and
everything said stays in the history. agentmem gives a history two fifths of the model's window at most (3,276 tokens);
a chat that grows beyond is refused here, since the prompts would not be the same any more.
- agentmem: ``Memory(page_codec="int8")`` with its defaults, history from its records; recall is off, so that the
  prompts are the same as the others'. Pages are written, synced and looked up as always; the answer is stored.
- cache kept (baseline): transformers with one `DynamicCache` that lives as long as the chat; each turn it is cut back
  to what the new prompt begins with, and the rest is computed.
- no reuse (baseline): transformers with a new `DynamicCache` in every turn.
Each runs in a process of its own, one after the other. Time is the sum over all turns. Memory is counted in two ways:
the KV states that are held when the last answer ends (pages read in place, and the tail behind them; or the tensors
of the `DynamicCache`), and the peak of the process's RSS above what it had after one short chat. A restart before every
turn would cost the first of them nothing and the second the whole history; that is measured in first_token.py. Results
go to tests/benchmarks/results/chat_replay.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from agentmem import Memory
from agentmem.provider import load

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"
RESULTS = Path(__file__).parent / "results" / "chat_replay.json"
SYSTEM = "You are a friend of both. Comment on what they say, briefly."
SHORT = "Ana: Hello! I went to the market today and bought some apples. Ben: How nice, what will you make of them? "
KINDS = ("no reuse", "cache kept", "agentmem")


def said(given: argparse.Namespace) -> list[str]:
    """What each turn says."""
    case = json.loads(Path(given.data).read_text("utf-8"))[0]
    sessions = import_module("locomo_chat").messages(case["conversation"])  # beside this file
    lines = [f"{message['name']}: {message['content']}" for _, turns in sessions for message in turns]
    return ["\n".join(lines[at : at + given.lines]) for at in range(0, given.turns * given.lines, given.lines)]


class Ours:
    """A chat of a `Memory`."""

    def __init__(self, given: argparse.Namespace, folder: str) -> None:
        self.memory = Memory(
            folder, model="local", embedder="none", page_codec=given.codec, history_tokens=1 << 20, core_tokens=0
        )
        self._engine = self.memory._engine.provider._ready()  # type: ignore[union-attr]
        self._engine._ends = frozenset()  # every answer has its full length
        self._answer = given.answer
        self._attended: Any = None
        self.restart()

    def restart(self) -> None:
        self._chat = self.memory.scope(user="ana", session=f"s{time.monotonic_ns()}")

    def turn(self, message: str) -> dict[str, Any]:
        reply = self._chat.chat(message, system=SYSTEM, recall=False, max_tokens=self._answer)
        self._attended = getattr(reply.cache, "attended", None)
        usage = reply.usage
        self._tokens = usage.input_tokens + usage.output_tokens
        return {"prompt": usage.input_tokens, "cached": usage.cached_tokens, "answer": usage.output_tokens}

    def held(self) -> int:
        """KV bytes when the last answer ended: pages in place, and the tail behind them in steps of 32 tokens, which
        are one memory page of each head of the default model."""
        if self._attended is None:
            raise SystemExit("nothing was attended to in place: give a codec that is, and see the log")
        states = self._engine.states
        one = states.dtype.itemsize * sum(heads * (key + value) for heads, key, value in states.shapes)
        return int(self._attended.bytes + one * -(-(self._tokens - self._attended.tokens) // 32) * 32)

    def between(self) -> int:
        """KV bytes in RAM while nobody speaks."""
        return self.memory._engine.pages.bytes_mapped()


class Stock:
    """The same chat with transformers alone."""

    def __init__(self, given: argparse.Namespace, folder: str) -> None:
        provider: Any = load("local", {})
        self._engine = provider._ready()
        self._answer = given.answer
        self._keeps = given.child == "cache kept"
        self.restart()

    def restart(self) -> None:
        self._history: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
        self._known: list[int] = []
        self._cache: Any = None

    def turn(self, message: str) -> dict[str, Any]:
        import torch
        from transformers import DynamicCache

        tokenizer, model = self._engine.loaded.tokenizer, self._engine.loaded.model
        self._history.append({"role": "user", "content": message})
        prompt = tokenizer.apply_chat_template(self._history, add_generation_prompt=True)
        tokens: list[int] = list(prompt["input_ids"] if hasattr(prompt, "keys") else prompt)
        if self._cache is None or not self._keeps:
            self._cache, self._known = DynamicCache(), []
        pairs = enumerate(zip(self._known, tokens, strict=False))
        same = next((i for i, pair in pairs if len({*pair}) > 1), len(self._known))
        if same < len(self._known):
            self._cache.crop(same - len(self._known))
        answer: list[int] = []
        with torch.inference_mode():
            new = tokens[same:]
            while True:
                output = model(
                    input_ids=torch.tensor([new]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
                )
                answer.append(int(output.logits[0, -1].argmax()))
                if len(answer) == self._answer:
                    break
                new = answer[-1:]
        self._known = tokens + answer[:-1]
        self._history.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        return {"prompt": len(tokens), "cached": same, "answer": len(answer)}

    def held(self) -> int:
        return sum(part.nbytes for layer in self._cache.layers for part in (layer.keys, layer.values))

    def between(self) -> int:
        return self.held() if self._keeps else 0


def child(given: argparse.Namespace) -> dict[str, Any]:
    """One side's whole chat, in this process."""
    machine = import_module("small_machine")
    watch = machine.Watch()
    with tempfile.TemporaryDirectory() as folder:
        side: Any = Ours(given, folder) if given.child == "agentmem" else Stock(given, folder)
        side.turn(SHORT * 16)
        side.turn("And then?")
        side.restart()
        if given.child == "agentmem":
            side.memory.activation.evict()
        model = machine.status("VmRSS")
        watch.restart()
        rows = []
        for message in said(given):
            started = time.perf_counter()
            row = side.turn(message)
            rows.append({**row, "seconds": time.perf_counter() - started})
        return {
            "seconds": sum(row["seconds"] for row in rows),
            "model_rss": model,
            "peak_rss": watch.peak,
            "resident_rss": machine.status("VmRSS"),
            "held": side.held(),
            "between": side.between(),
            "turns": rows,
        }


def run(kind: str, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind]
    for name in ("turns", "lines", "answer", "codec", "data"):
        command += [f"--{name}", str(getattr(given, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=32)
    parser.add_argument("--lines", type=int, default=1)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--codec", default="int8")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        print(json.dumps(child(given)))
        return
    found = {kind: run(kind, given) for kind in KINDS}
    ours = found["agentmem"]
    for kind, row in found.items():
        for number, (mine, other) in enumerate(zip(ours["turns"], row["turns"], strict=True)):
            if abs(mine["prompt"] - other["prompt"]) > 0.02 * other["prompt"]:
                raise SystemExit(
                    f"turn {number}: {mine['prompt']} tokens against {other['prompt']} of {kind}: give fewer --turns"
                )
    result: dict[str, Any] = {"turns": given.turns, "answer": given.answer, "codec": given.codec, "runs": found}
    result["share"] = {
        kind: {
            "time": ours["seconds"] / row["seconds"],
            "held": ours["held"] / row["held"],
            "peak_rss": (ours["peak_rss"] - ours["model_rss"]) / (row["peak_rss"] - row["model_rss"]),
        }
        for kind, row in found.items()
        if kind != "agentmem"
    }
    for kind, row in found.items():
        last = row["turns"][-1]
        print(
            f"{kind}: {row['seconds']:.1f} s for {given.turns} turns, the last prompt {last['prompt']} tokens "
            f"({last['cached']} reused); KV {row['held'] / 1e6:.1f} MB at the end, {row['between'] / 1e6:.1f} between "
            f"turns; peak RSS {(row['peak_rss'] - row['model_rss']) / 1e6:.1f} MB above {row['model_rss'] / 1e6:.0f}"
        )
    for kind, share in result["share"].items():
        print(
            f"agentmem to {kind}: {1 - share['time']:.0%} less time, {1 - share['held']:.0%} less KV memory, "
            f"{1 - share['peak_rss']:.0%} less RSS above the model"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
