"""A memory against a model of it that is two dicts, over any sequence of verbs, reopenings and kills."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentmem import Memory, NotFound, ScopeError
from agentmem.types import Scope

#: (runs, steps of each)
RUNS = int(os.environ.get("AGENTMEM_STATEFUL", "25"))
STEPS = 50
#: In RAM where the system has such a folder: what is tested here is not the disk.
ROOM = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
WORDS = ["peanut", "garden", "violin", "harbour", "ledger"]
texts = st.builds("{} {} n{}".format, st.sampled_from(WORDS), st.sampled_from(WORDS), st.integers(0, 9))
users = st.sampled_from([None, "ana", "ben"])


class AgainstADict(RuleBasedStateMachine):
    """``held``: the versions of each record, the current one last; ``owner``: whose it is; ``ended``: superseded."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="agentmem-state-", dir=ROOM))
        self.held: dict[str, list[str]] = {}
        self.owner: dict[str, str | None] = {}
        self.ended: set[str] = set()
        self.gone: set[str] = set()
        self.memory = self._open()

    def _open(self) -> Memory:
        return Memory(self.folder / "memory", embedder="none")

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _handle(self, user: str | None) -> Any:
        return self.memory if user is None else self.memory.scope(user=user)

    def _seen(self, user: str | None) -> set[str]:
        return {id_ for id_, owner in self.owner.items() if user is None or owner in (None, user)}

    def _one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.held)))

    @rule(user=users, said=st.lists(texts, min_size=1, max_size=3))
    def add(self, user: str | None, said: list[str]) -> None:
        for record in self._handle(user).add(said):
            self._remember(record.id, record.text, user)

    def _remember(self, id_: str, text: str, user: str | None) -> None:
        assert id_ not in self.held
        self.held[id_], self.owner[id_] = [text], user

    @precondition(lambda self: self.held)
    @rule(data=st.data(), text=texts, user=users)
    def update(self, data: st.DataObject, text: str, user: str | None) -> None:
        id_ = self._one(data)
        if user is not None and self.owner[id_] != user:
            with pytest.raises((NotFound, ScopeError)):
                self._handle(user).update(id_, text)
        else:
            self.held[id_].append(self._handle(user).update(id_, text).text)
            assert self.held[id_][-1] == text

    @precondition(lambda self: self.held)
    @rule(data=st.data(), text=texts)
    def supersede(self, data: st.DataObject, text: str) -> None:
        id_ = self._one(data)
        [record] = self._handle(self.owner[id_]).add(text, supersedes=id_)
        self._remember(record.id, text, self.owner[id_])
        self.ended.add(id_)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=3, unique=True))
        assert set(self.memory.forget(ids).records) == set(ids)
        for id_ in ids:
            del self.held[id_], self.owner[id_]
            self.ended.discard(id_)
            self.gone.add(id_)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), user=users)
    def look_back(self, data: st.DataObject, user: str | None) -> None:
        id_ = self._one(data)
        if id_ not in self._seen(user):
            with pytest.raises(NotFound):
                self._handle(user).history(id_)
            return
        told = [record.text for record in self._handle(user).history(id_) if record.id == id_]
        assert [text for text in told if text in self.held[id_]][-1] == self.held[id_][-1]
        assert len(self.memory._engine.records.history(id_, Scope())) == len(self.held[id_])

    @rule(word=st.sampled_from(WORDS), user=users)
    def search(self, word: str, user: str | None) -> None:
        found = {hit.record.id: hit.record.text for hit in self._handle(user).search(word, k=1_000)}
        assert found.items() <= {id_: self.held[id_][-1] for id_ in self._seen(user) - self.ended}.items()
        holding = {id_ for id_ in self._seen(user) - self.ended if word in self.held[id_][-1]}
        assert holding <= found.keys()

    @rule()
    def reopen(self) -> None:
        self.memory.close()
        self.memory = self._open()

    @rule()
    def check(self) -> None:
        assert self.memory.verify().problems == []

    @rule()
    def compact(self) -> None:
        assert self.memory.compact().emptied

    @rule(said=st.lists(texts, min_size=1, max_size=3), after=st.integers(1, 3_000))
    def kill_an_add(self, said: list[str], after: int) -> None:
        """A child adds and is killed after so many steps of SQLite's machine: all of it is there or nothing."""
        self._in_a_child(lambda: self.memory.add(said), after)
        new = [record for record in self.memory.list(limit=10_000) if record.id not in self.held]
        assert [record.text for record in new] in ([], said)
        for record in new:
            self._remember(record.id, record.text, None)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), after=st.integers(1, 3_000))
    def kill_a_forget(self, data: st.DataObject, after: int) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, max_size=3, unique=True))
        self._in_a_child(lambda: self.memory.forget(ids), after)
        left = {record.id for record in self.memory.list(limit=10_000)}
        assert left & set(ids) in (set(), set(ids))
        for id_ in set(ids) - left:
            del self.held[id_], self.owner[id_]
            self.ended.discard(id_)
            self.gone.add(id_)

    def _in_a_child(self, act: Any, after: int) -> None:
        child = os.fork()
        if child == 0:
            try:
                connection = self.memory._engine.database._live()
                left = [after]

                def step() -> int:
                    left[0] -= 1
                    if left[0] <= 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return 0

                connection.set_progress_handler(step, 1)
                act()
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    @invariant()
    def all_is_there(self) -> None:
        if not hasattr(self, "memory"):
            return
        records = self.memory.list(limit=10_000)
        assert {record.id: record.text for record in records} == {id_: past[-1] for id_, past in self.held.items()}
        assert {record.id for record in records if record.valid_until} == self.ended
        assert not self.gone & self.held.keys()


AgainstADict.TestCase.settings = settings(
    max_examples=RUNS,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    database=None,
)
TestAgainstADict = pytest.mark.slow(pytest.mark.timeout(0 if RUNS > 1_000 else 600)(AgainstADict.TestCase))
