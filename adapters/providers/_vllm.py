"""vLLM's LoRAs, beside what any server with OpenAI's format does: loaded and unloaded by calls, chosen by model name.

Knows vLLM's routes (docs/features/lora.md; ``vllm/entrypoints/openai/models``): ``/v1/load_lora_adapter``,
``/v1/unload_lora_adapter`` and the names in ``/v1/models``. Written after those and tested against a double of them,
not against vLLM itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmem.errors import AgentMemError, ConfigError, Rejected
from agentmem.loras import LoraRef, PublishedLora, as_one
from agentmem.provider import Request

from . import openai as _openai
from ._http import Clock

__all__ = ["Vllm"]

#: The server has the two routes only if it was started with this.
ALLOW = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


class Vllm(_openai.OpenAI):
    """A running vLLM server, through the ``openai`` SDK. It serves one LoRA a request, plain ones only."""

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        super().__init__(name, model, values)
        self.capabilities = replace(self.capabilities, loras=True, lora_loading="call", lora_format="peft")

    def served_loras(self, loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
        """All of them where their sum is loaded, else the first that is."""
        try:
            known = self._known()
        except AgentMemError:  # the request itself will tell
            return ()
        if loras and as_one(loras).served_name in known:
            return tuple(loras)
        return tuple(lora for lora in loras if lora.scale == 1.0 and lora.served_name in known)[:1]

    def publish_lora(self, name: str, file: Path) -> PublishedLora:
        """Load the PEFT folder ``file``, which the server has to see under the same path."""
        if name not in self._known():
            self._told("load", {"lora_name": name, "lora_path": str(file)})
        return PublishedLora(served=name)

    def unpublish_lora(self, name: str) -> None:
        """Unload it; prefixes that it computed can be reached by no request then, for their keys hold its name."""
        if name in self._known():
            self._told("unload", {"lora_name": name})

    def first_model(self) -> str:
        """The base model that the server lists first."""
        names = self._ask(
            lambda client: client.models.list(),
            lambda page: [str(model["id"]) for model in page["data"] if not model.get("parent")],
        )
        if not names:
            raise ConfigError(f"{self.name} lists no model: is that a vLLM server?")
        return names[0]

    def _known(self) -> set[str]:
        """The names of all models and LoRAs that the server answers with."""
        return self._ask(
            lambda client: client.models.list(), lambda page: {str(model["id"]) for model in page.get("data") or ()}
        )

    def _told(self, verb: str, body: Mapping[str, str]) -> None:
        """Load or unload. The server answers in plain text; one that was started without the route, with 404."""
        try:
            self._sync(
                Clock(self._timeout_s),
                lambda: self._sync_client().post(f"/{verb}_lora_adapter", cast_to=str, body=dict(body)),
                retries=0,
            )
        except Rejected as error:
            hint = ""
            if error.status in (403, 405) or (isinstance(error.body, Mapping) and "detail" in error.body):
                hint = f"start it with --enable-lora and {ALLOW} in its environment, where you trust all who reach it"
            elif error.status == 404:
                hint = "it has to see that folder under the same path"
            if not hint:
                raise
            told = f"{self.name} did not {verb} {body['lora_name']}: {error}; {hint}"
            raise Rejected(told, status=error.status, request_id=error.request_id, body=error.body) from error

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        body = super()._build(request, stream=stream)
        return {**body, "model": as_one(request.loras).served_name} if request.loras else body
