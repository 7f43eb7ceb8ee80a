"""``anthropic:model``: Anthropic's Messages API through the official SDK.

Knows the host, its capabilities and the SDK's calls and errors; the two modules beside this one know what is sent and
what comes back. Prefixes are kept where they are marked (``kv="breakpoints"``): where the request's plan says, else at
the end of every stable segment; the API ignores a marker on a prefix that is too short to cache.

Of the options, ``seed`` has no counterpart and is ignored; ``temperature`` and ``top_p`` are sent as given, though some
newer models refuse them. Thinking is asked for by ``extra={"thinking": {...}}``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agentmem.cache_rules import CacheRules, rules_for, vendors
from agentmem.errors import ConfigError, InvalidInput
from agentmem.provider import Capabilities, Generation, Request
from agentmem.tokens import counter_for
from agentmem.types import TokenCount

from ._anthropic_replies import Reader, parse_reply, parse_usage
from ._anthropic_requests import build_count, build_request
from ._http import Failure, is_host, is_loopback, read_settings, sdk_failure
from ._remote import Remote

__all__ = ["Reader", "build_count", "build_request", "create", "parse_reply", "parse_usage"]

OFFICIAL = "https://api.anthropic.com"
#: Seconds for which a host of unknown rules is said to hold a prefix: the shortest time at Anthropic.
HOLDS_S = 300.0

#: A hosted model has no place for a LoRA (`agentmem.provider.may_take_loras`).
TAKES_LORAS = False

#: What a host can do that is not Anthropic's and serves none of its models can only be told.
SETTINGS: Mapping[str, type] = {"images": bool, "schemas": bool, "diagnostics": bool}


def create(model: str, settings: Mapping[str, Any]) -> Anthropic:
    """The provider for ``"anthropic:<model>"``.

    Settings: ``api_key`` (else ANTHROPIC_API_KEY), ``base_url`` (else ANTHROPIC_BASE_URL), ``timeout_s`` (120, over all
    attempts), ``max_retries`` (2), ``context_tokens``. For another vendor's model at another host: ``images=True`` and
    ``schemas=True`` if it takes them. ``diagnostics=True`` if a gateway on another machine takes the field that asks
    why a cache missed; else it is sent to Anthropic and to this machine only.
    """
    importlib.import_module("anthropic")  # a missing package is told here, not at the first request

    values = read_settings("anthropic", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("ANTHROPIC_BASE_URL") or OFFICIAL
    values["api_key"] = values.get("api_key") or os.environ.get("ANTHROPIC_API_KEY")
    if not model:
        raise ConfigError("name a model: 'anthropic:<model>'; model='local' needs no key and no network")
    if not values["api_key"]:
        if is_host(values["base_url"], "anthropic.com"):
            raise ConfigError(
                "anthropic: no key; set ANTHROPIC_API_KEY or [providers.anthropic] api_key. "
                "model='local' needs no key and no network"
            )
        values["api_key"] = "none"
    return Anthropic(f"anthropic:{model}", model, values)


class Anthropic(Remote):
    """Anthropic's API, or another host that speaks it, through the ``anthropic`` SDK."""

    def __init__(self, name: str, model: str, values: Mapping[str, Any]) -> None:
        official, near = is_host(values["base_url"], "anthropic.com"), is_loopback(values["base_url"])
        own = official or "claude" in model.lower()
        vendor = "anthropic" if own else vendors(values["base_url"])
        rules = None if vendor is None else rules_for(f"{vendor}:{model}")
        if rules is not None and not values.get("diagnostics", official or near):
            rules = replace(rules, diagnoses=False)
        capabilities = Capabilities(
            chat=True,
            tools=True,
            kv="breakpoints" if own else "auto",
            images=values.get("images", own),
            schemas=values.get("schemas", own),
            context_tokens=values.get("context_tokens") or (None if rules is None else rules.context_tokens),
            cache=rules,
            holds_prefix_s=None if near else _longest(rules),
        )
        super().__init__(name, capabilities, values)
        self._model = model
        self._values = values

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` alone, an estimate: the vendor's tokenizer is behind a request per count."""
        return counter_for(self._model).count(text)

    def count_request(self, request: Request) -> TokenCount:
        """What the vendor's counting endpoint says of the whole request; costs a request, but no tokens."""
        body = self._counted_body(request)
        return self._ask(lambda client: _count(client, body), _told)

    async def acount_request(self, request: Request) -> TokenCount:
        """`count_request`, awaited."""
        body = self._counted_body(request)
        return await self._aask(lambda client: _count(client, body), _told)

    def _counted_body(self, request: Request) -> dict[str, Any]:
        self._checked(request, stream=False)
        return build_count(_strict(request), model=self._model)

    def _connect(self, *, asynchronous: bool) -> Any:
        import anthropic

        common: dict[str, Any] = {name: self._values[name] for name in ("api_key", "base_url")}
        common |= {"max_retries": 0, "timeout": self._timeout_s}
        if asynchronous:
            return anthropic.AsyncAnthropic(
                **common, http_client=anthropic.DefaultAsyncHttpxClient(timeout=self._timeout_s)
            )
        return anthropic.Anthropic(**common, http_client=anthropic.DefaultHttpxClient(timeout=self._timeout_s))

    def _build(self, request: Request, *, stream: bool) -> dict[str, Any]:
        return build_request(_strict(request), model=self._model, stream=stream)

    def _chat(self, client: Any, body: dict[str, Any]) -> Any:
        own = ("model", "messages", "max_tokens", "stream")
        rest = {name: value for name, value in body.items() if name not in own}
        return client.messages.create(
            model=body["model"],
            messages=body["messages"],
            max_tokens=body["max_tokens"],
            stream=body.get("stream", False),
            timeout=self._timeout_s,
            extra_body=rest,
        )

    def _parse(self, payload: Mapping[str, Any]) -> Generation:
        return parse_reply(payload)

    def _reader(self) -> Reader:
        return Reader()

    def _plain(self, thing: Any) -> Mapping[str, Any]:
        plain: Mapping[str, Any] = thing.to_dict(warnings=False)  # a field of the wrong type is the parser's to judge
        return plain

    def _map(self, error: Exception) -> Failure | None:
        import anthropic

        return sdk_failure(anthropic, error, name=self.name, model=self._model, advice=self.advice)


def _longest(rules: CacheRules | None) -> float:
    """Seconds for which a prefix may be held: the longest lifetime that a plan can ask for."""
    return HOLDS_S if rules is None else rules.lifetimes[-1].seconds


def _strict(request: Request) -> Request:
    """The request with its schema as the API takes it: closed objects, and as description what it can't enforce."""
    if request.options.schema is None:
        return request
    import anthropic

    try:
        schema = anthropic.transform_schema(dict(request.options.schema))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InvalidInput(f"the schema is none that Anthropic's API takes: {error}") from error
    return replace(request, options=replace(request.options, schema=schema))


def _count(client: Any, body: dict[str, Any]) -> Any:
    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    return client.messages.count_tokens(model=body["model"], messages=body["messages"], extra_body=rest)


def _told(payload: Mapping[str, Any]) -> TokenCount:
    return TokenCount(tokens=int(payload["input_tokens"]), exact=True)
