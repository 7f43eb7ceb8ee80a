"""Whether a question is about the same people as a record: "my neighbour Bob's dog" is not "my dog".

Similarity can't tell them apart: they share every word but the possessor. Goes by English grammar (who owns, who acts,
who is asked about) and by words for relatives and acquaintances; knows no scores. Says no only where a question surely
names somebody that the record doesn't, or isn't the speaker's own while the record is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .postings import stems

__all__ = ["of_self", "personal", "points_back", "same_people"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_WORD = re.compile(r"[^\W_]+(?:['\u2019\u2011-][^\W_]+)*['\u2019]?")
#: The speaker. "me" counts only where it isn't just who is told ("Tell me a joke").
_FIRST = _set("i i'm i've i'd i'll my mine myself we we're we've we'd we'll us our ours ourselves")
_TOLD_ME = _set(
    """
    tell give show remind help teach write suggest recommend find send get explain let bring make sing ask read draw
    cook
    """
)
#: Before a verb that bids: "could you tell me".
_BIDDING = _set("you please and to just")
_SENTENCE_END = frozenset(".!?:\n")
#: Before 's these are no owners.
_CONTRACTED = _set("what who where when how why that this it he she there here let which one everything")
_DETERMINERS = _set("my our the")
_OWN_DETERMINERS = _set("my our")
_DO = _set("do does did don't doesn't didn't")
#: A name behind one of these is who is asked about.
_LEADING = _set(
    """
    is are was were has have had can could will would should does did do of by from doesn't don't didn't isn't aren't
    wasn't weren't hasn't haven't can't couldn't won't wouldn't
    """
)
_ASKS = _set("who what where when which how whose why whom")
#: Between a determiner and its noun.
_ADJECTIVES = _set(
    """
    old new next last first little big small favourite favorite own current former best good dear late younger older
    elder young other whole second only great
    """
)
_BEFORE_PEOPLE = _DETERMINERS | _ADJECTIVES
_SUBJECT = _LEADING | _ASKS
#: What a question may call a thing of the speaker's that a record calls otherwise ("my pet" for "my dog").
_GENERAL = _set("pet pets animal animals family home house")
#: What follows "is my plumber": then he is the subject, and not what is asked for, as in "is my job".
_STATES = _set("born from called named allergic married employed working living doing going studying")
#: Ends of words for people that `_PEOPLE` doesn't list: translator, cellist, librarian, fireman.
_AGENTS = ("er", "or", "ist", "man", "woman", "ian")
#: Words for people, each with its wider word, if it has one.
_PEOPLE = {
    **dict.fromkeys(_set("mother father"), "parent"),
    **dict.fromkeys(_set("brother sister"), "sibling"),
    **dict.fromkeys(_set("son daughter baby toddler"), "child"),
    **dict.fromkeys(_set("wife husband girlfriend boyfriend fiance fiancé fiancée fiancee spouse"), "partner"),
    **dict.fromkeys(_set("grandmother grandfather"), "grandparent"),
    **dict.fromkeys(
        _set(
            """
            parent sibling child partner grandparent neighbour colleague friend boss manager uncle aunt cousin nephew
            niece grandson granddaughter godmother godfather teacher roommate landlord landlady classmate teammate
            man woman guy lady gentleman girl boy baker butcher barber mechanic builder electrician optician vet nanny
            supervisor professor trainer farmer cleaner carer caretaker
            mentor doctor dentist plumber postman therapist coach tutor lawyer hairdresser gardener stepmother
            stepfather stepbrother stepsister acquaintance guest tenant customer client
            """
        ),
        "",
    ),
}
#: Other words for them.
_SAME = {
    **dict.fromkeys(_set("mum mom mama mommy mummy"), "mother"),
    **dict.fromkeys(_set("dad papa daddy"), "father"),
    **dict.fromkeys(_set("grandma granny nana"), "grandmother"),
    **dict.fromkeys(_set("grandpa granddad"), "grandfather"),
    **dict.fromkeys(_set("children kid kids"), "child"),
    **dict.fromkeys(_set("coworker co-worker"), "colleague"),
    **dict.fromkeys(_set("flatmate housemate"), "roommate"),
    "neighbor": "neighbour",
    "boss": "manager",
    "spouse": "partner",
    "auntie": "aunt",
}
#: "How do I boil an egg?" asks how it is done, not what the speaker does. After these verbs it asks what they do.
_HOW_TO = re.compile(
    r"\bhow (?:long )?(?P<verb>do|can|could|should|would|must) (?:i|we) "
    r"(?!(?:usually|normally|always|often|like|love|prefer|want|take|feel|get|go|know|have|earn|live|travel|spend|pay)\b)"
    r"[a-z]+ (?P<what>\S+)",
    re.IGNORECASE,
)
_DEFINITE = _set("the this that these those it them him her")
_PREPOSITIONS = _set("of at in on for to from with about by before after near under behind into over around up off out")
#: These make a place or a thing another one: "the password of the library".
_WHERE = _set("of at in")
_INDEFINITE = _set("a an")
#: Between nouns, or at the end of one.
_FUNCTION = (
    _SUBJECT | _DETERMINERS | _PREPOSITIONS | _DEFINITE | _INDEFINITE | _FIRST
    | _set("me you your he she they not and or but if so again now today then please be been being called need must")
)  # fmt: skip
#: "in the morning", "in my calendar": no place that a thing belongs to.
_NO_PLACES = _set(
    "morning evening afternoon night moment end beginning week weekend day month year time way case calendar diary"
)
#: What a word is: no thing of anybody's.
_DEFINES = re.compile(r"\s*(?:what|who) (?:is|are|was) an? ", re.IGNORECASE)
#: Refers to what was spoken of before.
_BACK = _set("he she it they him her them his hers its their theirs that this those these one ones")
_LEADS_BACK = re.compile(r"\s*(?:and|also|what about|how about|since when|why|how come|really)\b", re.IGNORECASE)


def same_people(question: str, record: str, name: str | None = None) -> bool:
    """False where ``question`` surely asks about others than ``record`` tells of, said by ``name``.

    A person or owner that the question names has to stand in the record (or be its speaker); a record in the first
    person needs a question in the first person, or one that names something of it by its own name, as "book club" or
    "the van". Of a record that is nobody's own the thing has to be the same: "the library", not "the hotel". Takes
    microseconds; other languages than English pass.
    """
    words = _words(question)
    told = _Told(record, name)
    if not all(map(told.has, _others(words))):
        return False
    if told.another(words):
        return False
    if not told.first:
        return not _DEFINES.match(question) and _same_thing(words, told)
    return _speaks_of_self(question, words) or any(map(told.names, words)) or told.owns(words)


def of_self(question: str) -> bool:
    """Whether the speaker asks about what is theirs: "How do I boil an egg?" asks how it is done."""
    return _speaks_of_self(question, _words(question))


def personal(record: str) -> bool:
    """Whether a record tells of the speaker's own matters."""
    return _Told(record, None).first


def points_back(question: str) -> bool:
    """True if the question makes sense only after what was said before, and names nobody of its own."""
    words = _words(question)
    if _others(words):
        return False
    if _LEADS_BACK.match(question) and len(words) <= 8:
        return True
    return not _own(words) and any(word.folded in _BACK for word in words)


@dataclass(frozen=True)
class _Word:
    text: str
    #: Small, without the apostrophe of an owner.
    folded: str
    owner: bool
    begins: bool

    @property
    def named(self) -> bool:
        """Whether it is written as a name is."""
        return self.text[:1].isupper() and not self.begins and self.folded not in _FIRST and self.folded not in _ASKS


def _words(text: str) -> list[_Word]:
    text = text.replace("\u2019", "'")
    found: list[_Word] = []
    end = 0
    for match in _WORD.finditer(text):
        word = match.group()
        folded = word.lower()
        owner = folded.endswith(("'s", "s'")) and folded.removesuffix("'s") not in _CONTRACTED
        begins = not found or not _SENTENCE_END.isdisjoint(text[end : match.start()])
        found.append(_Word(word, folded.removesuffix("'s").rstrip("'") if owner else folded, owner, begins))
        end = match.end()
    return found


class _Told:
    """The words of a record."""

    def __init__(self, text: str, name: str | None) -> None:
        words = _words(text)
        spoken = [] if name is None else _words(name)
        self.first = any(word.folded in _FIRST or word.folded == "me" for word in words)
        self._capitals = {word.folded for word in words if word.named} | {word.folded for word in spoken}
        self._words = {word.folded for word in (*words, *spoken)}
        self._own_things = [noun for _, noun in _things(words, _OWN_DETERMINERS)]
        self.placed = any(before in _PREPOSITIONS for before, _ in _things(words, _DETERMINERS)) or any(
            word.owner for word in words
        )
        self._stems = {stem for word in self._words for stem in stems(word)}
        people = {found for word in self._words if (found := _person(word)) is not None}
        self._people = people | {_PEOPLE[person] for person in people}
        self._wide = people

    def has(self, owner: str) -> bool:
        """Whether the record tells of whom the question names."""
        person = _person(owner)
        if person is not None and (person in self._people or _PEOPLE[person] in self._wide - {""}):
            return True
        wanted = set(stems(owner))
        return owner in self._words or bool(wanted and wanted <= self._stems)

    def holds(self, thing: Sequence[str]) -> bool:
        """Whether one of these words of a noun stands in the record."""
        return any(word in _GENERAL or self.has(word) for word in thing)

    def owns(self, words: Sequence[_Word]) -> bool:
        """Whether the question speaks of a thing of the record's speaker as of one that both know: "the van"."""
        folded = [word.folded for word in words]
        for thing in self._own_things:
            for size in (2, 1):
                noun = thing[:size]
                at = next(
                    (i for i in range(1, len(folded)) if len(noun) == size and folded[i : i + size] == noun), None
                )
                if at is None:
                    continue
                behind = folded[at + size : at + size + 1]
                ends = not behind or behind[0] in _FUNCTION - {"of"} or self.has(behind[0])
                if ends and (folded[at - 1] == "the" or (size == 2 and folded[at - 1] in _SUBJECT | _PREPOSITIONS)):
                    return True
        return False

    def another(self, words: Sequence[_Word]) -> bool:
        """Whether the question is about a thing of the same kind that the record doesn't tell of: a chess club, where
        that tells of a book club."""
        asked = [noun[:2] for _, noun in _things(words, _OWN_DETERMINERS) if len(noun) > 1]
        return any(own[1:2] == noun[1:] and not self.has(noun[0]) for noun in asked for own in self._own_things)

    def names(self, word: _Word) -> bool:
        """Whether this is a name that the record uses."""
        return word.text[:1].isupper() and word.folded in self._capitals


def _person(word: str) -> str | None:
    """The word for a relative or acquaintance that this is a form of."""
    for form in (word, word.removesuffix("s"), word.partition("-")[0]):
        known = _SAME.get(form, form)
        if known in _PEOPLE:
            return known
    return None


def _own(words: Sequence[_Word]) -> bool:
    """Whether the speaker asks about what is theirs."""
    for at, word in enumerate(words):
        if word.folded in _FIRST:
            return True
        if word.folded == "me" and not (at and words[at - 1].folded in _TOLD_ME and _bids(words, at - 1)):
            return True
    return False


def _speaks_of_self(question: str, words: Sequence[_Word]) -> bool:
    how = _HOW_TO.search(question)
    if how is None:
        return _own(words)
    what = how["what"].lower().strip("?.,!")
    rest = [word.folded for word in words]
    other = sum(word in _FIRST or word == "me" for word in rest) > 1 or not _DEFINITE.isdisjoint(rest)
    return other or not what or (what in _FUNCTION and what not in _INDEFINITE)


def _things(words: Sequence[_Word], after: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """The nouns behind these determiners, each with the word before the determiner."""
    for at, word in enumerate(words):
        if word.folded not in after:
            continue
        noun: list[str] = []
        for next_ in words[at + 1 : at + 6]:
            if next_.folded in _FUNCTION or next_.begins:
                break
            if next_.folded not in _ADJECTIVES:
                noun.append(next_.folded)
        if noun:
            yield words[at - 1].folded if at else "", noun


def _same_thing(words: Sequence[_Word], told: _Told) -> bool:
    """Whether a question may be about what is nobody's own: the place is the same, or one of the things."""
    if _ASKS.isdisjoint(word.folded for word in words) and _DETERMINERS.isdisjoint(word.folded for word in words):
        return True
    known = [(before, noun, told.holds(noun)) for before, noun in _things(words, _DETERMINERS | _INDEFINITE)]
    known = [one for one in known if _NO_PLACES.isdisjoint(one[1])]
    apart = _PREPOSITIONS if told.placed else _WHERE
    if any(before in apart and not same for before, _, same in known):
        return False
    named = [told.has(word.folded) for word in words if word.named]
    found = [same for _, _, same in known] + named
    return not found or any(found)


def _bids(words: Sequence[_Word], at: int) -> bool:
    """Whether this verb asks for something to be done: "tell me", "could you tell me"."""
    return words[at].begins or words[at - 1].folded in _BIDDING


def _others(words: Sequence[_Word]) -> list[str]:
    """Whom a question names as an owner or as the one that it is about, beside the speaker."""
    found: list[str] = []
    for at, word in enumerate(words):
        before = words[at - 1].folded if at else ""
        lead = words[at - 2].folded if at > 1 else ""
        person = _person(word.folded) is not None
        if word.owner:
            found += [word.folded] * (word.folded not in _GENERAL)
        elif (person and before in _BEFORE_PEOPLE) or (word.named and (before in _SUBJECT or _person(before))):
            found.append(word.folded)
        elif before in ("my", "our") and (noun := _noun(words, at)) is not None and not noun.owner:
            after = words[words.index(noun, at) + 1 :][:1]
            subject = lead in _DO or (lead in _LEADING and bool(after) and after[0].folded in _STATES)
            if noun.folded not in _GENERAL and (subject or (lead == "of" and noun.folded.endswith(_AGENTS))):
                found.append(noun.folded)
    return found


def _noun(words: Sequence[_Word], at: int) -> _Word | None:
    """The noun that begins at or shortly after ``at``, behind adjectives."""
    while at < len(words) and words[at].folded in _ADJECTIVES:
        at += 1
    return words[at] if at < len(words) else None
