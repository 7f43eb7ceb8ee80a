"""How often something is used or edited, from few observations, and how sure that is.

Gamma-Poisson: events come at an unknown rate, a Gamma distribution holds what is believed of it, counting updates it
(Gelman et al., Bayesian Data Analysis, 3rd ed., section 2.6). Knows counts and days, not what they are of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidInput

__all__ = ["EDITS", "USES", "Rate", "lifetime", "rate", "unedited"]

#: What is believed before anything was counted, as (events, days). Weak: a week of counting outweighs them.
USES = (0.1, 1.0)
EDITS = (0.05, 5.0)
#: Of `Rate.lower` and `Rate.upper`: nine of ten rates lie between them.
NINETY = 1.6449


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate of events a day, as a Gamma distribution of ``shape`` and ``days`` (its inverse scale)."""

    shape: float
    days: float

    @property
    def mean(self) -> float:
        """Events expected a day."""
        return self.shape / self.days

    @property
    def lower(self) -> float:
        """The rate is higher than this in 19 of 20 cases."""
        return self._quantile(-NINETY)

    @property
    def upper(self) -> float:
        """The rate is lower than this in 19 of 20 cases."""
        return self._quantile(NINETY)

    def none_in(self, days: float) -> float:
        """The chance that so many days pass without an event (a Lomax distribution's tail)."""
        return math.exp(-self.shape * math.log1p(days / self.days))

    def _quantile(self, normal: float) -> float:
        # Wilson and Hilferty, PNAS 17 (1931): the cube root of a Gamma variable is nearly normal. Within 2 % of the
        # true quantile from shape 1 on; the low end of smaller shapes is as good as nothing, and the cube is cut there.
        part = 1 / (9 * self.shape)
        return self.mean * max(0.0, 1 - part + normal * math.sqrt(part)) ** 3


def rate(uses: float, days: float, prior_uses: float = USES[0], prior_days: float = USES[1]) -> Rate:
    """What ``uses`` in ``days`` say, on top of a prior of ``prior_uses`` in ``prior_days``. `InvalidInput` for numbers
    below nothing, or a prior without weight."""
    for name, value in (("uses", uses), ("days", days)):
        if not 0 <= value < math.inf:
            raise InvalidInput(f"{name} is {value!r}: give a count, 0 or more")
    for name, value in (("prior_uses", prior_uses), ("prior_days", prior_days)):
        if not 0 < value < math.inf:
            raise InvalidInput(f"{name} is {value!r}: a prior needs a weight above 0")
    return Rate(prior_uses + uses, prior_days + days)


def lifetime(edits: float, days: float) -> float:
    """Days until the next edit of what was edited ``edits`` times in ``days``: the inverse of the expected rate."""
    return 1 / rate(edits, days, *EDITS).mean


def unedited(edits: float, days: float, horizon: float) -> float:
    """The chance that it is not edited within ``horizon`` days."""
    return rate(edits, days, *EDITS).none_in(horizon)
