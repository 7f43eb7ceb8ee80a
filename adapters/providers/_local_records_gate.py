"""The trial of recalled records as KV on one model: made-up lists, questions about them, and the bar.

Knows how far composed records may be from the same records as text; knows nothing of how they are composed
(_local_records.py). Whoever changes the lists, the measures or the bar changes `VERSION`: verdicts are tried anew.

Measured per list, over the tokens of two given answers: KL(text || variant) in nats, and the answers' mean
log-likelihood. Variants: the records composed, the same records as text in another order, and no records at all.
"""

from __future__ import annotations

import itertools
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ._local_generate import Engine
    from ._local_records import Recall, RecordStates, Step

__all__ = ["LEAST_KEPT", "LISTS", "MOST_KL", "NOISE", "VERSION", "MadeUp", "Measured", "Stopped", "judge", "passes"]

log = logging.getLogger("agentmem")

VERSION = 1

#: Another order of eight records.
_MIXED = (3, 7, 0, 5, 1, 6, 2, 4)
#: The bar: mean KL in nats, also as times the KL of another order of the same records.
MOST_KL = 0.2
NOISE = 2.0
#: Share of what the records add to the answers' log-likelihood that must be kept. Between lists it varies by a tenth,
#: so that six of them know it to some four points: a model that keeps the 86 % that is asked for must not fail by luck.
LEAST_KEPT = 0.8


class Stopped(Exception):
    """The trial was interrupted. Never leaves the provider."""


@dataclass(frozen=True)
class MadeUp:
    """Eight records as (day, name, text), and two questions with their answers."""

    records: tuple[tuple[str, str, str], ...]
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Measured:
    """One list: KL of composed and of shuffled records, and what records and composed records add to the answers."""

    kl: float
    shuffled_kl: float
    gain: float
    kept: float


LISTS = (
    MadeUp(
        (
            ("2023-01-14", "Ines", "I started learning the cello last month. My teacher Mr. Albrecht is very patient."),
            ("2023-01-20", "Omar", "Great! I mostly bake on weekends, last Sunday it was a rye bread with walnuts."),
            ("2023-02-03", "Ines", "Our first recital is on the 18th of March in the old town hall."),
            ("2023-02-11", "Omar", "My sister Leila moved to Lisbon and works as a marine biologist there now."),
            ("2023-02-27", "Ines", "Have you ever been to Portugal? I'd love to go one day."),
            ("2023-03-05", "Omar", "Twice! We stayed in a small house near the beach in Ericeira."),
            ("2023-03-19", "Ines", "The recital went well, I only missed one note. My parents brought yellow tulips."),
            ("2023-04-02", "Omar", "Congratulations! I burned my hand on the oven, so no bread for two weeks."),
        ),
        (
            ("What does Omar's sister Leila do for a living?", "She is a marine biologist"),
            ("Who teaches Ines the cello?", "Mr. Albrecht"),
        ),
    ),
    MadeUp(
        (
            ("2024-05-01", "Greta", "We painted the boat blue and white and named it Marigold."),
            ("2024-05-04", "Paul", "What a pretty name. Is the engine working again?"),
            ("2024-05-12", "Greta", "Yes, my uncle repaired it on Saturday. It was only a broken fuel line."),
            ("2024-05-20", "Paul", "I ran my first half marathon in one hour and fifty two minutes!"),
            ("2024-06-02", "Greta", "Impressive! We will sail to the island of Hiddensee in the first week of July."),
            (
                "2024-06-09",
                "Paul",
                "Take a warm jacket with you. I will be in Vienna then, for a conference on bridges.",
            ),
            (
                "2024-07-15",
                "Greta",
                "The trip was wonderful, we saw seals every morning. [shares a photo: seals on a sandbank]",
            ),
            ("2024-07-22", "Paul", "My talk in Vienna went fine, and I met an old friend from school, Dominik."),
        ),
        (("What is the name of Greta's boat?", "Marigold"), ("Why was Paul in Vienna?", "For a conference on bridges")),
    ),
    MadeUp(
        (
            ("2022-09-03", "Tanya", "My dog Biscuit had to see the vet because of his left ear."),
            ("2022-09-05", "Luis", "Poor Biscuit! I hope he gets well soon. How old is he?"),
            ("2022-09-06", "Tanya", "He will be nine in December. The vet gave us drops, twice a day."),
            ("2022-09-18", "Luis", "I quit my job at the bank and opened a bicycle repair shop in Calle Mayor."),
            ("2022-10-01", "Tanya", "That is brave! What is the shop called?"),
            ("2022-10-02", "Luis", "It's called Second Wind. I have repaired forty bicycles already."),
            ("2022-11-11", "Tanya", "I'm allergic to peanuts, so please no satay sauce at the party."),
            ("2022-11-12", "Luis", "Noted! There will be paella and a lemon cake that my grandmother makes."),
        ),
        (("What is Tanya allergic to?", "Peanuts"), ("What is Luis's bicycle repair shop called?", "Second Wind")),
    ),
    MadeUp(
        (
            ("2025-02-02", "Hannah", "I got a scholarship to study astronomy in Edinburgh, starting in September."),
            ("2025-02-03", "Victor", "Wow, congratulations! Will you live in a dormitory?"),
            ("2025-02-10", "Hannah", "No, I found a room in a flat with two nurses, near the botanical garden."),
            ("2025-03-01", "Victor", "I adopted a parrot. He is green, his name is Captain, and he swears in Dutch."),
            ("2025-03-08", "Hannah", "Ha! Who taught him that?"),
            ("2025-03-09", "Victor", "His last owner was a sailor from Rotterdam."),
            ("2025-04-21", "Hannah", "I sold my old telescope to a school for three hundred pounds."),
            ("2025-05-05", "Victor", "My knee surgery is on the twelfth of May, so I can't come to the concert."),
        ),
        (
            ("What will Hannah study in Edinburgh?", "Astronomy"),
            ("When is Victor's knee surgery?", "On the twelfth of May"),
        ),
    ),
    MadeUp(
        (
            ("2023-06-10", "Amara", "Our book club reads a novel about lighthouse keepers this month."),
            ("2023-06-11", "Jonas", "I prefer audio books, I listen to them on the train to Basel."),
            ("2023-06-25", "Amara", "My son Kofi lost his first tooth and is very proud of it."),
            ("2023-07-07", "Jonas", "How sweet! My daughter wants to become a beekeeper, like my aunt Ruth."),
            ("2023-07-19", "Amara", "We will spend August with my mother in Accra."),
            ("2023-08-30", "Jonas", "The garden flooded after the storm and the old pear tree fell down."),
            ("2023-09-09", "Amara", "I'm sorry to hear that. Did the bees survive?"),
            ("2023-09-10", "Jonas", "Yes, all four hives stand on the hill. We harvested twenty kilos of honey."),
        ),
        (
            ("Where did Amara's family spend August?", "With her mother in Accra"),
            ("How much honey did Jonas harvest?", "Twenty kilos"),
        ),
    ),
    MadeUp(
        (
            ("2024-10-01", "Mei", "I finally passed my driving test, at the third attempt!"),
            ("2024-10-02", "Stefan", "Well done! Which car will you buy?"),
            ("2024-10-15", "Mei", "A used red Fiat from my neighbour. It has a dent in the door."),
            ("2024-11-03", "Stefan", "I play chess in a club on Tuesdays now, and I lost all of my games so far."),
            ("2024-11-20", "Mei", "My restaurant will open on the first of February. It serves dumplings from Harbin."),
            ("2024-12-24", "Stefan", "Merry Christmas! Anna and I are engaged, we will marry in June."),
            ("2025-01-05", "Mei", "That is wonderful news! Where will the wedding be?"),
            ("2025-01-06", "Stefan", "In the garden of her parents in Graz, with only thirty guests."),
        ),
        (
            ("What colour is Mei's car?", "Red"),
            ("Where will Stefan's wedding be?", "In the garden of Anna's parents in Graz"),
        ),
    ),
)


def judge(states: RecordStates, engine: Engine, recall: Recall, running: Callable[[], None]) -> None:
    """Measure what is left to measure, note each list as it is done, and at last the verdict.

    ``running`` raises `Stopped` where the trial is to end; it is asked before every pass of the model. A trial that was
    stopped goes on with the next list.
    """
    noted = recall.pages.verdict(recall.subject)
    done = noted.get("lists", []) if noted.get("version") == VERSION else []
    for made_up in LISTS[len(done) :]:
        measured = _measured(states, engine, recall, made_up, running)
        done = [*done, [measured.kl, measured.shuffled_kl, measured.gain, measured.kept]]
        recall.pages.note(recall.subject, {"version": VERSION, "lists": done})
    passed, sentence = passes([Measured(*row) for row in done])
    recall.pages.note(recall.subject, {"version": VERSION, "lists": done, "passed": passed, "reason": sentence})
    mode = f"the first {recall.skip} tokens of each computed" if recall.skip else "nothing of them computed"
    log.log(
        logging.INFO if passed else logging.WARNING,
        "recalled records %s for %s (%s): %s",
        "enter as KV" if passed else "stay text",
        engine.name,
        mode,
        sentence,
    )


def passes(lists: Sequence[Measured]) -> tuple[bool, str]:
    """Whether these measurements meet the bar, and what they say."""
    kl, noise, gain, kept = (
        statistics.fmean(getattr(one, name) for one in lists) for name in ("kl", "shuffled_kl", "gain", "kept")
    )
    share = kept / gain if gain > 0 else 0.0
    sentence = (
        f"KL from text {kl:.3f} (another order of the text: {noise:.3f}), {share:.0%} of what they add to answers kept"
    )
    return kl <= MOST_KL and kl <= NOISE * noise and share >= LEAST_KEPT, sentence


def _measured(
    states: RecordStates, engine: Engine, recall: Recall, made_up: MadeUp, running: Callable[[], None]
) -> Measured:
    primer, skip, loras = recall.primer, recall.skip, recall.loras

    def step(cache: Any) -> Step:
        def run(tokens: Sequence[int], inputs: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
            running()
            return engine.forward(tokens, cache, loras, None, inputs=inputs)[0]

        return run

    def said(cache: Any, tokens: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [answer, vocabulary] behind what ``cache`` holds, which is then as it was."""
        running()
        length = cache.get_seq_length()
        logits, _ = engine.forward([*tokens, *answer[:-1]], cache, loras, None, keep=len(answer))
        for layer in cache.layers:
            layer.restored(length)
        return logits.log_softmax(-1)

    pieces = []
    for question, reply in made_up.questions:
        turn, written = recall.pages.lay_out(made_up.records, question)
        bare, _ = recall.pages.lay_out((), question)
        piece = engine.template.pieces((*recall.system, *turn), written)
        if piece is None:
            raise Stopped
        without = engine.template.prompt((*recall.system, *bare)).tokens
        pieces.append((piece, without, engine.template.encode(reply)))
    head, lines = pieces[0][0].head.tokens, pieces[0][0].lines
    rows = []
    for line in lines:
        running()
        keys, values = states.made(primer, line, loras, None)
        rows.append(states.settled((keys[:, :, skip:], values[:, :, skip:]), recall.pages))
    mixed = [lines[place] for place in _MIXED]
    capacity = len(head) + sum(map(len, lines)) + 128

    def text(order: Sequence[Sequence[int]]) -> Any:
        cache = engine.states.empty(capacity)
        tokens = [*head, *itertools.chain.from_iterable(order)]
        for start in range(0, len(tokens), 256):
            step(cache)(tokens[start : start + 256], None)
        return cache

    whole, shuffled = text(lines), text(mixed)
    composed = engine.states.empty(capacity)
    step(composed)(head, None)
    states.placed(
        composed, at=len(head), lines=lines, rows=rows, primer=primer, skip=skip, rest=[], step=step(composed)
    )
    kls, noises, gains, kept = [], [], [], []
    for piece, without, answer in pieces:
        wanted, got, other = (said(cache, piece.rest, answer) for cache in (whole, composed, shuffled))
        none = said(engine.states.empty(capacity), without, answer)
        kls.append(_kl(wanted, got))
        noises.append(_kl(wanted, other))
        gains.append(_likelihood(wanted, answer) - _likelihood(none, answer))
        kept.append(_likelihood(got, answer) - _likelihood(none, answer))
    return Measured(*(statistics.fmean(values) for values in (kls, noises, gains, kept)))


def _kl(wanted: torch.Tensor, got: torch.Tensor) -> float:
    return float((wanted.exp() * (wanted - got)).sum(-1).mean())


def _likelihood(said: torch.Tensor, answer: Sequence[int]) -> float:
    return float(said.gather(1, torch.tensor(list(answer))[:, None]).mean())
