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
import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentmem.errors import Corrupt, Full, NotFound, StoreError, TrainingError
from agentmem.provider import LoraRef

from .deltas import Delta, Fitted, Gathered, Reach, attach, fit, linears, reach_of, summed

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONFIG",
    "LOADED_BYTES",
    "WEIGHTS",
    "Delta",
    "Lora",
    "Switch",
    "acting_from",
    "applied",
    "applied_rows",
    "base_only",
    "content_digest",
    "disk_error",
    "flush_folder",
    "load",
    "save",
    "there",
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
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
)
_OWNER = "_agentmem_switch"
#: PEFT's name in adapter_config.json for what calls an activated LoRA.
_INVOCATION = "alora_invocation_tokens"
#: Versions, and sums of them, kept in memory by default: some eighty of a 135M model's.
LOADED_BYTES = 256 << 20


@dataclass(frozen=True)
class Lora:
    """LoRA weights in memory (Hu et al. 2021): each Linear at ``path`` gains (alpha / rank) · B A.

    ``tensors[path]`` is (A [rank, in features], B [out features, rank]). ``base`` is the name of the model it was
    trained on; ``notes`` are short strings kept in the weights file (and so in its digest). With ``activated``, token
    ids, it acts only from the last place on where they stand in the prompt (aLoRA, arXiv 2504.12397).
    """

    rank: int
    alpha: float
    base: str
    tensors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    notes: Mapping[str, str] = field(default_factory=dict)
    activated: tuple[int, ...] = ()


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
    rank, alpha, base, activated = _settings(settings, folder)
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
    notes = {name: text for name, text in notes.items() if name != "format"}
    return Lora(rank, alpha, base, tensors, notes, activated)


def content_digest(folder: str | os.PathLike[str]) -> str:
    """SHA-256 over the folder's two files, in hex: the identity of a LoRA version. Raises `NotFound` or `Corrupt`."""
    return _digest(*_read(Path(folder)))


class Switch:
    """Puts LoRA versions on a loaded model and takes them off, in place; the base weights are never written.

    A version is read and its digest checked when it is first used; after that a switch costs well under a millisecond
    for a small model: versions and sums of them stay in memory up to ``budget`` bytes, and whatever acts on the model;
    the least recently used go first. The caller holds the model's lock around `activate` and the passes that rely on
    it; `drop` and `loaded` may come from any thread. A model has one switch: a later one takes over.

    ``identity`` is the base's identity; a LoRA that was trained on another one is refused.
    """

    def __init__(self, model: torch.nn.Module, *, identity: bytes | None = None, budget: int = LOADED_BYTES) -> None:
        previous: Switch | None = getattr(model, _OWNER, None)
        if previous is not None:
            previous.activate(())
        self._model = model
        self._modules = linears(model)
        self._identity = identity
        self._budget = budget
        self._guard = threading.RLock()
        self._loaded: OrderedDict[tuple[tuple[str, float], ...], tuple[tuple[str, ...], Fitted]] = OrderedDict()
        self._hooks: list[Any] = []
        self._active: tuple[LoraRef, ...] = ()
        self._dropped: set[str] = set()
        #: The last batch's, since its next token comes soon.
        self._gathered: tuple[tuple[tuple[LoraRef, ...], ...], Gathered] | None = None
        # A plain attribute, not a submodule: the switch holds the Linear layers, so the model must not own it as one.
        object.__setattr__(model, _OWNER, self)

    def __deepcopy__(self, memo: object) -> None:
        """None: a copy of the model has no switch until one is made for it."""

    @property
    def active(self) -> tuple[LoraRef, ...]:
        """The versions that act on the model now."""
        return self._active

    @property
    def reach(self) -> Reach:
        """From which token of a pass on activated LoRAs act."""
        return reach_of(self._model)

    @property
    def loaded(self) -> dict[str, int]:
        """Bytes in memory by digest of the versions that are loaded; sums of several under ``+``-joined digests."""
        with self._guard:
            return {"+".join(digest for digest, _ in key): fitted.bytes for key, (_, fitted) in self._loaded.items()}

    def activate(self, refs: Sequence[LoraRef]) -> None:
        """Make exactly these versions act on the model: the sum of their B A · alpha/rank · scale; none is the base.

        Raises `NotFound` or `Corrupt` for a folder that is gone or damaged, and `TrainingError` for one that doesn't
        fit this model; what was active before then stays active.
        """
        self.settle()
        wanted = tuple(refs)
        if wanted == self._active and all(map(there, wanted)):
            return
        with self._guard:
            self._forget_deleted()
            fitted = self._sum(wanted)
            self._remove()
            self._hooks = attach(self._model, self._modules, fitted)
            self._active = wanted
            self._evict()

    @contextlib.contextmanager
    def rows(self, refs: Sequence[Sequence[LoraRef]]) -> Generator[None]:
        """Inside, passes have ``len(refs)`` rows, and row i carries exactly the versions ``refs[i]``.

        Afterwards the versions that acted before act again. Raises as `activate`.
        """
        key = tuple(tuple(row) for row in refs)
        with self.paused():
            with self._guard:
                self._forget_deleted()
                if self._gathered is None or self._gathered[0] != key:
                    sums = list(dict.fromkeys(key))
                    fitted = [self._sum(row) for row in sums]
                    made = Gathered(self._model, self._modules, fitted, [sums.index(row) for row in key])
                    self._gathered = key, made
                    self._evict()
                hooks = self._gathered[1].attach()
            try:
                yield
            finally:
                for hook in hooks:
                    hook.remove()

    def drop(self, digests: Sequence[str]) -> None:
        """Forget loaded versions, from any thread. One that acts on the model is taken off by the next `activate` or
        `settle`."""
        gone = set(digests)
        with self._guard:
            for key in [key for key in self._loaded if any(digest in gone for digest, _ in key)]:
                del self._loaded[key]
            if self._gathered is not None and any(ref.digest in gone for row in self._gathered[0] for ref in row):
                self._gathered = None
            self._dropped |= {ref.digest for ref in self._active if ref.digest in gone}

    def settle(self) -> None:
        """Take dropped versions off the model. The caller holds its lock; costs nothing where there are none."""
        if self._dropped:
            with self._guard:
                if any(ref.digest in self._dropped for ref in self._active):
                    self._remove()
                self._dropped.clear()

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """The base alone inside the block, then the same versions as before, but for those that were deleted."""
        before = self._active
        self.activate(())
        try:
            yield
        finally:
            self.activate([ref for ref in before if there(ref)])

    def _remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._active = [], ()

    def _sum(self, refs: Sequence[LoraRef]) -> Fitted:
        """What these versions add together; one of several is kept like a version, so that a switch to it is quick."""
        if not all(map(there, refs)):
            gone = next(ref for ref in refs if not there(ref))
            raise NotFound(f"there is no LoRA in {gone.path}: {gone.name} was deleted or retired")
        parts = [(self._load(ref), ref.scale) for ref in refs]
        if not parts:
            return Fitted({}, 0)
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0]
        key = tuple((ref.digest, ref.scale) for ref in refs)
        if key not in self._loaded:
            self._loaded[key] = tuple(ref.path for ref in refs), summed(parts)
        self._loaded.move_to_end(key)
        return self._loaded[key][1]

    def _load(self, ref: LoraRef) -> Fitted:
        key = ((ref.digest, 1.0),)
        if key in self._loaded:
            self._loaded.move_to_end(key)
            found = self._loaded[key][1]
        else:
            lora = load(ref.path, digest=ref.digest)
            base = lora.notes.get("base")
            if self._identity is not None and base is not None and base != self._identity.hex():
                raise TrainingError(
                    f"{ref.name} was trained on another base ({lora.base}): train it again on this model"
                )
            found = fit(self._modules, lora, ref.name)
            self._loaded[key] = (ref.path,), found
        if tuple(ref.activated) not in found.parts:  # KV pages would be kept under the wrong identity
            raise TrainingError(f"{ref.name} is activated by {sorted(found.parts)}, not by {ref.activated}: name it so")
        return found

    def _forget_deleted(self) -> None:
        """A version that another process forgot must not live on in memory."""
        if self._gathered is not None and not all(there(ref) for row in self._gathered[0] for ref in row):
            self._gathered = None
        for key, (paths, _) in list(self._loaded.items()):
            if not all(os.path.exists(path) for path in paths):
                del self._loaded[key]

    def _evict(self) -> None:
        """Keep to the budget. What acts on the model is in use and stays, though its sum may be all that is needed."""
        used = tuple((ref.digest, ref.scale) for ref in self._active)
        total = sum(fitted.bytes for _, fitted in self._loaded.values())
        for key, (_, fitted) in list(self._loaded.items()):
            if total <= self._budget:
                return
            if key != used:
                del self._loaded[key]
                total -= fitted.bytes


def there(ref: LoraRef) -> bool:
    """Whether the version's folder is there: a forgotten version must not live on in memory."""
    return os.path.exists(ref.path)


@contextlib.contextmanager
def applied(model: torch.nn.Module, *loras: Lora) -> Generator[None]:
    """Only the sum of these acts on the model inside the block (from memory: versions that are not stored yet)."""
    with applied_rows(model, None, loras):
        yield


@contextlib.contextmanager
def applied_rows(
    model: torch.nn.Module, per_row: Sequence[Sequence[Lora]] | None, loras: Sequence[Lora] = ()
) -> Generator[None]:
    """Inside the block passes have ``len(per_row)`` rows, and only the sum of ``per_row[i]`` acts on row i.

    With None for ``per_row`` the sum of ``loras`` acts on every row of any batch.
    """
    modules = linears(model)
    fitted = {id(lora): fit(modules, lora, "the LoRA") for row in (*(per_row or ()), loras) for lora in row}

    def total(row: Sequence[Lora]) -> Fitted:
        return summed([(fitted[id(lora)], 1.0) for lora in row])

    with base_only(model):
        if per_row is None:
            hooks = attach(model, modules, total(loras))
        else:
            keys = [tuple(id(lora) for lora in row) for row in per_row]
            sums = {key: total(row) for key, row in zip(keys, per_row, strict=True)}
            hooks = Gathered(model, modules, list(sums.values()), [list(sums).index(key) for key in keys]).attach()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextlib.contextmanager
def acting_from(model: torch.nn.Module, starts: int | Sequence[int]) -> Generator[None]:
    """In the passes inside, activated LoRAs act from these positions of the pass's own input on.

    One position for all rows, or one for each; 0 is everywhere, as in decoding, the pass's length or more nowhere.
    """
    with reach_of(model).told((starts,) if isinstance(starts, int) else starts):
        yield


@contextlib.contextmanager
def base_only(model: torch.nn.Module) -> Generator[None]:
    """No LoRA acts on the model inside the block."""
    switch: Switch | None = getattr(model, _OWNER, None)
    if switch is None:
        yield
    else:
        with switch.paused():
            yield


def _config(lora: Lora) -> dict[str, Any]:
    """PEFT's adapter_config.json. Layers are named by number where the paths have one, as PEFT and vLLM read it."""
    paths = sorted(lora.tensors)
    numbers = sorted({int(part) for path in paths for part in path.split(".") if part.isdigit()})
    # Only where there are some: a plain LoRA's digest must not change for it.
    activated = {_INVOCATION: list(lora.activated)} if lora.activated else {}
    return activated | {
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


def _settings(settings: Any, folder: object) -> tuple[int, float, str, tuple[int, ...]]:
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise TrainingError(f"{folder}: {CONFIG} is not of a LoRA (peft_type LORA)")
    strange = [key for key in _UNSUPPORTED if settings.get(key)]
    if strange or settings.get("bias", "none") != "none":
        raise TrainingError(f"{folder} uses {', '.join(strange) or 'trained biases'}: only plain LoRA can be served")
    tokens = settings.get(_INVOCATION) or []
    if not isinstance(tokens, list) or not all(type(token) is int and token >= 0 for token in tokens):
        raise Corrupt(f"{folder}: {CONFIG} has the {_INVOCATION} {tokens!r}")
    rank, alpha, base = settings.get("r"), settings.get("lora_alpha"), settings.get("base_model_name_or_path")
    if type(rank) is not int or not 0 < rank <= 4096 or type(alpha) not in (int, float):
        raise Corrupt(f"{folder}: {CONFIG} has rank {rank!r} and alpha {alpha!r}")
    return rank, float(alpha or 0), str(base or "its base"), tuple(tokens)


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
