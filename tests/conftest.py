"""What several test modules need: a tiny random model folder with a byte-level tokenizer, made in milliseconds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes share the cores: one thread each, before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_SIZE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
#: What each kind of model has of its own. Windows are shorter than the prompts that tests use.
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "gemma3": ("Gemma3", {"sliding_window": 24, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}),
    "phi": ("Phi", {"hidden_size": 160, "num_attention_heads": 2, "head_dim": 80, "partial_rotary_factor": 0.4}),
    "phi3": ("Phi3", {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 96}),
    "gemma2": ("Gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 16}),
    "mamba": ("Mamba", {}),
}


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer with one token per UTF-8 byte, two special tokens, and the given chat template (or none)."""

    def make(template: str | None = CHATML) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        make_tokenizer: Any = PreTrainedTokenizerFast
        return make_tokenizer(
            tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template
        )

    return make


@pytest.fixture(scope="session")
def tiny_model(byte_tokenizer: Callable[..., Any]) -> Callable[..., Path]:
    """Writes a model folder of a kind (the names in ``_KINDS``) with random float32 weights."""

    def make(folder: Path, kind: str = "llama", *, seed: int = 0, template: str | None = CHATML, **config: Any) -> Path:
        import torch
        import transformers

        family, own = _KINDS[kind]
        size = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "eos_token_id": 257}
        settings = {**(size if kind == "mamba" else _SIZE), **own, **config}
        names = (f"{family}TextConfig", f"{family}Config")
        configured = next(getattr(transformers, name) for name in names if hasattr(transformers, name))(**settings)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{family}ForCausalLM")(configured)
        with torch.no_grad():
            for parameter in model.parameters():  # far enough from zero that every position matters
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(folder)
        byte_tokenizer(template).save_pretrained(folder)
        return folder

    return make
