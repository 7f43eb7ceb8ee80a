"""Three hundred bad inputs for every parameter of every verb: an error of ours or a result, and a memory as it was."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import fractions
import functools
import os
import random
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem import AgentMemError, Memory
from agentmem.testing import ScriptedProvider

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))  # tests/ is no package

from test_bad_arguments import CASES, FLAGS, VERBS, arguments, call

pytestmark = pytest.mark.slow

FULL = os.environ.get("AGENTMEM_RELIABILITY") == "full"
#: Verbs whose least call trains a model or reads a folder of one: their arguments are tried in the contract's tests.
LONG = {"parametric.train"}


class Color(enum.Enum):
    RED = "red"


class OwnText(str):
    """A str that lies about itself."""

    def __str__(self) -> str:
        return "another"


class Raising:
    """Whatever is asked of it, it fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __str__(self) -> str:
        raise RuntimeError("no str")


def generator() -> Iterator[str]:
    yield "x"


def bad() -> list[Any]:
    """The inputs: one of each kind, and each kind inside a list, a mapping, a message and a condition."""
    cycle: list[Any] = []
    cycle.append(cycle)
    ring: dict[str, Any] = {}
    ring["a"] = ring
    deep: Any = "x"
    for _ in range(3_000):
        deep = [deep]
    single: list[Any] = [
        *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1.5, 1e308),
        *(float("nan"), float("inf"), -float("inf"), 1j, decimal.Decimal("1.1"), decimal.Decimal("NaN")),
        *(fractions.Fraction(1, 3), b"x", bytearray(b"x"), memoryview(b"x"), b"\xff\xfe", "", " ", "\n", "\t \r"),
        *("\0", "a\0b", "\ud800", "a\udfff", "\ufffe", "\u202e", "\u200b", "\ufeff", "x" * 100_000, "\U0010ffff"),
        *("%", "*", "_", "'", '"', "' OR 1=1 --", "; DROP TABLE records", "NEAR(a b)", "a AND", "(", '"a', "a*", "^a"),
        *("{", "[]", "null", "0" * 32, "f" * 32, "../x", "/", "C:\\x", "x" * 5_000, "2026-13-45", "2026-02-30T25:00"),
        *("0000-00-00", "9999-12-31T23:59:59+14:00", "0001-01-01T00:00:00-14:00", "now", "1e400"),
        *(dt.datetime.min, dt.datetime.max, dt.date(2026, 1, 1), dt.time(1), dt.timedelta(1)),
        *(dt.datetime.max.replace(tzinfo=dt.timezone(-dt.timedelta(hours=23))), uuid.uuid4(), Path("x"), Path("x\0y")),
        *(
            Color.RED,
            OwnText("x"),
            Raising(),
            object(),
            object,
            len,
            lambda: 1,
            functools.partial(len),
            ...,
            NotImplemented,
        ),
        *(
            cycle,
            ring,
            deep,
            set(),
            {1},
            frozenset({"a"}),
            (),
            [],
            {},
            range(3),
            iter([1]),
            generator(),
            random,
            Exception(),
        ),
    ]
    rest = [value for value in single if not isinstance(value, (list, dict))]
    inside = [[value] for value in rest[:62]]
    keyed = [{"a": value} for value in rest[:50]] + [{value: "x"} for value in (1, None, "", "\0", b"x", True)]
    said = [{"role": "user", "content": value} for value in rest[:40]] + [
        {"role": value, "content": "x"} for value in rest[:15]
    ]
    nothing: list[Any] = [None, [], {}, "\0", float("nan")]
    asked = [{"a": {op: value}} for op in ("gt", "in", "prefix", "not", "and") for value in nothing]
    return [*single, *inside, *keyed, *said, *asked]


BAD = bad()


def test_there_are_three_hundred() -> None:
    assert len(BAD) >= 300


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in LONG])
def test_three_hundred_bad_inputs_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.chdir(tmp_path)
    chance = random.Random(verb)
    with Memory(tmp_path / "memory", model=ScriptedProvider("Noted."), embedder="hash") as memory:
        [record] = memory.add("first", metadata={"n": 1})
        for parameter in (case[1] for case in CASES if case[0] == verb and case[1] not in FLAGS):
            for number in range(len(BAD)) if FULL else sorted(chance.sample(range(len(BAD)), 60)):
                try:
                    call(memory, verb, {**arguments(verb, record.id, tmp_path), parameter: bad()[number]})
                except AgentMemError:
                    pass
                except Exception as error:
                    pytest.fail(f"{verb}({parameter}=BAD[{number}]): {type(error).__name__}: {error}")
                kept = memory.get(record.id)
                if verb != "update":
                    assert kept == record, f"{verb}({parameter}=BAD[{number}])"
        assert memory.verify().problems == []
        assert memory.add("last")
        assert memory.chat("And now?").text == "Noted."
