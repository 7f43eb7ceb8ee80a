"""Clocks that go back, stand in 1970 or in 9999; memories that are forked: order and content don't depend on them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from agentmem import Memory

DAY = 86_400.0


def test_order_is_that_of_arrival_whatever_the_clock_says(tmp_path: Path) -> None:
    moments = [1.79e9, 1.79e9 - 400 * DAY, 0.0, 1.79e9, 253_402_300_000.0, 0.5, 1.79e9]
    now = iter(moments)
    with Memory(tmp_path, embedder="hash", clock=lambda: current[0]) as memory:
        for number, moment in enumerate(now):
            current = [moment]
            memory.add(f"fact {number}", valid_until="2100-01-01")
        current = [1.79e9]
        texts = [f"fact {number}" for number in range(len(moments))]
        assert [record.text for record in memory.list()] == texts
        assert len({record.id for record in memory.list()}) == len(moments)
        assert len(memory.search("fact", k=20)) == len(moments)  # a clock that was set back ends no record
        seen: list[str] = []
        while page := memory.list(limit=2, after=seen[-1] if seen else None):
            seen += [record.id for record in page]
        assert seen == [record.id for record in memory.list()]
        current = [-1.0]
        memory.update(seen[0], "corrected before 1970")
        memory.forget(seen[1])
        assert memory.verify().problems == []
    with Memory(tmp_path, embedder="hash", clock=lambda: 0.0) as memory:
        assert [record.text for record in memory.list()] == ["corrected before 1970", *texts[2:]]


def test_both_sides_of_a_fork_go_on(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        memory.add("before")
        child = os.fork()
        if child == 0:
            good = False
            try:
                memory.add("in the child")
                good = len(memory.list()) >= 2
            finally:
                os._exit(0 if good else 1)
        memory.add("in the parent")
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(record.text for record in memory.list()) == ["before", "in the child", "in the parent"]
        assert memory.verify().problems == []


def test_threads_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="none") as memory:
        threads = [
            threading.Thread(target=lambda n=n: [memory.add(f"thread {n} fact {i}") for i in range(25)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({record.text for record in memory.list(limit=1_000)}) == 200
        assert memory.verify().problems == []
