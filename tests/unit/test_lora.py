"""LoRA files and the switch: PEFT's format, exact sums, a base that is never touched, refusals."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.errors import Corrupt, InvalidInput, NotFound, TrainingError
from agentmem.parametric.lora import (
    CONFIG,
    WEIGHTS,
    Lora,
    Switch,
    acting_from,
    applied,
    applied_rows,
    base_only,
    content_digest,
    load,
    save,
)
from agentmem.provider import LoraRef

#: peft reads a property of the model that transformers calls deprecated.
quiet_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LAYERS = ("model.layers.1.", "model.layers.2.")


@pytest.fixture
def model(tmp_path: Path, tiny_model: Callable[..., Path]) -> Any:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    return model.eval()


def made(model: Any, seed: int, *, rank: int = 4, layers: tuple[str, ...] = LAYERS, identity: str = "") -> Lora:
    chance = torch.Generator().manual_seed(seed)
    tensors = {
        path: (
            # What float16 holds exactly: a saved one computes the same.
            (torch.randn(rank, module.in_features, generator=chance) * 0.2).half().float(),
            (torch.randn(module.out_features, rank, generator=chance) * 0.2).half().float(),
        )
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path.startswith(layers)
    }
    return Lora(rank, 8.0, "tiny", tensors, {"base": identity} if identity else {})


def stored(folder: Path, lora: Lora, scale: float = 1.0) -> LoraRef:
    return LoraRef(name=folder.name, digest=save(folder, lora), path=str(folder), scale=scale, activated=lora.activated)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=torch.tensor([[5, 90, 31, 7, 7, 200]])).logits
        return out


def test_saving_twice_gives_equal_bytes_and_loading_gives_the_weights_back(model: Any, tmp_path: Path) -> None:
    lora = made(model, 1, identity="ab")
    assert save(tmp_path / "one", lora) == save(tmp_path / "two", lora) == content_digest(tmp_path / "one")
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    back = load(tmp_path / "one")
    assert (back.rank, back.alpha, back.base, back.notes) == (4, 8.0, "tiny", {"base": "ab"})
    assert set(back.tensors) == set(lora.tensors)
    for path, pair in lora.tensors.items():
        for wanted, got in zip(pair, back.tensors[path], strict=True):
            assert torch.equal(wanted.half().float(), got)
    assert stat.S_IMODE(os.stat(tmp_path / "one" / WEIGHTS).st_mode) == 0o600


@quiet_peft
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3"])
def test_peft_loads_our_folder_and_computes_the_same_logits(
    kind: str, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    import peft
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base", kind))
    plain = logits(model)
    lora = made(model, 3)
    ref = stored(tmp_path / "lora", lora)
    Switch(model).activate([ref])
    ours = logits(model)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(again, ref.path)
    adapted = {name for name, _ in theirs.named_modules() if name.endswith("lora_A.default")}
    assert len(adapted) == len(lora.tensors)
    assert torch.allclose(ours, logits(theirs), atol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-2)


@quiet_peft
def test_we_load_what_peft_saves(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    import peft
    import transformers

    base: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = tmp_path / "theirs"
    Switch(model).activate([LoraRef(name="theirs", digest=content_digest(folder), path=str(folder))])
    assert torch.allclose(logits(model), logits(theirs), atol=1e-4)


def test_from_a_to_b_to_the_base_is_exact_each_time(model: Any, tmp_path: Path) -> None:
    base = logits(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    a, b = stored(tmp_path / "a", made(model, 1)), stored(tmp_path / "b", made(model, 2))
    switch = Switch(model)
    switch.activate([a])
    with_a = logits(model)
    switch.activate([b])
    with_b = logits(model)
    switch.activate([a])
    assert torch.equal(logits(model), with_a)
    assert not torch.equal(with_a, with_b)
    switch.activate([])
    assert switch.active == ()
    assert torch.equal(logits(model), base)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_several_loras_add_up_with_their_scales(model: Any, tmp_path: Path) -> None:
    first, second = made(model, 1), made(model, 2, rank=2, layers=("model.layers.2.",))
    a, b = stored(tmp_path / "a", first, 0.5), stored(tmp_path / "b", second, -1.5)
    Switch(model).activate([a, b])
    ours = logits(model)
    Switch(model)  # takes over: the base again
    with torch.no_grad():
        for lora, scale in ((load(a.path), 0.5), (load(b.path), -1.5)):
            for path, (down, up) in lora.tensors.items():
                model.get_submodule(path).weight += scale * lora.alpha / lora.rank * up @ down
    assert torch.allclose(ours, logits(model), atol=1e-4)


def test_a_scale_of_zero_is_the_base(model: Any, tmp_path: Path) -> None:
    base = logits(model)
    Switch(model).activate([stored(tmp_path / "a", made(model, 1), 0.0)])
    assert torch.equal(logits(model), base)


def test_in_bfloat16_the_sum_is_rounded_once(model: Any, tmp_path: Path) -> None:
    lora = made(model, 1)
    model = model.to(torch.bfloat16)
    path = "model.layers.1.mlp.up_proj"
    module, x = model.get_submodule(path), torch.randn(3, 64).bfloat16()
    plain = module(x)
    Switch(model).activate([stored(tmp_path / "a", lora)])
    down, up = load(tmp_path / "a").tensors[path]
    assert torch.equal(module(x), (plain + (x.float() @ down.t()) @ (up * 2).t()).bfloat16())


def test_a_switch_takes_milliseconds(model: Any, tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a", made(model, 1)), stored(tmp_path / "b", made(model, 2))
    switch = Switch(model)
    switch.activate([a])
    switch.activate([b])
    times = []
    for _ in range(20):
        start = time.perf_counter()
        switch.activate([a])
        switch.activate([b])
        times.append((time.perf_counter() - start) / 2)
    assert sorted(times)[10] < 0.005


def test_only_so_many_stay_loaded(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from agentmem.parametric import lora as module

    refs = [stored(tmp_path / str(i), made(model, i)) for i in range(3)]
    size = sum(a.nbytes + b.nbytes for a, b in load(refs[0].path).tensors.values())
    reads: list[str] = []

    def counted(path: str, *, digest: str) -> Lora:
        reads.append(Path(path).name)
        return load(path, digest=digest)

    monkeypatch.setattr(module, "load", counted)
    switch = Switch(model, budget=2 * size)
    for ref in (refs[0], refs[1], refs[0], refs[2], refs[0], refs[1]):
        switch.activate([ref])
    assert reads == ["0", "1", "2", "1"]
    assert switch.loaded == {refs[0].digest: size, refs[1].digest: size}


def test_a_failed_switch_changes_nothing(model: Any, tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a", made(model, 1)), stored(tmp_path / "b", made(model, 2))
    switch = Switch(model)
    switch.activate([a])
    with_a = logits(model)
    weights = tmp_path / "b" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(Corrupt, match="digest differs"):
        switch.activate([b])
    assert switch.active == (a,)
    assert torch.equal(logits(model), with_a)


def test_deleted_files_are_not_served_from_memory(model: Any, tmp_path: Path) -> None:
    import shutil

    a = stored(tmp_path / "a", made(model, 1))
    base = logits(model)
    switch = Switch(model)
    switch.activate([a])
    switch.drop([a.digest])
    switch.settle()
    assert (switch.active, switch.loaded) == ((), {})
    assert torch.equal(logits(model), base)
    switch.activate([a])
    switch.activate([])
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(NotFound):
        switch.activate([a])


def test_a_copied_model_has_no_switch(model: Any, tmp_path: Path) -> None:
    import copy

    switch = Switch(model)
    switch.activate([stored(tmp_path / "a", made(model, 1))])
    switch.activate([])
    other = copy.deepcopy(model)
    assert getattr(other, "_agentmem_switch", None) is None
    with base_only(other):
        assert torch.equal(logits(other), logits(model))


def test_another_model_refuses_it(model: Any, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    import transformers

    ref = stored(tmp_path / "a", made(model, 1, identity="aa"))
    wider = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "wide", intermediate_size=128))
    shorter = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "short", num_hidden_layers=2))
    with pytest.raises(TrainingError, match=r"mlp\.\w+ is \["):
        Switch(wider).activate([ref])
    with pytest.raises(TrainingError, match="doesn't have"):
        Switch(shorter).activate([ref])
    with pytest.raises(TrainingError, match="another base"):
        Switch(model, identity=b"\xbb").activate([ref])
    Switch(model, identity=b"\xaa").activate([ref])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_dora": True}, TrainingError),
        ({"use_rslora": True}, TrainingError),
        ({"bias": "all"}, TrainingError),
        ({"modules_to_save": ["lm_head"]}, TrainingError),
        ({"rank_pattern": {"q_proj": 3}}, TrainingError),
        ({"peft_type": "IA3"}, TrainingError),
        ({"r": 0}, Corrupt),
        ({"r": 3}, Corrupt),
        ({"r": True}, Corrupt),
        ({"lora_alpha": "16"}, Corrupt),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    model: Any, tmp_path: Path, change: dict[str, Any], error: type[Exception]
) -> None:
    save(tmp_path, made(model, 1))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(error):
        load(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\x00" * 8, b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"[1,2,3]x"])
def test_damaged_weights_are_a_named_error(model: Any, tmp_path: Path, damage: bytes) -> None:
    save(tmp_path, made(model, 1))
    (tmp_path / WEIGHTS).write_bytes(damage)
    with pytest.raises(Corrupt):
        load(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(NotFound):
        load(tmp_path)


def test_weights_that_are_not_finite_are_not_stored(model: Any, tmp_path: Path) -> None:
    lora = made(model, 1)
    next(iter(lora.tensors.values()))[1][0, 0] = float("inf")
    with pytest.raises(TrainingError, match="not finite"):
        save(tmp_path / "a", lora)
    assert not (tmp_path / "a").exists()


def test_weights_in_memory_act_alone_and_leave_what_was_there(model: Any, tmp_path: Path) -> None:
    stored_lora, other = made(model, 1), made(model, 2)
    base = logits(model)
    switch = Switch(model)
    ref = stored(tmp_path / "a", stored_lora)
    with applied(model, other):
        with_other = logits(model)
    switch.activate([ref])
    with_a = logits(model)
    with applied(model, other):
        assert torch.equal(logits(model), with_other)
    with base_only(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), with_a)


OPENING = (256, 97, 10)  # as an assistant's turn begins


def activated(lora: Lora, tokens: tuple[int, ...] = OPENING) -> Lora:
    return replace(lora, activated=tokens)


def read(model: Any, rows: list[list[int]], **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(input_ids=torch.tensor(rows), **more).logits
        return out


def test_an_activated_lora_leaves_what_stands_before_its_invocation_alone(model: Any, tmp_path: Path) -> None:
    ids = [*OPENING, 5, 90, 31, *OPENING, 7, 7, 200]
    base = read(model, [ids])
    lora = activated(made(model, 1))
    ref = stored(tmp_path / "late", lora)
    assert load(ref.path).activated == OPENING
    with applied(model, lora):
        late = read(model, [ids])
        unasked = read(model, [[5, 90, 31, 7]])
    assert torch.equal(late[:, :6], base[:, :6])  # the last invocation counts, as in PEFT
    assert not torch.allclose(late[:, 6], base[:, 6], atol=1e-3)
    assert torch.equal(unasked, read(model, [[5, 90, 31, 7]]))
    with pytest.raises(TrainingError, match="activated by"):  # a KV page would be kept under the wrong identity
        Switch(model).activate([replace(ref, activated=())])


@quiet_peft
def test_peft_activates_our_folder_at_the_same_token(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    import peft
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    lora = activated(made(model, 3))
    save(tmp_path / "lora", lora)
    rows = [[5, 90, 31, *OPENING, 7], [*OPENING, 8, 9, 30, 31], [1, 2, 3, 4, 5, 6, 7]]
    with applied(model, lora):
        ours = read(model, rows)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(again, str(tmp_path / "lora"))
    with torch.inference_mode():
        other = theirs(input_ids=torch.tensor(rows)).logits
    assert torch.allclose(ours, other, atol=1e-4)
    assert not torch.allclose(ours[:2], read(model, rows)[:2], atol=1e-2)


def test_what_follows_in_the_same_cache_goes_on_activated(model: Any) -> None:
    rows = [[5, 90, 31, *OPENING, 7], [*OPENING, 8, 9, 30, 31], [1, 2, 3, 4, 5, 6, 7]]
    more = [[40, 41], [42, 43], [44, 45]]
    with applied(model, activated(made(model, 1))):
        whole = read(model, [[*a, *b] for a, b in zip(rows, more, strict=True)])
        with torch.inference_mode():
            first = model(input_ids=torch.tensor(rows), use_cache=True)
            second = model(input_ids=torch.tensor(more), past_key_values=first.past_key_values, use_cache=True)
        assert torch.allclose(second.logits, whole[:, 7:], atol=1e-4)
        with acting_from(model, 0):
            everywhere = read(model, rows)
        with acting_from(model, [7, 7, 7]):
            nowhere = read(model, rows)
        with acting_from(model, [3, 0, 7]):
            told = read(model, rows)
        assert torch.allclose(told, read(model, rows), atol=1e-5)  # it is where their invocations stand
    with applied(model, made(model, 1)):
        assert torch.allclose(everywhere, read(model, rows), atol=1e-5)
    assert torch.equal(nowhere, read(model, rows))


def test_rows_of_a_batch_carry_loras_of_their_own(model: Any, tmp_path: Path) -> None:
    a, b = made(model, 1), made(model, 2, rank=2, layers=("model.layers.2.",))
    late = activated(made(model, 3))
    sets: list[list[Lora]] = [[a], [], [b, a], [late], [a], [late, b]]
    rows = [[5, 90, 31, *OPENING, 7, row] for row in range(6)]
    alone = []
    for row, loras in zip(rows, sets, strict=True):
        with applied(model, *loras):
            alone.append(read(model, [row]))
    with applied_rows(model, sets):
        together = read(model, rows)
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
    assert not torch.allclose(together, read(model, rows), atol=1e-2)
    refs = {id(lora): stored(tmp_path / str(i), lora) for i, lora in enumerate([a, b, late])}
    switch = Switch(model)
    switch.activate([refs[id(b)]])
    before = read(model, rows)
    with switch.rows([[refs[id(lora)] for lora in row] for row in sets]):
        assert torch.allclose(read(model, rows), torch.cat(alone), atol=1e-4)
        with pytest.raises(InvalidInput, match="6 rows"):
            read(model, rows[:2])
    assert torch.equal(read(model, rows), before)
