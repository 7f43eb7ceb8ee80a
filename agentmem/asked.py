"""The user's own past questions about records: real rewordings, found in what the store keeps of past answers.

Knows turns, replies and their lineage. Knows no corpus: what is made of the questions is parametric/corpus.py's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from .engine import Engine
from .parametric.grammar import telling
from .types import Record, Scope

__all__ = ["questions"]

#: Questions of a record that are returned, the newest; words that a question has at most.
MOST = 12
LONGEST_WORDS = 25
#: Share of a record's telling words that question and reply hold together, at least.
HOLDS = 0.5
_ASKS = re.compile(
    r"\b(?:what|which|who|whose|whom|where|when|why|how|do|does|did|am|is|are|was|were|can|could|have|has|"
    r"tell me|remind me|do you (?:know|remember))\b.*\b(?:i|i'm|my|mine|me|we|our|us)\b",
    re.IGNORECASE | re.DOTALL,
)

#: Answers written with one of these records in the prompt, and what the user said last before each.
_REPLIES = """
SELECT made.record AS record, answer.text AS answer, asked.id AS asked
FROM lineage AS made
JOIN records AS answer ON answer.id = made.key AND answer.role = 'assistant'
JOIN records AS asked ON asked.seq = (
    SELECT MAX(turn.seq) FROM lineage AS given JOIN records AS turn ON turn.id = given.record
    WHERE given.kind = 'reply' AND given.key = made.key AND turn.role = 'user' AND turn.source = 'chat'
        AND turn.tenant = answer.tenant AND turn.user = answer.user AND turn.agent = answer.agent
        AND turn.session = answer.session AND turn.seq < answer.seq
)
WHERE made.kind = 'reply' AND made.record IN (SELECT value FROM json_each(?)) AND asked.id != made.record
ORDER BY answer.seq DESC
"""


def questions(engine: Engine, scope: Scope, records: Sequence[Record]) -> dict[str, tuple[Record, ...]]:
    """Of each of these records: the records of questions that it answered, the newest first, at most a dozen.

    A question counts if it is about the user, and if its reply said what the record says: where several records were in
    the prompt, only that one whose words the question and the reply hold most of. Only what ``scope`` may see is
    returned. Costs one query and no model call.
    """
    known = {record.id: record for record in records}
    rows = engine.database.query(_REPLIES, (json.dumps(list(known)),))
    visible = {record.id: record for record in engine.records.named(list({row["asked"] for row in rows}), scope)}
    best: dict[str, tuple[float, str]] = {}
    for row in rows:
        asked = visible.get(row["asked"])
        if asked is None or not _fits(asked):
            continue
        share = _said(known[row["record"]].text, asked.text, row["answer"])
        if share >= HOLDS and share > best.get(asked.id, (0.0, ""))[0]:
            best[asked.id] = (share, row["record"])
    found: dict[str, dict[str, Record]] = {}
    for row in rows:
        if best.get(row["asked"], (0.0, ""))[1] == row["record"]:
            asked = visible[row["asked"]]
            found.setdefault(row["record"], {}).setdefault(" ".join(asked.text.split()), asked)
    return {id_: tuple(of.values())[:MOST] for id_, of in found.items()}


def _fits(asked: Record) -> bool:
    text = asked.text.strip()
    return asked.trust == "trusted" and len(text.split()) <= LONGEST_WORDS and bool(_ASKS.search(text))


def _said(record: str, question: str, answer: str) -> float:
    """The share of a record's telling words that question and reply hold; 0 where the reply adds none."""
    words = telling(record)
    left, unsaid = telling(record, question), telling(record, f"{question} {answer}")
    if not words or len(unsaid) == len(left):
        return 0.0
    return 1 - len(unsaid) / len(words)
