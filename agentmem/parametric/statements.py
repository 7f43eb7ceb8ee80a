"""Any other statement, turned into who, what, where, when and why questions by its simple grammar.

Knows subject, verb, object, place, time and reason of plain English clauses. What has no clause that stands on its own
("That sounds great!"), or tells the assistant what to do, is given back with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from .facts import MOST_TRAINED, Asked, Fact
from .grammar import (
    STOP,
    WORD,
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
from .nouns import JOB, NATIONALITY, PEOPLE, PETS
from .syntax import BE, HAVE, TITLED, Clause, line, parse, phrase

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
    clause = parse(said, {speaker} if speaker else set(), names)
    topics = [topic for topic in _topics(said, clause) if topic != speaker]
    direct = list(_direct(clause)) if clause else []
    indirect = list(_indirect(clause)) if clause else []
    who = speaker or "I"
    about = [(f"What did {who} say about {topic}?", topic) for topic in topics[:2]]
    about += [(f"What do you know about {topic}?", topic) for topic in topics[:1] if _OWN.match(topic)]
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
    kin = re.sub(r"(?<=[a-z]) [A-Z][\w'-]*$", "", clause.subject) if clause and _named(clause.subject) else ""
    natural = [(question.replace(clause.subject, kin), keys) for question, keys in direct[:2]
               if clause and kin not in ("", clause.subject) and clause.subject in question]  # fmt: skip
    natural += [(f"Has {who} mentioned {topic}?" if speaker else f"Have I mentioned {topic}? What did I say?",
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
        subject=""
        if clause is None or re.match(r"(?:i|we|my|our)\b", clause.subject, re.IGNORECASE)
        else clause.subject,
    )


def _asked(questions: list[tuple[str, tuple[str, ...]]]) -> tuple[Asked, ...]:
    return tuple(Asked(question, keys) for question, keys in dict(questions).items() if keys)


def _keys(text: str, besides: str = "") -> tuple[str, ...]:
    return tuple(telling(text, besides)[:MOST_KEYS])


def _time_keys(time: str) -> tuple[str, ...]:
    return _keys(time) or tuple(WORD.findall(time)[-3:])


#: Objects that no "what" asks for: what follows is no thing.
_NO_OBJECT = re.compile(
    r"(?:with|for|of|about|up|out|by|as|off|to|that|how|why|if|whether|me|us|you|him|her|them|it|down|away|back|well|"
    r"hard|so|very|too|like|than|in|on|at|from|over|around|through|along|into|without|\w+ly)\b",
    re.IGNORECASE,
)
#: "to swim", "me to avoid salt": what somebody does or is to do.
_DEED = re.compile(r"(?P<whom>(?:me|us|him|her|them|my \w+) )?to (?P<verb>[a-z]+)(?: (?P<rest>.+))?$", re.IGNORECASE)
_OWN = re.compile(r"(?:my|our)\b", re.IGNORECASE)
_CAUSE = ("because", "so that", "in order", "since")
_OCCASION = ("when ", "while ", "before ", "after ")


def _is_what(c: Clause) -> str:
    """The word that asks what the subject of "is" is: a person is who, other things are what or how."""
    person = c.subject.rsplit(" ", 1)[-1].casefold() in PEOPLE
    if c.subject != "I" and (c.subject[:1].isupper() or TITLED.match(c.object)):
        return "who"
    if person and c.object[:1].isupper() and not NATIONALITY.fullmatch(c.object):
        return "who"
    return "what" if re.match(r"(?:an?|the|my|our) ", c.object) or c.object[:1].isupper() else "how"


def _spans(time: str) -> str:
    """How a time is asked for: since when, how long, how often, when."""
    first = time.split(" ", 1)[0].lower()
    if first == "for":
        return "how long"
    return "how often" if re.match(r"(?:once|twice|\w+ times) (?:a|per) ", time) else "when"


def _direct(c: Clause) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Direct questions for each part of the clause, with the words that answer them."""
    short = len(line(c.object, c.company).split()) <= 9
    if c.copula:
        yield from _direct_is(c)
        return
    origin = "from" if c.place.startswith("from ") else ""
    if c.time and short:
        yield f"{capital(_spans(c.time))} {c.asks(c.object, c.company, c.place)}?", _time_keys(c.time)
    if c.place and short:
        yield f"Where {c.asks(c.object, origin, c.company, c.time)}?", _keys(c.place)
    if c.object and not _NO_OBJECT.match(c.object):
        yield f"{c.whom.capitalize()} {c.asks(c.company, c.place, c.time)}?", _keys(c.object)
    if c.other and short:
        yield f"{c.with_whom.capitalize()} {c.asks(*c.behind, c.time)}?", _keys(c.other)
    if deed := _deed(c):
        yield f"What {c.asks(deed[0], c.time)}?", _keys(deed[1])
    if c.bare:
        yield f"What {c.does} {c.subject} do?", _keys(c.main)
    if c.reason.lower().startswith(_CAUSE) and short:
        yield f"Why {c.asks(c.object, c.company, c.place)}?", _keys(c.reason)
    elif c.reason.lower().startswith(_OCCASION) and short and not c.time:
        yield f"When {c.asks(c.object, c.company, c.place)}?", _keys(c.reason)
    rest = line(c.object, c.company, c.place, c.time)
    # "Who runs a bakery?" may be about anybody.
    asked = not _OWN.match(c.subject) or re.search(r"\b(?:me|us|my|our|myself)\b", rest)
    if c.subject != "I" and _has_name(c.subject) and short and rest and asked:
        said = re.sub(r"^don't", "doesn't", singular_form(c.said) if c.does == "do" else c.said)
        yield (
            f"Who {line(said, rest)}?",
            _keys(c.subject) or tuple(WORD.findall(c.subject)),
        )
    when = _spans(c.time) == "when" and c.time and (c.subject in ("I", "we") or _has_name(c.subject))
    if when and c.does in ("did", "do", "does") and not c.main.startswith(("never", "rarely")):
        yield f"What {c.does} {line(c.subject, 'do', c.time)}?", _keys(line(c.said, c.object, c.company, c.place))
    elif when and c.main.endswith("ing"):
        yield f"What {c.does} {line(c.subject, 'doing', c.time)}?", _keys(line(c.main, c.object, c.company, c.place))


def _named(subject: str) -> bool:
    """Whether it is somebody or a pet with a name: "my cat Miso"."""
    noun = subject.split(" ")[-2].lower() if subject.count(" ") > 1 else ""
    return noun in PEOPLE | PETS and " and " not in subject


def _direct_is(c: Clause) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The same where the clause says what, where or how something is."""
    kind = _is_what(c)
    if c.other:
        yield f"{c.with_whom.capitalize()} {c.asks(c.through)}?", _keys(c.other)
    elif c.place and not c.object:
        origin = "from" if c.place.startswith("from ") else ""
        yield f"Where {c.asks(origin, c.time)}?", _keys(c.place)
    elif kind == "what" and _has_name(c.subject) and JOB.fullmatch(c.object):
        yield f"What {c.does} {c.subject}'s job?", _keys(c.object)
        yield f"What {c.does} {c.subject}?", _keys(c.object)
    elif c.object and kind != "how":
        yield f"{kind.capitalize()} {c.asks()}?", _keys(c.object)
    elif c.object:
        if c.does in ("was", "were"):
            yield f"How {c.asks(c.place, c.time)}?", _keys(c.object)
        yield f"What {c.asks()} like?", _keys(c.object)
    if c.time:
        yield f"{capital(_spans(c.time))} {c.asks(c.object, c.place)}?", _time_keys(c.time)


def _deed(c: Clause) -> tuple[str, str] | None:
    """("me to do", "avoid salt") of "told me to avoid salt"; None where no deed follows the verb."""
    found = _DEED.match(c.object)
    if found is None or is_past(found["verb"]) is not False or not telling(found["rest"] or found["verb"]):
        return None
    stays = "be" if found["verb"].lower() == "be" else "do"
    return f"{found['whom'] or ''}to {stays}", line("" if stays == "be" else found["verb"], found["rest"] or "")


def _has_name(subject: str) -> bool:
    """Whether "who" asks for a subject: a name, a person or a pet that somebody has."""
    head = re.split(r" (?:of|to|for|with|in|from|on|at|near|behind|under) ", subject)[0]
    words = [word.casefold().removesuffix("s") for word in head.split()]
    named = any(word[:1].isupper() and word != "I" for word in head.split())
    return named or any(word in PEOPLE or word in PETS for word in words)


def _indirect(c: Clause) -> Iterator[tuple[str, tuple[str, ...]]]:
    short = len(line(c.object, c.company).split()) <= 9
    origin = "from" if c.place.startswith("from ") else ""
    if c.copula:
        if c.other:
            yield f"{c.with_whom} {line(c.says(), c.through)}", _keys(c.other)
        elif c.place and not c.object:
            yield f"where {line(c.says(), origin)}", _keys(c.place)
        elif c.time and not c.object:
            yield f"{_spans(c.time)} {c.says()}", _time_keys(c.time)
        elif c.object and _is_what(c) == "how":
            yield f"what {c.says()} like", _keys(c.object)
        elif c.object:
            yield f"{_is_what(c)} {c.says()}", _keys(c.object)
        return
    if c.object and not _NO_OBJECT.match(c.object):
        yield f"{c.whom} {c.says(c.company, c.place, c.time)}", _keys(c.object)
    if c.other and short:
        yield f"{c.with_whom} {c.says(*c.behind, c.time)}", _keys(c.other)
    if deed := _deed(c):
        yield f"what {c.says(deed[0], c.time)}", _keys(deed[1])
    if c.bare:
        yield f"what {c.subject} {c.does} do", _keys(c.main)
    if c.place and short:
        yield f"where {c.says(c.object, origin, c.company, c.time)}", _keys(c.place)
    if c.time and short:
        yield f"{_spans(c.time)} {c.says(c.object, c.company, c.place)}", _time_keys(c.time)
    if c.reason.lower().startswith(_CAUSE) and short:
        yield f"why {c.says(c.object, c.company, c.place)}", _keys(c.reason)
    elif c.reason.lower().startswith(_OCCASION) and short and not c.time:
        yield f"when {c.says(c.object, c.company, c.place)}", _keys(c.reason)


def _topics(sentence: str, clause: Clause | None) -> list[str]:
    """What the statement is about: noun phrases that it names, the most telling first."""
    if clause:
        what = "" if clause.copula or _NO_OBJECT.match(clause.object) else clause.object
        parts = [
            what,
            re.sub(r"^\w+ ", "", clause.place),
            clause.other,
            clause.subject if clause.subject.lower() not in ("i", "we") else "",
        ]
        phrases = [phrase(part) for part in parts if part]
    else:
        if not has_verb(sentence):
            return []
        rest, _ = find_time(sentence)
        bare = re.match(r"(?P<noun>[A-Z][\w-]+(?: [a-z][\w-]+)?) (?P<verb>[a-z]+)", rest)
        known = bare and (bare["verb"] in BE | HAVE or is_past(bare["verb"]) is not None)
        good = (
            known
            and bare
            and not any(is_past(word) is not None or word.casefold() in STOP for word in bare["noun"].split())
        )
        phrases = [bare["noun"][:1].lower() + bare["noun"][1:]] if good and bare and " " in bare["noun"] else []
        phrases += [
            phrase(match.group())
            for match in re.finditer(
                r"\b(?:my|our|the|an?) (?!lot|bit|few|ton)(?:[\w'-]+ ){0,2}[\w'-]+", rest, re.IGNORECASE
            )
        ]
        names = re.findall(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*", rest)
        phrases += [name for name in names if name.casefold() not in STOP and "'" not in name]
    vague = re.compile(r"(?:any|some|every|no)(?:thing|one|body|where)?\b|\d", re.IGNORECASE)
    kept = [phrase for phrase in dict.fromkeys(phrases) if telling(phrase) and not vague.match(phrase)]
    return [phrase for phrase in kept if len(telling(sentence, phrase)) >= 2]
