"""Which records that LoRA versions learnt a turn concerns: only the versions that learnt one of them act on it.

Asks the plaintext index, as the turn's recall does anyway, and remembers what the turn before was about, for "And her
age?". Knows no weights: `Engine.active_loras` turns what is said here into versions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from .flow import run
from .flows import search
from .plaintext.asking import tells
from .plaintext.concerning import WEIGHED, concerned
from .plaintext.whose import points_back

if TYPE_CHECKING:
    from .engine import Engine
    from .provider import LoraRef
    from .types import Hit, Scope

__all__ = ["QUERY_CHARACTERS", "concerns", "turned_to", "vouched"]

#: A query longer than this is cut before the search: an embedder reads no more, and FTS5 slows down.
QUERY_CHARACTERS = 2000


def turned_to(question: str, hits: Sequence[Hit], learnt: Collection[str], before: Sequence[str]) -> tuple[str, ...]:
    """The ids in ``learnt`` that a turn concerns, the likeliest first.

    ``hits`` are what a search for it found, ``before`` is what the turn before concerned: a question that points back
    to it concerns the same. A turn that only tells concerns nothing.
    """
    if not learnt or tells(question):
        return ()
    found = concerned(question, hits, learnt)
    if not found and points_back(question):
        found = [record for record in before if record in learnt]
    return tuple(found)


def concerns(engine: Engine, scope: Scope, learnt: Collection[str]) -> Callable[[str], frozenset[str]]:
    """Which records a question that is asked by itself in this scope concerns, among these and what the versions that
    are active there learnt: what a gate asks of each question, to know which versions would act on it."""
    all_learnt = engine.learnt(scope) | set(learnt)

    @functools.cache
    def concerned_by(question: str) -> frozenset[str]:
        query = question.strip()[:QUERY_CHARACTERS]
        hits = run(search(engine, scope, query, k=WEIGHED, words_if_down=True))
        return frozenset(turned_to(question, hits, all_learnt, ()))

    return concerned_by


def vouched(engine: Engine, scope: Scope, loras: Sequence[LoraRef]) -> set[str]:
    """The records that an answer needs no text of: those that `Engine.vouched` names of these acting versions."""
    return set(engine.vouched(scope, {ref.digest for ref in loras})) if loras else set()
