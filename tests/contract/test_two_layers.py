"""The two layers on an engine of one's own: a chat of any length in bounded context, and a core that stands still."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from agentmem import Memory, cores, distilling
from agentmem.flow import run
from agentmem.provider import Capabilities, Request
from agentmem.recalling import recalled
from agentmem.testing import FakeClock, ScriptedProvider
from agentmem.types import Usage

WINDOW = 2400
PACE = 4e-3
PLACES = ("Porto", "Faro", "Braga", "Evora", "Sines", "Lagos", "Tomar", "Viseu")


class Here(ScriptedProvider):
    """An engine of one's own that computes what it has not computed before, token by token at the same pace."""

    def __init__(self, *, name: str = "scripted:here", window: int = WINDOW) -> None:
        can = Capabilities(chat=True, kv="tensors", context_tokens=window, tools=True)
        super().__init__("That is good to know, thank you.", name=name, capabilities=can)

    def _use(self, request: Request) -> Usage:
        used = super()._use(request)
        first = PACE * (used.input_tokens - used.cached_tokens) + 1e-5 * used.cached_tokens
        self._seen[request.cache_key] = self._seen[request.cache_key][-2:]
        return used.model_copy(update={"first_token_s": first, "total_s": first + 0.2})


def opened(folder: Path, provider: Here | None = None, clock: FakeClock | None = None, **settings: Any) -> Memory:
    known: dict[str, Any] = {"page_tokens": 64, "core_tokens": 160, "recall_tokens": 120, **settings}
    return Memory(folder, model=provider or Here(), embedder="hash", clock=clock or FakeClock(), **known)


def told(number: int) -> str:
    place = PLACES[number % len(PLACES)]
    return f"On day {number} I went to {place} and I met friend number {number * 7 % 50} at the old station there."


def texts(request: Request) -> list[tuple[str, str]]:
    return [(said.role, said.content) for segment in request.segments for said in segment.messages]


def stable(request: Request) -> list[tuple[str, str]]:
    kept = itertools.takewhile(lambda segment: segment.stable, request.segments)
    return [(said.role, said.content) for segment in kept for said in segment.messages]


def test_a_long_chat_stays_in_its_window_and_computes_little(tmp_path: Path) -> None:
    provider = Here()
    with opened(tmp_path / "m", provider) as memory:
        ana = memory.scope(user="ana", session="s")
        sizes, computed, folds, before = [], [], 0, None
        for number in range(240):
            reply = ana.chat(told(number), system="Be kind.")
            sizes.append(reply.usage.input_tokens)
            computed.append(reply.usage.input_tokens - reply.usage.cached_tokens)
            assert reply.facts is not None
            folds += before is not None and reply.facts.start != before
            before = reply.facts.start
            asked = [text for role, text in texts(provider.requests[-1]) if role == "user"]
            assert asked[-1] == told(number), "what was recalled stands in front of the turn"
            lines = [line for text in asked for line in text.splitlines() if " user: " in line]
            assert len(lines) == len(set(lines)), "no record stands in a prompt twice"
        assert max(sizes) <= WINDOW
        assert max(sizes[120:]) <= 1.1 * max(sizes[60:120])
        assert 2 <= folds <= 40
        # Far less than the prompts: what is new, what is recalled, and now and then a history that begins anew.
        assert sum(computed[60:]) < 0.3 * sum(sizes[60:])
        assert sum(computed[180:]) < 1.5 * sum(computed[60:120])
        found = ana.search("Whom did I meet in Faro on day 1?", k=5)
        assert any("day 1 " in hit.record.text for hit in found), "folded away is not forgotten"


def test_a_memory_write_leaves_the_cached_prefix_whole(tmp_path: Path) -> None:
    provider = Here()
    with opened(tmp_path / "m", provider) as memory:
        ana = memory.scope(user="ana", session="s")
        for number in range(6):
            ana.chat(told(number), system="Be kind.")
        before = stable(provider.requests[-1])
        memory.scope(user="ana").add([f"My favourite number {n} is {n * n}." for n in range(30)])
        ana.chat("Which numbers do I like?", system="Be kind.")
        assert stable(provider.requests[-1])[: len(before)] == before


def test_kept_states_of_turns_are_read_by_the_next_one(tmp_path: Path) -> None:
    provider = Here(window=20_000)
    with opened(tmp_path / "m", provider) as memory:
        ana = memory.scope(user="ana", session="s")
        for number in range(30):
            ana.chat(told(number), system="Be kind.")
        for one, two in itertools.pairwise(provider.requests):
            assert stable(two)[: len(stable(one))] == stable(one)


def test_a_model_new_to_a_session_reads_its_history(tmp_path: Path) -> None:
    with opened(tmp_path / "m", Here(name="scripted:first")) as memory:
        ana = memory.scope(user="ana", session="s")
        for number in range(8):
            ana.chat(told(number))
    second = Here(name="scripted:second")
    with opened(tmp_path / "m", second) as memory:
        memory.scope(user="ana", session="s").chat("And where was I last?")
    said = [text for _, text in texts(second.requests[-1])]
    assert all(told(number) in said for number in range(8))


class Core:
    """A scope whose turns need the same few records again and again."""

    FACTS = (
        "I am allergic to peanuts and to shellfish.",
        "My daughter Ines plays the cello every Tuesday.",
        "I live in Porto and work as a nurse.",
        "I always drink green tea, never coffee.",
    )

    def __init__(self, folder: Path) -> None:
        self.provider, self.clock = Here(), FakeClock()
        self.memory = opened(folder, self.provider, self.clock, history_tokens=700)
        self.ana = self.memory.scope(user="ana")
        self.ids = [self.ana.add(fact)[0].id for fact in self.FACTS]
        self.ana.add([f"The ferry number {n} leaves pier {n} at {n % 24}:00." for n in range(40)])

    def turn(self, text: Any) -> Any:
        self.clock.advance(30)
        return self.chat.chat(text, system="Be kind.")

    def session(self, name: str) -> None:
        self.chat = self.ana.scope(session=name)


ASKED = (
    "What am I allergic to, peanuts or shellfish?",
    "When does my daughter Ines play the cello?",
    "Do I live in Porto and work as a nurse?",
    "Do I drink green tea or coffee?",
)


@pytest.fixture
def talk(tmp_path: Path) -> Core:
    made = Core(tmp_path / "m")
    made.session("s")
    return made


def core_ids(memory: Memory) -> list[str]:
    rows = memory._engine.database.query("SELECT ids FROM cores")
    return [id_ for row in rows for id_ in json.loads(row["ids"])]


def test_what_turns_need_comes_into_the_core_and_is_not_recalled_again(talk: Core) -> None:
    with talk.memory:
        replies = [talk.turn(f"{ASKED[number % 4]} I ask for the {number}th time.") for number in range(60)]
        held = core_ids(talk.memory)
        assert set(talk.ids) & set(held), "what is asked for again and again stands in the core"
        last = replies[-1].facts
        assert last is not None
        assert last.core_tokens > 0
        assert any(reply.facts.used for reply in replies[-20:])
        lineage = talk.memory._engine.database.query("SELECT record FROM lineage WHERE kind = 'core'")
        assert {row["record"] for row in lineage} == set(held)
        core = next(s for s in talk.provider.requests[-1].segments if s.name == "core")
        assert set(core.messages[0].records) == set(held)
        lines = core.messages[0].content
        tail = [s for s in talk.provider.requests[-1].segments if s.name == "turn"]
        again = [
            line for line in lines.splitlines()[1:-1] if any(line in said.content for s in tail for said in s.messages)
        ]
        assert not again, "what stands in the core is spared"


def test_what_the_core_shows_leaves_room_for_nothing_else(talk: Core) -> None:
    with talk.memory:
        talk.turn("Hello there.")
        engine, conversation = talk.memory._engine, talk.chat._conversation
        engine.settings = engine.settings.model_copy(update={"recall_tokens": 80})

        def found(core: frozenset[str]) -> list[str]:
            hits, _, _ = run(recalled(engine, conversation, ASKED[0], set(), [], recall=True, core=core))
            return [hit.record.id for hit in hits]

        bare = found(frozenset())
        assert talk.ids[0] in bare
        assert len(bare) > 2
        assert found(frozenset(bare[:2])) == bare, "what was recalled beside them, and no more"


def test_the_core_changes_only_at_a_collapse_and_says_why(talk: Core) -> None:
    with talk.memory:
        before: tuple[str, ...] = ()
        rewritten = 0
        for number in range(80):
            reply = talk.turn(f"{ASKED[number % 4]} I ask for the {number}th time.")
            assert reply.facts is not None
            if reply.facts.core != before:
                assert "rewritten" in reply.facts.decided
                rewritten += 1
            before = reply.facts.core
        assert 1 <= rewritten <= 20


def test_a_tools_result_never_collapses_a_core(talk: Core) -> None:
    with talk.memory:
        for number in range(30):
            talk.turn(f"{ASKED[number % 4]} I ask for the {number}th time.")
        core = core_ids(talk.memory)
        from agentmem.types import ToolCall

        calls = ToolCall(id="c1", name="look_up", arguments={"q": "tea"})
        from agentmem.provider import Generation

        talk.provider._always = Generation(text="", tool_calls=(calls,), usage=Usage())
        talk.turn("Look it up, please.")
        core = core_ids(talk.memory)
        talk.provider._always = "Found."
        reply = talk.turn({"role": "tool", "content": "Green tea.", "tool_call_id": "c1", "name": "look_up"})
        assert core_ids(talk.memory) == core
        assert reply.facts is not None
        assert "rewritten" not in reply.facts.decided


def test_forgetting_a_record_of_the_core_takes_it_out_at_once(talk: Core) -> None:
    with talk.memory:
        for number in range(60):
            talk.turn(f"{ASKED[number % 4]} I ask for the {number}th time.")
        gone = next(id_ for id_ in talk.ids if id_ in core_ids(talk.memory))
        text = talk.FACTS[talk.ids.index(gone)]
        talk.ana.forget(gone)
        talk.turn("And now?")
        assert gone not in core_ids(talk.memory)
        core = [s for s in talk.provider.requests[-1].segments if s.name == "core"]
        assert not any(text in said.content for segment in core for said in segment.messages)


def test_a_collapse_leaves_memory_the_same_to_every_search(talk: Core) -> None:
    from agentmem import cores

    with talk.memory:
        for number in range(40):
            talk.turn(f"{ASKED[number % 4]} I ask for the {number}th time.")
        engine, scope = talk.memory._engine, talk.chat._scope
        before = [[(hit.record.id, hit.score) for hit in talk.ana.search(text, k=8)] for text in ASKED]
        cores.collapse(engine, scope, [])
        cores.collapse(engine, scope, talk.ids)
        assert [one.id for one in cores.standing(engine, scope) or []] == talk.ids
        assert cores.account(engine, scope).carried == 0
        assert [[(hit.record.id, hit.score) for hit in talk.ana.search(text, k=8)] for text in ASKED] == before
        assert talk.memory.verify().ok


def test_what_holds_no_longer_stands_in_no_core(tmp_path: Path) -> None:
    clock = FakeClock()
    provider = Here()
    with opened(tmp_path / "m", provider, clock) as memory:
        ana = memory.scope(user="ana")
        porto, *_ = ana.add(["My sister lives in Porto with her dog.", "I am allergic to peanuts."])
        for _ in range(4):
            ana.chat("Where does my sister live with her dog?", remember=False)
            clock.advance(60)
        cores.collapse(memory._engine, ana._scope, [porto.id])
        ana.chat("Good morning!", remember=False)
        assert porto.text in " ".join(text for _, text in stable(provider.requests[-1]))
        ana.add("My sister lives in Lisbon now.", supersedes=porto.id)
        clock.advance(60)
        reply = ana.chat("Good evening!", remember=False)
        assert porto.text not in " ".join(text for _, text in stable(provider.requests[-1]))
        assert reply.facts is not None
        assert "holds no longer" in reply.facts.decided


def test_distilling_a_head_rewrites_no_core(tmp_path: Path) -> None:
    with opened(tmp_path / "m") as memory:
        ana = memory.scope(user="ana")
        porto, *_ = ana.add(["My sister lives in Porto with her dog."])
        ana.chat("Where does my sister live?", remember=False)
        cores.collapse(memory._engine, ana._scope, [porto.id])
        ana.add([f"I always like thing number {number} of mine." for number in range(40)])
        assert [record.id for record in distilling._core(memory._engine, ana._scope)] == [porto.id]
        assert [record.id for record in cores.standing(memory._engine, ana._scope) or ()] == [porto.id]
