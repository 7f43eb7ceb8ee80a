"""Passages: cut where a reader would cut, within the limits of what counts; and how embedders use them."""

from __future__ import annotations

import time

import pytest

from agentmem.plaintext.embed import HashEmbedder, passages_with
from agentmem.plaintext.passages import AIM, MOST, WHOLE, by_characters, by_tokens


def words(text: str) -> list[int]:
    """Where each word ends: a tokenizer of words."""
    ends, at = [], 0
    for word in text.split():
        at = text.index(word, at) + len(word)
        ends.append(at)
    return ends


def test_a_short_text_stays_whole() -> None:
    assert by_characters("x" * WHOLE) == [(0, WHOLE)]
    assert by_tokens("a b c", [1, 3, 5], whole=3, aim=2) == [(0, 5)]
    assert by_characters("") == [(0, 0)]


def test_a_paragraph_ends_a_piece_before_a_sentence_does_and_that_before_a_word() -> None:
    text = "one two three. four five\n\nsix seven. eight nine ten eleven twelve."
    pieces = [text[start:stop] for start, stop in by_tokens(text, words(text), whole=7, aim=7)]
    assert pieces == ["one two three. four five\n\n", "six seven. eight nine ten eleven twelve."]
    text = "one two three. four five six seven eight nine ten"
    pieces = [text[start:stop] for start, stop in by_tokens(text, words(text), whole=5, aim=5)]
    assert pieces == ["one two three. ", "four five six seven eight ", "nine ten"]


def test_text_without_any_place_to_cut_is_cut_at_the_limit() -> None:
    pieces = by_characters("x" * 2001)
    assert [stop - start for start, stop in pieces] == [AIM, AIM, 401]


def test_the_least_size_ends_too() -> None:
    pieces = by_characters("ab. cd\n" * 20, 1, 1)
    assert [start for start, _ in pieces[1:]] == [stop for _, stop in pieces[:-1]]
    assert pieces[-1][1] == 140


def test_chinese_sentences_end_pieces() -> None:
    text = "\u6211\u559c\u6b22\u82b1\u751f\u3002" * 400
    assert all(text[stop - 1] == "\u3002" for _, stop in by_characters(text))


def test_spaces_belong_to_the_piece_before_them() -> None:
    text = "  " + "word. " * 100 + " " * 5000 + "\n\n" + "word. " * 300
    pieces = by_characters(text)
    assert pieces[0][0] == 0
    assert all(not text[start].isspace() for start, _ in pieces[1:])


def test_the_largest_texts_are_cut_in_linear_time_into_at_most_so_many_pieces() -> None:
    started = time.process_time()
    for text in ("x" * (1 << 24), "a b. " * 3_000_000, " " * (1 << 24)):
        pieces = by_characters(text)
        assert len(pieces) <= MOST
        assert pieces[-1][1] == len(text)
    ends = list(range(1, 4_000_001))
    assert len(by_tokens("." * 4_000_000, ends, whole=3, aim=2)) <= MOST
    assert time.process_time() - started < 20


def test_without_an_embedder_characters_count() -> None:
    text = "A sentence of words. " * 200
    assert passages_with(None, text) == passages_with(HashEmbedder(), text, "Ana") == by_characters(text)


@pytest.mark.parametrize("name", ["minilm", "wordllama"])
@pytest.mark.slow
def test_pieces_of_a_real_tokenizer_fit_its_window(name: str) -> None:
    from agentmem.errors import MissingDependency
    from agentmem.plaintext.embed import load
    from agentmem.plaintext.encoders import _LocalTokens

    try:
        embedder = load(name)
    except MissingDependency as error:
        pytest.skip(str(error))
    assert isinstance(embedder, _LocalTokens)
    short = "She said that the meeting is on Monday, and nobody objected. " * 12
    assert embedder.passages(short, "Ana") == [(0, len(short))]
    for text, speaker in (
        (short * 20, "Ana"),
        ("\u6211\u559c\u6b22\u82b1\u751f\u3002" * 500, None),
        ("supercalifragilistic" * 900, "Bob"),
        ("?! " * 3000, "N" * 500),
        ("word " * 30_000, None),
    ):
        pieces = embedder.passages(text, speaker)
        assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
        assert pieces[-1][1] == len(text)
        room = 256 - (len(embedder._ends(f"{speaker}: ")) if speaker else 0)
        for start, stop in pieces:
            # Alone, a piece may begin with one token more.
            assert len(embedder._ends(text[start:stop])) <= max(room, 64) + 1
