"""``llamacpp:model``: llama.cpp's ``llama-server`` over HTTP.

Knows the server's own fields and routes beside OpenAI's format (`_openai_chat.py`): ``cache_prompt``, ``id_slot``,
``timings.cache_n``, ``/apply-template``, ``/tokenize``, ``/props``. The server keeps the KV states of its slots in
memory and reuses the longest common prefix (``kv="auto"``, cached tokens are reported). With the setting ``slot_dir``
its slots are saved to files, restored and erased as well (``kv="slots"``); which and when is `_llamacpp_slots.py`'s to
say.

LoRA adapters are those that the server was started with (``--lora``). A version of ours is known by its file's name,
which holds its digest, and acts on the requests of its scope; others are chosen by the option ``lora=[{"id": 0,
"scale": 1.0}]`` (`_llamacpp_loras.py`). ``max_tokens=0`` makes the server generate one token, which is dropped.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shlex
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmem.cache_rules import rules_for
from agentmem.errors import AgentMemError, ConfigError, Rejected
from agentmem.loras import LoraRef, PublishedLora
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import image_tokens
from agentmem.types import TokenCount

from . import _openai_chat as _openai
from ._http import Clock, Failure, connection_failed, from_status, is_loopback, read_settings, whole
from ._llamacpp_files import SlotFiles
from ._llamacpp_http import ErrorEvent, asend, post, send
from ._llamacpp_loras import Told, names, served
from ._llamacpp_server import LISTED, Call, LlamaServer, digest_cache, rendering, tokenizing
from ._llamacpp_slots import SlotPlanner
from ._llamacpp_turns import Pins, Slotted
from ._openai_hosts import HOLDS_S, HOSTS, Served

__all__ = ["build_request", "create", "parse_reply"]

DEFAULT = "http://127.0.0.1:8080"
#: Counts kept, so that a prompt's unchanged parts are not sent to be counted again.
COUNTS = 4096
#: Seconds that the question for the context window may take when the provider is made.
PROBE_S = 2.0
#: What the server takes: a model's reasoning goes back to it with the results of tools.
HOST = replace(HOSTS["llamacpp"], images=True, back=("reasoning_content",))

SETTINGS: Mapping[str, type] = {
    "id_slot": int,
    "slot_dir": str,
    "model_file": str,
    "rope": str,
    "cache_types": str,
    "images": bool,
}


def create(model: str, settings: Mapping[str, Any]) -> LlamaCpp:
    """The provider for ``"llamacpp:<model>"``; the model's name matters only to a server that has several.

    Settings: ``base_url`` (else LLAMACPP_BASE_URL, else http://127.0.0.1:8080), ``api_key`` (else LLAMA_API_KEY, the
    server's own variable), ``id_slot`` (the slot to use), ``timeout_s`` (120, over all attempts), ``max_retries`` (2),
    ``context_tokens`` and ``images`` (else asked of the server, once, here; nothing is asked if the former is given).
    For embeddings the server must run with ``--embedding`` and a pooling type.

    ``slot_dir`` is the folder that llama-server was started with as ``--slot-save-path``, on this machine; then slots
    are saved there and restored. ``model_file`` names the model's file where the server's own path can't be read from
    here. ``rope`` and ``cache_types`` are texts that name what the server was started with and does not report (a
    trial prefill is compared in any case).
    """
    importlib.import_module("httpx")  # a missing package is told here, not at the first request

    values = read_settings("llamacpp", settings, SETTINGS)
    if values.get("slot_dir") is not None and not values["slot_dir"]:
        raise ConfigError("llamacpp: slot_dir is empty; give llama-server's --slot-save-path, or leave it out")
    base_url = values.get("base_url") or os.environ.get("LLAMACPP_BASE_URL") or DEFAULT
    values["base_url"] = base_url.rstrip("/").removesuffix("/v1")
    values["api_key"] = values.get("api_key") or os.environ.get("LLAMA_API_KEY")
    return LlamaCpp(f"llamacpp:{model or 'default'}", model or "default", values)


def build_request(
    request: Request, *, model: str = "default", stream: bool = False, id_slot: int | None = None
) -> dict[str, Any]:
    """The JSON body of ``POST /v1/chat/completions``. Pure."""
    body = _openai.build_request(request, _served(model), stream=stream)
    own: dict[str, Any] = {"cache_prompt": True}
    if id_slot is not None:
        own["id_slot"] = id_slot
    return {**own, **body}


def parse_reply(payload: Mapping[str, Any]) -> Generation:
    """A server's answer, read by OpenAI's rules; the cached tokens are in ``usage`` and in ``timings``."""
    return _openai.parse_reply(payload, _served("default"))


def _served(model: str) -> Served:
    return Served(model=model, name=f"llamacpp:{model}", host=HOST)


class LlamaCpp(Slotted):
    """A running ``llama-server``, through httpx."""

    advice = "is llama-server running at base_url (LLAMACPP_BASE_URL)? model='local' needs no server"

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        capabilities = Capabilities(
            chat=True,
            embeds=True,
            tools=True,
            kv="slots" if values.get("slot_dir") else "auto",
            loras=True,
            activated_loras=True,
            summed_loras=True,
            lora_loading="start",
            lora_format="gguf",
            images=values.get("images", False),
            schemas=True,
            context_tokens=values.get("context_tokens"),
            exact_tokens=True,
            cache=rules_for(name),
            holds_prefix_s=None if is_loopback(values["base_url"]) else HOLDS_S,
        )
        super().__init__(name, capabilities, values)
        self._pins = Pins(name)
        self._model = model
        self._values = values
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._counts_lock = threading.RLock()
        if values.get("slot_dir"):
            self._planner = self._slot_planner(Path(values["slot_dir"]).expanduser().absolute())
        if capabilities.context_tokens is None:
            self.capabilities = self._told(capabilities)

    def _slot_planner(self, folder: Path) -> SlotPlanner:
        values = self._values
        model_file = values.get("model_file")
        server = LlamaServer(
            self.name,
            folder,
            lambda request: self._build(request, stream=False),
            told={"rope": values.get("rope", ""), "cache types": values.get("cache_types", "")},
            model_file=None if model_file is None else Path(model_file).expanduser(),
            cache=digest_cache(),
        )
        return SlotPlanner(self.name, server, SlotFiles(self.name, folder), id_slot=values.get("id_slot"))

    def _told(self, capabilities: Capabilities) -> Capabilities:
        """The capabilities with what the server says of itself; as they are while it can't say."""
        try:
            client = self._sync_client()
            clock = Clock(PROBE_S)
            props = self._sync(clock, lambda: send(client, Call("GET", "/props")), retries=0)
            with contextlib.suppress(AgentMemError):
                self._listed(clock)
            return replace(
                capabilities,
                context_tokens=whole(props["default_generation_settings"]["n_ctx"]) or None,
                images=self._values.get("images", bool((props.get("modalities") or {}).get("vision"))),
                # A template without them leaves them out of the prompt, and the server does not say so.
                tools=bool((props.get("chat_template_caps") or {}).get("supports_tools", True)),
            )
        except (AgentMemError, AttributeError, KeyError, TypeError, ValueError):
            return capabilities

    def _listed(self, clock: Clock) -> Told:
        """The adapters that the server was started with; none where it knows no such route."""
        client = self._sync_client()
        try:
            told: Told = self._sync(clock, lambda: send(client, LISTED), retries=0)
        except Rejected:
            told = ()
        self._understood(lambda: names(told))
        self._pins.told(told)
        return told

    def served_loras(self, loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
        """Those whose GGUF file the server was started with; of activated ones the first."""
        try:
            return served(self._listed(Clock(self._timeout_s)), loras)
        except AgentMemError:  # the request itself will tell
            return ()

    def publish_lora(self, name: str, file: Path) -> PublishedLora:
        """Whether the server was started with this file; it takes none while it runs."""
        with contextlib.suppress(AgentMemError):
            if name in names(self._listed(Clock(PROBE_S))):
                return PublishedLora(served=name)
        line = f"--lora {shlex.quote(str(file))} --lora-init-without-apply"
        return PublishedLora(served=name, ready=False, to_do=f"start llama-server again with {line}")

    def unpublish_lora(self, name: str) -> None:
        """Raises `Rejected` while the server runs with it: only a restart takes it away."""
        if name in names(self._listed(Clock(self._timeout_s))):
            raise Rejected(f"{self.name} was started with {name}, which it can't let go of: start it again without it")

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, exact: asked of the server's ``/tokenize``, the last counts kept."""
        with self._counts_lock:
            if text in self._counts:
                self._counts.move_to_end(text)
                return self._counts[text]
        step = Call("POST", "/tokenize", {"content": text, "add_special": False})
        count = self._ask(lambda client: send(client, step), _length)
        with self._counts_lock:
            self._counts[text] = count
            if len(self._counts) > COUNTS:
                self._counts.popitem(last=False)
        return count

    def count_request(self, request: Request) -> TokenCount:
        """The tokens of the prompt that the server makes of the request; what images add is an estimate."""
        body = self._checked(request, stream=False)
        prompt = self._ask(lambda client: send(client, rendering(body)), lambda reply: str(reply["prompt"]))
        tokens = self._ask(lambda client: send(client, tokenizing(prompt)), _length)
        return _with_images(request, tokens)

    async def acount_request(self, request: Request) -> TokenCount:
        """`count_request`, awaited."""
        body = self._checked(request, stream=False)
        prompt = await self._aask(lambda client: asend(client, rendering(body)), lambda reply: str(reply["prompt"]))
        tokens = await self._aask(lambda client: asend(client, tokenizing(prompt)), _length)
        return _with_images(request, tokens)

    def _connect(self, *, asynchronous: bool) -> Any:
        import httpx

        key = self._values["api_key"]
        common: dict[str, Any] = {
            "base_url": self._values["base_url"],
            "timeout": self._timeout_s,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
        }
        if asynchronous:
            return httpx.AsyncClient(**common)
        return httpx.Client(**common)

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(request, model=self._model, stream=stream, id_slot=self._values.get("id_slot"))

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        return post(client, "/v1/chat/completions", body, stream=bool(body.get("stream")))

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        return post(client, "/v1/embeddings", {"model": self._model, "input": texts}, stream=False)

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return _openai.parse_reply(payload, _served(self._model))

    def _reader(self) -> _openai.Reader:
        return _openai.Reader(_served(self._model))

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing
        return plain

    def _map(self, error: Exception) -> Failure | None:
        import httpx

        if isinstance(error, ErrorEvent):
            return from_status(self.name, error.status, error, body=error.args[0])
        if isinstance(error, httpx.HTTPStatusError):
            response = error.response
            try:
                body: Any = response.json()
                detail = body["error"]["message"]
            except (KeyError, TypeError, ValueError):
                body = detail = response.text
            hints = {501: "start llama-server with --embedding and --pooling mean"}
            return from_status(
                self.name, response.status_code, detail, headers=response.headers, body=body, hints=hints
            )
        if isinstance(error, (httpx.HTTPError, httpx.InvalidURL)):
            return connection_failed(self.name, error, self.advice)
        return None


def _length(reply: Mapping[str, Any]) -> int:
    return len(reply["tokens"])


def _with_images(request: Request, tokens: int) -> TokenCount:
    images = [image for segment in request.segments for message in segment.messages for image in message.images]
    return TokenCount(tokens=tokens + sum(map(image_tokens, images)), exact=not images)
