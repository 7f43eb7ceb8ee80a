"""Whatever is said: a corpus can be made of it, twice the same, and what is tested was never trained."""

from __future__ import annotations

import datetime as dt

from hypothesis import given, settings
from hypothesis import strategies as st

from agentmem.parametric.corpus import build, record_digest
from agentmem.types import Record

VOCABULARY = """
I we my our your the a dog sister Ottilie Oslo called is am are was have had went live work as in at on to from and
because yesterday Tuesday 3 May 2004 never can't not {slot} 'm . , ? ! ; : two plan like love moved She it that you
please ( ) \\ % " ' é 犬 every morning
"""
WORDS = st.sampled_from(VOCABULARY.split())
TEXTS = st.one_of(st.text(max_size=80), st.lists(WORDS, max_size=14).map(" ".join))
RECORDS = st.lists(
    st.builds(
        lambda text, name, days: (text, name, days),
        TEXTS,
        st.sampled_from([None, "Ana", "Bo"]),
        st.integers(-700_000, 900_000),
    ),
    max_size=5,
)


def made(drawn: list[tuple[str, str | None, int]]) -> list[Record]:
    zero = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    return [
        Record(id=f"r{i}", text=text, name=name, at=zero + dt.timedelta(days=days))
        for i, (text, name, days) in enumerate(drawn)
    ]


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.lists(st.text(max_size=30), max_size=4))
def test_any_text_gives_a_sound_corpus(drawn: list[tuple[str, str | None, int]], questions: list[str]) -> None:
    records = made(drawn)
    asked = {record.id: [Record(id=f"q{text}", text=text) for text in questions] for record in records}
    corpus = build(records, asked=asked)
    assert corpus == build(records, asked=asked)
    ids = {record.id: record for record in records}
    past = {question.id: question for of in asked.values() for question in of}
    kept_out = {id_ for id_, _ in corpus.left_out}
    assert (set(corpus.records) - set(past)) | kept_out == set(ids)
    assert not set(corpus.records) & kept_out
    assert all(digest == record_digest((ids | past)[id_].text) for id_, digest in corpus.records.items())
    trained = {example.question for example in corpus.examples}
    tested = {example.question for example in (*corpus.held_out, *corpus.natural)}
    still = {example.question for example in (*corpus.neighbours, *corpus.anchors)}
    assert not trained & tested
    assert not still & (trained | tested)
    for example in (*corpus.examples, *corpus.held_out, *corpus.natural):
        assert example.question.strip()
        assert example.answer.strip()
        assert example.keys
        assert example.records
        assert set(example.records) <= set(corpus.records)
