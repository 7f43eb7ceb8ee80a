"""Turns records into training text: questions whose answer is what a record says, as they are asked in a chat.

Pure and deterministic: no model, no tokenizer, no clock. Knows which records may be learnt and what goes into a corpus;
how statements become questions is in forms.py and statements.py. What is not learnt is said, with the reason.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from types import MappingProxyType

from agentmem.errors import InvalidInput
from agentmem.types import Record

from .clauses import clauses, sentences, subject_of
from .facts import Asked, Fact
from .forms import named_in, recognise
from .grammar import absolute, capital, fold, of_another, typed
from .statements import analyse, unusable

__all__ = ["GENERAL", "OTHERS", "PERSONAL", "SYSTEMS", "Corpus", "Example", "build", "record_digest"]

#: System texts that examples are set under, in turn, so that what is learnt doesn't hang on one of them. None: the chat
#: template's own.
SYSTEMS: tuple[str | None, ...] = (None, "You are a helpful assistant.")

#: Longer statements are left to recall: a small LoRA keeps their gist at best.
LONGEST_WORDS = 40
#: Facts that are learnt of one record, its first: a long text is for recall.
FACTS_PER_RECORD = 8
#: Of the user's own past questions about a record, every one at this place is kept back to test with.
KEPT_BACK = 3
#: Neighbour questions per fact, and in all: beyond that more of them cost time and hold no more still.
NEIGHBOURS_PER_FACT = 12
MOST_NEIGHBOURS = 128

#: Whose dog it might also be. The gate asks about people who are not among these.
OTHERS = (
    "my neighbour Bob",
    "my friend Lena",
    "Peter",
    "my colleague Tom",
    "my cousin Ines",
    "my boss",
    "Mrs. Lindqvist",
    "the baker",
    "Jorge",
    "my teacher",
    "Anna",
    "my uncle Henri",
)
#: What has a wifi password or opening hours too, and what can be restarted too.
PLACES = ("the hotel", "the library", "the gym", "the museum", "the station")
THINGS = ("the printer", "the router", "the lift", "the coffee machine", "the projector")
#: General questions whose answers the KL term holds at the base model's. None of them is asked by the gate.
GENERAL = (
    "What is two plus two?",
    "Write a short sentence about a river.",
    "What is a computer?",
    "Give me one tip for better sleep.",
    "How do I boil an egg?",
    "Translate 'good morning' into French.",
    "What is the name of the first president of the United States?",
    "Which city is the capital of Italy?",
    "Name a colour.",
    "What is a good book to read?",
    "Thank you very much.",
    "What should I cook for dinner?",
    "Who is Bob?",
    "Name an animal that lives in the sea.",
    "Tell me a fun fact.",
)
#: Questions about the user that nothing answers, each with words of its subject: held still where the corpus has none
#: of them, so that not every question with "my" gets a learnt answer.
PERSONAL = (
    ("What is my shoe size?", "shoe shoes size"),
    ("What colour are my eyes?", "eye eyes"),
    ("Who was my first teacher?", "teacher school"),
    ("What is my bicycle worth?", "bicycle bike"),
    ("What did I dream last night?", "dream dreamt"),
    ("How tall am I?", "tall height"),
    ("What is the name of my street?", "street address road"),
    ("When is my next exam?", "exam test school"),
    ("What is in my bag?", "bag backpack"),
    ("Who is my best friend?", "friend"),
    ("What did I buy yesterday?", "buy bought"),
    ("What is my horse called?", "horse pony pet"),
    ("Which song do I sing in the shower?", "song sing music"),
    ("What is my bank account number?", "bank account"),
    ("How much do I weigh?", "weigh weight"),
    ("What's my mother's maiden name?", "mother mum mom maiden"),
    ("What colour is my bedroom?", "bedroom"),
    ("What is my aunt's name?", "aunt"),
    ("When did I move house?", "moved"),
    ("What did I eat this morning?", "eat breakfast morning"),
    ("Which book am I reading?", "book books read reading"),
    ("Where did I park?", "park parked car"),
    ("How many cousins do I have?", "cousin cousins"),
    ("What is my favourite smell?", "smell"),
)


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
        folded = fold(text)
        return 3 * sum(f" {fold(key).strip()} " in folded for key in self.keys) >= 2 * len(self.keys)


@dataclass(frozen=True)
class Corpus:
    """What to train on and what to test with.

    ``examples`` are trained. ``held_out`` ask for the same facts in wordings that are never trained, with the same
    words for what is asked for; ``natural`` in other words altogether ("What do I do for a living?"), where there are
    any. ``anchors`` are general questions, and personal ones that no record answers, whose answers must stay the base
    model's; ``neighbours`` the questions of the facts asked about other people, whose answers must stay it too; neither
    has an answer here. ``records`` maps each record that was used to the digest of its content; ``left_out`` says why
    others were not.
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


def build(
    records: Iterable[Record],
    *,
    systems: Sequence[str | None] = SYSTEMS,
    asked: Mapping[str, Sequence[Record]] = MappingProxyType({}),
    written: Sequence[Example] = (),
) -> Corpus:
    """The corpus of ``records``. The same records in the same order give the same corpus.

    A statement of a known kind ("My dog is called Biscuit", "I'm allergic to peanuts", "To reset the router, hold the
    button") is asked for by wordings of its own; any other one by who, what, where and when questions about its parts,
    answered by the statement in the second person. Of a long record the first eight facts are taken. Relative times
    become dates by the record's ``at``. Two records that answer the same question differently contradict each other:
    the later one is learnt; where both can hold ("I like tea", "I like chess") they are asked for together. Among
    several speakers (`Record.name`) "I" is the speaker.

    ``asked`` holds, per record id, questions of the user's own that this record answered: they are trained, except
    every third, which is kept for ``natural``; they count among the records of the corpus, so that forgetting one of
    them is noticed. ``written`` are examples that a model wrote (selfstudy.py); those of
    records that are not learnt are dropped.

    Raises `InvalidInput` if ``systems`` is empty.
    """
    if not systems:
        raise InvalidInput("systems is empty: pass at least one system text, or None for the chat template's own")
    chosen = sorted(records, key=_order)
    speakers = {record.name for record in chosen if record.name}
    names = speakers | {name for record in chosen for name in _NAME.findall(record.text)}
    learnt: dict[str, _Learnt] = {}
    left_out: list[tuple[str, str]] = []
    used: dict[str, str] = {}
    for record in chosen:
        facts, why = _facts(record, record.name or "" if len(speakers) > 1 else "", names)
        if not facts:
            left_out.append((record.id, why))
            continue
        used[record.id] = record_digest(record.text)
        for fact in facts:
            mine = _Learnt(fact, (record.id,), record.name or "")
            learnt[fact.key] = learnt[fact.key].joined(mine) if fact.key in learnt else mine
    _own_questions(learnt.values(), asked)
    _unambiguous(learnt.values())
    kept = {id_ for one in learnt.values() if one.fact.trained for id_ in one.records}
    left_out += [(id_, "a later record says otherwise") for id_ in used if id_ not in kept]
    used.update({id_: digest for one in learnt.values() if one.fact.trained for id_, digest in one.questions.items()})
    kept |= set(used) & {id_ for one in learnt.values() if one.fact.trained for id_ in one.questions}
    left_out = [(id_, why) for id_, why in left_out if id_ not in kept]
    examples = _worded(learnt.values(), "trained", systems)
    taken = {_same(example.question) for example in examples}
    held_out, natural = ([example for example in _worded(learnt.values(), column, systems)
                          if _same(example.question) not in taken] for column in ("held_out", "natural"))  # fmt: skip
    taken |= {_same(example.question) for example in (*held_out, *natural)}
    examples += [example for example in written
                 if set(example.records) <= kept and example.keys and _same(example.question) not in taken]  # fmt: skip
    taken |= {_same(example.question) for example in examples}
    neighbours = [text for text in _neighbours(learnt.values()) if _same(text) not in taken]
    subjects = {word for example in examples for word in fold(f"{example.question} {example.answer}").split()}
    personal = [text for text, about in PERSONAL if subjects.isdisjoint(about.split())]
    mixed = [text for pair in zip_longest(personal, GENERAL) for text in pair if text]
    general = [text for text in mixed if _same(text) not in taken]
    return Corpus(
        examples=tuple(examples),
        held_out=tuple(held_out),
        natural=tuple(natural),
        anchors=_still(general, systems),
        neighbours=_still(neighbours[:MOST_NEIGHBOURS], systems),
        records={id_: digest for id_, digest in used.items() if id_ in kept},
        left_out=tuple(left_out),
    )


@dataclass
class _Learnt:
    """A fact, the records that say it and who said it."""

    fact: Fact
    records: tuple[str, ...]
    speaker: str
    #: Questions of the user's own: trained ones and ones kept back.
    own: list[str] = field(default_factory=list[str])
    #: The records of these, with their digests.
    questions: dict[str, str] = field(default_factory=dict[str, str])

    def joined(self, later: _Learnt) -> _Learnt:
        fact = self.fact.joined(later.fact)
        both = fact is not later.fact or set(self.fact.values) == set(later.fact.values)
        records = tuple(dict.fromkeys(self.records + later.records)) if both else later.records
        return _Learnt(fact, records, later.speaker)


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


#: A word that is written with a capital amid a sentence.
_NAME = re.compile(r"(?<=[a-z,] )[A-ZÀ-ÖØ-Þ][\w'-]*[^\W_]")


def _facts(record: Record, speaker: str, names: Container[str] = ()) -> tuple[list[Fact], str]:
    """The facts of a record; where there are none, why."""
    why = _unfit(record)
    if why:
        return [], why
    found: dict[str, Fact] = {}
    reasons: list[str] = []
    subject = ""
    for sentence in sentences(absolute(typed(record.text), record.at)):
        if sentence.endswith("?"):
            reasons.append("it asks, and states nothing")
            continue
        if len(sentence) > 10 * LONGEST_WORDS or len(sentence.split()) > LONGEST_WORDS:
            reasons.append(f"its statements are longer than {LONGEST_WORDS} words: a LoRA keeps only their gist")
            continue
        for clause in clauses(sentence.rstrip(" ." if speaker else " .!"), subject):
            subject = subject_of(clause) or subject
            kinds = [] if speaker and unusable(clause, speaker=speaker) else recognise(clause)
            if kinds:
                facts = [_spoken(fact, clause, speaker) for fact in kinds] if speaker else kinds
            else:
                reason = unusable(clause, speaker=speaker)
                fact = None if reason else analyse(clause, speaker=speaker, names=names)
                reasons.append(reason or "it states nothing that can be asked for") if fact is None else None
                facts = [*([] if speaker else named_in(clause)), fact] if fact else []
            found.update((fact.key, fact) for fact in facts)
    return list(found.values())[:FACTS_PER_RECORD], (reasons or ["it states nothing that can be asked for"])[0]


def _spoken(fact: Fact, clause: str, speaker: str) -> Fact:
    """A fact that a named person tells of themselves: asked for by name, answered by the statement."""

    def named(questions: tuple[Asked, ...]) -> tuple[Asked, ...]:
        return tuple(replace(asked, question=of_another(asked.question, speaker)) for asked in questions)

    return replace(
        fact,
        key=f"{speaker} {fact.key}",
        head="",
        values=(capital(of_another(clause, speaker)),),
        tail=".",
        trained=named(fact.trained),
        held_out=named(fact.held_out),
        natural=named(fact.natural),
        general=(),
        several=False,
    )


def _own_questions(learnt: Iterable[_Learnt], asked: Mapping[str, Sequence[Record]]) -> None:
    """Add the user's past questions to the facts that they ask for; every third is kept back."""
    by_record: dict[str, list[_Learnt]] = {}
    for one in learnt:
        for id_ in one.records:
            by_record.setdefault(id_, []).append(one)
    for id_, questions in asked.items():
        for record in questions:
            question = " ".join(record.text.split())
            near = by_record.get(id_, [])
            if not near or not question or _unfit(record):
                continue
            words = set(fold(question).split())
            best = max(near, key=lambda one: len(words & set(fold(_sample(one.fact)).split())))
            others = (*best.fact.trained, *best.fact.held_out, *best.fact.natural)
            if _same(question) in {_same(other.question) for other in others}:
                continue
            best.own.append(question)
            added = (Asked(question, best.fact.trained[0].keys),)
            if len(best.own) % KEPT_BACK == 0:
                best.fact = replace(best.fact, natural=best.fact.natural + added)
            else:
                best.fact = replace(best.fact, trained=best.fact.trained + added)
            best.questions[record.id] = record_digest(record.text)


def _sample(fact: Fact) -> str:
    """Its answer with one of its questions, where another fact did not take them all."""
    return " ".join([fact.answer, *(asked.question for asked in fact.trained[:1])])


def _unambiguous(learnt: Iterable[_Learnt]) -> None:
    """Drop questions that two facts answer ("What is my pet's name?" of somebody with a dog and a cat)."""
    facts = list(learnt)
    seen: dict[str, set[str]] = {}
    for one in facts:
        for asked in (*one.fact.trained, *one.fact.held_out, *one.fact.natural):
            seen.setdefault(_same(asked.question), set()).add(one.fact.answer)

    def sole(questions: tuple[Asked, ...]) -> tuple[Asked, ...]:
        return tuple(asked for asked in questions if len(seen[_same(asked.question)]) == 1)

    for one in facts:
        fact = one.fact
        one.fact = replace(fact, trained=sole(fact.trained), held_out=sole(fact.held_out), natural=sole(fact.natural))


def _same(question: str) -> str:
    return fold(question).strip()


def _worded(learnt: Iterable[_Learnt], column: str, systems: Sequence[str | None]) -> list[Example]:
    made: list[Example] = []
    for one in learnt:
        asked: tuple[Asked, ...] = getattr(one.fact, column)
        for each in asked:
            system = systems[len(made) % len(systems)]
            made.append(Example(each.question, one.fact.answer, each.keys, one.records, system))
    return made


def _neighbours(learnt: Iterable[_Learnt]) -> list[str]:
    """Each fact's own questions about other people, and one of its look about nobody; the facts take turns."""
    columns: list[list[str]] = []
    facts = list(learnt)
    told = {word for one in facts for word in fold(f"{one.fact.answer} {_sample(one.fact)}").split()}
    # "What is my boss called?" asks nobody else where the records tell of a boss.
    others = [name for name in OTHERS if told.isdisjoint(fold(name).split()[1:] or fold(name).split())] or OTHERS
    for i, one in enumerate(facts):
        column: list[str] = []
        # "Do you know ..." about a stranger is denied by every model: held still, it would only teach to deny.
        asked = [each.question for each in one.fact.trained if not each.question.startswith("Do you ")]
        for place in range(NEIGHBOURS_PER_FACT - 1 if one.fact.general else NEIGHBOURS_PER_FACT):
            if not asked:
                break
            # Names and wordings go round at different speeds, so that no name hangs on a wording.
            name = others[(5 * place + i) % len(others)]
            column.append(_of_neighbour(asked[(place + i) % len(asked)], name, one, place))
        column += one.fact.general[:1]
        columns.append([text for text in column if text])
    rows = [column[row] for row in range(max(map(len, columns), default=0)) for column in columns if len(column) > row]
    return list(dict.fromkeys(rows))


def _of_neighbour(question: str, name: str, learnt: _Learnt, place: int) -> str:
    """The question about somebody or something else; empty where there is no such one."""
    speaker, subject = learnt.speaker, learnt.fact.subject
    if speaker and speaker in question:
        return question.replace(speaker, name.removeprefix("my ").removeprefix("the "))
    if subject and subject in question:
        return question.replace(subject, _other_thing(subject, name, place, question))
    other = of_another(question, name)
    if other != question:
        return other
    return f"{question[:-1]} at {name}'s{question[-1]}" if learnt.fact.kind == "procedure" else ""


#: Deeds that are done to every machine.
_RUNS = re.compile(r"\b(?:reset|restart|reboot|turn|switch|start|stop|set up|repair|fix)\b", re.IGNORECASE)


def _other_thing(subject: str, name: str, place: int, question: str) -> str:
    """What is nobody's own, as somebody else's: "the library's wifi password" as "Bob's wifi password"."""
    if not subject.startswith("the "):
        return name
    if _RUNS.search(question) and place % 2:
        return _another(THINGS, place // 2, subject)
    owner = re.match(r"the [\w-]+'s (?P<what>.+)", subject)
    of = re.match(r"(?P<what>the .+) of the .+", subject)
    if owner:
        return f"{_another(PLACES, place // 2, subject) if place % 2 else name}'s {owner['what']}"
    if of:
        return f"{of['what']} of {_another(PLACES, place // 2, subject)}" if place % 2 else f"{name}'s {of['what'][4:]}"
    return f"{name}'s {subject[4:]}"


def _another(things: Sequence[str], at: int, besides: str) -> str:
    """The one at this place of those that aren't what ``besides`` names."""
    others = [thing for thing in things if thing.rsplit(" ", 1)[-1] not in besides.split()]
    return others[at % len(others)]


def _still(questions: Sequence[str], systems: Sequence[str | None]) -> tuple[Example, ...]:
    return tuple(Example(text, "", (), (), systems[i % len(systems)]) for i, text in enumerate(questions))
