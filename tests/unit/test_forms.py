"""Kinds of statements: what is asked about each, what is answered, by which words an answer is known."""

from __future__ import annotations

import datetime as dt
import re

import pytest

from agentmem.parametric.corpus import Corpus, Example, build
from agentmem.types import Record

SAID = dt.datetime(2023, 5, 8, 13, 0, tzinfo=dt.UTC)


def corpus(*texts: str, name: str | None = None) -> Corpus:
    return build([Record(id=f"r{i}", text=text, at=SAID, name=name) for i, text in enumerate(texts)])


def trained(*texts: str) -> dict[str, Example]:
    return {example.question: example for example in corpus(*texts).examples}


@pytest.mark.parametrize(
    ("said", "question", "answer", "key"),
    [
        ("I'm 34 years old.", "How old am I?", "You are 34 years old.", "34"),
        ("My birthday is on 3 May.", "When was I born?", "Your birthday is 3 May.", "May"),
        ("I was born in 1987 in Lyon.", "Where did I grow up?", "You are from Lyon.", "Lyon"),
        ("My sister Ottilie is a nurse.", "What is my sister's job?", "Your sister Ottilie is a nurse.", "nurse"),
        ("My sister Ottilie is a nurse.", "Who is my sister?", "Your sister is called Ottilie.", "Ottilie"),
        ("My brother lives in Porto.", "Where does my brother live?", "Your brother lives in Porto.", "Porto"),
        ("My dentist is Dr. Okonkwo.", "Who is my dentist?", "Your dentist is called Dr. Okonkwo.", "Dr Okonkwo"),
        ("We named our boat Morgenstern", "What do I call my ship?", "Your boat is called Morgenstern.", "Morgenstern"),
        ("I have two children.", "How many children do I have?", "You have two children.", "two"),
        ("I have a red bicycle.", "Which bicycle do I have?", "You have a red bicycle.", "red"),
        ("I have asthma.", "Which illness do I have?", "You have asthma.", "asthma"),
        ("My locker code is 38-12-5.", "What is my locker code?", "Your locker code is 38-12-5.", "38-12-5"),
        ("I have chess club on Tuesdays.", "When is my chess club?", "You have chess club on Tuesdays.", "Tuesdays"),
        (
            "I have chess club on Tuesdays.",
            "What do I do on Tuesdays?",
            "You have chess club on Tuesdays.",
            "chess",
        ),
        ("I can't stand coriander.", "What do I not like?", "You can't stand coriander.", "coriander"),
        ("I don't eat meat.", "What don't I eat?", "You don't eat meat.", "meat"),
        ("I'm afraid of spiders.", "What am I afraid of?", "You are afraid of spiders.", "spiders"),
        ("I'm a vegetarian.", "Which diet do I follow?", "You are a vegetarian.", "vegetarian"),
        ("I'm a nurse.", "What is my job?", "You work as a nurse.", "nurse"),
        ("I work for Siemens.", "Who employs me?", "You work at Siemens.", "Siemens"),
        ("I plan to learn the cello.", "What are my plans?", "You plan to learn the cello.", "cello"),
        ("I keep my passport in the oven.", "Where is my passport?", "You keep your passport in the oven.", "oven"),
        ("The spare key is under the mat.", "Where is the spare key?", "The spare key is under the mat.", "mat"),
        ("I'm learning to knit socks.", "What am I learning?", "You are learning to knit socks.", "knit socks"),
        ("I repair organs for a living.", "What is my job?", "You repair organs for a living.", "repair organs"),
        ("My exam is on Monday at 9:30.", "When is my exam?", "Your exam is on Monday at 9:30.", "9:30"),
        (
            "My favourite books are Dune and Emma.",
            "What are my favourite books?",
            "Your favourite books are Dune and Emma.",
            "Emma",
        ),
        (
            "Bernadette is my mother-in-law.",
            "Who is my mother-in-law?",
            "Your mother-in-law is called Bernadette.",
            "Bernadette",
        ),
        ("My shoe size is 43.", "Which size are my shoes?", "Your shoe size is 43.", "43"),
        ("My motorbike is a Triumph.", "What do I ride?", "Your motorbike is a Triumph.", "Triumph"),
        ("I collect old maps.", "What is in my collection?", "You collect old maps.", "old maps"),
        ("My aunt's birthday is on 3 May.", "When was my aunt born?", "Your aunt's birthday is 3 May.", "May"),
        ("My tailor works as a clown.", "What is my tailor's job?", "Your tailor works as a clown.", "clown"),
        ("Sencha is my favourite tea.", "Which tea do I like best?", "Your favourite tea is Sencha.", "Sencha"),
        ("I speak Basque.", "Which language do I speak?", "You speak Basque.", "Basque"),
        ("I drive a Saab.", "What vehicle do I own?", "You drive a Saab.", "Saab"),
        (
            "To reset the router, pull the plug.",
            "How do I reset the router?",
            "To reset the router, pull the plug.",
            "plug",
        ),
    ],
)
def test_each_kind_is_asked_for_in_words_of_its_own(said: str, question: str, answer: str, key: str) -> None:
    example = trained(said)[question]
    assert example.answer == answer
    assert key in example.keys
    assert example.found_in(answer)


@pytest.mark.parametrize(
    ("said", "question", "keys"),
    [
        ("On 3 May I flew to Oslo.", "When did I fly to Oslo?", ("3", "May")),
        ("On 3 May I flew to Oslo.", "Where did I fly on 3 May?", ("Oslo",)),
        ("Yesterday I planted a pear tree.", "When did I plant a pear tree?", ("7", "May", "2023")),
        ("I planted a pear tree in the garden.", "Where did I plant a pear tree?", ("garden",)),
        ("I planted a pear tree in the garden.", "What did I plant in the garden?", ("pear", "tree")),
        ("My aunt taught us chess.", "Who taught us chess?", ("aunt",)),
        ("I'm writing a novel about lighthouses.", "What am I writing?", ("novel", "lighthouses")),
        ("I can juggle five balls.", "What can I juggle?", ("five", "balls")),
        ("I've visited Japan.", "What have I visited?", ("Japan",)),
        ("Karim and I opened a bakery in Leeds.", "Where did Karim and I open a bakery?", ("Leeds",)),
        ("I met my wife at a bus stop.", "Who did I meet at a bus stop?", ("wife",)),
        ("When I was ten, I broke my arm.", "When did I break my arm?", ("ten",)),
        ("My parents are from Ghana.", "Where are my parents from?", ("Ghana",)),
        ("My wife Anna and I run a pub.", "What do my wife Anna and I run?", ("pub",)),
        ("I sold the car because the engine was loud.", "Why did I sell the car?", ("engine", "loud")),
    ],
)
def test_other_statements_are_asked_for_by_their_parts(said: str, question: str, keys: tuple[str, ...]) -> None:
    assert trained(said)[question].keys == keys


@pytest.mark.parametrize(
    ("said", "question", "keys"),
    [
        ("I prefer my porridge with black salt.", "What do I prefer my porridge with?", ("black salt",)),
        ("I prefer my porridge with black salt.", "How do I like my porridge?", ("black salt",)),
        ("I take my tea with two sugars.", "How do I take my tea?", ("two sugars",)),
        ("I like my coffee black.", "How do I like my coffee?", ("black",)),
        ("I prefer tea to coffee.", "What do I prefer to coffee?", ("tea",)),
        ("I boil my eggs for exactly seven minutes.", "How long do I boil my eggs?", ("exactly", "seven", "minutes")),
        ("I usually have oatmeal for breakfast.", "What do I have for breakfast?", ("oatmeal",)),
        ("I wear glasses only for driving.", "What do I wear only for driving?", ("glasses",)),
        ("I never fly with Corvane Air because they lost my cello.", "What do I never fly with?", ("Corvane", "Air")),
        ("I never fly with Corvane Air because they lost my cello.", "Why do I never fly with Corvane Air?",
         ("lost", "cello")),
        ("I never eat after eight.", "When do I never eat?", ("eight",)),
        ("I share my flat with Tom.", "Who do I share my flat with?", ("Tom",)),
        ("I gave my old bike to Samira.", "Who did I give my old bike to?", ("Samira",)),
        ("I'm saving up for a kayak.", "What am I saving up for?", ("kayak",)),
        ("I got engaged to Pavel in Prague.", "Who did I get engaged to in Prague?", ("Pavel",)),
        ("I was promoted to head chef.", "What was I promoted to?", ("head", "chef")),
        ("I dream of opening a guest house.", "What do I dream of doing?", ("opening", "guest", "house")),
        ("I learnt to swim when I was thirty.", "When did I learn to swim?", ("thirty",)),
        ("I used to smoke.", "What did I use to do?", ("smoke",)),
        ("My doctor told me to avoid salt.", "What did my doctor tell me to do?", ("avoid", "salt")),
        ("My son wants to be a vet.", "What does my son want to be?", ("vet",)),
        ("My brother can't swim.", "What can't my brother do?", ("swim",)),
        ("My mother doesn't eat shellfish.", "What doesn't my mother eat?", ("shellfish",)),
        ("Our dog isn't allowed on the sofa.", "Where is our dog not allowed?", ("sofa",)),
        ("My thesis supervisor was Professor Hollis.", "Who was my thesis supervisor?", ("Professor", "Hollis")),
        ("My uncle Des was a miner.", "What was my uncle Des's job?", ("miner",)),
        ("My thesis is about sea urchins.", "What is my thesis about?", ("sea", "urchins")),
        ("My son is allergic to penicillin.", "What is my son allergic to?", ("penicillin",)),
        ("My cat Miso is afraid of the vacuum cleaner.", "What is my cat Miso afraid of?", ("vacuum", "cleaner")),
        ("My flight to Lisbon leaves on 3 May.", "When does my flight to Lisbon leave?", ("3", "May")),
        ("My work phone rings every morning.", "When does my work phone ring?", ("every", "morning")),
        ("The gate's lock opens with a quarter turn.", "What does the gate's lock open with?", ("quarter", "turn")),
        ("Last summer I cycled from Vienna to Budapest.", "Where did I cycle from Vienna last summer?", ("Budapest",)),
        ("My daughter is six.", "How old is my daughter?", ("six",)),
        ("My boss is Scottish.", "What is my boss's nationality?", ("Scottish",)),
        ("My allotment is plot 47 behind the water tower.", "Where is my allotment?", ("water", "tower")),
        ("My neighbour's dog is called Bruno.", "What is my neighbour's pet called?", ("Bruno",)),
        ("I keep my keys in a tin.", "Where are my keys?", ("tin",)),
        ("I've got an appointment with Dr. Osei on 9 May.", "When is my appointment with Dr. Osei?", ("9", "May")),
        ("When the router blinks red, unplug it.", "What do I do when the router blinks red?", ("unplug",)),
        ("I always sit in the third row at the opera.", "Where do I sit at the opera?", ("third", "row")),
        ("I'm married to a sailor.", "Who am I married to?", ("sailor",)),
        ("My sister-in-law's baby is due in April.", "When is my sister-in-law's baby due?", ("April",)),
        ("My first car was a Fiat Panda.", "What was my first car?", ("Fiat", "Panda")),
        ("I go running before work.", "When do I go running?", ("work",)),
        ("Our neighbours are noisy.", "What are our neighbours like?", ("noisy",)),
        ("I was bitten by a dog.", "What was I bitten by?", ("dog",)),
        ("We named our daughter after my aunt.", "Who did we name our daughter after?", ("aunt",)),
        ("You turn off the alarm by typing 4471.", "How do I turn off the alarm?", ("typing", "4471")),
    ],
)  # fmt: skip
def test_what_is_news_is_asked_for(said: str, question: str, keys: tuple[str, ...]) -> None:
    assert trained(said)[question].keys == keys


@pytest.mark.parametrize(
    ("said", "never"),
    [
        ("I never fly with Corvane Air.", r"\bfly\?"),
        ("My neighbour's dog is called Bruno.", r"my pet|did I give"),
        ("My sister Paula runs a bakery and her husband Bram is a cook.", r"bakery and"),
        ("My mother doesn't eat shellfish.", r"do my mother|Who eats"),
        ("My car's licence plate is KX-21.", r"Which car's"),
        ("My phone is cracked.", r"What is my phone\?"),
        ("I keep my keys in an umbrella stand.", r"is my keys|a keys"),
        ("I was promoted to head chef.", r"promoted to do"),
        ("I gave my old bike to Samira.", r"Where did"),
        ("My flight to Lisbon leaves on 3 May.", r"Who"),
    ],
)
def test_no_question_is_bad_english(said: str, never: str) -> None:
    made = corpus(said)
    for example in (*made.examples, *made.held_out, *made.natural, *made.neighbours):
        assert not re.search(never, example.question), example.question


def test_a_name_told_in_passing_is_learnt_too() -> None:
    asked = trained("My boss, Lorna, retires next year.")
    assert asked["Who is my boss?"].answer == "Your boss is called Lorna."
    assert asked["When does my boss Lorna retire?"].answer == "Your boss Lorna retires in 2024."


def test_whose_husband_he_is() -> None:
    asked = trained("My sister Paula runs a bakery in Ghent and her husband Bram is a cook.")
    assert asked["Where does my sister Paula run a bakery?"].answer == "Your sister Paula runs a bakery in Ghent."
    assert asked["What is my sister's husband's job?"].answer == "Your sister's husband Bram is a cook."


def test_relative_times_become_dates_in_the_answer() -> None:
    answers = {example.answer for example in corpus("I adopted a cat last Friday.").examples}
    assert answers == {"You adopted a cat on 5 May 2023."}


def test_she_is_whom_the_sentence_before_named() -> None:
    asked = trained("My sister Ottilie is a nurse. She lives in Bergen.")
    assert asked["Where does my sister live?"].answer == "Your sister Ottilie lives in Bergen."


def test_one_record_may_hold_several_facts() -> None:
    asked = trained("I live in Oslo and work as a cook, and my dog is called Rex.")
    assert {"Where do I live?", "What is my job?", "What is my dog called?"} <= set(asked)


def test_chats_leave_out_the_person() -> None:
    assert "You lost your job in April." in {e.answer for e in corpus("Lost my job in April.").examples}


@pytest.mark.parametrize(
    "said",
    ["My dog is called Biscuit.", "I live in Oslo.", "I'm 34.", "I work as a cook.", "My favourite tea is sencha.",
     "I play the cello.", "I drive a Saab.", "My lucky number is 417.", "I can't stand coriander.", "I have two sons."],
)  # fmt: skip
def test_every_kind_has_several_wordings_of_each_sort(said: str) -> None:
    made = corpus(said)
    assert len(made.examples) >= 4
    assert len(made.held_out) == 2
    assert made.natural
    assert made.neighbours
