"""``openai_compatible:model``: a server that speaks OpenAI's Chat Completions (vLLM, SGLang, DeepSeek, ...).

Knows only what differs from `openai.py`: the address is required, a key is optional and never taken from
OPENAI_API_KEY, and one prefix cache for all of a server's users may be salted. What each host takes is in
`_openai_hosts.py`: others may answer 400 to fields that only OpenAI knows.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from agentmem.activation.identity import digest
from agentmem.errors import ConfigError
from agentmem.provider import Request

from . import openai as _openai
from ._http import read_settings
from ._openai_hosts import host_for
from ._vllm import Vllm

__all__ = ["create", "salt_fields"]

#: Where a salt goes, by the setting's value. vLLM and SGLang take ``cache_salt`` (chat_completion/protocol.py of both),
#: SGLang also ``extra_key``; LMCache's connector in vLLM makes its keys from tags among ``kv_transfer_params``.
FORMS = ("cache_salt", "extra_key", "lmcache")

SETTINGS: Mapping[str, type] = {**_openai.SETTINGS, "cache_salt": object, "model_identity": str}


def create(model: str, settings: Mapping[str, Any], *, name: str | None = None) -> _openai.OpenAI:
    """The provider for ``"openai_compatible:<model>"``. ``base_url`` is required, with its ``/v1``.

    Other settings as of ``openai:``; ``api_key`` is also read from OPENAI_COMPATIBLE_API_KEY, ``base_url`` from
    OPENAI_COMPATIBLE_BASE_URL. ``host`` says what runs there where the address does not: vllm, sglang, lmstudio,
    llamacpp, deepseek, gemini or azure. ``cache_fields=True`` sends ``prompt_cache_key`` where the server is known to
    take it, ``images=True`` says that its model reads images.

    ``cache_salt=True`` sends a salt with every request that keeps tenants, models and LoRAs apart in the server's
    prefix cache (vLLM, SGLang), in the form that its host takes; ``"extra_key"`` sends it as SGLang's extra_key,
    ``"lmcache"`` to LMCache behind vLLM too. ``model_identity`` is any text that says which weights answer, such as
    the digest of a LoRA that the server knows by a name of yours; it goes into the salt.
    `agentmem.provider.served_name` makes names that say it already.
    """
    importlib.import_module("openai")  # a missing package is told here, not at the first request

    values = read_settings("openai_compatible", settings, SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OPENAI_COMPATIBLE_BASE_URL")
    values["api_key"] = values.get("api_key") or os.environ.get("OPENAI_COMPATIBLE_API_KEY") or "none"
    if not values["base_url"]:
        raise ConfigError(
            "openai_compatible: set [providers.openai_compatible] base_url, such as http://127.0.0.1:8000/v1"
        )
    if not model:
        raise ConfigError("name a model: 'openai_compatible:<model>', as the server lists it at /v1/models")
    form = _form(values.get("cache_salt"), host_for(values["base_url"], values.get("host")).salt)
    if form is not None:
        identity = values.get("model_identity", "")
        values["salt"] = partial(salt_fields, form=form, model=model, base_url=values["base_url"], identity=identity)
    made = Vllm if values.get("host") == "vllm" else _openai.OpenAI
    return made(name or f"openai_compatible:{model}", model, values)


def _form(value: Any, usual: str | None) -> str | None:
    if value is True or str(value).lower() in ("true", "1"):
        return usual or FORMS[0]
    if value in (None, False) or str(value).lower() in ("false", "0"):
        return None
    if value not in FORMS:
        raise ConfigError(f"openai_compatible: cache_salt must be true, false or one of {', '.join(FORMS)}")
    return str(value)


def salt_fields(
    request: Request, *, form: str = "cache_salt", model: str, base_url: str, identity: str = ""
) -> dict[str, Any]:
    """The fields that keep this request's prefix apart in the server's cache. Pure.

    The salt is a SHA-256 over the tenant's secret string, model, address and LoRA content: 64 hex digits, so that it
    can't be guessed and says nothing. A request without a tenant (not made by a `Memory`) is salted by the model alone.
    """
    loras = ",".join(sorted(f"{lora.digest}*{lora.scale!r}" for lora in request.loras))
    named = {"tenant": request.tenant, "model": model, "at": base_url, "identity": identity, "loras": loras}
    salt = digest({f"cache salt {name}": value for name, value in named.items()}).hex()
    if form == "extra_key":
        return {"extra_key": salt}
    if form == "lmcache":
        tags = {"lmcache.tag.agentmem": salt}
        given = request.options.extra.get("kv_transfer_params")
        return {"cache_salt": salt, "kv_transfer_params": {**(given if isinstance(given, Mapping) else {}), **tags}}
    return {"cache_salt": salt}
