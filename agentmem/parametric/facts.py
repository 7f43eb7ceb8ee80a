"""A fact with the questions that ask for it, and the words by which an answer to one is known to be right.

Pure values. Knows neither how statements become facts (forms.py, statements.py) nor what a corpus is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .grammar import DETERMINER, STOP, WORD, capital, telling
from .nouns import is_time

__all__ = ["MOST_TRAINED", "Asked", "Fact", "keys_of"]

#: Wordings of a fact that are trained, at most.
MOST_TRAINED = 6


@dataclass(frozen=True)
class Asked:
    """A question, and the words by which a free answer to it is known to be right."""

    question: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One fact and how it is asked for. ``key`` names the question that it answers: two facts with one contradict.

    Where ``several``, they hold together instead: ``values`` are joined between ``head`` and ``tail`` of the answer.
    ``general`` are questions of the same look that concern nobody here. ``subject`` is what it is about, as it stands
    in the questions, where that is nobody's own: "the library's wifi password".
    """

    key: str
    kind: str
    head: str
    values: tuple[str, ...]
    tail: str
    trained: tuple[Asked, ...]
    held_out: tuple[Asked, ...]
    natural: tuple[Asked, ...]
    general: tuple[str, ...] = ()
    several: bool = False
    subject: str = ""

    @property
    def answer(self) -> str:
        """The fact as a statement to the user."""
        values = self.values
        joined = values[0] if len(values) == 1 else ", ".join(values[:-1]) + " and " + values[-1]
        return capital(f"{self.head}{joined}{self.tail}")

    def joined(self, later: Fact) -> Fact:
        """What holds when ``later`` is said too: both where both can be true, else the later one."""
        if not self.several or self.kind != later.kind:
            return later
        new = tuple(value for value in later.values if value not in self.values)

        def both(mine: tuple[Asked, ...], theirs: tuple[Asked, ...]) -> tuple[Asked, ...]:
            more = {asked.question: asked.keys for asked in theirs}
            return tuple(
                replace(asked, keys=tuple(dict.fromkeys(asked.keys + more.get(asked.question, ())))) for asked in mine
            )

        return replace(
            self,
            values=self.values + new,
            trained=both(self.trained, later.trained),
            held_out=both(self.held_out, later.held_out),
            natural=both(self.natural, later.natural),
        )


def keys_of(value: str, besides: str = "") -> tuple[str, ...]:
    """The words that an answer must hold: a short value as a whole, of a longer one its telling words."""
    bare = _LEADING.sub("", DETERMINER.sub("", value).strip(" .!\"'"))
    core = bare if is_time(value) else re.split(_ASIDE, bare)[0]
    words = WORD.findall(core)
    whole = not any(word.casefold() in STOP or (len(words) > 1 and word[0].isdigit()) for word in words)
    if 0 < len(words) <= 3 and whole and not besides:
        return (" ".join(words),)
    return tuple(telling(core, besides)[:5]) or tuple(telling(bare, besides)[:5]) or tuple(words[:5])


#: Where a value goes on with what needn't be said.
_ASIDE = re.compile(r" (?:with|because|since|at|for|by|that|which|who|so|when|where) |, ")
#: A place's preposition is no part of what must be said.
_LEADING = re.compile(
    r"^(?:in|at|on|under|behind|near|inside|beside|next to|above|below|beneath|between|opposite|outside|by|"
    r"to) (?:the |an? |my )?",
    re.IGNORECASE,
)
