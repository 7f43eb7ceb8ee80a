"""What Ollama does not tell: for how long to keep a model loaded, and how much of a prompt it had cached.

Knows times and prompts, no requests. Both are judgements: the first is a plan within bounds that the user sets, the
second an estimate from the time that reading a prompt took, never a count.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["AUTO", "KeepAlive", "Reuse", "seconds", "sent"]

#: The setting's value that asks for a plan.
AUTO = "auto"
#: Ollama's own default, and the least that is planned.
LEAST_S = 300
#: Gaps that are remembered, and how many times the longest usual one is planned for.
GAPS, MARGIN = 32, 2.0
#: Go's units of durations, as Ollama reads them.
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(duration: str) -> float | None:
    """A duration as Ollama writes it ("5m", "1h30m", "300", "-1") in seconds; None if it is none."""
    if re.fullmatch(r"-?\d+(\.\d+)?", duration):
        return float(duration)
    sign = -1.0 if duration.startswith("-") else 1.0
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|ms|s|m|h)", duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration.removeprefix("-"):
        return None
    return sign * sum(float(number) * UNITS[unit] for number, unit in parts)


def sent(duration: Any) -> Any:
    """A ``keep_alive`` as Ollama takes it: a number without a unit must be a number there, since a string is read by
    Go's time.ParseDuration, which wants one (ollama api/types.go)."""
    if isinstance(duration, str) and re.fullmatch(r"-?\d+(\.\d+)?", duration):
        return float(duration) if "." in duration else int(duration)
    return duration


class KeepAlive:
    """The ``keep_alive`` of each request: as the user said, or planned from the gaps between requests.

    The plan covers twice the gap that nine of ten stayed below, in whole minutes; it never gets shorter, so that a
    model is not unloaded in a pause of a running conversation.
    """

    def __init__(self, told: str, longest: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        limit = seconds(longest)
        self._planned = told == AUTO
        self._limit_s = math.inf if limit is None or limit < 0 else max(limit, LEAST_S)
        self._clock = clock
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._last: float | None = None
        self._lock = threading.Lock()
        #: The value in force.
        self.now = "5m" if self._planned else told

    def next(self) -> str:
        """The value for a request that is sent now."""
        if not self._planned:
            return self.now
        with self._lock:
            now = self._clock()
            if self._last is not None:
                self._gaps.append(now - self._last)
            self._last = now
            if self._gaps:
                usual = sorted(self._gaps)[math.ceil(0.9 * len(self._gaps)) - 1]
                wanted = min(max(MARGIN * usual, LEAST_S), self._limit_s)
                whole = math.ceil(wanted / 60) if wanted < self._limit_s else int(self._limit_s // 60)
                minutes = max(whole, int((seconds(self.now) or 0) // 60))
                self.now = f"{minutes}m"
            return self.now


#: Characters of a prompt that are compared at once, and prompts that are remembered (as digests).
STEP, PROMPTS = 128, 8
#: A prompt that shares less of itself than this with every earlier one was read without a cache.
COLD = 0.1
#: Shorter prompts say more about fixed costs than about tokens.
LEAST_TOKENS = 64
#: Readings without a cache that the rate is the median of.
READINGS = 8


class Reuse:
    """Estimates how many tokens of a prompt came from Ollama's cache.

    The time per token is seen on prompts that begin like no earlier one of this provider. A prompt that took less time
    than its tokens are worth was partly cached: ``tokens - time / rate``, at most the part that it shares with an
    earlier prompt. Load of the machine and prompts of other programs make it wrong; it is an estimate.
    """

    def __init__(self) -> None:
        self._seen: deque[list[bytes]] = deque(maxlen=PROMPTS)
        self._rates: deque[float] = deque(maxlen=READINGS)
        self._lock = threading.Lock()

    def estimate(self, prompt: str, tokens: int, prompt_s: float) -> int | None:
        """Tokens that were probably cached; None while no rate is known or the server told no time."""
        steps = _steps(prompt)
        with self._lock:
            shared = max((_common(steps, earlier) for earlier in self._seen), default=0) / max(len(steps), 1)
            self._seen.append(steps)
            if prompt_s <= 0 or tokens <= 0:
                return None
            if shared < COLD:
                if tokens >= LEAST_TOKENS:
                    self._rates.append(prompt_s / tokens)
                return 0 if self._rates else None
            if not self._rates:
                return None
            uncached = math.ceil(prompt_s / statistics.median(self._rates))
            return max(0, min(tokens - uncached, math.floor(shared * tokens)))


def _steps(prompt: str) -> list[bytes]:
    """Chained digests of the prompt's steps: equal lists begin equal prompts, and no text is kept."""
    state = hashlib.blake2b(digest_size=8)
    steps = []
    for start in range(0, len(prompt) - STEP + 1, STEP):
        state.update(prompt[start : start + STEP].encode("utf-8", "surrogatepass"))
        steps.append(state.digest())
    return steps


def _common(left: list[bytes], right: list[bytes]) -> int:
    length = min(len(left), len(right))
    return next((i for i in range(length) if left[i] != right[i]), length)
