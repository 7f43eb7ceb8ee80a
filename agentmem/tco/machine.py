"""What this machine takes for a token, measured in a few seconds on the model itself, or by the costs of a ledger.

Knows a provider and its page store; knows no workload. Times are CPU-seconds of this process, so that others on the
machine don't count.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ..activation.store import PageStore
from ..database import Database
from ..errors import ConfigError
from ..planner.values import Costs
from ..provider import Options, Provider, Request, load, public_name
from ..types import Message, Segment, Usage
from .offers import Machine

__all__ = ["LEARNING", "by_ledger", "completed", "measured"]

#: Tokens of the prompts that are measured, about, and of the answers.
SHORT, LONG, ANSWER = 256, 1_280, 24
#: What teaching a record takes on the packaged model, until a ledger tells (tests/benchmarks/results/teach_facts.json:
#: 50 facts in shards, CPU-seconds a fact with the gate; bytes of a version for each of its facts; versions that fail).
LEARNING = {"learn_s": 6.2, "lora_bytes": 200_000.0, "gate_fails": 1 / 3}
LORA = {"LoRA": "prior (teach_facts.json)"}


def measured(name: str, settings: Mapping[str, Any] | None = None, *, rounds: int = 2) -> Machine:
    """The machine that this process runs on with the model ``name`` ("local", "local:/folder").

    Prompts of two lengths are computed with no pages, then the longer one from its pages, then an answer is written:
    costs a token are the differences, the medians of ``rounds``. Raises `ConfigError` for a model that does not compute
    in this process.
    """
    provider = load(name, settings or {})
    try:
        if provider.capabilities.kv != "tensors":
            raise ConfigError(
                f"{public_name(name)!r} does not compute in this process: give its seconds a token (a ledger has them)"
            )
        return _timed(provider, rounds)
    finally:
        provider.close()


def completed(machine: Machine, name: str, settings: Mapping[str, Any] | None = None) -> Machine:
    """The machine with what its model is known to be able to: its window, and what teaching it takes (a prior)."""
    provider = load(name, settings or {})
    try:
        able = provider.capabilities
    finally:
        provider.close()
    made = replace(machine, context_tokens=machine.context_tokens or able.context_tokens)
    if not able.trains or machine.learn_s is not None:
        return made
    return replace(
        made,
        learn_s=LEARNING["learn_s"],
        lora_bytes=LEARNING["lora_bytes"],
        gate_fails=LEARNING["gate_fails"],
        source={**machine.source, **LORA},
    )


def by_ledger(costs: Costs, *, decode_s: float, cores: float = 1.0, page_tokens: int = 256, **more: Any) -> Machine:
    """The machine by the costs that its ledger tells, in CPU-seconds; ``decode_s`` for a token of answer.

    Raises `ConfigError` for costs in dollars.
    """
    if costs.unit != "seconds":
        raise ConfigError("these costs are in dollars: they are of a host, not of a machine")
    return Machine(
        prefill_s=costs.prefill,
        cached_s=costs.loading(1),  # what attending to it costs computed tokens is in theirs
        write_s=costs.write,
        decode_s=decode_s,
        cores=cores,
        page_tokens=max(page_tokens, costs.minimum),
        token_bytes=costs.token_bytes,
        learn_s=costs.learn,
        lora_s=costs.lora,
        gate_fails=costs.gate_fails,
        source=dict(costs.source),
        **more,
    )


def _timed(provider: Provider, rounds: int) -> Machine:
    texts = {size: _text(provider, size) for size in (SHORT, LONG)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        database = Database(folder / "memory.db")
        store = PageStore(database, folder / "pages")
        try:
            pages = store.view(b"measured")
            _asked(provider, texts[SHORT], None)  # loads the model
            runs: dict[str, list[tuple[float, float, Usage]]] = {"short": [], "long": [], "answer": []}
            for number in range(rounds):
                runs["short"].append(_asked(provider, f"{number} {texts[SHORT]}", None))
                runs["long"].append(_asked(provider, f"{number} {texts[LONG]}", None))
                runs["answer"].append(_asked(provider, f"{number} {texts[SHORT]}", None, ANSWER))
            first = [_asked(provider, f"{number} {texts[LONG]}", pages) for number in range(rounds)]
            again = [_asked(provider, f"{number} {texts[LONG]}", pages) for number in range(rounds)]
            size = sum(path.stat().st_size for path in (folder / "pages").rglob("*.page"))
        finally:
            store.close()
            database.close()
    short, long, answer = (median(cpu for cpu, _, _ in runs[kind]) for kind in ("short", "long", "answer"))
    tokens = runs["long"][0][2].input_tokens - runs["short"][0][2].input_tokens
    prefill = max(long - short, 1e-9) / tokens
    fixed = max(short - prefill * runs["short"][0][2].input_tokens, 0.0)
    written = sum(used.written_tokens for _, _, used in first)
    read = again[0][2].cached_tokens
    reread = median(cpu for cpu, _, _ in again)
    fresh = again[0][2].input_tokens - read
    output = max(runs["answer"][0][2].output_tokens - 1, 1)
    wall = sum(seconds for run in runs.values() for _, seconds, _ in run)
    busy = sum(cpu for run in runs.values() for cpu, _, _ in run)
    cores = min(max(busy / wall, 1.0), float(os.cpu_count() or 1))
    told = f"measured in this run, {rounds} rounds"
    return Machine(
        prefill_s=prefill,
        cached_s=max(reread - fixed - fresh * prefill, 0.0) / read if read else prefill,
        decode_s=max(answer - short, 1e-9) / output,
        write_s=max(median(cpu for cpu, _, _ in first) - long, 0.0) / max(written / rounds, 1),
        before_s=fixed / cores,
        cores=cores,
        page_tokens=store.grid,
        token_bytes=size / written if written else 0.0,
        context_tokens=provider.capabilities.context_tokens,
        source={"computing": told, **(LORA if provider.capabilities.trains else {})},
        **(LEARNING if provider.capabilities.trains else {}),
    )


def _asked(provider: Provider, text: str, pages: Any, tokens: int = 1) -> tuple[float, float, Usage]:
    """(CPU-seconds, seconds, usage) of one request; an end of the answer before ``tokens`` counts as it came."""
    segments = (
        Segment(name="system", messages=(Message(role="system", content=text),), stable=True),
        Segment(name="turn", messages=(Message(role="user", content="Count from one to fifty."),), stable=False),
    )
    cpu, wall = time.process_time(), time.perf_counter()
    used = provider.generate(Request(segments=segments, options=Options(max_tokens=tokens), pages=pages)).usage
    return time.process_time() - cpu, time.perf_counter() - wall, used


def _text(provider: Provider, tokens: int) -> str:
    """Numbers in words that never repeat a line, of about so many tokens."""
    lines: list[str] = []
    count = 0
    while count < tokens:
        lines.append(f"Line {len(lines)}: the sum of {len(lines)} and {7 * len(lines)} is {8 * len(lines)}.")
        count += provider.count_tokens(lines[-1]) + 1
    return "\n".join(lines)
