"""When a slow layer is rewritten from the fast one: an online rule that knows no future and asks for none.

It sees what carrying the difference costs, request by request, and what a rebuild costs; it knows no text, no clock
and no provider.

The rule is ski rental, told before each request: collapse before the request with which the carried cost would reach
what a rebuild costs. It is the deterministic rule of dynamic TCP acknowledgement (Dooly, Goldman, Scott, J. ACM 48(2),
2001; ski rental: Karlin, Manasse, Rudolph, Sleator, Algorithmica 3, 1988), whose factor 2 no deterministic rule beats.

Theorem. Let ``c(i, j)`` be the carry of request i if the last collapse was before request j, not negative and never
more for a later j (a collapse takes up all that came before it), let ``K(i)`` be the rebuild before request i, and let
all schedules pay the same for everything else. While K does not rise between two collapses of the rule, the rule pays
at most twice what the best schedule in hindsight pays. Where K rises, it still does by whole bills, as long as K never
rises by more than what all schedules pay meanwhile, the request to come included (a token that joins the prefix is paid
in full once by each of them).

Proof. Cut the trace where the rule collapses. In one piece it carries C, less than the least K before, and then pays
K. Say it collapses before request i. A schedule that does not collapse in the piece carries C + c(i, j) at least, since
the rule began the piece with nothing to carry; that is K or more. One that does pays a K of the piece, which was above
C. Either way the rule's C + K is at most twice that. The carry of request i is counted in this piece alone: the rule
carries nothing on it. The last piece may end without a collapse: then C is below any K and the rule pays no more than
the best. For a rising K let m be the least K of the piece, D = K - m, and S what all schedules paid in it, D <= S:
collapsing as soon as C + c(i, j) >= m costs less than 2m + D + S, and any schedule pays at least m + S. A cold cache
makes a collapse free for every schedule, so the rule takes it and the piece ends there. Where K rises by more than was
paid, no rule has a bound: whoever waits may have to pay any price, and whoever does not has bought for nothing. QED.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInput

__all__ = ["Account", "Collapse"]


@dataclass(frozen=True, slots=True)
class Account:
    """What was carried since the last collapse, in the unit of the costs.

    ``since`` is the time of the last collapse (Unix seconds, 0: never), ``turns`` the requests since. ``least`` is the
    cheapest rebuild that was passed over since something is carried (None: none yet) and ``spent`` what the requests
    from then on have cost whatever is carried. All are plain numbers: an account goes through JSON as it is.
    """

    carried: float = 0.0
    since: float = 0.0
    turns: int = 0
    least: float | None = None
    spent: float = 0.0


class Collapse:
    """The rule. It has no state: the account goes in and comes out."""

    @staticmethod
    def due(account: Account, carry: float, rebuild: float, *, cold: bool = False, spent: float = 0.0) -> bool:
        """Whether to collapse before the request that is about to be sent.

        ``carry`` is what this request costs more with the core as it stands than with the one that would be chosen
        (negative: less), ``rebuild`` what a collapse before it costs more than that chosen core would if it stood there
        already. ``spent`` is what the request will cost without its carry, as `note` is told of it. ``cold``: nothing
        of the prefix is cached, so that it is written anew in any case; then it collapses unless the chosen core would
        cost more than it spares. `InvalidInput` for numbers that are none.
        """
        _check(carry, rebuild)
        carried = account.carried + carry
        if cold or rebuild <= 0:
            return carried >= 0
        return carried > 0 and carried >= Collapse.threshold(account, rebuild, spent)

    @staticmethod
    def threshold(account: Account, rebuild: float, spent: float = 0.0) -> float:
        """The carried cost at which a collapse is due: the cheapest rebuild since something is carried, if the rise
        since then was paid for by other costs, with those of the request to come; else this one, less what they
        were."""
        if account.least is None:
            return rebuild
        return min(rebuild, max(account.least, rebuild - account.spent - spent))

    @staticmethod
    def note(
        account: Account,
        carry: float,
        collapsed: bool,
        at: float,
        *,
        rebuild: float | None = None,
        spent: float = 0.0,
    ) -> Account:
        """The account after a request that was sent at ``at`` (Unix seconds), with a collapse before it or without.

        ``rebuild`` is as `due` was told, ``spent`` what the request cost without its carry; where they are not given,
        the rule compares with the present rebuild alone. After a collapse nothing is carried.
        """
        if collapsed:
            return Account(since=at)
        _check(carry, 0.0 if rebuild is None else rebuild)
        carried = max(0.0, account.carried + carry)
        if carried <= 0:
            return Account(since=account.since, turns=account.turns + 1)
        known = [value for value in (account.least, rebuild) if value is not None]
        return Account(
            carried, account.since, account.turns + 1, min(known, default=None), account.spent + max(0.0, spent)
        )


def _check(carry: float, rebuild: float) -> None:
    for name, value in (("carry", carry), ("rebuild", rebuild)):
        if math.isnan(value):
            raise InvalidInput(f"{name} is {value!r}: a cost is a number")
