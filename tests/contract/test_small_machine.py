"""Conversations take turns in less RAM than they need: nothing is computed again, and nothing stays mapped beside."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.activation import residency

pytestmark = pytest.mark.slow

CHATS = 3
TEXT = "The tram leaves the old harbour at seven, crosses the river twice, and stops where the market used to be. " * 26


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is let go of must go by itself: the collector may come late."""
    gc.disable()
    yield
    gc.enable()


def turn(memory: Memory, chat: int, question: str = "Where does it stop?") -> int:
    """Tokens of the prompt that came from pages."""
    handle = memory.scope(user=f"user{chat}", session="s")
    reply = handle.chat(question, system=f"{chat}. {TEXT}", recall=False, max_tokens=2)
    return reply.usage.cached_tokens


@pytest.mark.parametrize("codec", ["int8", "raw"])
def test_chats_take_turns_within_the_ram_budget(
    tmp_path: Path, codec: str, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "SETTLED_NS", -(1 << 62))
    one = 2 * 256 * 30 * 3 * 64 * 2 * (2 if codec == "raw" else 1)  # bytes of two pages, nearly
    budget = int(1.2 * one)
    with Memory(
        tmp_path / "m", model="local", embedder="none", core_tokens=0, page_codec=codec, ram_budget=budget
    ) as memory:
        pages = memory._engine.pages
        assert [turn(memory, chat) for chat in range(CHATS)] == [0] * CHATS
        # What was computed goes with its request; what is mapped came back from pages, to prefill the answers.
        assert pages.bytes_mapped() == pages.bytes_in_ram() <= budget
        assert pages.bytes() > budget
        for number in range(2):
            for chat in (0, 2, 1):
                memory._engine.provider.erase_slots()  # type: ignore[union-attr]  # pages are the subject
                assert turn(memory, chat, f"Question {number}?") == 512
                assert 0 < pages.bytes_mapped() == pages.bytes_in_ram() <= budget


def test_the_next_chat_is_swapped_in_while_another_one_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "SETTLED_NS", -(1 << 62))
    with Memory(tmp_path / "m", model="local", embedder="none", core_tokens=0, page_codec="int8") as memory:
        ana, ben = (memory.scope(user=name, session="s") for name in ("ana", "ben"))
        for name, handle in (("Ana", ana), ("Ben", ben)):
            handle.chat(f"{name} says: {TEXT} Where does it stop?", recall=False, max_tokens=2)
            handle.chat("And then?", recall=False, max_tokens=2)  # now the first message is a part of what is kept
        memory.activation.swap_out()
        assert memory._engine.pages.bytes_in_ram() == 0
        swapped: list[int] = []
        thread = threading.Thread(target=lambda: swapped.append(ben.activation.swap_in().pages))
        thread.start()
        ana.chat("And what was there before?", recall=False, max_tokens=8)
        thread.join()
        mine = len(ben.activation.entries())
        assert swapped == [mine]
        assert mine > 0
