"""LoRA weights as files and on a model: PEFT's folder format, and switching versions on a loaded model in place.

Knows tensors, module paths and the two files of a PEFT folder; knows nothing of records, scopes or which version is
right. Nothing is ever merged into the base weights: a forward hook adds B(Ax) to a Linear's output, and a model with
no LoRA active has no hook at all, so its output is the base's, bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import Corrupt, Full, NotFound, StoreError, TrainingError
from agentmem.provider import LoraRef

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "Delta",
    "Lora",
    "Switch",
    "applied",
    "base_only",
    "content_digest",
    "disk_error",
    "flush_folder",
    "load",
    "save",
    "write_file",
]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: No size from a file is trusted: a LoRA of every Linear of a 70B model at rank 64 is under 4 GiB.
_LARGEST = {CONFIG: 1 << 20, WEIGHTS: 4 << 30}
#: Variants of LoRA that change the arithmetic: a folder that uses one is refused, never served wrongly.
_UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
)
_OWNER = "_agentmem_switch"


@dataclass(frozen=True)
class Lora:
    """LoRA weights in memory (Hu et al. 2021): each Linear at ``path`` gains (alpha / rank) · B A.

    ``tensors[path]`` is (A [rank, in features], B [out features, rank]). ``base`` is the name of the model it was
    trained on; ``notes`` are short strings kept in the weights file (and so in its digest).
    """

    rank: int
    alpha: float
    base: str
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    notes: Mapping[str, str] = field(default_factory=dict)


def save(folder: str | os.PathLike[str], lora: Lora) -> str:
    """Write ``lora`` as a PEFT folder (float16 weights), flushed to the disk; returns its content digest.

    Two saves of equal weights give equal bytes. Raises `TrainingError` for weights that are not finite in float16,
    `Full` for a full disk, `StoreError` for any other failure to write.
    """
    import torch

    halves: dict[str, torch.Tensor] = {}
    for path, (a, b) in lora.tensors.items():
        for letter, tensor in (("A", a), ("B", b)):
            half = tensor.detach().to("cpu", torch.float16).contiguous()
            if not bool(torch.isfinite(half).all()):
                raise TrainingError(f"the LoRA of {path} is not finite in float16: train again with a lower rate")
            halves[f"{_PREFIX}{path}.lora_{letter}.weight"] = half
    weights = _safetensors(halves, {"format": "pt", **lora.notes})
    config = json.dumps(_config(lora), indent=2, sort_keys=True).encode()
    folder = Path(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in ((CONFIG, config), (WEIGHTS, weights)):
            write_file(folder / name, content)
        flush_folder(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    return _digest(config, weights)


def load(folder: str | os.PathLike[str], *, digest: str | None = None) -> Lora:
    """The LoRA of a PEFT folder, in float32 on the CPU. With ``digest``, exactly these bytes or `Corrupt`.

    Raises `NotFound` where there is no such folder, `Corrupt` for damaged files, and `TrainingError` for a PEFT
    method that is not plain LoRA (DoRA, rsLoRA, trained biases and the like).
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load as parsed

    config, weights = _read(Path(folder))
    if digest is not None and _digest(config, weights) != digest:
        raise Corrupt(f"the LoRA in {folder} is not what was stored (its digest differs): train it again")
    try:
        settings = json.loads(config)
        flat = parsed(weights)
        length = int.from_bytes(weights[:8], "little")
        notes = json.loads(weights[8 : 8 + length]).get("__metadata__", {})
    except (ValueError, RecursionError, SafetensorError) as error:
        raise Corrupt(f"the LoRA in {folder} can't be read ({error}): train it again") from error
    rank, alpha, base = _settings(settings, folder)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        path, _, letter = key.removesuffix(".weight").rpartition(".lora_")
        if not key.startswith(_PREFIX) or letter not in ("A", "B") or tensor.dim() != 2:
            raise TrainingError(f"{folder} holds {key!r}, which is not the A or B of a LoRA on a Linear layer")
        pairs.setdefault(path.removeprefix(_PREFIX), {})[letter] = tensor.to(torch.float32)
    for path, pair in pairs.items():
        if len(pair) != 2 or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise Corrupt(f"{folder}: A and B of {path} don't fit the rank {rank} of its {CONFIG}")
    if not pairs:
        raise Corrupt(f"{folder} holds no LoRA weights")
    tensors = {path: (pair["A"], pair["B"]) for path, pair in sorted(pairs.items())}
    return Lora(rank, alpha, base, tensors, {name: text for name, text in notes.items() if name != "format"})


def content_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over the folder's two files, in hex: the identity of a LoRA version. Raises `NotFound` or `Corrupt`."""
    return _digest(*_read(Path(folder)))


class Switch:
    """Puts LoRA versions on a loaded model and takes them off, in place; the base weights are never written.

    A version is read and its digest checked when it is first used; after that a switch costs well under a millisecond
    for a small model (``keep`` versions stay in memory, the least recently used goes first). The caller holds the
    model's lock around `activate` and the forward pass that relies on it. A model has one switch: a later one takes
    over.

    ``identity`` is the base's identity; a LoRA that was trained on another one is refused.
    """

    def __init__(self, model: torch.nn.Module, *, identity: bytes | None = None, keep: int = 8) -> None:
        import torch

        previous: Switch | None = getattr(model, _OWNER, None)
        if previous is not None:
            previous.activate(())
        self._modules = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._identity = identity
        self._keep = keep
        self._loaded: OrderedDict[str, _Deltas] = OrderedDict()
        self._hooks: list[Any] = []
        self._active: tuple[LoraRef, ...] = ()
        # A plain attribute, not a submodule: the switch holds the Linear layers, so the model must not own it as one.
        object.__setattr__(model, _OWNER, self)

    @property
    def active(self) -> tuple[LoraRef, ...]:
        """The versions that act on the model now."""
        return self._active

    def activate(self, refs: Sequence[LoraRef]) -> None:
        """Make exactly these versions act on the model: the sum of their B A · alpha/rank · scale; none is the base.

        Raises `NotFound` or `Corrupt` for a folder that is gone or damaged, and `TrainingError` for one that doesn't
        fit this model; what was active before then stays active.
        """
        wanted = tuple(refs)
        loaded = [(self._load(ref), ref.scale) for ref in wanted]
        if wanted == self._active:
            return
        deltas = _sum(loaded)
        self._remove()
        try:
            self._hooks = _attach(self._modules, deltas)
        except BaseException:
            self._remove()
            raise
        self._active = wanted

    def drop(self, digests: Sequence[str]) -> None:
        """Forget loaded versions, and take them off the model if they are on it (after their files were deleted)."""
        gone = set(digests)
        if any(ref.digest in gone for ref in self._active):
            self.activate([ref for ref in self._active if ref.digest not in gone])
        for digest in gone:
            self._loaded.pop(digest, None)

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """The base alone inside the block, then the same versions as before."""
        before = self._active
        self.activate(())
        try:
            yield
        finally:
            self.activate(before)

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._active = [], ()

    def _load(self, ref: LoraRef) -> _Deltas:
        found = self._loaded.get(ref.digest)
        if found is not None and os.path.exists(ref.path):  # a forgotten version must not live on in memory
            self._loaded.move_to_end(ref.digest)
            return found
        self._loaded.pop(ref.digest, None)
        lora = load(ref.path, digest=ref.digest)
        base = lora.notes.get("base")
        if self._identity is not None and base is not None and base != self._identity.hex():
            raise TrainingError(f"{ref.name} was trained on another base ({lora.base}): train it again on this model")
        deltas = _fit(self._modules, lora, ref.name)
        self._loaded[ref.digest] = deltas
        while len(self._loaded) > self._keep:
            self._loaded.popitem(last=False)
        return deltas


@contextlib.contextmanager
def applied(model: torch.nn.Module, lora: Lora) -> Generator[None]:
    """Only ``lora`` acts on the model inside the block (weights from memory: a version that is not stored yet)."""
    import torch

    modules = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    with base_only(model):
        hooks = _attach(modules, _fit(modules, lora, "the LoRA"))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def base_only(model: torch.nn.Module) -> Generator[None]:
    """No LoRA acts on the model inside the block."""
    switch: Switch | None = getattr(model, _OWNER, None)
    if switch is None:
        yield
    else:
        with switch.paused():
            yield


class Delta:
    """Forward hook of one Linear: adds (x Aᵀ) Bᵀ in the precision of A and B, then rounds once to the Linear's dtype.

    ``down`` is Aᵀ [in, rank], ``up`` is Bᵀ [rank, out] with every factor in it.
    """

    __slots__ = ("down", "up")

    def __init__(self, down: torch.Tensor, up: torch.Tensor) -> None:
        self.down = down
        self.up = up

    def __call__(self, _module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return (output + (inputs[0].to(self.down.dtype) @ self.down) @ self.up).to(output.dtype)


_Deltas = Mapping[str, Delta]


def _attach(modules: Mapping[str, torch.nn.Module], deltas: _Deltas) -> list[Any]:
    return [modules[path].register_forward_hook(delta) for path, delta in deltas.items()]


def _fit(modules: Mapping[str, Any], lora: Lora, name: str) -> _Deltas:
    """The hooks of a LoRA on the model's device, after checking that every path and shape is the model's."""
    deltas: dict[str, Delta] = {}
    for path, (a, b) in lora.tensors.items():
        module = modules.get(path)
        if module is None:
            raise TrainingError(f"{name} has weights for {path}, which this model doesn't have: it needs {lora.base}")
        if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
            raise TrainingError(
                f"{name}: {path} is [{b.shape[0]}, {a.shape[1]}], this model's is "
                f"[{module.out_features}, {module.in_features}]: it needs {lora.base}"
            )
        device = module.weight.device
        deltas[path] = Delta(a.to(device).float().t(), (b.to(device).float() * (lora.alpha / lora.rank)).t())
    return deltas


def _sum(parts: Sequence[tuple[_Deltas, float]]) -> _Deltas:
    """The exact sum of several LoRAs: their ranks side by side (PEFT's ``cat``), not an average of their weights."""
    import torch

    parts = [part for part in parts if part[1] != 0.0]
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    paths = sorted({path for deltas, _ in parts for path in deltas})
    total: dict[str, Delta] = {}
    for path in paths:
        here = [(deltas[path], scale) for deltas, scale in parts if path in deltas]
        down = torch.cat([delta.down for delta, _ in here], dim=1)
        total[path] = Delta(down, torch.cat([delta.up * scale for delta, scale in here], dim=0))
    return total


def _config(lora: Lora) -> dict[str, Any]:
    """PEFT's adapter_config.json. Layers are named by number where the paths have one, as PEFT and vLLM read it."""
    paths = sorted(lora.tensors)
    numbers = sorted({int(part) for path in paths for part in path.split(".") if part.isdigit()})
    return {
        "base_model_name_or_path": lora.base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": "layers" if numbers else None,
        "layers_to_transform": numbers or None,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": sorted({path.rpartition(".")[2] for path in paths}),
        "task_type": "CAUSAL_LM",
    }


def _settings(settings: Any, folder: object) -> tuple[int, float, str]:
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise TrainingError(f"{folder}: {CONFIG} is not of a LoRA (peft_type LORA)")
    strange = [key for key in _UNSUPPORTED if settings.get(key)]
    if strange or settings.get("bias", "none") != "none":
        raise TrainingError(f"{folder} uses {', '.join(strange) or 'trained biases'}: only plain LoRA can be served")
    rank, alpha, base = settings.get("r"), settings.get("lora_alpha"), settings.get("base_model_name_or_path")
    if type(rank) is not int or not 0 < rank <= 4096 or type(alpha) not in (int, float):
        raise Corrupt(f"{folder}: {CONFIG} has rank {rank!r} and alpha {alpha!r}")
    return rank, float(alpha or 0), str(base or "its base")


def _safetensors(tensors: Mapping[str, torch.Tensor], notes: Mapping[str, str]) -> bytes:
    """A safetensors file. Written here because the library orders its metadata at random: the digest would be too."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(notes.items()))}
    content = bytearray()
    for name, tensor in sorted(tensors.items()):
        start = len(content)
        content += tensor.numpy().astype("<f2").tobytes()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, len(content)]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + bytes(content)


def _digest(config: bytes, weights: bytes) -> str:
    sha = hashlib.sha256(len(config).to_bytes(8, "little"))
    sha.update(config)
    sha.update(weights)
    return sha.hexdigest()


def _read(folder: Path) -> tuple[bytes, bytes]:
    contents: list[bytes] = []
    for name, largest in _LARGEST.items():
        try:
            with open(folder / name, "rb") as file:
                content = file.read(largest + 1)
        except FileNotFoundError as error:
            raise NotFound(f"there is no LoRA in {folder} ({name} is missing)") from error
        except OSError as error:
            raise StoreError(f"{folder / name} can't be read ({error.strerror or error})") from error
        if len(content) > largest:
            raise Corrupt(f"{folder / name} is larger than {largest} bytes: not a LoRA of ours")
        contents.append(content)
    return contents[0], contents[1]


def write_file(path: Path, content: bytes) -> None:
    """A private file with these bytes, flushed to the disk."""
    with open(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(error: OSError, path: object) -> StoreError:
    """A failed write as one of our errors."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Full(f"no room to write {path}: free some disk space; what was stored before is intact")
    return StoreError(f"{path} can't be written ({error.strerror or error})")
