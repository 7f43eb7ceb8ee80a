"""KV states of the local provider under attack: nothing between look-up and use changes an answer, all threads end."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmem.errors import Corrupt, InvalidInput
from agentmem.parametric import lora
from agentmem.provider import LoraRef, Options, Request
from agentmem.types import Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Spy, Stored, Tiny, asked, local, text

CODECS = ("raw", "lossless", "dense", "int8", "k8v4", "int4")


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def provider(llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path, attention="stock")  # test_in_place.py has the other
    yield made
    made.close()


def turns(*lengths: int, pages: Any = None, stable: bool = True) -> Request:
    """A conversation of these lengths in tokens; the template adds its own."""
    messages = tuple(
        Message(role="user" if i % 2 == 0 else "assistant", content=text(length), records=(f"r{i}",))
        for i, length in enumerate(lengths)
    )
    segments = (Segment(name="history", messages=messages, stable=stable),)
    return Request(segments=segments, options=Options(max_tokens=3), pages=pages)


def loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "agentmem KV pages"]


class Meddled(Stored):
    """A store in which something happens between the look-up and the first use of what was found."""

    between: Callable[[list[Any]], None] | None = None

    def longest(self, identity: bytes, tokens: Sequence[int]) -> Sequence[Any]:
        found = list(super().longest(identity, tokens))
        if self.between is not None:
            self.between(found)
        return found


@pytest.mark.parametrize("codec", CODECS)
def test_a_conversation_that_grows_gives_the_bits_of_a_cold_run(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    overhead = len(provider._ready().template.prompt(turns(0).segments).tokens)
    draw = np.random.default_rng(CODECS.index(codec))
    # The first prompts end exactly with a page: its last page is computed again and sealed only once.
    lengths = [64 - overhead]
    with Stored(tmp_path / "warm", grid=16, codec=codec) as warm:
        for turn in range(7):
            files = {path: path.read_bytes() for path in (tmp_path / "warm" / "pages").glob("*.page")}
            request = turns(*lengths, pages=warm)
            generation, got = spy.answer(provider, request, 3)
            with Stored(tmp_path / f"cold{turn}", grid=16, codec=codec) as cold:
                fresh, wanted = spy.answer(provider, turns(*lengths, pages=cold), 3)
            assert fresh.usage.cached_tokens == 0
            assert torch.equal(got, wanted), lengths
            assert turn == 0 or generation.usage.cached_tokens > 0
            again, same = spy.answer(provider, request, 3)
            assert torch.equal(same, wanted), lengths
            assert again.usage.written_tokens == 0
            assert all(path.read_bytes() == content for path, content in files.items())
            # Pages that this run sealed and those of a cold one are the same pages, byte for byte.
            for path in (tmp_path / f"cold{turn}" / "pages").glob("*.page"):
                assert (tmp_path / "warm" / "pages" / path.name).read_bytes() == path.read_bytes()
            lengths += [int(draw.integers(1, 40)), int(draw.integers(1, 40))]


@pytest.mark.parametrize("staged", [False, True], ids=["cpu", "staged"])
@pytest.mark.parametrize("codec", CODECS)
def test_damage_between_look_up_and_use_changes_no_answer(
    codec: str, staged: bool, provider: Any, tmp_path: Path
) -> None:
    spy = Spy(provider)
    draw = np.random.default_rng(5)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)

    def damage(found: list[Any]) -> None:
        page = found[int(draw.integers(len(found)))]
        with page.path.open("r+b") as file:
            size = file.seek(0, 2)
            for _ in range(int(draw.integers(1, 4))):
                place = int(draw.integers(64, size))
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1 << int(draw.integers(8))]))

    spy.engine.states._staged = staged
    for _ in range(8):
        with Meddled(tmp_path / "store", grid=64, codec=codec) as store:
            store.between = damage
            generation, got = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        assert generation.usage.cached_tokens < 192
        assert torch.equal(got, wanted)
    assert not loaders()


@pytest.mark.parametrize("staged", [False, True], ids=["cpu", "staged"])
@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_store_or_pages_closed_meanwhile_change_no_answer(
    codec: str, staged: bool, provider: Any, tmp_path: Path
) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
    spy.engine.states._staged = staged
    for what in ("store", "pages", "deleted"):
        with Meddled(tmp_path / "store", grid=64, codec=codec) as store:

            def between(found: list[Any], what: str = what, store: Meddled = store) -> None:
                for page in found[1:]:
                    if what == "pages":
                        page.close()
                    elif what == "deleted":
                        page.path.unlink()
                if what == "store":
                    store._store.close()

            store.between = between
            _, got = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        assert torch.equal(got, wanted), what
    assert not loaders()


@pytest.mark.parametrize(
    "error",
    [Corrupt("bad"), InvalidInput("closed"), OSError(5, "read"), MemoryError(), RuntimeError("no pinned memory")],
)
def test_an_error_in_the_loading_thread_is_a_miss(error: Exception, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
    spy.engine.states._staged = True
    for broken in range(3):
        with Meddled(tmp_path / "store", grid=64) as store:

            def between(found: list[Any], broken: int = broken) -> None:
                real = found[-1].read_layers

                def read(keys: Any, values: Any, at: int, first: int = 0) -> None:
                    if first == broken:
                        raise error
                    real(keys, values, at, first)

                found[-1].read_layers = read

            store.between = between
            generation, got = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        assert generation.usage.cached_tokens == 0
        assert torch.equal(got, wanted)
        assert not loaders()


def test_nothing_is_loaded_any_more_after_a_pass_that_failed(provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64) as store:
        spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
    spy.engine.states._staged = True
    entered, held = threading.Event(), threading.Event()
    layers: list[int] = []
    with Meddled(tmp_path / "store", grid=64) as store:

        def between(found: list[Any]) -> None:
            real = found[0].read_layers

            def read(keys: Any, values: Any, at: int, first: int = 0) -> None:
                layers.append(first)
                entered.set()
                held.wait(10)
                real(keys, values, at, first)

            found[0].read_layers = read

        def failing(*_: Any) -> Any:
            entered.wait(10)
            threading.Timer(0.1, held.set).start()
            raise RuntimeError("the device is gone")

        store.between = between
        spy.engine.forward = failing
        with pytest.raises(RuntimeError, match="gone"):
            provider.generate(asked(text(230), pages=store, max_tokens=3))
    assert not loaders()
    assert layers == [0]


@pytest.mark.parametrize("codec", ["raw", "int8", "int4"])
def test_a_read_only_view_gives_the_same_bits_and_keeps_nothing(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        view = store._store.view(b"tenant", writable=False)
        for stable in (text(230), "x" + text(230)):
            generation, got = spy.answer(provider, asked(stable, pages=view, max_tokens=3), 3)
            assert generation.usage.written_tokens == 0
            if generation.usage.cached_tokens:
                assert torch.equal(got, wanted)
        assert generation.usage.cached_tokens == 0
        _, kept = spy.answer(provider, asked("x" + text(230), pages=store, max_tokens=3), 3)
        assert torch.equal(got, kept)


@pytest.mark.parametrize("codec", ["raw", "dense", "int8"])
def test_a_full_disk_while_pages_are_kept_changes_no_answer(codec: str, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "other", grid=64, codec=codec) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        try:
            generation, got = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert generation.usage.written_tokens == 0
        assert torch.equal(got, wanted)
        assert not list((tmp_path / "store" / "pages").glob("*.tmp"))
        kept, again = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        assert kept.usage.written_tokens == 192
        assert torch.equal(again, wanted)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_threads_with_growing_prompts_on_one_store_give_the_bits_of_one(
    codec: str, provider: Any, tmp_path: Path
) -> None:
    provider._ready()._ends = frozenset()
    prompts = [text(n) for n in (150, 215, 280)]
    wanted = []
    for i, prompt in enumerate(prompts):
        with Stored(tmp_path / f"cold{i}", grid=64, codec=codec) as store:
            wanted.append(provider.generate(asked(prompt, pages=store, max_tokens=8)).text)
    wrong: list[str] = []
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:

        def ask() -> None:
            for prompt, expected in zip(prompts, wanted, strict=True):
                got = provider.generate(asked(prompt, pages=store, max_tokens=8)).text
                if got != expected:
                    wrong.append(got)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


# -- LoRA versions -----------------------------------------------------------------------------------------------------


def taught(folder: Path, seed: int) -> LoraRef:
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": (
            torch.randn(4, 64, generator=draw) * 0.1,
            torch.randn(32, 4, generator=draw) * 0.1,
        )
        for layer in range(3)
        for name in ("k_proj", "v_proj")
    }
    digest = lora.save(folder, lora.Lora(rank=4, alpha=8.0, base="tiny", tensors=tensors))
    return LoraRef(name=folder.name, digest=digest, path=str(folder))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("staged", [False, True], ids=["cpu", "staged"])
def test_a_lora_that_was_trained_again_at_the_same_path_is_a_miss_and_its_old_digest_an_error(
    staged: bool, llama: Path, tmp_path: Path
) -> None:
    with Stored(tmp_path / "store") as store:
        old = taught(tmp_path / "lora", 1)
        provider = local(llama, tmp_path)
        spy = Spy(provider)
        _, before = spy.answer(provider, asked(text(60), pages=store, max_tokens=3, loras=(old,)), 3)
        new = taught(tmp_path / "lora", 2)
        for made in (provider, local(llama, tmp_path)):  # one that has the old weights in memory, one that has nothing
            spy = Spy(made)
            spy.engine.states._staged = staged
            if made is not provider:
                with pytest.raises(Corrupt, match="digest"):  # and pages of the old weights are there
                    made.generate(asked(text(60), pages=store, max_tokens=3, loras=(old,)))
                with pytest.raises(Corrupt, match="digest"):
                    made.generate(asked(text(90)[::-1], pages=store, max_tokens=3, loras=(old,)))
                with pytest.raises(Corrupt, match="digest"):
                    made.generate(asked(text(60), max_tokens=3, loras=(old,)))
            store.limit = 0 if made is not provider else 1 << 30
            generation, after = spy.answer(made, asked(text(60), pages=store, max_tokens=3, loras=(new,)), 3)
            assert generation.usage.cached_tokens == 0
            assert not torch.equal(after, before)
            store.limit = 1 << 30
            warm, same = spy.answer(made, asked(text(60), pages=store, max_tokens=3, loras=(new,)), 3)
            assert warm.usage.cached_tokens > 0
            assert torch.equal(same, after)
    assert not loaders()


def test_versions_in_another_order_are_another_identity(provider: Any, tmp_path: Path) -> None:
    # Floats don't add up to the same bits in another order, so their pages must not be shared.
    one, two = taught(tmp_path / "one", 1), taught(tmp_path / "two", 2)
    spy = Spy(provider)
    with Stored(tmp_path / "store") as store:
        for loras in ((one, two), (two, one), (one,), (one, one), ()):
            cold, wanted = spy.answer(provider, asked(text(60), pages=store, max_tokens=3, loras=loras), 3)
            assert cold.usage.cached_tokens == 0
            warm, got = spy.answer(provider, asked(text(60), pages=store, max_tokens=3, loras=loras), 3)
            assert warm.usage.cached_tokens > 0
            assert torch.equal(got, wanted)


def test_a_trial_that_runs_in_another_thread_is_not_taken_for_passed(provider: Any) -> None:
    states = provider._ready().states
    real, inside, done = states._forward, threading.Event(), threading.Event()

    def slow(tokens: Sequence[int], cache: Any) -> Any:
        result = real(tokens, cache)
        if len(cache.layers) and cache.get_seq_length() == 24 and not inside.is_set():
            inside.set()
        elif inside.is_set() and threading.current_thread() is thread:
            done.wait(10)
            return result[0] + 1, result[1]
        return result

    thread = threading.Thread(target=states.check)
    states._forward = slow
    thread.start()
    inside.wait(10)
    states._forward = lambda tokens, cache: (real(tokens, cache)[0] + float(np.random.default_rng().random()), cache)
    assert not states.check()
    done.set()
    thread.join()
    assert states.miss is not None
