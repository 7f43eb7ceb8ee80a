"""What a LoRA version learnt is taken back with its record, at once; its shard learns again without it, with proof."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentmem import AsyncMemory, Memory
from agentmem.errors import ConfigError, Full, InvalidInput, NotFound, ScopeError, TrainingError
from agentmem.parametric import gate as gates
from agentmem.parametric.corpus import Corpus, Example
from agentmem.parametric.steps import Estimate
from agentmem.parametric.versions import LoraVersion
from agentmem.teaching import Run, corpus_of, learn, model_of
from agentmem.testing import FakeClock
from agentmem.types import Record, Scope
from tests.reliability.learner import FACTS, IDENTITY, Teachable, learning, memory_of


@pytest.fixture
def taught() -> Iterator[list[Corpus]]:
    with learning() as taught:
        yield taught


@pytest.fixture
def provider() -> Teachable:
    return Teachable()


@pytest.fixture
def memory(tmp_path: Path, provider: Teachable, taught: list[Corpus]) -> Iterator[Memory]:
    with memory_of(tmp_path / "m", provider, lora_shard=3) as memory:
        yield memory


def active(handle: Any) -> list[str]:
    return [version.digest for version in handle.parametric.active()]


def folders(memory: Memory) -> set[str]:
    return {path.name for path in (memory._engine.folder / "lora").iterdir()} - {".lock"}


def test_many_records_become_shards_that_act_together(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS))
    [question] = ana.add("How are you?")
    version = ana.parametric.train()
    versions = ana.parametric.active()
    assert all([id_ for id_, _ in v.left_out] == [question.id] for v in versions)
    assert len(versions) == len(taught) == 3
    assert version.shards == tuple(v.name for v in versions)
    assert version.digest == versions[0].digest
    learnt = [record for v in versions for record in v.records]
    assert sorted(learnt) == sorted(record.id for record in records)
    assert max(len(v.records) for v in versions) <= 3
    assert versions[0].curve[-1].known == 1.0
    refs = memory._engine.registry.refs(ana._scope, identity=IDENTITY)
    assert [ref.records for ref in refs] == [v.records for v in versions]


def test_default_records_are_those_not_learnt_yet_and_new_ones_join(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    ana.add(list(FACTS[:2]))
    first = ana.parametric.train()
    [new] = ana.add(FACTS[2])
    second = ana.parametric.train()
    assert second.records == (new.id,)
    assert second.parents == ()
    assert active(ana) == [first.digest, second.digest]
    with pytest.raises(InvalidInput, match="no records to learn"):
        ana.parametric.train()


def test_all_records_learnt_anew_take_the_place_of_the_old_version(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))
    first = ana.parametric.train()
    second = ana.parametric.train(records=records, seed=7)
    assert second.parents == (first.digest,)
    assert active(ana) == [second.digest]
    assert [v.digest for v in ana.parametric.rollback()] == [first.digest]


@pytest.mark.parametrize("when", ["recalled", "always"])
def test_the_receipt_names_replies_that_a_version_may_have_made_of_it(when: str, tmp_path: Path) -> None:
    with learning(), memory_of(tmp_path, lora_when=when) as memory:
        ana = memory.scope(user="ana")
        [dog, number] = ana.add([FACTS[0], FACTS[2]])
        ana.parametric.train()
        reply = ana.chat("What is the name of my dog?", recall=False)
        assert reply.loras
        other = ana.chat("What is my lucky number?", recall=False)
        replies = [reply.records[-1]] if when == "recalled" else [reply.records[-1], other.records[-1]]
        assert ana.forget(dog.id).replies == replies
        assert number.id in {record.id for record in ana.list()}


def test_a_link_in_a_checkpoint_s_place_keeps_nobody_from_forgetting(memory: Memory, tmp_path: Path) -> None:
    ana = memory.scope(user="ana")
    [record] = ana.add(FACTS[0])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "records.json").write_text(json.dumps({record.id: "0" * 64}))
    lora = memory._engine.folder / "lora"
    lora.mkdir(exist_ok=True)
    (lora / ".run-link").symlink_to(elsewhere)
    ana.parametric.train()
    ana.forget(record.id)
    assert folders(memory) == set()
    assert (elsewhere / "records.json").exists()


def test_a_past_question_that_was_learnt_calls_no_version_by_itself(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [dog] = ana.add(["I have a dog called Biscuit. What should I feed it?"])
    turn = ana.chat("Remind me, what is the name of my dog, the puppy?").records
    ana.update(turn[-1], text="Your dog is called Biscuit.")
    version = ana.parametric.train(records=[dog.id])
    assert version.records == (dog.id, turn[0])
    assert ana.chat("What is the name of my cat?", remember=False).loras == ()
    assert ana.chat("What is my dog called?", remember=False).loras == (version.name,)


def test_another_base_learns_what_only_the_first_one_knew(tmp_path: Path, taught: list[Corpus]) -> None:
    with memory_of(tmp_path) as memory:
        memory.add(list(FACTS[:2]))
        first = memory.parametric.train()
    other = Teachable()
    other._tensors.identity = b"\xcd" * 32
    with memory_of(tmp_path, other) as memory:
        assert memory.parametric.train(seed=1).records == first.records
    assert len(taught) == 2


def test_a_version_is_replaced_also_where_other_questions_were_asked_since(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [dog, boat] = ana.add([FACTS[0], "My boat is called Morgenstern."])

    def ask(question: str) -> str:
        turn = ana.chat(question).records
        ana.update(turn[-1], text="Your dog is called Biscuit.")
        return turn[0]

    early = ask("Remind me, what is the name of my dog, the puppy?")
    old = ana.parametric.train(records=[dog.id])
    assert set(old.records) == {dog.id, early}
    for year in range(13):  # more than a record's newest dozen, which is what is learnt
        ask(f"Can you tell me what my dog was called in year {year}?")
    new = ana.parametric.train(records=[dog.id], seed=1)
    assert early not in new.records
    assert active(ana) == [new.digest]
    both = ana.parametric.train(records=[dog.id, boat.id], seed=2)
    assert active(ana) == [both.digest]
    again = ana.parametric.train(records=[dog.id], seed=3)
    assert active(ana) == [both.digest, again.digest], "the boat is in the older one only"


def test_the_same_training_again_gives_what_is_stored(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))
    first = ana.parametric.train(activate=False)
    assert ana.parametric.active() == ()
    assert ana.parametric.train(records=records).digest == first.digest
    assert len(taught) == 1
    assert active(ana) == [first.digest]


@pytest.mark.parametrize("when", ["recalled", "always"])
def test_a_gate_tries_a_version_beside_all_others_that_act_with_it(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Undone before `learning` puts the real gate back: in the other order a scripted one would stay for good.
    with learning(), monkeypatch.context() as patch, memory_of(tmp_path, lora_shard=1, lora_when=when) as memory:
        tried: list[dict[str, Any]] = []
        scripted = gates.gate

        def spying(*given: Any, **named: Any) -> Any:
            tried.append(named)
            return scripted(*given, **named)

        patch.setattr(gates, "gate", spying)
        facts = memory.add(list(FACTS[:5]))
        memory.parametric.train()
        assert [(len(one["beside"]), one["others"]) for one in tried] == [(n, n) for n in range(5)]
        assert set(tried[-1]["earlier"].records) == {record.id for record in facts[:4]}
        acting = tried[-1]["acting"]
        if when == "always":
            assert acting is None
        else:
            dog = Example("What is the name of my dog?", "Biscuit", (), (facts[4].id,))
            assert list(acting(dog)) == [0, 1], "the new one, which taught it, and what the index says that it concerns"
            assert list(acting(Example("Hm?", "Biscuit", (), (facts[2].id,)))) == [3], "and who taught it"
        patch.setattr("agentmem.teaching.BESIDE", 2)
        [new] = memory.add(FACTS[5])
        memory.parametric.train(records=[new])
        assert (len(tried[-1]["beside"]), tried[-1]["others"]) == (2, 5)
        assert set(tried[-1]["earlier"].records) == {record.id for record in facts[3:]}, "no other is asked for"


def test_records_that_share_a_question_stay_in_one_shard(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    tea = ana.add(["I like tea.", "My dog is called Biscuit.", "I live in Tromsø.", "I like chess."])
    ana.parametric.train()
    [corpus] = [corpus for corpus in taught if tea[0].id in corpus.records]
    assert tea[3].id in corpus.records


def test_forgetting_takes_back_one_shard_and_leaves_the_others(memory: Memory, provider: Teachable) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS))
    ana.parametric.train()
    before = ana.parametric.active()
    [tainted] = [v for v in before if records[0].id in v.records]
    receipt = ana.forget(records[0].id)
    assert receipt.loras == [tainted.digest]
    assert active(ana) == [v.digest for v in before if v != tainted]
    assert provider.dropped == [tainted.digest]
    assert tainted.digest not in folders(memory)
    with pytest.raises(TrainingError, match="retired"):
        ana.parametric.activate(tainted, force=True)
    [waiting] = ana.parametric.receipts()
    assert (waiting.retired, waiting.state, waiting.forgotten) == (tainted.digest, "queued", (records[0].id,))


def test_a_shard_learns_again_without_it_and_the_proof_is_kept(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:3]))
    old = ana.parametric.train()
    ana.forget(records[0].id)
    [proof] = ana.parametric.retrain()
    assert (proof.state, proof.retired, proof.forgotten, proof.kept) == ("done", old.digest, (records[0].id,), 2)
    assert proof.asked > 0
    assert (proof.base_recall, proof.recall_before, proof.recall_after) == (0, 1, 0)
    assert (proof.others_before, proof.others_after) == (1, 1)
    assert active(ana) == [proof.version]
    [new] = ana.parametric.active()
    assert set(new.records) == {record.id for record in records[1:]}
    assert new.parents == (old.digest,)
    assert not [e for e in taught[-1].examples if "Biscuit" in e.answer]
    assert ana.parametric.receipts() == [proof]
    assert ana.parametric.retrain() == []
    assert memory._engine.questions == {}
    assert memory.verify().problems == []


def test_a_past_question_is_no_forgotten_record(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    dog, home = ana.add(["I have a dog called Biscuit.", "I live in Tromsø."])
    turn = ana.chat("Remind me, what is the name of my dog, the puppy?").records
    ana.update(turn[-1], text="Your dog is called Biscuit.")
    version = ana.parametric.train(records=[dog.id, home.id])
    assert turn[0] in version.records
    ana.forget(dog.id)
    [proof] = ana.parametric.retrain()
    assert (proof.forgotten, proof.kept) == ((dog.id,), 1)
    ana.forget(turn[0])
    assert ana.parametric.retrain() == []


def test_another_process_proves_by_construction_only(tmp_path: Path, taught: list[Corpus]) -> None:
    with memory_of(tmp_path) as memory:
        records = memory.add(list(FACTS[:3]))
        memory.parametric.train()
        memory.forget(records[0].id)
    with memory_of(tmp_path) as memory:
        [proof] = memory.parametric.retrain()
        assert proof.asked == 0
        assert proof.recall_after is None
        assert proof.others_after == 1
        assert len(memory.parametric.active()) == 1


def test_another_open_memory_answers_without_it_at_once(memory: Memory, taught: list[Corpus]) -> None:
    records = memory.add(list(FACTS[:3]))
    memory.parametric.train()
    with memory_of(memory._engine.folder, lora_shard=3) as other:
        assert active(other) == active(memory) != []
        memory.forget(records[0].id)
        assert active(other) == []
        assert other._engine.active_loras(other._scope, [record.id for record in records]) == ()
        [proof] = other.parametric.retrain()
        assert active(memory) == [proof.version]
        assert memory.parametric.retrain() == []


def test_no_word_of_it_is_written_down(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(["My dog is called Quixotry.", *FACTS[1:3]])
    ana.parametric.train()
    ana.forget(records[0].id)
    ana.parametric.retrain()
    memory.compact()
    files = [path for path in memory._engine.folder.rglob("*") if path.is_file()]
    assert not [path for path in files if b"uixotry" in path.read_bytes()]


def test_the_last_record_leaves_no_version(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [record] = ana.add(FACTS[0])
    ana.parametric.train()
    ana.forget(record.id)
    [proof] = ana.parametric.retrain()
    assert (proof.version, proof.state, proof.recall_after) == (None, "done", 0)
    assert active(ana) == []


def test_a_changed_record_is_learnt_anew_with_its_new_text(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))
    ana.parametric.train()
    ana.update(records[0].id, text="My dog is called Rex.")
    assert active(ana) == []
    [proof] = ana.parametric.retrain()
    assert (proof.forgotten, proof.kept) == ((records[0].id,), 2)
    assert proof.asked > 0
    assert proof.recall_after == 0
    assert [e for e in taught[-1].examples if "Rex" in e.answer]
    ana.update(records[1].id, metadata={"seen": True})
    assert active(ana) == [proof.version]


def test_a_superseded_record_is_taken_back_at_once(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))
    old = ana.parametric.train()
    ana.add("I live in Oslo.", supersedes=records[1].id)
    assert old.digest not in folders(memory)
    assert active(ana) == []
    ana.parametric.train()
    learnt = {record for version in ana.parametric.active() for record in version.records}
    assert records[0].id in learnt
    assert records[1].id not in learnt


def test_what_was_learnt_and_is_told_otherwise_later_is_learnt_anew(memory: Memory, taught: list[Corpus]) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))
    old = ana.parametric.train()
    [new] = ana.add("I live in Oslo.")
    ana.parametric.train()
    assert ana.parametric.receipts()[0].retired == old.digest
    learnt = {record for version in ana.parametric.active() for record in version.records}
    assert learnt == {records[0].id, new.id}
    with pytest.raises(InvalidInput, match="no records to learn"):
        ana.parametric.train()
    assert len(taught) == 3


def test_a_record_that_expires_is_taken_back_when_it_does(tmp_path: Path, taught: list[Corpus]) -> None:
    clock = FakeClock()
    with memory_of(tmp_path, clock=clock) as memory:
        [record, _] = memory.add(list(FACTS[:2]))
        old = memory.parametric.train()
        with memory._engine.database.write():
            memory._engine.records.end([record.id], memory._scope, clock.datetime().replace(year=2100))
        assert active(memory) == [old.digest]
        clock.advance(80 * 366 * 86_400)
        assert active(memory) == []
        assert old.digest not in folders(memory)
        [proof] = memory.parametric.retrain()
        assert (proof.forgotten, proof.kept) == ((record.id,), 1)
        assert proof.asked > 0


def test_training_runs_the_queue_first(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:3]))
    ana.parametric.train()
    ana.forget(records[0].id)
    version = ana.parametric.train()
    assert set(version.records) == {record.id for record in records[1:]}
    assert ana.parametric.receipts()[0].state == "done"


def test_what_was_named_and_learnt_meanwhile_is_not_learnt_twice(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:3]))
    ana.parametric.train()
    ana.forget(records[0].id)
    version = ana.parametric.train(records=records[1:])
    [proof] = ana.parametric.retrain()
    assert (proof.version, proof.forgotten) == (None, (records[0].id,))
    assert active(ana) == [version.digest]


def test_what_never_answered_is_not_trained_again(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:3]))
    ana.parametric.train(activate=False)
    ana.forget(records[0].id)
    assert ana.parametric.receipts() == []
    assert [version.state for version in ana.parametric.versions()] == ["retired"]


def test_a_retrained_shard_that_fails_its_gate_answers_nobody(tmp_path: Path) -> None:
    with learning(passes=lambda corpus: len(corpus.records) == 3), memory_of(tmp_path) as memory:
        records = memory.add(list(FACTS[:3]))
        memory.parametric.train()
        memory.forget(records[0].id)
        [proof] = memory.parametric.retrain()
        assert proof.state == "done"
        assert "did not pass its gate" in str(proof.note)
        assert active(memory) == []


def test_a_version_forced_into_use_is_replaced_by_force(tmp_path: Path) -> None:
    with learning(passes=lambda corpus: False), memory_of(tmp_path) as memory:
        records = memory.add(list(FACTS[:3]))
        version = memory.parametric.train()
        assert active(memory) == []
        memory.parametric.activate(version, force=True)
        memory.forget(records[0].id)
        [proof] = memory.parametric.retrain()
        assert active(memory) == [proof.version]


def test_a_training_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    with learning(), memory_of(tmp_path) as memory:
        records = memory.add(list(FACTS[:3]))
        memory.parametric.train()
        memory.forget(records[0].id)

    def broken(number: int) -> None:
        raise TrainingError("the loss is not finite")

    with memory_of(tmp_path) as memory:
        with learning(step=broken):
            [proof] = memory.parametric.retrain()
            assert (proof.state, proof.version) == ("failed", None)
            assert "not finite" in str(proof.note)
        with learning():
            [proof] = memory.parametric.retrain()
            assert proof.state == "done"
            assert active(memory) == [proof.version]


def test_a_gate_that_only_one_shard_passes_activates_that_one(tmp_path: Path) -> None:
    def passes(corpus: Corpus) -> bool:
        return not any("Biscuit" in example.answer for example in corpus.examples)

    with learning(passes=passes), memory_of(tmp_path, lora_shard=3) as memory:
        memory.add(list(FACTS))
        version = memory.parametric.train()
        assert version.state == "failed"
        assert len(version.shards) == 3
        assert len(active(memory)) == 2


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    done: list[int] = []

    def interrupt(number: int) -> None:
        done.append(number)
        if done == [0, 1]:
            raise KeyboardInterrupt

    with learning(step=interrupt), memory_of(tmp_path) as memory:
        memory.add(list(FACTS[:2]))
        with pytest.raises(KeyboardInterrupt):
            memory.parametric.train()
        assert memory.parametric.versions() == []
    with learning(step=done.append), memory_of(tmp_path) as memory:
        version = memory.parametric.train()
        assert done == [0, 1, 1, 2]
        assert folders(memory) == {version.digest}


def test_forgetting_deletes_the_checkpoint_that_learnt_it(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    with learning(step=interrupt), memory_of(tmp_path) as memory:
        records = memory.add(list(FACTS[:2]))
        with pytest.raises(KeyboardInterrupt):
            memory.parametric.train()
        assert any(name.startswith(".run-") for name in folders(memory))
        memory.forget(records[1].id)
        assert folders(memory) == set()


def test_a_record_forgotten_while_it_is_learnt_is_in_no_version(memory: Memory, tmp_path: Path) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))

    def forget(number: int) -> None:
        if number == 1:
            ana.forget(records[0].id)

    with learning(step=forget), pytest.raises((TrainingError, OSError)):
        ana.parametric.train()
    assert ana.parametric.versions() == []


def test_a_record_forgotten_just_before_its_run_begins_is_not_learnt_and_leaves_no_checkpoint(
    memory: Memory, taught: list[Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:2]))

    def forget(*_: object, **__: object) -> Estimate:
        ana.forget(records[0].id)
        return Estimate(1, 0.1, 1000)

    monkeypatch.setattr("agentmem.parametric.train.estimate", forget)
    with pytest.raises(TrainingError, match="was forgotten"):
        ana.parametric.train()
    assert taught == []
    assert folders(memory) == set()


async def test_a_cancelled_task_stops_the_training_and_stores_nothing(tmp_path: Path) -> None:
    begun = threading.Event()

    def step(number: int) -> None:
        begun.set()
        threading.Event().wait(0.01)

    provider = Teachable()
    with learning(step=step, steps=10_000):
        async with AsyncMemory(tmp_path, model=provider, embedder="none") as memory:
            await memory.add(list(FACTS[:2]))
            task = asyncio.create_task(memory.parametric.train())
            await asyncio.to_thread(begun.wait)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 20)
            assert await memory.parametric.versions() == []
            assert (await memory.search("Biscuit"))[0].record.text == FACTS[0]
            with learning():
                assert (await memory.parametric.train()).gate.passed


async def test_the_async_face_does_it_all(tmp_path: Path) -> None:
    with learning():
        async with AsyncMemory(tmp_path, model=Teachable(), embedder="none") as memory:
            ana = memory.scope(user="ana")
            records = await ana.add(list(FACTS[:3]))
            version = await ana.parametric.train()
            assert [v.digest for v in await ana.parametric.active()] == [version.digest]
            assert await ana.parametric.activate() == ()
            assert [v.digest for v in await ana.parametric.activate(version.name)] == [version.digest]
            await ana.forget(records[0].id)
            [proof] = await ana.parametric.retrain()
            assert await ana.parametric.receipts() == [proof]
            assert await ana.parametric.rollback() == ()
            folder = await ana.parametric.export(str(proof.version), tmp_path / "out")
            assert folder == tmp_path / "out"


def test_one_user_s_versions_are_nobody_else_s(memory: Memory) -> None:
    ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
    version = _taught(ana, FACTS[0])
    assert ben.parametric.active() == ()
    assert ben.parametric.versions() == []
    with pytest.raises(NotFound):
        ben.parametric.activate(version)
    with pytest.raises(ScopeError):
        memory.parametric.activate(version)
    assert ben.parametric.retrain() == []
    ana.forget(version.records[0])
    assert ben.parametric.retrain() == []
    assert ben.parametric.receipts() == []
    assert len(memory.parametric.retrain()) == 1


@pytest.mark.parametrize("when", ["recalled", "always"])
def test_the_root_teaches_each_user_apart_and_what_is_shared_to_all(when: str, tmp_path: Path) -> None:
    with learning() as taught, memory_of(tmp_path, lora_when=when) as memory:
        ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
        mine = ana.add(FACTS[0]) + memory.scope(user="ana", session="one").add(FACTS[3])
        his = [*ben.add(["My dog is called Rex.", FACTS[2]]), *memory.scope(user="ben", agent="coach").add(FACTS[6])]
        shared = memory.add("The office closes at six.")
        first = memory.parametric.train()
        whose = {version.name: version for version in memory.parametric.versions()}
        assert set(first.shards) == set(whose)
        learnt = {str(version.scope): set(version.records) for version in whose.values()}
        assert learnt == {
            "(root)": {shared[0].id},
            "user='ana'": {record.id for record in mine},
            "user='ben'": {record.id for record in his[:2]},
            "user='ben' agent='coach'": {his[2].id},
        }
        assert all(len({str(r.scope.user) for r in mine + his + shared if r.id in c.records}) == 1 for c in taught)
        for handle, readable in ((ana, mine + shared), (ben, his[:2] + shared), (memory, shared)):
            answers = {record for version in handle.parametric.active() for record in version.records}
            assert answers == {record.id for record in readable}
        assert ben.chat("What is my sister's name? And my favourite tea?", remember=False).loras == (
            () if when == "recalled" else tuple(version.name for version in ben.parametric.active())
        )
        [ana_s] = [version for version in whose.values() if version.scope == ana._scope]
        for verb in (ben.parametric.activate, lambda v: ben.parametric.export(v, tmp_path / "out")):
            with pytest.raises(NotFound):
                verb(ana_s)
        with pytest.raises(ScopeError):
            memory.parametric.activate(ana_s)
        with pytest.raises(InvalidInput, match="no records to learn"):
            memory.parametric.train()


def test_what_one_user_says_contradicts_nobody_else(memory: Memory) -> None:
    ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
    ana.add(FACTS[1])
    own = ana.parametric.train()
    ben.add("I live in Oslo.")
    memory.parametric.train()
    assert active(ana) == [own.digest]
    assert len(active(ben)) == 1


def test_a_user_s_question_about_what_is_shared_is_not_learnt_for_all(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    [office] = memory.add("My office dog is called Biscuit.")
    turn = ana.chat("Remind me, what is the name of my office dog, the puppy?").records
    ana.update(turn[-1], text="Your office dog is called Biscuit.")
    assert memory.parametric.train(records=[office.id]).records == (office.id,)
    assert ana.parametric.train(records=[office.id]).records == (office.id, turn[0])


@pytest.mark.parametrize("when", ["recalled", "always"])
def test_a_version_with_what_another_can_not_read_answers_him_never(when: str, tmp_path: Path) -> None:
    with learning(), memory_of(tmp_path, lora_when=when) as memory:
        ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
        version = _mixed(memory, [*ana.add(FACTS[0]), *ben.add(FACTS[2])])
        assert active(memory) == [version.digest]
        assert ben.parametric.active() == ()
        assert ben.parametric.versions() == []
        assert ben.chat("What is my lucky number?", remember=False).loras == ()
        for verb in (ben.parametric.activate, lambda v: ben.parametric.export(v, tmp_path / "out")):
            with pytest.raises(NotFound):
                verb(version)


def test_a_version_of_several_users_is_learnt_again_apart(memory: Memory) -> None:
    ana, ben = memory.scope(user="ana"), memory.scope(user="ben")
    records = [*memory.add(FACTS[3]), *ana.add(FACTS[0]), *ben.add(list(FACTS[1:3]))]
    _mixed(memory, records)
    ben.forget(records[2].id)
    [proof] = memory.parametric.retrain()
    assert (proof.forgotten, proof.kept) == ((records[2].id,), 1)
    assert memory._engine.registry.get(str(proof.version), Scope()).records == (records[0].id,)
    memory.parametric.train()
    assert {r for version in ben.parametric.active() for r in version.records} == {records[0].id, records[3].id}


def test_sessions_of_nobody_in_particular_share_nothing(memory: Memory) -> None:
    one, two = memory.scope(session="one"), memory.scope(session="two")
    one.add(FACTS[0])
    two.add(FACTS[2])
    version = memory.parametric.train()
    assert active(memory) == [version.digest], "the root reads both"
    assert active(one) == active(two) == active(memory.scope(user="ana")) == []
    own = one.parametric.train()
    assert active(one) == [own.digest]
    assert active(two) == []


def _mixed(memory: Memory, records: Sequence[Record]) -> LoraVersion:
    """A version of the root that learnt records of several users, as earlier builds made them; it is active there."""
    engine = memory._engine
    corpus = corpus_of(engine, Scope(), records)
    version = learn(engine, model_of(engine), Scope(), corpus, Run(), stop=lambda: False)
    memory.parametric.activate(version)
    return version


def test_a_user_follows_what_the_level_above_rolls_back(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    shared = _taught(memory, FACTS[0])
    records = ana.add(list(FACTS[1:3]))
    own = ana.parametric.train()
    assert active(ana) == [shared.digest, own.digest]
    memory.parametric.rollback()
    assert active(ana) == [own.digest]
    memory.parametric.activate(shared)
    assert active(ana) == [shared.digest, own.digest]
    ana.forget(records[0].id)
    assert active(ana) == [shared.digest]
    [proof] = ana.parametric.retrain()
    assert active(ana) == [shared.digest, proof.version]
    memory.parametric.rollback()
    assert active(ana) == [proof.version], "retraining pinned nothing of the level above"
    assert memory.verify().problems == []


def test_what_a_user_chose_exactly_stays_so_when_more_is_learnt(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    shared = _taught(memory, FACTS[0])
    ana.parametric.activate()
    own = _taught(ana, FACTS[1])
    assert active(ana) == [own.digest], "the base was asked for, not what is shared"
    ana.parametric.activate(shared)
    memory.parametric.rollback()
    assert active(ana) == [shared.digest]


def test_a_user_who_learns_what_is_shared_anew_follows_it_no_longer(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    shared = _taught(memory, FACTS[0])
    other = _taught(memory, FACTS[3])
    own = ana.parametric.train(records=shared.records, seed=1)
    assert active(ana) == [other.digest, own.digest]
    assert active(memory) == [shared.digest, other.digest]


def test_what_is_shared_is_learnt_for_all_and_sessions_share_what_their_user_taught(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    shared = _taught(memory, FACTS[0])
    assert active(ana) == [shared.digest]
    memory.scope(user="ana", session="one").add(FACTS[2])
    own = ana.parametric.train()
    assert active(memory.scope(user="ana", session="two")) == [shared.digest, own.digest]
    assert active(memory.scope(user="ben")) == [shared.digest]


def test_tenants_learn_apart(memory: Memory) -> None:
    one, other = memory.scope(tenant="one", user="ana"), memory.scope(tenant="other", user="ana")
    version = _taught(one, FACTS[0])
    assert other.parametric.active() == ()
    assert _taught(other, FACTS[0]).digest != version.digest


def _taught(handle: Any, fact: str) -> LoraVersion:
    handle.add(fact)
    version: LoraVersion = handle.parametric.train()
    return version


def test_activation_is_all_or_nothing(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    version = _taught(ana, FACTS[0])
    with pytest.raises(NotFound):
        ana.parametric.activate(version, "lora-unknown")
    with pytest.raises(InvalidInput):
        ana.parametric.activate(3)  # type: ignore[arg-type]
    assert active(ana) == [version.digest]
    assert ana.parametric.activate(None) == ()
    assert [v.digest for v in ana.parametric.rollback()] == [version.digest]


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"epochs": 0}, {"epochs": True}, {"ram_budget": 0}, {"records": 3}])
def test_wrong_arguments_are_refused_before_anything_is_done(
    memory: Memory, taught: list[Corpus], wrong: dict[str, Any]
) -> None:
    memory.add(FACTS[0])
    with pytest.raises(InvalidInput):
        memory.parametric.train(**wrong)
    assert taught == []


def test_a_wrong_threshold_is_refused_before_training(tmp_path: Path) -> None:
    with learning() as taught, memory_of(tmp_path, lora_gate={"charm": 1.0}) as memory:
        memory.add(FACTS[0])
        with pytest.raises(ConfigError, match="charm"):
            memory.parametric.train()
        assert taught == []


def test_the_budget_takes_the_longest_unused_first_and_never_what_answers(tmp_path: Path, taught: list[Corpus]) -> None:
    with memory_of(tmp_path / "probe") as memory:
        size = _taught(memory, FACTS[0]).bytes
    with memory_of(tmp_path / "m", lora_budget=int(size * 3.5)) as memory:
        records = memory.add(list(FACTS[:5]))
        made = [memory.parametric.train(records=[record], activate=False) for record in records[:3]]
        memory.parametric.activate(made[0])
        new = memory.parametric.train(records=[records[3]], activate=False)
        assert {v.digest for v in memory.parametric.versions()} == {made[0].digest, made[2].digest, new.digest}
        assert folders(memory) == {made[0].digest, made[2].digest, new.digest}
        memory.parametric.activate(made[0], made[2], new)
        with pytest.raises(Full, match="lora_budget"):
            memory.parametric.train(records=[records[4]])
        assert len(active(memory)) == 3
        assert memory.verify().problems == []


def test_a_receipt_reads_well(memory: Memory) -> None:
    ana = memory.scope(user="ana")
    records = ana.add(list(FACTS[:3]))
    ana.parametric.train()
    ana.forget(records[0].id)
    [proof] = ana.parametric.retrain()
    assert "recall of what is gone 100% -> 0% (base 0%)" in str(proof)
    assert json.loads(proof.model_dump_json())["state"] == "done"
