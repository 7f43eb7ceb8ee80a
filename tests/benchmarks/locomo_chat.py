"""The whole loop on real conversations: feed one, end the process, ask in a new one, restart, ask again.

    python tests/benchmarks/locomo_chat.py [--data ../shared/data/locomo/locomo_dev.json] [--questions 3]

Process 1 adds the first LoCoMo conversation, session by session (no model is loaded). Process 2 asks questions by
``chat`` with the local model; process 3 asks more. Prints, per turn, what was recalled and how many prompt tokens came
from KV pages. Exits with 1 if a turn recalled nothing, or if no prefix was cached on the second turn or on the first
turn after the restart.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from agentmem import Memory

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "locomo" / "locomo_dev.json"


def messages(conversation: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(session name, its messages) in order."""
    sessions = []
    for number in sorted(int(k.split("_")[1]) for k in conversation if re.fullmatch(r"session_\d+", k)):
        said = dt.datetime.strptime(conversation[f"session_{number}_date_time"], "%I:%M %p on %d %B, %Y")
        turns = [
            {
                "role": "user",
                "name": turn["speaker"],
                "content": " ".join(
                    part
                    for part in (
                        turn["text"],
                        f"[shares a photo: {turn['blip_caption']}]" if turn.get("blip_caption") else "",
                    )
                    if part
                ),
                "at": said.isoformat(),
                "metadata": {"id": turn["dia_id"]},
            }
            for turn in conversation[f"session_{number}"]
        ]
        sessions.append((f"session_{number}", turns))
    return sessions


def feed(folder: str, data: str) -> None:
    case = json.loads(Path(data).read_text(encoding="utf-8"))[0]
    with Memory(folder) as memory:
        friends = memory.scope(user=case["sample_id"])
        for name, turns in messages(case["conversation"]):
            friends.scope(session=name).add(turns)
        print(f"fed {friends.plaintext.count()} turns of {case['sample_id']}")


def ask(folder: str, data: str, first: int, count: int) -> None:
    case = json.loads(Path(data).read_text(encoding="utf-8"))[0]
    with Memory(folder, model="local") as memory:
        chat = memory.scope(user=case["sample_id"])
        for number, item in enumerate(case["qa"][first : first + count], start=1):
            reply = chat.chat(item["question"], max_tokens=24)
            row = {"turn": number, "recalled": len(reply.recalled), "cached": reply.usage.cached_tokens}
            print(
                f"  {item['question']} -> {' '.join(reply.text.split())[:70]!r}\n    {reply.usage}\n  {json.dumps(row)}"
            )
        print(memory.report())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--questions", type=int, default=3)
    parser.add_argument("--step", choices=["feed", "ask"])
    parser.add_argument("--folder")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    if options.step == "feed":
        feed(options.folder, options.data)
        return 0
    if options.step == "ask":
        ask(options.folder, options.data, options.first, options.questions)
        return 0
    rows: list[list[dict[str, int]]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = [
            sys.executable,
            __file__,
            "--data",
            options.data,
            "--folder",
            folder,
            "--questions",
            str(options.questions),
        ]
        steps = (["--step", "feed"], ["--step", "ask"], ["--step", "ask", "--first", str(options.questions)])
        for label, step in zip(("feed", "first process that asks", "after the restart"), steps, strict=True):
            print(f"== {label}", flush=True)
            done = subprocess.run([*base, *step], capture_output=True, text=True, check=True)
            print(done.stdout, end="", flush=True)
            rows.append([json.loads(line) for line in done.stdout.splitlines() if line.startswith('  {"turn"')])
    _, before, after = rows
    good = all(row["recalled"] > 0 for row in before + after) and before[1]["cached"] > 0 and after[0]["cached"] > 0
    print(
        "recalled on every turn, cached on the second turn and on the first after the restart:", "yes" if good else "NO"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
