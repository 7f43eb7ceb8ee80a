"""Any other statement, turned into who, what, where, when and why questions by its simple grammar.

Knows subject, verb, object, place, time and reason of plain English clauses. What has no clause that stands on its own
("That sounds great!"), or tells the assistant what to do, is given back with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from .facts import MOST_TRAINED, Asked, Fact
from .grammar import (
    STOP,
    WORD,
    base_form,
    capital,
    find_time,
    fold,
    has_verb,
    is_past,
    of_another,
    second_person,
    singular_form,
    telling,
    words,
)
from .nouns import PEOPLE, PETS

__all__ = ["analyse", "unusable"]

#: Words that an answer is known by, at most.
MOST_KEYS = 5

_LEANING = words("leaning")
_COMMAND = re.compile(
    r"(?:please|always|never|don't|do not|from now on|in (?:the )?future|whenever (?:i|you)|when (?:you|i) |if (?:i|"
    r"you) |"
    r"you|you're|you've|you'll|your|answer|reply|respond|write|use|be|make|try|tell|give|explain|show|stop|avoid|let's|"
    r"let me|keep|take|have (?:a|fun)|thank|thanks|good luck|remember to|forget|congrats|congratulations|enjoy|"
    r"can't wait|"
    r"sounds|looks|glad|happy to|sorry|sure|of course|no worries|take care)\b",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"\b(?:you|your|yours|yourself)\b", re.IGNORECASE)
#: A pronoun with nothing before it that it could stand for.
_OPEN_END = re.compile(
    r"^(?!.*\b(?:an?|the|my|our) .*\b(?:it|them|him|her|there)\b).*\b(?:it|them|him|there|something|someone|"
    r"somewhere|one|stuff)\b"
    r"|\b(?:this|these|those|such)\b|\b(?:of|on|in|to|like|love|all|about|for|with|at) that\b",
    re.IGNORECASE,
)
_MOOD = re.compile(
    r"(?:i am|i'm|i was|we are|we're|we were) (?:\w+ly |so |very |super |just |too |not |also |still )*(?:glad|happy|"
    r"sad|excited|"
    r"stoked|sorry|sure|grateful|thankful|thrilled|nervous|worried|tired|curious|fine|ok|okay|good|great|well|here|"
    r"back|ready|busy|"
    r"lucky|hopeful|pumped|blessed|feeling|hoping|looking forward|thinking|trying|wondering|amazed|impressed|honored|"
    r"proud of)\b"
    r"|i (?:hope|wish|think|guess|feel|felt|appreciate|agree|understand|know|mean|bet|see|can imagine|believe)\b",
    re.IGNORECASE,
)
_OPINION = re.compile(
    r"\b(?:is|are|was|were|been|be)\b (?:\w+ly |so |such |super |pretty |quite |very |too |also |kinda |"
    r"an? )*(?:\w+ )?(?:great|awesome|amazing|nice|cool|fun|good|bad|wonderful|lovely|perfect|"
    r"incredible|fantastic|tough|hard|important|crucial|key|worth|special|powerful|inspiring|rewarding|beautiful|"
    r"awful|magical|gorgeous|"
    r"difficult|challenging|exciting|thrilling|bright|cute|pretty|strong)\b|\b(?:is|are) (?:so|such|super)\b|!$",
    re.IGNORECASE,
)
_BE = frozenset(("am", "is", "are", "was", "were"))
#: Participles that are no past form: after "have" only.
_PARTICIPLES = frozenset(
    (
        "been",
        "done",
        "gone",
        "seen",
        "taken",
        "given",
        "written",
        "driven",
        "known",
        "grown",
        "spoken",
        "worn",
        "eaten",
        "begun",
        "sung",
    )
)
_HAVE = frozenset(("have", "has", "had"))
_MODALS = frozenset(
    ("can", "could", "will", "would", "must", "should", "may", "might", "can't", "couldn't", "won't", "wouldn't")
)
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
    r"myself|first|least|last|once|time|future|past|present|way|mood|\d[\w.,]*|(?:mon|tues|wednes|thurs|fri|satur|"
    r"sun)days?|"
    r"euros?|pounds?|dollars?|percent|\w+ing)",
    re.IGNORECASE,
)
_NO_OBJECT = re.compile(
    r"(?:with|for|of|about|up|out|by|as|off|to|that|how|why|if|whether|me|us|you|him|her|them|it|down|away|back|well|"
    r"hard|so|very|"
    r"too|like|than|in|on|at|from|over|around|through|along|into|\w+ly)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Clause:
    """A plain clause. ``does`` is its finite verb as a question needs it in front ("did", "am", "have"), ``main`` the
    verb that then follows the subject; ``said`` both as they stand in the statement. ``object`` is what follows without
    place, time and reason; ``copula`` where it says what the subject is.
    """

    subject: str
    does: str
    main: str
    said: str
    object: str
    place: str
    time: str
    reason: str
    copula: bool = False

    @property
    def whom(self) -> str:
        """How its object is asked for."""
        head = _phrase(self.object).rsplit(" ", 1)[-1]
        named = head[:1].isupper() and self.main in _WITH_PEOPLE
        return "who" if named or head.lower() in PEOPLE else "what"

    def asks(self, *rest: str) -> str:
        """As a direct question goes on: "did I plant in the garden"."""
        return _line(self.does, self.subject, self.main, *rest)

    def says(self, *rest: str) -> str:
        """As an indirect question goes on: "I planted in the garden"."""
        if self.copula:
            return _line(self.subject, *rest, self.said)
        return _line(self.subject, self.said, *rest)


def unusable(sentence: str, *, speaker: str = "") -> str | None:
    """Why nothing can be asked of a sentence; None if something may be. ``speaker``: it was said in a talk."""
    if len(telling(sentence)) < 2:
        return "it says too little to be asked for"
    if _COMMAND.match(sentence) or _ADDRESS.search(sentence):
        return "it tells the assistant what to do or speaks to somebody: that is no fact about the user"
    first = WORD.findall(sentence)[0].casefold().partition("'")[0]
    if first in _LEANING or _OPEN_END.search(sentence):
        return "it leans on what was said before it"
    if _MOOD.match(sentence) or (speaker and _OPINION.search(sentence)):
        return "it is a mood or an opinion of the moment"
    return None


def analyse(sentence: str, *, speaker: str = "", names: Container[str] = ()) -> Fact | None:
    """The fact of a plain statement; None where no question can be made.

    With ``speaker``, "I" is that person, and the answer says so; else it is the user. ``names`` are single words that
    are known to name somebody, wherever they stand.
    """
    said = of_another(sentence, speaker) if speaker else sentence
    clause = _clause(said, {speaker} if speaker else set(), names)
    topics = [topic for topic in _topics(said, clause) if topic != speaker]
    direct = list(_direct(clause)) if clause else []
    indirect = list(_indirect(clause)) if clause else []
    who = speaker or "I"
    about = [(f"What did {who} say about {topic}?", topic) for topic in topics[:2]]
    about += [(f"What do you know about {topic}?", topic) for topic in topics[:1]]
    about += [(f"What did {who} tell you about {topic}?", topic) for topic in topics[:1]]
    cues = [(question, _keys(said, topic)) for question, topic in about]
    trained = [*direct[:3], *((f"Tell me {question}.", keys) for question, keys in indirect[:2])]
    trained += [
        *cues[:2],
        *((f"Do you know {question}?", keys) for question, keys in indirect[:1]),
        *direct[3:],
        *cues[2:],
    ]
    held_out = [(f"Remind me {question}.", keys) for question, keys in indirect[:2]]
    held_out += [(f"Can you say {question}?", keys) for question, keys in indirect[:1]]
    if not held_out:
        held_out = [(f"Remind me what {who} said about {topic}.", _keys(said, topic)) for topic in topics[:1]]
        held_out += [(f"Do you remember what {who} said about {topic}?", _keys(said, topic)) for topic in topics[:1]]
    natural = [(f"Has {who} mentioned {topic}?" if speaker else f"Have I mentioned {topic}? What did I say?",
                _keys(said, topic)) for topic in topics[:1] if clause]  # fmt: skip
    if not any(keys for _, keys in trained):
        return None
    answer = capital(said if speaker else second_person(sentence))
    return Fact(
        key="said " + fold(said).strip(),
        kind="clause" if direct else "topic",
        head="",
        values=(answer,),
        tail=".",
        trained=_asked(trained)[:MOST_TRAINED],
        held_out=_asked(held_out),
        natural=_asked(natural),
    )


def _asked(questions: list[tuple[str, tuple[str, ...]]]) -> tuple[Asked, ...]:
    return tuple(Asked(question, keys) for question, keys in dict(questions).items() if keys)


def _keys(text: str, besides: str = "") -> tuple[str, ...]:
    return tuple(telling(text, besides)[:MOST_KEYS])


def _time_keys(time: str) -> tuple[str, ...]:
    return _keys(time) or tuple(WORD.findall(time)[-3:])


def _line(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _clause(sentence: str, speakers: set[str], names: Container[str]) -> _Clause | None:
    """The parts of a sentence that is one plain clause, else None."""
    main, reason = sentence, ""
    if cut := _REASON.search(sentence):
        main, reason = sentence[: cut.start()], sentence[cut.start() :].strip(" ,")
    rest, time = find_time(main)
    first, _, others = rest.partition(" ")
    rest = _line(_SHORT.get(first.lower(), first), others)
    words = rest.split()
    for length in range(1, min(6, len(words))):
        subject = _subject(words[:length])
        if length == 1 and subject not in ("", "I", "we") and subject not in speakers and subject not in names:
            continue
        found = _verb(subject, words[length:]) if subject else None
        if found is None:
            continue
        does, verb, said, after, copula = found
        place, what = _place(after)
        if what.split(" ", 1)[0] in speakers:  # "gives Caroline much joy": Caroline is not what is given
            return None
        what = what.strip(" ,-")
        mood = (subject == "I" or subject in speakers) and not place and not re.match(r"(?:an?|the|my|our) ", what)
        if copula and (mood or not (what or place or time)):
            return None
        time = time[:1].lower() + time[1:] if time[:3].lower() in ("on ", "in ", "at ") else time
        return _Clause(subject, does, verb, said, what, place, time, reason, copula)
    return None


def _subject(words: list[str]) -> str:
    """The words as a subject, if they can be one."""
    first = words[0].casefold()
    if any(
        word.casefold() in STOP | _ADVERBS
        for word in words[1:]
        if word.casefold() not in ("and", "i", "of", "my", "the")
    ):
        return ""
    if words[-1].casefold() in ("and", "of", "my", "the", "our"):
        return ""
    if first in ("i", "we"):
        return ("I" if first == "i" else "we") if len(words) == 1 else ""
    if is_past(first) is not None:  # "Makes Caroline happy", "Wish I had"
        return ""
    if first in ("my", "our", "the"):
        return _line(first, *words[1:]) if len(words) > 1 else ""
    named = all(word[:1].isupper() or word in ("and", "my", "the", "of") for word in words) and first not in STOP
    return _line(*words) if named and words[0].isascii() == words[0].isascii() and len(words[0]) > 1 else ""


def _verb(subject: str, words: list[str]) -> tuple[str, str, str, str, bool] | None:
    """(what a question puts in front, the verb that stays, both as said, what follows, copula) of a predicate."""
    adverbs: list[str] = []
    while words and words[0].casefold() in _ADVERBS:
        adverbs += [word for word in words[:1] if word.casefold() in _WEIGHTY]
        words = words[1:]
    if not words:
        return None
    verb = words[0].lower()
    if verb in _BE | _HAVE | _MODALS:
        more = [word for word in words[1:2] if word.casefold() in _ADVERBS or word == "not"]
        rest = words[1 + len(more) :]
        follows = rest[0].lower() if rest else ""
        joined = (
            verb in _MODALS
            or (verb in _HAVE and (is_past(follows) or follows == "been"))
            or (verb in _BE and (follows.endswith("ing") or (is_past(follows) and follows.endswith(_PASSIVE))))
        )
        if follows == "been" and len(rest) > 1 and rest[1].endswith("ing"):
            return (
                verb,
                _line(*more, "been", rest[1]),
                _line(*adverbs, verb, *more, "been", rest[1]),
                _line(*rest[2:]),
                False,
            )
        if joined and follows:
            main = _line(*more, *rest[:1])
            return verb, main, _line(*adverbs, verb, main), _line(*rest[1:]), False
        if verb in _BE:
            return verb, "", _line(*adverbs, verb, *more), _line(*rest), True
        if verb not in _HAVE:
            return None
    past = is_past(verb)
    if (
        past is None
        or verb in _PARTICIPLES
        or words[0][:1].isupper()
        or (adverbs and adverbs[0].casefold() in ("never", "rarely"))
    ):
        return None
    many = subject in ("I", "we") or " and " in subject or verb == base_form(verb)
    does = "did" if past else "do" if many else "does"
    return does, base_form(verb), _line(*adverbs, words[0]), _line(*words[1:]), False


def _place(after: str) -> tuple[str, str]:
    for match in _PLACE.finditer(after):
        if not _NOT_PLACES.fullmatch(match["noun"]):
            return match["place"], _line(after[: match.start()].strip(" ,"), after[match.end() :].strip(" ,"))
    return "", after.strip(" ,")


def _direct(c: _Clause) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Direct questions for each part of the clause, with the words that answer them."""
    short = len(c.object.split()) <= 9
    person = c.subject != "I" and _is_person(c.subject)
    if c.copula:
        if c.place and not c.object:
            origin = "from" if c.place.startswith("from ") else ""
            yield f"Where {c.asks(origin, c.time)}?", _keys(c.place)
        elif re.match(r"(?:an?|the|my|our) ", c.object) or c.object[:1].isupper():
            yield f"{'Who' if c.subject[:1].isupper() and c.subject != 'I' else 'What'} {c.asks()}?", _keys(c.object)
        elif c.object:
            yield f"How {c.asks(c.place, c.time)}?", _keys(c.object)
            yield f"What {c.asks()} like?", _keys(c.object)
        if c.time:
            yield f"When {c.asks(c.object, c.place)}?", _time_keys(c.time)
        return
    if c.time and short:
        yield f"When {c.asks(c.object, c.place)}?", _time_keys(c.time)
    if c.place and short:
        yield f"Where {c.asks(c.object, c.time)}?", _keys(c.place)
    if c.object and not _NO_OBJECT.match(c.object):
        yield f"{c.whom.capitalize()} {c.asks(c.place, c.time)}?", _keys(c.object)
    if c.reason.lower().startswith(("because", "so that", "in order", "since")) and short:
        yield f"Why {c.asks(c.object, c.place)}?", _keys(c.reason)
    elif c.reason.lower().startswith(("when ", "while ", "before ", "after ")) and short and not c.time:
        yield f"When {c.asks(c.object, c.place)}?", _keys(c.reason)
    if person:
        who = _keys(c.subject) or tuple(WORD.findall(c.subject))
        if short and (c.object or c.place or c.time):
            said = singular_form(c.said) if c.does == "do" else c.said
            yield f"Who {_line(said, c.object, c.place, c.time)}?", who
    if c.does in ("did", "do", "does") and c.time:
        yield f"What {c.does} {_line(c.subject, 'do', c.time)}?", _keys(_line(c.said, c.object, c.place))
    elif c.main.endswith("ing") and (c.time or c.does in _BE):
        yield f"What {c.does} {_line(c.subject, 'doing', c.time)}?", _keys(_line(c.main, c.object, c.place))


def _is_person(subject: str) -> bool:
    """Whether "who" asks for it: a name, a person or a pet that somebody has."""
    words = [word.casefold().removesuffix("s") for word in subject.split()]
    named = any(word[:1].isupper() and word != "I" for word in subject.split())
    return named or any(word in PEOPLE or word in PETS for word in words)


def _indirect(c: _Clause) -> Iterator[tuple[str, tuple[str, ...]]]:
    short = len(c.object.split()) <= 9
    if c.copula:
        if c.place and not c.object:
            yield f"where {c.says()}{' from' if c.place.startswith('from ') else ''}", _keys(c.place)
        elif c.time and not c.object:
            yield f"when {c.says()}", _time_keys(c.time)
        elif c.object:
            yield (
                f"{'what' if re.match(r'(?:an?|the|my|our) |(?-i:[A-Z])', c.object) else 'how'} {c.says()}",
                _keys(c.object),
            )
        return
    if c.object and not _NO_OBJECT.match(c.object):
        yield f"{c.whom} {c.says(c.place, c.time)}", _keys(c.object)
    if c.place and short:
        yield f"where {c.says(c.object, c.time)}", _keys(c.place)
    if c.time and short:
        yield f"when {c.says(c.object, c.place)}", _time_keys(c.time)
    if c.reason.lower().startswith(("because", "so that", "in order", "since")) and short:
        yield f"why {c.says(c.object, c.place)}", _keys(c.reason)


def _topics(sentence: str, clause: _Clause | None) -> list[str]:
    """What the statement is about: noun phrases that it names, the most telling first."""
    if clause:
        what = "" if _NO_OBJECT.match(clause.object) else clause.object
        parts = [
            what,
            re.sub(r"^\w+ ", "", clause.place),
            clause.subject if clause.subject.lower() not in ("i", "we") else "",
        ]
        phrases = [_phrase(part) for part in parts if part]
    else:
        if not has_verb(sentence):
            return []
        rest, _ = find_time(sentence)
        bare = re.match(r"(?P<noun>[A-Z][\w-]+(?: [a-z][\w-]+)?) (?P<verb>[a-z]+)", rest)
        known = bare and (bare["verb"] in _BE | _HAVE or is_past(bare["verb"]) is not None)
        good = (
            known
            and bare
            and not any(is_past(word) is not None or word.casefold() in STOP for word in bare["noun"].split())
        )
        phrases = [bare["noun"][:1].lower() + bare["noun"][1:]] if good and bare and " " in bare["noun"] else []
        phrases += [
            _phrase(match.group())
            for match in re.finditer(
                r"\b(?:my|our|the|an?) (?!lot|bit|few|ton)(?:[\w'-]+ ){0,2}[\w'-]+", rest, re.IGNORECASE
            )
        ]
        names = re.findall(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*", rest)
        phrases += [name for name in names if name.casefold() not in STOP and "'" not in name]
    kept = [phrase for phrase in dict.fromkeys(phrases) if telling(phrase)]
    return [phrase for phrase in kept if len(telling(sentence, phrase)) >= 2]


def _phrase(text: str) -> str:
    """The noun phrase that ``text`` begins with: up to its first preposition, conjunction or verb, four words long."""
    cut = re.split(
        r"[,;:]| (?:with|of|for|in|at|on|to|from|and|that|which|who|because|about|near|by|but|so|as|when|while|after|"
        r"before|is|was|"
        r"are|were|has|had|have|made|can|will|\w+ed|burnt|got|went|came|took|gave|felt|i|we|you|he|she|it|they) ",
        text,
        maxsplit=1,
        flags=re.IGNORECASE,
    )[0]  # fmt: skip
    words = cut.split()[:4]
    while words and (words[-1].casefold() in STOP | _ADVERBS or is_past(words[-1])):
        words.pop()
    phrase = _line(*words)
    if phrase.split(" ", 1)[0] in ("My", "Our", "The", "A", "An"):
        phrase = phrase[:1].lower() + phrase[1:]
    return "the " + phrase.split(" ", 1)[1] if re.match(r"an? \w", phrase, re.IGNORECASE) else phrase
