"""What a live conversation keeps behind its last whole page: fewer tokens are computed, and not one bit changes."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem import Memory

pytestmark = pytest.mark.slow

LINES = [f"Turn {turn}: the market had {turn + 3} kinds of apples, what would you bake of them?" for turn in range(9)]


def talk(folder: Path, *, forgets: bool, codec: str = "raw") -> Iterator[Any]:
    """A conversation; one that ``forgets`` keeps nothing between its turns but whole pages."""
    settings: dict[str, Any] = {"page_codec": codec, "page_tokens": 128, "core_tokens": 0}
    with Memory(folder, model="local", embedder="none", **settings) as mem:
        ana = mem.scope(user="ana", session="s")
        for line in LINES:
            if forgets:
                mem._engine.provider.erase_slots()  # type: ignore[union-attr]
            yield ana.chat(line, recall=False, max_tokens=6)


def pages(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (folder / "pages").rglob("*.page")}


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_kept_states_change_no_bit_and_spare_tokens(tmp_path: Path, codec: str) -> None:
    kept = list(talk(tmp_path / "kept", forgets=False, codec=codec))
    fresh = list(talk(tmp_path / "fresh", forgets=True, codec=codec))
    assert [reply.text for reply in kept] == [reply.text for reply in fresh]
    assert pages(tmp_path / "kept") == pages(tmp_path / "fresh") != {}
    computed = [sum(r.usage.input_tokens - r.usage.cached_tokens for r in turns) for turns in (kept, fresh)]
    assert computed[0] < 0.75 * computed[1]
    # From the second turn on no more is computed than what is new: the answer before, the message, the template's own.
    for before, now in itertools.pairwise(kept[1:]):
        assert now.usage.cached_tokens >= before.usage.input_tokens - 60


def test_forgetting_lets_go_of_them(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", model="local", embedder="none", core_tokens=0) as mem:
        ana = mem.scope(user="ana", session="s")
        ana.chat(LINES[0], recall=False, max_tokens=4)
        reply = ana.chat(LINES[1], recall=False, max_tokens=4)
        tails = mem._engine.provider._engine.tails  # type: ignore[union-attr]
        assert tails._kept
        ana.forget(reply.records[0])
        assert not tails._kept
        ana.chat(LINES[2], recall=False, max_tokens=4)
        assert tails._kept
        ana.activation.swap_out()
        assert not tails._kept


def test_tenants_share_none(tmp_path: Path) -> None:
    with Memory(tmp_path / "m", model="local", embedder="none", core_tokens=0) as mem:
        one, other = (mem.scope(tenant=name, session="s") for name in ("a", "b"))
        system = "You are a baker who knows every kind of apple there is, and you answer briefly."
        for _ in range(2):
            one.chat(LINES[0], recall=False, max_tokens=4, system=system)
        assert other.chat(LINES[0], recall=False, max_tokens=4, system=system).usage.cached_tokens == 0


def test_the_newest_are_kept() -> None:
    module = importlib.import_module("agentmem.adapters.providers._local_kept")
    most, tails = module.MOST, module.Tails()
    rows = [(np.zeros((1, 3, 2)), np.zeros((1, 3, 2)))]

    def tail(*tokens: int, tenant: str = "t", start: int = 2) -> Any:
        return module.Kept(b"model", tenant, tokens, start, rows, 1.0)

    tails.keep(tail(1, 2, 3, 4, 5), 0)
    found = tails.find(b"model", "t", [1, 2, 3, 4, 9, 9], 2)
    assert found is not None
    assert found[1] == 2
    assert tails.find(b"model", "t", [1, 9, 3, 4, 5], 2) is None  # other tokens before it
    assert tails.find(b"model", "u", [1, 2, 3, 4, 5], 2) is None
    assert tails.find(b"other", "t", [1, 2, 3, 4, 5], 2) is None
    assert tails.find(b"model", "t", [1, 2, 3, 4, 5], 0) is None
    tails.keep(tail(1, 2, 3, 4, 5, 6), 0)  # goes on from the first, takes its place
    assert tails.drop() == 1
    tails.keep(tail(1, 2, 3), 0)  # of a turn that began before they were let go of
    assert tails.drop() == 0
    for number in range(most + 3):
        tails.keep(tail(number, 0, 7), 2)
        assert tails.find(b"model", "t", [0, 0, 7], 2) is not None  # the one in use stays
    assert tails.find(b"model", "t", [1, 0, 7], 2) is None
    assert tails.find(b"model", "t", [most + 2, 0, 7], 2) is not None
    assert tails.drop() == most


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_finds_no_lock_that_is_held() -> None:
    tails = importlib.import_module("agentmem.adapters.providers._local_kept").Tails()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with tails._lock:
            held.set()
            free.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(30)
    child = os.fork()
    if not child:
        os._exit(0 if tails._lock.acquire(timeout=5) else 1)
    free.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
