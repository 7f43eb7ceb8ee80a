"""The parts of a plain English clause: subject, verb, object, place, time and reason.

Says what each part is and which of them can be asked for; finds none where a clause isn't plain. Makes no questions.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from .grammar import STOP, base_form, find_time, is_past, words
from .nouns import PEOPLE, plural

__all__ = ["BE", "HAVE", "RELATION", "TITLED", "Clause", "is_person", "line", "parse", "phrase"]

BE = frozenset(("am", "is", "are", "was", "were"))
#: Participles that are no past form: after "have" only.
_PARTICIPLES = words("participles")
HAVE = frozenset(("have", "has", "had"))
_MODALS = frozenset(
    ("can", "could", "will", "would", "must", "should", "may", "might", "can't", "couldn't", "won't", "wouldn't")
)
_DO_NOT = frozenset(("don't", "doesn't", "didn't"))
#: Prepositions inside a subject: "my flight to Lisbon leaves".
_WITHIN = frozenset(("of", "to", "for", "with", "in", "from", "on", "at", "near", "behind", "under"))
_SHORT = {"i'm": "I am", "i've": "I have", "i'll": "I will", "i'd": "I would", "we're": "we are", "we've": "we have",
          "we'll": "we will", "we'd": "we would"}  # fmt: skip
_ADVERBS = words("adverbs")
#: How participles end.
_PASSIVE = ("ed", "en", "t", "de", "own")
#: Adverbs that change what is said.
_WEIGHTY = frozenset(("never", "not", "rarely", "always", "often", "usually"))
_REASON = re.compile(
    r",? (?P<word>because|since(?! (?:the )?(?:\d|[A-Z]|last))|so that|in order to|although|though|while|when|after|"
    r"before|which|so|but|as|until|if) ",
    re.IGNORECASE,
)
_PLACE = re.compile(
    r"(?:^|(?<= ))(?P<place>(?:in|at|to|from|near|behind|into|inside|onto|outside|beneath|through|under|on|along|"
    r"around|across|"
    r"over) (?:the |an? |my |our |his |her |their |(?=(?-i:[A-ZÀ-ÖØ-Þ])|(?:home|work|school|church|bed|"
    r"university)\b))(?P<noun>[^,]+?))(?=,| (?:with|and|for|about|by|to|in|at|on|from) |$)",
    re.IGNORECASE,
)
_WITH_PEOPLE = frozenset(("meet", "marry", "call", "hug", "interview", "hire"))
_NOT_PLACES = re.compile(
    r".*\b(?:love|general|fact|order|case|particular|person|addition|mind|touch|total|peace|it|me|us|you|them|him|"
    r"her|that|this|"
    r"myself|first|least|last|once|time|future|past|present|way|mood|left|right|\d[\w.,]*|(?:mon|tues|wednes|thurs|fri|satur|"
    r"sun)days?|"
    r"euros?|pounds?|dollars?|percent|\w+ing)",
    re.IGNORECASE,
)
_GIVING = words("giving")
#: A preposition, behind a particle where there is one, with what it leads to: "(saving) up for a kayak".
_THROUGH = re.compile(
    r"(?P<through>(?:(?:up|out|down|off|away|on|back|over|forward|along|in) )?(?:by|with|for|of|about|against|after|"
    r"like|to|on|at|without)) (?P<other>(?!(?:me|us|you|him|her|it|them|that|how|what|which)\b)(?!\d)[^,]+)$",
    re.IGNORECASE,
)
#: What something is to something else: "about lichen", "allergic to nuts", "made of oak".
RELATION = re.compile(
    r"(?P<through>(?:not |very |really |so |quite |still )*(?:about|(?:"
    + "|".join(sorted(words("relations")))
    + r"|\w+ed|made|known) (?:to|of|in|at|on|for|about|with|as|from|after|by))) "
    r"(?P<other>(?!(?:me|us|you|him|her|it|them)\b)\S.*)",
    re.IGNORECASE,
)
#: A person by their title: "Professor Dahl".
TITLED = re.compile(r"(?:Prof(?:essor)?|Dr|Doctor|Mr|Mrs|Ms|Miss|Sir|Lady|Lord|Father|Sister|Captain)\b\.? [A-Z]")
_SOMEBODY = re.compile(
    r"(?:my|our|his|her|their|the|an?|two|three|four|five|six) "
    r"(?:(?:old|new|best|older|younger|elder|former|first|late|little|big|good|twin|whole|two|three) )*"
    r"(?P<noun>[\w-]+)(?: [A-Z]|,|$| (?:and|from|in|at|who)\b)",
)
#: "my flat with Tom": whom something is done with.
_COMPANY = re.compile(r"(?P<object>.*?) ?(?<![\w'])(?P<through>with|without) (?P<other>[^,]+)$")
#: "I was told to rest", but "I was promoted to head chef".
_BIDDEN = frozenset(("told", "asked", "allowed", "forced", "invited", "paid", "trained", "taught", "supposed", "meant"))
#: After "with" these are done by means of a company, not of a person.
_BY_MEANS = frozenset(("fly", "sail", "travel", "bank", "clean", "wash", "paint", "pay", "insure"))


@dataclass(frozen=True)
class Clause:
    """A plain clause. ``does`` is its finite verb as a question needs it in front ("did", "am", "have"), ``main`` the
    verb that then follows the subject; ``said`` both as they stand in the statement. ``object`` is what follows without
    place, time and reason; ``other`` what a preposition ``through`` leads to ("with my cousin"); ``copula`` where it
    says what the subject is.
    """

    subject: str
    does: str
    main: str
    said: str
    object: str
    through: str
    other: str
    place: str
    time: str
    reason: str
    copula: bool = False

    @property
    def whom(self) -> str:
        """How its object is asked for."""
        head = phrase(self.object).rsplit(" ", 1)[-1]
        named = head[:1].isupper() and self.main in _WITH_PEOPLE
        return "who" if named or head.lower() in PEOPLE else "what"

    @property
    def with_whom(self) -> str:
        """How what its preposition leads to is asked for."""
        if self.main in ("married", "engaged"):
            return "who"
        named = self.other[:1].isupper() and self.main.rsplit(" ", 1)[-1] not in _BY_MEANS
        return "who" if (named and self.through in ("with", "without", "to")) or is_person(self.other) else "what"

    def asks(self, *rest: str) -> str:
        """As a direct question goes on: "did I plant in the garden"."""
        return line(self.does, self.subject, self.main, *rest)

    def says(self, *rest: str) -> str:
        """As an indirect question goes on: "I planted in the garden"."""
        if self.copula:
            return line(self.subject, *rest, self.said)
        return line(self.subject, self.said, *rest)

    @property
    def behind(self) -> tuple[str, ...]:
        """What stands before the time in a question about what the preposition leads to."""
        doing = "doing" if self.other.split(" ", 1)[0].endswith("ing") else ""
        return (self.object, self.place, self.through) if self.object else (self.through, doing, self.place)

    @property
    def bare(self) -> bool:
        """Whether it says no more than what somebody can or can't do: "my brother can't swim"."""
        able = self.does in _MODALS | _DO_NOT
        return able and not line(self.object, self.other, self.place, self.time, self.reason)

    @property
    def company(self) -> str:
        """Preposition and what it leads to."""
        return line(self.through, self.other)


def line(*parts: str) -> str:
    """The parts that are not empty, with blanks between."""
    return " ".join(part for part in parts if part)


def is_person(text: str) -> bool:
    """Whether the noun phrase is a person that somebody has: "my cousin Sam", "our old teacher"."""
    found = _SOMEBODY.match(text)
    return found is not None and (found["noun"].lower() in PEOPLE or found["noun"].lower().removesuffix("s") in PEOPLE)


def parse(sentence: str, speakers: set[str], names: Container[str]) -> Clause | None:
    """The parts of a sentence that is one plain clause, else None."""
    main, reason = sentence, ""
    if cut := _REASON.search(sentence):
        main, reason = sentence[: cut.start()], sentence[cut.start() :].strip(" ,")
    rest, time = find_time(main)
    first, _, others = rest.partition(" ")
    rest = re.sub(r"\b(is|are|was|were|has|have|had)n't\b", r"\1 not", line(_SHORT.get(first.lower(), first), others))
    words = rest.split()
    for length in range(1, min(7, len(words))):
        subject = _subject(words[:length])
        if length == 1 and subject not in ("", "I", "we") and subject not in speakers and subject not in names:
            continue
        found = _verb(subject, words[length:]) if subject else None
        if found is None:
            continue
        does, verb, said, after, copula = found
        relation = RELATION.fullmatch(after) if copula else None
        if relation and subject != "I":
            rel, other = relation["through"], relation["other"]
            return Clause(subject, does, verb, said, "", rel, other, "", _amid(time), reason, copula)
        place, what = _place(after, verb)
        if what.split(" ", 1)[0] in speakers:  # "gives Caroline much joy": Caroline is not what is given
            return None
        what = what.strip(" ,-")
        mood = (subject == "I" or subject in speakers) and not place and not re.match(r"(?:an?|the|my|our) ", what)
        if copula and (mood or not (what or place or time)):
            return None
        what, through, other = (what, "", "") if copula else _company(what, does, verb)
        if place and through in ("at", "on"):  # a second place: "in the third row at the opera"
            what, through, other = line(through, other), "", ""
        if other.split(" ", 1)[0].endswith("ing"):  # "dream of opening a shop in Leeds"
            other, place = line(other, place), ""
        if verb == "name" and reason.startswith("after "):
            through, other, reason = "after", reason[6:], ""
        return Clause(subject, does, verb, said, what, through, other, place, _amid(time), reason, copula)
    return None


def _amid(time: str) -> str:
    """A time as it stands amid a sentence: "On 3 May" is "on 3 May"."""
    return time if re.match(r"\d|(?:mon|tues|wednes|thurs|fri|satur|sun)day", time, re.IGNORECASE) else (
        time[:1].lower() + time[1:])  # fmt: skip


def _company(what: str, does: str, verb: str) -> tuple[str, str, str]:
    """(object, preposition, what that leads to) of what follows a verb."""
    through = _THROUGH.match(what)
    passive = does in BE and not verb.endswith("ing") and verb.rsplit(" ", 1)[-1] not in _BIDDEN
    if through and through["through"] == "by" and not passive:
        through = None
    if through and (passive or not _deed(through["through"], through["other"])):
        return "", through["through"], through["other"]
    giving = re.match(r"(?P<object>.+?) (?P<through>to) (?P<other>[^,]+)$", what)
    if giving and verb.rsplit(" ", 1)[-1] in _GIVING and not _deed("to", giving["other"]):
        return giving["object"], "to", giving["other"]
    company = _COMPANY.match(what)
    if company and (is_person(company["other"]) or company["other"][:1].isupper()):
        return company["object"], company["through"], company["other"]
    return what, "", ""


def _deed(through: str, other: str) -> bool:
    """Whether this is what somebody does: "to swim"."""
    return through.endswith("to") and is_past(other.split(maxsplit=1)[0]) is False


def _subject(words: list[str]) -> str:
    """The words as a subject, if they can be one."""
    first, last = words[0].casefold(), words[-1].casefold()
    allowed = _WITHIN | {"first", "only", "and", "i", "my", "the", "our", "&"}
    if any(word.casefold() in STOP | _ADVERBS and word.casefold() not in allowed for word in words[1:]):
        return ""
    if last in allowed - {"i"} or last.endswith(("'s", "s'")) or "," in "".join(words[:-1]):
        return ""
    if first in ("i", "we"):
        return ("I" if first == "i" else "we") if len(words) == 1 else ""
    if is_past(first) is not None:  # "Makes Caroline happy", "Wish I had"
        return ""
    if first in ("my", "our", "the"):
        return line(first, *words[1:]) if len(words) > 1 else ""
    named = all(word[:1].isupper() or word in ("and", "my", "the", "of") for word in words) and first not in STOP
    return line(*words) if named and len(words[0]) > 1 else ""


def _agrees(subject: str, verb: str) -> bool:
    """Whether a verb in the present fits: in "my work phone rings" the verb is not "phone"."""
    if subject in ("I", "we") or verb != base_form(verb) or " and " in subject or subject[:1].isupper():
        return True
    head = re.split(r" (?:of|to|for|with|in|from|on|at|near|behind|under) ", subject)[0]
    return plural(head.rsplit(" ", 1)[-1])


def _verb(subject: str, words: list[str]) -> tuple[str, str, str, str, bool] | None:
    """(what a question puts in front, the verb that stays, both as said, what follows, copula) of a predicate."""
    adverbs: list[str] = []
    while words and words[0].casefold() in _ADVERBS:
        adverbs += [word for word in words[:1] if word.casefold() in _WEIGHTY]
        words = words[1:]
    if not words:
        return None
    verb = words[0].lower()
    if verb in _DO_NOT and len(words) > 1 and is_past(words[1]) is not None:
        more = [word for word in words[1:2] if word.casefold() in _ADVERBS]
        stays = line(*more, words[1 + len(more)])
        return verb, stays, line(verb, stays), line(*words[2 + len(more) :]), False
    if verb in BE | HAVE | _MODALS:
        return _joined(adverbs, verb, words)
    past = is_past(verb)
    got = base_form(verb) == "get" and len(words) > 1 and is_past(words[1]) and words[1].endswith(_PASSIVE)
    if got or (base_form(verb) == "go" and len(words) > 1 and words[1].endswith("ing")):
        stays = line(base_form(verb), words[1])
        does = "did" if past else "do" if _agrees(subject, verb) and verb == base_form(verb) else "does"
        return does, stays, line(*adverbs, verb, words[1]), line(*words[2:]), False
    if past is None or verb in _PARTICIPLES or words[0][:1].isupper() or not (past or _agrees(subject, verb)):
        return None
    many = subject in ("I", "we") or " and " in subject or verb == base_form(verb)
    does = "did" if past else "do" if many else "does"
    seldom = [word for word in adverbs if word.casefold() in ("never", "rarely")]
    return does, line(*seldom, base_form(verb)), line(*adverbs, words[0]), line(*words[1:]), False


def _joined(adverbs: list[str], verb: str, words: list[str]) -> tuple[str, str, str, str, bool] | None:
    """The same of a predicate that begins with "be", "have" or an auxiliary."""
    more = [word for word in words[1:2] if word.casefold() in _ADVERBS or word == "not"]
    rest = words[1 + len(more) :]
    follows = rest[0].lower() if rest else ""
    joined = (
        verb in _MODALS
        or (verb in HAVE and (is_past(follows) or follows == "been"))
        or (verb in BE and (follows.endswith("ing") or (is_past(follows) and follows.endswith(_PASSIVE))))
    )
    if follows == "been" and len(rest) > 1 and rest[1].endswith("ing"):
        main = line(*more, "been", rest[1])
        return verb, main, line(*adverbs, verb, main), line(*rest[2:]), False
    if joined and follows:
        main = line(*more, *rest[:1])
        return verb, main, line(*adverbs, verb, main), line(*rest[1:]), False
    if verb in BE:
        return verb, "", line(*adverbs, verb, *more), line(*rest), True
    if verb in _MODALS or not rest:
        return None
    does = "did" if verb == "had" else "do" if verb == "have" else "does"
    return does, "have", line(*adverbs, verb), line(*more, *rest), False


def _place(after: str, verb: str) -> tuple[str, str]:
    """(the place, all else) of what follows a verb: where to before where from; nobody is a place."""
    found = [match for match in _PLACE.finditer(after) if not _NOT_PLACES.fullmatch(match["noun"])]
    found = [match for match in found if not TITLED.match(match["noun"])]
    found = [match for match in found if not (match["place"].startswith(("to ", "To ")) and (
        verb.rsplit(" ", 1)[-1] in _GIVING or is_person(match["place"][3:])))]  # fmt: skip
    found.sort(key=lambda match: match["place"].lower().startswith("from "))
    for match in found[:1]:
        return match["place"], line(after[: match.start()].strip(" ,"), after[match.end() :].strip(" ,"))
    return "", after.strip(" ,")


def phrase(text: str) -> str:
    """The noun phrase that ``text`` begins with: up to its first preposition, conjunction or verb, four words long."""
    cut = re.split(
        r"[,;:]| (?:with|of|for|in|at|on|to|from|and|that|which|who|because|about|near|by|but|so|as|than|when|while|"
        r"after|before|is|was|are|were|has|had|have|made|can|will|\w+ed|burnt|got|went|came|took|gave|felt|i|we|you|he|"
        r"she|it|they) ",
        text,
        maxsplit=1,
        flags=re.IGNORECASE,
    )[0]  # fmt: skip
    words = cut.split()[:4]
    while words and (words[-1].casefold() in STOP | _ADVERBS or is_past(words[-1])):
        words.pop()
    found = line(*words)
    if found.split(" ", 1)[0] in ("My", "Our", "The", "A", "An"):
        found = found[:1].lower() + found[1:]
    return "the " + found.split(" ", 1)[1] if re.match(r"an? \w", found, re.IGNORECASE) else found
