"""LoRA versions at engines that run elsewhere: published by digest, served to their scope only, taken back on forget.

vLLM is a double after its docs, Ollama the shim; the SDKs, the sockets and the files are real. llama.cpp's real server
with a trained version is in test_served_elsewhere.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem import Memory
from agentmem.errors import (
    AgentMemError,
    ConfigError,
    Full,
    InvalidInput,
    NotFound,
    Rejected,
    TrainingError,
    Unavailable,
)
from agentmem.loras import as_one
from agentmem.parametric.corpus import record_digest
from agentmem.parametric.gate import GateReport
from agentmem.parametric.lora import Lora
from agentmem.parametric.registry import LoraVersion
from agentmem.parametric.train import Trained
from agentmem.publishing import withdraw
from agentmem.types import Scope

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from servers.loopback import free_port
from servers.ollama_shim import MODEL, OllamaShim
from servers.vllm_double import BASE, VllmDouble

ANA = Scope(user="ana")
TALK: dict[str, Any] = {"recall": False, "remember": False}


@pytest.fixture
def vllm() -> Iterator[VllmDouble]:
    with VllmDouble() as server:
        yield server


def opened(folder: Path, url: str, **settings: Any) -> Memory:
    table = {"base_url": f"{url}/v1", "max_retries": 0}
    common: dict[str, Any] = {"model": f"vllm:{BASE}", "embedder": "none", "lora_when": "always"}
    common = {**common, "providers": {"vllm": table}, **settings}
    return Memory(folder, **common)


def learnt(
    mem: Memory,
    text: str,
    *,
    seed: int = 0,
    user: str = "ana",
    identity: str = "ab",
    base: str = "local:tiny",
    size: tuple[int, int] = (8, 8),
    called: tuple[int, ...] = (),
    passed: bool = True,
) -> LoraVersion:
    """A version that learnt one record, with random weights, stored as training would store it."""
    [record] = mem.scope(user=user).add(text)
    chance = torch.Generator().manual_seed(seed)
    weights = {"model.layers.0.mlp.up_proj": (torch.randn(2, size[1], generator=chance), torch.randn(size[0], 2))}
    trained = Trained(
        lora=Lora(2, 4.0, "tiny", weights, {"base": identity}, called),
        losses=(1.0,),
        cpu_seconds=1.0,
        seconds=1.0,
        seed=seed,
        epochs=1,
        recipe={},
        identity=identity,
        base=base,
        records={record.id: record_digest(text)},
    )
    gate = GateReport(recall_trained=1, recall_held_out=1, drift=0, intrusion=0, passed=passed)
    return mem._engine.registry.add(trained, scope=Scope(user=user), gate=gate)


def asked(vllm: VllmDouble, mem: Memory, user: str) -> str:
    mem.scope(user=user).chat("Where do I live?", **TALK)
    return str(vllm.bodies[-1]["model"])


def test_a_version_is_loaded_by_its_digest_and_answers_its_own_scope(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        version = learnt(mem, "I live in Tromsø.")
        ana.activate(version)
        assert asked(vllm, mem, "ana") == BASE, "the server doesn't have it yet"
        publication = ana.publish(version)
        assert publication.ready
        assert publication.served == f"{version.name}-{version.digest[:16]}"
        assert vllm.loaded == {publication.served: str(tmp_path / "lora" / version.digest)}
        assert ana.publish(version) == publication, "again is the same"
        assert asked(vllm, mem, "ana") == publication.served
        assert asked(vllm, mem, "bob") == BASE
        assert ana.unpublish(version) == (publication.served,)
        assert vllm.loaded == {}
        assert asked(vllm, mem, "ana") == BASE


def test_forgetting_a_record_takes_the_version_back(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        mem.scope(user="ana").parametric.activate(version)
        mem.scope(user="ana").parametric.publish(version)
        receipt = mem.forget(list(version.records))
        assert vllm.loaded == {}
        assert not any("may still answer" in told for told in receipt.hosted)
        assert asked(vllm, mem, "ana") == BASE


def test_what_could_not_be_taken_back_is_in_the_receipt_and_tried_again(tmp_path: Path) -> None:
    server = VllmDouble()
    with opened(tmp_path, server.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        with server:
            served = mem.scope(user="ana").parametric.publish(version).served
        receipt = mem.forget(list(version.records))
        [told] = [told for told in receipt.hosted if "may still answer" in told]
        assert served in told
        assert f"vllm:{BASE}" in told
        assert len(withdraw(mem._engine, [])) == 1, "it is still there for all we know"


def test_what_an_engine_was_given_is_never_evicted_unknown_to_forget(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url, lora_budget=2500) as mem:
        version = learnt(mem, "I live in Tromsø.")
        mem.scope(user="ana").parametric.publish(version)
        for seed in range(1, 4):
            learnt(mem, f"My dog number {seed} is called Rex.", seed=seed)
        names = [one.name for one in mem.scope(user="ana").parametric.versions()]
        assert version.name in names
        assert len(names) < 4, "others made room"
        assert mem.forget(list(version.records)).loras == [version.digest]
        assert vllm.loaded == {}


def test_a_version_that_ended_by_itself_is_taken_back_by_the_next_retraining(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        version = learnt(mem, "I live in Tromsø.")
        ana.publish(version)
        mem._engine.registry.taint([version.digest], version.records)  # as an expiry does, or a death before the call
        assert vllm.loaded
        assert ana.retrain() == []
        assert vllm.loaded == {}


def test_a_version_that_ended_by_itself_is_taken_back_when_its_record_is_forgotten(
    vllm: VllmDouble, tmp_path: Path
) -> None:
    with opened(tmp_path, vllm.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        mem.scope(user="ana").parametric.publish(version)
        mem._engine.registry.taint([version.digest], version.records)
        assert mem.forget(list(version.records)).loras == []
        assert vllm.loaded == {}


def test_several_versions_are_published_as_one_sum(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        first, second = learnt(mem, "I live in Tromsø."), learnt(mem, "I have a dog.", seed=1)
        ana.activate(first, second)
        publication = ana.publish()
        assert set(publication.versions) == {first.name, second.name}
        assert publication.served.startswith("sum-")
        assert asked(vllm, mem, "ana") == publication.served
        [folder] = (tmp_path / "published").iterdir()
        mem.forget(list(second.records))
        assert vllm.loaded == {}
        assert not folder.exists()
        assert mem._engine.database.query("SELECT * FROM published") == []


def test_a_sum_acts_on_a_request_that_concerns_one_of_its_parts(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url, lora_when="recalled") as mem:
        ana = mem.scope(user="ana").parametric
        first, second = learnt(mem, "I live in Tromsø."), learnt(mem, "I have a dog.", seed=1)
        ana.activate(first, second)
        served = ana.publish().served
        assert as_one(mem._engine.active_loras(ANA, list(first.records))).served_name == served
        assert mem._engine.active_loras(ANA, []) == ()


def test_a_server_that_takes_one_at_a_time_answers_with_the_first_it_has(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        first, second = learnt(mem, "I live in Tromsø."), learnt(mem, "I have a dog.", seed=1)
        ana.activate(first, second)
        served = ana.publish(second).served
        assert asked(vllm, mem, "ana") == served


def test_an_address_is_enough(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, "http://127.0.0.1:9") as mem:
        version = learnt(mem, "I live in Tromsø.")
        ana = mem.scope(user="ana").parametric
        publication = ana.publish(version, to=f"vllm:{vllm.url}")
        assert list(vllm.loaded) == [publication.served]
        assert ana.unpublish(version, to=f"vllm:{vllm.url}") == (publication.served,)
        assert vllm.loaded == {}


def test_no_key_in_an_address_is_stored_or_shown(vllm: VllmDouble, tmp_path: Path) -> None:
    secret = vllm.url.replace("http://", "http://ops:hunter2@")
    with opened(tmp_path, "http://127.0.0.1:9") as mem:
        ana = mem.scope(user="ana").parametric
        first, second = learnt(mem, "I live in Tromsø."), learnt(mem, "I have a dog.", seed=1)
        publication = ana.publish(first, to=f"vllm:{secret}")
        ana.publish(second, to=f"vllm:{vllm.url}/v1?api_key=hunter2")
        assert vllm.seen[-1] == "Bearer hunter2"
        assert vllm.seen[0].startswith("Basic ")
        assert publication.to == f"vllm:{vllm.url}"
        assert "hunter2" not in str(publication)
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
        with pytest.raises(NotFound) as told:
            ana.unpublish(first, to="vllm:http://ops:hunter2@elsewhere")
        assert "hunter2" not in str(told.value)
        assert ana.unpublish(first, to=f"vllm:{secret}")
        assert list(vllm.loaded) == [f"{second.name}-{second.digest[:16]}"]


def test_what_was_published_with_a_key_is_taken_back_with_the_configured_one(vllm: VllmDouble, tmp_path: Path) -> None:
    secret = vllm.url.replace("http://", "http://ops:hunter2@")
    with opened(tmp_path, secret, lora_budget=None) as mem:
        version = learnt(mem, "I live in Tromsø.")
        mem.scope(user="ana").parametric.publish(version, to=f"vllm:{vllm.url.replace('http://', 'http://x:y@')}")
        vllm.seen.clear()
        assert mem.forget(list(version.records)).hosted == []
        assert vllm.loaded == {}
        assert {kept.partition(" ")[0] for kept in vllm.seen} == {"Basic"}
        assert len(set(vllm.seen)) == 1


def test_a_memory_on_an_address_with_a_key_shows_none(vllm: VllmDouble, tmp_path: Path) -> None:
    secret = vllm.url.replace("http://", "http://ops:hunter2@")
    with Memory(tmp_path, model=f"vllm:{secret}", embedder="none", lora_when="always") as mem:
        version = learnt(mem, "I live in Tromsø.")
        ana = mem.scope(user="ana")
        assert ana.parametric.publish(version).to == f"vllm:{vllm.url}"
        ana.chat("Where do I live?")
        assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
        assert mem.forget(list(version.records)).hosted == []
        assert vllm.loaded == {}


def test_an_address_with_another_query_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path, "http://127.0.0.1:9") as mem:
        version = learnt(mem, "I live in Tromsø.")
        with pytest.raises(ConfigError, match="api_key=") as told:
            mem.scope(user="ana").parametric.publish(version, to="vllm:http://host:8000?token=hunter2")
        assert "hunter2" not in str(told.value)
        with pytest.raises(ConfigError, match="address"):
            mem.scope(user="ana").parametric.publish(version, to="vllm:http://[broken")


@pytest.mark.parametrize("model", ["openai:gpt-5.6-luna", "anthropic:claude-haiku-4-5"])
def test_a_hosted_api_is_refused_at_once_without_a_key(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with opened(tmp_path, "http://127.0.0.1:9") as mem, pytest.raises(ConfigError, match="no place for a LoRA"):
        mem.scope(user="ana").parametric.publish(to=model)


def test_what_lies_there_for_engines_is_counted(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        assert "published LoRA" not in mem.report().bytes
        ana.activate(learnt(mem, "I live in Tromsø."), learnt(mem, "I have a dog.", seed=1))
        folder = Path(ana.publish().file or "")
        held = mem.report()
        assert held.bytes["published LoRA"] == sum(file.stat().st_size for file in folder.iterdir()) > 0
        [kind] = [kind for kind in held.kinds if kind.name == "parametric"]
        assert kind.bytes == held.bytes["LoRA"] + held.bytes["published LoRA"]


def test_a_second_publication_that_is_refused_leaves_what_is_known_of_the_first(tmp_path: Path) -> None:
    server = VllmDouble()
    with server, opened(tmp_path, server.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        ana = mem.scope(user="ana").parametric
        ana.publish(version)
        server.refuses = True
        with pytest.raises(AgentMemError):
            ana.publish(version)
        server.refuses = False
        assert mem.forget(list(version.records)).hosted == []
        assert server.loaded == {}


def test_what_could_not_be_written_is_not_noted_as_given(
    vllm: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Path:
        raise Full("no space left")

    with opened(tmp_path, vllm.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        monkeypatch.setattr("agentmem.publishing._written", full)
        with pytest.raises(Full):
            mem.scope(user="ana").parametric.publish(version)
        assert mem._engine.database.query("SELECT * FROM published") == []


def test_a_server_without_the_routes_names_the_variable_it_needs(tmp_path: Path) -> None:
    with VllmDouble(allowed=False) as server, opened(tmp_path, server.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        with pytest.raises(Rejected, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            mem.scope(user="ana").parametric.publish(version)
        assert mem._engine.database.query("SELECT * FROM published") == []


def test_a_folder_that_the_server_does_not_see_is_told(
    vllm: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, vllm.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        monkeypatch.setattr("agentmem.publishing._written", lambda *_: Path("/elsewhere"))
        with pytest.raises(Rejected, match="under the same path"):
            mem.scope(user="ana").parametric.publish(version)


def test_a_version_that_is_forgotten_while_it_is_published_does_not_stay(
    vllm: VllmDouble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, vllm.url) as mem:
        version = learnt(mem, "I live in Tromsø.")
        provider: Any = mem._engine.provider
        publish = provider.publish_lora

        def slowly(name: str, file: Path) -> Any:
            published = publish(name, file)
            mem._engine.registry.retire([version.digest])
            return published

        monkeypatch.setattr(provider, "publish_lora", slowly)
        with pytest.raises(TrainingError, match="retired while it was published"):
            mem.scope(user="ana").parametric.publish(version)
        assert vllm.loaded == {}


def test_a_server_that_is_away_is_an_error_and_chats_as_the_base_would(tmp_path: Path) -> None:
    with opened(tmp_path, f"http://127.0.0.1:{free_port()}") as mem:
        version = learnt(mem, "I live in Tromsø.")
        mem.scope(user="ana").parametric.activate(version)
        with pytest.raises(Unavailable):
            mem.scope(user="ana").parametric.publish(version)
        assert mem._engine.active_loras(ANA) == ()


def test_what_an_engine_can_not_serve_is_refused(vllm: VllmDouble, tmp_path: Path) -> None:
    with opened(tmp_path, vllm.url) as mem:
        ana = mem.scope(user="ana").parametric
        with pytest.raises(ConfigError, match="no activated"):
            ana.publish(learnt(mem, "I live in Oslo.", called=(1, 2)))
        with pytest.raises(TrainingError, match="gate"):
            ana.publish(learnt(mem, "I have a cat.", seed=2, passed=False))
        with pytest.raises(InvalidInput, match="active"):
            ana.publish()
        with pytest.raises(NotFound):
            ana.unpublish(learnt(mem, "I like tea.", seed=3))
        with pytest.raises(NotFound):
            mem.scope(user="bob").parametric.publish(mem._engine.registry.versions(ANA)[0])
        with pytest.raises(InvalidInput, match="to is"):
            ana.publish(learnt(mem, "I like rye.", seed=4), to="")
        with pytest.raises(ConfigError, match="no provider"):
            ana.publish(learnt(mem, "I like oats.", seed=5), to="nowhere:x")
        assert vllm.loaded == {}


@pytest.mark.parametrize(
    ("model", "table"),
    [("openai:gpt-5.6-luna", {"api_key": "k"}), ("anthropic:claude-haiku-4-5", {"api_key": "k"})],
)
def test_hosted_models_have_no_place_for_a_lora(tmp_path: Path, model: str, table: dict[str, str]) -> None:
    """They refuse training and publishing by name, and no request to them ever carries a version."""
    scheme = model.partition(":")[0]
    with Memory(tmp_path, model=model, embedder="none", lora_when="always", providers={scheme: table}) as mem:
        ana = mem.scope(user="ana").parametric
        version = learnt(mem, "I live in Tromsø.")
        ana.activate(version)
        with pytest.raises(ConfigError, match="local"):
            ana.train()
        with pytest.raises(ConfigError, match="no place for a LoRA"):
            ana.publish(version)
        assert mem._engine.active_loras(ANA) == ()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


class TestGguf:
    """Forms that need the base's configuration: a tiny random model stands for it."""

    @pytest.fixture
    def mem(self, folder: Path, tmp_path: Path) -> Iterator[Memory]:
        nowhere = {"base_url": f"http://127.0.0.1:{free_port()}", "max_retries": 0}
        with Memory(
            tmp_path / "memory", model=f"local:{folder}", embedder="none", providers={"llamacpp": nowhere}
        ) as mem:
            yield mem

    def version(self, mem: Memory, folder: Path, **more: Any) -> LoraVersion:
        identity = mem._engine.chat_provider().tensors().identity.hex()
        return learnt(mem, "I live in Tromsø.", identity=identity, base=f"local:{folder}", size=(96, 64), **more)

    def test_ollama_gets_a_model_of_its_own_name(self, mem: Memory, folder: Path) -> None:
        ana, version = mem.scope(user="ana").parametric, self.version(mem, folder)
        with OllamaShim("http://127.0.0.1:9") as shim:
            mem._engine.settings.providers["ollama"] = {"base_url": shim.url}
            for base in (MODEL, MODEL.partition(":")[0]):  # with a tag and without
                publication = ana.publish(version, to=f"ollama:{base}")
                assert publication.served == f"{version.name}-{version.digest[:16]}"
                assert shim.models[f"{base}-{publication.served}"] in shim.blobs
                assert ana.publish(version, to=f"ollama:{base}").ready
            assert not any((mem._engine.folder / "published").iterdir()), "it lies in Ollama's own store"
            receipt = mem.forget(list(version.records))
            assert set(shim.models) == {MODEL, MODEL.partition(":")[0]}
            assert receipt.hosted == []

    def test_llama_cpp_takes_it_at_its_next_start(self, mem: Memory, folder: Path) -> None:
        version = self.version(mem, folder, called=(3, 4))
        publication = mem.scope(user="ana").parametric.publish(version, to="llamacpp:m")
        assert not publication.ready
        assert publication.file is not None
        file = Path(publication.file)
        assert file.name == f"{version.name}-{version.digest[:16]}.gguf"
        assert f"--lora {file} --lora-init-without-apply" in str(publication)
        receipt = mem.forget(list(version.records))
        assert not file.exists(), "it is not left for the next start"
        assert any("may still answer" in told for told in receipt.hosted), "the server may run with it"

    def test_a_file_that_another_engine_reads_stays(self, mem: Memory, folder: Path) -> None:
        ana, version = mem.scope(user="ana").parametric, self.version(mem, folder)
        file = Path(ana.publish(version, to="llamacpp:m").file or "")
        with OllamaShim("http://127.0.0.1:9") as shim:
            mem._engine.settings.providers["ollama"] = {"base_url": shim.url}
            ana.publish(version, to=f"ollama:{MODEL}")
            assert file.is_file()
            ana.unpublish(version, to=f"ollama:{MODEL}")
            assert file.is_file()
            mem.forget(list(version.records))
            assert not file.exists()

    def test_this_process_needs_none(self, mem: Memory, folder: Path) -> None:
        with pytest.raises(ConfigError, match="activate one instead"):
            mem.scope(user="ana").parametric.publish(self.version(mem, folder))

    def test_both_forms_are_exported(self, mem: Memory, folder: Path, tmp_path: Path) -> None:
        ana, version = mem.scope(user="ana").parametric, self.version(mem, folder)
        assert (ana.export(version, tmp_path / "peft") / "adapter_model.safetensors").is_file()
        file = ana.export(version, tmp_path / "gguf", format="gguf")
        assert file.read_bytes()[:4] == b"GGUF"
        with pytest.raises(InvalidInput, match="peft, gguf"):
            ana.export(version, tmp_path / "x", format="onnx")  # type: ignore[arg-type]
        with pytest.raises(NotFound):
            mem.scope(user="bob").parametric.export(version, tmp_path / "y")

    def test_a_base_that_changed_is_refused(self, mem: Memory, folder: Path, tmp_path: Path) -> None:
        version = learnt(mem, "I live in Oslo.", identity="cd" * 32, base=f"local:{folder}", size=(96, 64))
        with pytest.raises(TrainingError, match="has changed"):
            mem.scope(user="ana").parametric.export(version, tmp_path / "gguf", format="gguf")
