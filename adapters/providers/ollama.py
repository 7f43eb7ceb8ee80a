"""``ollama:model``: an Ollama server through the official client.

Knows the server's routes, the client's calls and errors; the format is `_ollama_chat.py`'s. Ollama keeps the last
prompt's KV states by itself (``kv="auto"``): requests keep the prefix byte-equal, the model's options constant (another
``num_ctx`` reloads the model) and ``keep_alive`` set or planned. It reports no cached tokens, so ``cached_tokens``
stays 0; reuse shows only in ``prompt_eval_duration``, and what that says is an estimate and called so
(`_ollama_estimates.py`). A LoRA version is a model of its own name, made by the create call.

Tested with the real client against a shim of Ollama's API over llama.cpp's server, not against Ollama itself.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentmem.cache_rules import rules_for
from agentmem.errors import AgentMemError, ConfigError
from agentmem.loras import LoraRef, PublishedLora, as_one
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for

from ._http import Clock, Failure, connection_failed, from_status, is_loopback, read_settings, whole
from ._ollama_chat import Reader, Timed, build_request, parse_reply, parse_usage
from ._ollama_estimates import AUTO, KeepAlive, Reuse, seconds, sent
from ._remote import Remote

__all__ = ["Reader", "Timed", "build_request", "create", "parse_reply", "parse_usage"]

DEFAULT = "http://127.0.0.1:11434"
#: Seconds that the questions for the model's facts may take when the provider is made.
PROBE_S = 2.0
#: What "for ever" is told as: a server that never unloads is still started again some day.
FOREVER_S = 30 * 86400.0
#: Tokens of the smallest window that a server gives a model by itself (OLLAMA_CONTEXT_LENGTH).
SERVED = 4096

SETTINGS: Mapping[str, type] = {
    "keep_alive": str,
    "keep_alive_max": str,
    "num_ctx": int,
    "options": dict,
    "embedding_model": str,
    "think": bool,
    "images": bool,
}


def create(model: str, settings: Mapping[str, Any]) -> Ollama:
    """The provider for ``"ollama:<model>"``.

    Settings: ``base_url`` (else OLLAMA_HOST), ``api_key`` (else OLLAMA_API_KEY), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``keep_alive`` ("5m"), ``num_ctx`` (also the window that prompts are laid out for),
    ``options`` (a table of model options, constant over all requests), ``think``, ``embedding_model`` (else the model),
    ``context_tokens`` and ``images`` (else asked of the server, once, here; nothing is asked if the former is given).

    ``keep_alive="auto"`` plans for how long the model stays loaded from the gaps between this provider's requests: at
    least 5 minutes, at most ``keep_alive_max`` ("1h"), never shorter than it was.
    """
    importlib.import_module("ollama")  # a missing package is told here, not at the first request

    values = read_settings("ollama", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OLLAMA_HOST") or DEFAULT
    values["api_key"] = values.get("api_key") or os.environ.get("OLLAMA_API_KEY")
    for name in ("keep_alive", "keep_alive_max"):
        told = values.get(name)
        if told is not None and seconds(told) is None and (name, told) != ("keep_alive", AUTO):
            raise ConfigError(f'ollama: {name} is {told!r}; write a duration such as "10m", "-1" for ever')
    if not model:
        raise ConfigError("name a model: 'ollama:<model>', as `ollama list` shows it; model='local' needs no server")
    return Ollama(f"ollama:{model}", model, values)


# Sending.


class Ollama(Remote):
    """An Ollama server, through the ``ollama`` client."""

    advice = "is Ollama running at base_url (OLLAMA_HOST)? model='local' needs no server"

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        self._options: dict[str, Any] = dict(values.get("options", {}))
        if "num_ctx" in values:
            self._options["num_ctx"] = values["num_ctx"]
        capabilities = Capabilities(
            chat=True,
            embeds=True,
            tools=True,
            kv="auto",
            loras=True,
            lora_loading="model",
            lora_format="gguf",
            images=values.get("images", False),
            schemas=True,
            context_tokens=values.get("context_tokens") or self._options.get("num_ctx"),
            cache=rules_for(name),
            holds_prefix_s=None if is_loopback(values["base_url"]) else _holds(values),
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values
        self._keep_alive = KeepAlive(values.get("keep_alive", "5m"), values.get("keep_alive_max", "1h"))
        self._reuse = Reuse()
        if values.get("context_tokens") is None:
            self.capabilities = self._told(capabilities)

    def _told(self, capabilities: Capabilities) -> Capabilities:
        """The capabilities with what the server says of the model; as they are while it can't say."""
        try:
            show = self._quick("show", self._model)
            able = {str(word) for word in show.get("capabilities") or ()}
            window = capabilities.context_tokens or _written_window(show.get("parameters")) or self._loaded_window()
            longest = _longest_window(show.get("modelinfo") or {})
        except (AgentMemError, AttributeError, LookupError, TypeError, ValueError):
            return capabilities
        if able:  # older servers do not say
            images = self._values.get("images", "vision" in able)
            capabilities = replace(capabilities, chat="completion" in able, tools="tools" in able, images=images)
        if window is None and longest is not None and longest <= SERVED:
            window = longest  # else the server chooses by its memory, and does not say before the model is loaded
        return replace(capabilities, context_tokens=window and min(window, longest or window))

    def _loaded_window(self) -> int | None:
        running = self._quick("ps").get("models") or ()
        names = (self._model, f"{self._model}:latest")
        return next((whole(one.get("context_length")) or None for one in running if one.get("model") in names), None)

    def _quick(self, verb: str, *arguments: str) -> Mapping[str, Any]:
        client = self._sync_client()
        return self._plain(self._sync(Clock(PROBE_S), lambda: getattr(client, verb)(*arguments), retries=0))

    # LoRA versions: each is baked into a model of its own name, whose base the server stores once for all of them.

    def served_loras(self, loras: Sequence[LoraRef]) -> tuple[LoraRef, ...]:
        """All of them where a model with their sum was made, else the first that one was made with."""
        try:
            known = self._models()
        except AgentMemError:  # the request itself will tell
            return ()
        if loras and self._baked(as_one(loras).served_name) in known:
            return tuple(loras)
        return tuple(one for one in loras if one.scale == 1.0 and self._baked(one.served_name) in known)[:1]

    def publish_lora(self, name: str, file: Path) -> PublishedLora:
        """Upload the GGUF ``file`` as a blob and create the model ``<base>-<name>`` with it as its adapter."""
        made = self._baked(name)
        if made not in self._models():

            def create() -> Any:
                client = self._sync_client()
                adapters = {file.name: client.create_blob(file)}
                return client.create(model=made, from_=self._model, adapters=adapters, stream=False)

            self._sync(Clock(self._timeout_s), create, retries=0)
        return PublishedLora(served=made)

    def unpublish_lora(self, name: str) -> None:
        """Delete that model; the server then deletes the adapter's blob, which nothing else uses."""
        made = self._baked(name)
        if made in self._models():
            self._sync(Clock(self._timeout_s), lambda: self._sync_client().delete(made), retries=0)

    def _baked(self, name: str) -> str:
        """The model that a version is baked into; with a tag, the base's own one grows."""
        return f"{self._model}-{name}"

    def _models(self) -> set[str]:
        """The names of all models that the server has."""
        told = self._ask(lambda client: client.list(), lambda page: [str(one["model"]) for one in page["models"]])
        return {*told, *(name.removesuffix(":latest") for name in told)}

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, an estimate: Ollama has no route that counts."""
        return counter_for(self._model).count(text)

    def _connect(self, *, asynchronous: bool) -> Any:
        import ollama

        key = self._values["api_key"]
        common: dict[str, Any] = {"host": self._values["base_url"], "timeout": self._timeout_s}
        common["headers"] = {"Authorization": f"Bearer {key}"} if key else None
        if asynchronous:
            return ollama.AsyncClient(**common)
        return ollama.Client(**common)

    # The faces, with what is inferred of reuse.

    def _answer(self, request: Request, clock: Clock) -> Generation:
        return self._inferred(request, super()._answer(request, clock))

    async def _aanswer(self, request: Request, clock: Clock) -> Generation:
        return self._inferred(request, await super()._aanswer(request, clock))

    def _pieces(self, request: Request, clock: Clock) -> Generator[str | Generation, None, None]:
        with contextlib.closing(super()._pieces(request, clock)) as pieces:
            for piece in pieces:
                yield self._inferred(request, piece) if isinstance(piece, Generation) else piece

    async def _apieces(self, request: Request, clock: Clock) -> AsyncGenerator[str | Generation, None]:
        async with contextlib.aclosing(super()._apieces(request, clock)) as pieces:
            async for piece in pieces:
                yield self._inferred(request, piece) if isinstance(piece, Generation) else piece

    def _inferred(self, request: Request, generation: Generation) -> Generation:
        usage = generation.usage
        timed = generation if isinstance(generation, Timed) else Timed(text="", usage=usage)
        body = build_request(request, model=self._model)
        prompt = json.dumps([body.get("tools"), body["messages"]], default=str)
        estimate = self._reuse.estimate(prompt, usage.input_tokens if timed.counted else 0, timed.prompt_s)
        return Generation(
            text=generation.text,
            usage=usage.model_copy(update={"estimated_cached_tokens": estimate}),
            tool_calls=generation.tool_calls,
            finish_reason=generation.finish_reason,
            miss=generation.miss,
            blocks=generation.blocks,
        )

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(
            request,
            model=self._baked(as_one(request.loras).served_name) if request.loras else self._model,
            stream=stream,
            keep_alive=self._keep_alive.next(),
            options=self._options,
            think=self._values.get("think"),
        )

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        import ollama

        # client.chat() would send less than the body: its model of a tool drops what a nested schema says. And it
        # would send more: an image's base64 text that happens to be a path is read from this machine's disk.
        return client._request(ollama.ChatResponse, "POST", "/api/chat", json=body, stream=body["stream"])

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> Reader:
        return Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.model_dump()
        return plain

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        model = self._values.get("embedding_model", self._model)
        return client.embed(model=model, input=texts, keep_alive=sent(self._keep_alive.now))

    def _vectors(self, payload: Mapping[str, Any]) -> list[Any]:
        return list(payload["embeddings"])

    def _map(self, error: Exception) -> Failure | None:
        import httpx
        import ollama

        if isinstance(error, ollama.ResponseError):
            cause = error.__context__  # the client hides the answer there
            headers = cause.response.headers if isinstance(cause, httpx.HTTPStatusError) else None
            status = error.status_code if error.status_code > 0 else 500  # -1: an error line inside a stream
            hints = {404: f"`ollama pull {self._model}` fetches a model"}
            return from_status(self.name, status, error.error, headers=headers, body=error.error, hints=hints)
        if isinstance(error, (ConnectionError, httpx.HTTPError)):
            return connection_failed(self.name, error.__context__ or error, self.advice)
        return Failure(ConfigError(f"{self.name}: {error}")) if isinstance(error, ollama.RequestError) else None


def _written_window(parameters: Any) -> int | None:
    """The ``num_ctx`` of the model's own file, among its parameters as `show` writes them."""
    found = re.search(r"^num_ctx\s+(\d+)\s*$", str(parameters or ""), re.MULTILINE)
    return int(found[1]) if found else None


def _longest_window(facts: Mapping[str, Any]) -> int | None:
    """The longest context that the model's architecture has."""
    return next((whole(value) or None for name, value in facts.items() if name.endswith(".context_length")), None)


def _holds(values: Mapping[str, Any]) -> float:
    """Seconds for which a server elsewhere may hold a prompt: as long as the model may stay loaded."""
    told = values.get("keep_alive", "5m")
    longest = seconds(values.get("keep_alive_max", "1h") if told == AUTO else told)
    return FOREVER_S if longest is None or longest < 0 else max(300.0, longest)
