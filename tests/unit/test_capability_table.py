"""README's table of where parametric memory can live, held against the providers' capabilities."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.provider import INSTALL, Capabilities, load

README = Path(__file__).resolve().parents[2] / "README.md"
NOWHERE = "http://127.0.0.1:9/v1"
#: How to make each provider without a network; a host that only one setting tells apart has its own row.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "local:": ("local:", {}),
    "llamacpp:": ("llamacpp:m", {"base_url": NOWHERE, "context_tokens": 2048}),
    "vllm:": ("vllm:m", {"base_url": NOWHERE}),
    "ollama:": ("ollama:m", {"base_url": NOWHERE, "context_tokens": 2048}),
    "openai_compatible:": ("openai_compatible:m", {"base_url": NOWHERE}),
    "openai:": ("openai:gpt-5.6-luna", {"api_key": "k"}),
    "anthropic:": ("anthropic:claude-haiku-4-5", {"api_key": "k"}),
}
COLUMNS = ("engine", "trains", "serves plain", "serves activated", "several at once", "a new version", "form")
LOADING = {
    "none": "-",
    "process": "read from the folder",
    "call": "a call to the running server",
    "start": "named when the server starts",
    "model": "a model of its own name",
}
FORM = {"none": "-", "peft": "PEFT folder", "gguf": "GGUF file"}


def row(able: Capabilities) -> tuple[str, ...]:
    yes = {True: "yes", False: "-"}
    told = (able.trains, able.loras, able.activated_loras, able.summed_loras)
    return (*(yes[fact] for fact in told), LOADING[able.lora_loading], FORM[able.lora_format])


@pytest.fixture(scope="module")
def told() -> dict[str, tuple[str, ...]]:
    """The table's rows by engine, as README has them."""

    def rows() -> Iterator[list[str]]:
        for line in README.read_text(encoding="utf-8").splitlines():
            if line.startswith("|"):
                yield [cell.strip() for cell in line.strip("|").split("|")]

    found = iter(rows())
    assert any(tuple(cells) == COLUMNS for cells in found), "README has no table of engines that can hold a LoRA"
    table: dict[str, tuple[str, ...]] = {}
    for cells in found:
        if len(cells) != len(COLUMNS):
            break
        if name := re.match(r"`(\w+:)`", cells[0]):
            table[name[1]] = tuple(cells[1:])
    return table


def test_the_table_names_every_provider(told: dict[str, tuple[str, ...]]) -> None:
    assert set(told) == {f"{scheme}:" for scheme in INSTALL} == set(MADE)


@pytest.mark.parametrize("engine", sorted(MADE))
def test_a_row_says_what_the_capabilities_say(told: dict[str, tuple[str, ...]], engine: str) -> None:
    name, settings = MADE[engine]
    provider = load(name, settings)
    try:
        assert told[engine] == row(provider.capabilities)
    finally:
        provider.close()


@pytest.mark.parametrize("engine", sorted(MADE))
def test_the_facts_of_a_provider_agree_with_each_other(engine: str) -> None:
    """What can't serve a LoRA has no way to get one, and what gets one from outside can be told of it."""
    from agentmem.loras import TakesLoras

    name, settings = MADE[engine]
    provider = load(name, settings)
    able = provider.capabilities
    provider.close()
    assert able.loras == (able.lora_loading != "none") == (able.lora_format != "none")
    assert able.loras or not (able.activated_loras or able.summed_loras or able.trains)
    assert isinstance(provider, TakesLoras) == (able.lora_loading in ("call", "start", "model"))
