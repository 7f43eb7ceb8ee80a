"""What serving LoRA versions costs on the small model, and when recall lets one act.

    python tests/benchmarks/lora_serving.py [--facts 30] [--seed 0] [--out FILE.json]

Method. Weights are random (their values don't change the time) of the recipe's shape: rank 8 on every Linear of the top
third of the layers of the packaged SmolLM2-135M-Instruct. CPU time of the process (time.process_time), medians.
Swap: `Switch.activate` from one loaded version to another. Switch per request: the same question behind a prompt of
several pages, asked under the version that answered last against under another one, so that what KV pages are worth
counts too. Forward: one token of an answer, with 1 and 4 versions acting. Rows: eight requests with eight versions in
one batch against one by one. Gate: of facts drawn by ``--seed`` the share of questions on which the version acts, by
what is asked, in three stores: facts alone, amid other statements, amid earlier questions and their answers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # tests/ is no package

from agentmem import Memory
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.parametric.lessons import opening
from agentmem.parametric.lora import Lora, Switch, save
from agentmem.parametric.probes import UNRELATED, neighbours, unknown
from agentmem.plaintext.concerning import WEIGHED, concerned
from agentmem.provider import LoraRef, Options, Request, load
from agentmem.types import Message, Segment
from tests.benchmarks.invented_facts import draw

RESULTS = Path(__file__).parent / "results" / "lora_serving.json"
Row = dict[str, Any]
STATEMENTS = (
    "We went hiking on Sunday.",
    "I baked bread today.",
    "Maria moved to Berlin.",
    "Bob bought a new car.",
    "I like long walks.",
    "The meeting was moved to Monday.",
    "I'm thinking of a new phone.",
    "My neighbour plays the drums.",
    "We watched a film about whales.",
    "Tom is coming over tonight.",
    "The garden is blooming.",
    "I read a book on tea.",
    "Karl's dog barks a lot.",
    "I took the bus to work.",
    "Work was stressful.",
    "I had fish for dinner.",
)


def cpu_ms(work: Callable[[], Any], times: int) -> float:
    """Median CPU milliseconds of one call."""
    taken = []
    for _ in range(times):
        begun = time.process_time()
        work()
        taken.append(time.process_time() - begun)
    return 1e3 * statistics.median(taken)


def version(folder: Path, tensors: Any, seed: int, activated: tuple[int, ...]) -> LoraRef:
    """A version of the recipe's shape, too weak to end answers early."""
    chance = torch.Generator().manual_seed(seed)
    layers = len(tensors.model.get_decoder().layers)
    top = tuple(f"model.layers.{number}." for number in range(layers - layers // 3, layers))
    weights = {
        path: (
            torch.randn(8, module.in_features, generator=chance) * 0.01,
            torch.randn(module.out_features, 8, generator=chance) * 0.01,
        )
        for path, module in tensors.model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(top)
    }
    folder = folder / f"{seed}-{len(activated)}"
    digest = save(folder, Lora(8, 16.0, "measured", weights, activated=activated))
    return LoraRef(name=folder.name, digest=digest, path=str(folder), activated=activated)


def request(text: str, *loras: LoraRef, pages: Any = None, tokens: int = 1, head: str = "Be kind.") -> Request:
    """One question behind a stable head."""
    segments = (
        Segment(name="system", messages=(Message(role="system", content=head),), stable=True),
        Segment(name="turn", messages=(Message(role="user", content=text),), stable=False),
    )
    return Request(segments=segments, options=Options(max_tokens=tokens, temperature=0), loras=loras, pages=pages)


def serving(folder: Path) -> Row:
    """Swap, switch per request, forward and rows."""
    provider: Any = load("local", {})
    tensors = provider.tensors()
    spoken = tuple(opening(tensors))
    late = [version(folder, tensors, seed, spoken) for seed in range(8)]
    plain = [version(folder, tensors, seed, ()) for seed in range(8)]
    found: Row = {"bytes": sum(file.stat().st_size for file in Path(late[0].path).iterdir())}
    provider.generate(request("Hello", late[0]))
    switch: Switch = tensors.model._agentmem_switch
    for ref in (*late, *plain):
        switch.activate([ref])
    turns = iter(range(10**6))
    found["swap_ms"] = cpu_ms(lambda: switch.activate([late[next(turns) % 2]]), 40)
    found["swap_sum_of_4_ms"] = cpu_ms(lambda: switch.activate(late[:4] if next(turns) % 2 else late[4:]), 40)
    head = "You know all about the house rules. " * 90
    database = Database(folder / "memory.db")
    store = PageStore(database, folder / "pages", grid=256)
    pages = store.view(b"measured")

    def ask(ref: LoraRef) -> None:
        provider.generate(request("Hi", ref, pages=pages, head=head))

    def write(refs: Sequence[LoraRef], count: int) -> None:
        provider.generate(request("Tell me a story.", *refs, tokens=count))

    for kind, refs in (("activated", late), ("plain", plain)):
        ask(refs[0])
        same = cpu_ms(partial(ask, refs[0]), 7)
        other = statistics.median(cpu_ms(partial(ask, ref), 1) for ref in refs[1:6])
        found[f"request_{kind}_ms"] = {"same version": same, "first under another": other, "switch": other - same}
    store.close()
    database.close()
    engine = provider._ready()
    engine._ends = frozenset()
    forward: Row = {}
    for name, refs in {"base": [], "1 plain": plain[:1], "1": late[:1], "4 plain": plain[:4], "4": late[:4]}.items():
        short, long = (cpu_ms(partial(write, refs, count), 3) for count in (2, 26))
        forward[name] = (long - short) / 24
    found["token_ms"] = forward
    found["token_ratio"] = {name: taken / forward["base"] for name, taken in forward.items()}
    asks = [request("Tell me a story.", ref, tokens=16) for ref in late]
    one = cpu_ms(lambda: [provider.generate(ask) for ask in asks], 2)
    batch = cpu_ms(lambda: provider.generate_batch(asks), 2)
    base = cpu_ms(lambda: provider.generate_batch([replace(ask, loras=()) for ask in asks]), 2)
    found["rows_ms"] = {"one by one": one, "batch": batch, "batch of the base": base, "ratio": one / batch}
    provider.close()
    return found


def gating(count: int, seed: int) -> Row:
    """The share of questions on which a version that learnt all facts acts, and on which its fact is found."""
    facts = draw(count, seed)
    found: Row = {}
    for store in ("facts alone", "amid statements", "amid questions"):
        with Memory(":memory:") as memory:
            ana = memory.scope(user="ana")
            records = [ana.add(fact.statement)[0] for fact in facts]
            corpus = build(records)
            if store != "facts alone":
                ana.add(list(STATEMENTS))
            if store == "amid questions":
                earlier = memory.scope(user="ana", session="earlier")
                for example in (*corpus.held_out[::2], *corpus.natural[::3]):
                    earlier.add(
                        [
                            {"role": "user", "content": example.question},
                            {"role": "assistant", "content": example.answer},
                        ]
                    )
            own = [Example(f.natural, "", (), (r.id,)) for f, r in zip(facts, records, strict=True)]
            found[store] = _acts(ana, corpus, own)
    return found


def _acts(ana: Any, corpus: Corpus, own: Sequence[Example]) -> Row:
    learnt = set(corpus.records)
    asked: dict[str, Sequence[Example]] = {
        "held-out": corpus.held_out,
        "reworded": corpus.natural,
        "the author's own": own,
        "neighbours": neighbours(corpus, 60),
        "unrelated": [Example(question, "", (), ()) for question in UNRELATED],
        "unknown": unknown(corpus, 12),
    }
    found: Row = {}
    for kind, examples in asked.items():
        hits = [(e, concerned(e.question, ana.search(e.question, k=WEIGHED), learnt)) for e in examples]
        row: Row = {"questions": len(hits), "acts": sum(bool(ids) for _, ids in hits) / max(len(hits), 1)}
        if any(e.records for e, _ in hits):
            row["on its record"] = sum(not set(e.records).isdisjoint(ids) for e, ids in hits) / len(hits)
            row["records per question"] = statistics.fmean(len(ids) for _, ids in hits)
        found[kind] = row
    return found


def main() -> None:
    """Print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {"serving": serving(Path(folder)), "gating": gating(given.facts, given.seed), "seed": given.seed}
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
