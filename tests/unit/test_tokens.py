"""Token counts without a network."""

from __future__ import annotations

import gzip
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from agentmem import tokens
from agentmem.errors import ConfigError
from agentmem.tokens import counter_for, encoding

# The ids of cl100k_base are those in tiktoken's own tests and README.
KNOWN = [
    ("o200k_base", "", []),
    ("o200k_base", "hello world", [24912, 2375]),
    ("cl100k_base", "hello world", [15339, 1917]),
    ("cl100k_base", "tiktoken is great!", [83, 1609, 5963, 374, 2294, 0]),
]


@pytest.mark.parametrize(("name", "text", "ids"), KNOWN)
def test_known_texts_have_their_known_tokens(name: str, text: str, ids: list[int]) -> None:
    assert encoding(name).encode(text) == ids


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
def test_the_encoding_is_the_one_tiktoken_builds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken's own constructor, given the packaged vocabulary instead of a download."""
    public = importlib.import_module("tiktoken_ext.openai_public")
    expected: dict[str, str] = {}

    def ranks(_: str, expected_hash: str) -> dict[bytes, int]:
        expected["hash"] = expected_hash
        return tokens._ranks(tokens._vocabulary(name, expected_hash))

    monkeypatch.setattr(public, "load_tiktoken_bpe", ranks)
    official = public.ENCODING_CONSTRUCTORS[name]()
    ours = encoding(name)
    assert official["pat_str"] == ours._pat_str
    assert official["special_tokens"] == ours._special_tokens
    assert official["mergeable_ranks"] == ours._mergeable_ranks
    assert tokens._ENCODINGS[name][0] == expected["hash"]


@pytest.mark.parametrize(
    ("model", "name", "exact"),
    [
        ("gpt-4o", "o200k_base", True),
        ("openai:gpt-5.6-sol", "o200k_base", True),
        ("openai/gpt-4", "cl100k_base", True),
        ("openai:ft:gpt-4o:org::id", "o200k_base", True),
        ("gpt-oss-20b", "o200k_base", True),
        ("text-embedding-3-small", "cl100k_base", True),
        ("anthropic:claude-sonnet-5-5", "o200k_base", False),
        ("davinci", "o200k_base", False),
        ("", "o200k_base", False),
    ],
)
def test_a_counter_says_whether_it_is_exact(model: str, name: str, exact: bool) -> None:
    counter = counter_for(model)
    assert (counter.encoding_name, counter.exact) == (name, exact)


def test_text_that_looks_like_a_special_token_is_text() -> None:
    assert counter_for("gpt-4o").count("<|endoftext|>") > 1


def test_odd_text_is_counted() -> None:
    counter = counter_for("gpt-4o")
    assert counter.count("\x00\ud800") > 0
    assert counter.count("word " * 200_000) == 200_001


def test_another_encoding_is_refused() -> None:
    with pytest.raises(ConfigError, match="r50k_base"):
        encoding("r50k_base")


def test_a_damaged_vocabulary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "o200k_base.tiktoken.gz").write_bytes(gzip.compress(b"aGk= 0\n"))
    (data / "cl100k_base.tiktoken.gz").write_bytes(b"no gzip")

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(tokens, "find_spec", lambda _: Spec)
    for name in ("o200k_base", "cl100k_base"):
        with pytest.raises(ConfigError, match=name):
            tokens._vocabulary(name, tokens._ENCODINGS[name][0])


def test_nothing_is_downloaded_and_nothing_read_before_the_first_count() -> None:
    code = (
        "import socket\n"
        "def no(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = no\n"
        "from agentmem.tokens import counter_for, encoding\n"
        "counter = counter_for('gpt-4o')\n"
        "assert encoding.cache_info().currsize == 0\n"
        "assert counter.count('hello world') == 2\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
