"""Activated LoRAs on the local provider: the prompt's KV pages stay the base's, and a hit changes nothing.

Also LoRA versions under threads, forgotten while they answer, and in batches: a tiny random model, LoRAs of big scale.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import Unavailable
from agentmem.parametric import lora
from agentmem.provider import HoldsLoras, LoraRef, Options, Request
from agentmem.types import Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Spy, Stored, Tiny, asked, local, text

#: As the tiny model's template begins an answer.
OPENING = (256, *(byte - 33 for byte in b"assistant"), 198)
CODECS = ("raw", "lossless", "dense", "int8", "k8v4", "int4")


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["stock", "in_place"])
def provider(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path, attention=request.param)
    yield made
    made.close()


def taught(folder: Path, seed: int, *, activated: tuple[int, ...] = OPENING, scale: float = 1.0) -> LoraRef:
    """On every layer and on K and V too, so that a state made under it is another one."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{layer}.{name}": (
            torch.randn(4, 64, generator=draw) * 0.3,
            torch.randn(out, 4, generator=draw) * 0.3,
        )
        for layer in range(3)
        for name, out in (("self_attn.k_proj", 32), ("self_attn.v_proj", 32), ("mlp.up_proj", 96))
    }
    made = lora.Lora(rank=4, alpha=8.0, base="tiny", tensors=tensors, activated=activated)
    return LoraRef(
        name=folder.name,
        digest=lora.save(folder, made),
        path=str(folder),
        scale=scale,
        records=(f"learnt by {folder.name}",),
        activated=activated,
    )


def test_the_opening_is_what_the_template_writes(provider: Any) -> None:
    prompt = provider._ready().template.prompt(asked("a").segments)
    assert tuple(prompt.tokens[-len(OPENING) :]) == OPENING


@pytest.mark.parametrize("codec", CODECS)
def test_pages_of_the_base_serve_it_and_its_own_are_the_base_s(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    late = taught(tmp_path / "late", 1)
    overhead = len(provider._ready().template.prompt(asked("", "").segments).tokens)
    # The opening lies within a step of the grid, across one, and at the end of one.
    for length in (145, 148, 160):
        question = asked(text(length - overhead - 4), max_tokens=6)
        pages: dict[str, set[bytes]] = {}
        wanted: dict[str, torch.Tensor] = {}
        for name, loras in {"base": (), "late": (late,)}.items():
            with Stored(tmp_path / f"{name}{length}", grid=16, codec=codec) as store:
                cold, wanted[name] = spy.answer(provider, replace(question, pages=store, loras=loras), 6)
                assert cold.usage.cached_tokens == 0
                provider.erase_slots()  # what is to be had from pages alone
                live, got = spy.answer(provider, replace(question, pages=store, loras=loras), 6)
                assert live.usage.cached_tokens == cold.usage.written_tokens > 0
                assert torch.equal(got, wanted[name])
            files = (tmp_path / f"{name}{length}" / "pages").glob("**/*.page")
            pages[name] = {file.name.encode() + file.read_bytes()[4096:] for file in files}
        assert pages["base"] == pages["late"]
        assert not torch.allclose(wanted["base"], wanted["late"], atol=1e-3)
        for held, asking in (("base", "late"), ("late", "base")):
            loras = (late,) if asking == "late" else ()
            with Stored(tmp_path / f"{held}{length}", grid=16, codec=codec) as store:
                warm, got = spy.answer(provider, replace(question, pages=store, loras=loras), 6)
            assert warm.usage.cached_tokens > 0
            assert torch.equal(got, wanted[asking]), (held, asking, length)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_its_earlier_answers_are_read_by_the_base_in_a_conversation(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    late = taught(tmp_path / "late", 1)
    said = [Message(role="user", content=text(50), records=("r0",))]
    with Stored(tmp_path / "warm", grid=16, codec=codec) as warm:
        for turn in range(4):
            history = Segment(name="history", messages=tuple(said[:-1]), stable=True)
            now = Segment(name="turn", messages=(said[-1],), stable=True)
            request = Request(segments=(history, now), options=Options(max_tokens=24), pages=warm, loras=(late,))
            answer, got = spy.answer(provider, request, 24)
            with Stored(tmp_path / f"cold{turn}", grid=16, codec=codec) as cold:
                fresh, wanted = spy.answer(provider, replace(request, pages=cold), 24)
                keys = {entry.key for entry in cold._store.entries()}
                # Lineage: the prompt's records, not what the LoRA learnt.
                assert not [e for e in cold._store.entries() if any("learnt" in record for record in e.records)]
            assert fresh.usage.cached_tokens == 0
            assert (answer.usage.cached_tokens > 0) == (turn > 0)
            assert torch.equal(got, wanted)
            assert answer.text == fresh.text
            with Stored(tmp_path / f"base{turn}", grid=16, codec=codec) as base:
                provider.generate(replace(request, pages=base, loras=()))
                assert {entry.key for entry in base._store.entries()} == keys
            said += [
                Message(role="assistant", content=answer.text or "x"),
                Message(role="user", content=text(40 + turn)),
            ]


def test_beside_a_plain_one_pages_follow_the_plain_one(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    spy = Spy(provider)
    late, other = taught(tmp_path / "late", 1), taught(tmp_path / "other", 2, scale=0.5)
    everywhere = taught(tmp_path / "everywhere", 3, activated=())
    engine = provider._ready()
    assert engine.identity((late,), 16) == engine.identity((), 16) == engine.identity((other, late), 16)
    assert engine.identity((everywhere, late), 16) == engine.identity((everywhere,), 16) != engine.identity((), 16)
    with Stored(tmp_path / "store") as store:
        ask = asked(text(60), pages=store, max_tokens=4)
        seen: list[torch.Tensor] = []
        for loras in ((), (late,), (late, other), (everywhere, late), (everywhere,)):
            with Stored(tmp_path / f"cold{len(seen)}") as empty:
                cold, wanted = spy.answer(provider, replace(ask, pages=empty, loras=loras), 4)
            warm, got = spy.answer(provider, replace(ask, loras=loras), 4)
            assert (warm.usage.cached_tokens > 0) == (loras not in ((), (everywhere, late)))
            assert torch.equal(got, wanted)
            assert cold.text == warm.text
            assert not any(torch.equal(wanted, earlier) for earlier in seen)
            seen.append(wanted)
    provider.close()


def test_a_prompt_without_its_invocation_is_answered_by_the_base(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = local(llama, tmp_path)
    never = taught(tmp_path / "never", 1, activated=(256, 256, 1))
    wanted = provider.generate(asked(text(40), max_tokens=6)).text
    assert provider.generate(asked(text(40), max_tokens=6, loras=(never,))).text == wanted
    assert "never does not act" in caplog.text
    provider.close()


# -- many at once, and forgotten ones ----------------------------------------------------------------------------------


def test_eight_threads_with_loras_of_their_own_answer_as_if_alone(llama: Path, tmp_path: Path) -> None:
    one = taught(tmp_path / "size", 99)
    size = sum(a.nbytes + b.nbytes for a, b in lora.load(one.path).tensors.values())
    provider = local(llama, tmp_path, lora_ram=3 * size)  # less than are in use: they come and go
    provider._ready()._ends = frozenset()
    refs = [taught(tmp_path / str(i), i, activated=OPENING if i % 2 else ()) for i in range(8)]
    asks = [asked(text(40), max_tokens=10, loras=(refs[i], refs[(i + 3) % 8])[: 1 + i % 3 // 2]) for i in range(8)]
    wanted = [provider.generate(ask).text for ask in asks]
    assert len(set(wanted)) == 8
    wrong: list[int] = []

    def ask(number: int) -> None:
        for _ in range(3):
            if provider.generate(asks[number]).text != wanted[number]:
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(provider._ready().loras._made.loaded.values()) <= 3 * size
    provider.close()


def test_a_forgotten_version_is_let_go_of_at_once_and_the_base_answers(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = local(llama, tmp_path)
    assert issubclass(type(provider), HoldsLoras)
    provider.drop_loras(["0" * 64])  # nothing is loaded yet: no model is either
    assert provider._engine is None
    provider._ready()._ends = frozenset()
    ref, kept = taught(tmp_path / "ref", 1), taught(tmp_path / "kept", 2)
    base = provider.generate(asked(text(40), max_tokens=6)).text
    provider.generate(asked(text(40), max_tokens=6, loras=(kept,)))
    assert provider.generate(asked(text(40), max_tokens=6, loras=(ref,))).text != base
    switch = provider.tensors().model._agentmem_switch
    assert [held.name for held in switch.active] == ["ref"]
    shutil.rmtree(ref.path)
    provider.drop_loras([ref.digest])
    assert (switch.active, list(switch.loaded)) == ((), [kept.digest])
    assert not any(module._forward_hooks for module in provider.tensors().model.modules())
    assert provider.generate(asked(text(40), max_tokens=6, loras=(ref,))).text == base
    assert "answered without ref" in caplog.text
    provider.close()


def test_forgotten_while_it_answers_the_answer_ends_with_a_named_error(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    provider._ready()._ends = frozenset()
    ref = taught(tmp_path / "ref", 1)
    stream = provider.stream(asked(text(40), max_tokens=20, loras=(ref,)))
    next(stream)
    shutil.rmtree(ref.path)
    provider.drop_loras([ref.digest])
    with pytest.raises(Unavailable, match="ask again"):
        list(stream)
    assert provider.tensors().model._agentmem_switch.loaded == {}
    provider.close()


def test_dropping_waits_for_nobody(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    ref = taught(tmp_path / "ref", 1)
    provider.generate(asked(text(40), max_tokens=2, loras=(ref,)))
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with provider.tensors().lock:  # as a training run does for minutes
            held.set()
            go.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    provider.drop_loras([ref.digest])
    switch = provider.tensors().model._agentmem_switch
    assert switch.loaded == {}
    go.set()
    thread.join()
    provider.generate(asked(text(40), max_tokens=2))
    assert switch.active == ()
    provider.close()


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma3", "phi", "mamba"])
def test_each_row_of_a_batch_is_answered_as_if_alone(kind: str, tiny_model: Tiny, tmp_path: Path) -> None:
    provider = local(tiny_model(tmp_path / "model", kind), tmp_path)
    if kind != "mamba":
        provider._ready()._ends = frozenset({3, 4, 5, 6, 7})  # some answers end early
    asks = [
        asked(text(length), max_tokens=most, temperature=heat, seed=1, stop=stop)
        for length, most, heat, stop in [
            (30, 9, 0, ()),
            (70, 5, 0, ()),
            (5, 12, 0.7, ()),
            (30, 0, 0, ()),
            (44, 12, 0, ("a",)),
        ]
    ]
    if kind == "llama":
        refs = [taught(tmp_path / str(i), i, activated=OPENING if i % 2 else ()) for i in range(3)]
        sets = ((refs[0],), (), (refs[1],), (refs[2],), (refs[1], refs[2]))
        asks = [replace(ask, loras=loras) for ask, loras in zip(asks, sets, strict=True)]
    alone = [provider.generate(ask) for ask in asks]
    together = provider.generate_batch(asks)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.usage.input_tokens == other.usage.input_tokens
        assert one.usage.output_tokens == other.usage.output_tokens
    assert provider.generate_batch([]) == []
    assert provider.generate(asks[0]).text == alone[0].text
    provider.close()


def test_a_batch_in_which_a_version_is_forgotten_ends_with_a_named_error(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    engine = provider._ready()
    engine._ends = frozenset()
    ref = taught(tmp_path / "ref", 1)
    rows, passes = engine.loras.rows, 0

    def forgetting(*arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            shutil.rmtree(ref.path)
            provider.drop_loras([ref.digest])
        return rows(*arguments)

    engine.loras.rows = forgetting
    with pytest.raises(Unavailable, match="ask again"):
        provider.generate_batch([asked(text(40), max_tokens=9, loras=(ref,)), asked(text(30), max_tokens=9)])
    assert provider.tensors().model._agentmem_switch.loaded == {}
    assert not any(module._forward_hooks for module in provider.tensors().model.modules())
    provider.close()
