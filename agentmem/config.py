"""Settings: keyword, then environment (``AGENTMEM_…``), then ``agentmem.toml``, then the default.

Knows names, types and defaults; opens nothing but the TOML file.
"""

from __future__ import annotations

import math
import os
import reprlib
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from .errors import ConfigError

__all__ = ["Settings", "read"]

FILE = "agentmem.toml"


class Settings(BaseSettings):
    """Every setting of a `Memory`. Unknown names are refused.

    In the environment a name is written ``AGENTMEM_RECALL_K``, a provider's value
    ``AGENTMEM_PROVIDERS__LOCAL__DEVICE``.
    """

    model_config = SettingsConfigDict(
        env_prefix="AGENTMEM_", env_nested_delimiter="__", extra="forbid", frozen=True, validate_default=False
    )

    path: str = Field(default="./memory", description="the folder; ':memory:' keeps nothing")
    model: str | None = Field(
        default=None, description="'scheme:name'; without one every verb but chat and training works"
    )
    embedder: str = Field(
        default="default", description="'default', 'minilm', 'wordllama', 'none', 'openai:…', 'st:/folder'"
    )
    reembed: bool = Field(
        default=True, description="embed again what another embedder left; False refuses to open instead"
    )
    system: str | None = Field(default=None, description="the system text of chats that give none")
    redact: tuple[str, ...] = Field(
        default=(), description="taken out before anything is stored: email, phone, card, key, iban; or a function"
    )
    recall_k: int = Field(default=10, ge=0, description="records recalled for a turn at most")
    recall_tokens: int = Field(default=800, ge=0, description="tokens of recalled records in a turn at most")
    search_ram: int = Field(
        default=16 << 20, ge=0, description="bytes of token vectors that searches keep in this process's RAM"
    )
    core_tokens: int = Field(default=512, ge=0, description="tokens of the core block at most; 0 for none")
    history_tokens: int | None = Field(
        default=None,
        ge=0,
        description="tokens of the running conversation kept in the prompt at most; by default what costs least, or "
        "3000 where no prices are known",
    )
    cache: Literal["auto", "fixed", "off"] = Field(
        default="auto",
        description="prompt caches of hosts: auto lays prompts out and marks them by what that costs, fixed marks the "
        "end of every stable segment, off asks for no caching",
    )
    rules: dict[str, dict[str, Any]] = Field(
        default={}, description='what you know better about a prompt cache: {"anthropic:claude-…": {"minimum": 1024}}'
    )
    costs: dict[str, float] = Field(
        default={}, description="what this machine costs: watts, kwh_price, device_price, device_years, gb_month_price"
    )
    day_budget: float | None = Field(
        default=None, ge=0, description="dollars a day for the whole folder; then chat stops"
    )
    page_tokens: int = Field(
        default=256, description="the token grid: tokens per KV page; 16, 32, 48 or a multiple of 64 up to 65536"
    )
    page_budget: int = Field(
        default=8 << 30, ge=0, description="bytes of KV pages on disk and in RAM; 0 turns activation memory off"
    )
    ram_budget: int | None = Field(
        default=None,
        ge=0,
        description="bytes of KV pages in this process's RAM, copies and mappings; by default a quarter of page_budget",
    )
    page_codec: Literal["raw", "lossless", "dense", "int8", "k8v4", "int4"] = Field(
        default="int8", description="how KV pages are stored; int8, k8v4 and int4 change the states a little"
    )
    record_kv: Literal["off", "on", "repaired"] = Field(
        default="off",
        description="recalled records enter a local model's prompt as stored KV states: approximate, and only where a "
        "trial on the model passed; repaired computes the first tokens of each anew",
    )
    lora_when: Literal["recalled", "always"] = Field(
        default="recalled",
        description="when an active LoRA version acts on a request: only where the plaintext index says that the "
        "request concerns what the version learnt, or on every request of its scope (one whose gate judged the former "
        "only is then left out)",
    )
    lora_spares: bool = Field(
        default=True,
        description="a record that an acting LoRA version learnt, and that its gate saw answered every time, is not "
        "recalled as text too",
    )
    lora_gate: dict[str, float] = Field(
        default={}, description="what a LoRA version must reach before it may serve: `parametric.gate.Thresholds`"
    )
    lora_budget: int = Field(
        default=1 << 30, ge=0, description="bytes of LoRA versions on disk; inactive ones go first to make room"
    )
    lora_shard: int = Field(
        default=20, ge=1, le=1000, description="records that one LoRA version learns at most; more become several"
    )
    lora_activated: bool = Field(
        default=True,
        description="train LoRA versions that act from the answer on, over the base's KV pages; llama.cpp and this "
        "process serve them, Ollama and vLLM need false",
    )
    consolidate_idle: float | None = Field(
        default=None,
        gt=0,
        description="seconds without a chat after which this process consolidates in the background; None: it doesn't",
    )
    consolidate_every: float | None = Field(
        default=None, gt=0, description="seconds between consolidations in the background; None: no schedule"
    )
    consolidate_budget: dict[str, float] = Field(
        default={}, description="what one consolidation may spend where none is given: seconds, dollars, bytes"
    )
    consolidate_writes: bool = Field(
        default=False,
        description="consolidation may ask the model for facts, preferences and summaries, as `extract` does",
    )
    page_key: SecretStr | None = Field(
        default=None, description="32 bytes as hex or base64: KV pages are encrypted at rest with AES-256-GCM"
    )
    providers: dict[str, dict[str, Any]] = Field(
        default={}, description="one table per scheme: [providers.openai] base_url = …, [providers.local] device = …"
    )

    @field_validator("consolidate_budget")
    @classmethod
    def _spendable(cls, budget: dict[str, float]) -> dict[str, float]:
        for name, most in budget.items():
            if name not in ("seconds", "dollars", "bytes") or not 0 <= most < math.inf:
                raise ValueError("give seconds, dollars or bytes, each 0 or more")
        return budget

    @field_validator("page_tokens")
    @classmethod
    def _on_the_grid(cls, tokens: int) -> int:
        if tokens not in (16, 32, 48) and (tokens % 64 or not 0 < tokens <= 65536):
            raise ValueError("give 16, 32, 48 or a multiple of 64 up to 65536")
        return tokens

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - not read: no hidden .env
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword, environment, file: the TOML file comes in by a private keyword of `read`."""
        keywords = dict(init_settings())
        from_file = keywords.pop("_file", {})
        return (
            InitSettingsSource(settings_cls, keywords),
            env_settings,
            InitSettingsSource(settings_cls, from_file),
        )


def read(config: str | os.PathLike[str] | None = None, **keywords: Any) -> Settings:
    """The settings. ``config`` names a TOML file; else ``agentmem.toml`` of the working folder is read, if it exists.

    A keyword that is None counts as not given. Raises `ConfigError` for an unknown or ill-typed setting or file.
    """
    values = {name: value for name, value in keywords.items() if value is not None}
    path = Path(FILE if config is None else config)
    if config is not None or path.is_file():
        try:
            values["_file"] = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"can't read the configuration {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        # A provider's table may hold a key, so its values are never repeated; nor is the page key, also misspelt.
        secret = name.startswith(("providers", "page_key")) or first["type"] == "extra_forbidden"
        given = "" if secret else f" (given: {reprlib.repr(first.get('input'))})"
        raise ConfigError(f"setting {name!r}: {first['msg']}{given}") from None
    except SettingsError as error:  # the environment holds something that is no JSON where JSON is wanted
        raise ConfigError(f"the environment can't be read: {error}") from None
