"""A trained prefix at the head of prompts: served for exactly its head, and a hit changes nothing behind it either."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.activation.pages import CODECS, LOSSY
from agentmem.activation.store import PageStore
from agentmem.activation.trained import StoredPrefix, TrainedPages, base_of
from agentmem.database import Database
from agentmem.parametric.prefix import Reader, head_of
from agentmem.parametric.train import steady
from agentmem.provider import LoraRef, Options, Request
from agentmem.types import Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Spy, Tiny, local, text

LONG, SHORT = text(250), text(30)


class Kept:
    """The real page store of a folder, and the prefixes in it."""

    def __init__(self, folder: Path, codec: Any = "raw", grid: int = 64) -> None:
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, folder / "pages", grid=grid, codec=codec)
        self.pages = self.store.view(b"salt")
        self.prefixes = self.of("ana")

    def of(self, tenant: str) -> TrainedPages:
        view = self.store.view(tenant.encode(), grid=TrainedPages.GRID)
        return TrainedPages(view, self.store, self.database, tenant)


@contextlib.contextmanager
def kept_in(folder: Path, codec: Any = "raw", grid: int = 64) -> Generator[Kept]:
    folder.mkdir(exist_ok=True)
    kept = Kept(folder, codec, grid)
    try:
        yield kept
    finally:
        kept.store.close()
        kept.database.close()


def head(content: str) -> list[Message]:
    return [Message(role="system", content=content, records=("r1",))]


def ask(content: str, turn: str, kept: Kept | None, *, before: str = "", loras: tuple[LoraRef, ...] = ()) -> Request:
    history = [Message(role="user", content=before, records=("r2",)), Message(role="assistant", content="yes")]
    segments = [Segment(name="system", messages=tuple(head(content)), stable=True)]
    if before:
        segments.append(Segment(name="history", messages=tuple(history), stable=True))
    segments.append(Segment(name="turn", messages=(Message(role="user", content=turn),), stable=False))
    return Request(
        segments=tuple(segments),
        options=Options(max_tokens=3),
        pages=None if kept is None else kept.pages,
        prefixes=None if kept is None else kept.prefixes,
        loras=loras,
    )


def stand_in(provider: Any, kept: Kept, states: Callable[[Reader], Any] | None = None) -> StoredPrefix:
    """Keep the real states of a short head (cut to whole pages) as what stands for the long one."""
    tensors = provider.tensors()
    with steady(tensors.model):
        reader = Reader(tensors)
        found = reader.read(short(provider)) if states is None else states(reader)
    length = found[0][0].shape[2] // TrainedPages.GRID * TrainedPages.GRID
    layers = [
        (key[0, :, :length].clone().contiguous().numpy(), value[0, :, :length].clone().contiguous().numpy())
        for key, value in found
    ]
    encoded = kept.prefixes.settled(layers)
    stored = kept.prefixes.keep(
        base_of(tensors.identity, "torch.float32"),
        head_of(tensors, head(LONG)),
        layers,
        encoded=encoded,
        records=("r1",),
        report={},
        seconds=60.0,
        owner="ana",
    )
    assert stored is not None
    return stored


def short(provider: Any) -> list[int]:
    """A head of whole pages: 16 * n tokens."""
    tensors = provider.tensors()
    size = len(head_of(tensors, head(SHORT)))
    return head_of(tensors, head(SHORT + text(-size % 16)))


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["stock", "in_place"])
def provider(request: pytest.FixtureRequest, llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path, attention=request.param)
    yield made
    made.close()


def test_its_states_answer_as_if_they_were_the_prompts_head(provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    size = len(short(provider))
    shorter = SHORT + text(-len(head_of(provider.tensors(), head(SHORT))) % 16)
    with kept_in(tmp_path / "kept") as kept:
        stored = stand_in(provider, kept)
        assert (stored.tokens, stored.records) == (size, ("r1",))
        got, logits = spy.answer(provider, ask(LONG, "what?", kept), 3)
        wanted, as_short = spy.answer(provider, ask(shorter, "what?", None), 3)
        plain, as_long = spy.answer(provider, ask(LONG, "what?", None), 3)
    assert got.text == wanted.text
    assert torch.allclose(logits, as_short, atol=1e-3)
    assert not torch.allclose(logits, as_long, atol=1e-1)
    assert got.usage.input_tokens == plain.usage.input_tokens
    assert got.usage.cached_tokens == stored.stands_for
    assert got.attended is not None
    assert (got.attended.trained_tokens, got.attended.stands_for) == (size, stored.stands_for)


@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("grid", [16, 64], ids=["longer than a page", "shorter than a page"])
def test_behind_it_cold_live_and_restored_runs_are_bit_equal(
    grid: int, codec: str, provider: Any, tmp_path: Path
) -> None:
    spy = Spy(provider)
    before = text(90)
    with kept_in(tmp_path / "kept", codec, grid) as kept:
        stand_in(provider, kept)
        cold, first = spy.answer(provider, ask(LONG, "what?", kept, before=before), 3)
        assert cold.usage.written_tokens > 0
        restored, again = spy.answer(provider, ask(LONG, "what?", kept, before=before), 3)
        live, other = spy.answer(provider, ask(LONG, "what?" + text(40), kept, before=before), 3)
    assert restored.usage.cached_tokens > cold.usage.cached_tokens
    assert restored.usage.written_tokens == 0
    assert torch.equal(first, again)
    with kept_in(tmp_path / "fresh", codec, grid) as kept:
        stand_in(provider, kept)
        fresh, anew = spy.answer(provider, ask(LONG, "what?" + text(40), kept, before=before), 3)
    assert live.usage.cached_tokens > fresh.usage.cached_tokens
    assert torch.equal(other, anew)


@pytest.mark.parametrize("codec", ["raw", *sorted(LOSSY)])
def test_pages_of_the_whole_head_and_of_a_prefix_are_never_mixed(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with kept_in(tmp_path / "kept", codec, 16) as kept:
        _, whole = spy.answer(provider, ask(LONG, "what?", kept), 3)
        stored = stand_in(provider, kept)
        _, trained = spy.answer(provider, ask(LONG, "what?", kept), 3)
        kept.prefixes.drop(stored.digest)
        after, again = spy.answer(provider, ask(LONG, "what?", kept), 3)
    assert not torch.equal(whole, trained)
    assert torch.equal(whole, again)
    assert after.attended is None or not after.attended.trained_tokens


def test_another_head_tenant_model_or_lora_finds_none(provider: Any, tmp_path: Path) -> None:
    standing = importlib.import_module("agentmem.adapters.providers._local_trained").standing
    engine = provider._ready()

    def found(request: Request) -> bool:
        return standing(engine, request, engine.template.prompt(request.segments)) is not None

    plain = LoraRef(name="l", digest="0" * 64, path="")
    with kept_in(tmp_path / "kept") as kept:
        stand_in(provider, kept)
        assert found(ask(LONG, "what?", kept))
        assert not found(ask(LONG + ".", "what?", kept))
        assert not found(ask(LONG[:-1], "what?", kept))
        assert not found(ask(LONG, "what?", kept, loras=(plain,)))
        activated = LoraRef(name="l", digest="0" * 64, path="", activated=(1, 2))
        assert found(ask(LONG, "what?", kept, loras=(activated,)))
        kept.prefixes = kept.of("bo")
        assert not found(ask(LONG, "what?", kept))
        kept.prefixes = kept.of("ana")
        engine.loaded = dataclasses.replace(engine.loaded, content=bytes(32))
        assert not found(ask(LONG, "what?", kept))


def test_a_damaged_prefix_is_put_aside_and_the_whole_head_read(provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with kept_in(tmp_path / "kept") as kept:
        _, wanted = spy.answer(provider, ask(LONG, "what?", None), 3)
        stored = stand_in(provider, kept)
        path = kept.store._catalog.path(stored.pages[1].name)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with kept_in(tmp_path / "kept") as kept:
        got, logits = spy.answer(provider, ask(LONG, "what?", kept), 3)
        assert kept.prefixes.entries() == []
    assert got.usage.cached_tokens == 0
    assert torch.allclose(logits, wanted, atol=1e-4)
