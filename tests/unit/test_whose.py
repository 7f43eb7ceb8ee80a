"""Whose matters a question and a record are about, by grammar."""

from __future__ import annotations

import pytest

from agentmem.plaintext.concerning import concerned
from agentmem.plaintext.whose import personal, points_back, same_people
from agentmem.types import Hit, Record

DOG, HOME, TEA = "My dog is called Biscuit.", "I live in Tromsø.", "My favourite tea is sencha."
SISTER = "My sister's name is Ingrid."


@pytest.mark.parametrize(
    ("question", "record"),
    [
        ("What is my dog's name?", DOG),
        ("What's my dog called?", DOG),
        ("what is my dog called", DOG),
        ("Do you remember the name of my dog?", DOG),
        ("What is the name of my pet?", DOG),
        ("What is my pet's name?", DOG),
        ("Who is Biscuit?", DOG),
        ("Where do I live?", HOME),
        ("What is the place where I live?", HOME),
        ("Remind me where I live.", HOME),
        ("Where could you visit me?", HOME),
        ("Which tea do I like best?", TEA),
        ("What is my sister called?", SISTER),
        ("Do I have a sister? Who is it?", SISTER),
        ("Who are my siblings?", SISTER),
        ("What is my brother's job?", "My brother Olaf is a chef in Lyon."),
        ("What does Olaf do?", "My brother Olaf is a chef in Lyon."),
        ("What is my kid called?", "My daughter Mia starts school in August."),
        ("What is my mum's birthday?", "My mother's birthday is on 9 October."),
        ("What could make me ill?", "I'm allergic to peanuts."),
        ("Does our flight leave at nine?", "Our flight leaves at 9 from Oslo."),
        ("Where did Maria move?", "Maria moved to Berlin."),
        ("Wie heißt mein Hund?", "Mein Hund heißt Biscuit."),
    ],
)
def test_the_same_people(question: str, record: str) -> None:
    assert same_people(question, record)


@pytest.mark.parametrize(
    ("question", "record"),
    [
        ("What is my neighbour Bob's dog called?", DOG),
        ("What is Bob\u2019s dog called?", DOG),
        ("What is the dog of my neighbour called?", DOG),
        ("What is the name of the postman's dog?", DOG),
        ("What is the dog of Maria called?", DOG),
        ("What is my cat's name?", DOG),
        ("What is your dog called?", DOG),
        ("What is a good name for a dog?", DOG),
        ("Tell me a common name for a dog.", DOG),
        ("Can you tell me a good name for a dog?", DOG),
        ("Where does my colleague Yusuf live?", HOME),
        ("Where does our plumber live?", HOME),
        ("Where does Maria live?", HOME),
        ("Tell me where Maria lives.", HOME),
        ("Where do you live?", HOME),
        ("Which tea does my aunt Greta like best?", TEA),
        ("What is my brother's favourite tea?", TEA),
        ("What is the favourite tea of my cellist?", TEA),
        ("When was my plumber born?", "I was born on 12 March 1988."),
        ("What is the name of Maria's sister?", SISTER),
        ("What is my brother called?", SISTER),
        ("What is my brother-in-law Stefan allergic to?", "I'm allergic to peanuts."),
        ("What does a marine biologist do?", "I work as a marine biologist."),
    ],
)
def test_other_people(question: str, record: str) -> None:
    assert not same_people(question, record)


CLUB, EGGS = "Our book club meets every second Thursday.", "I boil my eggs for seven minutes."
WIFI, PUMP = "The wifi password of the boathouse is plover-29.", "To restart the pump, hold the green button."


@pytest.mark.parametrize(
    ("question", "record"),
    [
        ("When is my book club?", CLUB),
        ("On which evening is book club?", CLUB),
        ("Where does the book club meet?", CLUB),
        ("Where is the van?", "I parked my van behind the bakery."),
        ("What did I boil?", EGGS),
        ("How do I boil my eggs?", EGGS),
        ("How long do I boil the eggs?", EGGS),
        ("How do I get to work?", "I cycle to work."),
        ("How do I usually cook rice?", "I cook rice in coconut milk."),
        ("What is the wifi password of the boathouse?", WIFI),
        ("How can I get online at the boathouse?", WIFI),
        ("How do I restart the pump?", PUMP),
        ("What is the code for the internet in the morning?", "The code is 4471."),
        ("When is the dentist in my calendar?", "The dentist is on 3 May."),
        ("Where did my manager go?", "My boss went to Rome."),
    ],
)
def test_the_same_thing(question: str, record: str) -> None:
    assert same_people(question, record)


@pytest.mark.parametrize(
    ("question", "record"),
    [
        ("When is my chess club?", CLUB),
        ("What is a book club?", CLUB),
        ("When is your book club?", CLUB),
        ("What is book club etiquette?", CLUB),
        ("Where do chess clubs meet?", CLUB),
        ("How do I boil an egg?", EGGS),
        ("How long should I boil an egg?", EGGS),
        ("How do I cook rice?", "I cook rice in coconut milk."),
        ("What is the wifi password of the library?", WIFI),
        ("What is the hotel's wifi password?", WIFI),
        ("What is the wifi password at the hotel?", "The wifi password is hunter2."),
        ("How do I restart my router?", PUMP),
        ("How do I restart a computer?", PUMP),
        ("What is a pump?", PUMP),
        ("Why doesn't Priya fly with them?", "I don't fly with them."),
        ("Where did the baker get engaged?", "I got engaged in Prague."),
        ("Tell me what the man next door is getting.", "We are getting a puppy."),
    ],
)
def test_another_thing(question: str, record: str) -> None:
    assert not same_people(question, record)


def test_a_speaker_is_whom_a_question_names() -> None:
    assert same_people("Where did Caroline move?", "I moved to Sweden.", "Caroline")
    assert same_people("What is Caroline's dog called?", DOG, "Caroline Berg")
    assert not same_people("Where did Melanie move?", "I moved to Sweden.", "Caroline")


@pytest.mark.parametrize(
    "question", ["And her age?", "How old is she?", "What about the colour?", "Why?", "Is it big?"]
)
def test_what_points_back(question: str) -> None:
    assert points_back(question)


@pytest.mark.parametrize(
    "question", ["And Bob's dog?", "What is my dog called?", "Who painted the Mona Lisa?", "Sing."]
)
def test_what_stands_for_itself(question: str) -> None:
    assert not points_back(question)


@pytest.mark.parametrize(
    "text", ["", "?", "'s", "I", "of my", "Does my", "my", "what about my old", "\u2019s\u2019", "A" * 9999]
)
def test_any_text_is_taken(text: str) -> None:
    assert same_people(text, text) in (True, False)
    assert points_back(text) in (True, False)


BOILER = "To reset the boiler, hold the grey lever for eleven seconds."


def test_what_is_nobodys_own() -> None:
    assert not personal(BOILER)
    assert personal(DOG)


def test_what_is_nobodys_own_concerns_only_what_it_likely_answers() -> None:
    boiler, dog = Record(id="boiler", text=BOILER), Record(id="dog", text=DOG)
    unlikely = [Hit(record=boiler, score=0.05), Hit(record=dog, score=0.02)]
    assert concerned("What is 12 times 9?", unlikely, {"boiler", "dog"}) == []
    assert concerned("What is my dog called?", unlikely, {"boiler", "dog"}) == ["dog"]
    likely = [Hit(record=boiler, score=0.7), Hit(record=dog, score=0.02)]
    assert concerned("How is the boiler reset?", likely, {"boiler", "dog"}) == ["boiler"]


def test_a_thing_that_is_not_asked_for_as_ones_own_has_to_be_likely() -> None:
    club = Record(id="club", text=CLUB)
    assert concerned("On which evening is book club?", [Hit(record=club, score=0.9)], {"club"}) == ["club"]
    assert concerned("On which evening is book club?", [Hit(record=club, score=0.05)], {"club"}) == []
    assert concerned("When is my book club?", [Hit(record=club, score=0.05)], {"club"}) == ["club"]


def test_what_to_do_in_a_case_is_told_and_not_asked() -> None:
    router = Record(id="router", text="When the router blinks red, unplug it.")
    hits = [Hit(record=router, score=0.8)]
    assert concerned("What do I do when the router blinks red?", hits, {"router"}) == ["router"]
    asking = Record(id="asking", text="When the router blinks red, what do I do?")
    assert concerned("What do I do when the router blinks red?", [Hit(record=asking, score=0.8)], {"asking"}) == []
