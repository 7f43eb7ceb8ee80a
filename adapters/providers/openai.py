"""``openai:model``: OpenAI's Responses API and Chat Completions through the official SDK; other hosts speak them too.

Chooses the API and sends; the formats are in `_openai_responses.py` and `_openai_chat.py`, what a host takes is in
`_openai_hosts.py`, and what its cache does in agentmem/cache_rules.toml. Decides nothing about memory: prefixes are
marked where a request's plan says so (``kv="breakpoints"``), or only kept byte-equal and named (``kv="auto"``).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from agentmem.cache_rules import CacheRules, pattern_of, rules_for, vendors
from agentmem.errors import ConfigError
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for, request_tokens
from agentmem.types import TokenCount

from . import _openai_chat as chat
from . import _openai_responses as responses
from ._http import Failure, is_host, is_loopback, read_settings, sdk_failure
from ._openai_hosts import HOLDS_S, OPENAI, Host, Served, follows_schemas, host_for, sees
from ._remote import Remote

__all__ = ["SETTINGS", "OpenAI", "Reader", "create"]

OFFICIAL = "https://api.openai.com/v1"
APIS = ("responses", "chat")

#: A hosted model has no place for a LoRA (`agentmem.provider.may_take_loras`).
TAKES_LORAS = False

SETTINGS: Mapping[str, type] = {
    "api": str,
    "host": str,
    "embedding_model": str,
    "embedding_dimensions": int,
    "organization": str,
    "project": str,
    "cache_fields": bool,
    "images": bool,
    "schemas": bool,
}


def create(model: str, settings: Mapping[str, Any]) -> OpenAI:
    """The provider for ``"openai:<model>"``.

    Settings: ``api_key`` (else OPENAI_API_KEY), ``base_url`` (else OPENAI_BASE_URL), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``api`` (``"responses"``, what OpenAI itself gets, or ``"chat"``, what other hosts
    get), ``embedding_model`` (text-embedding-3-small), ``embedding_dimensions``, ``organization``, ``project``,
    ``context_tokens``.

    For another address: ``host`` says which kind of host it is (`_openai_hosts.HOSTS`) where its name does not,
    ``cache_fields`` whether prompt-cache fields are sent to it, ``images`` and ``schemas`` whether its model takes
    them.

    A model that reasons is sent no temperature and no top_p, which it would refuse, unless it is told not to reason
    (``reasoning_effort="none"``). A request with stop texts goes to Chat Completions: Responses has none.
    """
    importlib.import_module("openai")  # a missing package is told here, not at the first request

    values = read_settings("openai", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OPENAI_BASE_URL") or OFFICIAL
    values["api_key"] = values.get("api_key") or os.environ.get("OPENAI_API_KEY")
    if not model:
        raise ConfigError("name a model: 'openai:<model>'; model='local' needs no key and no network")
    if not values["api_key"]:
        if is_host(values["base_url"], "openai.com"):
            raise ConfigError(
                "openai: no key; set OPENAI_API_KEY or [providers.openai] api_key. "
                "model='local' needs no key and no network"
            )
        values["api_key"] = "none"
    return OpenAI(f"openai:{model}", model, values)


class OpenAI(Remote):
    """OpenAI's API, or another host that speaks it, through the ``openai`` SDK."""

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        host = host_for(values["base_url"], values.get("host"))
        official = host is OPENAI
        rules = _rules(host, model, values["base_url"])
        self._served = Served(model=model, name=name, host=host, rules=rules, cache_fields=values.get("cache_fields"))
        if rules is not None and rules.marked and not self._served.marked:
            rules = None  # it can't be asked for a cache that has to be asked for
        told = values.get("context_tokens")
        capabilities = Capabilities(
            chat=True,
            embeds=host.embeds,
            tools=True,
            kv="breakpoints" if self._served.marked else "auto",
            images=values.get("images", sees(model) if official else host.images),
            schemas=values.get("schemas", follows_schemas(model) if official else host.schemas),
            context_tokens=rules.context_tokens if told is None and rules is not None else told,
            exact_tokens=counter_for(model).exact and (official or "gpt-oss" in model),
            cache=rules,
            holds_prefix_s=None if is_loopback(values["base_url"]) else HOLDS_S,
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values
        self._official = official
        self._api = _api(values.get("api"))
        default = "text-embedding-3-small" if official and "embed" not in model else model
        self._embedding_model: str = values.get("embedding_model") or default

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone: exact for OpenAI's own models, an estimate for others."""
        return counter_for(self._model).count(text)

    def count_request(self, request: Request) -> TokenCount:
        """Tokens of the whole request as OpenAI counts them (a request of its own); elsewhere an estimate."""
        if not self._served.host.counts:
            return self._estimate(request)
        body = responses.build_count(_countable(request), self._served)
        return self._ask(lambda client: _count(client, body), _counted)

    async def acount_request(self, request: Request) -> TokenCount:
        """`count_request`, awaited."""
        if not self._served.host.counts:
            return self._estimate(request)
        body = responses.build_count(_countable(request), self._served)
        return await self._aask(lambda client: _count(client, body), _counted)

    def _estimate(self, request: Request) -> TokenCount:
        return TokenCount(tokens=request_tokens(request, self.count_tokens), exact=False)

    def _connect(self, *, asynchronous: bool) -> Any:
        import openai

        common: dict[str, Any] = {
            name: self._values.get(name) for name in ("api_key", "base_url", "organization", "project")
        }
        if asynchronous:
            http = openai.DefaultAsyncHttpxClient(timeout=self._timeout_s)
            return openai.AsyncOpenAI(**common, max_retries=0, timeout=self._timeout_s, http_client=http)
        client = openai.DefaultHttpxClient(timeout=self._timeout_s)
        return openai.OpenAI(**common, max_retries=0, timeout=self._timeout_s, http_client=client)

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        salt: Callable[[Request], Mapping[str, Any]] | None = self._values.get("salt")
        api = self._api or ("responses" if self._official and not request.options.stop else "chat")
        build = responses.build_request if api == "responses" else chat.build_request
        return build(request, self._served, stream=stream, salted=None if salt is None else salt(request))

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        # As extra_body the conversation goes out as it is. Given by name, the SDK holds each part of it against its
        # types, which for 130 messages takes longer than all the rest of a turn.
        named = "input" if "input" in body else "messages"
        rest = {name: value for name, value in body.items() if name not in ("model", "stream")}
        send = client.responses.create if named == "input" else client.chat.completions.create
        return send(model=body["model"], stream=body.get("stream", False), extra_body=rest, **{named: []})

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        parse = responses.parse_reply if "output" in payload or "choices" not in payload else chat.parse_reply
        return parse(payload, self._served)

    def _reader(self) -> Reader:
        return Reader(self._served)

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.to_dict(warnings=False)  # a field of the wrong type is the parser's to judge
        return plain

    def _embed(self, client: Any, texts: Sequence[str]) -> Any:
        more: dict[str, Any] = {} if self._official else {"encoding_format": "float"}
        if (dimensions := self._values.get("embedding_dimensions")) is not None:
            more["dimensions"] = dimensions
        return client.embeddings.create(model=self._embedding_model, input=texts, **more)

    def _map(self, error: Exception) -> Failure | None:
        import openai

        return sdk_failure(openai, error, name=self.name, model=self._model, advice=self.advice)


class Reader:
    """Puts a stream of either API together: the first event says which it is."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._reader: chat.Reader | responses.Reader | None = None

    def add(self, event: Mapping[str, Any]) -> str:
        """The text in the next event."""
        if self._reader is None:
            self._reader = (responses if "type" in event else chat).Reader(self._served)
        return self._reader.add(event)

    def end(self) -> Generation | None:
        """The whole, or None if the stream was cut."""
        return None if self._reader is None else self._reader.end()


def _api(told: str | None) -> Literal["responses", "chat"] | None:
    if told is None:
        return None
    if told not in APIS:
        raise ConfigError(f"setting api must be one of {', '.join(APIS)}, not {told!r}")
    return "responses" if told == "responses" else "chat"


def _rules(host: Host, model: str, base_url: str) -> CacheRules | None:
    """What is known of the host's cache for this model. At Azure it may have any name."""
    vendor = host.vendor or vendors(base_url)
    if vendor is None:
        return None
    named = f"{vendor}:{model}"
    return rules_for(named) if vendor != "openai" or host is OPENAI or pattern_of(named) else None


def _countable(request: Request) -> Request:
    """The request without what its count does not depend on and the endpoint does not take."""
    return replace(request, options=replace(request.options, stop=(), max_tokens=None))


def _count(client: Any, body: Mapping[str, Any]) -> Any:
    named = {name: body[name] for name in ("model", "input")}
    return client.responses.input_tokens.count(
        **named, extra_body={name: value for name, value in body.items() if name not in named}
    )


def _counted(payload: Mapping[str, Any]) -> TokenCount:
    return TokenCount(tokens=int(payload["input_tokens"]), exact=True)
