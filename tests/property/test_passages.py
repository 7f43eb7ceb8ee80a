"""Passages of any text cover it, in order, without blank pieces, within their limits."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.plaintext.passages import by_characters, by_tokens

TEXTS = st.lists(
    st.sampled_from(
        ["word", "a", " ", "\n", "\n\n", ". ", "!", "\u3002", "\u00a0", "\U0001f600", "e\u0301", "      ", "x" * 30]
    ),
    max_size=200,
).map("".join)


def covers(text: str, pieces: list[tuple[int, int]]) -> None:
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == len(text)
    if text.strip():
        assert all(text[start:stop].strip() for start, stop in pieces)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 60), st.integers(2, 60))
def test_pieces_by_characters_cover_the_text(text: str, whole: int, aim: int) -> None:
    pieces = by_characters(text, whole, aim)
    covers(text, pieces)
    if len(text) > whole:
        assert all(len(text[start:stop].strip()) <= max(whole, aim) for start, stop in pieces)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(1, 60), st.integers(2, 60), st.booleans())
def test_pieces_by_tokens_cover_the_text_and_keep_the_limit(text: str, whole: int, aim: int, doubled: bool) -> None:
    ends = [found.end() for found in re.finditer(r"\w{1,4}|[^\w\s]", text)]
    if doubled:  # characters of two tokens
        ends = sorted(ends + ends[::2])
    pieces = by_tokens(text, ends, whole=whole, aim=aim)
    covers(text, pieces)
    for start, stop in pieces:
        inside = sum(start < end <= stop for end in ends)
        assert inside <= max(whole, aim) + doubled
        if len(ends) > whole and stop < len(text):
            assert inside >= aim // 2 - 1
