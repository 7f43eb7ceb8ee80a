"""Kinds of statements that are asked for in words of their own: a dog's name, a job, a favourite tea, an allergy.

Knows how such statements look in English; how each kind is asked for stands in wordings.toml. Knows no records, no
training; what it doesn't recognise it leaves to statements.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from .facts import Fact, keys_of
from .grammar import DETERMINER, find_time, is_past, second_person, telling
from .nouns import (
    DIET,
    ILLNESS,
    INSTRUMENTS,
    JOB,
    NATIONALITY,
    NOT_JOBS,
    NUMBERS,
    PEOPLE,
    PETS,
    PLACE,
    QUALITY,
    is_time,
)
from .syntax import RELATION, is_person
from .wordings import Found, as_fact

__all__ = ["named_in", "recognise"]


def recognise(sentence: str) -> list[Fact]:
    """The facts of a sentence (without its end mark, in the user's words); none where no kind of statement fits."""
    for pattern, read in _FORMS:
        match = pattern.fullmatch(sentence)
        if match is None:
            continue
        groups = {name: (part or "").strip(" ,") for name, part in match.groupdict().items()}
        found = read(groups)
        if found and all(one.value and telling(one.value) for one in found):
            return [as_fact(one) for one in found if keys_of(one.value, one.besides)]
    return []


def named_in(sentence: str) -> list[Fact]:
    """The name that a statement tells in passing: "My sister Paula runs a bakery"."""
    match = _NAMED.match(sentence)
    if match is None or match["slot"].lower().rsplit(" ", 1)[-1] not in PEOPLE | PETS:
        return []
    return [as_fact(_named(match["slot"].lower(), match["name"]))]


def _uncapital(slot: str) -> str:
    """ "Dog" at a sentence's start is "dog"; "WiFi" and "Tesla" inside are what they are."""
    return slot if not slot[:1].isupper() or slot[1:2].isupper() else slot[:1].lower() + slot[1:]


def _named(slot: str, value: str) -> Found:
    head = re.sub(r"-in-law$", "", slot.rsplit(" ", 1)[-1].casefold())
    kind = (
        "named_of"
        if "'s " in slot
        else "named_pet"
        if head in PETS
        else "named_person"
        if head in PEOPLE
        else "named_thing"
    )
    return Found(kind, value, f"your {second_person(slot)} is called ", slot, key=f"named {slot.casefold()}")


# ---- one function per group of patterns: what its groups mean


def _possession(part: dict[str, str]) -> list[Found]:
    slot, value = _uncapital(part["slot"]), part["value"]
    be = part.get("be") or "is"
    head = re.sub(r"-in-law$", "", slot.rsplit(" ", 1)[-1].casefold())
    said = f"your {second_person(slot)} {be} "
    best = re.fullmatch(r"(?:absolute )?(?:favou?rite|preferred) (?P<slot>.+)", slot, re.IGNORECASE)
    lucky = re.fullmatch(r"lucky (?P<slot>.+)", slot, re.IGNORECASE)
    if be != "is" and not best:  # "My parents are from Ghana": asked for by its grammar (statements.py)
        return []
    if slot in ("name", "first name"):
        return [Found("name", value, "your name is ")]
    if slot in ("job", "profession", "occupation"):
        return _job({"value": re.sub(r"^(?:being |to be )?(?:an? )?", "", value, flags=re.IGNORECASE)})
    if slot in ("birthday", "date of birth"):
        return [Found("birthday", re.sub("^on ", "", value), "your birthday is ")]
    if slot == "age":
        return [Found("age", value, "you are ", tail=" years old.")]
    if slot == "employer":
        return [Found("employer", value, "you work for ")]
    if best:
        return [Found("favourite", value, said, best["slot"], plural=be == "are")]
    if lucky:
        return [Found("lucky", value, said, lucky["slot"])]
    if re.match(r"(?:called|named) ", value, re.IGNORECASE):
        return [_named(slot, value.split(" ", 1)[1])]
    if RELATION.match(value):  # "My thesis is about lichen": asked for by its grammar
        return []
    if is_time(value):
        return [Found("when", value, said, slot)]
    due = re.fullmatch(r"(?P<due>due|planned|over|open) (?P<when>.+)", value)
    if due and is_time(due["when"]):
        return []  # "When is the baby due?": asked for by its grammar
    age = AGE.fullmatch(value)
    if age and head in PEOPLE | PETS:
        return [Found("age_of", age["years"], said, slot, tail=f"{value[age.end('years') :]}.")]
    if NATIONALITY.fullmatch(value):
        return [Found("nationality_of", value, said, slot)]
    if head in PEOPLE and re.match(r"(?:an? )", value) and JOB.fullmatch(value):
        return [Found("relative_job", value, said, slot)]
    if head in PEOPLE and value[:1].isupper() and len(value.split()) <= 4:
        return [_named(slot, value)]
    if PLACE.fullmatch(value):
        return [Found("where", value, said, slot)]
    if QUALITY.fullmatch(value):
        return [Found("quality", value, said, slot)]
    found = Found("number" if NUMBERS.fullmatch(slot) else "possession", value, said, slot)
    stands = re.fullmatch(
        rf"(?P<what>[^,]+?) (?:behind|near|opposite|next to|under|in|at|on) (?:the |{_UPPER}).+", value
    )
    return (
        [found, replace(found, kind="where", besides=stands["what"])] if stands and not find_time(value)[1] else [found]
    )


def _the(part: dict[str, str]) -> list[Found]:
    slot, value = part["slot"][:1].lower() + part["slot"][1:], part["value"]
    if part["be"] != "is":
        return []
    kind = "the_when" if is_time(value) else "the_where" if PLACE.fullmatch(value) else "the_what"
    subject = "" if re.search(r"\b(?:my|our|me|us)\b", slot) else slot
    key = f"the {slot.casefold()} {kind}"
    return [Found(kind, value, f"{second_person(slot)} {part['be']} ", slot, key=key, subject=subject)]


def _relative(part: dict[str, str]) -> list[Found]:
    """ "my sister Ottilie is a nurse": her name, and what is said of her."""
    slot, name = part["slot"].lower(), part["name"]
    if slot.rsplit(" ", 1)[-1] not in (PEOPLE | PETS):
        return []
    if part["verb"] == "was":  # "What was my uncle's job?": asked for by its grammar
        return []
    named, said, value = _named(slot, name), f"your {slot} {name} ", part["value"]
    if part["verb"] in ("works as", "is") and re.match(r"an? ", value) and JOB.fullmatch(value):
        return [named, Found("relative_job", value, f"{said}{part['verb']} ", slot)]
    if part["verb"] == "lives":
        return [named, Found("relative_home", re.sub(r"^(?:in|at) ", "", value), f"{said}lives in ", slot)]
    if part["verb"] == "is" and not RELATION.match(value):
        kind = "where" if PLACE.fullmatch(value) and not is_time(value) else "quality"
        return [named, Found(kind, value, f"{said}{part['verb']} ", slot)]
    return []


def _birthday_of(part: dict[str, str]) -> list[Found]:
    slot, when = part["slot"].lower(), re.sub("^on ", "", part["value"])
    return [Found("birthday_of", when, f"your {slot}'s birthday is ", slot)]


def _relative_does(part: dict[str, str]) -> list[Found]:
    slot = part["slot"].lower()
    if part["verb"] == "works as":
        return [Found("relative_job", part["value"], f"your {slot} works as ", slot)]
    return [Found("relative_home", part["value"], f"your {slot} lives in ", slot)]


def _have(part: dict[str, str]) -> list[Found]:
    value = part["value"]
    named = re.fullmatch(r"(?:an? |the )?(?P<slot>[^,;:]{2,40}?),? (?:called|named|whose name is) (?P<name>.+)", value)
    if named:
        return [_named(named["slot"].rsplit(" ", 1)[-1], named["name"])]
    if meal := re.fullmatch(rf"(?P<what>.+?) (?P<meal>(?:for|with|at|before|after) {_MEAL})", value):
        when = meal["meal"]
        return [Found("verb", meal["what"], "you have ", verb=f"have {when}", tail=f" {when}.", several=True)]
    if re.match(
        r"(?:lots|some|any|much|tons|plenty|so|such|no|been|got|had|to|never|always|\w+ed|all|faith|fun)\b", value
    ) or (is_past(value.split()[0])):
        return []
    rest, time = find_time(value)
    if time and rest and not re.match(r"(?:for|since|in) ", time):
        what = DETERMINER.sub("", rest)
        if what != rest:  # "an appointment": mine, where it is asked for
            return [
                Found("when", time, f"you have {second_person(rest)} ", what, besides=rest),
                Found("agenda", rest, "you have ", time, tail=f" {time}.", several=True, besides=time),
            ]
        return [
            Found("schedule", time, f"you have {second_person(rest)} ", what, besides=rest),
            Found("agenda", rest, "you have ", time, tail=f" {time}.", several=True, besides=time),
        ]
    if ILLNESS.fullmatch(value):
        return [Found("illness", value, "you have ", several=True)]
    count = re.fullmatch(
        r"(?P<number>\d+|no|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve) (?P<slot>.+)",
        value,
        re.IGNORECASE,
    )
    if count and " and " not in count["slot"]:
        return [
            Found("how_many", count["number"], "you have ", count["slot"], tail=f" {second_person(count['slot'])}.")
        ]
    thing = re.split(r" (?:with|from|in|on|at|by|that|which|who|for|of|near) ", DETERMINER.sub("", value))[0]
    head = thing.rsplit(" ", 1)[-1]
    if value.lower().startswith(("a ", "an ")) and telling(value, head) and head.isalpha():
        return [Found("which", value, "you have ", head, several=True, besides=head)]
    return [Found("have", value, "you have ", several=True)]


def _job(part: dict[str, str]) -> list[Found]:
    value = part["value"]
    article = "an" if value[:1].casefold() in "aeiou" else "a"
    return [Found("job", value, f"you work as {article} ")]


def _am(part: dict[str, str]) -> list[Found]:
    value = part["value"]
    noun = value.split(" ", 1)[1] if re.match(r"an? ", value) else ""
    age = re.fullmatch(r"(?P<years>\d{1,3})(?: years? old| years of age)?", value)
    about = re.fullmatch(
        r"(?P<slot>(?:very |really |so |quite )?(?:afraid|scared|terrified|fond|proud|interested|good|bad|keen|"
        r"responsible|"
        r"passionate|crazy|famous|known|addicted|obsessed) (?:of|in|at|on|for|about|to|with|as)) "
        r"(?P<value>.+)",
        value,
        re.IGNORECASE,
    )
    fan = re.fullmatch(r"an? (?:\w+ )?(?:fan|lover) of (?P<value>.+)", value, re.IGNORECASE)
    if fan:
        return [Found("like", fan["value"], "you like ", verb="like", several=True)]
    if age:
        return [Found("age", age["years"], "you are ", tail=" years old.")]
    if about:
        slot = re.sub(r"^(?:very|really|so|quite) ", "", about["slot"].lower())
        return [Found("am_about", about["value"], f"you are {slot} ", slot, several=True)]
    if DIET.fullmatch(value):
        return [Found("diet", value, "you are ")]
    if noun and JOB.fullmatch(noun) and not NOT_JOBS & set(noun.casefold().split()):
        return [Found("job", noun, f"you work as {value.split(' ', 1)[0].lower()} ")]
    if NATIONALITY.fullmatch(value):
        return [Found("nationality", value, "you are ")]
    if (
        noun
        or value.lower().startswith("the ")
        or re.fullmatch(
            r"\w+-\w+|retired|single|divorced|widowed|unemployed|pregnant|deaf|blind|bald", value, re.IGNORECASE
        )
    ):
        return [Found("am", value, "you are ", several=True)]
    return []


_PARTICLE = re.compile(
    r"(?:down|up|out|about|to|for|with|in|on|off|away|back|over|at|that|it|them|him|how|when|if)\b", re.IGNORECASE
)
_LIKES = frozenset(("like", "love", "enjoy", "prefer", "adore", "fancy"))
_DISLIKES = frozenset(("hate", "dislike", "detest", "loathe"))
#: Verbs that say something lasting of whoever says them in the present.
_LASTING = "own collect drink teach wear ride eat read grow keep sell write make breed cook bake paint repair use watch"


def _verb(part: dict[str, str]) -> list[Found]:
    verb, value = part["verb"].lower(), part["value"]
    rest, time = find_time(value)
    if (time and rest and verb not in _LIKES | _DISLIKES) or _PARTICLE.match(value):
        return []
    head = f"you {verb} "
    rather = re.fullmatch(r"(?P<what>\S+(?: \S+){0,2}?) (?P<than>(?:to|over) (?!be\b).+)", value)
    if verb == "prefer" and rather and not value.startswith("to "):
        than = second_person(rather["than"])
        return [Found("verb", rather["what"], head, verb=f"prefer {rather['than']}", several=True, tail=f" {than}.")]
    if verb in _LIKES:
        return [Found("like", value, head, verb=verb, several=True)]
    if verb in _DISLIKES:
        return [Found("dislike", value, head, verb="dislike", several=True)]
    if verb in ("own", "ride") and value.lower().startswith(("a ", "an ")):
        found = _have(part)[0]
        return [replace(found, head=head)] if found.kind == "which" else [found]
    if verb == "play":
        kind = "play_instrument" if INSTRUMENTS.fullmatch(value) else "play"
        return [Found(kind, value, head, verb=verb, several=True)]
    if when := _WHEN.fullmatch(value):
        verb = f"{verb} {when['when']}"
        return [Found("verb", when["what"], head, verb=verb, several=True, tail=f" {when['when']}.")]
    kind = verb if verb in ("speak", "study", "drive") else "verb"
    return [Found(kind, value, head, verb=verb, several=True)]


#: What somebody has a drink, a dish or a thing like.
_TASTES = _LIKES | {"take", "drink", "eat", "have", "order", "want", "serve"}


def _manner(part: dict[str, str]) -> list[Found]:
    """ "I take my tea with two sugars", "I like my coffee black"."""
    verb, slot, value = part["verb"].lower(), part["slot"], part["value"]
    by, _, what = value.partition(" ")
    if (is_past(verb) is not False and verb != "prefer") or verb == "share":
        return []
    if by in ("with", "without") and (is_person(what) or (what[:1].isupper() and verb not in _TASTES)):
        return []  # with whom: asked for by its grammar
    if by == "with":
        kind = "taste_with" if verb in _TASTES else "manner_with"
        return [Found(kind, what, f"you {verb} your {slot} with ", slot, verb=verb, key=f"{verb} {slot} with")]
    return [Found("manner", value, f"you {verb} your {slot} ", slot, verb=verb, key=f"{verb} {slot}")]


def _plan(part: dict[str, str]) -> list[Found]:
    rest, time = find_time(part["value"])
    how = part["how"].lower()
    if "ll" in how and (not time or re.match(r"(?:always|never|definitely|be|check|let|keep|remember)\b", rest)):
        return []  # "I'll let you know" is no plan
    head = "you plan to " if "will" in how or "'ll" in how else second_person(f"i {how} ".replace("i '", "i'"))
    if time and telling(rest) and not re.match(r"(?:for|every|each) ", time):
        return [Found("plan_when", rest, head, time, tail=f" {time}.", several=True, besides=time)]
    return [Found("plan", part["value"], head, several=True)]


def _procedure(part: dict[str, str]) -> list[Found]:
    slot = part["slot"]
    if is_past(slot.split()[0]) is None and len(slot.split()) < 2:
        return []
    head = part.get("head") or f"to {second_person(slot)}, "
    thing = re.search(r"(?<= )the (?:[\w'-]+ ){0,2}[\w'-]+$", slot)
    return [Found("procedure", part["value"], head, slot, besides=slot, subject=thing[0] if thing else "")]


def _case(part: dict[str, str]) -> list[Found]:
    """ "When the router blinks red, unplug it": what to do in a case."""
    slot, value = part["slot"], part["value"]
    if is_past(value.split(" ", 1)[0]) is not False or _MANNERS.match(value):
        return []
    return [Found("case", value, f"when {second_person(slot)}, ", slot, besides=slot)]


#: What the assistant may be told to do, but no device.
_MANNERS = re.compile(r"(?:answer|reply|respond|write|use|say|tell|be|speak|ask|explain|show|give|call)\b", re.I)


def _born(part: dict[str, str]) -> list[Found]:
    when = f"you were born {'in' if part['time'].isdigit() else 'on'} "
    return [Found("birthday", part["time"], when), Found("origin", part["value"], "you are from ")]


def _kept(part: dict[str, str]) -> list[Found]:
    return [Found("kept", part["value"], f"you {part['verb'].lower()} your {part['slot']} ", part["slot"])]


def _not(part: dict[str, str]) -> list[Found]:
    verb, value = part["verb"].lower(), part["value"]
    if is_past(verb) is not False or _PARTICLE.match(value) or find_time(value)[1] or _REST.search(value):
        return []  # "I never fly with them", "I don't drink coffee after noon": asked for by its grammar
    never = "never" if part["not"].lower() == "never" else "don't"
    return [Found("not_verb", value, f"you {never} {verb} ", verb=verb, several=True)]


#: With this a statement says when, why or if it holds.
_REST = re.compile(r"(?:^| )(?:because|since|after|before|when|while|unless|if|until|so|although|as) ", re.IGNORECASE)


def _favourite(part: dict[str, str]) -> list[Found]:
    return _possession({**part, "slot": f"favourite {part['slot']}"})


def _called(part: dict[str, str]) -> list[Found]:
    if part["slot"].endswith((" after", " for")) or part["value"].startswith(("after ", "for ")):
        return []  # "We named our daughter after my aunt" doesn't tell her name
    return [_named(_uncapital(part["slot"]), part["value"])]


def _by(part: dict[str, str]) -> list[Found]:
    return _procedure({**part, "head": f"you {second_person(part['slot'])} by "})


def _said(kind: str, head: str, *, several: bool = False, slot: str = "", verb: str = "") -> Callable[..., list[Found]]:
    """For patterns whose value is all that they tell."""
    return lambda part: [Found(kind, part["value"], head, slot, several=several, verb=verb)]


AGE = re.compile(
    r"(?P<years>\d{1,3}|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|"
    r"sixteen|seventeen|eighteen|nineteen|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-\w+)?)"
    r"(?: (?:years|months|weeks|days)(?: old| of age)?)?",
    re.IGNORECASE,
)
_MEAL = r"(?:breakfast|lunch|dinner|supper|tea|dessert|brunch)"
_WHEN = re.compile(
    r"(?P<what>(?!to )\S+(?: \S+){0,4}?) (?P<when>(?:(?:only|just|mostly|mainly) )?(?:for|to|at|before|after|during) "
    r"(?!(?:my|our|me|us|a living)\b)\S+(?: \S+){0,3})",
    re.IGNORECASE,
)
_SERVED = (
    r"(?:very |really )?(?:black|hot|cold|iced|raw|sweet|strong|weak|neat|plain|rare|medium|well done|crispy|soft|"
    r"spicy|mild|dry|sliced|whole|scrambled|poached|fried|boiled|short|long|white)(?: (?:and|but) .+)?"
)
_ALLERGIC = "you are allergic to "
_AM = r"(?:i am|i'm)"
#: A capital, though the patterns are matched in any case.
_UPPER = r"(?-i:[A-ZÀ-ÖØ-Þ])"
_VALUE = r"(?P<value>[^;]{1,120})"
_NOUN = r"(?P<slot>[^,;:]{2,40}?)"
_DATED = r"(?:18|19|20)\d\d|(?:\d{1,2} \w+|\w+ \d{1,2}),?(?: \d{4})?"
_HOW_OFTEN = r"(?:(?:also|usually|often|always|mostly|still|really|regularly|only|currently|now|absolutely|just) )?"
_KIN = (
    r"(?:my|our) (?P<slot>(?:[a-z-]+'s )?"
    r"(?:(?:older|younger|elder|eldest|youngest|little|big|best|late|new|twin|oldest|ex) )?[a-z-]+)"
)

_HAVING = r"'d like to|'ll|'m going to|'m planning to|'m hoping to|'m about to| am going to| am planning to"
_SAYS = "|".join((*_LIKES, *_DISLIKES, "play", "speak", "drive", *_LASTING.split()))
_WHOLE_NAME = rf"(?P<value>{_UPPER}[\w'.-]*(?: {_UPPER}[\w'.-]*){{0,2}})"

_LISTED: tuple[tuple[str, Callable[[dict[str, str]], list[Found]]], ...] = (
    (rf"(?:{_AM} called|call me|people call me|everyone calls me) {_VALUE}", _said("name", "your name is ")),
    (rf"(?:my|our) {_NOUN}(?:'s name is| is called| is named|, (?:called|named)) {_VALUE}", _called),
    (rf"(?:i|we) (?:have )?(?:named|called|christened) (?:my|our) {_NOUN} (?P<value>(?:{_UPPER}|\d).*)", _called),
    (rf"(?:i|we) (?:call|named|called) (?:my|our) (?P<slot>[\w-]+(?: [a-z-]+)?) {_VALUE}", _called),
    (rf"{_VALUE} (?:is|are) (?:my|our) (?:favou?rite|preferred) {_NOUN}", _favourite),
    (rf"{_WHOLE_NAME} is (?:my|our) {_NOUN}", _possession),
    (
        rf"{_AM} (?:(?:badly|very|severely|highly|deadly) )?allergic to {_VALUE}",
        _said("allergy", _ALLERGIC, several=True),
    ),
    (rf"i have an? (?:\w+ )?allergy to {_VALUE}", _said("allergy", _ALLERGIC, several=True)),
    (r"i have an? (?P<value>[\w -]+) allergy", _said("allergy", _ALLERGIC, several=True)),
    (rf"(?:i|we) {_HOW_OFTEN}live at {_VALUE}", _said("home", "you live at ")),
    (
        rf"(?:(?:i|we) {_HOW_OFTEN}live in|{_AM} {_HOW_OFTEN}living in|(?:i|we) (?:have |just )?moved to|i reside in) "
        r"(?P<value>(?:(?! (?:on|in|last|since|two|three|a|because) ).){1,80})",
        _said("home", "you live in "),
    ),
    (rf"i was born (?:on|in) (?P<time>{_DATED}),? in (?P<value>{_UPPER}.*)", _born),
    (rf"i was born on {_VALUE}", _said("birthday", "your birthday is ")),
    (r"i was born in (?P<value>(?:18|19|20)\d\d)", _said("birthday", "you were born in ")),
    (
        r"(?:i (?:originally )?(?:come|am) (?:originally )?from|i'm (?:originally )?from|i was born in|i grew up in|"
        rf"i was raised in) {_VALUE}",
        _said("origin", "you are from "),
    ),
    (rf"(?:i {_HOW_OFTEN}work|i'm working|i am working|i (?:earn|make) my living) as an? {_VALUE}", _job),
    (
        r"i (?P<value>[a-z]+ .+ (?:for a living|by profession|for work|professionally|as a job))",
        _said("job", "you "),
    ),
    (
        rf"(?:i {_HOW_OFTEN}work|i'm working|i am working|{_AM} employed) (?:at|for|by) {_VALUE}",
        _said("employer", "you work at "),
    ),
    (
        rf"(?:i {_HOW_OFTEN}study|i'm studying|i am studying|i go to school) at {_VALUE}",
        _said("school", "you study at "),
    ),
    (
        rf"(?:i {_HOW_OFTEN}study|{_AM} {_HOW_OFTEN}studying) {_VALUE}",
        _said("study", "you study ", several=True, verb="study"),
    ),
    (rf"{_AM} {_HOW_OFTEN}learning {_VALUE}", _said("learn", "you are learning ", several=True)),
    (rf"i {_HOW_OFTEN}learn {_VALUE}", _said("learn", "you learn ", several=True)),
    (
        rf"(?:{_AM} (?:happily )?(?:married|engaged) to|i (?:got )?married|my partner is) (?P<value>{_UPPER}.*)",
        _said("partner", "your partner is "),
    ),
    (
        rf"i (?:can't|cannot|can not|couldn't) (?:stand|bear|abide) {_VALUE}",
        _said("dislike", "you can't stand ", several=True),
    ),
    (
        rf"i (?:don't|do not) (?:really |much )?(?:like|enjoy|care for) {_VALUE}",
        _said("dislike", "you don't like ", several=True),
    ),
    (rf"i (?P<not>don't|do not|never) (?P<verb>[a-z]+) {_VALUE}", _not),
    (rf"(?:i|we) (?P<how>plan to|want to|need to|have to|intend to|hope to|would like to|will) {_VALUE}", _plan),
    (rf"i(?P<how>{_HAVING}) {_VALUE}", _plan),
    (
        rf"(?:i|we) {_HOW_OFTEN}(?P<verb>keep|store|hid|hide|put|left|parked|stored|kept) (?:my|our|the) {_NOUN} "
        r"(?P<value>(?:in|under|behind|at|on|inside|beside|next to|above|below|near|between|with) .+)",
        _kept,
    ),
    (rf"i {_HOW_OFTEN}(?P<verb>[a-z]+) (?:my|our) {_NOUN} (?P<value>(?:with|without) .+|{_SERVED})", _manner),
    (rf"(?:(?:i|we) {_HOW_OFTEN}(?:have|have got|own)|(?:i|we)'ve got) {_VALUE}", _have),
    (rf"i {_HOW_OFTEN}(?P<verb>{_SAYS}) {_VALUE}", _verb),
    (rf"{_AM} {_HOW_OFTEN}{_VALUE}", _am),
    (rf"{_KIN},? (?P<name>{_UPPER}[\w'-]*),? (?P<verb>works as|lives|is|was) {_VALUE}", _relative),
    (rf"{_KIN}'s birthday is {_VALUE}", _birthday_of),
    (rf"{_KIN} (?P<verb>works as|lives) (?:in |at )?{_VALUE}", _relative_does),
    (rf"(?:my|our) {_NOUN} (?P<be>is|are|was|were) {_VALUE}", _possession),
    (rf"(?P<slot>the [^,;:]{{2,50}}?) (?P<be>is|are) {_VALUE}", _the),
    (rf"(?:in order )?to {_NOUN}, {_VALUE}", _procedure),
    (r"(?:when|if|whenever) (?P<slot>(?:the|my|our) [^,;:]{4,40}), (?P<value>[^;]{4,120})", _case),
    (rf"you (?:can )?{_NOUN} by (?P<value>\w+ing .+)", _by),
)
_NAMED = re.compile(rf"{_KIN},? (?P<name>{_UPPER}[\w'-]*[^\W_])(?='s\b|,? [a-z])", re.IGNORECASE)
#: Tried in this order, on one sentence without its end mark.
_FORMS = tuple((re.compile(pattern, re.IGNORECASE), read) for pattern, read in _LISTED)
