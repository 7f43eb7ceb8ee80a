"""Which adapters of a llama-server act on a request, and when its slot's states may be reused."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from agentmem.errors import AgentMemError, Unavailable
from agentmem.loras import LoraRef, as_one
from agentmem.provider import Options, Request
from agentmem.types import Message, Segment

choosing = importlib.import_module("agentmem.adapters.providers._llamacpp_loras")
server = importlib.import_module("agentmem.adapters.providers._llamacpp_server")
turns = importlib.import_module("agentmem.adapters.providers._llamacpp_turns")
scales, served = choosing.scales, choosing.served


def ref(letter: str, **more: Any) -> LoraRef:
    return LoraRef(name=f"lora-{letter}", digest=letter * 64, path="", **more)


def listed(*names: str, scale: float = 1.0) -> list[dict[str, Any]]:
    return [{"id": i, "path": f"/srv/loras/{name}.gguf", "scale": scale} for i, name in enumerate(names)]


A, B = ref("a"), ref("b")
SUM = as_one([A, B]).served_name
STYLE = "pirate-style"


def test_ours_act_only_where_they_are_asked_for_and_others_as_the_server_has_them() -> None:
    told = listed(STYLE, A.served_name, B.served_name)
    assert scales(told, ()) == {0: 1.0, 1: 0.0, 2: 0.0}
    assert scales(told, (B,)) == {0: 1.0, 1: 0.0, 2: 1.0}
    assert scales(told, (ref("a", scale=0.5), B)) == {0: 1.0, 1: 0.5, 2: 1.0}
    assert scales(told, (ref("c"),)) == {0: 1.0, 1: 0.0, 2: 0.0}


def test_a_sum_acts_in_the_place_of_its_parts() -> None:
    told = listed(A.served_name, B.served_name, SUM)
    assert served(told, (A, B)) == (A, B)
    assert scales(told, (A, B)) == {0: 0.0, 1: 0.0, 2: 1.0}
    assert scales(told, (B, A)) == {0: 0.0, 1: 0.0, 2: 1.0}
    assert scales(told, (A,)) == {0: 1.0, 1: 0.0, 2: 0.0}


def test_another_version_of_the_same_name_is_not_taken_for_it() -> None:
    newer = LoraRef(name="lora-a", digest="a" * 15 + "f" * 49, path="")
    assert served(listed(newer.served_name), (A,)) == ()


def test_an_activated_one_acts_alone() -> None:
    """llama.cpp refuses two activated adapters in one request, and lets one beside plain ones act everywhere."""
    late, later = ref("a", activated=(1, 2)), ref("b", activated=(1, 2))
    told = listed(late.served_name, later.served_name, ref("c").served_name)
    assert served(told, (late, later)) == (late,)
    assert served(told, (ref("c"), late)) == (ref("c"),)
    assert scales(told, (late, later)) == {0: 1.0, 1: 0.0, 2: 0.0}


def test_what_the_user_names_is_taken_as_it_is() -> None:
    assert scales(listed(A.served_name), (A,), [{"id": 0, "scale": 0.25}]) == {0: 0.25}


def pinned(pins: Any, told: Any, *loras: LoraRef, **extra: Any) -> tuple[dict[str, Any], bool]:
    """The fields that a request gets, and whether the server was asked for its adapters."""
    segment = Segment(name="turn", messages=(Message(role="user", content="Hi"),), stable=False)
    steps = pins.before(Request(segments=(segment,), options=Options(extra=extra), loras=loras))
    step = server.advance(steps, None, None)
    asked = step is server.LISTED
    if asked:
        step = server.advance(steps, *((None, told) if isinstance(told, AgentMemError) else (told, None)))
    assert isinstance(step, server.End)
    return dict(step.value.options.extra), asked


def test_a_slot_is_reused_only_under_the_set_of_the_request_before() -> None:
    pins, told = turns.Pins("llamacpp:m"), listed(A.served_name, B.served_name)
    sets: list[Sequence[LoraRef]] = [(A,), (A,), (), (), (A, B), (B, A), (B,)]
    fields = [pinned(pins, told, *loras)[0] for loras in sets]
    assert ["cache_prompt" in field for field in fields] == [True, False, True, False, True, False, True]
    assert not any(field.get("cache_prompt") for field in fields)
    assert fields[1]["lora"] == [{"id": 0, "scale": 1.0}, {"id": 1, "scale": 0.0}]
    assert fields[3]["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]


def test_adapters_in_another_order_after_a_restart_are_the_same_set() -> None:
    pins = turns.Pins("llamacpp:m")
    pinned(pins, listed(A.served_name, B.served_name), A)
    fields, _ = pinned(pins, listed(B.served_name, A.served_name), A)
    assert fields == {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]}


def test_a_server_without_adapters_is_asked_again_only_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pins = turns.Pins("llamacpp:m")
    assert pinned(pins, []) == ({}, False), "what it has is not known and nothing wants it"
    pins.told([])
    assert pinned(pins, []) == ({}, False)
    now[0] += turns.NONE_S + 1
    fields, asked = pinned(pins, listed(A.served_name))
    assert asked
    assert fields["lora"] == [{"id": 0, "scale": 0.0}]
    assert pinned(pins, listed(A.served_name))[1], "from now on always"


def test_where_it_can_not_be_asked_the_base_answers_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "agentmem"):
        assert pinned(turns.Pins("llamacpp:m"), Unavailable("it is down"), A) == ({}, True)
    assert "answers without LoRA versions" in caplog.text
