"""``vllm:model``: a vLLM server, as ``openai_compatible:`` with ``host = "vllm"``.

Knows only where it is: ``vllm:http://host:8000`` and ``vllm:http://host:8000/v1`` are the server's address and take the
first model that it lists. A user, a password or ``?api_key=`` in the address is sent to the server and shown nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from agentmem.errors import ConfigError
from agentmem.provider import public_name

from . import openai_compatible
from ._vllm import Vllm

__all__ = ["create"]

DEFAULT = "http://127.0.0.1:8000/v1"


def create(model: str, settings: Mapping[str, Any]) -> Vllm:
    """The provider for ``"vllm:<model>"``. Settings as of ``openai_compatible:``; ``base_url`` is also read from
    VLLM_BASE_URL and is http://127.0.0.1:8000/v1 by default, ``api_key`` from VLLM_API_KEY, the server's own variable.

    With an address instead of a model the server is asked for its models here, and its first one answers.
    """
    values = {"host": "vllm", **settings}
    if values["host"] != "vllm":
        raise ConfigError(f"vllm: host is {values['host']!r}; for another host use openai_compatible:")
    name, address = public_name(f"vllm:{model}"), model.startswith(("http://", "https://"))
    if address:
        parts = urlsplit(model)
        asked = parse_qs(parts.query)
        values["api_key"] = asked.pop("api_key", [values.get("api_key")])[-1]
        if asked:
            raise ConfigError(f"{name}: the address may have ?api_key= behind it and nothing else")
        plain = parts._replace(query="", fragment="").geturl()
        values["base_url"] = plain.rstrip("/").removesuffix("/v1") + "/v1"
    values["base_url"] = values.get("base_url") or os.environ.get("VLLM_BASE_URL") or DEFAULT
    values["api_key"] = values.get("api_key") or os.environ.get("VLLM_API_KEY")
    provider = _made(model, values, name)
    if not address:
        return provider
    try:
        return _made(provider.first_model(), values, name)
    finally:
        provider.close()


def _made(model: str, values: Mapping[str, Any], name: str) -> Vllm:
    provider = openai_compatible.create(model, values, name=name)
    assert isinstance(provider, Vllm)
    return provider
