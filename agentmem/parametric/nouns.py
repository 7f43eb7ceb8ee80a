"""What nouns and values are about: pets, people, numbers, instruments, illnesses, jobs, places, times.

Pure tests on English text. Knows no statements and no questions.
"""

from __future__ import annotations

import re

from .grammar import english, find_time, telling, words

__all__ = ["DIET", "ILLNESS", "INSTRUMENTS", "JOB", "NATIONALITY", "NOT_JOBS", "NUMBERS", "OTHER_WORDS", "PEOPLE"]
__all__ += ["PETS", "PLACE", "QUALITY", "is_time", "plural"]

PETS = words("pets")
#: Nouns for people that somebody has.
PEOPLE = words("people")
OTHER_WORDS = english("other_words")
NUMBERS = re.compile(
    r"(?:.* )?(?:number|code|pin|combination|size|height|weight|id|postcode|zip|extension|plate|score|iban)",
    re.IGNORECASE,
)
INSTRUMENTS = re.compile(
    r"(?:the )?(?:\w+ )?(?:piano|guitar|violin|viola|cello|bass|flute|oboe|clarinet|saxophone|trumpet|trombone|tuba|"
    r"horn|"
    r"drums?|harp|harmonica|accordion|bagpipes?|banjo|ukulele|mandolin|lute|organ|keyboard|recorder|sitar|xylophone|"
    r"percussion|fiddle|bassoon|theremin|didgeridoo|zither|bouzouki|kalimba|\w+(?:harpa|phone|horn))s?",
    re.IGNORECASE,
)
ILLNESS = re.compile(
    r"(?:\w+ )*?(?:asthma|diabetes|migraines?|epilepsy|adhd|autism|cancer|eczema|hay fever|high blood pressure|gout|"
    r"coeliac disease|\w+itis|\w+ disease|\w+ disorder|\w+ syndrome|\w+(?:emia|aemia|insomnia|phobia|lexia))",
    re.IGNORECASE,
)
DIET = re.compile(
    r"(?:an? )?(?:strict )?(?:vegetarian|vegan|pescatarian|lactose[- ]intolerant|gluten[- ]free|teetotal(?:ler)?)",
    re.IGNORECASE,
)
JOB = re.compile(
    r".*(?:er|or|ist|ian|nurse|chef|cook|pilot|judge|clerk|guard|student|surgeon|accountant|consultant|assistant|"
    r"attendant|architect|smith|wright|nanny|midwife|vet|scientist|man|woman|mechanic|priest|monk|coach|guide|agent|"
    r"diver|"
    r"intern|engineer|analyst)(?: (?:at|for|in|by|with|on) .*| by (?:trade|profession))?",
    re.IGNORECASE,
)
NATIONALITY = re.compile(
    rf"(?:half[ -])?(?:{'|'.join(words('nationalities'))}|[A-Z][a-z]+ese)(?:(?:[ -]| and )[A-Z][a-z]+)?", re.IGNORECASE
)
NOT_JOBS = words("not_jobs")
PLACE = re.compile(
    r"(?:in|at|on|under|behind|near|inside|beside|next to|above|below|beneath|between|opposite|outside|by|with) .+",
    re.IGNORECASE,
)
QUALITY = re.compile(
    r"(?:(?:very|quite|really|too|so|rather|always|often) .+|(?:light |dark |bright )?(?:red|blue|green|yellow|black|"
    r"white|"
    r"grey|gray|brown|orange|purple|pink|big|small|old|new|broken|tall|short|long|curly|blond|left-handed|"
    r"\w+(?:ful|ous|ish|less|able|ible|proof)|\w{3,}ed|dirty|clean|slow|fast|loud|quiet|cheap|expensive|empty|full|"
    r"open|closed|sick|ill|healthy|rusty|noisy|leaky|heavy|\w+ years old)(?:,? (?:and|but) .+)?)",
    re.IGNORECASE,
)


def plural(noun: str) -> bool:
    """Whether a noun means several, or a group that takes either form of the verb."""
    noun = noun.casefold()
    return noun in _PLURALS or (noun.endswith("s") and not noun.endswith(("ss", "us", "is", "'s")))


_PLURALS = words("plurals")


def is_time(value: str) -> bool:
    """Whether ``value`` is an expression of time and nothing else."""
    rest, time = find_time(value)
    return bool(time) and not telling(rest)
