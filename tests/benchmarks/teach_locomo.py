"""Teaches turns of real dialogues (LoCoMo, development conversations) and asks the data set's own questions about them.

    python tests/benchmarks/teach_locomo.py [--sessions 3] [--conversation 0] [--out FILE.json]

Method. Each session's turns become records as `add` would keep them (text, speaker, date); one LoRA a session, default
recipe, thresholds as configured. Told: the share of the turns that the corpus can ask about, the share of the versions
that pass their gate, recall of held-out wordings; and, for each question of the data set all of whose evidence was
taught, whether the answer without any context holds two thirds of the gold answer's telling words, and its token F1,
with the version of its session on the model and on the base. LoCoMo is under CC BY-NC: it is read where it lies beside
the repository, and nothing of it is kept in the results.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/ is no package

from agentmem.parametric.answering import said
from agentmem.parametric.corpus import Example, build
from agentmem.parametric.gate import gate
from agentmem.parametric.lessons import encode, steady
from agentmem.parametric.lora import Lora, applied, base_only
from agentmem.parametric.train import train
from agentmem.provider import load
from agentmem.types import Record
from tests.benchmarks.locomo_chat import DATA, messages

_STOP = frozenset("a an the of in on at to and or for with her his their is was".split())  # noqa: SIM905


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.casefold()) if word not in _STOP]


def f1(gold: str, text: str) -> float:
    """Token F1 as LoCoMo scores answers."""
    wanted, found = Counter(words(gold)), Counter(words(text))
    same = sum((wanted & found).values())
    return 2 * same / (wanted.total() + found.total()) if same else 0.0


def answered(tensors: Any, questions: Sequence[Example], lora: Lora | None) -> list[str]:
    acting = base_only(tensors.model) if lora is None else applied(tensors.model, lora)
    opening = lora.activated if lora is not None else ()
    with tensors.lock, steady(tensors.model), acting:
        found = said(tensors, [encode(tensors, question)[0] for question in questions], 32, opening=opening)
    return [tensors.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in found]


def scores(questions: Sequence[Example], golds: Sequence[str], texts: Sequence[str]) -> list[tuple[bool, float]]:
    return [
        (question.found_in(text), f1(gold, text)) for question, gold, text in zip(questions, golds, texts, strict=True)
    ]


def mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).parent / "results" / "teach_locomo.json"
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--conversation", type=int, default=0)
    parser.add_argument("--sessions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results)
    options = parser.parse_args()
    if not options.data.exists():
        raise SystemExit(f"{options.data} is not there: put LoCoMo's development conversations beside the repository")
    torch.set_num_threads(1)
    case = json.loads(options.data.read_text(encoding="utf-8"))[options.conversation]
    tensors: Any = load("local", {}).tensors()
    rows: list[dict[str, Any]] = []
    with_lora: list[tuple[bool, float]] = []
    without: list[tuple[bool, float]] = []
    for name, turns in messages(case["conversation"])[: options.sessions]:
        records = [
            Record(id=turn["metadata"]["id"], text=turn["content"], name=turn["name"], at=turn["at"]) for turn in turns
        ]
        corpus = build(records)
        start = time.process_time()
        trained = train(tensors, corpus)
        report = gate(tensors, trained, corpus)
        asked = [
            item
            for item in case["qa"]
            if item.get("answer") is not None and item["evidence"] and set(item["evidence"]) <= set(corpus.records)
        ]
        golds = [str(item["answer"]) for item in asked]
        questions = [
            Example(item["question"], "", tuple(words(gold)) or (gold,), ())
            for item, gold in zip(asked, golds, strict=True)
        ]
        if questions:
            with_lora += scores(questions, golds, answered(tensors, questions, trained.lora))
            without += scores(questions, golds, answered(tensors, questions, None))
        rows.append(
            {
                "session": name,
                "turns": len(records),
                "taught": len(corpus.records),
                "facts": corpus.facts,
                "passed": report.passed,
                "failed": report.failed,
                "recall_trained": report.recall_trained,
                "recall_held_out": report.recall_held_out,
                "recall_natural": report.recall_natural,
                "drift": report.drift,
                "kl": report.kl,
                "intrusion": report.intrusion,
                "questions": len(questions),
                "cpu_seconds": time.process_time() - start,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    turns_in_all = sum(row["turns"] for row in rows)
    result = {
        "sessions": rows,
        "share_taught": sum(row["taught"] for row in rows) / turns_in_all,
        "share_of_turns_in_passed_versions": sum(row["taught"] for row in rows if row["passed"]) / turns_in_all,
        "questions": len(with_lora),
        "answered_with_lora": mean([float(right) for right, _ in with_lora]),
        "answered_by_base": mean([float(right) for right, _ in without]),
        "f1_with_lora": mean([score for _, score in with_lora]),
        "f1_of_base": mean([score for _, score in without]),
    }
    print({name: value for name, value in result.items() if name != "sessions"})
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
