"""What a model costs: the price list and cache rules of a host, or the seconds that a machine takes for a token.

Hosts' prices are those of genai-prices (ledger/costs.py), rules those of cache_rules.toml; what is not known is an
error or None, never a guess. Knows no workload and no policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from ..activation.cache_model import Bill
from ..cache_rules import CacheRules, Lifetime, rules_for
from ..errors import ConfigError
from ..ledger.costs import LocalCosts, price
from ..provider import public_name
from ..types import Usage

__all__ = ["ENDLESS_S", "HOSTED_SPEED", "Machine", "Offer", "Prices", "Speed", "hosted", "own"]

#: A prompt from which on some hosts ask more for every token; shorter ones cost in proportion at all of them.
SHORT = 64_000
#: How long page files are kept, in seconds: until their budget is used up.
ENDLESS_S = 1e10


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the first token of an answer waits for: ``before_s`` (network, queue), and the prompt's tokens."""

    before_s: float
    uncached_s: float
    cached_s: float


#: Assumed of every host, since none states it: half a second, 5,000 uncached and 50,000 cached tokens a second.
HOSTED_SPEED = Speed(before_s=0.5, uncached_s=1 / 5_000, cached_s=1 / 50_000)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Dollars a token. ``written`` has one price per `CacheRules.lifetimes`. ``model``: prompts above 64,000 tokens are
    looked up in the price table, where this model's price depends on the length of the prompt."""

    input: float
    read: float
    written: tuple[float, ...]
    output: float
    model: str | None = None

    def cost(self, rules: CacheRules, bill: Bill, output: int) -> float:
        """Dollars for one request and its answer."""
        if self.model is not None and bill.tokens > SHORT:
            found = _listed(self.model, rules, bill, output)
            if found is not None:
                return found
        written = sum(count * each for count, each in zip(bill.written, self.written, strict=True))
        return bill.read * self.read + written + bill.uncached * self.input + output * self.output


@dataclass(frozen=True, kw_only=True)
class Machine:
    """CPU-seconds of a machine for a token: of prompt computed anew, of prompt from KV pages, of answer.

    They are divided among ``cores``, which tells how long it takes. ``write_s`` is what keeping a computed token as a
    page adds, ``token_bytes`` what it takes on disk; hits come in steps of ``page_tokens``. ``learn_s`` is the time to
    teach a LoRA one record, with its gate, None where it can't be; ``lora_s`` what an active LoRA adds to a request,
    ``lora_bytes`` its size for one record. ``source`` says of each by name where it comes from.
    """

    prefill_s: float
    cached_s: float
    decode_s: float
    write_s: float = 0.0
    before_s: float = 0.0
    cores: float = 1.0
    page_tokens: int = 256
    token_bytes: float = 0.0
    context_tokens: int | None = None
    learn_s: float | None = None
    lora_s: float = 0.0
    lora_bytes: float = 0.0
    gate_fails: float = 0.0
    source: Mapping[str, str] = field(default_factory=dict)

    def rules(self) -> CacheRules:
        """Its KV pages as a prompt cache: in units of a token computed anew."""
        return CacheRules(
            kind="engine",
            minimum=self.page_tokens,
            step=self.page_tokens,
            read=min(self.cached_s / self.prefill_s, 1.0),
            lifetimes=(Lifetime(name="pages", seconds=ENDLESS_S, write=1.0 + self.write_s / self.prefill_s),),
            context_tokens=self.context_tokens,
            source="KV pages of this machine",
        )

    def seconds(self, bill: Bill, output: int) -> float:
        """CPU-seconds for one request and its answer."""
        prompt = (bill.uncached + sum(bill.written)) * self.prefill_s + sum(bill.written) * self.write_s
        return prompt + bill.read * self.cached_s + output * self.decode_s


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A model with all that it costs: a host's ``prices``, or a ``machine`` and what its seconds cost.

    ``fixed_month`` is what one such machine costs a month, at work or not (None: not given).
    """

    name: str
    rules: CacheRules
    speed: Speed
    prices: Prices | None = None
    machine: Machine | None = None
    local: LocalCosts = field(default_factory=LocalCosts)
    fixed_month: float | None = None

    @property
    def unit(self) -> Literal["dollars", "seconds"]:
        """What it is compared in: dollars, where its seconds or tokens have a price."""
        return "dollars" if self.prices is not None or self.local.second is not None else "seconds"

    def cost(self, bill: Bill, output: int) -> float:
        """One request and its answer, in `unit`."""
        if self.prices is not None:
            return self.prices.cost(self.rules, bill, output)
        assert self.machine is not None
        seconds = self.machine.seconds(bill, output)
        dollars = self.local.computing(seconds / self.machine.cores)
        return seconds if dollars is None else dollars

    def first_token_s(self, bill: Bill) -> float:
        """Seconds until the answer begins."""
        new = bill.uncached + sum(bill.written)
        return self.speed.before_s + new * self.speed.uncached_s + bill.read * self.speed.cached_s


def hosted(model: str, *, at: float | None = None) -> Offer:
    """The offer of ``"vendor:model"`` by the packaged price table (as of ``at``, Unix seconds, else now) and rules.

    Raises `ConfigError` for a model that is not in the price table, or whose cache nothing is known of.
    """
    rules = rules_for(model)
    if rules is None or not rules.priced:
        raise ConfigError(
            f"nothing is known of the prompt cache of {public_name(model)!r}: see agentmem/cache_rules.toml"
        )

    def dollars(**counts: int) -> float:
        found = price(model, Usage(**counts), rules=rules, at=at)
        if found is None:
            raise ConfigError(
                f"no price is known of {public_name(model)!r} (genai-prices has none): give another model"
            )
        return found[0]

    plain = dollars(input_tokens=1_000) / 1_000
    writes = [dollars(input_tokens=1_000, written_tokens=1_000) / 1_000]
    if len(rules.lifetimes) > 1:
        writes.append(dollars(input_tokens=1_000, written_tokens=1_000, written_long_tokens=1_000) / 1_000)
    long = 2_000_000
    prices = Prices(
        input=plain,
        read=dollars(input_tokens=1_000, cached_tokens=1_000) / 1_000,
        written=tuple(writes),
        output=dollars(input_tokens=0, output_tokens=1_000) / 1_000,
        model=model if abs(dollars(input_tokens=long) / long - plain) > 1e-3 * plain else None,
    )
    return Offer(name=model, rules=rules, speed=HOSTED_SPEED, prices=prices)


def own(name: str, machine: Machine, costs: Mapping[str, float] | None = None) -> Offer:
    """The offer of a machine of one's own. ``costs`` as the setting of that name: without them its unit is seconds.

    Raises `ConfigError` for costs that the setting does not take.
    """
    given = dict(costs or {})
    local = LocalCosts.of(given)
    month = None
    if local.second is not None:
        # Paid off and running all the time: what the machine costs whether or not somebody chats.
        month = local.second * 365.2425 / 12 * 86_400
    cores = machine.cores
    speed = Speed(before_s=machine.before_s, uncached_s=machine.prefill_s / cores, cached_s=machine.cached_s / cores)
    return Offer(name=name, rules=machine.rules(), speed=speed, machine=machine, local=local, fixed_month=month)


@lru_cache(maxsize=65_536)
def _listed(model: str, rules: CacheRules, bill: Bill, output: int) -> float | None:
    used = Usage(
        input_tokens=bill.tokens,
        cached_tokens=bill.read,
        written_tokens=sum(bill.written),
        written_long_tokens=sum(bill.written[1:]),
        output_tokens=output,
    )
    found = price(model, used, rules=rules)
    return None if found is None else found[0]
