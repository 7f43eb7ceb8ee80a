"""What a comparison takes for granted, in sentences: all that is assumed, and where each number comes from.

Writes sentences only.
"""

from __future__ import annotations

from collections.abc import Sequence

from .offers import Offer
from .policies import OUR_SHARE, window_of
from .sizes import DIMENSION, EXACT, TOKEN_CHARACTERS
from .traces import BILLED, GAPS, LENGTHS, SEEN, WARM
from .workload import Workload

__all__ = ["assumptions"]


def assumptions(workload: Workload, offers: Sequence[Offer], sample: int, seed: int) -> list[str]:
    """The sentences, the general ones first."""
    told = [
        f"All {workload.users:,} users are there from the first day and stay for {workload.months:g} months; costs are "
        "the mean over that time. Nothing is charged for people's work, taxes, networks or a vector database's host.",
        f"{sample} users were drawn (seed {seed}), each for an equal part of all turns: sessions a day are log-normal "
        f"(spread {workload.spread:g}), the time of life is even over the months. Each is billed for {BILLED} turns in "
        f"a row after up to {WARM} that set the scene. Errors are standard errors of that sample (collapsed strata); "
        "they tell nothing of how well the workload or these assumptions fit.",
        f"Sessions follow each other by chance (exponential gaps), turns within them after {workload.gap_s:g} s in the "
        f"median (log-normal, {GAPS:g}), a session ends after any turn with the same chance; lengths are log-normal "
        f"({LENGTHS:g}).",
        f"A turn needs {workload.recalled_tokens:g} tokens of records; {workload.standing_share:.0%} of them are of "
        f"{workload.standing_facts} standing facts (the n-th in proportion to 1/n), the rest of what was said, lately "
        "more often (log-uniform in the number of turns). What the prompt holds already is not recalled again.",
        f"Top-k takes {workload.top_k} records a turn, whatever the turn needs. Full history holds all that was said, "
        "as far as the model's window goes; at its end the older half is dropped. Full history and top-k differ from "
        "agentmem in what the model gets to see: the quality of answers is not in these numbers.",
        "Each policy but agentmem has the cache lifetimes that are cheapest for it over the whole sample, known in "
        "hindsight; agentmem plans request by request, with no view of what comes.",
        f"agentmem's verbatim history takes at most {OUR_SHARE:.0%} of the window. Its planner knows of each user the "
        f"newest {SEEN} turns; standing facts that pay there stand in the core block and are not recalled. What moves "
        "cost is spread over the days until an edit is likely, 30 at most.",
        "agentmem + LoRA: facts that the planner has taught are neither recalled nor in the core block (the setting "
        "lora_spares), and the LoRA answers for them; it is charged to every turn, needed or not. A training that its "
        "gate refuses is paid for.",
        "Hosts' caches are as cache_rules.toml describes them; no routing misses, no eviction before its time. Writing "
        "memories with a model (extraction) is not in these numbers.",
        f"Bytes: rows of a real database, measured in this run; vectors of {DIMENSION} numbers and token codes for "
        f"agentmem, {TOKEN_CHARACTERS} characters a token, lists of 8-bit codes for tenants of more than {EXACT:,} "
        "vectors (all users are one tenant). Full history keeps texts alone. They count as in the middle of the "
        "time, and cost something only where a price of storage was given.",
    ]
    for offer in offers:
        rules = offer.rules
        window = f"{offer.name}: window {window_of(rules):,} tokens{'' if rules.context_tokens else ' (assumed)'}"
        speed = offer.speed
        if offer.machine is None:
            told.append(
                f"{window}; prices of genai-prices, cache rules of {rules.seen or 'the caller'} ({rules.source}). "
                f"Its speed is assumed: {speed.before_s:g} s, then {1 / speed.uncached_s:,.0f} new and "
                f"{1 / speed.cached_s:,.0f} cached prompt tokens a second."
            )
            continue
        machine = offer.machine
        sources = "; ".join(f"{name}: {source}" for name, source in machine.source.items()) or "as given"
        money = "" if offer.unit == "dollars" else " No price given: CPU-seconds only."
        told.append(
            f"{window}; a CPU-second computes {1 / machine.prefill_s:,.0f} new prompt tokens, reads "
            f"{1 / machine.cached_s:,.0f} from KV pages, or writes {1 / machine.decode_s:,.1f} of answer, on "
            f"{machine.cores:g} cores at once ({sources}); KV pages are kept "
            f"without limit (the setting page_budget limits them), one request at a time.{money}"
        )
    return told
