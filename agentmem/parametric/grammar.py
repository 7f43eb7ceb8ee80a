"""English as far as questions need it: persons, verb forms, and times made absolute by the date they were said on.

Pure text in, text out. Knows no records, no forms and no training; where it can't be sure it changes nothing.
"""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from functools import cache
from pathlib import Path

__all__ = ["DETERMINER", "STOP", "WORD", "absolute", "base_form", "capital", "english", "find_time"]
__all__ += ["fold", "has_verb", "is_past", "of_another", "second_person", "singular_form", "telling", "typed", "words"]


@cache
def english(table: str) -> dict[str, str]:
    """A table of english.toml."""
    text = Path(__file__).with_name("english.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, str]] = tomllib.loads(text)
    return found[table]


def words(name: str) -> frozenset[str]:
    """A word list of english.toml."""
    return frozenset(english("words")[name].split())


#: Typographic marks as typed ones, so that patterns need only one form.
_TYPED = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "."})
WORD = re.compile(r"[^\W_](?:[\w'.@:/+-]|,(?=\d))*[^\W_]|[^\W_]")
STOP = words("stop")
DETERMINER = re.compile(r"^(?:the|an?|my|our|your|their|his|her|some|this|that) ", re.IGNORECASE)


def typed(text: str) -> str:
    """``text`` with typewriter quotes and apostrophes."""
    return text.translate(_TYPED)


def fold(text: str) -> str:
    """Case and punctuation of no account: " tromsø " is found in "You live in Tromsø."."""
    return " " + " ".join(WORD.findall(typed(text).casefold())) + " "


def capital(text: str) -> str:
    """``text`` with a capital first letter."""
    return text[:1].upper() + text[1:]


def telling(text: str, besides: str = "") -> list[str]:
    """The words of ``text`` that tell something and don't stand in ``besides``, each once, in order."""
    known = set(fold(besides).split())
    known |= {base_form(word) for word in known}
    words = (word.removesuffix("'s") for word in WORD.findall(text))
    fresh = [w for w in words if w.casefold() not in STOP and not {w.casefold(), base_form(w.casefold())} & known]
    return list(dict.fromkeys(fresh))


# ---- persons

_SWAPS = {
    "i am": "you are", "i'm": "you're", "am i": "are you", "i was": "you were", "was i": "were you",
    "i've": "you've", "i'll": "you'll", "i'd": "you'd",
    "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself",
    "we": "you", "us": "you", "our": "your", "ours": "yours", "ourselves": "yourselves",
    "we're": "you're", "we've": "you've", "we'll": "you'll", "we'd": "you'd",
    "you are": "I am", "you're": "I'm", "your": "my", "yours": "mine", "yourself": "myself",
}  # fmt: skip


def _words(words: dict[str, str]) -> re.Pattern[str]:
    listed = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.compile(rf"(?<![\w'])(?:{listed})(?![\w'])", re.IGNORECASE)


_SWAP = _words(_SWAPS)


def second_person(text: str) -> str:
    """What the user says of themselves as it is said to them: "my sister and I" becomes "your sister and you"."""

    def swap(match: re.Match[str]) -> str:
        swapped = _SWAPS[match.group().lower()]
        start = match.start() == 0 and match.group()[0].isupper()
        return capital(swapped) if start else swapped

    return _SWAP.sub(swap, text)


_THIRD = {
    "am": "is", "have": "has", "do": "does", "was": "was", "were": "was", "don't": "doesn't", "haven't": "hasn't",
    "are": "is", "aren't": "isn't", "weren't": "wasn't",
}  # fmt: skip
_CONTRACTED = {"'m": " is", "'ve": " has", "'ll": " will", "'d": " would", "'re": " is"}
_ADVERBS = (
    "all|also|always|almost|both|already|finally|frequently|generally|just|mainly|mostly|never|normally|now|often|only|"
    "originally|probably|rarely|really|recently|regularly|sometimes|soon|still|typically|usually"
)
_MODALS = words("auxiliaries")
#: "Tell me" asks the assistant for something: that "me" stays.
_FIRST = re.compile(
    r"(?P<kept>\b(?:tell|remind|give|show|let) me\b)"
    r"|(?<=\bsay )(?P<again>i|we)(?: (?P<being>am))?\b"
    r"|\b(?P<asked>am|are|do|have|was|were|don't|aren't|haven't|weren't) (?:i|we)\b"
    rf"|\b(?:i|we)(?P<short>'m|'re|'ve|'ll|'d)(?![\w'])"
    rf"|\b(?:i|we)\b(?: (?P<adverb>{_ADVERBS})\b)?(?: (?P<verb>[a-z']+))?"
    r"|\b(?P<own>my|mine|me|myself|our|ours|us|ourselves)\b",
    re.IGNORECASE,
)


def of_another(text: str, name: str) -> str:
    """What is said or asked about "me" as said or asked about ``name``: "Where do I live?" -> "Where does Bob live?".

    The same for a statement: "I moved my shop" becomes "Bob moved their shop" (no gender is guessed). A text without
    a first person comes back as it is.
    """
    named = False

    def person() -> str:
        nonlocal named
        named = True
        return name

    def change(match: re.Match[str]) -> str:
        part = match.groupdict()
        before = text[: match.start()].rstrip().rsplit(" ", 1)[-1].lower()
        if part["kept"] and before in ("", "you", "please", "to", "and"):
            return match.group()
        if part["kept"]:  # "What did my doctor tell me?"
            return match.group()[:-2] + ("them" if named else person())
        if part["again"]:  # "What did I say I have?"
            return "they" + (" are" if part["being"] else "") if named else match.group()
        if part["asked"]:
            verb = part["asked"]
            other = _THIRD[verb.lower()]
            return f"{capital(other) if verb[0].isupper() else other} {person()}"
        if part["short"]:
            return person() + _CONTRACTED[part["short"].lower()]
        if part["own"]:
            own = part["own"].lower()
            if own in ("myself", "ourselves"):
                return "themselves"
            if own in ("me", "us"):
                return "them" if named else person()
            return ("their" if own in ("my", "our") else "theirs") if named else person() + "'s"
        adverb = f" {part['adverb']}" if part["adverb"] else ""
        verb = part["verb"]
        # After an auxiliary ("does Bob own", "can Bob play") the verb stays as it is.
        if before == "and":  # "my wife and I met"
            return ("they" if named else person()) + adverb + (f" {verb}" if verb else "")
        if verb is None or before in _MODALS or before in ("do", "does", "did"):
            return person() + adverb + (f" {verb}" if verb else "")
        return person() + adverb + " " + singular_form(verb)

    changed = _FIRST.sub(change, text)
    return capital(changed) if text[:1].isupper() else changed


# ---- verbs

#: Regular verbs whose stem ends in e where the spelling doesn't show it.
_SILENT_E = words("silent_e")
_REGULAR = words("regular")


@cache
def _irregular() -> tuple[dict[str, str], frozenset[str]]:
    """Past forms and participles -> base form, and the base forms."""
    rows = [row.split() for row in english("verbs")["irregular"].split("|")]
    return {form: row[0] for row in rows for form in row[1:] if form != row[0]}, frozenset(row[0] for row in rows)


def is_past(verb: str) -> bool | None:
    """Whether ``verb`` is a past form; None if it doesn't look like a verb that is known."""
    verb = verb.lower()
    past, bases = _irregular()
    if verb in past or verb in ("put", "hit", "cut", "set", "let", "read", "hurt", "quit", "shut", "cost"):
        return True
    if verb in bases or verb in _REGULAR:
        return False
    if verb.endswith("ed") and len(verb) > 4 and not verb.endswith("eed"):
        return True
    if verb[:2] in ("un", "re") and verb[2:] in (bases | _REGULAR):  # unplug, reopen
        return False
    stem = base_form(verb) if verb.endswith("s") else verb
    return False if stem in bases or stem in _REGULAR else None


def has_verb(text: str) -> bool:
    """Whether ``text`` holds a finite verb that is known."""
    words = [word.casefold() for word in WORD.findall(text)]
    return any(word in _MODALS or word in _THIRD or word in ("is", "has", "i'm", "i've") or is_past(word) is not None
               for word in words)  # fmt: skip


def base_form(verb: str) -> str:
    """ "went" -> "go", "stopped" -> "stop", "tries" -> "try"; an unknown word comes back as it is."""
    verb = verb.lower()
    past, bases = _irregular()
    if verb in past:
        return past[verb]
    if verb in bases or verb in _REGULAR:
        return verb
    if verb == "has":
        return "have"
    if verb.endswith("ed") and len(verb) > 4 and not verb.endswith("eed"):
        return _base_of_past(verb)
    if verb.endswith("ies") and len(verb) > 4:
        return verb[:-3] + "y"
    if re.search(r"(?:ss|sh|ch|x|z|o)es$", verb):
        return verb[:-2]
    if verb.endswith("s") and verb[:-1] in (bases | _REGULAR):
        return verb[:-1]
    return verb


def _base_of_past(verb: str) -> str:
    stem = verb[:-2]
    if stem in _REGULAR or stem + "e" in _REGULAR:
        return stem if stem in _REGULAR else stem + "e"
    if stem.endswith("i"):
        return stem[:-1] + "y"
    if len(stem) > 2 and stem[-1] == stem[-2] and (stem[-1] not in "lsfz" or stem[:-1] in _REGULAR):
        return stem[:-1]
    vowels = len(re.findall(r"[aeiouy]+", stem))
    silent = (
        stem in _SILENT_E
        or stem[-1] in "vczu"
        or re.search(r"[^aeiouls]l$|dg$|[aeiou]s$|[^aeiou]s$(?<!s s)|(?<![eo])at$|at$(?<=creat)|iz$|ur$", stem)
        or (vowels == 1 and re.search(r"[^aeiou][aeiou][^aeiouwxyhl]$", stem))
    )
    return stem + "e" if stem == "creat" or (silent and not stem.endswith(("ss", "eat", "oat", "cus"))) else stem


def singular_form(verb: str) -> str:
    """The verb after "she": "live" -> "lives", "am" -> "is". Past forms and auxiliaries stay."""
    lowered = verb.lower()
    if lowered in _THIRD:
        return _THIRD[lowered]
    if lowered in _MODALS or is_past(lowered) or not lowered.isalpha():
        return verb
    if is_past(lowered) is None and lowered.endswith(("s", "ing", "ly")):
        return verb
    if re.search(r"(?:s|sh|ch|x|z|o)$", lowered):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", lowered) else verb + "s"


# ---- times

_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
_WEEK: list[str] = list(_DAYS.split("|"))
_COUNTS = {
    "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "a couple of": 2, "a few": 3,
}  # fmt: skip
_COUNT = r"(?:\d{1,3}|" + "|".join(sorted(_COUNTS, key=len, reverse=True)) + ")"
_PART = r"(?: (?:morning|afternoon|evening|night))?"
_CLOCK = (
    r"at (?:\d{1,2}(?:[:.]\d\d)?(?: ?[ap]\.?m\b\.?)?(?: o'clock)?|noon|midnight|half past \w+|quarter (?:past|to) \w+)"
)
_RELATIVE = (
    rf"yesterday{_PART}|today|tonight|tomorrow{_PART}|this (?:morning|afternoon|evening|week|month|year|weekend)"
    rf"|last night|(?:last|next|this) (?:week(?:end)?|month|year|{_DAYS}){_PART}|{_COUNT} (?:days?|weeks?|months?|"
    rf"years?) ago"
    rf"|in {_COUNT} (?:days?|weeks?|months?|years?)|the day (?:before yesterday|after tomorrow)"
)
_TIME = re.compile(
    rf"(?<![\w'])(?:(?:on )?(?:{_RELATIVE})"
    rf"|(?:on |until |by )?(?:the )?\d{{1,2}}(?:st|nd|rd|th)?(?: of)? (?:{_MONTHS})\b,?(?: \d{{4}}\b)?"
    rf"|(?:on |until |by |in |since )?(?:{_MONTHS}) \d{{1,2}}(?:st|nd|rd|th)?\b,?(?: \d{{4}}\b)?"
    rf"|(?:in|since|until|by|during|every|last|next) (?:early |late |mid-)?(?:{_MONTHS})\b(?: \d{{4}}\b)?"
    r"|(?:in|since|until|around|by) (?:the )?(?:1[0-9]|20)\d\d(?:s)?\b"
    rf"|on (?:{_DAYS})s?\b{_PART}(?: and (?:{_DAYS})s?\b)?"
    rf"|(?:every|each)(?: other| second)? (?:day|week(?:end|day)?|month|year|morning|evening|night|afternoon|summer|"
    rf"winter|spring|autumn|{_DAYS}){_PART}(?: and (?:{_DAYS}|evening))?"
    r"|(?:once|twice|\w+ times) (?:a|per) (?:day|week|month|year)|in the (?:morning|evening|afternoon)s?\b"
    rf"|(?:in|last|next|every|during the|over the) (?:spring|summer|autumn|winter)\b|{_CLOCK}|at (?:night|Christmas|"
    rf"Easter|weekends)\b"
    rf"|(?:in the week|on the weekend) of \d{{1,2}} (?:{_MONTHS}) \d{{4}}\b|during (?:the|my|our) \w+"
    rf"|on (?:weekends|weekdays)\b|for (?:(?:about|around|nearly|almost|over|exactly|at least|more than) )?{_COUNT} "
    r"(?:seconds?|minutes?|hours?|days?|weeks?|months?|years?)\b|\d{{4}}-\d\d-\d\d)",
    re.IGNORECASE,
)


def find_time(text: str) -> tuple[str, str]:
    """(the text without its expression of time, that expression); the second is empty where there is none.

    Neighbouring expressions count as one: "on Tuesdays at 6 pm". A month alone is none ("May" is a name too).
    """
    match = _TIME.search(text)
    if match is None:
        return text, ""
    start, stop = match.span()
    while (more := _TIME.match(text, len(text) - len(text[stop:].lstrip(" ,")))) and more.end() > stop:
        stop = more.end()
    rest = f"{text[:start].rstrip(' ,')} {text[stop:].lstrip(' ,')}".strip()
    return rest, text[start:stop].strip(" ,")


def absolute(text: str, said: dt.datetime | None) -> str:
    """``text`` with its relative times as dates: "yesterday", said on 8 May 2023, becomes "on 7 May 2023".

    Without the time at which it was said, and where a phrase is too vague to be a date, it stays.
    """
    if said is None:
        return text
    day = said.date()

    def change(match: re.Match[str]) -> str:
        phrase = match.group().lower().removeprefix("on ")
        try:
            found = _date(phrase, day)
        except (OverflowError, ValueError):  # before the year 1
            found = None
        return match.group() if found is None else capital(found) if match.group()[0].isupper() else found

    return re.sub(rf"(?<![\w'])(?:on )?(?:{_RELATIVE})(?![\w'])", change, text, flags=re.IGNORECASE)


def _date(phrase: str, day: dt.date) -> str | None:
    near = {"yesterday": -1, "today": 0, "tonight": 0, "tomorrow": 1, "this": 0, "last night": -1}
    for word, days in near.items():
        if phrase == word or (word in ("yesterday", "tomorrow") and phrase.startswith(word)):
            return f"on {_day(day + dt.timedelta(days))}"
    if phrase in ("this morning", "this afternoon", "this evening"):
        return f"on {_day(day)}"
    if phrase.startswith("the day "):
        return f"on {_day(day + dt.timedelta(-2 if 'before' in phrase else 2))}"
    words = phrase.split()
    if words[0] in ("last", "next", "this") and words[1].capitalize() in _WEEK:
        wanted = _WEEK.index(words[1].capitalize())
        ahead = (wanted - day.weekday()) % 7
        days = ahead - 7 if words[0] == "last" else ahead or (7 if words[0] == "next" else 0)
        return f"on {_day(day + dt.timedelta(days))}"
    if words[0] in ("last", "next", "this"):
        return _period(words[1], {"last": -1, "next": 1, "this": 0}[words[0]], day)
    ahead = 1 if words[0] == "in" else -1
    unit = words[-1 if ahead > 0 else -2].removesuffix("s")
    count = " ".join(words[1:-1] if ahead > 0 else words[:-2])
    number = _COUNTS.get(count) or int(count)
    if unit in ("day", "week"):
        return (
            f"on {_day(day + dt.timedelta(ahead * number * (7 if unit == 'week' else 1)))}" if number < 5000 else None
        )
    return _period(unit, ahead * number, day)


def _period(unit: str, ahead: int, day: dt.date) -> str | None:
    if unit == "year":
        return f"in {day.year + ahead}" if day.year + ahead > 0 else None
    if unit == "month":
        months = day.year * 12 + day.month - 1 + ahead
        return f"in {_MONTHS.split('|')[months % 12]} {months // 12}" if months >= 12 else None
    monday = day + dt.timedelta(7 * ahead - day.weekday())
    if unit == "weekend":
        return f"on the weekend of {_day(monday + dt.timedelta(5))}"
    return f"in the week of {_day(monday)}"


def _day(day: dt.date) -> str:
    return f"{day.day} {_MONTHS.split('|')[day.month - 1]} {day.year}"
