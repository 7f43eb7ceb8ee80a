"""A memory whose consolidation makes its moves in milliseconds: scripted training, a provider that says it keeps KV
pages, costs that stand still. All else is real: plans, leases, cores, versions, files, rows.

`live` is a process that talks, forgets, changes and consolidates without end, saying what it did; for tests that kill
it.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from agentmem import Memory
from agentmem.planner.values import Costs
from tests.reliability.learner import Teachable, learning

__all__ = ["ASKED", "FACTS", "Everything", "consolidating", "live", "talk"]

#: What a small machine's tokens take, in seconds; training is so cheap that it pays after a few turns.
COSTS = Costs(
    unit="seconds",
    prefill=1e-3,
    cached=5e-5,
    write=5e-5,
    token_bytes=1000,
    minimum=16,
    learn=0.001,
    distil=1e6,
    source={"prefill": "told"},
)
FACTS = (
    "My dog is called Biscuit.",
    "I live in Tromsø.",
    "My favourite tea is sencha.",
    "My sister's name is Oona.",
    "My lucky number is 417.",
    "I work as a glaciologist.",
)
ASKED = (
    "What is my dog called?",
    "Where do I live?",
    "What is my favourite tea?",
    "What is my sister's name?",
    "What is my lucky number?",
)


class Everything(Teachable):
    """A scripted provider that says it shows its weights and keeps KV pages."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, kv="tensors", context_tokens=4096)


class Quick:
    """A clock of which four hours go by in a second, the same in every process that works on a folder: what was used
    for a few seconds was used for days."""

    def __init__(self, folder: Path | str) -> None:
        begun = Path(folder).with_suffix(".begun")
        if not begun.exists():
            begun.write_text(repr(time.time()))
        self._begun = float(begun.read_text())

    def __call__(self) -> float:
        """Now, in Unix seconds."""
        return 1_700_000_000.0 + 14_400 * (time.time() - self._begun)


@contextlib.contextmanager
def consolidating(folder: Path | str, *, learns: bool = True, **settings: Any) -> Generator[Memory]:
    """A memory over it. Without ``learns`` training costs too much to be planned."""
    told = COSTS if learns else replace(COSTS, learn=1e9)
    given: dict[str, Any] = {"page_tokens": 16, "core_tokens": 60, "embedder": "none", "lora_shard": 3, **settings}
    given.setdefault("clock", Quick(folder))
    with (
        learning(steps=2),
        mock.patch("agentmem.economics._measured", return_value=told),
        Memory(folder, model=Everything(), **given) as memory,
    ):
        yield memory


def talk(
    memory: Memory, questions: tuple[str, ...] = ASKED, times: int = 3, pause: Callable[[], object] = lambda: None
) -> None:
    """Ask in sessions of their own, as somebody would who forgets; only the uses are remembered."""
    for _ in range(times):
        handle = memory.scope(user="ana")
        for question in questions:
            handle.chat(question, remember=False)
            pause()


def live(folder: str, seed: int, connection: Connection) -> None:
    """Talk, add, forget, change and consolidate, until killed. Before each change it says what it will do, after it
    what is certain. An even seed learns nothing, so that what is used stands in the core block."""
    chance = random.Random(seed)
    with consolidating(folder, learns=bool(seed % 2)) as memory:
        for said in _changes(memory, chance):
            connection.send(json.dumps(said))


def _changes(memory: Memory, chance: random.Random) -> Iterator[dict[str, Any]]:
    ana = memory.scope(user="ana")
    number = chance.randrange(10**9)
    while True:
        number += 1
        held = [record.id for record in ana.list(limit=1000)]
        kind = chance.choice(["consolidate", "consolidate", "talk", "talk", "forget", "update"])
        kind = kind if len(held) >= 5 else "add"
        one = chance.choice(held or [""])
        yield {"doing": kind, "one": one}
        if kind == "add":
            text = [f"My {thing} is called Ob{number}{thing}." for thing in ("dog", "cat", "boat")]
            yield {"added": [record.id for record in ana.add([*text, *chance.sample(FACTS, 2)])]}
        elif kind == "talk":
            talk(memory, ("What is my dog called?", "What is my boat called?", *chance.sample(ASKED, 2)), times=2)
        elif kind == "forget":
            ana.forget(one)
            yield {"forgot": one}
            memory.consolidate()  # if it stood in the core block, that is to be chosen anew
        elif kind == "update":
            ana.update(one, text=f"My dog is called Ob{number}.")
        else:
            memory.consolidate()
            yield {"consolidated": True}
