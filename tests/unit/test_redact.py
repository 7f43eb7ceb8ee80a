"""What the built-in detectors take out, what they leave, and that a failing hook stores nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem import Memory
from agentmem.errors import ConfigError, InvalidInput
from agentmem.plaintext.redact import DETECTORS, redactor

ALL = redactor(list(DETECTORS))
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("write to ana.b+x@mail.example.org.", "write to [email]."),
        ("<ana@example.com>,bob@example.co.uk", "<[email]>,[email]"),
        ("call +351 912 345 678 now", "call [phone] now"),
        ("call 0049-30-1234567", "call [phone]"),
        ("(212) 555-0187 or 212-555-0187", "[phone] or [phone]"),
        ("card 4111 1111 1111 1111 ok", "card [card] ok"),
        ("5500-0000-0000-0004", "[card]"),
        ("pay DE89 3704 0044 0532 0130 00 TODAY", "pay [iban] TODAY"),
        ("GB29NWBK60161331926819", "[iban]"),
        ("key sk-proj-abcdefghijklmnop1234", "key [key]"),
        ("AKIAIOSFODNN7EXAMPLE", "[key]"),
        (f"my key:\n{PEM}\nkeep it", "my key:\n[key]\nkeep it"),
        (PEM[:50], "[key]"),
    ],
)
def test_what_has_the_form_is_replaced(text: str, left: str) -> None:
    assert ALL is not None
    assert ALL(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "on 2023-05-08 at 14:00, order 4111 1111 1111 1112, pi is 3.14159265358979323846",
        "version 1.2.3-4567, 100 000 000 people, @ana said hi, a @ b",
        "sk-short, AKIA, DE89 3704 1144 0532 0130 01, ISO 13616, 0000 0000 0000 0000",
        "the years 1990 1991 1992 1993",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert ALL is not None
    assert ALL(text) == text


@given(st.text())
def test_redacting_twice_changes_nothing_more(text: str) -> None:
    assert ALL is not None
    assert ALL(ALL(text)) == ALL(text)


@pytest.mark.parametrize("unit", ["a", "1", "a.", "1 ", "a@", "sk-", "+1 ", "AA00", "-----BEGIN PRIVATE KEY-----", "("])
def test_time_is_in_proportion_to_the_text(unit: str) -> None:
    assert ALL is not None
    begun = time.process_time()
    ALL(unit * (200_000 // len(unit)))
    assert time.process_time() - begun < 5


def test_an_unknown_detector_is_refused() -> None:
    for wrong in (["email", "names"], "names", [5], 5):
        with pytest.raises(ConfigError):
            redactor(wrong)
    assert redactor(None) is redactor([]) is None


def test_nothing_of_it_reaches_the_folder(tmp_path: Path) -> None:
    with Memory(tmp_path, embedder="hash", redact=["email"]) as memory:
        [record] = memory.add(
            {"role": "user", "content": "I am ana@secret.example", "name": "ana@secret.example"},
            metadata={"from": ["ana@secret.example", {"to": "x"}]},
        )
        assert (record.text, record.name) == ("I am [email]", "[email]")
        assert record.metadata == {"from": ["[email]", {"to": "x"}]}
        assert memory.update(record.id, "now bob@secret.example", {"cc": "bob@secret.example"}).text == "now [email]"
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"secret.example" in file.read_bytes()]


def test_a_failing_hook_is_a_named_error_and_stores_nothing() -> None:
    def broken(text: str) -> str:
        raise RuntimeError(text)

    hooks: list[Any] = [broken, lambda text: None, lambda text: " ", lambda text: text + "\0", lambda text: "\ud800"]
    for hook in hooks:
        with Memory(":memory:", embedder="none", redact=hook) as memory:
            with pytest.raises(InvalidInput):
                memory.add("my number is 5")
            assert memory.list() == []


def test_chat_turns_are_redacted_in_the_store_and_before_the_model() -> None:
    from agentmem.testing import ScriptedProvider

    model = ScriptedProvider("Write to bob@secret.example then.")
    with Memory(":memory:", model=model, embedder="none", redact="email") as memory:
        memory.chat("I am ana@secret.example")
        assert [record.text for record in memory.list()] == ["I am [email]", "Write to [email] then."]
        assert "ana@secret.example" not in repr(model.requests)
