"""One change of the training recipe at a time: what each costs and what it buys, on ten facts and the small model.

    python tests/benchmarks/lora_ablation.py [--rows NAME ...] [--out FILE.json] [--threads 1]

Method. The packaged SmolLM2-135M-Instruct learns ten invented facts once per row, in one process; a row differs from
"default" (`recipe_for`) in what its name says. "top layers alone" has no KL term, "KL alone" trains all layers; "plain"
acts on every token, all others from the opening of the answer on. What a row knows and disturbs is measured by the gate
(agentmem.parametric.gate: 40 unrelated and neighbour questions, 16 that nothing answers). CPU-seconds of the process,
for training and for the gate; other work on the machine raises them, so rows compare, not machines. The file is written
after each row, and rows that it already holds for the same facts are kept unless they are named.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from agentmem.parametric.corpus import build
from agentmem.parametric.gate import gate
from agentmem.parametric.recipe import recipe_for
from agentmem.parametric.train import train
from agentmem.provider import load
from agentmem.types import Record

FACTS = (
    "My cat is called Quibble.",
    "I live in Ghent.",
    "I'm allergic to shellfish.",
    "I work as a piano tuner.",
    "My favourite fruit is rambutan.",
    "My brother's name is Anselm.",
    "I drive a green Lada.",
    "I play the hurdy-gurdy.",
    "My bike is called Thunderbolt.",
    "My locker number is 8821.",
)

#: What each row changes.
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "KL weight 2": {"kl_weight": 2.0},
    "layers 1/2": {"layers": 0.5},
    "layers 1/3": {"layers": 1 / 3},
    "anchors 16": {"anchors": 16},
    "scale .9": {"scale": 0.9},
    "rank 16": {"rank": 16, "alpha": 32.0},
    "plain": {"activated": False},
    "top layers alone": {"kl_weight": 0.0},
    "KL alone": {"layers": 1.0},
    "KL weight 1": {"kl_weight": 1.0},
    "KL weight 8": {"kl_weight": 8.0},
    "threshold 0": {"threshold": 0.0},
    "threshold 0.3": {"threshold": 0.3},
    "rank 4": {"rank": 4, "alpha": 8.0},
    "rank 32": {"rank": 32, "alpha": 64.0},
    "MLP only": {"modules": "mlp"},
    "layers 1/6": {"layers": 1 / 6},
    "every anchor token": {"anchor_threshold": 0.0},
}
COLUMNS = (
    "recall_trained",
    "recall_held_out",
    "recall_natural",
    "drift",
    "kl",
    "intrusion",
    "neighbours",
    "unknown",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results" / "lora_ablation.json"
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="only these; measured anew")
    parser.add_argument("--out", type=Path, default=results, help="where the numbers go, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensors = load("local", {}).tensors()
    corpus = build([Record(id=f"r{i}", text=text) for i, text in enumerate(FACTS)])
    usual = recipe_for(sum(weight.numel() for weight in tensors.model.parameters()))
    about = {
        "model": tensors.name,
        "dtype": str(tensors.model.dtype),
        "threads": options.threads,
        "torch": torch.__version__,
        "facts": len(FACTS),
        "examples": len(corpus.examples),
        "anchors": len(corpus.anchors) + len(corpus.neighbours),
        "recipe": asdict(usual),
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows: dict[str, Any] = before.get("rows", {}) if before == {**about, "rows": before.get("rows", {})} else {}
    print(f"{'':20}" + "".join(f"{name.removeprefix('recall_'):>11}" for name in (*COLUMNS, "steps", "CPU-s", "MB")))
    for name in options.rows or [name for name in ROWS if name not in rows]:
        trained = train(tensors, corpus, recipe=replace(usual, **ROWS[name]))
        report = gate(tensors, trained, corpus)
        weights = sum(a.numel() + b.numel() for a, b in trained.lora.tensors.values())
        rows[name] = {
            **{column: getattr(report, column) for column in COLUMNS},
            "steps": len(trained.losses),
            "cpu_seconds": trained.cpu_seconds,
            "gate_cpu_seconds": report.cpu_seconds,
            "bytes": 2 * weights,
            "peak_bytes": trained.peak_bytes,
            "curve": [point.model_dump() for point in trained.curve],
        }
        cells = [rows[name][column] for column in COLUMNS]
        cells += [len(trained.losses), trained.cpu_seconds, 2 * weights / 1e6]
        print(f"{name:20}" + "".join(f"{cell:11.3g}" for cell in cells), flush=True)
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
