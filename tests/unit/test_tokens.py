"""Token counts without a network."""

from __future__ import annotations

import base64
import gzip
import importlib
import math
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from agentmem import tokens
from agentmem.database import Database
from agentmem.errors import ConfigError
from agentmem.provider import Options, Request
from agentmem.tokens import Calibration, counter_for, encoding
from agentmem.types import Image, Message, Segment, TokenCount, ToolCall

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


def test_counts_are_tiktokens_own_on_real_text() -> None:
    """Against tiktoken's plain-Python reference (its educational encoder) over the same vocabulary."""
    from tiktoken._educational import SimpleBytePairEncoding

    for name in ("o200k_base", "cl100k_base"):
        ours = encoding(name)
        reference = SimpleBytePairEncoding(pat_str=ours._pat_str, mergeable_ranks=ours._mergeable_ranks)
        for text in ("Zürich's 2,048 flats — 東京 🦊\n\n  def f(x):\treturn x**2", "I'm, you'RE; \r\n\r\n 12345"):
            assert ours.encode(text) == reference.encode(text, visualise=None)


def request(*messages: Message, **fields: Any) -> Request:
    return Request(segments=(Segment(name="turn", messages=messages, stable=False),), **fields)


def test_a_request_counts_all_that_is_sent() -> None:
    def counted(*messages: Message, **fields: Any) -> int:
        return tokens.request_tokens(request(*messages, **fields), lambda text: len(text.split()))

    said = Message(role="user", content="one two three")
    called = ToolCall(id="c", name="f", arguments={"a": 1})
    tool = {"name": "f", "description": "two words"}
    assert counted(said) == 3 + 4 + 3
    assert counted(said, said) == 3 + 2 * (4 + 3)
    assert counted(said, tools=(tool,)) > counted(said)
    assert counted(said, options=Options(schema={"type": "object"})) > counted(said)
    assert counted(said.model_copy(update={"name": "Ana"})) > counted(said)
    assert counted(Message(role="assistant", content="", tool_calls=(called,))) > counted(
        Message(role="assistant", content="")
    )
    assert counted(said.model_copy(update={"images": (Image(url="https://a/b"),)})) == counted(said) + 85 + 4 * 170


def picture(head: bytes) -> Image:
    return Image(data=base64.b64encode(head).decode(), media_type="image/png")


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height)


SIZED = [
    png(640, 480),
    b"GIF89a" + struct.pack("<HH", 640, 480),
    b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc0\x00\x11\x08" + struct.pack(">HH", 480, 640) + b"\x03",
    b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (639).to_bytes(3, "little") + (479).to_bytes(3, "little"),
    b"RIFF\0\0\0\0WEBPVP8 " + bytes(10) + struct.pack("<HH", 640, 480),
    b"RIFF\0\0\0\0WEBPVP8L" + bytes(4) + b"\x2f" + (639 | 479 << 14).to_bytes(4, "little"),
]


@pytest.mark.parametrize("head", SIZED, ids=["png", "gif", "jpeg", "webp", "webp-lossy", "webp-lossless"])
def test_an_images_size_is_read_from_its_head(head: bytes) -> None:
    assert tokens._size(picture(head)) == (640, 480)
    assert tokens.image_tokens(picture(head)) == 85 + 2 * 170


@pytest.mark.parametrize(("size", "tiles"), [((100, 100), 1), ((1024, 1024), 4), ((8000, 400), 4), ((2048, 4096), 6)])
def test_large_images_are_scaled_before_they_are_tiled(size: tuple[int, int], tiles: int) -> None:
    assert tokens.image_tokens(picture(png(*size))) == 85 + tiles * 170


@pytest.mark.parametrize("head", [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"\xff\xd8" + b"\xff" * 9, png(0, 5)])
def test_an_image_that_can_not_be_read_is_a_usual_one(head: bytes) -> None:
    assert tokens.image_tokens(picture(head)) == tokens.image_tokens(Image(url="https://example.org/a.png"))
    assert tokens.image_tokens(Image(data="?!")) == 765


@pytest.fixture
def calibration() -> Iterator[Calibration]:
    database = Database(":memory:")
    yield Calibration(database)
    database.close()


def test_nothing_is_claimed_before_something_was_counted(calibration: Calibration) -> None:
    assert calibration.count("m", 100) == TokenCount(tokens=100, exact=False)
    for estimated, counted in ((0, 5), (5, 0), (-1, -1)):
        calibration.note("m", estimated, counted)
    assert calibration.count("m", 100).error is None


def test_the_ratio_is_learned_per_model_and_its_error_shrinks(calibration: Calibration) -> None:
    random = Random(0)
    errors = []
    for _ in range(60):
        estimated = random.randint(300, 5000)
        calibration.note("m", estimated, round(estimated * 1.22 * random.uniform(0.98, 1.02)))
        errors.append(calibration.count("m", 1000).error)
    learned = calibration.count("m", 1000)
    assert 1205 <= learned.tokens <= 1235
    assert errors[0] is not None
    assert learned.error is not None
    assert errors[0] > 0.15
    assert 0.003 < learned.error < 0.02
    assert calibration.count("n", 1000).tokens == 1000


@pytest.mark.parametrize("at", [0, 5, 40])
@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_one_outlier_moves_it_little(calibration: Calibration, at: int, factor: float) -> None:
    for number in range(41):
        wrong = number == at
        calibration.note(
            "m", 200_000 if wrong else 800, round((200_000 if wrong else 800) * (factor if wrong else 1.3))
        )
    assert 1300 * 0.96 < calibration.count("m", 1000).tokens < 1300 * 1.04


def test_a_model_far_from_our_tokenizer_is_learned_too(calibration: Calibration) -> None:
    for _ in range(12):
        calibration.note("m", 1000, 2100)
    assert abs(calibration.count("m", 1000).tokens - 2100) < 100


def test_the_error_is_the_root_of_the_mean_square_of_what_was_off(calibration: Calibration) -> None:
    ratio, misses = 1.0, []
    for counted in (1100, 1050, 1150):
        misses.append(ratio * 1000 / counted - 1)
        calibration.note("m", 1000, counted)
        ratio = calibration.count("m", 100_000).tokens / 100_000
    weights = [0.81, 0.9, 1.0]
    expected = math.sqrt(sum(w * miss * miss for w, miss in zip(weights, misses, strict=True)) / sum(weights))
    error = calibration.count("m", 1).error
    assert error is not None
    assert math.isclose(error, expected, rel_tol=1e-3)


def test_it_outlives_the_process_and_threads_may_share_it(tmp_path: Path) -> None:
    database = Database(tmp_path / "memory.db")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: Calibration(database).note("m", 1000, 1200), range(40)))
    database.close()
    database = Database(tmp_path / "memory.db")
    assert Calibration(database).count("m", 1000).tokens == 1200
    assert database.query("SELECT uses FROM counts")[0][0] == 40
    database.close()
