"""Whether a turn only tells, or surely asks: one that tells needs few records, and one that asks is no evidence.

Says so only where it is sure, by English words at the beginnings of sentences; any other turn may be either. Knows no
records and no scores.
"""

from __future__ import annotations

import re

__all__ = ["asks", "tells"]

#: Of all scripts that have one of their own.
_QUESTION_MARKS = frozenset("?\uff1f\u061f\u055e\u1367\u2047\u2048\u2049")
_SENTENCE = re.compile(r"[.!\n\u2026]+\s*")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
#: Said before a sentence properly begins.
_OPENING = frozenset(
    """
    hey hi hello oh ah well so and but also ok okay yes yeah yep no nope anyway then now btw
    """.split()  # noqa: SIM905 - read as prose
)
#: A sentence that begins so may ask for something.
_REQUESTS = frozenset(
    """
    what what's when where where's who who's whom whose which why how how's can could would will should shall
    may do does did is are am was were has tell remind suggest recommend give show find list write make help
    explain describe plan compare summarize summarise translate create draft propose advise pick choose name
    recall remember look search check think let's book order send call add set prepare organize organise
    schedule estimate calculate compute fix solve continue please generate answer repeat quote say rewrite rank
    sort count convert build design review read open get go try use update change delete forget
    """.split()  # noqa: SIM905 - read as prose
)
#: A sentence that begins so tells.
_STATEMENTS = frozenset(
    """
    i i'm i've i'd i'll we we're we've we'd we'll my our it it's it'll that that's this these those he he's she
    she's they they're they've there there's the a an you you're you've your wow yay aw aww congrats thanks
    thank nice great cool awesome amazing glad sounds had just last yesterday today sorry sure totally
    definitely absolutely
    """.split()  # noqa: SIM905 - read as prose
)
#: Statements that ask all the same.
_WISH = re.compile(
    r"\b(?:i|we)(?:['\u2019](?:d|m|re)| am| are| would)? (?:really |just |also )?"
    r"(?:need|want|wish|wonder|wondering|like to|love to|looking|trying|hoping|curious|can['\u2019]?t|cannot"
    r"|don['\u2019]t|do not|forgot|forget|have to|should|could|must)\b"
    r"|\b(?:not sure|no idea|any ideas?|your (?:help|advice|thoughts?|opinion|view))\b",
    re.IGNORECASE,
)


def asks(text: str) -> bool:
    """True if the text surely asks for something. Costs microseconds."""
    if not _QUESTION_MARKS.isdisjoint(text):
        return True
    words = (word.lower().replace("\u2019", "'") for word in _WORD.findall(text[:200]))
    return next((word for word in words if word not in _OPENING), None) in _REQUESTS


def tells(text: str) -> bool:
    """True if the text surely asks for nothing. Costs microseconds."""
    if not _QUESTION_MARKS.isdisjoint(text) or _WISH.search(text):
        return False
    told = False
    for sentence in _SENTENCE.split(text):
        words = (word.lower().replace("\u2019", "'") for word in _WORD.findall(sentence[:200]))
        first = next((word for word in words if word not in _OPENING), None)
        if first in _REQUESTS:
            return False
        told = told or first in _STATEMENTS
    return told
