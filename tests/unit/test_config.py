"""Settings: which source wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.activation.store import PageStore
from agentmem.config import read
from agentmem.database import Database
from agentmem.errors import ConfigError


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "agentmem.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_keyword_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "recall_k = 3\nrecall_tokens = 30\ncore_tokens = 40\n")
    monkeypatch.setenv("AGENTMEM_RECALL_K", "5")
    monkeypatch.setenv("AGENTMEM_RECALL_TOKENS", "50")
    settings = read(path, recall_k=7)
    assert (settings.recall_k, settings.recall_tokens, settings.core_tokens) == (7, 50, 40)
    assert settings.page_tokens == 256


def test_file_of_the_working_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 'model = "ollama:llama3.2"\n')
    monkeypatch.chdir(tmp_path)
    assert read().model == "ollama:llama3.2"
    assert read(model="local").model == "local"


def test_providers_have_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_PROVIDERS__OPENAI__BASE_URL", "http://127.0.0.1:1/v1")
    settings = read(write(tmp_path, '[providers.local]\ndevice = "cpu"\n'))
    assert settings.providers["local"] == {"device": "cpu"}
    assert settings.providers["openai"] == {"base_url": "http://127.0.0.1:1/v1"}


@pytest.mark.parametrize("text", ["colour = 1", "recall_k = 'many'", "recall_k = -1", "= 1"])
def test_wrong_settings_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        read(write(tmp_path, text))


@pytest.mark.parametrize("tokens", [0, -64, 8, 80, 100, 65600, 1 << 20])
def test_a_grid_that_no_page_can_have_is_refused_at_once(tokens: int) -> None:
    with pytest.raises(ConfigError, match="page_tokens"):
        read(page_tokens=tokens)


@pytest.mark.parametrize("tokens", [16, 48, 64, 256, 65536])
def test_a_grid_that_pages_can_have_is_taken(tmp_path: Path, tokens: int) -> None:
    PageStore(Database(":memory:"), tmp_path, grid=read(page_tokens=tokens).page_tokens)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        read(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("text", ['providers = "{}"', 'page_key = ["{}"]', 'page-key = "{}"', '[page]\nkey = "{}"'])
def test_a_key_never_reaches_the_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(write(tmp_path, text.format("5ec3e7" * 10)))
    assert "5ec3e7" not in str(raised.value)


def test_an_environment_that_is_no_json_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMEM_PROVIDERS", "not json")
    with pytest.raises(ConfigError, match="environment"):
        read()
