"""What the gate asks and reads to see whether a model is still what it was: questions that no learnt fact answers.

Pure and deterministic: no model, no clock. Makes from a corpus the same questions about other people, with names that
its training never uses, so that every fact is tempted; knows nothing of answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .corpus import Corpus, Example
from .grammar import of_another

__all__ = ["PASSAGE", "SPOKEN_PASSAGE", "UNRELATED", "facts", "neighbours", "sample", "unknown"]

#: The opening of H. G. Wells, The War of the Worlds (1898), which is in the public domain. Read as plain text.
PASSAGE = (
    "No one would have believed in the last years of the nineteenth century that this world was being watched "
    "keenly and closely by intelligences greater than man's and yet as mortal as his own; that as men busied "
    "themselves about their various concerns they were scrutinised and studied, perhaps almost as narrowly as a man "
    "with a microscope might scrutinise the transient creatures that swarm and multiply in a drop of water. With "
    "infinite complacency men went to and fro over this globe about their little affairs, serene in their assurance "
    "of their empire over matter. It is possible that the infusoria under the microscope do the same. No one gave a "
    "thought to the older worlds of space as sources of human danger, or thought of them only to dismiss the idea "
    "of life upon them as impossible or improbable. It is curious to recall some of the mental habits of those "
    "departed days. At most terrestrial men fancied there might be other men upon Mars, perhaps inferior to "
    "themselves and ready to welcome a missionary enterprise."
)
#: The opening of Jane Austen, Pride and Prejudice (1813), which is in the public domain. Read as an assistant's answer.
SPOKEN_PASSAGE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of "
    "a wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, "
    "this truth is so well fixed in the minds of the surrounding families, that he is considered as the rightful "
    "property of some one or other of their daughters. “My dear Mr. Bennet,” said his lady to him one day, “have you "
    "heard that Netherfield Park is let at last?” Mr. Bennet replied that he had not. “But it is,” returned she; "
    "“for Mrs. Long has just been here, and she told me all about it.” Mr. Bennet made no answer. “Do not you want "
    "to know who has taken it?” cried his wife impatiently."
)

#: Questions that no fact about a user answers; none of them is trained on (corpus.py has others).
UNRELATED = (
    "What is the capital of France?",
    "Who painted the Mona Lisa?",
    "Recommend a city for a holiday.",
    "What is a healthy breakfast?",
    "What is the name of a well-known rock band?",
    "How far away is the moon?",
    "Which animal is the fastest on land?",
    "What do plants need to grow?",
    "Suggest a hobby for the winter.",
    "What is a common name for a dog?",
    "Name a musical instrument.",
    "What do doctors do?",
    "Who was Marie Curie?",
    "Why do people drink tea?",
    "How many legs does a spider have?",
    "Tell me about the Roman Empire.",
)

#: People that a user may ask about instead. Those whose names a corpus holds are left out.
_PEOPLE = (
    "my neighbour Karl",
    "Maria",
    "my friend Omar",
    "my colleague Yusuf",
    "Priya",
    "my aunt Greta",
    "the postman",
    "my old teacher Mrs Okafor",
    "Dimitri",
    "my flatmate Chloe",
    "the man next door",
    "Aroha",
    "my brother-in-law Stefan",
    "Keiko",
    "our plumber",
    "my grandfather Anselm",
)

#: Personal questions, each with the words of its subject: asked where the corpus has none of these words.
_UNANSWERED = (
    ("What is my blood type?", "blood"),
    ("What is my cat's name?", "cat pet"),
    ("What size are my shoes?", "shoe shoes size"),
    ("What is my phone number?", "phone number telephone"),
    ("What is the name of my dentist?", "dentist doctor"),
    ("When did I finish school?", "school graduated finished degree"),
    ("What is my grandmother's name?", "grandmother grandma granny family"),
    ("What colour is my front door?", "door colour color house"),
    ("Which film did I see last week?", "film movie cinema saw watched"),
    ("What is my passport number?", "passport number"),
    ("Who cuts my hair?", "hair barber hairdresser"),
    ("What did I have for lunch yesterday?", "lunch ate yesterday food"),
)

_NOUN = re.compile(
    r"\bmy ((?:favou?rite |[^\W\d_-]+ )?(?!(?:is|are)\b)[^\W\d_-]+?)(?='s\b|[?.,!]| (?:called|named|have|is|are)\b)"
)


def neighbours(corpus: Corpus, count: int) -> tuple[Example, ...]:
    """``count`` questions that tempt the facts of ``corpus``, spread evenly over them: what it asks of the user, asked
    about others, and what is asked in general ("What is a good name for a dog?").

    None of them is trained on, and no name in them is one that the corpus holds. Fewer where it has too few questions.
    """
    used = {_plain(e.question) for part in (corpus.examples, corpus.anchors, corpus.neighbours) for e in part}
    text = " ".join(f"{e.question} {e.answer}" for part in (corpus.examples, corpus.neighbours) for e in part).lower()
    people = [p for p in _PEOPLE if not any(re.search(rf"\b{re.escape(w.lower())}\b", text) for w in _names(p))]
    people = people or list(_PEOPLE)
    groups = [
        _asked_of(group, people, number) for number, group in enumerate(facts((*corpus.held_out, *corpus.examples)))
    ]
    found: list[Example] = []
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            if turn >= len(group) or len(found) >= count:
                continue
            if _plain(group[turn].question) not in used:
                used.add(_plain(group[turn].question))
                found.append(group[turn])
    return tuple(found)


def unknown(corpus: Corpus, count: int) -> tuple[Example, ...]:
    """At most ``count`` personal questions about which ``corpus`` says nothing."""
    text = " ".join(f"{e.question} {e.answer}" for part in (corpus.examples, corpus.natural) for e in part).lower()
    words = set(re.findall(r"\w+", text))
    chosen = [question for question, about in _UNANSWERED if words.isdisjoint(about.split())]
    return tuple(Example(text, "", (), ()) for text in chosen[:count])


def facts(examples: Iterable[Example]) -> list[list[Example]]:
    """Examples grouped by the fact that they ask for, in their order."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.answer, []).append(example)
    return list(groups.values())


def sample(examples: Sequence[Example], most: int) -> list[Example]:
    """At most ``most`` of them: first one of each fact, then another of each, not always the same wording."""
    if len(examples) <= most:
        return list(examples)
    groups = facts(examples)
    turned = [group[i % len(group) :] + group[: i % len(group)] for i, group in enumerate(groups)]
    rows = [group[at] for at in range(max(map(len, turned))) for group in turned if at < len(group)]
    if len(groups) > most:
        return [rows[i * len(groups) // most] for i in range(most)]
    return rows[:most]


def _asked_of(group: Sequence[Example], people: Sequence[str], number: int) -> list[Example]:
    """Questions that tempt one fact; not every fact begins with the same wording."""
    found: list[Example] = []
    start = number % len(group)
    turns = [*group[start:], *group[:start]]
    for turn, example in enumerate(turns * 3):  # a few facts are asked of several people each
        person = people[(number * 5 + turn * 3 + turn // len(turns)) % len(people)]
        changed = of_another(example.question, person)
        if changed != example.question:
            found.append(Example(changed, "", (), ()))
        if turn == 1:
            found += [Example(question, "", (), ()) for question in _general(group)[:1]]
    return found


def _general(group: Sequence[Example]) -> list[str]:
    """What is asked in general about the kind of thing that a fact is about."""
    found: list[str] = []
    for example in group:
        question = example.question
        if match := _NOUN.search(question):
            noun = re.sub(r"^favou?rite ", "", match.group(1))
            if " " in noun and (noun.endswith("s") or re.search(r"\b(?:do|does|did) my\b", question)):
                continue  # "where my aunt lives", "where does my aunt live": the last word is a verb
            name = "name" in question or "called" in question
            article = "an" if noun[0].lower() in "aeiou" else "a"
            found.append(
                f"What is a good name for {article} {noun}?" if name else f"Tell me something about {article} {noun}."
            )
        elif re.search(r"\b(do|am|have) I\b", question) and not re.search(r"\b(?:my|me|our|us)\b", question):
            found.append(
                re.sub(r"\b(do|am|have) I\b", lambda m: ("are" if m[1] == "am" else m[1]) + " most people", question)
            )
    return list(dict.fromkeys(found))


def _names(person: str) -> list[str]:
    """The words that tell a person of `_PEOPLE` from others: names, or what they are."""
    named = [word for word in person.split() if word[:1].isupper() and word != "Mrs"]
    return named or [person.rsplit(maxsplit=1)[-1]]


def _plain(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.casefold()))
