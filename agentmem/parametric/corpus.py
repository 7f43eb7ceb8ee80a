"""Turns records into training text: questions whose answer is what a record says, as they are asked in a chat.

Pure and deterministic: no model, no tokenizer, no clock. Knows English statements and their question forms; knows
nothing of training. What can't be asked about, must not be trusted or can't be kept for good is left out, and said.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agentmem.errors import InvalidInput
from agentmem.types import Record

__all__ = ["SYSTEMS", "Corpus", "Example", "build", "record_digest", "second_person"]

#: System texts that examples are set under, in turn, so that what is learnt doesn't hang on one of them. None: the chat
#: template's own.
SYSTEMS: tuple[str | None, ...] = (None, "You are a helpful assistant.")

#: Longer statements are left to recall: a small LoRA keeps their gist at best.
LONGEST_WORDS = 40


@dataclass(frozen=True)
class Example:
    """One question and its answer. ``keys``: the words by which a free answer is known to hold the fact.

    ``records`` are the ids of the records that it was made from.
    """

    question: str
    answer: str
    keys: tuple[str, ...]
    records: tuple[str, ...]
    system: str | None = None

    def found_in(self, text: str) -> bool:
        """True if ``text`` holds the fact: two thirds of the keys, as whole words, in any case."""
        folded = _fold(text)
        return 3 * sum(f" {_fold(key).strip()} " in folded for key in self.keys) >= 2 * len(self.keys)


@dataclass(frozen=True)
class Corpus:
    """What to train on and what to test with.

    ``examples`` are trained. ``held_out`` ask for the same facts in wordings that are never trained, with the same
    words for what is asked for; ``natural`` in other words altogether ("What do I do for a living?"), where there are
    any. ``anchors`` are general questions whose answers must stay the base model's, ``neighbours`` the questions of the
    facts asked about other people, whose answers must stay it too; neither has an answer here. ``records`` maps each
    record that was used to the digest of its content; ``left_out`` says why others were not.
    """

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    natural: tuple[Example, ...]
    anchors: tuple[Example, ...]
    neighbours: tuple[Example, ...]
    records: dict[str, str]
    left_out: tuple[tuple[str, str], ...]

    @property
    def facts(self) -> int:
        """How many different facts are asked for."""
        return len({example.answer for example in self.examples})


def record_digest(text: str) -> str:
    """SHA-256 of a record's text, in hex: what a LoRA version remembers of the content that it learnt."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def build(records: Iterable[Record], *, systems: Sequence[str | None] = SYSTEMS) -> Corpus:
    """The corpus of ``records``. The same records in the same order give the same corpus.

    A statement such as "My dog is called Biscuit", "I'm allergic to peanuts", "I live in Tromsø" or "My favourite tea
    is sencha" is asked for by several wordings of its own. Any other statement takes a generic form: "What did I tell
    you about <its first telling words>?", answered by the statement itself in the second person. Two records that
    answer the same question differently contradict each other: the later one is learnt; where both can hold ("I like
    tea", "I like chess") they are asked for together.

    Raises `InvalidInput` if ``systems`` is empty.
    """
    if not systems:
        raise InvalidInput("systems is empty: pass at least one system text, or None for the chat template's own")
    chosen = sorted(records, key=_order)
    speakers = {record.name for record in chosen if record.name}
    facts: dict[str, _Fact] = {}
    left_out: list[tuple[str, str]] = []
    used: dict[str, str] = {}
    for record in chosen:
        why = _unfit(record)
        statements = [] if why else _statements(record.text)
        found = [fact for text in statements if (fact := _fact(record, text, several=len(speakers) > 1))]
        if not found:
            left_out.append((record.id, why or "it states nothing that can be asked for"))
            continue
        used[record.id] = record_digest(record.text)
        for fact in found:
            facts[fact.key] = fact if fact.key not in facts else facts[fact.key].joined(fact)
    kept = {record for fact in facts.values() for record in fact.records}
    left_out += [(id_, "a later record says otherwise") for id_ in used if id_ not in kept]
    examples, held_out = _examples(facts.values(), systems)
    return Corpus(
        examples=examples,
        held_out=held_out,
        natural=(),
        anchors=_still(_GENERAL, systems),
        neighbours=_neighbours(facts.values(), systems),
        records={id_: digest for id_, digest in used.items() if id_ in kept},
        left_out=tuple(left_out),
    )


@dataclass(frozen=True)
class _Fact:
    """One fact before it is worded. ``key`` is the question it answers; ``several``: it may have several values."""

    key: str
    form: _Form
    slot: str
    values: tuple[str, ...]
    keys: tuple[str, ...]
    records: tuple[str, ...]
    said: str

    def joined(self, later: _Fact) -> _Fact:
        if later.values[0] not in self.values and not self.form.several:
            return later
        return replace(
            self,
            values=tuple(dict.fromkeys(self.values + later.values)),
            keys=tuple(dict.fromkeys(self.keys + later.keys)),
            records=tuple(dict.fromkeys(self.records + later.records)),
        )

    def word(self, pattern: str, **others: str) -> str:
        value = self.values[0] if len(self.values) == 1 else ", ".join(self.values[:-1]) + " and " + self.values[-1]
        return pattern.format(slot=self.slot, value=value, said=self.said, **others)


@dataclass(frozen=True)
class _Form:
    """How one kind of statement is recognised and asked for.

    ``{slot}`` is what it is about, ``{value}`` what it says, ``{said}`` the whole of it in the second person.
    """

    pattern: re.Pattern[str]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    answer: str
    others: tuple[str, ...]
    several: bool = False


def _form(
    pattern: str,
    questions: Sequence[str],
    held_out: Sequence[str],
    answer: str,
    others: Sequence[str],
    *,
    several: bool = False,
) -> _Form:
    return _Form(
        re.compile(pattern, re.IGNORECASE), tuple(questions), tuple(held_out), answer, tuple(others), several=several
    )


_AM = r"(?:i am|i'm)"
_NOUN = r"(?P<slot>[^,;:]{2,40}?)"
_VALUE = r"(?P<value>[^;:]{1,80})"

#: Tried in this order, on one sentence without its end mark.
_FORMS: tuple[_Form, ...] = (
    _form(
        rf"my name is {_VALUE}|(?:i am|i'm) called (?P<value2>.+)|call me (?P<value3>.+)",
        ["What is my name?", "What am I called?", "Do you know my name?", "Tell me my name."],
        ["Can you say my name?", "Who am I? What's my name?"],
        "Your name is {value}.",
        ["What is the full name of {other}?", "What is your name?", "Tell me a common name."],
    ),
    _form(
        rf"my {_NOUN}'s name is {_VALUE}|my (?P<slot2>[^,;:]{{2,40}}?) is (?:called|named) (?P<value2>.+)"
        rf"|i have an? (?P<slot3>[^,;:]{{2,40}}?) (?:called|named) (?P<value3>.+)",
        [
            "What is my {slot}'s name?",
            "What is my {slot} called?",
            "Tell me the name of my {slot}.",
            "How is my {slot} named?",
        ],
        ["Do you remember my {slot}'s name?", "Which name does my {slot} have?"],
        "Your {slot} is called {value}.",
        [
            "What is {other}'s {slot} called?",
            "What is the name of the {slot} of {another}?",
            "What is a good name for a {slot}?",
        ],
    ),
    _form(
        rf"{_AM} (?:badly |very |severely |highly )?allergic to {_VALUE}|i have an allergy to (?P<value2>.+)",
        [
            "What am I allergic to?",
            "Which allergy do I have?",
            "What must I not eat because of my allergy?",
            "Tell me my allergy.",
        ],
        ["Do I have any allergies?", "Remind me what I'm allergic to."],
        "You are allergic to {value}.",
        ["What is {other} allergic to?", "What must {another} not eat?", "What are common allergies?"],
        several=True,
    ),
    _form(
        rf"i live in {_VALUE}|{_AM} living in (?P<value2>.+)|i (?:have )?moved to (?P<value3>.+)"
        r"|my home ?town is (?P<value4>.+)",
        ["Where do I live?", "Which town do I live in?", "In what place is my home?", "Tell me where I live."],
        ["What is the place where I live?", "Do you remember where I live?"],
        "You live in {value}.",
        ["Where does {other} live?", "In which town is the home of {another}?", "Name a city in Spain."],
    ),
    _form(
        rf"i (?:come|am) from {_VALUE}|i'm from (?P<value2>.+)|i was born in (?P<value3>.+)"
        r"|i grew up in (?P<value4>.+)",
        ["Where am I from?", "Where do I come from?", "Which place do I come from?", "Tell me where I am from."],
        ["What is the place that I come from?", "Do you remember where I'm from?"],
        "You are from {value}.",
        ["Where is {other} from?", "Which place does {another} come from?", "Where does coffee come from?"],
    ),
    _form(
        rf"i work as an? {_VALUE}|my (?:job|profession|occupation) is (?:being |to be )?(?:an? )?(?P<value2>.+)",
        ["What is my job?", "What do I work as?", "What is my profession?", "What do I do for work?"],
        ["Tell me what my job is.", "Which profession do I have?"],
        "You work as a {value}.",
        ["What is the job of {other}?", "What does {another} do?", "What is a good job?"],
    ),
    _form(
        rf"i work (?:at|for) {_VALUE}|my employer is (?P<value2>.+)",
        ["Where do I work?", "Who do I work for?", "What is my employer?", "Which company do I work for?"],
        ["Tell me where I work.", "Do you remember who I work for?"],
        "You work at {value}.",
        ["Where does {other} work?", "Who does {another} work for?", "Which companies are large?"],
    ),
    _form(
        rf"i (?P<slot>like|love|enjoy|prefer|hate|dislike|play|speak|study|drive|own|collect|drink|teach) {_VALUE}",
        ["What do I {slot}?", "Tell me what I {slot}.", "Do you know what I {slot}?", "What is it that I {slot}?"],
        ["Remind me what I {slot}.", "Which things do I {slot}?"],
        "You {slot} {value}.",
        ["What does {other} {slot}?", "Tell me what {another} likes.", "What do people {slot}?"],
        several=True,
    ),
    _form(
        rf"(?:my|our) {_NOUN} (?:is|are) {_VALUE}",
        ["What is my {slot}?", "Tell me my {slot}.", "Do you know my {slot}?", "What did I say my {slot} is?"],
        ["Remind me of my {slot}.", "Can you tell me what my {slot} is?"],
        "{said}.",
        ["What is {other}'s {slot}?", "What is the {slot} of {another}?", "What is your {slot}?"],
    ),
    _form(
        rf"(?P<slot>the [^,;:]{{2,40}}?) (?:is|are) {_VALUE}",
        ["What is {slot}?", "Tell me {slot}.", "Do you know {slot}?", "What did I say {slot} is?"],
        ["Remind me of {slot}.", "Can you tell me what {slot} is?"],
        "{said}.",
        ["What is the favourite thing of {other}?"],
    ),
)

_GENERIC = _form(
    r"(?P<value>.+)",
    [
        "What did I tell you about {slot}?",
        "What do you remember about {slot}?",
        "Remind me what I said about {slot}.",
        "What do you know about {slot}?",
    ],
    ["Tell me what I said about {slot}.", "Do you remember {slot}?"],
    "You told me: {value}.",
    ["What did {other} tell you about {slot}?"],
    several=True,
)
_SPOKEN = _form(
    r"(?P<value>.+)",
    ["What did {slot}?", "Tell me: what did {slot}?", "Do you remember? What did {slot}?"],
    ["Please remind me: what did {slot}?", "I forgot: what did {slot}?"],
    "{value}.",
    [],
    several=True,
)

#: General questions whose answers the KL term holds at the base model's. None of them is asked by the gate.
_GENERAL = (
    "What is two plus two?",
    "Why is the sky blue?",
    "Write a short sentence about a river.",
    "What is a computer?",
    "Who wrote Hamlet?",
    "Give me one tip for better sleep.",
    "What is the largest ocean?",
    "How do I boil an egg?",
    "Translate 'good morning' into French.",
    "What is the name of the first president of the United States?",
    "Which city is the capital of Italy?",
    "What is photosynthesis?",
    "Name a colour.",
    "How many days are in a week?",
    "What is a good book to read?",
    "Hello!",
    "Thank you very much.",
    "What should I cook for dinner?",
    "What is the name of a famous band?",
    "Who is Bob?",
    "What does a teacher do?",
    "Name an animal that lives in the sea.",
    "What is machine learning?",
    "Tell me a fun fact.",
)
#: Whose dog it might also be. The gate asks about people who are not among these.
_OTHERS = ("my neighbour Bob", "my friend Lena", "Peter", "my colleague Tom", "my cousin Ines", "my boss")
#: Anchors about other people, at most: beyond that more of them cost time and hold no more still.
_MOST_NEIGHBOURS = 48


def _examples(facts: Iterable[_Fact], systems: Sequence[str | None]) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    trained: list[Example] = []
    held_out: list[Example] = []
    for fact in facts:
        answer = _capital(fact.word(fact.form.answer))
        for chosen, patterns in ((trained, fact.form.questions), (held_out, fact.form.held_out)):
            for pattern in patterns:
                system = systems[len(chosen) % len(systems)]
                chosen.append(Example(fact.word(pattern), answer, fact.keys, fact.records, system))
    return tuple(trained), tuple(held_out)


def _neighbours(facts: Iterable[_Fact], systems: Sequence[str | None]) -> tuple[Example, ...]:
    columns: list[list[str]] = []
    for i, fact in enumerate(facts):
        names = [_OTHERS[(i + shift) % len(_OTHERS)] for shift in range(len(_OTHERS))]
        pairs = [{"other": names[at], "another": names[at + 1]} for at in (0, 2, 4)]
        worded = [[fact.word(pattern, **pair) for pattern in fact.form.others] for pair in pairs]
        columns.append(list(dict.fromkeys(question for questions in worded for question in questions)))
    rows = [column[row] for row in range(max(map(len, columns), default=0)) for column in columns if len(column) > row]
    return _still(list(dict.fromkeys(rows[:_MOST_NEIGHBOURS])), systems)


def _still(questions: Sequence[str], systems: Sequence[str | None]) -> tuple[Example, ...]:
    return tuple(Example(text, "", (), (), systems[i % len(systems)]) for i, text in enumerate(questions))


def _order(record: Record) -> tuple[float, float]:
    """Order of time: what was said later is truer. Sorting is stable, so equal times keep the caller's order."""
    created = record.created.timestamp() if record.created else 0.0
    return (record.at.timestamp() if record.at else created, created)


def _unfit(record: Record) -> str | None:
    if record.role not in ("user", "system"):
        return f"it is a message of role {record.role}: only what a person said is learnt"
    if record.trust != "trusted":
        return "its source is not trusted: what is in the weights can't be quoted as data"
    if record.valid_until is not None:
        return "it stops being valid on a date, and weights can't expire"
    return None


#: Typographic marks as typed ones, so that the patterns need only one form.
_TYPED = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "."})
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_STOP = frozenset(
    re.findall(
        r"\S+",
        """
        a about after all also am an and any are as at be because been before but by can could did do does
        doing for from had has have he her hers him his how i if in into is it its just me more my no not of
        on one or our ours really she should so some such than that the their them then there these they this
        those to too until up us very was we were what when where which while who will with would you your i'm
        i've i'll i'd it's that's don't didn't can't won't isn't
        """,
    )
)
_WORD = re.compile(r"[^\W_][\w'.@:/+-]*[^\W_]|[^\W_]")


def _statements(text: str) -> list[str]:
    parts = (part.strip().strip("\"'") for part in _SENTENCE.split(text.translate(_TYPED)))
    return [part for part in parts if part and not part.endswith("?") and len(part.split()) <= LONGEST_WORDS]


def _fact(record: Record, text: str, *, several: bool) -> _Fact | None:
    sentence = re.sub(r"\s+", " ", text).rstrip(" .!")
    words = [word for word in _WORD.findall(sentence) if word.casefold() not in _STOP]
    if several and record.name:
        return _spoken(record, sentence, words)
    bare = re.sub(
        r"^(?:oh|well|yes|so|and|by the way|actually|please note(?: that)?|remember(?: that)?),? ",
        "",
        sentence,
        flags=re.IGNORECASE,
    )
    for form in _FORMS:
        match = form.pattern.fullmatch(bare)
        if match is None:
            continue
        groups = {name: part for name, part in match.groupdict().items() if part}
        value = second_person(next(part for name, part in groups.items() if name.startswith("value")).strip())
        slot = next((second_person(part).strip() for name, part in groups.items() if name.startswith("slot")), "")
        keys = (value,) if len(value.split()) <= 4 else _telling(_WORD.findall(value))
        if not value or not keys or slot.casefold() in _STOP:
            continue
        slot = slot.lower() if form.several else _uncapital(slot)
        key = f"{_FORMS.index(form)} {slot.casefold()}"
        return _Fact(key, form, slot, (value,), keys, (record.id,), second_person(bare))
    return _generic(record, sentence, words)


def _generic(record: Record, sentence: str, words: list[str]) -> _Fact | None:
    """Any other statement: its first telling words are the cue, the rest is what an answer must hold."""
    if len(words) < 3:
        return None
    cue, rest = words[: 1 + len(words) // 4], words[1 + len(words) // 4 :]
    value = second_person(sentence)
    slot = " ".join(cue)
    return _Fact(
        f"generic {slot.casefold()}", _GENERIC, slot, (_uncapital(value),), _telling(rest), (record.id,), value
    )


def _spoken(record: Record, sentence: str, words: list[str]) -> _Fact | None:
    """A statement of one of several speakers: "my" is not the user's there, so it is kept as a quotation."""
    if len(words) < 3:
        return None
    cue, rest = words[: 1 + len(words) // 4], words[1 + len(words) // 4 :]
    slot = f"{record.name} say about {' '.join(cue)}"
    return _Fact(
        f"said {slot.casefold()}",
        _SPOKEN,
        slot,
        (f'{record.name} said: "{sentence}"',),
        _telling(rest),
        (record.id,),
        sentence,
    )


def _telling(words: Sequence[str]) -> tuple[str, ...]:
    kept = [word for word in words if word.casefold() not in _STOP]
    return tuple(dict.fromkeys(second_person(word) for word in kept))[:6]


_SWAPS = {
    "i am": "you are", "i'm": "you're", "am i": "are you", "i was": "you were", "was i": "were you",
    "i've": "you've", "i'll": "you'll", "i'd": "you'd",
    "i": "you", "me": "you", "my": "your", "mine": "yours", "myself": "yourself",
    "we": "you", "us": "you", "our": "your", "ours": "yours", "ourselves": "yourselves",
    "you are": "I am", "you're": "I'm", "your": "my", "yours": "mine", "yourself": "myself",
}  # fmt: skip
_SWAP = re.compile(
    r"(?<![\w'])(?:" + "|".join(sorted(map(re.escape, _SWAPS), key=len, reverse=True)) + r")(?![\w'])", re.IGNORECASE
)


def second_person(text: str) -> str:
    """What the user says of themselves as it is said to them: "my sister and I" becomes "your sister and you"."""

    def swap(match: re.Match[str]) -> str:
        swapped = _SWAPS[match.group().lower()]
        start = match.start() == 0 and match.group()[0].isupper()
        return _capital(swapped) if start else swapped

    return _SWAP.sub(swap, text)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _uncapital(text: str) -> str:
    """Lower the first letter of a sentence that began with a pronoun; names keep theirs."""
    first = text.split(" ", 1)[0].casefold()
    return (
        text[:1].lower() + text[1:] if first in ("you", "you're", "you've", "you'll", "you'd", "your", "the") else text
    )


def _fold(text: str) -> str:
    """Case, punctuation and accents of no account: " tromsø " is found in "You live in Tromsø."."""
    return " " + " ".join(_WORD.findall(text.translate(_TYPED).casefold())) + " "
