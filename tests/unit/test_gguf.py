"""A LoRA as GGUF: the names and metadata that llama.cpp reads, its order of rows, files that are whole or absent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch

from agentmem.errors import Full, MissingDependency, StoreError, TrainingError
from agentmem.parametric.gguf import DIGEST, write_gguf
from agentmem.parametric.lora import Lora

CONFIG = SimpleNamespace(model_type="llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
DIGEST_HEX = "ab" * 32


def lora(
    *modules: str, rows: int = 64, columns: int = 32, rank: int = 4, activated: tuple[int, ...] = (), seed: int = 0
) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
        for name in modules
    }
    return Lora(rank, 8.0, "local:tiny", tensors, {}, activated)


def written(path: Path, made: Lora, config: Any = CONFIG) -> Any:
    return gguf.GGUFReader(write_gguf(path, made, config, name="lora-x", digest=DIGEST_HEX))


def tensors(reader: Any) -> dict[str, Any]:
    return {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}


def test_it_says_what_it_is(tmp_path: Path) -> None:
    reader = written(tmp_path / "a.gguf", lora("model.layers.2.mlp.down_proj"))
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.type"] == "adapter"
    assert told["general.architecture"] == "llama"
    assert told["adapter.type"] == "lora"
    assert told["adapter.lora.alpha"] == 8.0
    assert told["general.name"] == "lora-x"
    assert told[DIGEST] == DIGEST_HEX
    assert "adapter.alora.invocation_tokens" not in told


def test_an_activated_one_names_the_tokens_that_call_it(tmp_path: Path) -> None:
    reader = written(tmp_path / "a.gguf", lora("model.layers.0.mlp.up_proj", activated=(1, 520, 198)))
    field = reader.fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [1, 520, 198]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]


def test_mlp_weights_stay_as_they_are(tmp_path: Path) -> None:
    made = lora("model.layers.2.mlp.down_proj")
    found = tensors(written(tmp_path / "a.gguf", made))
    a, b = made.tensors["model.layers.2.mlp.down_proj"]
    assert torch.equal(found["blk.2.ffn_down.weight.lora_a"], a)
    assert torch.equal(found["blk.2.ffn_down.weight.lora_b"], b)


@pytest.mark.parametrize(("module", "name", "heads"), [("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)])
def test_rows_of_q_and_k_follow_llama_cpps_order_head_by_head(
    tmp_path: Path, module: str, name: str, heads: int
) -> None:
    """Row 2i + j of a head there is row j * half + i here: neighbours are rotated there, halves here."""
    path = f"model.layers.1.self_attn.{module}"
    made = lora(path)
    found = tensors(written(tmp_path / "a.gguf", made))[f"blk.1.{name}.weight.lora_b"]
    here = made.tensors[path][1]
    size = 64 // heads
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                assert torch.equal(found[head * size + 2 * i + j], here[head * size + j * size // 2 + i])


def test_bases_that_rotate_halves_keep_their_rows(tmp_path: Path) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "model_type": "qwen2"})
    made = lora("model.layers.1.self_attn.q_proj")
    reader = written(tmp_path / "a.gguf", made, config)
    assert reader.fields["general.architecture"].contents() == "qwen2"
    found = tensors(reader)["blk.1.attn_q.weight.lora_b"]
    assert torch.equal(found, made.tensors["model.layers.1.self_attn.q_proj"][1])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi", "phi3"])
def test_every_linear_layer_of_a_block_has_a_name(tmp_path: Path, tiny_model: Callable[..., Path], kind: str) -> None:
    """By the model's real module paths; transformers' own reader of GGUF knows the same names."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / kind, kind))
    linear = {
        name: (torch.zeros(2, module.in_features), torch.ones(module.out_features, 2))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    found = tensors(written(tmp_path / "a.gguf", Lora(2, 2.0, kind, linear), model.config))
    assert len(found) == 2 * len(linear)
    assert all(name.startswith("blk.") for name in found)


def test_a_base_without_a_name_in_gguf_is_refused_by_name(tmp_path: Path) -> None:
    config = SimpleNamespace(**{**vars(CONFIG), "model_type": "mamba"})
    with pytest.raises(TrainingError, match="mamba"):
        write_gguf(tmp_path / "a.gguf", lora("model.layers.0.mixer.in_proj"), config, name="x", digest=DIGEST_HEX)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["lm_head", "model.layers.0.mlp.third_proj", "model.layers.7.mlp.up_proj"])
def test_a_module_without_a_name_in_gguf_is_refused_by_name(tmp_path: Path, module: str) -> None:
    with pytest.raises(TrainingError, match=module):
        write_gguf(tmp_path / "a.gguf", lora(module), CONFIG, name="x", digest=DIGEST_HEX)
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="q_proj has 60 rows"):
        write_gguf(
            tmp_path / "a.gguf", lora("model.layers.0.self_attn.q_proj", rows=60), CONFIG, name="x", digest=DIGEST_HEX
        )


def test_equal_loras_give_equal_files_that_only_their_owner_reads(tmp_path: Path) -> None:
    made = lora("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj")
    files = [write_gguf(tmp_path / name, made, CONFIG, name="x", digest=DIGEST_HEX) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_mode & 0o777 == 0o600


def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, lora("model.layers.0.mlp.up_proj"), CONFIG, name="x", digest=DIGEST_HEX)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Full, match=r"a\.gguf"):
        write_gguf(path, lora("model.layers.0.mlp.up_proj", seed=1), CONFIG, name="x", digest=DIGEST_HEX)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.gguf"):
        write_gguf(
            tmp_path / "none" / "a.gguf", lora("model.layers.0.mlp.up_proj"), CONFIG, name="x", digest=DIGEST_HEX
        )


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match="pip install gguf"):
        write_gguf(tmp_path / "a.gguf", lora("model.layers.0.mlp.up_proj"), CONFIG, name="x", digest=DIGEST_HEX)
