"""Facts about a user who does not exist, drawn by a seed: what the LoRA benchmarks teach.

Each is a statement, a question that shares no template with the corpus, and the value that an answer must hold. Names
are put together from syllables and values drawn from lists, so that another seed gives facts that no file holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Fact", "draw", "read"]


@dataclass(frozen=True)
class Fact:
    """``natural`` asks for the fact in wholly other words; ``value`` is what an answer must hold."""

    statement: str
    natural: str
    value: str


_PEOPLE = [
    "uncle",
    "aunt",
    "cousin",
    "nephew",
    "niece",
    "grandfather",
    "godmother",
    "brother",
    "sister",
    "landlord",
    "dentist",
    "hairdresser",
    "accountant",
    "boss",
    "flatmate",
    "lawyer",
    "mechanic",
    "tailor",
    "butcher",
    "plumber",
    "optician",
    "goddaughter",
    "stepson",
    "trainer",
    "gardener",
    "tutor",
]
_PETS = [
    "cat",
    "parrot",
    "horse",
    "tortoise",
    "goldfish",
    "rabbit",
    "hamster",
    "donkey",
    "goat",
    "ferret",
    "canary",
    "pony",
    "lizard",
    "hen",
    "dog",
]
_NAMED = ("boat", "bicycle", "band", "company", "farm", "blog", "podcast", "cottage", "quiz team", "allotment")
_FAVOURITES = {
    "tea": ("sencha", "rooibos", "lapsang", "genmaicha"),
    "cheese": ("manchego", "taleggio", "gjetost", "halloumi"),
    "colour": ("teal", "ochre", "mauve", "vermilion"),
    "fruit": ("quince", "papaya", "gooseberry", "persimmon"),
    "soup": ("borscht", "minestrone", "laksa", "gazpacho"),
    "flower": ("foxglove", "dahlia", "anemone", "snapdragon"),
    "bird": ("lapwing", "kestrel", "hoopoe", "nuthatch"),
    "composer": ("Telemann", "Janáček", "Satie", "Bruckner"),
    "painter": ("Hokusai", "Vermeer", "Klee", "Kollwitz"),
    "board game": ("Carcassonne", "mahjong", "backgammon", "Hive"),
    "sport": ("curling", "fencing", "lacrosse", "orienteering"),
    "spice": ("cardamom", "sumac", "fenugreek", "star anise"),
    "cake": ("battenberg", "stollen", "lamington", "baklava"),
    "tree": ("hornbeam", "ginkgo", "larch", "rowan"),
    "dance": ("polka", "mazurka", "tango", "salsa"),
    "drink": ("kombucha", "horchata", "cider", "ayran"),
    "city": ("Ljubljana", "Valparaíso", "Tbilisi", "Bergen"),
    "author": ("Lem", "Bulgakov", "Undset", "Calvino"),
    "stone": ("malachite", "opal", "jasper", "obsidian"),
    "mushroom": ("chanterelle", "morel", "porcini", "shiitake"),
}
_NUMBERS = {
    "lucky number": "Which number brings me luck?",
    "locker number": "Which locker belongs to me?",
    "house number": "Which number is on my front gate?",
    "desk number": "At which desk do I sit?",
    "bus line": "Which bus do I take?",
    "parking space": "Where may I leave my car?",
    "room number": "Which room is mine?",
    "membership number": "Under which number am I a member?",
    "jersey number": "Which number do I wear on my back?",
    "alarm code": "What do I type to turn off my alarm?",
}
_PLACES = [
    "Tromsø",
    "Gdańsk",
    "Piran",
    "Oaxaca",
    "Matera",
    "Visby",
    "Kobe",
    "Salta",
    "Luleå",
    "Trieste",
    "Galway",
    "Plovdiv",
    "Sucre",
    "Lerwick",
    "Mostar",
    "Ghent",
    "Évora",
    "Nelson",
    "Hobart",
    "Kutaisi",
    "Szeged",
    "Narvik",
    "Toledo",
    "Arles",
]
_JOBS = (
    "glass blower", "beekeeper", "notary", "locksmith", "puppeteer", "surveyor", "midwife", "cartographer", "baker",
    "carpenter", "florist", "translator", "blacksmith", "veterinarian", "archivist", "welder", "cooper", "pilot",
)  # fmt: skip
_VERBS = {
    "play": (("nyckelharpa", "oboe", "banjo", "theremin"), "I play the {}.", "Which instrument can I play?"),
    "drive": (("Saab", "Lada", "Unimog", "Fiat Panda"), "I drive a {}.", "Which car do I have?"),
    "collect": (("thimbles", "maps", "fossils", "postcards"), "I collect {}.", "What do I keep a collection of?"),
    "study": (("geology", "Finnish", "astronomy", "botany"), "I study {}.", "Which subject am I learning?"),
    "speak": (("Basque", "Welsh", "Georgian", "Maltese"), "I speak {}.", "Which language do I know?"),
    "hate": (("coriander", "olives", "liquorice", "beetroot"), "I hate {}.", "What can't I stand?"),
}
_ALLERGENS = ("peanuts", "pollen", "penicillin", "shellfish", "walnuts", "lupin")
_MONTHS = ("January", "February", "March", "April", "June", "July", "August", "September", "October", "November")
_STARTS = [
    "Ot",
    "Mor",
    "Bri",
    "Zel",
    "Kas",
    "Wen",
    "Tor",
    "Il",
    "Fen",
    "Dra",
    "Quil",
    "Sab",
    "Lor",
    "Nim",
    "Hes",
    "Jor",
    "Vel",
    "Gri",
    "Per",
    "Ull",
    "Am",
    "Ro",
]
_MIDDLES = [*["ti", "ga", "mo", "ra", "be", "lu", "ni", "sa", "ve", "do"], ""]
_ENDS = [
    "lie",
    "stern",
    "ran",
    "dric",
    "wyn",
    "beth",
    "vik",
    "nor",
    "mund",
    "ta",
    "dis",
    "kel",
    "pha",
    "rion",
    "mas",
    "lind",
]


def draw(count: int, seed: int) -> list[Fact]:
    """``count`` facts (at most about 200) that don't contradict each other; the same seed gives the same ones."""
    chance = random.Random(seed)
    taken: set[str] = set()

    def name() -> str:
        while True:
            made = chance.choice(_STARTS) + chance.choice(_MIDDLES) + chance.choice(_ENDS)
            if made not in taken:
                taken.add(made)
                return made

    def number() -> str:
        while True:
            made = str(chance.randrange(13, 990))
            if made not in taken:
                taken.add(made)
                return made

    kinds: list[Callable[[], list[Fact]]] = [
        lambda: [Fact(f"My {who} is called {(n := name())}.", f"Who is my {who}?", n) for who in _PEOPLE],
        lambda: [Fact(f"My {pet}'s name is {(n := name())}.", f"What did I name my {pet}?", n) for pet in _PETS],
        lambda: [Fact(f"My {it} is called {(n := name())}.", f"Which name did I give my {it}?", n) for it in _NAMED],
        lambda: [
            Fact(f"My favourite {what} is {(v := chance.choice(values))}.", f"Which {what} do I like best?", v)
            for what, values in _FAVOURITES.items()
        ],
        lambda: [Fact(f"My {what} is {(n := number())}.", question, n) for what, question in _NUMBERS.items()],
        lambda: [Fact(said.format(v := chance.choice(vs)), ask, v) for vs, said, ask in _VERBS.values()],
        lambda: [
            Fact(f"I live in {(v := chance.choice(_PLACES))}.", "Which city is home for me?", v),
            Fact(f"I work as a {(v := chance.choice(_JOBS))}.", "What do I do for a living?", v),
            Fact(f"I'm allergic to {(v := chance.choice(_ALLERGENS))}.", "Which thing could make me ill?", v),
            Fact(f"I was born in {(v := chance.choice(_PLACES))}.", "What is my place of birth?", v),
        ],
        lambda: [
            Fact(f"My {who} lives in {(v := chance.choice(_PLACES))}.", f"Which city is home for my {who}?", v)
            for who in _PEOPLE
        ],
        lambda: [
            Fact(f"My {who} works as a {(v := chance.choice(_JOBS))}.", f"What does my {who} do for a living?", v)
            for who in _PEOPLE
        ],
        lambda: [
            Fact(
                f"My {who}'s birthday is on {(v := f'{chance.randrange(1, 29)} {chance.choice(_MONTHS)}')}.",
                f"When do we celebrate my {who}?",
                v,
            )
            for who in _PEOPLE
        ],
    ]
    groups = [kind() for kind in kinds]
    for group in groups:
        chance.shuffle(group)
    # In turn, so that ten facts are ten kinds of facts.
    longest = max(map(len, groups))
    ordered = [group[at] for at in range(longest) for group in chance.sample(groups, len(groups)) if at < len(group)]
    return ordered[:count]


def read(path: Path) -> list[Fact]:
    """Facts from a text file with lines "statement | natural question | value"; empty lines and # lines are passed."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    parts = [[part.strip() for part in line.split("|")] for line in lines if line and not line.startswith("#")]
    wrong = next((row for row in parts if len(row) != 3 or not all(row)), None)
    if wrong is not None or not parts:
        raise SystemExit(f"{path}: each line is 'statement | natural question | value', not {wrong}")
    return [Fact(*row) for row in parts]
