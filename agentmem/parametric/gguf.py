"""A LoRA as a GGUF file, as llama.cpp and Ollama read it.

Knows GGUF's names and the order of rows that llama.cpp gives a base's weights; knows nothing of versions, records or
servers. The file's layout is that of llama.cpp's own converter (``convert_lora_to_gguf.py``): metadata
``general.type = adapter``, ``adapter.type = lora``, ``adapter.lora.alpha``, and per Linear two tensors named after the
base's, ``<name>.lora_a`` and ``<name>.lora_b``.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import MissingDependency, TrainingError

from .lora import Lora, disk_error, flush_folder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ARCHITECTURES", "DIGEST", "write_gguf"]

#: The name that llama.cpp gives a kind of base model (transformers' ``model_type``), and whether its converter orders
#: the rows of the query and key weights anew for rotary positions (those whose rope is of the "norm" type there).
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "smollm3": ("smollm3", True),
    "granite": ("granite", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma": ("gemma", False),
    "gemma2": ("gemma2", False),
    "gemma3": ("gemma3", False),
    "gemma3_text": ("gemma3", False),
    "phi": ("phi2", False),
    "phi3": ("phi3", False),
    "olmo2": ("olmo2", False),
    "stablelm": ("stablelm", False),
    "starcoder2": ("starcoder2", False),
}
#: Our own metadata: the SHA-256 of the version, in hex, which its file's name holds the first digits of.
DIGEST = "agentmem.lora.digest"


def write_gguf(path: str | os.PathLike[str], lora: Lora, config: Any, *, name: str, digest: str) -> Path:
    """Write ``lora`` as the GGUF file ``path`` (float32), flushed to the disk and whole at once; returns its path.

    ``config`` is the base's transformers configuration. ``name`` and ``digest`` go into the metadata, and the token ids
    that call an activated LoRA (``adapter.alora.invocation_tokens``). The file of an equal LoRA is equal. Raises
    `TrainingError` for a base or a module that GGUF has no name for, `MissingDependency` without the package ``gguf``,
    `Full` or `StoreError` where the file can't be written; then there is no new file.
    """
    gguf = _package()
    architecture, tensors = _tensors(gguf, lora, config)
    target = Path(path)
    staging = target.with_name(f".{target.stem}-{uuid.uuid4().hex}")
    try:
        os.close(os.open(staging, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # as private as the records
        writer = gguf.GGUFWriter(staging, architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(lora.alpha))
            writer.add_string(DIGEST, digest)
            if lora.activated:
                types = gguf.GGUFValueType
                key = "adapter.alora.invocation_tokens"  # older releases of the package have no constant for it
                writer.add_key_value(key, [int(token) for token in lora.activated], types.ARRAY, types.UINT32)
            for called, tensor in tensors.items():
                writer.add_tensor(called, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        with open(staging, "rb") as file:
            os.fsync(file.fileno())
        staging.replace(target)
        flush_folder(target.parent)
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        with contextlib.suppress(OSError):
            staging.unlink(missing_ok=True)
    return target


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise MissingDependency("a GGUF file needs the package 'gguf': pip install gguf") from error
    return gguf


def _tensors(gguf: Any, lora: Lora, config: Any) -> tuple[str, dict[str, npt.NDArray[np.float32]]]:
    """The base's kind and the tensors by their names there, rows in llama.cpp's order."""
    import numpy as np

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "model_type", ""))
    if kind not in ARCHITECTURES:
        raise TrainingError(
            f"a LoRA for a base of the kind {kind!r} can't be written as GGUF: there are {', '.join(ARCHITECTURES)}; "
            "export it as a PEFT folder"
        )
    architecture, ordered = ARCHITECTURES[kind]
    names = _names(gguf, architecture, int(text.num_hidden_layers))
    heads = int(text.num_attention_heads)
    turned = {"attn_q": heads, "attn_k": int(getattr(text, "num_key_value_heads", None) or heads)} if ordered else {}
    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for module, (a, b) in sorted(lora.tensors.items()):
        called = names.get_name(_in_text_model(module))
        if called is None or not called.startswith("blk."):
            raise TrainingError(
                f"{module} has no name in GGUF for {architecture}: export this LoRA as a PEFT folder, or train the "
                "attention and MLP layers only"
            )
        up = np.ascontiguousarray(b.detach().float().cpu().numpy())
        if (count := turned.get(called.rpartition(".")[2])) is not None:
            up = _turned(up, count, module)
        tensors[f"{called}.weight.lora_a"] = np.ascontiguousarray(a.detach().float().cpu().numpy())
        tensors[f"{called}.weight.lora_b"] = up
    return architecture, tensors


def _names(gguf: Any, architecture: str, layers: int) -> Any:
    """The package's map from the names of modules to GGUF's."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise TrainingError(f"the installed package 'gguf' does not know {architecture}: pip install --upgrade gguf")
    return gguf.get_tensor_name_map(known[architecture], layers)


def _in_text_model(module: str) -> str:
    """A module's path as a model of text alone has it."""
    for prefix, instead in (("model.language_model.", "model."), ("language_model.", "")):
        if module.startswith(prefix):
            return instead + module.removeprefix(prefix)
    return module


def _turned(up: npt.NDArray[np.float32], heads: int, module: str) -> npt.NDArray[np.float32]:
    """B [out, rank] with its rows as llama.cpp orders those of the base: in each head, the two halves interleaved.

    transformers rotates the first half of a head against its second, llama.cpp neighbours.
    """
    import numpy as np

    rows = up.shape[0]
    if heads <= 0 or rows % (2 * heads):
        raise TrainingError(f"{module} has {rows} rows, which are not {heads} heads of an even size")
    halves = up.reshape(heads, 2, rows // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, -1))
