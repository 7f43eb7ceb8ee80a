"""Every parameter of every verb, given what it does not take: an error of ours or a result, and a memory as it was."""

from __future__ import annotations

import asyncio
import datetime as dt
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import AgentMemError, AsyncMemory, Memory
from agentmem.testing import ScriptedProvider


class Odd:
    pass


def nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


DEEP = nested(2000)

AWKWARD: dict[str, Any] = {
    "None": None,
    "int": 7,
    "negative": -1,
    "huge": 10**400,
    "64 bits": 2**63,
    "nan": float("nan"),
    "bytes": b"x",
    "empty": "",
    "blank": "  ",
    "nul": "a\0b",
    "surrogate": "\ud800",
    "text": "x",
    "object": Odd(),
    "path": Path("x\0y"),
    "datetime": dt.datetime(1, 1, 1),
    "list": [],
    "list of ints": [7],
    "list of lists": [["x"]],
    "list of surrogates": ["\ud800"],
    "dict": {"a": Odd()},
    "odd dict": {7: "x"},
    "deep": DEEP,
    "true": True,
    "scopes": ("a", 7),
}
#: For each verb a call that works, by keyword.
VERBS: dict[str, dict[str, Any]] = {
    "add": {
        "content": "fine",
        "metadata": None,
        "at": None,
        "valid_from": None,
        "valid_until": None,
        "source": None,
        "trust": None,
        "supersedes": None,
    },
    "search": {"query": "fine", "k": 3, "where": None, "at": None, "explain": False},
    "get": {"id": "ID"},
    "list": {"where": None, "limit": 10, "after": None},
    "update": {"id": "ID", "text": "first", "metadata": None},
    "history": {"id": "ID", "about": None},
    "forget": {"ids": "ID", "where": None, "everything": False, "dry_run": True},
    "context": {"query": "fine", "max_tokens": 100},
    "chat": {
        "message": "hello",
        "system": None,
        "tools": None,
        "schema": None,
        "stream": False,
        "recall": True,
        "remember": False,
        "max_tokens": None,
        "temperature": None,
        "top_p": None,
        "seed": None,
        "stop": (),
        "extra": {},
    },
    "count_tokens": {"content": "fine", "system": None, "tools": None, "exact": False},
    "report": {"since": None, "until": None},
    "budget": {"dollars": None, "per": "day", "action": "stop"},
    "spent": {},
    "export": {"path": "PATH", "vectors": False},
    "load": {"path": "PATH", "format": "auto"},
    "scope": {"tenant": "t", "user": "u", "agent": "a", "session": "s"},
    "activation.prime": {"system": None, "parallel": None},
    "activation.warm_every": {"idle_s": 60.0},
    "activation.pin": {"keys": None, "pinned": True},
    "activation.evict": {"keys": None},
    "activation.swap_out": {"keys": None},
    "activation.swap_in": {"keys": None},
    "activation.save": {"path": "PATH"},
    "activation.restore": {"path": "PATH"},
    "parametric.train": {
        "scope": None,
        "records": None,
        "seed": 0,
        "epochs": 1,
        "activate": True,
        "approve": (),
        "ram_budget": None,
    },
    "plaintext.around": {"id": "ID", "before": 1, "after": 0},
    "plaintext.extract": {"kinds": ("fact",), "limit": None, "retry": False},
    "plaintext.reconcile": {"where": None, "limit": None},
    "parametric.activate": {"versions": None, "force": False},
    "parametric.export": {"version": "x", "path": "PATH", "format": "peft"},
    "parametric.publish": {"version": None, "to": None},
    "parametric.unpublish": {"version": "x", "to": None},
    "parametric.distil": {"tokens": None, "system": None, "seed": 0},
    "parametric.drop_prefix": {"prefix": "x"},
}
CASES = [(verb, parameter) for verb, given in VERBS.items() for parameter in given]
#: What has no harmful value, only a true or a false one.
FLAGS = {
    "retry",
    "dry_run",
    "vectors",
    "explain",
    "everything",
    "stream",
    "recall",
    "remember",
    "pinned",
    "activate",
    "force",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # a name like "x" is a file here
    return tmp_path


@pytest.fixture
def memory(folder: Path) -> Iterator[Memory]:
    with Memory(folder / "memory", model=ScriptedProvider("Noted."), embedder="hash") as memory:
        yield memory


def call(door: Any, verb: str, given: dict[str, Any]) -> Any:
    for name in verb.split("."):
        door = getattr(door, name)
    several = [given.pop("versions")] if "versions" in given else []
    return door(*several, **given)


def arguments(verb: str, id_: str, folder: Path) -> dict[str, Any]:
    known = {"ID": id_, "PATH": folder / "out"}
    return {name: known.get(value, value) if isinstance(value, str) else value for name, value in VERBS[verb].items()}


@pytest.mark.parametrize(("verb", "parameter"), [case for case in CASES if case[1] not in FLAGS])
def test_only_our_errors_leave_and_the_memory_works_on(memory: Memory, folder: Path, verb: str, parameter: str) -> None:
    [record] = memory.add("first")
    for name, value in AWKWARD.items():
        before = [kept for kept in memory.list() if kept.id == record.id]
        try:
            call(memory, verb, {**arguments(verb, record.id, folder), parameter: value})
        except AgentMemError:
            pass
        except Exception as error:
            pytest.fail(f"{verb}({parameter}={name}): {type(error).__name__}: {error}")
        assert verb == "update" or [kept for kept in memory.list() if kept.id == record.id] == before, name
    assert memory.verify().ok
    assert memory.add("last")
    assert memory.chat("And now?").text == "Noted."


def test_every_parameter_is_tried() -> None:
    for verb, given in VERBS.items():
        door: Any = Memory.__new__(Memory)
        door._engine = door._scope = door._conversation = None
        for name in verb.split("."):
            door = getattr(door, name)
        parameters = inspect.signature(door).parameters.values()
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert named <= given.keys(), verb


@pytest.mark.parametrize("verb", ["add", "search", "get", "list", "forget", "chat", "export", "load"])
async def test_the_async_face_refuses_alike(folder: Path, verb: str) -> None:
    async with AsyncMemory(folder / "memory", model=ScriptedProvider("Noted."), embedder="hash") as memory:
        [record] = await memory.add("first")
        first = next(iter(VERBS[verb]))
        for name, value in AWKWARD.items():
            try:
                await call(memory, verb, {**arguments(verb, record.id, folder), first: value})
            except AgentMemError:
                pass
            except Exception as error:
                pytest.fail(f"{verb}({first}={name}): {type(error).__name__}: {error}")
        assert (await asyncio.wait_for(memory.verify(), 30)).ok


SETTINGS = ["path", "model", "embedder", "config", "clock", "recall_k", "page_tokens", "system", "providers"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_memory_is_opened_or_refused_with_our_errors(folder: Path, setting: str) -> None:
    opened: Callable[..., Memory] = Memory
    for name, value in AWKWARD.items():
        try:
            arguments: dict[str, Any] = {"path": folder / "memory", "embedder": "hash", setting: value}
            opened(**arguments).close()
        except AgentMemError:
            pass
        except Exception as error:
            pytest.fail(f"Memory({setting}={name}): {type(error).__name__}: {error}")
