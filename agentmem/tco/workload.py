"""A workload in numbers: who chats how often, how long the texts are, what is remembered and forgotten.

Values and their checks, and a few workloads by name. Knows no price, no model and no policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from ..errors import InvalidInput
from ..types import Value

__all__ = ["MONTH_DAYS", "PRESETS", "Workload"]

#: Days of a month, on the average of the Gregorian calendar.
MONTH_DAYS = 365.2425 / 12


class Workload(Value):
    """What users do. Rates are of the average user; how far users differ is ``spread``.

    Tokens count what the chat format adds. ``recalled_tokens`` is what a search that keeps only what may matter puts
    into the prompt of a turn while all of the past is out of sight; ``top_k`` records are what a memory puts there that
    always takes as many. All users are there from the first day on and stay for ``months``.
    """

    users: int = Field(default=1_000, ge=1, le=10**10)
    sessions_day: float = Field(default=1.0, gt=0, le=1_000)
    turns_session: float = Field(default=8.0, ge=1, le=10_000)
    #: Between two turns of a session: the median, in seconds.
    gap_s: float = Field(default=40.0, gt=0, le=86_400)
    system_tokens: int = Field(default=1_500, ge=0, le=1_000_000)
    message_tokens: float = Field(default=40.0, gt=0, le=1_000_000)
    reply_tokens: float = Field(default=150.0, gt=0, le=1_000_000)
    recalled_tokens: float = Field(default=200.0, ge=0, le=1_000_000)
    top_k: int = Field(default=10, ge=0, le=10_000)
    record_tokens: float = Field(default=40.0, gt=0, le=1_000_000)
    #: Of the recalled tokens, those of facts that stand for long (a profile, preferences) and come back often.
    standing_share: float = Field(default=0.35, ge=0, le=1)
    #: How many such facts a user has; the n-th is needed in proportion to 1/n.
    standing_facts: int = Field(default=40, ge=1, le=100_000)
    memories_start: float = Field(default=0.0, ge=0, le=10**9)
    memories_day: float = Field(default=10.0, ge=0, le=10**6)
    retention_days: float = Field(default=365.0, gt=0, le=100_000)
    edits_day: float = Field(default=0.1, ge=0, le=10**6)
    months: float = Field(default=12.0, gt=0, le=1_200)
    #: Standard deviation of the logarithm of how often a user chats: 0 makes all alike.
    spread: float = Field(default=1.2, ge=0, le=4)
    #: Of records, those that an embedder has made vectors of (and token codes of).
    embedded: bool = True

    @classmethod
    def of(cls, preset: str = "assistant", **changes: Any) -> Workload:
        """A workload by name, with other numbers where they are given.

        Raises `InvalidInput` for an unknown name, and one that names the first field that is wrong.
        """
        if preset not in PRESETS:
            raise InvalidInput(f"no workload {preset!r}: there are {', '.join(PRESETS)}")
        return checked({**PRESETS[preset], **changes})

    @property
    def turns_day(self) -> float:
        """Turns a day of the average user."""
        return self.sessions_day * self.turns_session

    @property
    def turns_month(self) -> float:
        """Turns a month of all users."""
        return self.users * self.turns_day * MONTH_DAYS

    def memories(self, day: float) -> float:
        """Records that the average user has ``day`` days after the start."""
        left = self.memories_start if day < self.retention_days else 0.0
        return left + self.memories_day * min(day, self.retention_days)

    def said(self, day: float) -> float:
        """Tokens that the average user's conversations have ``day`` days after the start, as far as they are kept."""
        return self.turns_day * min(day, self.retention_days) * (self.message_tokens + self.reply_tokens)


def checked(numbers: Mapping[str, Any]) -> Workload:
    """The workload of these numbers, or `InvalidInput` that names the first field that is wrong."""
    try:
        return Workload.model_validate(dict(numbers))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(Workload.model_fields)
            raise InvalidInput(f"workload: unknown field {name!r}; known are {known}") from None
        raise InvalidInput(f"workload: {name} is {first['input']!r}: {first['msg'].lower()}") from None


#: By name: the numbers that differ from the defaults above. They are examples of size, not measurements.
PRESETS: dict[str, dict[str, Any]] = {
    "assistant": {},
    "support": {
        "sessions_day": 0.05,
        "turns_session": 6.0,
        "gap_s": 60.0,
        "system_tokens": 3_000,
        "message_tokens": 60.0,
        "memories_day": 0.6,
        "standing_share": 0.5,
        "standing_facts": 15,
        "edits_day": 0.02,
    },
    "agent": {
        "sessions_day": 2.0,
        "turns_session": 40.0,
        "gap_s": 20.0,
        "system_tokens": 4_000,
        "message_tokens": 600.0,
        "reply_tokens": 120.0,
        "recalled_tokens": 400.0,
        "record_tokens": 80.0,
        "memories_day": 40.0,
        "standing_share": 0.25,
    },
    "companion": {
        "sessions_day": 3.0,
        "turns_session": 20.0,
        "gap_s": 30.0,
        "system_tokens": 800,
        "message_tokens": 25.0,
        "reply_tokens": 70.0,
        "memories_day": 40.0,
        "standing_share": 0.5,
        "standing_facts": 80,
    },
}
