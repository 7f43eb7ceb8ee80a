"""A workload on each offer under each memory policy: what a month costs, with its error, its time and its bytes.

Every sampled user runs through the real layouts, marks and planner; the sums are scaled to all users. Knows nothing of
tables and pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..activation.cache_model import Bill
from ..errors import InvalidInput
from . import breaks
from .billing import Billed, cheapest
from .offers import Offer
from .policies import FULL, FULL_CACHED, LEARNT, NAMES, OURS, Way
from .report import Line, TcoReport
from .sizes import Sizes, measured
from .told import assumptions
from .traces import Person, people
from .workload import MONTH_DAYS, Workload

__all__ = ["SAMPLE", "simulate"]

#: Users drawn, unless told otherwise.
SAMPLE = 64


def simulate(
    workload: Workload,
    offers: Sequence[Offer],
    policies: Sequence[str] = NAMES,
    seed: int = 0,
    *,
    sample: int = SAMPLE,
    notes: Sequence[str] = (),
) -> TcoReport:
    """What this workload costs with each of ``offers`` under each of ``policies`` (of `policies.NAMES`).

    ``sample`` users are drawn, at least 4; each costs about 0.1 s of computing an offer. The same arguments give the
    same report. ``notes`` join its assumptions. Raises `InvalidInput` for an unknown policy, no offer, or few users.
    """
    unknown = [name for name in policies if name not in NAMES]
    if unknown:
        raise InvalidInput(f"no memory policy {unknown[0]!r}: there are {', '.join(NAMES)}")
    if not offers or not policies:
        raise InvalidInput("a comparison needs at least one offer and one policy")
    if sample < 4:
        raise InvalidInput(f"a sample of {sample} users says nothing of its error: draw at least 4")
    persons = people(workload, sample, seed)
    sizes = measured(max(1, round(workload.record_tokens)))
    lines = []
    for offer in offers:
        for policy in policies:
            if policy == LEARNT and not breaks.can_learn(offer):
                continue
            way, run = cheapest(workload, persons, offer, policy)
            lines.append(_line(workload, offer, way, run, persons=persons, sizes=sizes))
    by_day = breaks.curves(workload, offers, policies, seed)
    return TcoReport(
        workload=workload,
        lines=tuple(lines),
        breaks=tuple(breaks.found(workload, offers, lines, policies, by_day, seed=seed)),
        curves=tuple(breaks.drawn(by_day)),
        assumptions=(*assumptions(workload, offers, sample, seed), *notes),
        seed=seed,
        sample=sample,
    )


def _line(
    workload: Workload, offer: Offer, way: Way, run: Sequence[Billed], *, persons: Sequence[Person], sizes: Sizes
) -> Line:
    costs = [one.cost for one in run]
    turn = fmean(costs)
    waits = [sorted(offer.first_token_s(bill) for bill in one.bills) for one in run]
    total = sum((bill for one in run for bill in one.bills), Bill(0, (0,) * len(offer.rules.lifetimes), 0))
    prompts = [fmean(bill.tokens for bill in one.bills) for one in run]
    priced = offer.unit == "dollars"
    seconds = None if offer.machine is None else fmean(one.seconds or 0.0 for one in run)
    held = _bytes(workload, offer, way.policy, run, persons=persons, sizes=sizes)
    storage = offer.local.storing(sum(held.values()))
    return Line(
        offer=offer.name,
        policy=way.policy,
        turn=turn if priced else None,
        month=turn * workload.turns_month + (storage or 0.0) if priced else None,
        storage=storage,
        seconds=seconds,
        seconds_month=None if seconds is None else seconds * workload.turns_month,
        error=error(costs) / turn if turn else 0.0,
        first_token_s=fmean(map(fmean, waits)),
        first_token_p95_s=fmean(wait[math.ceil(0.95 * len(wait)) - 1] for wait in waits),
        prompt_tokens=fmean(prompts),
        read=total.read / total.tokens,
        written=sum(total.written) / total.tokens,
        core_tokens=fmean(one.placed.core_tokens for one in run),
        learnt=fmean(len(one.placed.learnt) for one in run),
        bytes=held,
        setting=_setting(offer, way),
    )


def error(values: Sequence[float]) -> float:
    """The standard error of the mean of a stratified sample of one value a stratum, from differences of neighbours.

    Collapsed strata (Cochran, Sampling Techniques, 3rd edition, section 5A.12): too great rather than too small.
    """
    pairs = list(zip(values[::2], values[1::2], strict=False))
    return math.sqrt(sum((one - other) ** 2 for one, other in pairs)) / (2 * len(pairs))


def _bytes(
    workload: Workload, offer: Offer, policy: str, run: Sequence[Billed], *, persons: Sequence[Person], sizes: Sizes
) -> dict[str, int]:
    """Bytes on disk of all users together in the middle of the time, by tier."""
    day = workload.months * MONTH_DAYS / 2
    kept = min(day, workload.retention_days)
    said = 2 * workload.turns_day * kept  # a message and its answer
    memories = workload.memories(day)
    # Full history keeps what was said as text; a usual memory a vector for each memory; ours both, and token codes.
    ours = policy not in (FULL, FULL_CACHED) and not policy.startswith("top-k")
    records = said if policy in (FULL, FULL_CACHED) else said + memories
    vectors = (said + memories if ours else memories) if policy not in (FULL, FULL_CACHED) else 0.0
    vectors *= workload.embedded
    held = {
        "records": records * sizes.record,
        "vectors": vectors * sizes.vector,
        "token codes": vectors * sizes.codes if ours else 0.0,
        "index": vectors * sizes.listed if vectors * workload.users > sizes.exact else 0.0,
        "ledger": workload.turns_day * kept * sizes.use if ours else 0.0,
    }
    total = {tier: count * workload.users for tier, count in held.items()}
    if offer.machine is not None and policy not in (FULL, "top-k first, no cache"):
        # What a user's last prompt left as pages; the system part's are the same for all.
        weights = [1 / person.rate / sum(1 / other.rate for other in persons) for person in persons]
        prompts = [max(fmean(bill.tokens for bill in one.bills) - workload.system_tokens, 0.0) for one in run]
        mean = sum(weight * tokens for weight, tokens in zip(weights, prompts, strict=True))
        total["KV pages"] = (mean * workload.users + workload.system_tokens) * offer.machine.token_bytes
        taught = sum(weight * len(one.placed.learnt) for weight, one in zip(weights, run, strict=True))
        total["LoRA"] = taught * offer.machine.lora_bytes * workload.users
    return {tier: round(count) for tier, count in total.items() if count}


def _setting(offer: Offer, way: Way) -> str:
    """The setting that was cheapest, in words; empty where there was no choice."""
    if way.policy in (OURS, LEARNT, FULL, "top-k first, no cache") or not offer.rules.marked:
        return ""
    names = [None if life is None else offer.rules.lifetimes[life].name for life in way.marks]
    return ", ".join(f"{part} {name}" for part, name in zip(("system", "history"), names, strict=True) if name)
