"""One conversation of ten thousand turns: do its prompts, its memory and its time a turn stay flat?

    python tests/benchmarks/long_conversation.py [--turns 10000] [--data ../shared/data/locomo/locomo_dev.json]
    python tests/benchmarks/long_conversation.py --real --turns 300

What is said comes from the LoCoMo conversations, one after the other, round and round, each turn with its number, so
that no two are the same. Everything goes through `Memory.chat` with its defaults: search, layout, core, storing and
syncing are real. Without ``--real`` the model is a stand-in that keeps its prefix in steps of 256 tokens, says what was
said and reports seconds by the tokens that it would have had to compute (a millisecond each); with it, it is the
default local model, which answers with 8 tokens. Printed per tenth of the conversation: tokens of the prompt and those
computed, CPU-seconds and wall seconds of a turn, and the process's resident memory, what is its own and with files.
Flat is said of the last tenth against the second: the first is still filling. Results:
tests/benchmarks/results/long_conversation.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efficiency_systems import status  # type: ignore[import-not-found]
from efficiency_talk import DATA, talk  # type: ignore[import-not-found]

from agentmem import Memory
from agentmem.provider import Capabilities, Generation, Request
from agentmem.testing import ScriptedProvider
from agentmem.types import Usage

RESULTS = Path(__file__).parent / "results" / "long_conversation.json"
GRID, WINDOW = 256, 8192
SYSTEM = "You are a good friend of the user. You listen, you remember, and you answer briefly and warmly."
BUDGET = 1.15


class StandIn(ScriptedProvider):
    """Keeps the last prompt's prefix in whole steps; computes nothing, but says what that would have taken."""

    def __init__(self) -> None:
        capabilities = Capabilities(chat=True, kv="tensors", context_tokens=WINDOW, exact_tokens=True)
        super().__init__("", name="standin:words", capabilities=capabilities)
        self._last: list[str] = []
        self.reply = ""

    def generate(self, request: Request) -> Generation:
        words = [
            word
            for segment in request.segments
            for said in segment.messages
            for word in (said.role, *said.content.split())
        ]
        # Whole steps are compared, the last first: what a stand-in computes is not what is measured.
        whole = range((min(len(words) - 1, len(self._last)) // GRID) * GRID, 0, -GRID)
        cached = next((at for at in whole if words[:at] == self._last[:at]), 0)
        self._last = words
        first = 0.001 * (len(words) - cached) + 0.00005 * cached
        output = len(self.reply.split())
        usage = Usage(
            input_tokens=len(words),
            cached_tokens=cached,
            output_tokens=output,
            first_token_s=first,
            total_s=first + 0.02 * output,
        )
        return Generation(text=self.reply, usage=usage, finish_reason="stop")


def said(data: Path) -> Iterator[tuple[str, str]]:
    """What is said and answered, without end."""
    cases = range(len(json.loads(data.read_text("utf-8"))))
    every = [one for number in cases for one in talk(data, number, 0).turns]
    for number, one in enumerate(itertools.cycle(every), 1):
        yield f"{one.message} (This is turn {number}.)", one.reply


def run(given: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """A row for each turn."""
    host: Any = "local" if given.real else StandIn()
    now = [1.7e9]
    rows: list[dict[str, Any]] = []
    with Memory(folder, model=host, clock=lambda: now[0], **json.loads(given.settings)) as memory:
        chat = memory.scope(user="ana")
        for number, (message, reply) in enumerate(itertools.islice(said(Path(given.data)), given.turns)):
            now[0] += 60.0
            if not given.real:
                host.reply = reply
            cpu, at = time.process_time(), time.perf_counter()
            answer = chat.chat(message, system=SYSTEM, max_tokens=8 if given.real else None)
            row = {
                "prompt": answer.usage.input_tokens,
                "computed": answer.usage.input_tokens - answer.usage.cached_tokens,
                "seconds": time.perf_counter() - at,
                "cpu": time.process_time() - cpu,
            }
            if number % 20 == 0:
                row |= {"own": status("RssAnon"), "resident": status("RssAnon", "RssFile", "RssShmem")}
            rows.append(row)
            if number % 500 == 499 and given.loud:
                print(number + 1, {name: round(value, 4) for name, value in row.items()}, flush=True)
    return rows


def tenths(rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Means of each tenth; of memory the most."""
    size = len(rows) // 10
    parts = [rows[at : at + size] for at in range(0, size * 10, size)]
    names = ("prompt", "computed", "seconds", "cpu")
    return [
        {name: statistics.fmean(row[name] for row in part) for name in names}
        | {"longest": max(row["prompt"] for row in part)}
        | {name: max(row[name] for row in part if name in row) for name in ("own", "resident")}
        for part in parts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10_000)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--real", action="store_true", help="the default local model")
    parser.add_argument("--settings", default="{}", help="JSON: settings of agentmem other than the defaults")
    parser.add_argument("--loud", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS)
    given = parser.parse_args()
    if not Path(given.data).is_file():
        raise SystemExit(f"skipped: there is no {given.data}; give --data")
    if given.turns < 200:
        raise SystemExit("give 200 turns or more: a tenth has to hold some")
    with tempfile.TemporaryDirectory() as folder:
        rows = run(given, folder)
    parts = tenths(rows)
    for number, part in enumerate(parts, 1):
        print(
            f"tenth {number:2}: prompt {part['prompt']:6.0f} (longest {part['longest']:5}), computed "
            f"{part['computed']:5.0f}, {part['seconds'] * 1e3:7.1f} ms, CPU {part['cpu'] * 1e3:7.1f} ms, resident "
            f"{part['resident'] / 1e6:6.1f} MB ({part['own'] / 1e6:.1f} own)"
        )
    flat = {name: parts[-1][name] / parts[1][name] for name in parts[0]}
    print("last tenth to the second: " + "  ".join(f"{name} {value:.3f}" for name, value in flat.items()))
    grown = [name for name in ("prompt", "computed", "longest", "cpu", "resident") if flat[name] > BUDGET]
    print(f"flat within {BUDGET:g}:", "yes" if not grown else f"NOT in {', '.join(grown)}")
    result = {"turns": given.turns, "real": given.real, "tenths": parts, "last_to_second": flat}
    kept = json.loads(given.json.read_text("utf-8")) if given.json.is_file() else {}
    kept["local model" if given.real else "stand-in"] = result
    given.json.parent.mkdir(exist_ok=True)
    given.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
