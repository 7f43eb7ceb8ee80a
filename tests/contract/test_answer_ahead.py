"""An answer is prefilled as soon as it is out: the next turn finds its states, and no bit is another."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import Memory
from agentmem._pure import kernels
from agentmem.errors import Rejected
from agentmem.provider import Generation, Options, Request
from agentmem.types import Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Spy, Stored, Tiny, local, text

pytestmark = pytest.mark.skipif(
    not kernels().__name__.endswith("._native"), reason="in place is the default with the C extension only"
)

Said = list[tuple[str, str]]


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), max_position_embeddings=2048)


@pytest.fixture
def provider(llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path)
    made._ready()._ends = frozenset()
    yield made
    made.close()


def asked(said: Said, pages: Any, *, stable: bool = True, answer: str = "answer", **options: Any) -> Request:
    """The last message is the turn's."""
    messages = [Message(role=role, content=words, records=(f"r{i}",)) for i, (role, words) in enumerate(said)]  # type: ignore[arg-type]
    segments = (
        Segment(name="history", messages=tuple(messages[:-1]), stable=True),
        Segment(name="turn", messages=tuple(messages[-1:]), stable=stable),
    )
    given: dict[str, Any] = {"max_tokens": 20, **options}
    return Request(segments=segments, options=Options(**given), pages=pages, answer=answer)


def begun() -> Said:
    return [("user", text(70)), ("assistant", text(31)), ("user", "and then?")]


def tails(provider: Any) -> list[Any]:
    return list(provider._ready().tails._kept)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_the_next_turn_finds_the_answer_and_no_bit_is_another(
    codec: str, dtype: str, llama: Path, tmp_path: Path
) -> None:
    live, other = (local(llama, tmp_path, dtype=dtype) for _ in range(2))
    spy, cold_spy = Spy(live), Spy(other)
    said, spared = begun(), 0
    with Stored(tmp_path / "live", grid=64, codec=codec) as store:
        for turn in range(4):
            request = asked(said, store, answer=f"answer{turn}")
            generation = live.generate(request)
            other.erase_slots()
            with Stored(tmp_path / f"cold{turn}", grid=64, codec=codec) as cold:
                fresh = other.generate(replace(request, pages=cold, answer=""))
            assert (generation.text, fresh.usage.cached_tokens) == (fresh.text, 0)
            if turn:
                before = len(spy.engine.template.prompt(asked(said[:-2], store).segments).tokens)
                assert generation.usage.cached_tokens >= before, "the answer was computed again"
                spared += 1
            for path in (tmp_path / f"cold{turn}" / "pages").glob("*.page"):
                assert (tmp_path / "live" / "pages" / path.name).read_bytes() == path.read_bytes()
            said = [*said, ("assistant", generation.text), ("user", f"and {turn} more, of which kind?")]
        _, got = spy.answer(live, asked(said, store, answer="", max_tokens=4), 4)
    with Stored(tmp_path / "cold", grid=64, codec=codec) as cold:
        other.erase_slots()
        _, wanted = cold_spy.answer(other, asked(said, cold, answer="", max_tokens=4), 4)
    assert spared == 3
    assert torch.equal(got, wanted)


def test_pages_that_hold_the_answer_say_so(provider: Any, tmp_path: Path) -> None:
    with Stored(tmp_path / "store", grid=16) as store:
        generation = provider.generate(asked(begun(), store, max_tokens=60))
        engine = provider._ready()
        prompt = engine.template.prompt(asked(begun(), store).segments)
        holding = [entry for entry in store._store.entries() if (entry.number + 1) * 16 > len(prompt.tokens)]
        assert len(holding) > 1
        assert all("answer" in entry.records for entry in holding)
    assert generation.usage.written_tokens > prompt.stable // 16 * 16


@pytest.mark.parametrize(
    ("changed", "options"),
    [({"stable": False}, {}), ({"answer": ""}, {}), ({}, {"max_tokens": 0})],
    ids=["a turn that will stand elsewhere", "an answer that is not kept", "no answer"],
)
def test_nothing_is_computed_that_no_prompt_will_begin_with(
    changed: dict[str, Any], options: dict[str, Any], provider: Any, tmp_path: Path
) -> None:
    with Stored(tmp_path / "first", grid=64) as store:
        provider.generate(asked(begun(), store))  # the trials are over
    provider.erase_slots()
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64) as store:
        request = asked(begun(), store, **changed, **options)
        provider.generate(request)
        length = len(spy.engine.template.prompt(request.segments).tokens)
    assert sum(count for count, _ in spy.steps) <= length + 20
    assert all(len(tail.tokens) <= length for tail in tails(provider))


def test_a_window_that_is_full_leaves_the_answer_alone(tiny_model: Tiny, tmp_path: Path) -> None:
    made = local(tiny_model(tmp_path / "model", max_position_embeddings=256), tmp_path)
    made._ready()._ends = frozenset()
    with Stored(tmp_path / "store", grid=64) as store:
        said = [("user", text(120)), ("assistant", text(31)), ("user", "and then?")]
        generation = made.generate(asked(said, store, max_tokens=500))
    assert generation.finish_reason == "length"
    assert all(len(tail.tokens) < 256 for tail in tails(made))


def interrupt(provider: Any, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """``act`` when the answer is out and before it is prefilled."""
    engine = provider._ready()
    real = engine._ahead

    def interrupted(*given: Any) -> int:
        act()
        return int(real(*given))

    monkeypatch.setattr(engine, "_ahead", interrupted)


def test_forgetting_meanwhile_leaves_nothing_of_it(
    provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(provider, monkeypatch, provider.erase_slots)
    with Stored(tmp_path / "store", grid=64) as store:
        generation = provider.generate(asked(begun(), store))
    assert generation.text
    assert not tails(provider)


def test_a_cancellation_or_a_template_that_refuses_loses_no_answer(
    provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = provider._ready()
    with Stored(tmp_path / "cold", grid=64) as store:
        wanted = provider.generate(asked(begun(), store)).text
    with monkeypatch.context() as patch, Stored(tmp_path / "cancelled", grid=64) as store:
        cancel = threading.Event()
        interrupt(provider, patch, cancel.set)
        *_, last = engine.stream(asked(begun(), store), cancel)
        assert isinstance(last, Generation)
        assert last.text == wanted
    with monkeypatch.context() as patch, Stored(tmp_path / "refused", grid=64) as store:

        def refuse(*_: Any) -> Any:
            raise Rejected("no such messages")

        interrupt(provider, patch, lambda: patch.setattr(engine.template, "prompt", refuse))
        assert provider.generate(asked(begun(), store)).text == wanted
    assert "no such messages" in caplog.text


@pytest.mark.parametrize("step", ["prefill", "seal"])
@pytest.mark.parametrize("failure", [RuntimeError, MemoryError])
def test_a_failure_of_torch_loses_no_answer(
    failure: type[Exception],
    step: str,
    provider: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = provider._ready()
    with Stored(tmp_path / "cold", grid=64) as store:
        wanted = provider.generate(asked(begun(), store)).text

    def fail(*_: Any, **__: Any) -> Any:
        raise failure("no room for so many states")

    run = sys.modules[type(engine).__module__].Run
    with monkeypatch.context() as patch, Stored(tmp_path / "failed", grid=64) as store:
        interrupt(provider, patch, lambda: patch.setattr(run, step, fail))
        assert provider.generate(asked(begun(), store)).text == wanted
    assert f"{failure.__name__}: no room for so many states" in caplog.text
    with Stored(tmp_path / "after", grid=64) as store:
        assert provider.generate(asked(begun(), store)).text == wanted


def test_pages_that_can_not_be_kept_lose_no_answer(
    provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Stored(tmp_path / "cold", grid=64) as store:
        wanted = provider.generate(asked(begun(), store)).text
    provider.erase_slots()

    def fail(*_: Any, **__: Any) -> int:
        raise RuntimeError("no room for so many pages")

    with Stored(tmp_path / "failed", grid=64) as store:
        monkeypatch.setattr(store, "seal", fail)
        assert provider.generate(asked(begun(), store)).text == wanted
    assert "RuntimeError: no room for so many pages" in caplog.text


# -- in a memory -------------------------------------------------------------------------------------------------------


def test_forgetting_an_answer_drops_the_pages_that_were_made_ahead(llama: Path, tmp_path: Path) -> None:
    with Memory(tmp_path / "m", model=f"local:{llama}", embedder="none", page_tokens=16, core_tokens=0) as mem:
        ana = mem.scope(user="ana", session="s")
        reply = ana.chat("What grows here?", recall=False, max_tokens=60)
        assert len(reply.records) == 2
        held = [entry for entry in mem.activation.entries() if reply.records[1] in entry.records]
        assert held, "the answer was prefilled"
        receipt = ana.forget(reply.records[1])
        assert {entry.key for entry in held} <= set(receipt.pages)
        assert not [entry for entry in mem.activation.entries() if reply.records[1] in entry.records]
        assert not mem._engine.provider._engine.tails._kept  # type: ignore[union-attr]


def test_an_answer_that_a_redactor_changes_is_not_prefilled(llama: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"embedder": "none", "page_tokens": 16, "core_tokens": 0}
    with Memory(tmp_path / "m", model=f"local:{llama}", redact=("email",), **settings) as mem:
        reply = mem.scope(user="ana", session="s").chat("What grows here?", recall=False, max_tokens=60)
        assert not [entry for entry in mem.activation.entries() if reply.records[1] in entry.records]
        [tail] = mem._engine.provider._engine.tails._kept or [None]  # type: ignore[union-attr]
        assert tail is None or len(tail.tokens) <= reply.usage.input_tokens


def talking(folder: Path, model: Path) -> Memory:
    return Memory(folder, model=f"local:{model}", embedder="none", page_tokens=64, core_tokens=0)


def held(mem: Memory) -> set[str]:
    """The records in whose states the conversations of this memory go on."""
    kept = mem._engine.provider._engine.tails._kept  # type: ignore[union-attr]
    return {record for tail in kept for record in tail.records}


def test_what_another_process_forgot_is_let_go_of_with_the_next_turn(llama: Path, tmp_path: Path) -> None:
    with talking(tmp_path / "m", llama) as mem, talking(tmp_path / "m", llama) as other:
        reply = mem.scope(user="ana", session="s").chat("What grows here?", recall=False, max_tokens=9)
        assert set(reply.records) <= held(mem)
        other.forget(reply.records[0])
        later = mem.scope(user="ben", session="t").chat("And there?", recall=False, max_tokens=9)
        assert set(later.records) <= held(mem)
        assert not held(mem) & set(reply.records)


def test_what_is_forgotten_before_a_turn_is_computed_is_not_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talking(tmp_path / "m", llama) as mem:
        ana = mem.scope(user="ana", session="s")
        said = ana.chat("What grows here?", recall=False, max_tokens=9).records[0]
        engine = mem._engine.provider._ready()  # type: ignore[union-attr]
        real = engine.stream

        def stream(*given: Any) -> Any:
            with monkeypatch.context() as patch:  # this turn's prompt was made when the record was there
                patch.setattr(engine, "stream", real)
                mem.forget(said)
            return real(*given)

        monkeypatch.setattr(engine, "stream", stream)
        assert ana.chat("And in the winter?", recall=False, max_tokens=9).text
        assert not engine.tails._kept
        assert not [entry for entry in mem.activation.entries() if said in entry.records]
