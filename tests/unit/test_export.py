"""Versions as files: a PEFT folder with the version's own bytes, and several versions as their exact sum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agentmem.errors import Corrupt, InvalidInput, NotFound
from agentmem.loras import LoraRef, as_one
from agentmem.parametric.export import export_gguf, export_peft, summed
from agentmem.parametric.lora import Lora, content_digest, load, save

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
CONFIG = SimpleNamespace(model_type="llama", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def ref(
    folder: Path, *modules: str, seed: int = 0, rank: int = 4, base: str = "b", called: tuple[int, ...] = ()
) -> LoraRef:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(rank, 8, generator=generator), torch.randn(6, rank, generator=generator)) for name in modules
    }
    digest = save(folder, Lora(rank, 2.0 * rank, base, tensors, {"base": "00"}, called))
    return LoraRef(name=f"lora-{seed}", digest=digest, path=str(folder), activated=called)


def effect(lora: Lora, module: str) -> torch.Tensor:
    if module not in lora.tensors:
        return torch.zeros(6, 8)
    a, b = lora.tensors[module]
    return (b @ a) * (lora.alpha / lora.rank)


def test_a_folder_keeps_its_bytes_and_says_its_served_name(tmp_path: Path) -> None:
    one = ref(tmp_path / "one", UP)
    folder = export_peft([one], tmp_path / "out")
    assert content_digest(folder) == one.digest
    assert json.loads((folder / "manifest.json").read_text())["served_name"] == one.served_name


def test_several_become_their_exact_sum(tmp_path: Path) -> None:
    refs = [ref(tmp_path / "one", UP, DOWN), replace(ref(tmp_path / "two", UP, seed=1, rank=2), scale=0.5)]
    together = load(export_peft(refs, tmp_path / "out"))
    assert together.rank == 6
    for module in (UP, DOWN):
        parts = sum((effect(load(one.path), module) * one.scale for one in refs), torch.zeros(6, 8))
        assert torch.allclose(effect(together, module), parts, atol=0.02)  # float16 in the files


def test_a_scale_is_in_the_weights_of_the_file(tmp_path: Path) -> None:
    half = replace(ref(tmp_path / "one", UP), scale=0.5)
    assert torch.allclose(effect(summed([half]), UP), effect(load(half.path), UP) * 0.5)
    assert as_one([half]).served_name != half.served_name


def test_the_sums_name_depends_on_the_versions_and_not_on_their_order(tmp_path: Path) -> None:
    one, two = ref(tmp_path / "one", UP), ref(tmp_path / "two", UP, seed=1)
    assert as_one([one, two]).served_name == as_one([two, one]).served_name
    assert as_one([one]).served_name == one.served_name
    assert as_one([one, two]).served_name != as_one([one, replace(two, scale=0.5)]).served_name


def test_a_gguf_file_in_a_folder_is_named_by_the_digest(tmp_path: Path) -> None:
    one, two = ref(tmp_path / "one", UP), ref(tmp_path / "two", UP, seed=1)
    assert export_gguf([one], tmp_path / "out", CONFIG).name == f"{one.served_name}.gguf"
    assert export_gguf([one, two], tmp_path / "out", CONFIG).name.startswith("sum-")
    assert export_gguf([one], tmp_path / "own" / "name.gguf", CONFIG) == tmp_path / "own" / "name.gguf"


@pytest.mark.parametrize("other", [{"base": "another"}, {"called": (1, 2)}])
def test_what_can_not_act_together_is_not_summed(tmp_path: Path, other: dict[str, object]) -> None:
    refs = [ref(tmp_path / "one", UP), ref(tmp_path / "two", UP, seed=1, **other)]  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="each by itself"):
        export_peft(refs, tmp_path / "out")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    one = ref(tmp_path / "one", UP)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="not an empty folder"):
        export_peft([one], tmp_path / "out")
    with pytest.raises(InvalidInput, match="not an empty folder"):
        export_peft([one], tmp_path / "out" / "mine.txt")
    with pytest.raises(InvalidInput, match="twice"):
        export_peft([one, one], tmp_path / "other")
    with pytest.raises(InvalidInput, match="name one"):
        export_peft([], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_damaged_version_is_not_exported(tmp_path: Path) -> None:
    one = ref(tmp_path / "one", UP)
    weights = tmp_path / "one" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    with pytest.raises(Corrupt):
        export_peft([one], tmp_path / "a")
    with pytest.raises(Corrupt):
        export_gguf([one], tmp_path / "b", CONFIG)
    with pytest.raises(NotFound):
        export_gguf([replace(one, path=str(tmp_path / "gone"))], tmp_path / "b", CONFIG)
