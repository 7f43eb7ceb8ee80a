"""What prompts cost with the model of this memory: measured from the ledger here, or taken from price lists.

Knows uses by their counts and times, pages by their bytes; decides nothing. Where nothing was measured yet a prior
stands in and is called one.
"""

from __future__ import annotations

import datetime as dt
import math
import operator
import statistics
from typing import TYPE_CHECKING, Any

from .cache_rules import CacheRules, Depth, Lifetime
from .engine import Engine
from .ledger.costs import YEAR_S, input_price
from .ledger.uses import NEWEST as AMONG
from .planner.values import Costs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

__all__ = ["costs", "local_rules", "regressed"]

#: The newest uses that costs are measured from, and after how many more they are measured anew.
NEWEST, AGAIN = 300, 24
#: The same for a ledger that has only begun.
SOON = 4
#: Uses that a prior weighs as much as, and how many uses make a number a measured one.
PRIOR_USES, MEASURED_USES = 6.0, 12
#: Before anything was measured, of a small model on a CPU: seconds that a prompt token takes to compute; in such tokens
#: what a request takes beside its tokens, what loading a cached one takes, what attending to one takes for each token
#: that is computed behind it and for each token of an answer, and what keeping one takes.
TOKEN_S, REQUEST, LOAD, BEHIND, ATTEND, KEEP = 2e-3, 15.0, 0.01, 3e-4, 3e-4, 0.03
#: Tokens of an answer, and seconds of one of them, until there were answers.
ANSWER, ANSWER_TOKEN_S = 64.0, 1e-2
#: Before anything was trained, in prompt tokens: teaching one record, what a version adds to a request that it acts on,
#: distilling one token of a head.
LEARN, LORA, DISTIL = 20_000.0, 10.0, 300.0
#: Times the usual time of its tokens that a use may have taken: a machine that slept, swapped or loaded a model in the
#: meantime says nothing of what a token costs, while prompts of all lengths and a busy processor stay well below it.
HELD_UP = 10.0
#: The relative error of a use that is an ordinary one, and how often the fit is made anew by what it showed to be none.
NOISE, ROUNDS = 0.25, 4
#: Dollars of an uncached prompt token where no price list names the model: a small hosted model's in late 2026.
UNPRICED = 2.5e-7


def costs(engine: Engine) -> Costs:
    """What a token of a prompt costs, computed, read from a cache and written to one, and what moves cost.

    On an engine of one's own in seconds of this machine, by least squares over the newest uses with a prior; at a host
    in dollars. The same object is given until some more uses were noted. Raises `ConfigError` without a model.
    """
    model = engine.chat_provider().name
    [row] = engine.database.query("SELECT COALESCE(MAX(id), 0) FROM uses")
    known = engine.measured
    if known is None or not known[0] <= row[0] < known[0] + (AGAIN if known[0] >= AGAIN else SOON):
        here = engine.chat_provider().capabilities.holds_prefix_s is None
        known = engine.measured = (row[0], _measured(engine, model) if here else _priced(engine, model))
    return known[1]


def local_rules(engine: Engine) -> CacheRules | None:
    """The prompt cache of an engine of one's own as `CacheRules`, its prices from `costs`; None where its states are
    not ours to keep (pages), or its window is not known."""
    capabilities = engine.chat_provider().capabilities
    if capabilities.kv != "tensors" or engine.settings.page_budget == 0:
        return None
    if capabilities.holds_prefix_s is not None or capabilities.context_tokens is None:
        return None
    found = costs(engine)
    return CacheRules(
        kind="engine",
        minimum=max(found.minimum, 1),
        step=max(found.minimum, 1),
        read=min(1.0, found.cached / found.prefill),
        lifetimes=(Lifetime(name="kept", seconds=math.inf, write=1.0 + found.write / found.prefill),),
        context_tokens=capabilities.context_tokens,
        depth=None if found.depth is None else found.depth.over(found.prefill),
    )


# ---- an engine of one's own ------------------------------------------------------------------------------------------


def _measured(engine: Engine, model: str) -> Costs:
    rows = engine.database.query(
        "SELECT input, cached, written, output, first_s, total_s FROM uses WHERE model = ?"
        f" AND verb IN ('chat', 'prime') AND first_s IS NOT NULL AND input > 0 AND {AMONG} ORDER BY id DESC LIMIT ?",
        (model, NEWEST),
    )
    uses = [tuple(float(value) for value in row) for row in rows]
    found = regressed(uses)
    source: dict[str, str] = {name: _source(len(uses)) for name in ("prefill", "cached", "write", "output")}
    pages = engine.settings.page_tokens
    tensors = engine.chat_provider().capabilities
    token_bytes, of_pages = _page_bytes(engine)
    source["token_bytes"] = of_pages
    learn, distil, fails = None, None, 0.0
    if tensors.trains:
        learn, source["learn"] = _trained(engine, found["prefill"])
        distil, source["distil"] = DISTIL * found["prefill"], "prior"
        fails, source["gate_fails"] = _gate_fails(engine)
    lora, source["lora"] = _lora(engine, model, found)
    return Costs(
        unit="seconds",
        prefill=found["prefill"],
        cached=found["cached"],
        write=found["write"],
        token_bytes=token_bytes,
        minimum=pages,
        depth=Depth(first=found["first"], each=found["each"], read=found["read"]),
        learn=learn,
        distil=distil,
        lora=lora,
        output=found["answer"],
        version_bytes=_version_bytes(engine),
        gate_fails=fails,
        source=source,
    )


def regressed(uses: Sequence[tuple[float, ...]]) -> dict[str, float]:
    """Seconds of a prompt token by what became of it; ``uses`` are (input, cached, written, output, first_s, total_s).

    Ridge regression towards the prior, no coefficient below 0: the time to the first token on (1, computed tokens,
    cached tokens, computed ones times those before them), the rest on (tokens of the answer, those times the tokens
    attended to, tokens written to the cache). Each use counts relative to its size, so that one long prompt does not
    outweigh all short ones. A time of more than `HELD_UP` times the usual is left out, and one that is further than
    `NOISE` from what is fitted counts the less: least squares would follow the one use in a hundred that it is of,
    such as the first of a process.

    ``prefill`` and ``cached`` are what one token more costs in a usual use, and hold what attending to it costs through
    an answer of the mean length; ``first`` is computing one with nothing before it, ``each`` what each token before it
    adds, ``read`` is ``cached`` without what attending to the token costs those that are computed.
    """
    waits = [((use[0] - use[1], use[1]), use[4]) for use in uses]
    usual = _usual((wait, new + LOAD * cached) for (new, cached), wait in waits)
    # Loading a token takes no longer than computing it, so a slow cache is not taken for a use that was held up.
    waits = [row for row in waits if not usual or row[1] <= HELD_UP * usual * sum(row[0])]
    pace = usual or TOKEN_S  # a server may say no time at all
    load, each, attend, keep = LOAD * pace, BEHIND * pace, ATTEND * pace, KEEP * pace
    computed = behind = 0.0
    if waits:
        pace, load = _ridge(waits, (pace, load))
        # Only then the rest: from a prior that is far off all four would share what one of them explains. As a whole
        # the prior says the usual time.
        deep = [((1.0, new, cached, new * (cached + new / 2)), wait) for (new, cached), wait in waits]
        prior = (REQUEST * pace, pace, load, BEHIND * pace)
        share = statistics.median(wait / sum(map(operator.mul, row, prior)) for row, wait in deep) or 1.0
        _, pace, load, each = _ridge(deep, tuple(share * part for part in prior))
        computed = sum(row[1] for row, _ in deep) / len(deep)
        behind = sum(row[3] for row, _ in deep) / max(computed * len(deep), 1.0)
    rests = [((use[3], use[3] * use[0], use[2]), max(use[5] - use[4], 0.0)) for use in uses]
    usual = _usual((rest, output) for (output, _, _), rest in rests)
    rests = [row for row in rests if not usual or row[1] <= HELD_UP * (usual * row[0][0] + pace * row[0][2])]
    answers = [row[0] for row, _ in rests if row[0] > 0]
    answer = sum(answers) / len(answers) if answers else ANSWER
    token = sum(rest for _, rest in rests) / sum(answers) if answers else ANSWER_TOKEN_S
    if rests:
        token, attend, keep = _ridge(rests, (token, attend, keep))
    attended = min(attend * answer, pace)
    read = min(load, pace) + attended
    return {
        "prefill": pace + each * behind + attended,
        "cached": min(read + each * computed, pace + attended),
        "write": keep,
        "answer": token,
        "first": pace + attended,
        "each": each,
        "read": read,
    }


def _usual(rows: Iterable[tuple[float, float]]) -> float:
    """The median of seconds a token, of those that took any time (the lower of two middle ones: what goes wrong makes a
    use slower); 0 where none did."""
    paces = [seconds / tokens for seconds, tokens in rows if seconds > 0 and tokens > 0]
    return statistics.median_low(paces) if paces else 0.0


def _ridge(rows: Sequence[tuple[tuple[float, ...], float]], prior: tuple[float, ...]) -> tuple[float, ...]:
    """Coefficients of the least relative error, drawn to ``prior`` with the weight of `PRIOR_USES` uses, none below 0.

    Errors beyond `NOISE` count by their size, not by its square: Huber's estimate (Annals of Mathematical Statistics
    35, 1964), by least squares weighted anew from the last fit.
    """
    import numpy as np

    design = np.array([row for row, _ in rows], float)
    wanted = np.array([value for _, value in rows], float)
    middle = np.array(prior, float)
    # Both sides in units of what the prior says: coefficients are near 1 and noise is relative.
    scale: npt.NDArray[np.float64] = np.maximum(design @ middle, 1e-9)
    design, wanted = design * middle / scale[:, None], wanted / scale
    found = _positive(design, wanted)
    for _ in range(ROUNDS):
        off = np.abs(wanted / np.maximum(design @ found, 1e-9) - 1)
        weights = np.sqrt(NOISE / np.maximum(off, NOISE))
        found = _positive(design * weights[:, None], wanted * weights)
    return tuple(float(value) for value in found * middle)


def _positive(design: npt.NDArray[np.float64], wanted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ridge regression towards 1, no coefficient below 0: Lawson and Hanson's active set (Solving Least Squares
    Problems, 1974), from the inside. A coefficient that comes out negative is held at a hundredth of its prior and the
    others are solved again."""
    import numpy as np

    count = design.shape[1]
    free = np.ones(count, bool)
    found = np.full(count, 0.01)
    for _ in range(count):
        part = design[:, free]
        rest = wanted - design[:, ~free] @ found[~free]
        left = part.T @ part + PRIOR_USES / count * np.eye(part.shape[1])
        found[free] = np.linalg.solve(left, part.T @ rest + PRIOR_USES / count)
        low = free & (found < 0.01)
        if not low.any():
            break
        free &= ~low
        found[low] = 0.01
    return found


def _source(uses: int) -> str:
    return f"measured, {uses} uses" if uses >= MEASURED_USES else f"prior, {uses} uses so far"


def _page_bytes(engine: Engine) -> tuple[float, str]:
    [row] = engine.database.query(
        "SELECT COALESCE(SUM(bytes), 0) AS bytes, COUNT(*) AS pages FROM (SELECT bytes FROM pages WHERE grid IN (0, ?)"
        " ORDER BY used DESC LIMIT ?)",
        (engine.settings.page_tokens, NEWEST),
    )
    if not row["pages"]:
        return 0.0, "no page was kept yet"
    return row["bytes"] / row["pages"] / engine.settings.page_tokens, f"measured, {row['pages']} pages"


def _trained(engine: Engine, token_s: float) -> tuple[float, str]:
    """CPU-seconds of teaching a record, with its gate, from what training took here."""
    rows = engine.database.query(
        "SELECT json_extract(manifest, '$.cpu_seconds') AS seconds, json_array_length(manifest, '$.records') AS records"
        " FROM loras WHERE state != 'retired' ORDER BY created DESC LIMIT 20"
    )
    known = [(row["seconds"], row["records"]) for row in rows if row["seconds"] and row["records"]]
    seconds, records = sum(row[0] for row in known), sum(row[1] for row in known)
    if not records:
        return LEARN * token_s, "prior"
    return seconds / records, f"measured, {records} records"


def _version_bytes(engine: Engine) -> float:
    """Bytes of one LoRA version, the mean of those that there are; 0 where there are none."""
    [row] = engine.database.query(
        "SELECT COALESCE(AVG(json_extract(manifest, '$.bytes')), 0) FROM loras WHERE state != 'retired'"
    )
    return float(row[0])


def _gate_fails(engine: Engine) -> tuple[float, str]:
    """The part of trained versions that did not pass their gate, one failure in four trials believed beforehand."""
    [row] = engine.database.query(
        "SELECT COUNT(*) AS trained, COALESCE(SUM(state = 'failed'), 0) AS failed FROM loras WHERE state != 'retired'"
    )
    told = "prior" if row["trained"] < MEASURED_USES else f"measured, {row['trained']} versions"
    return (row["failed"] + 1.0) / (row["trained"] + 4.0), told


def _lora(engine: Engine, model: str, found: dict[str, float]) -> tuple[float, str]:
    """Seconds that LoRA versions add to a request that they act on beside what its tokens explain."""
    rows = engine.database.query(
        "SELECT input, cached, output, total_s FROM uses WHERE model = ? AND verb = 'chat' AND loras IS NOT NULL"
        f" AND {AMONG} ORDER BY id DESC LIMIT ?",
        (model, NEWEST),
    )
    if len(rows) < MEASURED_USES:
        return LORA * found["prefill"], f"prior, {len(rows)} uses so far"
    over = [
        row["total_s"]
        - (row["input"] - row["cached"]) * (found["first"] + found["each"] * (row["input"] + row["cached"]) / 2)
        - found["read"] * row["cached"]
        - found["answer"] * row["output"]
        for row in rows
    ]
    return max(0.0, sorted(over)[len(over) // 2]), f"measured, {len(rows)} uses"


# ---- a host ----------------------------------------------------------------------------------------------------------


def _priced(engine: Engine, model: str) -> Costs:
    rules, now = engine.cache_rules, engine.clock()
    price = input_price(model, rules=rules, at=now)
    day = dt.datetime.fromtimestamp(now, dt.UTC).date().isoformat()
    source: dict[str, Any] = {"prefill": f"prices of {day}" if price is not None else "prior: no price list names it"}
    token = UNPRICED if price is None else price
    known = "no rules are known" if rules is None else f"rules of {rules.seen or 'the user'}"
    source["cached"] = source["write"] = known
    if rules is None:
        return Costs(unit="dollars", prefill=token, cached=token, write=0.0, lifetime_s=0.0, source=source)
    return Costs(
        unit="dollars",
        prefill=token,
        cached=token * rules.read,
        write=token * (rules.lifetimes[0].write - 1.0),
        byte_day=(engine.ledger.costs.gb_month or 0.0) / 1e9 * 12 * 86_400 / YEAR_S,
        minimum=rules.minimum,
        lifetime_s=rules.lifetimes[-1].seconds,
        source=source,
    )
