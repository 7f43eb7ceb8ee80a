"""Attention in place by its promises: a hit changes no bit, an answer is the stock path's within rounding, and what
can't be computed in place never is."""

from __future__ import annotations

import importlib
import mmap
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmem import Memory, _pure
from agentmem._pure import kernels
from agentmem.activation.pages import Codec, NewPage, write_page
from agentmem.errors import ConfigError, InvalidInput, Unavailable
from agentmem.parametric import lora
from agentmem.provider import Generation, LoraRef, Options, Request, load
from agentmem.types import Attended, Message, Segment

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import PASSAGE, Spy, Stored, Tiny, asked, local, text

pytestmark = pytest.mark.skipif(
    not kernels().__name__.endswith("._native"), reason="in place is the default with the C extension only"
)

CODECS: tuple[Codec, ...] = ("raw", "int8", "k8v4", "int4")
#: Architectures, and what of them matters here: windows, biases, norms on keys, partial rotary, head sizes.
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "phi": {},
    "phi3": {},
    "gemma3": {"head_dim": 256},
}


@pytest.fixture(scope="module")
def models(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny_model(folder / kind, kind, **own) for kind, own in KINDS.items()}


@pytest.fixture
def provider(models: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    made = in_place(models["llama"], tmp_path)
    yield made
    made.close()


def in_place(folder: Path, cache: Path, **settings: Any) -> Any:
    return local(folder, cache, **{"attention": "in_place", **settings})


def prompt_of(provider: Any, length: int, pages: Any, max_tokens: int) -> Request:
    """A request whose prompt has ``length`` tokens, all but the turn's stable."""
    overhead = len(provider._ready().template.prompt(asked("", "").segments).tokens)
    return asked(text(length - overhead - 4), pages=pages, max_tokens=max_tokens)


def attended(generation: Generation) -> Attended:
    assert generation.attended is not None
    return generation.attended


# -- a hit changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "codec"),
    [(kind, codec) for kind in KINDS for codec in CODECS if codec in ("raw", "int8") or kind in ("llama", "gemma3")],
)
def test_cold_live_and_restored_runs_are_bit_equal(
    kind: str, codec: Codec, models: dict[str, Path], tmp_path: Path
) -> None:
    for dtype in ("float32", "bfloat16"):
        made, fresh = (in_place(models[kind], tmp_path, dtype=dtype) for _ in range(2))
        spies = {id(one): Spy(one) for one in (made, fresh)}
        for length in (192, 251):  # the last step full, and short
            store = Stored(tmp_path / f"{dtype}{length}", grid=64, codec=codec)
            request = prompt_of(made, length, store, 8)  # the answer to the longer one crosses the end of a page
            with store:
                cold, wanted = spies[id(made)].answer(made, request, 8)
            assert cold.miss is None
            assert cold.usage.cached_tokens == 0
            assert attended(cold).codec == codec
            assert attended(cold).tokens == (length + 7) // 64 * 64
            for count in range(1, cold.usage.written_tokens // 64 + 1):
                store.limit = count
                for one in (made, fresh):  # one that has seen it, and one that has not
                    one.erase_slots()
                    with store:
                        warm, got = spies[id(one)].answer(one, request, 8)
                    assert warm.usage.cached_tokens == count * 64
                    assert torch.equal(got, wanted), (dtype, length, count)
                    assert attended(warm) == attended(cold)
                    assert warm.text == cold.text
            with store:  # and behind what the last one left in memory
                live, got = spies[id(made)].answer(made, request, 8)
            assert torch.equal(got, wanted), (dtype, length)
            assert (attended(live), live.text) == (attended(cold), cold.text)
            assert live.usage.cached_tokens > cold.usage.written_tokens


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_a_full_hit_computes_its_last_step_again(codec: Codec, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        request = prompt_of(provider, 192, store, 2)
        cold, wanted = spy.answer(provider, request, 2)
        assert cold.usage.written_tokens == 128
        engine, states = spy.engine, spy.engine.in_place.states(store)
        tokens = engine.template.prompt(request.segments).tokens
        cache = states.made(64)
        for start in (0, 64, 128):
            engine.forward(tokens[start : start + 64], cache, (), None)
            last = cache.seal()
        # The page that ends with the prompt, as a longer prompt would have left it.
        assert store.seal(engine.identity((), 64, states.attention), tokens, 2, [], [()], encoded=[last]) == 1
        provider.erase_slots()
        warm, got = spy.answer(provider, request, 2)
        assert len(store.longest(engine.identity((), 64, states.attention), tokens)) == 3
    assert (warm.usage.cached_tokens, warm.usage.written_tokens) == (128, 0)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "codec", "grid"),
    [
        *((kind, codec, 64) for kind in KINDS for codec in ("raw", "int8")),
        *(("llama", codec, 64) for codec in ("k8v4", "int4")),
        *(("llama", "raw", 16), ("llama", "raw", 256), ("llama", "int8", 256), ("gemma3", "raw", 16)),
    ],
)
def test_a_conversation_that_grows_gives_the_bits_and_the_pages_of_a_cold_run(
    kind: str, codec: Codec, grid: int, dtype: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """Also from what the last turn left in memory behind its last page."""
    live, other = (in_place(models[kind], tmp_path, dtype=dtype) for _ in range(2))
    spy, cold_spy = Spy(live), Spy(other)
    lengths, kept = [70], 0
    with Stored(tmp_path / "warm", grid=grid, codec=codec) as warm:
        for turn in range(5):
            generation, got = spy.answer(live, turns(lengths, warm), 3)
            assert spy.engine.in_place.states(warm).steady
            kept += generation.usage.cached_tokens % grid
            other.erase_slots()
            with Stored(tmp_path / f"cold{turn}", grid=grid, codec=codec) as cold:
                fresh, wanted = cold_spy.answer(other, turns(lengths, cold), 3)
            assert fresh.usage.cached_tokens == 0
            assert torch.equal(got, wanted), lengths
            for path in (tmp_path / f"cold{turn}" / "pages").glob("*.page"):
                assert (tmp_path / "warm" / "pages" / path.name).read_bytes() == path.read_bytes()
            lengths += [31, 17 + turn]
    assert kept > 0


def test_a_stable_end_at_the_end_of_a_page_and_beside_it(
    provider: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    spy = Spy(provider)
    overhead = len(provider._ready().template.prompt(asked("", "").segments).tokens)
    other = in_place(models["llama"], tmp_path)
    cold_spy = Spy(other)
    for stable in range(186, 200):
        provider.erase_slots()
        with Stored(tmp_path / f"s{stable}", grid=64) as store:
            for turn in ("and?", "and what then, and why, and where was it?"):
                request = asked(text(stable - overhead), turn, pages=store, max_tokens=2)
                _, got = spy.answer(provider, request, 2)
                other.erase_slots()
                with Stored(tmp_path / f"c{stable}{len(turn)}", grid=64) as cold:
                    asked_cold = asked(text(stable - overhead), turn, pages=cold, max_tokens=2)
                    _, wanted = cold_spy.answer(other, asked_cold, 2)
                assert torch.equal(got, wanted), (stable, turn)


def test_streams_of_one_conversation_at_once_and_one_that_is_left(provider: Any, tmp_path: Path) -> None:
    provider._ready()._ends = frozenset()
    with Stored(tmp_path / "cold", grid=64) as store:
        wanted = [provider.generate(_longer(turn, store)).text for turn in range(3)]
    provider.erase_slots()
    with Stored(tmp_path / "store", grid=64) as store:
        left = provider.stream(_longer(1, store))
        next(left)
        left.close()
        provider.generate(_longer(0, store))
        streams = [provider.stream(_longer(turn, store)) for turn in (2, 1, 2, 0)]
        got = ["", "", "", ""]
        for _ in range(40):
            for number, stream in enumerate(streams):
                piece = next(stream, None)
                got[number] += piece if isinstance(piece, str) else ""
    assert got == [wanted[turn] for turn in (2, 1, 2, 0)]


def _longer(turn: int, pages: Any) -> Request:
    request = turns([70, 31, 40, *[20, 25] * turn], pages)
    return Request(segments=request.segments, options=Options(max_tokens=6), pages=pages)


def turns(lengths: Sequence[int], pages: Any) -> Request:
    messages = tuple(
        Message(role="user" if i % 2 == 0 else "assistant", content=text(length), records=(f"r{i}",))
        for i, length in enumerate(lengths)
    )
    segments = (Segment(name="history", messages=messages, stable=True),)
    return Request(segments=segments, options=Options(max_tokens=3), pages=pages)


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_damage_between_look_up_and_use_changes_no_answer(codec: Codec, provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec=codec) as store:
        _, wanted = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
    for number, harm in enumerate(("flip", "close", "delete", "flip")):
        with Stored(tmp_path / "store", grid=64, codec=codec) as store:
            found = store.longest

            def longest(
                identity: bytes, tokens: Sequence[int], found: Any = found, harm: str = harm, number: int = number
            ) -> Any:
                pages = list(found(identity, tokens))
                page = pages[number % len(pages)]
                if harm == "close":
                    page.close()
                elif harm == "delete":
                    page.path.unlink()
                else:
                    content = bytearray(page.path.read_bytes())
                    content[len(content) // 2] ^= 8
                    page.path.write_bytes(content)
                return pages

            store.longest = longest  # type: ignore[method-assign]
            generation, got = spy.answer(provider, asked(text(230), pages=store, max_tokens=3), 3)
        assert torch.equal(got, wanted), harm
        assert harm == "delete" or generation.usage.cached_tokens < 192


def test_threads_on_one_store_give_the_bits_of_one(provider: Any, tmp_path: Path) -> None:
    provider._ready()._ends = frozenset()
    prompts = [text(n) for n in (150, 215, 280)]
    wanted = []
    for i, prompt in enumerate(prompts):
        with Stored(tmp_path / f"cold{i}", grid=64, codec="int8") as store:
            wanted.append(provider.generate(asked(prompt, pages=store, max_tokens=8)).text)
    wrong: list[str] = []
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:

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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_numpy_twin_gives_the_same_bits(
    dtype: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for twin in (False, True):
        if twin:
            monkeypatch.setattr(kernels(), "Prefix", _pure.Prefix)
        made = in_place(models["mistral"], tmp_path, dtype=dtype)
        with Stored(tmp_path / f"{twin}", grid=64, codec="int8") as store:
            generation, logits = Spy(made).answer(made, prompt_of(made, 150, store, 3), 3)
        assert attended(generation).tokens == 128
        found.append(logits)
    assert torch.equal(*found)


# -- the answer is the stock path's, within rounding -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_raw_pages_in_place_agree_with_one_pass_of_the_stock_model(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    made = in_place(models[kind], tmp_path)
    with Stored(tmp_path / "store", grid=64) as store:
        request = prompt_of(made, 250, store, 20)  # so that decoding crosses the end of a page
        generation, got = Spy(made).answer(made, request, 20)
    assert attended(generation).tokens == 256
    tokens = made._ready().template.prompt(request.segments).tokens
    tokens = [*tokens, *(int(logits.argmax()) for logits in got[:-1])]
    model = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens]), logits_to_keep=20).logits[0]
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)
    assert got.std() > 0.1


@pytest.mark.parametrize("codec", ["int8", "k8v4", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_lossy_pages_in_place_agree_with_the_stock_path_over_the_same_pages(
    kind: str, codec: Codec, models: dict[str, Path], tmp_path: Path
) -> None:
    found = {}
    for attention in ("stock", "auto"):
        made = local(models[kind], tmp_path, attention=attention)
        with Stored(tmp_path / attention, grid=64, codec=codec) as store:
            generation, found[attention] = Spy(made).answer(made, prompt_of(made, 250, store, 1), 1)
        assert (generation.attended is None) == (attention == "stock")
    # Queries have 16 bits and chances 8 within a block: about a thousandth of the logits' spread.
    apart = (found["auto"] - found["stock"]).square().mean().sqrt() / found["stock"].std()
    assert apart < 0.01


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_long_answer_is_held_in_compressed_pages_that_are_never_kept(provider: Any, tmp_path: Path) -> None:
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        request = prompt_of(provider, 100, store, 220)
        generation, _ = spy.answer(provider, request, 1)
        assert generation.usage.written_tokens == 64
        assert [entry.number for entry in store._store.entries()] == [0]
    held = attended(generation)
    assert held.tokens == 256  # 319 positions, of which the last 63 are the tail
    assert held.stock_bytes == 256 * 3 * 2 * 2 * 16 * 4
    assert held.bytes < 0.4 * held.stock_bytes


def test_no_buffer_of_the_whole_context_is_made(provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = provider._ready()
    caches: list[Any] = []
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        provider.generate(prompt_of(provider, 150, store, 1))  # the trials are over
        monkeypatch.setattr(engine.states, "_reserved", None)
        forward = engine.forward

        def noting(*given: Any) -> Any:
            caches.append(given[1])
            return forward(*given)

        monkeypatch.setattr(engine, "forward", noting)
        generation = provider.generate(prompt_of(provider, 400, store, 2))
    assert generation.usage.cached_tokens > 0
    assert caches
    tails = [part for layer in caches[-1].layers for part in layer.tail]
    assert sum(tail.nbytes for tail in tails) == 64 * caches[-1].position_bytes
    assert all(layer.keys is None for layer in caches[-1].layers)


# -- what can't be computed in place never is --------------------------------------------------------------------------


def refused(made: Any, folder: Path, codec: Codec, caplog: pytest.LogCaptureFixture) -> str:
    """The logged reason, once for two requests, which are answered and kept all the same."""
    caplog.clear()
    with Stored(folder, grid=64, codec=codec) as store:
        for cached in (0, 128):
            generation = made.generate(prompt_of(made, 150, store, 2))
            assert generation.attended is None
            assert generation.usage.cached_tokens == cached
    [line] = [record.getMessage() for record in caplog.records if "the stock way" in record.getMessage()]
    return line


def test_attention_with_a_soft_cap_is_computed_the_stock_way(
    tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = in_place(tiny_model(tmp_path / "gemma2", "gemma2"), tmp_path)
    assert "softcap" in refused(made, tmp_path / "store", "int8", caplog)


def test_pages_that_have_to_be_decoded_are_computed_the_stock_way(
    provider: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for codec in ("lossless", "dense"):
        assert "decoded first" in refused(provider, tmp_path / codec, codec, caplog)


def _changed(layer: Any, change: str) -> None:
    """Makes an attention layer of a llama unusual."""
    real = layer.forward
    if change == "mask":

        def narrowed(*given: Any, attention_mask: Any = None, **named: Any) -> Any:
            mask = attention_mask
            if mask is not None and mask.dtype == torch.bool:
                mask = mask.clone()
                mask[..., -1, 0] = False  # sees the beginning no more, but only far behind it
            return real(*given, attention_mask=mask, **named)

        layer.forward = narrowed
    elif change == "scale":  # the function is told another one than the stock path gets
        real_scale = layer.scaling

        def scaled(*given: Any, **named: Any) -> Any:
            layer.scaling = 3 * real_scale if layer.config._attn_implementation == "agentmem_in_place" else real_scale
            return real(*given, **named)

        layer.forward = scaled
    elif change == "bidirectional":
        layer.is_causal = False
    elif change == "sinks":

        def sunk(*given: Any, **named: Any) -> Any:
            return real(*given, s_aux=torch.zeros(4), **named)

        layer.forward = sunk
    else:
        assert change == "own"
        # Another config than the model's: our function is never called there.
        import copy

        layer.config = copy.deepcopy(layer.config)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("mask", "masks other positions"),
        ("scale", "standard deviations"),
        ("bidirectional", "causal"),
        ("sinks", "s_aux"),
        ("own", "failed|attend"),
    ],
)
def test_a_model_whose_attention_is_another_is_computed_the_stock_way(
    change: str, why: str, provider: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import re

    _changed(provider._ready().loaded.model.model.layers[1].self_attn, change)
    assert re.search(why, refused(provider, tmp_path / "store", "int8", caplog))


def test_heads_of_more_than_256_dimensions_are_computed_the_stock_way(
    tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = in_place(tiny_model(tmp_path / "wide", "llama", head_dim=272), tmp_path)
    assert "failed" in refused(made, tmp_path / "store", "int8", caplog)


def test_a_kernel_that_is_wrong_is_found_by_the_trial(
    provider: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernels().Prefix

    class Wrong:
        def __init__(self, *given: Any) -> None:
            self._real = real(*given)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def attend(self, layer: int, *given: Any) -> None:
            self._real.attend(layer, *given)
            if layer == 1:
                given[6][:] = given[6][:, ::-1]  # the heads of its output in another order

    monkeypatch.setattr(kernels(), "Prefix", Wrong)
    assert "standard deviations" in refused(provider, tmp_path / "store", "int8", caplog)


def test_without_the_extension_the_stock_path_answers(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(kernels(), "Prefix")
    made = local(models["llama"], tmp_path)
    assert "C extension" in refused(made, tmp_path / "store", "int8", caplog)


def test_auto_is_for_codecs_that_are_read_in_place_and_stock_never_asks(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = {("auto", "raw"): True, ("auto", "int8"): True, ("stock", "int8"): False, ("in_place", "raw"): True}
    expected |= {("auto", "lossless"): False, ("auto", "dense"): False, ("stock", "raw"): False}
    for (attention, codec), wanted in expected.items():
        made = local(models["llama"], tmp_path, attention=attention)
        with Stored(tmp_path / f"{attention}{codec}", grid=64, codec=codec) as store:
            generation = made.generate(prompt_of(made, 150, store, 2))
        assert (generation.attended is not None) == wanted
    assert not caplog.records


def test_an_unknown_kind_of_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention is 'fast'; write one of auto, in_place, stock"):
        load(f"local:{tmp_path}", {"attention": "fast"})


def test_pages_made_in_place_are_not_the_stock_paths_nor_another_codecs(
    models: dict[str, Path], tmp_path: Path
) -> None:
    with Stored(tmp_path / "store", grid=64) as store:
        for attention in ("stock", "in_place", "auto"):
            made = local(models["llama"], tmp_path, attention=attention)
            store.limit = 1 << 30
            cached = made.generate(prompt_of(made, 150, store, 1)).usage.cached_tokens
            assert cached == (128 if attention == "auto" else 0)  # auto is in place here
    engine = in_place(models["llama"], tmp_path)._ready()
    engine.states.check()
    kinds = {engine.in_place.states(_Of(codec)).attention for codec in CODECS}
    assert len({engine.identity((), 64, kind) for kind in kinds} | {engine.identity((), 64)}) == 5


class _Of:
    """A store's pages, of which only the codec is asked."""

    lossy = True

    def __init__(self, codec: str) -> None:
        self.codec = codec


def test_batches_padding_and_masks_are_refused_by_name(provider: Any, tmp_path: Path) -> None:
    engine = provider._ready()
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        provider.generate(prompt_of(provider, 150, store, 1))
        states = engine.in_place.states(store)
    model = engine.loaded.model
    ids = torch.tensor([[1, 2, 3]])
    for given, match in (
        ({"input_ids": ids.repeat(2, 1)}, "batch of 2"),
        ({"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])}, "padding"),
        ({"input_ids": ids, "attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, "tail"),
    ):
        cache = states.made(64)
        with cache.attending(model.config), torch.inference_mode(), pytest.raises(InvalidInput, match=match):
            model(past_key_values=cache, **given)
        assert model.config._attn_implementation == "sdpa"
    cache = states.made(64)
    with cache.attending(model.config), torch.inference_mode():  # a mask that hides nothing is none
        model(past_key_values=cache, input_ids=ids, attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert cache.get_seq_length() == 3


# -- everybody else sees the stock model -------------------------------------------------------------------------------


def test_the_model_is_the_stock_one_between_passes_and_after_errors(
    provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = provider._ready()
    config = engine.loaded.model.config
    identity = engine.identity((), 64)
    seen = []
    real = type(engine.loaded.model.model).forward

    def spying(*given: Any, **named: Any) -> Any:
        seen.append((config._attn_implementation, engine.identity((), 64) == identity))
        if len(seen) == 40:
            raise RuntimeError("the pass failed")
        return real(*given, **named)

    monkeypatch.setattr(type(engine.loaded.model.model), "forward", spying)
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        for piece in provider.stream(prompt_of(provider, 150, store, 3)):
            assert config._attn_implementation == "sdpa", piece
        with pytest.raises(RuntimeError, match="the pass failed"):
            provider.generate(prompt_of(provider, 150, store, 30))
    assert config._attn_implementation == "sdpa"
    assert {kind for kind, _ in seen} == {"sdpa", "eager", "agentmem_in_place"}  # eager: in the trial
    assert all(same for _, same in seen)
    with torch.no_grad():
        assert engine.loaded.model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 258)


def test_trials_at_once_do_not_take_each_others_kernel_for_the_models(
    provider: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = provider._ready()
    in_place_module = importlib.import_module("agentmem.adapters.providers._local_attention")
    config, trials, seen = engine._config, engine.in_place, []
    real = trials._forward

    def disturbed(tokens: Sequence[int], cache: Any) -> Any:
        """Whoever comes after this pass finds another thread in the middle of an eager one, as in its trial."""
        entered = threading.Event()

        def other() -> None:
            with engine.lock, in_place_module.attending(config, "eager"):
                entered.set()
                time.sleep(0.02)

        if hasattr(cache, "attending"):
            with engine.lock, cache.attending(config):
                seen.append(config._attn_implementation)
        result = real(tokens, cache)
        threading.Thread(target=other).start()
        assert entered.wait(10)
        return result

    monkeypatch.setattr(trials, "_forward", disturbed)
    assert engine.states.check()
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        assert trials.states(store) is not None
    assert seen == ["eager"] * 2 + ["agentmem_in_place"] * 8


def test_a_lora_version_shapes_the_states_in_place(provider: Any, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    tensors = {
        f"model.layers.{layer}.self_attn.k_proj": (
            torch.randn(4, 64, generator=draw) * 0.1,
            torch.randn(32, 4, generator=draw) * 0.1,
        )
        for layer in range(3)
    }
    digest = lora.save(tmp_path / "lora", lora.Lora(rank=4, alpha=8.0, base="tiny", tensors=tensors))
    learnt = LoraRef(name="lora", digest=digest, path=str(tmp_path / "lora"))
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        found = []
        for loras in ((), (learnt,), (), (learnt,)):
            generation, got = spy.answer(provider, asked(text(150), pages=store, max_tokens=3, loras=loras), 3)
            found.append((generation.usage.cached_tokens, got))
    assert [cached for cached, _ in found[:2]] == [0, 0]
    assert found[2][0] > 128  # what is behind the last page was kept in memory, of the base model alone
    assert found[3][0] == 128
    assert torch.equal(found[0][1], found[2][1])
    assert torch.equal(found[1][1], found[3][1])
    assert not torch.equal(found[0][1], found[1][1])


# -- states from elsewhere ---------------------------------------------------------------------------------------------


def test_attached_states_count_as_positions(provider: Any, tmp_path: Path) -> None:
    stretch = importlib.import_module("agentmem.adapters.providers._local_attention").Stretch
    engine = provider._ready()
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        provider.generate(prompt_of(provider, 150, store, 1))
        states = engine.in_place.states(store)
    ids = [(31 * i + 5) % 256 for i in range(200)]

    def passed(cache: Any, part: Sequence[int]) -> torch.Tensor:
        logits, _ = engine.forward(part, cache, (), None)
        return logits  # type: ignore[no-any-return]

    straight = states.made(64)
    passed(straight, ids[:64])
    straight.seal()
    passed(straight, ids[64:128])
    encoded = straight.seal()
    wanted = passed(straight, ids[128:150])
    path = tmp_path / "record.page"
    page = NewPage(identity=bytes(32), parent=bytes(32), number=1, tokens=ids[64:128], codec="int8", encoded=encoded)
    write_page(path, page)

    composed = states.made(64)
    passed(composed, ids[:64])
    composed.seal()
    nowhere = np.ones(8, np.float32), np.zeros(8, np.float32)
    composed.attach([stretch(path.read_bytes(), *nowhere)])
    assert composed.get_seq_length() == 128
    assert composed.attended().record_tokens == 64
    # Another grouping of the same sums: equal within rounding.
    torch.testing.assert_close(passed(composed, ids[128:150]), wanted, atol=1e-3, rtol=1e-3)
    composed.attach([stretch(path.read_bytes(), *nowhere)])
    assert (composed.get_seq_length(), composed.attended().record_tokens) == (214, 128)
    composed = states.made(64)
    passed(composed, ids[:64])
    composed.seal()
    passed(composed, ids[64:100])
    # A tail that is no whole page is sealed before states are attached, and what follows them is sealed as it grows.
    composed.attach([stretch(path.read_bytes(), *nowhere, 0, 40)])
    assert (composed.tail, composed.get_seq_length()) == (0, 140)
    passed(composed, ids[:64])
    composed.seal()
    passed(composed, ids[64:70])
    assert composed.get_seq_length() == 210


def test_a_tail_takes_memory_as_it_grows_and_gives_it_back_when_it_is_sealed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    engine = in_place(models["llama"], tmp_path)._ready()
    with Stored(tmp_path / "pages", grid=64, codec="int8") as store:
        assert engine.states.check()
        states = engine.in_place.states(store)
    cache = states.made(1024)
    whole = cache.position_bytes * 1024

    def resident() -> int:
        start = np.frombuffer(cache._memory, np.uint8).ctypes.data
        for entry in Path("/proc/self/smaps").read_text().split("VmFlags")[:-1]:
            lines = entry.strip().splitlines()
            place = next(line for line in lines if "-" in line.split()[0] and not line.split()[0].endswith(":"))
            low, high = (int(part, 16) for part in place.split()[0].split("-"))
            if low <= start < high:
                return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])
        raise AssertionError("the tail's memory is not in the list of mappings")

    assert (cache.tail_bytes, resident()) == (0, 0)
    engine.forward([5] * 100, cache, (), None)
    assert 0 < resident() <= cache.tail_bytes + mmap.PAGESIZE * 2 * sum(heads for heads, *_ in states.shapes) < whole
    for _ in range(7):
        engine.forward([5] * 132, cache, (), None)
    assert resident() == whole
    cache.seal()
    assert (cache.tail_bytes, resident()) == (0, 0)


def test_no_memory_for_a_tail_is_told_as_such(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = in_place(models["llama"], tmp_path)._ready()
    with Stored(tmp_path / "pages", grid=64, codec="int8") as store:
        assert engine.states.check()
        states = engine.in_place.states(store)

    def refused(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(Unavailable, match="no memory for the KV states of 64 tokens"):
        states.made(64)


# -- told to the user --------------------------------------------------------------------------------------------------


def test_a_reply_and_the_ledger_say_what_was_attended_in_place(models: dict[str, Path], tmp_path: Path) -> None:
    table = {"local": {"device": "cpu", "dtype": "float32", "cache_dir": str(tmp_path / "cache")}}
    with Memory(
        tmp_path / "memory",
        model=f"local:{models['llama']}",
        embedder="none",
        page_codec="k8v4",
        page_tokens=64,
        providers=table,
        system=text(150),
    ) as memory:
        chat = memory.scope(user="ana", session="s")
        reply = chat.chat("and?", max_tokens=4)
        held = reply.cache.attended
        assert held is not None
        assert held.codec == "k8v4"
        assert held.tokens >= 128
        assert 0 < held.bytes < held.stock_bytes
        assert f"{held.tokens} tokens attended in place as k8v4" in str(reply.cache)
        [line] = [line for line in memory.report().lines if line.verb == "chat"]
        assert (line.attended_tokens, line.attended_codec) == (held.tokens, "k8v4")
        assert line.spared_bytes == held.stock_bytes - held.bytes
        assert f"{held.tokens} k8v4" in str(memory.report())


# -- the default model -------------------------------------------------------------------------------------------------

RESTORED = """
import sys
import numpy as np
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_in_place import *
provider = load("local", {"dtype": sys.argv[4], "attention": "in_place"})
with Stored(Path(sys.argv[2]), grid=256, codec=sys.argv[5]) as store:
    ask = asked(PASSAGE, "Who is it about?", pages=store, max_tokens=6)
    generation, logits = Spy(provider).answer(provider, ask, 6)
np.save(sys.argv[3], logits.numpy())
sys.stdout.write(f"{generation.usage.cached_tokens} {generation.attended.tokens} {generation.text!r}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "codec"), [("auto", "int8"), ("float32", "int4")])
def test_smollm2_restored_in_a_new_process_gives_the_same_bits(dtype: str, codec: Codec, tmp_path: Path) -> None:
    made: Any = load("local", {"dtype": dtype, "attention": "in_place"})
    spy = Spy(made)
    with Stored(tmp_path / "store", grid=256, codec=codec) as store:
        ask = asked(PASSAGE, "Who is it about?", pages=store, max_tokens=6)
        cold, wanted = spy.answer(made, ask, 6)
        _, behind = spy.answer(made, ask, 6)  # what the first one left in memory
        assert torch.equal(behind, wanted)
        made.erase_slots()
        live, again = spy.answer(made, ask, 6)
    assert cold.usage.cached_tokens == 0
    assert live.usage.cached_tokens == cold.usage.input_tokens // 256 * 256 >= 512
    assert torch.equal(again, wanted)
    made.close()
    command = [sys.executable, "-c", RESTORED, str(Path(__file__).parent), str(tmp_path / "store")]
    done = subprocess.run(
        [*command, str(tmp_path / "logits.npy"), dtype, codec],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"{live.usage.cached_tokens} {attended(live).tokens} {cold.text!r}"
    assert np.array_equal(np.load(tmp_path / "logits.npy"), wanted.numpy())
