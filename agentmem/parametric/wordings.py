"""How each kind of statement is asked for: the wordings of wordings.toml, filled with what a statement says.

Knows kinds and slots; knows no English of its own and no patterns (forms.py has them).
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from .facts import MOST_TRAINED, Asked, Fact, keys_of
from .grammar import second_person
from .nouns import OTHER_WORDS, plural

__all__ = ["Found", "as_fact"]


@dataclass(frozen=True)
class Found:
    """What a statement says: ``slot``, ``value`` and ``verb`` fill the wordings of ``kind``.

    ``subject`` is what it is about where that is nobody's own ("the library's wifi password").
    """

    kind: str
    value: str
    head: str
    slot: str = ""
    verb: str = ""
    tail: str = "."
    several: bool = False
    besides: str = ""
    key: str = ""
    plural: bool = False
    subject: str = ""


#: Wordings that take the slot for one of several.
_INDEFINITE = re.compile(r"(?:[Ww]hich|What|a|good|popular) \{slot\}")
_ONE = re.compile(r"\ba \w+ \{slot\}")
#: The verb of the slot, to be put in the plural.
_IS = re.compile(r"\bis(?= (?:my |your )?(?:favourite )?\{slot\})|(?<=\{slot\} )is\b|\bis$|\bis(?=\?$)")
_A_SLOT = re.compile(r"\b(a) (?=\{slot\})")
_AN = re.compile(r"\ba (?=[aeiou](?!ni[a-z]|se|ne\b))")


@cache
def _wordings() -> dict[str, dict[str, list[str]]]:
    text = Path(__file__).with_name("wordings.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, list[str]]] = tomllib.loads(text)
    return found


def _more(found: Found) -> list[str]:
    """What else is asked about just this thing or deed."""
    if found.kind not in ("possession", "number", "verb"):
        return []
    about = found.verb or found.slot.casefold()
    return _wordings()["more"].get(about) or _wordings()["more"].get(about.rsplit(" ", 1)[-1], [])


def as_fact(found: Found) -> Fact:
    """The fact with its questions; the value as said to the user, the slot as the user says it."""
    found = replace(found, value=second_person(found.value))
    bank = _wordings()[found.kind]
    keys = keys_of(found.value, found.besides)
    owner, _, noun = found.slot.rpartition(" ")
    other = OTHER_WORDS.get(noun.casefold())
    if other and owner.endswith("'s"):  # my neighbour's dog is no pet of mine
        other = f"{owner} {other}"

    many = plural(noun) or " and " in found.slot
    several = found.plural or (found.kind in ("kept", "schedule", "when") and many)

    def filled(patterns: list[str]) -> tuple[Asked, ...]:
        usable = (pattern for pattern in patterns if other or "{other}" not in pattern)
        if "'s " in found.slot or found.plural:  # "Which car's licence plate do I have?"
            usable = (
                pattern for pattern in usable if not (_INDEFINITE if "'s " in found.slot else _ONE).search(pattern)
            )
        worded = (pattern.replace("{verb}", found.verb).replace("{other}", other or "") for pattern in usable)
        if several:
            worded = (_IS.sub("are", pattern) for pattern in worded)
        asked = (_A_SLOT.sub("" if many else r"\1 ", pattern) for pattern in worded)
        return tuple(Asked(_AN.sub("an ", pattern.replace("{slot}", found.slot)), keys) for pattern in asked)

    return Fact(
        key=found.key or f"{found.kind} {found.verb or found.slot}".casefold(),
        kind=found.kind,
        head=found.head,
        values=(found.value,),
        tail=found.tail,
        trained=filled([*bank["trained"][: MOST_TRAINED - len(_more(found))], *_more(found)]),
        held_out=filled(bank["held_out"]),
        natural=filled(bank["natural"]),
        general=tuple(asked.question for asked in filled(bank["general"])),
        several=found.several,
        subject=found.subject,
    )
