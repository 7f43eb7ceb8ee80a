"""The ledger's rows summed for a report: by verb, day, scope and kind of memory, and against other ways to prompt.

Reads ``uses``; writes nothing. Every sum is over the uses of one scope and what lies beneath it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..activation.turns import Turn
from ..provider import split_name
from ..types import LEVELS, Scope
from .costs import input_price
from .report import Comparison, Kind, Line, Miss, Prefix, Share
from .uses import Ledger, beneath, read_turns

__all__ = ["Accounts"]

#: Requests that are replayed under other policies, newest first.
REPLAYED = 400
#: Of them those of one conversation at most: full history grows with every turn.
AT_ONCE = 200
#: Scopes, prefixes and reasons told one by one; further scopes are told as one sum.
TOLD = 50
#: What every sum is made of. ``timed`` are cached tokens that no price list prices: what they save is time.
SUMS = (
    "COUNT(*) AS uses, SUM(input) AS input, SUM(cached) AS cached, SUM(written) AS written, SUM(output) AS output,"
    " SUM(cached > 0) AS hits, SUM(total_s) AS seconds, SUM(money) AS money, SUM(uncached_money - money) AS saved,"
    " COUNT(*) - COUNT(money) AS unpriced, SUM(CASE WHEN uncached_money IS NULL THEN cached ELSE 0 END) AS timed"
)


@dataclass
class _Sum:
    """Sums of some uses, added up group by group. Money stays None until some is known."""

    uses: int = 0
    input: int = 0
    cached: int = 0
    written: int = 0
    output: int = 0
    seconds: float = 0.0
    unpriced: int = 0
    money: float | None = None
    saved: float | None = None
    saved_seconds: float | None = None

    def share(self, name: str) -> Share:
        return Share(
            name=name,
            uses=self.uses,
            input_tokens=self.input,
            cached_tokens=self.cached,
            written_tokens=self.written,
            output_tokens=self.output,
            seconds=self.seconds,
            money=self.money,
            saved_money=self.saved,
            unpriced=self.unpriced,
        )


class Accounts:
    """The uses of a scope and beneath it from ``since`` until before ``until`` (Unix seconds), summed."""

    def __init__(self, ledger: Ledger, scope: Scope, *, since: float | None = None, until: float | None = None) -> None:
        self._ledger = ledger
        self._query = ledger.database.query
        self._scope = scope
        self._where, self._values = beneath(scope, since, until)

    def lines(self) -> list[Line]:
        """By verb and model."""
        return self._lines

    def providers(self) -> list[Share]:
        """By the scheme of the model, the dearest first."""
        return _dearest(self._shares(self._days, lambda row: split_name(row["model"])[0] or "(none)"))

    def days(self) -> list[Share]:
        """By day (UTC), in order; days without a use are left out."""
        return self._shares(self._days, lambda row: _day(row["name"]))

    def scopes(self) -> list[Share]:
        """By the values of the next level beneath the scope, the dearest first; many are summed at the end."""
        level = self._next_level
        if level is None:
            return []
        rows = map(dict, self._summed(level))
        shares = _dearest(self._shares(rows, lambda row: f"{level}={row['name']!r}" if row["name"] else f"no {level}"))
        told, rest = shares[:TOLD], shares[TOLD:]
        return told + ([_together(rest, f"{len(rest)} more")] if rest else [])

    def misses(self) -> list[Miss]:
        """Why expected cache hits did not come, the most frequent first."""
        rows = self._query(
            "SELECT reason, COUNT(*) AS uses, SUM(MAX(expected - cached, 0)) AS tokens FROM uses"
            f" WHERE {self._where} AND reason IS NOT NULL GROUP BY reason ORDER BY uses DESC, tokens DESC LIMIT ?",
            (*self._values, TOLD),
        )
        return [Miss(reason=row["reason"], uses=row["uses"], tokens=row["tokens"]) for row in rows]

    def lora_uses(self) -> dict[str, int]:
        """On how many answers each LoRA version acted, by name, the most used first."""
        rows = self._query(
            f"SELECT value AS name, COUNT(*) AS uses FROM uses, json_each(uses.loras) WHERE {self._where}"
            " GROUP BY value ORDER BY COUNT(*) DESC, value",
            self._values,
        )
        return {row["name"]: row["uses"] for row in rows}

    def kinds(self, sizes: Mapping[str, int], compared: Iterable[Comparison] = ()) -> list[Kind]:
        """By kind of memory; ``sizes`` is what each holds on disk, where that is told, by the same names."""
        lines = self.lines()
        trained = [line for line in lines if line.verb == "train"]
        full = [against.saved for against in compared if against.policy == "full history"]
        rows = list(self._query(self._carried, self._values))
        return [
            Kind(
                name="plaintext",
                uses=sum(row["uses"] for row in rows),
                tokens=sum(row["recalled"] + row["core"] for row in rows),
                seconds=sum(line.seconds for line in lines if line.verb not in ("chat", "prime", "train")),
                bytes=sizes.get("plaintext"),
                money=_sum([*map(self._carrying, rows), *(line.money for line in lines if line.verb in WRITING)]),
                saved_money=_sum(full),
            ),
            Kind(
                name="activation",
                uses=sum(row["hits"] for row in self._days),
                tokens=sum(line.cached_tokens + line.record_tokens for line in lines),
                seconds=sum(line.saved_seconds or 0.0 for line in lines),
                bytes=sizes.get("activation"),
                money=_sum([prefix.money for prefix in self._hosted]),
                saved_money=_sum([line.saved_money for line in lines]),
            ),
            Kind(
                name="parametric",
                uses=sum(line.uses for line in trained),
                tokens=0,
                seconds=sum(line.seconds for line in trained),
                bytes=sizes.get("parametric"),
                money=_sum([line.money for line in trained]),
            ),
        ]

    def compared(self) -> list[Comparison]:
        """The newest requests under other policies: with no cache (exact), and those of `activation.replays.replay`.

        Only requests whose price, and whose host's rules, are known. A conversation is replayed on its own. What was
        said before its first request here counts for full history, as far as it fits into the model's window.
        """
        conversations = list(self._conversations())
        if not conversations:
            return []
        from ..activation.replays import replay

        totals: dict[str, float] = {}
        requests, spent, bare = 0, 0.0, 0.0
        for model, whose, chats in conversations:
            rules, token = self._ledger.rules(model), self._input_price(model)
            if rules is None or not rules.priced or token is None:
                continue
            turns = read_turns(row["turn"] for row in chats)
            if len(turns) < len(chats):  # money and turns would not be of the same requests
                continue
            before = self._before(model, whose, chats[0]["id"], turns[0], rules.context_tokens)
            bills, without = replay(rules, [before, *turns]), replay(rules, [before])
            uncached = sum(row["uncached_money"] for row in chats)
            answers = max(uncached - token * sum(row["input"] for row in chats), 0.0)
            for policy, bill in bills.items():
                cost = (bill.cost(rules) - without[policy].cost(rules)) * token + answers
                totals[policy] = totals.get(policy, 0.0) + cost
            requests += len(chats)
            spent += sum(row["money"] for row in chats) + self._primed(model, whose, chats)
            bare += uncached
        if not requests:
            return []
        totals.pop("planned", None)
        totals["no cache"] = bare
        first = [policy for policy in ("no memory", "full history", "no cache") if policy in totals]
        return [
            Comparison(policy=policy, requests=requests, money=totals[policy], spent=spent)
            for policy in (*first, *sorted(totals.keys() - set(first)))
        ]

    def _conversations(self) -> Iterator[tuple[str, list[Any], list[Any]]]:
        """(model, [tenant, user, agent], rows) of the newest requests, in order, by the scope that they belong to."""
        rows = self._query(
            f"SELECT id, model, tenant, user, agent, turn, input, money, uncached_money FROM uses WHERE {self._where}"
            " AND turn IS NOT NULL AND uncached_money IS NOT NULL ORDER BY id DESC LIMIT ?",
            (*self._values, REPLAYED),
        )
        groups: dict[tuple[str, ...], list[Any]] = {}
        for row in reversed(rows):
            groups.setdefault((row["model"], row["tenant"], row["user"], row["agent"]), []).append(row)
        for (model, *whose), chats in groups.items():
            yield model, whose, chats[-AT_ONCE:]

    def _primed(self, model: str, whose: Sequence[str], chats: Sequence[Any]) -> float:
        """Dollars of the primes that filled the cache for these requests: those since the request before them."""
        mine = f"model = ? AND tenant = ? AND user = ? AND agent = ? AND {self._where}"
        values = (model, *whose, *self._values)
        [row] = self._query(
            f"SELECT COALESCE(SUM(money), 0) FROM uses WHERE verb = 'prime' AND id < ? AND {mine} AND id >"
            f" (SELECT COALESCE(MAX(id), 0) FROM uses WHERE turn IS NOT NULL AND id < ? AND {mine})",
            (chats[-1]["id"], *values, chats[0]["id"], *values),
        )
        return float(row[0])

    def _before(self, model: str, whose: Sequence[str], use: int, turn: Turn, window: int | None) -> Turn:
        """All that was said in a conversation before this use, as one turn of another session, a day before."""
        said = "json_extract(turn, '$.message') + json_extract(turn, '$.reply')"
        [row] = self._query(
            f"SELECT COALESCE(SUM({said}), 0) FROM uses WHERE model = ? AND tenant = ? AND user = ? AND agent = ?"
            f" AND id < ? AND turn IS NOT NULL AND {self._where}",
            (model, *whose, use, *self._values),
        )
        room = max((window or 1_000_000) // 2 - turn.system, 0)
        return Turn(
            id="", at=turn.at - 86_400, session="", system=turn.system, core=0, message=min(row[0], room), reply=0
        )

    def prefixes(self) -> list[Prefix]:
        """What each scope's prefix at a host cost to write and gave back by reads, the most written first."""
        return self._hosted[:TOLD]

    @cached_property
    def _hosted(self) -> list[Prefix]:
        level = self._next_level or LEVELS[0]
        rows = self._query(
            f"SELECT model, {level} AS name, SUM(written) AS written, SUM(long_written) AS long, SUM(cached) AS cached"
            f" FROM uses WHERE {self._where} AND (written > 0 OR cached > 0)"
            f" GROUP BY model, {level} ORDER BY SUM(written) DESC, SUM(cached) DESC",
            self._values,
        )
        found = []
        for row in rows:
            rules = self._ledger.rules(row["model"])
            if rules is None or not rules.priced:
                continue
            short, long = rules.lifetimes[0].write - 1.0, rules.lifetimes[-1].write - 1.0
            per_token = 1.0 - rules.read
            cost = (row["written"] - row["long"]) * short + row["long"] * long
            token = self._input_price(row["model"])
            found.append(
                Prefix(
                    where=row["model"],
                    name=f"{level}={row['name']!r}" if row["name"] else str(self._scope),
                    tokens=row["written"],
                    read_tokens=row["cached"],
                    unit="tokens",
                    cost=cost,
                    gained=row["cached"] * per_token,
                    reads_needed=cost / (1.0 - rules.read) / row["written"]
                    if row["written"] and rules.read < 1
                    else None,
                    money=None if token is None else cost * token,
                )
            )
        return found

    def second_per_token(self, model: str) -> float | None:
        """Seconds that a model on this machine takes for a prompt token, from uses that computed most of theirs."""
        return self._paces.get(model)

    # ---- sums ----------------------------------------------------------------------------------------------------

    def _summed(self, by: str) -> list[Any]:
        return self._query(
            f"SELECT {by} AS name, verb, model, {SUMS} FROM uses WHERE {self._where} GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
            self._values,
        )

    @cached_property
    def _days(self) -> list[dict[str, Any]]:
        return list(map(dict, self._summed("CAST(at / 86400 AS INTEGER)")))

    @cached_property
    def _lines(self) -> list[Line]:
        sums: dict[Any, _Sum] = {}
        for row in self._days:
            self._add(sums.setdefault((row["verb"], row["model"]), _Sum()), row)
        rest = self._query(
            "SELECT verb, model, AVG(first_s) AS first, SUM(reason IS NOT NULL) AS missed,"
            " COALESCE(SUM(json_extract(attended, '$.tokens')), 0) AS attended,"
            " GROUP_CONCAT(DISTINCT json_extract(attended, '$.codec')) AS codec,"
            " COALESCE(MAX(json_extract(attended, '$.stock_bytes') - json_extract(attended, '$.bytes')), 0) AS spared,"
            " COALESCE(SUM(json_extract(attended, '$.record_tokens')), 0) AS record_tokens"
            f" FROM uses WHERE {self._where} GROUP BY verb, model ORDER BY verb, model",
            self._values,
        )
        return [_line(row, sums[row["verb"], row["model"]]) for row in map(dict, rest)]

    @cached_property
    def _paces(self) -> dict[str, float]:
        rows = self._query(
            "SELECT model, SUM(first_s) / SUM(input - cached) AS pace FROM uses"
            f" WHERE {self._where} AND uncached_money IS NULL AND first_s IS NOT NULL AND cached * 2 <= input"
            " GROUP BY model HAVING SUM(input - cached) > 0",
            self._values,
        )
        return {row["model"]: row["pace"] for row in rows}

    @property
    def _carried(self) -> str:
        """Tokens of recalled records and of core blocks, by model."""
        recalled = "(SELECT SUM(json_extract(value, '$[1]')) FROM json_each(turn, '$.recalled'))"
        return (
            "SELECT model, COUNT(*) AS uses, SUM(recalled) AS recalled, SUM(core) AS core FROM (SELECT model,"
            f" COALESCE({recalled}, 0) AS recalled, COALESCE(json_extract(turn, '$.core'), 0) AS core"
            f" FROM uses WHERE {self._where} AND turn IS NOT NULL) WHERE recalled + core > 0 GROUP BY model"
        )

    def _carrying(self, row: Any) -> float | None:
        """What carrying records cost: the recalled ones at the end of a prompt are new each time, a core is read."""
        token, rules = self._input_price(row["model"]), self._ledger.rules(row["model"])
        return (
            None if token is None else token * (row["recalled"] + row["core"] * (1.0 if rules is None else rules.read))
        )

    def _input_price(self, model: str) -> float | None:
        return input_price(model, rules=self._ledger.rules(model), at=self._ledger.clock())

    @cached_property
    def _next_level(self) -> str | None:
        """The widest level beneath the scope that its uses set; None where none does."""
        free = [level for level, value in self._scope.levels() if value is None]
        if not free:
            return None
        [row] = self._query(
            f"SELECT {', '.join(f'MAX({level})' for level in free)} FROM uses WHERE {self._where}", self._values
        )
        return next((level for level, most in zip(free, row, strict=True) if most), None)

    def _shares(self, rows: Iterable[Mapping[str, Any]], name: Any) -> list[Share]:
        sums: dict[str, _Sum] = {}
        for row in rows:
            self._add(sums.setdefault(name(row), _Sum()), row)
        return [found.share(key) for key, found in sums.items()]

    def _add(self, to: _Sum, row: Mapping[str, Any]) -> None:
        for column in ("uses", "input", "cached", "written", "output", "seconds", "unpriced"):
            setattr(to, column, getattr(to, column) + row[column])
        pace = self._paces.get(row["model"]) if row["timed"] else None
        seconds = None if pace is None else pace * row["timed"]
        to.money = _sum([to.money, row["money"]])
        to.saved_seconds = _sum([to.saved_seconds, seconds])
        cost = None if seconds is None else self._ledger.costs.computing(seconds)
        to.saved = _sum([to.saved, row["saved"], cost])


#: Verbs that write memories rather than answer.
WRITING = frozenset({"embed", "extract", "reconcile"})


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _dearest(shares: list[Share]) -> list[Share]:
    return sorted(shares, key=lambda share: (-(share.money or 0.0), -share.input_tokens, share.name))


def _together(shares: list[Share], name: str) -> Share:
    counts = ("uses", "input_tokens", "cached_tokens", "written_tokens", "output_tokens", "seconds", "unpriced")
    sums: dict[str, Any] = {count: sum(getattr(share, count) for share in shares) for count in counts}
    spent, saved = _sum(share.money for share in shares), _sum(share.saved_money for share in shares)
    return Share(name=name, **sums, money=spent, saved_money=saved)


def _day(number: int) -> str:
    return (dt.date(1970, 1, 1) + dt.timedelta(days=number)).isoformat()


def _line(row: Mapping[str, Any], total: _Sum) -> Line:
    return Line(
        verb=row["verb"],
        model=row["model"],
        uses=total.uses,
        input_tokens=total.input,
        cached_tokens=total.cached,
        written_tokens=total.written,
        output_tokens=total.output,
        seconds=total.seconds,
        first_token_s=row["first"],
        missed=row["missed"],
        attended_tokens=row["attended"],
        attended_codec=row["codec"],
        spared_bytes=max(row["spared"], 0),
        record_tokens=row["record_tokens"],
        money=total.money,
        saved_money=total.saved,
        saved_seconds=total.saved_seconds,
        unpriced=total.unpriced,
    )
