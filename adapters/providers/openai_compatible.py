"""``openai_compatible:model``: a server that speaks OpenAI's Chat Completions (vLLM, SGLang, DeepSeek, ...).

Knows only what differs from `openai.py`: the address is required, a key is optional and never taken from
OPENAI_API_KEY, and fields that only OpenAI's host knows are left out, since such servers may answer 400 to them.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from agentmem.errors import ConfigError

from . import openai as _openai
from ._http import read_settings

__all__ = ["create"]


def create(model: str, settings: Mapping[str, Any]) -> _openai.OpenAI:
    """The provider for ``"openai_compatible:<model>"``. ``base_url`` is required, with its ``/v1``.

    Other settings as of ``openai:``; ``api_key`` is also read from OPENAI_COMPATIBLE_API_KEY, ``base_url`` from
    OPENAI_COMPATIBLE_BASE_URL. ``cache_fields=True`` sends ``prompt_cache_key`` where the server is known to take it.
    """
    importlib.import_module("openai")  # a missing package is told here, not at the first request

    values = read_settings("openai_compatible", settings, _openai.SETTINGS)
    values["base_url"] = values.get("base_url") or os.environ.get("OPENAI_COMPATIBLE_BASE_URL")
    values["api_key"] = values.get("api_key") or os.environ.get("OPENAI_COMPATIBLE_API_KEY") or "none"
    values["official"] = False
    if not values["base_url"]:
        raise ConfigError(
            "openai_compatible: set [providers.openai_compatible] base_url, such as http://127.0.0.1:8000/v1"
        )
    if not model:
        raise ConfigError("name a model: 'openai_compatible:<model>', as the server lists it at /v1/models")
    return _openai.OpenAI(f"openai_compatible:{model}", model, values)
