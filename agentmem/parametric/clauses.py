"""Splits what somebody wrote into clauses that can stand alone, with the "I" that chats leave out.

Pure text in, text out. Knows punctuation, conjunctions and pronouns that mean what was just named; knows no facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .grammar import has_verb, is_past

__all__ = ["clauses", "sentences", "subject_of"]

_SENTENCE = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!Dr\.)(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)(?<!St\.)(?<!No\.)\s+|\n+|; | [-\u2013] "
)
_OPENING = re.compile(
    r"(?:oh|well|yes|yeah|so|and|but|also|hey|hi|hello|wow|btw|by the way|actually|please note(?: that)?|fyi|"
    r"note(?: that)?|"
    r"(?:please )?remember(?: that)?|(?:please )?don't forget(?: that)?|(?:please )?keep in mind(?: that)?|"
    r"just so you know|for your information|honestly|luckily|unfortunately|in fact|you know|"
    r"i mean|anyway|"
    r"i (?:think|guess|believe(?! in)|must say)(?: that)?|since (?:we|i|our) [^,.]*,|lately|plus|then|(?-i:(?:Hey |"
    r"Wow |Hi |Thanks,? )?[A-Z]\w+,)(?= (?:I|we|my|last|on|it)\b)"
    r"),?:? (?=\S)",
    re.IGNORECASE,
)
#: "When I was ten, I broke my arm": what is told comes first.
_FRONTED = re.compile(
    r"^(?P<when>(?:when|while|before|after) (?:i|we|my \w+) .+?),? (?P<rest>(?:i|we|my \w+) .+)$", re.IGNORECASE
)
#: Where a second clause of its own begins.
_SECOND = re.compile(
    r",? (?:and|but) (?=(?:i|we|my|our|i'm|i've) )"
    r"|,? (?:and|but) (?=(?:his|her|their|the|(?-i:[A-Z])\w+)(?: [\w'-]+){0,3}? (?:is|are|was|were|has|had|works|"
    r"lives)\b)"
    r"|, (?=(?:i|my|we|i'm|i've) (?:live|work|have|am|like|love|was)\b)",
    re.IGNORECASE,
)
#: "My sister Paula runs a bakery and her husband Bram is a cook": whose he is.
_THEIRS = re.compile(
    r"( and|, but| but) (?:her|his) (?=[\w-]+(?: (?-i:[A-Z])\w+)? (?:is|was|has|works|lives)\b)", re.IGNORECASE
)
#: "I live in Oslo and work as a cook": the verbs before which "I" is understood.
_SHARED = re.compile(
    r"^(?P<subject>i|we) (?P<first>.+?),? (?:and|but) (?=(?:live|work|play|speak|have|love|like|hate|drive|own|"
    r"study|teach|collect|moved|went|bought|visited|started|adopted)\b)",
    re.IGNORECASE,
)
#: A verb at a sentence's start whose "I" was dropped: "Lost my job", "Recently started a course".
_DROPPED = re.compile(
    r"(?:(?:just|recently|also|still|finally|already) )?(?P<verb>\w+)"
    r"(?= (?:my|our|the|an?|some|two|three|to|up|in|at|on|from|with|about|\w+ing|into|for|as)\b)",
    re.IGNORECASE,
)
#: A remark that leans on the clause before it: "I went to a concert and it was great".
_REMARK = re.compile(r"(?:,? (?:and|but|so)|,| -+| \u2013) (?:it|that|this|they|he|she|there)\b.*$", re.IGNORECASE)
#: Somebody or something that the next sentence can mean by a pronoun.
_SUBJECT = re.compile(
    r"(?:my|our) [\w-]+(?: (?-i:[A-Z])[\w-]+)?(?= (?:is|was|has|had|works|lives|likes|loves|plays|\w+ed|\w+s)\b)",
    re.IGNORECASE,
)
#: "My boss, Lorna, retires": the name belongs to the subject.
_NAME_BETWEEN = re.compile(
    r"^((?:my|our) [\w-]+(?: [\w-]+)?), ((?-i:[A-Z])[\w'-]+(?: (?-i:[A-Z])[\w'-]+)?), (?=[a-z])", re.IGNORECASE
)
_APPOSITION = re.compile(
    r"^(?P<subject>(?:my|our) [^,]{2,40}), (?P<what>an? [^,]{2,40}), (?P<rest>(?:is|was|are) .+)$", re.IGNORECASE
)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text in typewriter marks (grammar.typed), without what they open with ("Well, ")."""
    for part in _SENTENCE.split(text):
        sentence = re.sub(r"\s+", " ", part).strip().strip("\"'*-").strip()
        while (opening := _OPENING.match(sentence)) and len(sentence) > opening.end():
            sentence = sentence[opening.end() :]
        sentence = re.sub(r",? (?:too|though|btw|by the way|haha|lol|as well)(?=[.!]?$)", "", sentence)
        if sentence:
            yield _whole(sentence)


def subject_of(clause: str) -> str:
    """Whom or what "she" or "it" can mean in the next sentence; empty where that is not clear."""
    match = _SUBJECT.match(clause)
    return match[0] if match else ""


def _whole(sentence: str) -> str:
    """With the "I" that chats leave out: "Lost my job yesterday", "Love hiking"."""
    sentence = re.sub(r"\b(?:gonna|going to)\b", "going to", sentence, flags=re.IGNORECASE)
    sentence = re.sub(r"\bwanna\b", "want to", re.sub(r"\bgotta\b", "have to", sentence))
    first = _DROPPED.match(sentence)
    if first is None:
        return sentence
    verb = first["verb"].lower()
    if is_past(verb) and verb not in ("put", "hit", "cut", "set", "let", "read", "hurt", "quit", "shut", "cost", "led"):
        return "I " + sentence[:1].lower() + sentence[1:]
    if verb in ("love", "hate", "enjoy"):
        return "I " + sentence[:1].lower() + sentence[1:]
    return sentence


def clauses(sentence: str, before: str) -> Iterator[str]:
    """The clauses of a sentence that can stand alone. ``before`` is whom "she" or "it" can mean."""
    if before:
        sentence = re.sub(r"^(?:he|she|it)(?= (?:\w+))|^(?:he|she|it)(?='s )", before, sentence, flags=re.IGNORECASE)
        sentence = re.sub(
            rf"^({re.escape(before)})'s (?=an? |\w+ing |\d|in |at |from |very |called )", r"\1 is ", sentence
        )
    sentence = _NAME_BETWEEN.sub(r"\1 \2 ", sentence)
    if kin := _SUBJECT.match(sentence):
        whose = " ".join(kin[0].split()[:2]) + "'s "
        sentence = _THEIRS.sub(rf"\g<1> {whose}", sentence)
        sentence = re.sub(r"(?:,| and|, and) (?:he|she) (?=\w+)", f" and {kin[0]} ", sentence, flags=re.IGNORECASE)
    if fronted := _FRONTED.match(sentence):
        sentence = f"{fronted['rest']} {fronted['when'][:1].lower()}{fronted['when'][1:]}"
    for part in _apart(_REMARK.sub("", sentence)):
        apart = _APPOSITION.match(part)
        shared = _SHARED.match(part)
        if apart:
            yield f"{apart['subject']} {apart['rest']}"
            yield f"{apart['subject']} is {apart['what']}"
        elif shared:
            yield f"{shared['subject']} {shared['first']}"
            yield f"{shared['subject']} {part[shared.end() :]}"
        elif part.strip():
            yield part.strip()


def _apart(sentence: str) -> list[str]:
    """The sentence at its second clauses; "Karim and I are opening a bakery" has none."""
    parts = _SECOND.split(sentence)
    whole = [parts[0]]
    for part in parts[1:]:
        if has_verb(whole[-1]):
            whole.append(part)
        else:
            return [sentence]
    return whole
