"""Passages: a long text in pieces that a model can read whole, cut where a reader would.

Knows paragraphs, sentences and words, and counts what it is told to count: tokens by their places, or characters. Knows
no tokenizer and no record. Every character of the text is in exactly one piece, and no piece is blank unless all is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

__all__ = ["MOST", "by_characters", "by_tokens"]

#: Pieces of one text at most; a text that would have more gets longer ones.
MOST = 65_536
#: Without a tokenizer: a text up to `WHOLE` characters stays one piece, a longer one has pieces of up to `AIM`.
WHOLE, AIM = 1_000, 800

_SPACES = re.compile(r"\s+")
#: Where a sentence or a line ends, with the marks that close it.
_SENTENCE = re.compile("[.!?\u2026][\"'\u201d\u2019)\\]]*(?=\\s)|[\u3002\uff01\uff1f\uff0e]|\\n")


def by_characters(text: str, whole: int = WHOLE, aim: int = AIM) -> list[tuple[int, int]]:
    """Pieces [start, stop) of ``text`` by characters; ``[(0, len(text))]`` up to ``whole`` of them. Linear time."""
    length = len(text)
    if length <= whole:
        return [(0, length)]
    aim = max(2, aim, _stretched(length))

    def window(start: int) -> tuple[int, int]:
        return (length, length) if length - start <= max(whole, aim) else (start + aim // 2, start + aim)

    return _cut(text, window)


def by_tokens(text: str, ends: Sequence[int], *, whole: int, aim: int) -> list[tuple[int, int]]:
    """Pieces [start, stop) of ``text`` by its tokens, which end at ``ends`` (ascending character offsets).

    ``[(0, len(text))]`` up to ``whole`` tokens; a longer text has pieces of half of ``aim`` up to ``aim``, but the last
    may have up to ``whole``. Linear time.
    """
    length, count = len(text), len(ends)
    if count <= whole:
        return [(0, length)]
    aim = max(2, aim, _stretched(count))

    def window(start: int) -> tuple[int, int]:
        first = bisect_right(ends, start)
        if count - first <= max(whole, aim):
            return length, length
        # Several tokens may stand for one character: a piece has at least that one.
        return max(ends[first + aim // 2 - 1], start + 1), max(ends[first + aim - 1], start + 1)

    return _cut(text, window)


def _stretched(count: int) -> int:
    """The least size with which ``count`` units make no more than `MOST` pieces, each of which has at least half."""
    return 2 * -(-count // (MOST - 1)) + 1 if count > MOST else 0


def _cut(text: str, window: Callable[[int], tuple[int, int]]) -> list[tuple[int, int]]:
    """Pieces from the beginning on: what begins to be read at ``start`` ends within ``window(start)``, both included.

    Spaces behind a piece belong to it, so that the next one begins with something to read.
    """
    pieces = []
    start, length = 0, len(text)
    begin = _behind_spaces(text, 0)
    while start < length:
        low, high = window(begin)
        stop = length if high >= length else _behind_spaces(text, _boundary(text, low, high))
        pieces.append((start, stop))
        start = begin = stop
    return pieces


def _behind_spaces(text: str, place: int) -> int:
    spaces = _SPACES.match(text, place)
    return spaces.end() if spaces else place


def _boundary(text: str, low: int, high: int) -> int:
    """The last place from ``low`` to ``high`` behind a paragraph, else a sentence, a line or a word, else ``high``."""
    paragraph = text.rfind("\n\n", low, high)
    if paragraph >= 0:
        return paragraph
    last = 0
    for found in _SENTENCE.finditer(text, low - 1, high + 1):
        if low <= found.end() <= high:
            last = found.end()
    if last:
        return last
    if text[high].isspace():
        return high
    for found in _SPACES.finditer(text, low, high):
        last = found.start()
    return last or high
