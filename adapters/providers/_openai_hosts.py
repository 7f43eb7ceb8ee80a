"""What each host that speaks OpenAI's format takes and tells, as data: one row per host.

Knows facts and no request. A row says which fields may be sent (servers answer 400 to unknown ones) and whose cache
rules hold; the rules themselves are in agentmem/cache_rules.toml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agentmem.cache_rules import CacheRules
from agentmem.errors import ConfigError

from ._http import is_host

__all__ = [
    "COMPATIBLE",
    "HOLDS_S",
    "HOSTS",
    "OPENAI",
    "Host",
    "Served",
    "follows_schemas",
    "host_for",
    "may_reason",
    "reasons",
    "sees",
]

#: The longest time for which OpenAI documents a prefix to be held: retention "24h", the default of older models.
HOLDS_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Host:
    """One kind of host. Everything defaults to what any server that calls itself compatible takes.

    ``domains`` are how it is recognised by its address. ``own_names`` are OpenAI's newer names of fields
    (``max_completion_tokens``, a message's ``name``) and several user messages in a row. ``cache_key`` and ``marks``
    say whether ``prompt_cache_key`` and OpenAI's breakpoints may be sent. ``responses``: it has the Responses API,
    ``counts`` its endpoint that counts tokens. ``back`` are fields of an answer that have to come back to it with the
    results of tools. ``salt`` is the form in which it takes a salt of its prefix cache.
    """

    vendor: str | None = None
    domains: tuple[str, ...] = ()
    own_names: bool = False
    cache_key: bool = False
    marks: bool = False
    responses: bool = False
    counts: bool = False
    images: bool = False
    schemas: bool = True
    embeds: bool = True
    back: tuple[str, ...] = ()
    salt: str | None = None


#: A server of which nothing is known.
COMPATIBLE = Host()

OPENAI = Host(
    vendor="openai",
    domains=("openai.com",),
    own_names=True,
    cache_key=True,
    marks=True,
    responses=True,
    counts=True,
    images=True,
)

#: By the setting ``host``. Seen on 2026-11-22 in the vendors' pages and servers' sources. Cached tokens come in
#: ``usage.prompt_tokens_details.cached_tokens``, at DeepSeek in ``prompt_cache_hit_tokens``, at llama.cpp also in
#: ``timings.cache_n``; vLLM and SGLang tell them only where started with --enable-prompt-tokens-details and
#: --enable-cache-report.
HOSTS: Mapping[str, Host] = {
    "openai": OPENAI,
    # Its v1 API under the resource's address; 5.6 models match prefixes well only with a prompt_cache_key. Models are
    # named by their deployment: rules hold where that is the model's own name.
    "azure": Host(
        vendor="openai",
        domains=("openai.azure.com", "services.ai.azure.com", "cognitiveservices.azure.com"),
        own_names=True,
        cache_key=True,
        marks=True,
        responses=True,
        images=True,
    ),
    # Thinking models answer 400 when the reasoning of a turn that called tools is missing later.
    "deepseek": Host(
        vendor="deepseek", domains=("deepseek.com",), schemas=False, embeds=False, back=("reasoning_content",)
    ),
    # Gemini 3 answers 400 when the thought signature of a tool call is missing later.
    "gemini": Host(
        vendor="gemini",
        domains=("generativelanguage.googleapis.com", "aiplatform.googleapis.com"),
        images=True,
        back=("extra_content",),
    ),
    "vllm": Host(vendor="vllm", salt="cache_salt"),
    "sglang": Host(vendor="sglang", salt="extra_key"),
    "lmstudio": Host(vendor="lmstudio"),
    "llamacpp": Host(vendor="llamacpp"),
}


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model at one host, as the pure functions need to know it. ``name`` is the provider's.

    ``cache_fields`` overrides what is known of the host: True sends prompt-cache fields, False never.
    """

    model: str
    name: str = ""
    host: Host = COMPATIBLE
    rules: CacheRules | None = None
    cache_fields: bool | None = None

    @property
    def keyed(self) -> bool:
        """Whether ``prompt_cache_key`` is sent."""
        return self.host.cache_key if self.cache_fields is None else self.cache_fields

    @property
    def marked(self) -> bool:
        """Whether breakpoints are sent: the model has them, and the host takes them."""
        allowed = self.host.marks if self.cache_fields is None else self.cache_fields
        return allowed and self.rules is not None and self.rules.marked


def host_for(base_url: str, told: str | None) -> Host:
    """The host of this name (the setting ``host``), else by its address, else `COMPATIBLE`."""
    if told is not None:
        if told not in HOSTS:
            raise ConfigError(f"unknown host {told!r}: there are {', '.join(sorted(HOSTS))}; leave it out for another")
        return HOSTS[told]
    found = (host for host in HOSTS.values() if any(is_host(base_url, domain) for domain in host.domains))
    return next(found, COMPATIBLE)


#: OpenAI's models that reason unless told not to: they refuse temperature and top_p then.
_REASONS = re.compile(r"o\d|gpt-(5(?![.]|-chat)|5[.]\d+-(chat|pro)|5[.]1-codex|5[.][5-9]|[6-9]|\d\d)")
#: Those that can reason at all.
_MAY_REASON = re.compile(r"o\d|gpt-(5(?!-chat)|[6-9]|\d\d)")
#: Those that know no JSON schemas, and those that read no images.
_FREE = re.compile(r"gpt-3[.]5|gpt-4(-|$)|gpt-4o-2024-05-13|chatgpt-4o|o1-mini|o1-preview|davinci|babbage")
_BLIND = re.compile(r"gpt-3[.]5|gpt-4(-\d|$)|gpt-4-32k|o1-mini|o3-mini|o1-preview|davinci|babbage")


def _plain(model: str) -> str:
    return model.removeprefix("ft:")


def reasons(model: str) -> bool:
    """True if this model of OpenAI reasons by default."""
    return _REASONS.match(_plain(model)) is not None


def may_reason(model: str) -> bool:
    """True if this model of OpenAI can reason, so that an answer may have reasoning that goes back to it."""
    return _MAY_REASON.match(_plain(model)) is not None


def follows_schemas(model: str) -> bool:
    """True if this model of OpenAI answers by a JSON schema."""
    return _FREE.match(_plain(model)) is None


def sees(model: str) -> bool:
    """True if this model of OpenAI reads images."""
    return _BLIND.match(_plain(model)) is None
