"""Identities and key chains: different circumstances never share a key, equal ones always do."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from agentmem.activation import identity
from agentmem.activation.identity import chain, digest, file_digest, link, root, token_bytes
from agentmem.errors import InvalidInput, StoreError

IDENTITY = digest({"weights": "w"})


def test_the_order_of_the_fields_does_not_matter() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert len(IDENTITY) == 32


def test_no_two_sets_of_fields_share_a_digest() -> None:
    sets: list[dict[str, Any]] = [
        {},
        {"": ""},
        {"a": ""},
        {"a": "b"},
        {"a": b"b"},
        {"ab": ""},
        {"a": "", "b": ""},
        {"a": "b", "c": "d"},
        {"a": "bc", "": "d"},
        {"a": "bc=d"},
        {"lora": "x", "salt": ""},
        {"lora": "", "salt": "x"},
        {"a": 1},
        {"a": 1.0},
        {"a": "1"},
        {"a": b"1"},
        {"a": True},
        {"a": -1},
        {"a": 0.0},
        {"a": -0.0},
        {"a": 1 << 70},
        {"a": "\ud800"},
    ]
    assert len({digest(fields) for fields in sets}) == len(sets)


def test_other_types_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"'a' is a list"):
        digest({"a": [1]})  # type: ignore[dict-item]


def test_every_change_gives_another_chain() -> None:
    tokens = list(range(40))
    chains = [
        chain(IDENTITY, b"salt", tokens, 16),
        chain(digest({"weights": "v"}), b"salt", tokens, 16),
        chain(IDENTITY, b"tlas", tokens, 16),
        chain(IDENTITY, b"", tokens, 16),
        chain(IDENTITY, b"salt", [99, *tokens[1:]], 16),
        chain(IDENTITY, b"salt", tokens, 8),
    ]
    keys = list(itertools.chain(*chains))
    assert [len(found) for found in chains] == [2, 2, 2, 2, 2, 5]
    assert len(set(keys)) == len(keys)


def test_a_chain_depends_on_all_before_and_nothing_behind() -> None:
    tokens = list(range(64))
    keys = chain(IDENTITY, b"salt", tokens, 16)
    assert chain(IDENTITY, b"salt", tokens[:47], 16) == keys[:2]
    changed = chain(IDENTITY, b"salt", [*tokens[:20], 7, *tokens[21:]], 16)
    assert changed[0] == keys[0]
    assert not set(changed[1:]) & set(keys)
    parent = root(IDENTITY, b"salt", 16)
    assert keys[0] == link(parent, token_bytes(tokens[:16]))
    assert chain(IDENTITY, b"salt", tokens[:15], 16) == []


def test_the_keys_of_version_1_stay_what_they_are() -> None:
    # A change here makes every stored page unreachable: then raise the version in the tags instead.
    assert IDENTITY.hex() == "36a59e63af5016d8be11ad1d9706bf8d06466a2f96fb0f3b1db36824eb68effd"
    assert (
        chain(IDENTITY, b"salt", range(16), 16)[0].hex()
        == "0d0c97bbd35eb3152605ac411af70303ca1b4fc327637667286c98c261553e92"
    )


@pytest.mark.parametrize("tokens", [[-1], [1 << 31], [1.5], ["a"]])
def test_impossible_tokens_are_refused(tokens: list[Any]) -> None:
    with pytest.raises(InvalidInput):
        chain(IDENTITY, b"", tokens, 1)


def test_an_identity_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidInput, match="32 bytes"):
        root(b"short", b"", 16)


# ---- digests of files


def settle(path: Path) -> None:
    """Let the file look as if it had been left alone for a while."""
    past = time.time() - 60
    os.utime(path, (past, past))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were really read; change times count as old."""
    read: list[str] = []
    original = hashlib.file_digest

    def note(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", note)
    monkeypatch.setattr(identity, "SETTLED_NS", -1)
    return read


def test_a_file_is_hashed_once_while_it_stays_unchanged(tmp_path: Path, hashed: list[str]) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache" / "deeper"
    file.write_bytes(b"abc")
    first = file_digest(file, cache)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(file, cache) == first
    assert hashed == ["weights"]
    assert [path.name for path in cache.iterdir()] == ["digests.json"]


def test_equal_size_and_time_do_not_hide_a_change(tmp_path: Path, hashed: list[str]) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"abc")
    settle(file)
    first = file_digest(file, cache)
    file.write_bytes(b"abd")
    settle(file)
    assert file_digest(file, cache) != first
    replacement = tmp_path / "new"
    replacement.write_bytes(b"abe")
    settle(replacement)
    replacement.replace(file)
    assert file_digest(file, cache) == file_digest(file)
    assert hashed == ["weights"] * 4


def test_a_file_that_just_changed_is_not_cached(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"abc")
    file_digest(file, cache)
    assert not (cache / "digests.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": [[1, 2, 3, 4], "short"]}', "\0"])
def test_a_damaged_cache_is_no_cache(tmp_path: Path, content: str, hashed: list[str]) -> None:
    (tmp_path / "digests.json").write_text(content)
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert file_digest(file, tmp_path).startswith("ba7816bf")
    assert json.loads((tmp_path / "digests.json").read_text())


def test_a_cache_that_can_not_be_written_is_no_error(tmp_path: Path, hashed: list[str]) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert file_digest(file, file / "no folder").startswith("ba7816bf")


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, bytes]) -> str:
        for relative, content in files.items():
            path = tmp_path / name / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return file_digest(tmp_path / name)

    same = folder("a", {"x": b"1", "y/z": b"2"})
    assert same == folder("b", {"y/z": b"2", "x": b"1"})
    others = [
        folder("c", {"x": b"1", "y/z": b"3"}),
        folder("d", {"x": b"1", "y": b"2"}),
        folder("e", {"x": b"2", "y/z": b"1"}),
        folder("f", {"x": b"1", "y/z": b"2", "w": b""}),
    ]
    assert len({same, *others}) == 5


def test_a_missing_file_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be read"):
        file_digest(tmp_path / "nothing")
