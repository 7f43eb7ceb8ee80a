"""Recalled records as KV: composed where they would stand, tried before they are trusted, gone when forgotten."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import Memory, prompt
from agentmem.activation.records import RecordPages
from agentmem.activation.store import PageStore
from agentmem.database import Database
from agentmem.provider import Options, RecalledLine, Request
from agentmem.types import Message, Record

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Tiny, local

LINES = (
    "peanuts and cashews make me ill",
    "my boat is called Marigold",
    "Leila studies seals " * 4,
    "tea, no milk, and never in the evening",
)
WINDOW = 16384


def inside(name: str) -> Any:
    """A module of the local provider."""
    return importlib.import_module(f"agentmem.adapters.providers.{name}")


@pytest.fixture(scope="module")
def llama(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama"), max_position_embeddings=WINDOW)


@pytest.fixture
def provider(llama: Path, tmp_path: Path) -> Iterator[Any]:
    made = local(llama, tmp_path)
    yield made
    made.close()


class Kept:
    """A page store in a folder, its exact pages and its records' pages."""

    def __init__(self, folder: Path, *, codec: Any = "raw", repaired: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.database = Database(folder / "memory.db")
        self.store = PageStore(self.database, folder / "pages", grid=16, codec=codec)
        view = self.store.view(b"salt", grid=64)
        self.records = RecordPages(view, self.database, repaired=repaired, lay_out=prompt.made_up)
        self.pages = self.store.view(b"salt")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()
        self.database.close()

    def asked(self, lines: Sequence[str] = LINES, *, shown: int = 1, system: str = "Be kind.") -> Request:
        records = [Record(id=f"r{i}", role="user", text=line) for i, line in enumerate(lines)]
        turn = Message(role="user", content="What do you know?")
        return Request(
            segments=prompt.lay_out(system=system, recalled=records, turn=turn),
            options=Options(max_tokens=2),
            pages=self.pages,
            recalled=tuple(RecalledLine(record=r.id, line=prompt.record_line(r) + "\n", shown=shown) for r in records),
            record_pages=self.records,
        )

    def trusted(self, provider: Any, request: Request) -> Any:
        """The request's recall after the model passed and all its lines were made."""
        records = provider._ready().records
        recall = records.recall(request)
        self.records.note(recall.subject, {"passed": True})
        for _ in range(3):
            records.learn(records.recall(request), None)
        recall = records.recall(request)
        assert recall.composed
        return recall


def logits_of_text(engine: Any, tokens: Sequence[int]) -> torch.Tensor:
    logits, _ = engine.forward(tokens, engine.states.empty(len(tokens)), (), None)
    return torch.as_tensor(logits)


def composed(engine: Any, recall: Any, done: int) -> torch.Tensor:
    """The logits, where the first ``done`` tokens of the head were computed before."""
    cache = engine.states.empty(2000)
    if done:
        engine.forward(recall.pieces.head.tokens[:done], cache, (), None)

    def step(tokens: Sequence[int], inputs: Any) -> torch.Tensor:
        return torch.as_tensor(engine.forward(tokens, cache, (), None, inputs=inputs)[0])

    return torch.as_tensor(engine.records.compose(recall, cache, done, step))


# -- moving ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen2", {"use_sliding_window": False}),
        ("mistral", {"sliding_window": None}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}),
    ],
)
def test_turned_keys_are_what_the_model_computes_there(
    kind: str, config: dict[str, Any], tiny_model: Tiny, tmp_path: Path
) -> None:
    unlike = inside("_local_rotation").unlike
    folder = tiny_model(tmp_path / "model", kind, max_position_embeddings=WINDOW, **config)
    engine = local(folder, tmp_path)._ready()
    assert engine.records.refused is None
    assert engine.states.check()
    assert unlike(engine.records.rotation, engine) is None


def test_angles_that_are_not_the_models_are_found(provider: Any) -> None:
    rotation = inside("_local_rotation")
    engine = provider._ready()
    engine.states.check()
    wrong = rotation.Rotation(engine.records.rotation.frequencies * 1.05)
    assert "can't be moved" in (rotation.unlike(wrong, engine) or "")
    interleaved = rotation.Rotation(engine.records.rotation.frequencies.flip(0))
    assert "can't be moved" in (rotation.unlike(interleaved, engine) or "")


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("gemma3", {}, "see all positions"),
        ("mistral", {}, "see all positions"),
        ("qwen2", {}, "see all positions"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "depend on the length",
        ),
    ],
)
def test_models_whose_states_cannot_be_moved_read_text(
    kind: str,
    config: dict[str, Any],
    reason: str,
    tiny_model: Tiny,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tiny_model(tmp_path / "model", kind, max_position_embeddings=WINDOW, **config)
    provider = local(folder, tmp_path)
    with Kept(tmp_path / "kept") as kept:
        for _ in range(2):
            attended = provider.generate(kept.asked()).attended
            assert attended is None or not attended.record_tokens
    assert sum(reason in record.message for record in caplog.records) >= 1
    assert sum("recalled records stay text" in record.message for record in caplog.records) == 1


# -- composing ---------------------------------------------------------------------------------------------------------


def test_a_record_at_the_place_where_it_was_computed_is_the_text(provider: Any, tmp_path: Path) -> None:
    engine = provider._ready()
    with Kept(tmp_path / "kept") as kept:
        recall = kept.trusted(provider, kept.asked(LINES[:1]))
    primer, [line] = recall.primer, recall.pieces.lines
    rest = recall.pieces.rest
    wanted = logits_of_text(engine, [*primer.tokens, *line, *rest])
    cache = engine.states.empty(2000)
    engine.forward(primer.tokens, cache, (), None)
    got = engine.records.placed(
        cache,
        at=len(primer.tokens),
        lines=[line],
        rows=[engine.records.made(primer, line, (), None)],
        primer=primer,
        skip=0,
        rest=rest,
        step=lambda tokens, inputs: engine.forward(tokens, cache, (), None, inputs=inputs)[0],
    )
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("skip", [0, 5])
@pytest.mark.parametrize("missing", [(), (0,), (1, 2), (3,), (0, 1, 2, 3)])
def test_true_states_compose_to_the_text_whatever_is_computed_anew(
    skip: int, missing: tuple[int, ...], provider: Any, tmp_path: Path
) -> None:
    """States that are cut out of the text itself: then every gap, mask and position must give the text's logits."""
    engine = provider._ready()
    with Kept(tmp_path / "kept") as kept:
        # The second is longer than a step: what stands behind it is there before all of it is computed.
        recall = kept.trusted(provider, kept.asked([LINES[0], LINES[1] * 12, *LINES[2:]]))
    pieces, primer, records = recall.pieces, recall.primer, engine.records
    whole = engine.states.empty(2000)
    wanted, _ = engine.forward(pieces.tokens, whole, (), None)
    at, rows = len(pieces.head.tokens), []
    for line in pieces.lines:
        keys, values = (
            torch.stack([getattr(layer, side)[0, :, at + skip : at + len(line)] for layer in whole.layers])
            for side in ("keys", "values")
        )
        rows.append((records.rotation.turned(keys, len(primer.tokens) - at), values))
        at += len(line)
    cache = engine.states.empty(64)  # too small on purpose: it has to grow around what is placed
    engine.forward(pieces.head.tokens, cache, (), None)
    got = records.placed(
        cache,
        at=len(pieces.head.tokens),
        lines=pieces.lines,
        rows=[None if number in missing else row for number, row in enumerate(rows)],
        primer=primer,
        skip=skip,
        rest=pieces.rest,
        step=lambda tokens, inputs: engine.forward(tokens, cache, (), None, inputs=inputs)[0],
    )
    assert cache.get_seq_length() == len(pieces.tokens)
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("repaired", [False, True])
@pytest.mark.parametrize("room", [64, 128])
@pytest.mark.parametrize("steps", [0, 1])
def test_in_place_and_copied_records_say_the_same(
    steps: int, room: int, repaired: bool, llama: Path, tmp_path: Path
) -> None:
    """The same stored pages, once with turned queries, once with turned keys; after so many steps of the head, with so
    much room in the tail that one pass does for all, or not."""
    got: list[torch.Tensor] = []
    with Kept(tmp_path / "kept", repaired=repaired) as kept:
        for attention in ("in_place", "stock"):
            provider = local(llama, tmp_path, attention=attention)
            engine = provider._ready()
            recall = kept.trusted(provider, kept.asked([*LINES, LINES[0] * 5]))
            recall = replace(recall, parts=(*recall.parts[:1], replace(recall.parts[1], pages=()), *recall.parts[2:]))
            paged = engine.in_place.states(kept.pages)
            assert (paged is None) == (attention == "stock")
            cache = engine.states.empty(2000) if paged is None else paged.made(room)
            done = steps * room
            assert done <= len(recall.pieces.head.tokens)
            for start in range(0, done, room):
                engine.forward(recall.pieces.head.tokens[start : start + room], cache, (), None)
                if paged is not None:
                    cache.seal()

            def step(tokens: Sequence[int], inputs: Any, cache: Any = cache, engine: Any = engine) -> torch.Tensor:
                logits = engine.forward(tokens, cache, (), None, **({} if inputs is None else {"inputs": inputs}))[0]
                if hasattr(cache, "full") and cache.full:
                    cache.seal()
                return torch.as_tensor(logits)

            got.append(engine.records.compose(recall, cache, done, step))
            assert cache.get_seq_length() == len(recall.pieces.tokens)
            provider.close()
    torch.testing.assert_close(got[0], got[1], atol=2e-3, rtol=1e-3)


def test_a_composed_turn_differs_from_the_text_and_names_its_tokens(provider: Any, tmp_path: Path) -> None:
    engine = provider._ready()
    with Kept(tmp_path / "kept") as kept:
        request = kept.asked()
        recall = kept.trusted(provider, request)
        generation = provider.generate(request)
    assert generation.attended.record_tokens == sum(len(line) for line in recall.pieces.lines)
    assert generation.usage.input_tokens == len(recall.pieces.tokens)
    # A record's states have not seen the records before it: that the two differ at all shows that they were used.
    assert not torch.allclose(composed(engine, recall, 0), logits_of_text(engine, recall.pieces.tokens), atol=1e-3)


@pytest.mark.parametrize("done", [0, 7])
def test_the_end_of_the_head_may_be_computed_with_the_rest(done: int, provider: Any, tmp_path: Path) -> None:
    engine = provider._ready()
    with Kept(tmp_path / "kept") as kept:
        recall = kept.trusted(provider, kept.asked())
        whole = composed(engine, recall, len(recall.pieces.head.tokens))
        torch.testing.assert_close(composed(engine, recall, done), whole, atol=2e-3, rtol=1e-3)


def test_a_repaired_turn_computes_the_first_tokens_anew(provider: Any, tmp_path: Path) -> None:
    repaired = inside("_local_records").REPAIRED
    with Kept(tmp_path / "kept", repaired=True) as kept:
        recall = kept.trusted(provider, kept.asked())
        generation = provider.generate(kept.asked())
    longer = [line for line in recall.pieces.lines if len(line) > repaired]
    assert generation.attended.record_tokens == sum(len(line) - repaired for line in longer)


def test_only_the_head_is_kept_as_exact_pages(provider: Any, tmp_path: Path) -> None:
    with Kept(tmp_path / "kept") as kept:
        request = kept.asked()
        kept.trusted(provider, request)
        provider.generate(request)
        head = len(provider._ready().records.recall(request).pieces.head.tokens)
        exact = [entry for entry in kept.store.entries() if not entry.records]
        assert {entry.tokens for entry in exact} == {16}
        assert 0 < len(exact) <= head // 16
        assert provider.generate(request).usage.cached_tokens == 16 * len(exact)


# -- what is stored, and for whom --------------------------------------------------------------------------------------


def test_states_are_made_for_records_that_were_shown_before(provider: Any, tmp_path: Path) -> None:
    with Kept(tmp_path / "kept") as kept:
        first, later = kept.asked(shown=0), kept.asked(shown=1)
        records = provider._ready().records
        kept.records.note(records.recall(first).subject, {"passed": True})
        provider.generate(first)
        assert not records.recall(later).composed
        provider.generate(later)
        assert records.recall(later).composed


def test_short_lines_stay_text(provider: Any, tmp_path: Path) -> None:
    records = provider._ready().records
    with Kept(tmp_path / "kept") as kept:
        request = kept.asked(["tea", *LINES[1:2]])
        kept.records.note(records.recall(request).subject, {"passed": True})
        records.learn(records.recall(request), None)
        short, long = records.recall(request).parts
    assert len(short.tokens) < inside("_local_records").LEAST <= len(long.tokens)
    assert (bool(short.pages), bool(long.pages)) == (False, True)


def test_another_text_id_system_or_tenant_finds_nothing(provider: Any, tmp_path: Path) -> None:
    with Kept(tmp_path / "kept") as kept:
        kept.trusted(provider, kept.asked())
        records = provider._ready().records
        changed = records.recall(kept.asked([LINES[0] + "!", *LINES[1:]]))
        assert [bool(part.pages) for part in changed.parts] == [False, True, True, True]
        moved = records.recall(kept.asked(LINES[::-1]))  # the same texts under other ids
        assert not moved.composed
        other = kept.asked(system="Be rude.")
        kept.records.note(records.recall(other).subject, {"passed": True})
        assert not records.recall(other).composed
        stranger = RecordPages(
            kept.store.view(b"pepper", grid=64), kept.database, repaired=False, lay_out=prompt.made_up
        )
        for part in records.recall(kept.asked()).parts:
            assert not stranger.find(records.recall(kept.asked()).identity, part.record, part.tokens)


def test_a_damaged_record_page_is_computed_instead(provider: Any, tmp_path: Path) -> None:
    with Kept(tmp_path / "kept") as kept:
        recall = kept.trusted(provider, kept.asked())
        kept.store.swap_out()
        path = recall.parts[1].pages[0].path
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        again = provider._ready().records.recall(kept.asked())
        assert [bool(part.pages) for part in again.parts] == [True, False, True, True]
        assert provider.generate(kept.asked()).text


def test_a_cancelled_making_leaves_a_primer_that_still_works(provider: Any, tmp_path: Path) -> None:
    engine = provider._ready()
    with Kept(tmp_path / "kept") as kept:
        recall = kept.trusted(provider, kept.asked())
    line = recall.pieces.lines[2]
    wanted = engine.records.made(recall.primer, line, (), None)
    forward = engine.forward
    engine.forward = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.records.made(recall.primer, line, (), None)
    engine.forward = forward
    for one, other in zip(wanted, engine.records.made(recall.primer, line, (), None), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("failure", [RuntimeError, MemoryError])
@pytest.mark.parametrize("work", ["made", "_try"])
def test_whatever_fails_after_the_answer_does_not_lose_it(
    work: str,
    failure: type[Exception],
    provider: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    records = provider._ready().records
    with Kept(tmp_path / "kept") as kept:
        wanted = provider.generate(kept.asked()).text
        if work == "made":
            kept.records.note(records.recall(kept.asked()).subject, {"passed": True})

        def fail(*_: Any) -> Any:
            raise failure("no room for so many states")

        monkeypatch.setattr(records, work, fail)
        assert provider.generate(kept.asked()).text == wanted
    assert f"{failure.__name__}: no room for so many states" in caplog.text


# -- the trial ---------------------------------------------------------------------------------------------------------


def test_a_model_is_tried_in_the_background_and_once(provider: Any, tmp_path: Path) -> None:
    """Random weights: whatever the verdict is, it is noted with what was measured, and text is used until then."""
    records = provider._ready().records
    with Kept(tmp_path / "kept") as kept:
        provider.generate(kept.asked())
        assert records.wait(0), "a system text that was seen once is not worth a trial"
        provider.generate(kept.asked())
        assert records.wait(60)
        verdict = kept.records.verdict(records.recall(kept.asked()).subject)
        assert isinstance(verdict["passed"], bool)
        assert len(verdict["lists"]) == 6
        assert all(kl >= 0 and noise > 0 for kl, noise, _, _ in verdict["lists"])
        provider.generate(kept.asked())
        assert threading.active_count() == 1 or records.wait(0)
        assert kept.records.verdict(records.recall(kept.asked()).subject) == verdict


def test_a_failed_trial_keeps_text(provider: Any, tmp_path: Path) -> None:
    records = provider._ready().records
    with Kept(tmp_path / "kept") as kept:
        kept.records.note(records.recall(kept.asked()).subject, {"passed": False})
        for _ in range(3):
            attended = provider.generate(kept.asked()).attended
            assert attended is not None
            assert not attended.record_tokens
        assert not any(entry.records for entry in kept.store.entries())


def test_closing_stops_a_trial_which_later_goes_on(llama: Path, tmp_path: Path) -> None:
    lists = inside("_local_records_gate").LISTS
    with Kept(tmp_path / "kept") as kept:
        first = local(llama, tmp_path)
        subject = first._ready().records.recall(kept.asked()).subject
        for _ in range(2):
            first.generate(kept.asked())
        first.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "agentmem record KV"]
        done = kept.records.verdict(subject).get("lists", [])
        assert len(done) < len(lists)
        second = local(llama, tmp_path)
        for _ in range(2):
            second.generate(kept.asked())
        assert second._ready().records.wait(60)
        assert kept.records.verdict(subject)["lists"][: len(done)] == done
        second.close()


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        ((0.1, 0.1, 1.0, 0.9), True),
        ((0.25, 0.2, 1.0, 0.9), False),  # too far from text
        ((0.1, 0.04, 1.0, 0.9), False),  # more than twice the noise of another order
        ((0.1, 0.1, 1.0, 0.7), False),  # too little of the gain kept
        ((0.1, 0.1, -0.1, 0.9), False),  # the records tell this model nothing: it can't be judged
    ],
)
def test_the_bar(row: tuple[float, float, float, float], passed: bool) -> None:
    gate = inside("_local_records_gate")
    assert gate.passes([gate.Measured(*row)] * 3)[0] is passed


# -- the whole loop ----------------------------------------------------------------------------------------------------


def memory(folder: Path, model: Path, **settings: Any) -> Memory:
    local_settings = {"local": {"device": "cpu", "dtype": "float32", "cache_dir": str(folder / "cache")}}
    given: dict[str, Any] = {
        "page_tokens": 16,
        "core_tokens": 0,
        "embedder": "hash",
        "providers": local_settings,
        **settings,
    }
    return Memory(folder / "memory", model=f"local:{model}", **given)


def talk(handle: Any, number: int) -> Any:
    question = "peanuts, boat, seals or tea?"
    return handle.scope(session=f"s{number}").chat(question, max_tokens=2, remember=False)


def trust(opened: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecordPages, "verdict", lambda _self, _subject: {"passed": True})


def test_a_chat_composes_hot_records_and_forgets_them(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory(tmp_path, llama, record_kv="on") as opened:
        trust(opened, monkeypatch)
        ana = opened.scope(user="ana")
        ids = [ana.add(line)[0].id for line in LINES]
        replies = [talk(ana, number) for number in range(4)]
        read = [0 if reply.cache.attended is None else reply.cache.attended.record_tokens for reply in replies]
        assert [bool(count) for count in read] == [False, False, True, True]
        assert replies[-1].cache.attended.record_tokens > 0
        assert "of them recalled records attended in place" in str(replies[-1].cache)
        held = {record for entry in opened.activation.entries() for record in entry.records}
        assert held == set(ids)
        receipt = ana.forget(ids[2])
        assert len(receipt.pages) >= 1
        files = {path.stem for path in (tmp_path / "memory" / "pages").glob("*.page")}
        assert not files & set(receipt.pages)
        ana.update(ids[0], text="walnuts make me ill")
        after = talk(ana, 5)
        assert 0 < after.cache.attended.record_tokens < replies[-1].cache.attended.record_tokens
        assert opened.verify().ok


def test_the_prompt_is_the_same_to_the_byte_where_the_setting_is_off(llama: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, ...]]] = {}
    for mode in ("off", "on"):
        with memory(tmp_path / mode, llama, record_kv=mode) as opened:
            ana = opened.scope(user="ana")
            for line in LINES:
                ana.add(line)
            engine: Any = opened._engine.provider
            forward = engine._ready().forward
            read = seen.setdefault(mode, [])

            def spying(
                tokens: Sequence[int], *rest: Any, forward: Callable[..., Any] = forward, read: Any = read, **named: Any
            ) -> Any:
                if threading.current_thread() is threading.main_thread():
                    read.append(tuple(tokens))
                return forward(tokens, *rest, **named)

            engine._ready().forward = spying
            for number in range(2):
                talk(ana, number)
    assert seen["off"] == seen["on"]


def test_a_lora_and_a_codec_have_states_of_their_own(provider: Any, tmp_path: Path) -> None:
    from agentmem.provider import LoraRef

    with Kept(tmp_path / "kept") as kept, Kept(tmp_path / "kept", codec="int8") as quantised:
        recall = kept.trusted(provider, kept.asked())
        states = provider._ready().records
        taught = LoraRef(name="a", digest="0" * 64, path="nowhere")
        under = states.recall(replace(kept.asked(), loras=(taught,)))
        assert under.identity != recall.identity
        other = states.recall(quantised.asked())
        assert other.subject != recall.subject
        assert not other.composed
