"""What `adapters/providers/openai_compatible.py` adds: salts for servers that keep one prefix cache for all."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest

from agentmem.errors import ConfigError, InvalidInput
from agentmem.provider import LoraRef, load, served_name
from agentmem.testing import chat_request

adapter = importlib.import_module("agentmem.adapters.providers.openai_compatible")

hosts = importlib.import_module("agentmem.adapters.providers._openai_hosts")

URL = "http://127.0.0.1:9/v1"


def body(request: Any = None, *, model: str = "m", **settings: Any) -> dict[str, Any]:
    provider: Any = load(f"openai_compatible:{model}", {"base_url": URL, **settings})
    built: dict[str, Any] = provider._build(request or replace(chat_request("Hi"), tenant="t"), stream=False)
    return built


@pytest.mark.parametrize("value", [None, False, "false", "0"])
def test_no_salt_is_sent_unless_it_is_asked_for(value: Any) -> None:
    assert not {"cache_salt", "extra_key", "kv_transfer_params"} & set(body(cache_salt=value))
    assert not {"cache_salt", "extra_key", "kv_transfer_params"} & set(body())


def test_each_form_sends_the_fields_its_server_takes() -> None:
    salt = body(cache_salt=True)["cache_salt"]
    assert len(salt) == 64
    assert body(cache_salt="true")["cache_salt"] == salt
    assert body(cache_salt="extra_key")["extra_key"] == salt
    assert "cache_salt" not in body(cache_salt="extra_key")
    own = replace(chat_request("Hi", extra={"kv_transfer_params": {"lmcache.ttl": 60}}), tenant="t")
    both = body(own, cache_salt="lmcache")
    assert both["cache_salt"] == salt
    assert both["kv_transfer_params"] == {"lmcache.ttl": 60, "lmcache.tag.agentmem": salt}


def test_every_part_of_the_identity_changes_the_salt_and_nothing_else_does() -> None:
    hi = replace(chat_request("Hi"), tenant="t")
    lora = LoraRef(name="l", digest="ab" * 32, path="/l")

    def salt(request: Any, **named: Any) -> str:
        named = {"model": "m", "base_url": URL, **named}
        value: str = adapter.salt_fields(request, **named)["cache_salt"]
        return value

    salts = [
        salt(hi),
        salt(replace(hi, tenant="u")),
        salt(hi, model="n"),
        salt(hi, base_url=URL + "/"),
        salt(hi, identity="x"),
        salt(replace(hi, loras=(lora,))),
        salt(replace(hi, loras=(replace(lora, digest="cd" * 32),))),
        salt(replace(hi, loras=(replace(lora, scale=0.5),))),
    ]
    assert len(set(salts)) == len(salts)
    assert salt(replace(chat_request("Other"), tenant="t", cache_key="k")) == salts[0]
    assert salt(replace(hi, loras=(replace(lora, name="renamed", path="/elsewhere"),))) == salts[5]
    assert body(model_identity="x", cache_salt=True)["cache_salt"] != body(cache_salt=True)["cache_salt"]


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="cache_salt must be"):
        body(cache_salt="salt")


def test_the_served_name_of_a_lora_carries_its_content() -> None:
    assert served_name("ana", "0123456789abcdef" * 4) == "ana-0123456789abcdef"
    assert LoraRef(name="an a/../x", digest="f" * 64, path="/x").served_name == "an_a_.._x-ffffffffffffffff"
    assert served_name("", "a" * 64) == "lora-aaaaaaaaaaaaaaaa"
    for wrong in ("", "short", "G" * 64):
        with pytest.raises(InvalidInput, match="digest"):
            served_name("ana", wrong)


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({"base_url": "https://api.deepseek.com"}, "deepseek"),
        ({"base_url": "https://ours.openai.azure.com/openai/v1"}, "azure"),
        ({"base_url": "https://generativelanguage.googleapis.com/v1beta/openai"}, "gemini"),
        ({"host": "vllm"}, "vllm"),
    ],
)
def test_a_host_is_known_by_its_address_or_its_setting(settings: dict[str, Any], host: str) -> None:
    provider: Any = load("openai_compatible:m", {"base_url": URL, **settings})
    assert provider._served.host is hosts.HOSTS[host]


def test_a_host_decides_what_is_sent_and_what_is_known_of_its_cache() -> None:
    def known(model: str, **settings: Any) -> Any:
        return load(f"openai_compatible:{model}", {"base_url": URL, **settings}).capabilities

    deepseek = known("deepseek-v4-flash", base_url="https://api.deepseek.com")
    assert (deepseek.schemas, deepseek.embeds, deepseek.kv, deepseek.cache.read) == (False, False, "auto", 0.02)
    assert known("m", host="vllm").cache.kind == "engine"
    assert known("m").cache is None
    assert known("grok-4.5", base_url="https://api.x.ai/v1").cache.read == 0.15  # no row of its own: by its address
    assert (known("m").images, known("m", images="true").images) == (False, True)
    keyed = replace(chat_request("Hi"), cache_key="k")
    assert "prompt_cache_key" not in body(keyed)
    assert body(keyed, host="azure", model="gpt-4o")["prompt_cache_key"] == "k"


def test_azure_marks_only_where_the_deployment_has_the_models_name() -> None:
    asked = replace(chat_request("Hi", system="S"), cache_key="k")
    assert "prompt_cache_options" in body(asked, host="azure", model="gpt-5.6-sol")
    assert "prompt_cache_options" not in body(asked, host="azure", model="our-deployment")


def test_a_salt_takes_the_form_of_its_host() -> None:
    assert "extra_key" in body(cache_salt=True, host="sglang")
    assert "cache_salt" in body(cache_salt=True, host="vllm")
