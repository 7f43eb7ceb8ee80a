"""Takes personal data and secrets out of texts before they are stored, by patterns that can be checked.

Knows a few kinds that are told from their form alone (card numbers and IBANs by their check digits); knows nothing of
names or addresses, and nothing of where a text goes. A user's own function does the same job.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, cast

from agentmem.errors import ConfigError

from .drafts import Redact, shown

__all__ = ["DETECTORS", "redactor"]

#: Each pattern takes time in proportion to the text: no part of it can match the same characters in two ways.
_EMAIL = re.compile(r"(?<![\w.+-])[\w+-]+(?:\.[\w+-]+)*@[\w-]+(?:\.[\w-]+)+(?![\w-])")
# With a country's prefix, or the North American form; anything looser takes dates and order numbers for phones.
_PHONE = re.compile(
    r"(?<![\w+])(?:(?:\+|00)[1-9]\d{0,2}(?:[ .\-/]?\(?\d\)?){6,13}|(?:\(\d{3}\) ?|\d{3}[.\- ])\d{3}[.\- ]\d{4})(?![\w])"
)
_CARD = re.compile(r"(?<![\d.])\d(?:[ \-]?\d){12,18}(?!\d)")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?![A-Za-z0-9])")
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<![A-Za-z0-9_-])(?:sk-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}"
    r"|github_pat_[A-Za-z0-9_]{40,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z0-9]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,})",
    re.DOTALL,
)


def _luhn(digits: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0 and digits.strip("0") != ""


def _mod_97(iban: str) -> bool:
    """The check digits of an IBAN (ISO 13616)."""
    return int("".join(str(int(character, 36)) for character in iban[4:] + iban[:4])) % 97 == 1


def _card(match: re.Match[str]) -> str:
    return "[card]" if _luhn(re.sub(r"\D", "", match[0])) else match[0]


def _iban(match: re.Match[str]) -> str:
    # Words in capitals may follow the number: the shortest beginning of whole words that checks out is it.
    text = match[0]
    for word in re.finditer(r"(?: |\Z)", text):
        plain = text[: word.start()].replace(" ", "")
        if 15 <= len(plain) <= 34 and _mod_97(plain):
            return "[iban]" + text[word.start() :]
    return text


#: By name, in the order in which they are applied: what is longest and most telling first.
DETECTORS: dict[str, Redact] = {
    "key": lambda text: _KEY.sub("[key]", text),
    "email": lambda text: _EMAIL.sub("[email]", text),
    "iban": lambda text: _IBAN.sub(_iban, text),
    "card": lambda text: _CARD.sub(_card, text),
    "phone": lambda text: _PHONE.sub("[phone]", text),
}


def redactor(wanted: Any) -> Redact | None:
    """One function that redacts as wanted; None where nothing is.

    ``wanted`` is a function of a text, a name of `DETECTORS` ("email", "phone", "card", "key", "iban"), or several.
    What is found is replaced by its name in brackets. Raises `ConfigError` for an unknown name.
    """
    if wanted is None:
        return None
    if callable(wanted):
        return cast(Redact, wanted)
    names = [wanted] if isinstance(wanted, str) else list(wanted) if isinstance(wanted, Iterable) else [wanted]
    for name in names:
        if not isinstance(name, str) or name not in DETECTORS:
            raise ConfigError(f"redact: {shown(name)} is no detector: use {', '.join(DETECTORS)}, or give a function")
    chosen = [detect for name, detect in DETECTORS.items() if name in names]
    if not chosen:
        return None

    def apply(text: str) -> str:
        for detect in chosen:
            text = detect(text)
        return text

    return apply
