"""How often one record was used, and what that came to in tokens, as the ledger has it.

Reads ``uses`` and ``shown``; knows no prices: what a token costs is told by whoever asks.
"""

from __future__ import annotations

import json

from ..types import Scope, Value
from .uses import HAS_TURN, Ledger, beneath

__all__ = ["RecordUses", "record_uses"]


class RecordUses(Value):
    """``shown``: how often the record stood in a prompt, at the head, in the history or recalled, to which ``models``.

    Of the requests whose make-up the ledger still has (``requests``, in this scope): ``recalled`` on so many it was
    recalled for the turn, with ``recalled_tokens`` in all, ``used`` on so many the search named it while it stood in
    the core. ``answered``: answers on which a LoRA version acted that learnt it. ``last`` is Unix seconds.
    """

    shown: int = 0
    models: tuple[str, ...] = ()
    last: float | None = None
    requests: int = 0
    recalled: int = 0
    recalled_tokens: int = 0
    used: int = 0
    answered: int = 0

    @property
    def tokens(self) -> float:
        """Of its line, as it was recalled; 0 where it never was."""
        return self.recalled_tokens / self.recalled if self.recalled else 0.0

    def paid(self, tokens: float, prefill: float, cached: float) -> tuple[float, float]:
        """(what it cost, what caches saved on it) with these costs of a prompt token, computed and read from a cache.

        Recalled, its ``tokens`` were computed each time; where it stood otherwise they were read from the cache.
        """
        read = max(0, self.shown - self.recalled) * tokens
        return self.recalled_tokens * prefill + read * cached, read * max(0.0, prefill - cached)


def record_uses(ledger: Ledger, record: str, scope: Scope, versions: tuple[str, ...] = ()) -> RecordUses:
    """The uses of a record in this scope and beneath it; ``versions`` are names of the LoRA versions that learnt it."""
    query = ledger.database.query
    shown = query("SELECT model, times, at FROM shown WHERE record = ? ORDER BY times DESC, model", (record,))
    sql, values = beneath(scope)
    requests = query(f"SELECT COUNT(*) FROM uses WHERE {sql} AND {HAS_TURN}", values)[0][0]
    recalled = recalled_tokens = used = 0
    # Few of many turns name it: they are found by its id before anything is parsed.
    for row in query(f"SELECT turn FROM uses WHERE {sql} AND {HAS_TURN} AND instr(turn, ?) > 0", (*values, record)):
        try:
            turn = json.loads(row["turn"])
        except ValueError:
            continue
        sizes = [size for id_, size in turn.get("recalled") or () if id_ == record]
        recalled += bool(sizes)
        recalled_tokens += sum(sizes)
        used += record in (turn.get("used") or ())
    answered = 0
    if versions:
        [row] = query(
            f"SELECT COUNT(DISTINCT uses.id) FROM uses, json_each(uses.loras) WHERE {sql} AND loras IS NOT NULL"
            " AND value IN (SELECT value FROM json_each(?))",
            (*values, json.dumps(list(versions))),
        )
        answered = row[0]
    return RecordUses(
        shown=sum(row["times"] for row in shown),
        models=tuple(row["model"] for row in shown),
        last=max((row["at"] for row in shown), default=None),
        requests=requests,
        recalled=recalled,
        recalled_tokens=recalled_tokens,
        used=used,
        answered=answered,
    )
