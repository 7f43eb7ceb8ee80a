"""Distils a core block into fewer KV states and measures what they know, against the block and other shortenings.

    python tests/benchmarks/trained_prefix.py [--out FILE.json] [--facts 40] [--parts 3,4,6] [--threads 1]

Method. The packaged SmolLM2-135M-Instruct; a head of the memory note and a core block of invented facts, laid out as
`chat` does. Every row is asked the same questions, in wordings that were not trained: some with the same words for what
is asked for, some in others altogether. "nats" is the log-likelihood of the gold answers per token; agreement = share
of their tokens at which a row expects the same next token as the whole head; KL(whole head || row) per token of the
whole head's own answers to unrelated questions. Rows of one length: the head cut to as many tokens; the states that the
questions attend to most, untrained (the choice of KVzip); states of the head's first tokens, trained with the teacher's
loss alone (as Cartridges begins, the same steps); ours. CPU-seconds of the process, without the gate's.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import time
from pathlib import Path
from typing import Any

import torch

from agentmem import distilling
from agentmem.parametric import prefix
from agentmem.parametric.corpus import build
from agentmem.parametric.prefix import Lesson, PrefixRecipe, States, TrainedStates
from agentmem.parametric.prefix_gate import UNRELATED, judge
from agentmem.provider import load
from agentmem.types import Record

_CALLED = (
    "dog Pickle, cat Saffron, boat Windhover, brother Leopold, sister Marguerite, dentist Dr. Abernathy, doctor "
    "Dr. Castellano, landlord Mr. Quigley, gym Bellweather, bank Sterna, mother Philippa, daughter Wren, son Caspian, "
    "horse Juniper, band Foxglove, neighbour Ibrahim, accountant Delphine, school Ashgrove, cafe Tamarind, uncle Otto"
)
_IS = (
    "favourite tea|lapsang souchong; favourite colour|vermilion; lucky number|362; bike lock code|9040; favourite film|"
    "Nostalghia; favourite composer|Sibelius; favourite dessert|nougat; parking spot|number 57; favourite season|"
    "early spring; shoe size|41; favourite city|Ljubljana; favourite book|Stoner"
)
_OTHERS = (
    "I live in Porvoo.",
    "I was born in Trieste.",
    "I'm allergic to shellfish.",
    "I work as a bookbinder.",
    "I drive a blue Lancia.",
    "I play the hurdy-gurdy.",
    "I collect enamel signs.",
    "I study Georgian on Thursdays.",
    "I teach swimming on Sundays.",
    "I hate coriander.",
)


def records(count: int) -> list[Record]:
    """The first ``count`` of the invented facts, kinds in turn."""
    called = ["My {} is called {}.".format(*one.split(" ", 1)) for one in _CALLED.split(", ")]
    are = ["My {} is {}.".format(*one.split("|")) for one in _IS.split("; ")]
    texts = [text for row in zip(called, [*are, *_OTHERS], strict=False) for text in row]
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    return [
        Record(id=f"r{i}", role="user", text=text, created=start + dt.timedelta(minutes=i))
        for i, text in enumerate(texts[:count])
    ]


class First(prefix._Run):
    """Starts from the states of the head's first tokens."""

    def chosen(self, tokens: int) -> States:
        return self.reader.read(self.head[:tokens])


def trained(tensors: Any, head: list[int], lessons: list[Lesson], tokens: int, *, how: str) -> TrainedStates:
    """A prefix made in one of the three ways."""
    ours = prefix._Run
    recipe = PrefixRecipe()
    if how == "chosen":
        recipe = PrefixRecipe(epochs=0.0, least_steps=0)
    elif how == "first":
        recipe, prefix._Run = PrefixRecipe(gold=0.0), First  # type: ignore[misc]
    try:
        return prefix.distil(tensors, head, lessons, tokens=tokens, recipe=recipe)
    finally:
        prefix._Run = ours  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser()
    results = Path(__file__).parent / "results" / "trained_prefix.json"
    parser.add_argument("--out", type=Path, default=results, help="where the numbers go, as JSON")
    parser.add_argument("--facts", type=int, default=40)
    parser.add_argument("--parts", default="3,4,6")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tensors = load("local:smollm2", {}).tensors()
    core = records(options.facts)
    heads = distilling._Heads(tensors, None, core)
    corpus = build(core)
    examples, _ = distilling._examples(corpus, core)
    lessons = heads.lessons(examples)
    asked = heads.lessons([*corpus.held_out, *corpus.natural])
    unrelated = heads.general(UNRELATED)
    head = heads.full
    print(f"{len(core)} facts, a head of {len(head)} tokens ({len(heads.nothing)} without the core block)")
    print(f"{len(lessons)} lessons; {len(asked)} questions, of which an even sample is asked\n")
    print(
        f"{'row':44}{'tokens':>7}{'part':>7}{'nats':>9}{'agreement':>11}{'KL unrelated':>14}{'passes':>8}{'CPU-s':>7}"
    )
    rows: list[dict[str, Any]] = []

    def told(name: str, held: int, nats: float) -> None:
        print(f"{name:44}{held:>7}{held / len(head):>7.0%}{nats:>9.3f}", flush=True)
        rows.append({"row": name, "tokens": held, "nats": nats})

    def report(name: str, made: TrainedStates, *, first: bool = False, cut: bool = False) -> None:
        short = heads.truncated(made.tokens)
        gate = judge(tensors, made, asked, unrelated, truncated=short, nothing=heads.nothing)
        if first:
            told("the whole head", len(head), gate.ll_full)
            told("without the core block", len(heads.nothing), gate.ll_none)
        if cut:
            told("the head cut to", len(short), gate.ll_truncated)
        print(
            f"{name:44}{made.tokens:>7}{made.tokens / len(head):>7.0%}{gate.ll_trained:>9.3f}{gate.agreement:>11.0%}"
            f"{gate.kl_unrelated:>14.3f}{'yes' if gate.passed else 'no':>8}{made.cpu_seconds:>7.0f}",
            flush=True,
        )
        rows.append(
            {
                "row": name,
                "tokens": made.tokens,
                "nats": gate.ll_trained,
                "agreement": gate.agreement,
                "kl_unrelated": gate.kl_unrelated,
                "passed": gate.passed,
                "failed": gate.failed,
                "cpu_seconds": made.cpu_seconds,
                "gate_cpu_seconds": gate.cpu_seconds,
            }
        )

    started = time.process_time()
    for number, part in enumerate(int(part) for part in options.parts.split(",")):
        tokens = len(head) // part // 16 * 16
        chosen = trained(tensors, head, lessons, tokens, how="chosen")
        report("states attended to most, untrained", chosen, first=not number, cut=True)
        if not number:
            report("its first states, trained (Cartridges)", trained(tensors, head, lessons, tokens, how="first"))
        report("agentmem: attended to most, trained", trained(tensors, head, lessons, tokens, how="ours"))
    result = {
        "benchmark": "trained_prefix",
        "facts": len(core),
        "head_tokens": len(head),
        "rows": rows,
        "cpu_seconds": time.process_time() - started,
        "torch": torch.__version__,
        "threads": options.threads,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
