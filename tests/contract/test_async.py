"""The async face: the same signatures, the same results, and what only it has: cancellation and many tasks at once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from agentmem import AgentMemError, AsyncMemory, InvalidInput, Memory, NotFound, Unavailable, async_memory, memory
from agentmem.provider import Generation, Request
from agentmem.testing import FakeClock, ScriptedProvider

PAIRS = ["Memory", "ScopedMemory", "Plaintext", "Activation", "Parametric"]


def public(cls: type) -> dict[str, Any]:
    return {name: getattr(cls, name) for name in dir(cls) if not name.startswith("_")}


def shape(verb: Any) -> list[tuple[str, object, object]]:
    if isinstance(verb, property):
        return []
    return [(p.name, p.kind, p.default) for p in inspect.signature(verb).parameters.values()]


@pytest.mark.parametrize("name", PAIRS)
def test_both_faces_have_the_same_verbs_and_parameters(name: str) -> None:
    sync, asynchronous = public(getattr(memory, name)), public(getattr(async_memory, f"Async{name}"))
    assert sync.keys() == asynchronous.keys()
    for verb in sync:
        assert shape(sync[verb]) == shape(asynchronous[verb]), verb
        assert inspect.getdoc(sync[verb]) == inspect.getdoc(asynchronous[verb]), verb


@pytest.fixture
async def mem(tmp_path: Path) -> AsyncIterator[AsyncMemory]:
    provider = ScriptedProvider("Noted, thank you.")
    async with AsyncMemory(tmp_path / "memory", model=provider, embedder="hash", clock=FakeClock()) as opened:
        yield opened


def summary(hits: Iterable[Any]) -> list[str]:
    return [hit.record.text for hit in hits]


async def test_one_scenario_on_both_faces(tmp_path: Path, mem: AsyncMemory) -> None:
    sync = Memory(tmp_path / "sync", model=ScriptedProvider("Noted, thank you."), embedder="hash", clock=FakeClock())
    texts = ["I'm allergic to peanuts.", "My dog is called Biscuit.", "I live in Porto."]
    with sync:
        a, b = sync.scope(user="ana", session="s"), mem.scope(user="ana", session="s")
        first, second = a.add(texts), await b.add(texts)
        assert [r.text for r in first] == [r.text for r in second]
        assert summary(a.search("dog", k=2)) == summary(await b.search("dog", k=2))
        one, two = a.chat("What is my dog called?"), await b.chat("What is my dog called?")
        assert (one.text, one.usage.input_tokens, summary(one.recalled)) == (
            two.text,
            two.usage.input_tokens,
            summary(two.recalled),
        )
        assert a.context("dog").text == (await b.context("dog")).text
        a.update(first[0].id, text="new")
        await b.update(second[0].id, text="new")
        assert len(a.history(first[0].id)) == len(await b.history(second[0].id)) == 2
        assert len(a.forget(first[1].id).records) == len((await b.forget(second[1].id)).records) == 1
        assert [r.text for r in a.list()] == [r.text for r in await b.list()]
        assert (await b.get(second[0].id)).text == "new"
        assert a.export(tmp_path / "a") == await b.export(tmp_path / "b")
        assert await b.load(tmp_path / "b") == 0
        assert [line.uses for line in a.report().lines] == [line.uses for line in (await b.report()).lines]
        assert (await mem.verify()).ok


async def test_streaming(mem: AsyncMemory) -> None:
    async with await mem.chat("Hello", stream=True) as stream:
        pieces = [piece async for piece in stream]
        assert len(pieces) > 1
        assert (await stream.reply()).text == "".join(pieces) == "Noted, thank you."
    assert len(await mem.list()) == 2


async def test_a_stream_left_early_is_not_remembered(mem: AsyncMemory) -> None:
    async with await mem.chat("Hello", stream=True) as stream:
        async for _ in stream:
            break
    assert await mem.list() == []
    with pytest.raises(AgentMemError, match="closed"):
        await stream.reply()


async def test_errors_are_the_same(mem: AsyncMemory) -> None:
    with pytest.raises(InvalidInput):
        await mem.add("")
    with pytest.raises(NotFound):
        await mem.get("0" * 32)


async def test_many_tasks_lose_nothing(mem: AsyncMemory) -> None:
    await asyncio.gather(*(mem.scope(user=f"u{n % 5}").add(f"fact {n}") for n in range(60)))
    assert len(await mem.list()) == 60
    replies = await asyncio.gather(*(mem.scope(user=f"u{n}").chat("fact?") for n in range(5)))
    assert all(hit.record.scope.user == f"u{n}" for n, reply in enumerate(replies) for hit in reply.recalled)


class Slow(ScriptedProvider):
    """Answers only when it is told to."""

    def __init__(self) -> None:
        super().__init__("Late.")
        self.asked = asyncio.Event()

    async def agenerate(self, request: Request) -> Generation:
        self.asked.set()
        await asyncio.sleep(60)
        return await super().agenerate(request)


async def test_a_cancelled_chat_leaves_nothing_half_done(tmp_path: Path) -> None:
    provider = Slow()
    async with AsyncMemory(tmp_path / "m", model=provider, embedder="hash") as mem:
        task = asyncio.create_task(mem.chat("Hello"))
        await asyncio.wait_for(provider.asked.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await mem.list() == []
        assert (await mem.report()).lines == []


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01])
async def test_a_cancelled_add_is_whole_or_never_was(mem: AsyncMemory, delay: float) -> None:
    task = asyncio.create_task(mem.add([f"part {n}" for n in range(50)]))
    await asyncio.sleep(delay)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(await mem.list()) in (0, 50)


async def test_a_failed_provider_raises_and_the_memory_works_on(tmp_path: Path) -> None:
    provider = ScriptedProvider([Unavailable("down"), "Back."])
    async with AsyncMemory(tmp_path / "m", model=provider, embedder="hash") as mem:
        with pytest.raises(Unavailable):
            await mem.chat("Hello")
        assert (await mem.chat("Hello")).text == "Back."
