"""Records: what is refused, what is kept, who may change it, what a deletion leaves behind."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem.database import Database
from agentmem.errors import AgentMemError, Corrupt, InvalidInput, NotFound, ScopeError
from agentmem.plaintext.conditions import valid_at
from agentmem.plaintext.index import open_space
from agentmem.plaintext.records import TURNS, Records, check_k, check_scope, draft_of, drafts, narrow, new_id
from agentmem.types import Message, Record, Scope

ROOT, ANA, BOB = Scope(), Scope(user="ana"), Scope(user="bob")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with contextlib.closing(Database(tmp_path / "memory.db")) as opened:
        yield opened


@pytest.fixture
def records(database: Database) -> Records:
    return Records(database)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def looped() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def bomb() -> list[Any]:
    value: list[Any] = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


BAD_CONTENT: list[Any] = [
    *("", " ", "\n\t\u2003", "a\0b", "\ud800", "x\udfff", b"bytes", 1, None, 1.5, True, object(), {"a"}),
    *({}, {"content": "x"}, {"role": "user"}, {"role": "user", "content": None}, {"role": "user", "content": [1]}),
    *({"role": "robot", "content": "x"}, {"role": ["user"], "content": "x"}, {"role": "user", "content": "x", "to": 1}),
    *({"role": "user", "content": "x", "name": ""}, {"role": "user", "content": "x", "name": 5}),
    *({"role": "user", "content": "x", "at": "yesterday"}, {"role": "user", "content": "x", "at": 5}),
    *({"role": "user", "content": "x", "metadata": [1]}, ["fine", ["nested"]], ["fine", ""], ["fine", None]),
    "x" * (16 * 1024 * 1024 + 1),
]


@pytest.mark.parametrize("content", BAD_CONTENT, ids=range(len(BAD_CONTENT)))
def test_bad_content_is_refused_by_name(content: Any) -> None:
    with pytest.raises(InvalidInput):
        drafts(content, scope=ROOT)


BAD_METADATA: list[Any] = [
    *([1], "x", 5, {1: 2}, {None: 1}, {"a": (1,)}, {"a": {1}}, {"a": b"x"}, {"a": dt.datetime(2026, 1, 1)}),
    *({"a": float("nan")}, {"a": [float("inf")]}, {"a": object()}, {"a": {1: 2}}, {"a": "\ud800"}, {"\ud800": 1}),
    *(
        {"a": (bomb(),)},
        {"a": "x\0"},
        {"a": nested(80)},
        looped(),
        {"a": bomb()},
        {"a": "x" * 1_100_000},
        {"a": 10**5000},
    ),
    {"a": type("Text", (str,), {})("x")},
]


@pytest.mark.parametrize(
    "metadata", BAD_METADATA, ids=lambda metadata: f"{type(metadata).__name__}{len(str(type(metadata)))}"
)
def test_metadata_that_json_would_alter_is_refused(metadata: Any) -> None:
    with pytest.raises(InvalidInput):
        drafts("x", scope=ROOT, metadata=metadata)


@pytest.mark.parametrize(
    "arguments",
    [
        {"at": "soon"},
        {"at": 5},
        {"at": dt.date(2026, 1, 1)},
        {"valid_from": "x"},
        {"valid_from": "2026-01-02", "valid_until": "2026-01-01"},
        {"valid_from": "2026-01-02", "valid_until": "2026-01-02"},
        {"valid_from": "2026-01-02T00:00+01:00", "valid_until": "2026-01-01T23:00Z"},
        {"source": ""},
        {"source": 3},
        {"source": "\0"},
    ],
)
def test_bad_dates_and_sources_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        drafts("x", scope=ROOT, **arguments)


@pytest.mark.parametrize("value", ["", "\0", "a\0", "\ud800", "x" * 513, "é" * 257, 5, True, b"x", ["a"], {}])
def test_a_malformed_scope_is_refused_everywhere(value: Any, records: Records) -> None:
    with pytest.raises(ScopeError):
        narrow(ROOT, user=value)
    scope = Scope.model_construct(tenant=None, user=value, agent=None, session=None)
    whole = (records.list, records.count, records.count_turns, records.has_turns, records.ids, records.newest)
    for call in (check_scope, *whole):
        with pytest.raises(ScopeError):
            call(scope)
    for refused in (lambda: drafts("x", scope=scope), lambda: records.get(new_id(), scope)):
        with pytest.raises(ScopeError):
            refused()


def test_a_handle_is_narrowed_but_never_turned() -> None:
    ana = narrow(ROOT, user="ana")
    assert narrow(ana, session="s", user=None) == Scope(user="ana", session="s")
    assert narrow(ana, user="ana") == ana
    for levels in ({"user": "bob"}, {"user": " ana"}, {"user": "*"}, {"group": "x"}):
        with pytest.raises(ScopeError):
            narrow(ana, **levels)


@pytest.mark.parametrize("k", [0, -1, -(10**5000), True, 1.0, "3", None, [bomb()]], ids=range(8))
def test_a_bad_k_is_refused(k: Any) -> None:
    with pytest.raises(InvalidInput):
        check_k(k)


def test_a_huge_limit_means_all(records: Records) -> None:
    records.insert(drafts(["a", "b"], scope=ROOT))
    assert len(records.list(ROOT, limit=10**100)) == 2


@pytest.mark.parametrize(
    "where",
    [[("a", 1)], "x", 5, {"a": [1]}, {"a": {"$gt": 1}}, {"id": 5}, {"role": True}, {1: 2}, {"a": 2**63}, {"a": b"x"}],
)
def test_a_where_that_is_not_understood_is_refused(where: Any, records: Records) -> None:
    for call in (lambda: records.list(ROOT, where=where), lambda: records.select(ROOT, where=where)):
        with pytest.raises(InvalidInput):
            call()


def test_bad_input_writes_nothing(records: Records) -> None:
    [kept] = records.insert(drafts("kept", scope=ROOT))
    for text in BAD_CONTENT:
        with pytest.raises(AgentMemError):
            records.insert(drafts(["fine", text], scope=ROOT))
        if text is not None:
            with pytest.raises(AgentMemError):
                records.update(kept.id, ROOT, text=text)
    for metadata in BAD_METADATA:
        with pytest.raises(AgentMemError):
            records.update(kept.id, ROOT, metadata=metadata)
    with pytest.raises(InvalidInput):
        records.update(kept.id, ROOT)
    assert records.list(ROOT) == [kept]
    assert records.verify() == []


AWKWARD = [
    *("e\u0301 \u00e9", "a\r\nb", "\ufeffbom", "  edges  ", "\U0001d518\U0001f9d1\u200d\U0001f680", "\u202etxet"),
    *("\x01\x7f", "%s {x} \\n '\"", "\ufb01", "a\u2028\x85b"),
]


@pytest.mark.parametrize("text", AWKWARD, ids=range(len(AWKWARD)))
def test_text_comes_back_exactly(text: str, tmp_path: Path) -> None:
    with contextlib.closing(Database(tmp_path / "memory.db")) as database:
        [made] = Records(database).insert(drafts(text, scope=ROOT, metadata={text: [text, 1, 1.0, True, None, 10**30]}))
    with contextlib.closing(Database(tmp_path / "memory.db")) as database:
        back = Records(database).get(made.id, ROOT)
    assert back == made
    assert back.text == text
    assert repr(back.metadata) == repr({text: [text, 1, 1.0, True, None, 10**30]})


def test_ten_megabytes_come_back_exactly(records: Records) -> None:
    text = "0123456789é" * (10 * 1024 * 1024 // 12)
    [made] = records.insert(drafts(text, scope=ROOT))
    assert records.get(made.id, ROOT).text == text


def test_a_message_keeps_what_it_says(records: Records) -> None:
    said = {"role": "assistant", "content": "hi", "name": "Bo", "at": "2023-05-08T13:56", "metadata": {"b": 2}}
    first, second, third = records.insert(
        drafts(
            [said, Message(role="tool", content="42"), "plain"], scope=ANA, metadata={"a": 1, "b": 1}, at="2020-01-01"
        )
    )
    assert (first.role, first.name, first.metadata) == ("assistant", "Bo", {"a": 1, "b": 2})
    assert first.at == dt.datetime(2023, 5, 8, 13, 56)  # naive stays naive
    assert second.at == dt.datetime(2020, 1, 1)
    assert (second.trust, third.trust, third.role) == ("untrusted", "trusted", "user")
    assert [record.id for record in records.list(ANA)] == [first.id, second.id, third.id]


def test_ids_sort_by_time_and_are_not_to_be_guessed() -> None:
    assert new_id(1.0) < new_id(1.5) < new_id(1e9)
    assert len({new_id(5.0) for _ in range(1000)}) == 1000
    assert re.fullmatch(r"[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", new_id())


def test_order_is_arrival_even_when_the_clock_goes_back(database: Database) -> None:
    times = iter([100.0, 100.0, 50.0, 50.0, 1e10, 1e10])
    records = Records(database, clock=lambda: next(times))
    for text in "abc":
        records.insert(drafts(text, scope=ROOT))
    assert [record.text for record in records.list(ROOT)] == ["a", "b", "c"]
    assert [record.text for record in records.newest(ROOT, limit=2)] == ["c", "b"]


def test_a_listing_is_paged_and_goes_on_after_its_last_record_went(records: Records) -> None:
    made = [records.insert(drafts(str(n), scope=ANA))[0] for n in range(5)]
    records.insert(drafts("foreign", scope=BOB))
    assert records.list(ANA, limit=2) == made[:2]
    assert records.list(ANA, limit=9, after=made[1].id) == made[2:]
    time.sleep(0.002)
    records.delete([made[1].id])
    assert records.list(ANA, limit=9, after=made[1].id)[-1] == made[4]
    with pytest.raises(InvalidInput):
        records.list(ANA, after=5)  # type: ignore[arg-type]


NO_ID = pytest.param(new_id().upper(), id="upper case")  # named: workers of pytest have to collect the same tests


@pytest.mark.parametrize("id_", ["", "x", "*", "%", "' OR 1=1", "\ud800", "\0", "0" * 32, NO_ID])
def test_unknown_ids_are_not_found(id_: str, records: Records) -> None:
    records.insert(drafts("x", scope=ROOT))
    for call in (records.get, records.history):
        with pytest.raises(NotFound):
            call(id_, ROOT)


def test_a_foreign_id_and_an_unknown_id_give_one_message(records: Records) -> None:
    [secret] = records.insert(drafts("secret", scope=BOB))
    messages = set()
    for id_ in (secret.id, new_id()):
        with pytest.raises(NotFound) as caught:
            records.get(id_, ANA)
        messages.add(str(caught.value).replace(id_, "ID"))
    assert len(messages) == 1


def test_what_a_level_above_shares_is_read_but_not_changed(records: Records) -> None:
    [shared] = records.insert(drafts("shared", scope=Scope(tenant="t")))
    handle = Scope(tenant="t", user="ana")
    assert records.get(shared.id, handle) == shared
    for refused in (
        lambda: records.update(shared.id, handle, text="mine"),
        lambda: records.select(handle, ids=[shared.id]),
    ):
        with pytest.raises(ScopeError):
            refused()
    assert records.select(handle, where={}) == []


def test_where_compares_types_and_odd_keys(records: Records) -> None:
    rows: list[dict[str, Any]] = [{"v": 1}, {"v": True}, {"v": "1"}, {"v": None}, {"v": 1.5}, {'a"b\\$.c\n': "x"}, {}]
    made = [records.insert(drafts("text", scope=ROOT, metadata=row))[0] for row in rows]
    for value, expected in ((1, 0), (1.0, 0), (True, 1), ("1", 2), (None, 3), (1.5, 4)):
        assert records.list(ROOT, where={"v": value}) == [made[expected]]
    assert records.list(ROOT, where={'a"b\\$.c\n': "x"}) == [made[5]]
    assert records.list(ROOT, where={"id": made[6].id}) == [made[6]]
    assert records.list(ROOT, where={"role": "tool"}) == []
    assert records.list(ROOT, where={"source": None, "v": True}) == [made[1]]


def test_update_keeps_the_history(records: Records) -> None:
    [made] = records.insert(drafts("one", scope=ANA, metadata={"n": 1}))
    records.update(made.id, ANA, text="two")
    last = records.update(made.id, ANA, metadata={"n": 3})
    history = records.history(made.id, ANA)
    assert [(record.version, record.text, record.metadata["n"]) for record in history] == [
        (1, "one", 1),
        (2, "two", 1),
        (3, "two", 3),
    ]
    assert history[-1] == last == records.get(made.id, ANA)
    assert records.verify() == []


def test_the_full_text_index_follows_updates_and_deletions(records: Records, database: Database) -> None:
    [made] = records.insert(drafts("walrus", scope=ANA))

    def found(word: str) -> int:
        return len(database.query("SELECT rowid FROM records_fts WHERE records_fts MATCH ?", (word,)))

    records.update(made.id, ANA, text="penguin")
    assert (found("walrus"), found("penguin")) == (0, 1)
    records.delete([made.id])
    assert found("penguin") == 0
    assert records.verify() == []


def test_ids_can_be_allotted_but_not_reused_or_brought_back(records: Records) -> None:
    id_ = new_id()
    assert records.insert(drafts("x", scope=ROOT), ids=[id_])[0].id == id_
    with pytest.raises(InvalidInput, match="in use"):
        records.insert(drafts("x", scope=ROOT), ids=[id_])
    records.delete([id_])
    assert records.known(id_)
    with pytest.raises(InvalidInput, match="forgotten"):
        records.insert(drafts("x", scope=ROOT), ids=[id_])
    for ids in ([], ["../../etc"], [id_, id_]):
        with pytest.raises(InvalidInput):
            records.insert(drafts("x", scope=ROOT), ids=ids)


def test_an_import_keeps_versions_and_never_raises_trust(records: Records) -> None:
    [tool] = records.insert(drafts({"role": "tool", "content": "from outside"}, scope=ANA))
    forged = tool.model_copy(update={"role": "user", "id": new_id()})
    assert draft_of(forged).trust == "untrusted"
    older = [forged.model_copy(update={"text": "older"})]
    [made] = records.insert([draft_of(forged)], ids=[forged.id], older=[older])
    assert [(record.version, record.text) for record in records.history(made.id, ANA)] == [
        (1, "older"),
        (2, "from outside"),
    ]
    assert records.verify() == []


def test_a_transaction_is_whole_or_nothing(records: Records, database: Database) -> None:
    space = open_space(database, "test", "digest", 4)

    def fail_half_way() -> None:
        with database.write():
            records.insert(drafts(["a", "b"], scope=ROOT), np.eye(2, 4, dtype=np.float32), space)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    for table in ("records", "vectors", "changes", "records_fts"):
        assert database.query(f"SELECT count(*) FROM {table}")[0][0] == 0


@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((1, 4), np.float32),
        np.ones((2, 3), np.float32),
        np.ones((2,), np.float32),
        np.array([[1, 2, 3, 4], [0, 0, 0, 0]], np.float32),
        np.array([[1, 2, 3, 4], [np.nan, 0, 0, 0]], np.float32),
        np.array([[1, 2, 3, 4], [np.inf, 0, 0, 0]], np.float32),
    ],
)
def test_a_vector_that_is_none_is_refused_before_any_write(vectors: Any, records: Records, database: Database) -> None:
    space = open_space(database, "test", "digest", 4)
    with pytest.raises(InvalidInput):
        records.insert(drafts(["a", "b"], scope=ROOT), vectors, space)
    with pytest.raises(InvalidInput):
        records.insert(drafts(["a", "b"], scope=ROOT), np.eye(2, 4, dtype=np.float32), 77)
    assert records.count(ROOT) == 0


def test_records_without_vectors_are_pending_until_embedded(records: Records, database: Database) -> None:
    space = open_space(database, "test", "digest", 4)
    one = np.array([[1, 0, 0, 0]], np.float32)
    assert records.pending(space) == []
    [first] = records.insert(drafts({"role": "user", "name": "Ana", "content": "hi"}, scope=ROOT))
    [second] = records.insert(drafts("there", scope=ROOT), one, space)
    assert records.pending(space) == [(1, "hi", "Ana")]
    records.update(first.id, ROOT, text="changed meanwhile")
    assert records.embed_rows([(1, "another text", "Ana")], one, space) == 0
    assert records.embed_rows(records.pending(space), one, space) == 1
    assert records.pending(space) == []
    records.update(second.id, ROOT, text="new words")
    assert records.pending(space) == [(2, "new words", None)]
    other = open_space(database, "other", "digest 2", 4)
    assert len(records.pending(other)) == 2


def test_what_every_turn_asks_reads_no_more_of_a_long_chat_than_of_a_short_one(
    records: Records, database: Database
) -> None:
    """Counted in steps of SQLite's machine, which grow with the rows that are walked through."""
    session = Scope(user="ana", session="s")
    space = open_space(database, "test", "digest", 4)
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    def asked(turns: int) -> int:
        nonlocal steps
        made = records.insert(drafts([f"turn {n}" for n in range(turns)], scope=session, source="chat"), None)
        records.embed_rows(records.pending(space, limit=turns), np.eye(turns, 4, dtype=np.float32) + 1, space)
        assert records.pending(space) == []
        records.update(made[-2].id, session, text="other words", vectors=np.ones((1, 4), np.float32), space=space)
        with database.write() as connection:
            connection.set_progress_handler(step, 1)
        steps = 0
        assert records.pending(space) == []
        assert [turn.id for turn in records.turns_from(session, made[-2].id, carried=True)] == [
            turn.id for turn in made[-2:]
        ]
        with database.write() as connection:
            connection.set_progress_handler(None, 1)
        return steps

    short, long = asked(200), asked(3000)
    assert 0 < long < 1.2 * short, (short, long)


def test_validity_is_from_inclusive_to_exclusive_in_utc(records: Records, database: Database) -> None:
    records.insert(drafts("x", scope=ROOT, valid_from="2026-01-01T02:00+02:00", valid_until="2026-01-02"))
    day = dt.datetime(2026, 1, 1, tzinfo=dt.UTC).timestamp()
    for seconds, valid in ((day - 1, 0), (day, 1), (day + 86399, 1), (day + 86400, 0)):
        sql, values = valid_at(seconds)
        assert database.query(f"SELECT count(*) FROM records WHERE {sql}", values)[0][0] == valid


@pytest.mark.parametrize(
    "year", ["0001-01-01T00:00+14:00", "9999-12-31T23:59:59.999999-14:00", "1969-12-31", "1582-10-10"]
)
def test_far_dates_are_kept(year: str, records: Records) -> None:
    [made] = records.insert(drafts("x", scope=ROOT, at=year, valid_from="0001-01-01T00:00+14:00"))
    assert records.get(made.id, ROOT).at == dt.datetime.fromisoformat(year)


DAMAGE = {
    "records": "UPDATE records SET text = replace(text, 'p', 'q')",
    "scope": "UPDATE records SET user = 'bob'",
    "validity": "UPDATE records SET until_s = 5",
    "versions": "UPDATE versions SET text = 'forged'",
    "vectors": "UPDATE vectors SET vector = zeroblob(16)",
    "words": "INSERT INTO records_fts (rowid, text, name) VALUES (99, 'ghost', NULL)",
    "strays": "UPDATE vectors SET seq = 99",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_names_every_damage_and_no_wrong_text_is_given(
    damage: str, records: Records, database: Database
) -> None:
    space = open_space(database, "test", "digest", 4)
    [made] = records.insert(drafts("peanuts", scope=ANA), np.eye(1, 4, dtype=np.float32), space)
    records.update(made.id, ANA, text="more peanuts", vectors=np.ones((1, 4), np.float32), space=space)
    assert records.verify() == []
    with database.write() as connection:
        connection.execute(DAMAGE[damage])
    assert records.verify() != []
    if damage in ("records", "validity"):
        with pytest.raises(Corrupt):
            records.get(made.id, ANA)
    if damage == "scope":
        with pytest.raises(Corrupt):
            records.get(made.id, BOB)
    if damage == "versions":
        with pytest.raises(Corrupt):
            records.history(made.id, ANA)


def test_a_damaged_record_can_be_forgotten_and_the_words_are_right_again(records: Records, database: Database) -> None:
    [damaged] = records.insert(drafts("secret words", scope=ANA))
    [other] = records.insert(drafts("other words", scope=ANA))
    with database.write() as connection:
        connection.execute("UPDATE records SET text = 'something else' WHERE id = ?", (damaged.id,))
    assert records.delete([damaged.id]).records == 1
    assert records.verify() == []
    assert records.list(ANA) == [other]


def bytes_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_after_a_deletion_no_byte_of_it_is_left_in_the_folder(tmp_path: Path) -> None:
    random.seed(1)
    with contextlib.closing(Database(tmp_path / "memory.db")) as database:
        records = Records(database)
        space = open_space(database, "test", "digest", 64)
        vectors = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
        words = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(300)]
        made = records.insert(drafts([f"the {word} of nothing" for word in words], scope=ANA), vectors, space)
        for record, word in zip(made[::10], words[::10], strict=True):
            records.update(record.id, ANA, text=f"{word}x now", vectors=np.full((1, 64), 0.5, np.float32), space=space)
        before = bytes_of(tmp_path)
        assert all(word.encode() in before for word in words)
        gone = [n for n in range(300) if n % 3 == 0]
        counted = records.delete([made[n].id for n in gone])
        assert (counted.records, counted.versions, counted.vectors) == (100, 10, 100)
        assert database.scrub()
        after = bytes_of(tmp_path)
        for n, (word, vector) in enumerate(zip(words, vectors, strict=True)):
            kept = n not in gone
            assert (word.encode() in after) == kept
            if kept and n % 10:
                assert vector.tobytes() in after
            elif not kept:
                assert vector.tobytes()[:32] not in after
        assert records.verify() == []


def test_many_threads_write_and_read_at_once(records: Records) -> None:
    failures: list[BaseException] = []

    def work(user: str) -> None:
        try:
            for n in range(20):
                [made] = records.insert(drafts(f"{user} {n}", scope=Scope(user=user)))
                assert records.get(made.id, Scope(user=user)) == made
                assert len(records.list(Scope(user=user))) == n + 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"u{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert records.count(ROOT) == 120


def test_an_export_line_is_plain_json(records: Records) -> None:
    [made] = records.insert(drafts("x", scope=ANA, metadata={"a": [1]}, valid_until="2030-01-01"))
    assert Record.model_validate(json.loads(made.model_dump_json())) == made


def test_the_end_of_a_long_conversation_is_found_by_an_index(records: Records, database: Database) -> None:
    here = Scope(user="ana", session="s")
    said = records.insert(drafts([f"turn {n}" for n in range(9)], scope=here, source="chat"))
    records.insert(drafts(["by hand"], scope=here))
    records.insert(drafts(["elsewhere"], scope=Scope(user="ana", session="t"), source="chat"))
    assert [r.text for r in records.turns(here, limit=2)] == ["turn 8", "turn 7"]
    assert [r.text for r in records.turns(here, limit=2, before=said[2].id)] == ["turn 1", "turn 0"]
    assert (records.count_turns(here), records.count_turns(here, before=said[4].id)) == (9, 4)
    plan = database.query(
        f"EXPLAIN QUERY PLAN SELECT * FROM records WHERE {TURNS} ORDER BY seq DESC", ["", "ana", "", "s"]
    )
    assert "records_turns" in plan[0]["detail"]


def test_whether_there_are_turns_is_told_of_this_very_scope_from_one_row(
    records: Records, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Scope(user="ana", session="s")
    records.insert(drafts(["by hand"], scope=here))
    records.insert(drafts(["elsewhere"], scope=Scope(user="ana", session="t"), source="chat"))
    assert not records.has_turns(here)
    records.insert(drafts([f"turn {n}" for n in range(9)], scope=here, source="chat"))
    read: list[int] = []
    real = database.query

    def query(*given: Any) -> Any:
        rows = real(*given)
        read.append(len(rows))
        return rows

    monkeypatch.setattr(database, "query", query)
    assert records.has_turns(here)
    assert read == [1]


@pytest.mark.parametrize("verb", ["delete", "named", "at_rows", "update"])
def test_a_look_up_by_id_never_walks_through_a_table(records: Records, database: Database, verb: str) -> None:
    space = open_space(database, "e", "d", 2)
    many = records.insert(drafts([f"fact {n}" for n in range(50)], scope=ROOT), np.ones((50, 2), np.float32), space)
    ids = [record.id for record in many[:3]]
    asked: list[str] = []
    connection: Any = database._connection
    connection.set_trace_callback(asked.append)
    calls: dict[str, Callable[[], object]] = {
        "delete": lambda: records.delete(ids),
        "named": lambda: records.named(ids, ROOT),
        "at_rows": lambda: records.at_rows([1, 2], ROOT),
        "update": lambda: records.update(ids[0], ROOT, text="other"),
    }
    calls[verb]()
    connection.set_trace_callback(None)
    for statement in asked:
        if statement.startswith(("SELECT", "DELETE", "UPDATE")) and "_fts" not in statement:
            plan = [row["detail"] for row in database.query(f"EXPLAIN QUERY PLAN {statement}")]
            walks = [line for line in plan if line.startswith("SCAN") and line.split()[1] in ("records", "vectors")]
            assert not walks, (statement, walks)
