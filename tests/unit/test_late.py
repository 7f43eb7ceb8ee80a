"""Token vectors in 2 bits: what is lost, what is refused, C against numpy; and what the store of them keeps in RAM."""

from __future__ import annotations

import runpy
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmem import _pure
from agentmem._pure import late as pure
from agentmem.database import Database
from agentmem.errors import Corrupt, InvalidInput, ProviderError
from agentmem.plaintext.late import MOST_PARTS, Matches, TokenStore, pack, pack_all, scores

native = pytest.importorskip("agentmem._native", reason="built without a C compiler")

LEVELS = ("numpy", *native.cpu_levels())


def units(seed: int, count: int, dimensions: int = 64) -> Any:
    rows = np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def exact(query: Any, passages: Sequence[Any]) -> Any:
    return np.array([(query @ passage.T).max(axis=1) for passage in passages])


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every instruction set, and the twin."""
    before = native.cpu_level()
    if request.param == "numpy":
        monkeypatch.setattr("agentmem.plaintext.late.kernels", lambda: _pure)
    else:
        native.set_cpu_level(request.param)
    yield request.param
    native.set_cpu_level(before)


class TestCodes:
    def test_a_token_takes_a_sixteenth_of_its_floats_and_a_scale(self) -> None:
        assert len(pack(units(0, 30, 384))) == 8 + 30 * (384 * 4 // 16 + 2)

    def test_a_vector_finds_itself_and_others_keep_their_product(self, level: str) -> None:
        rows = units(1, 40, 384)
        near = rows + 0.5 * units(2, 40, 384)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        found = scores(near, pack_all([row[None] for row in rows]))
        wanted = near @ rows.T
        assert np.abs(found.T - wanted).max() < 0.12, level
        assert (found.argmax(axis=0) == np.arange(40)).all()
        assert abs((found.T - wanted).mean()) < 0.005  # no bias

    @pytest.mark.parametrize("kind", ["one large number", "few numbers", "a constant"])
    def test_vectors_far_from_normal_keep_their_products_too(self, kind: str) -> None:
        rows = units(3, 20, 256)
        if kind == "one large number":
            rows[:, 7] += 3
        elif kind == "few numbers":
            rows[np.random.default_rng(0).random(rows.shape) < 0.97] = 0
        else:
            rows += 0.2
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        found = scores(rows, pack_all([row[None] for row in rows]))
        assert np.abs(found.T - rows @ rows.T).max() < 0.2

    def test_the_largest_product_of_a_passage_is_found(self, level: str) -> None:
        passages = [units(seed, count, 64) for seed, count in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 33))]
        query = units(99, 5)
        assert np.abs(scores(query, pack_all(passages)) - exact(query, passages)).max() < 0.35, level

    def test_every_level_has_the_bits_of_the_twin(self, level: str) -> None:
        if level == "numpy":
            pytest.skip("compared with")
        for dimensions in (1, 2, 63, 64, 65, 130, 384):
            for queries in (1, 4, 5, 8, 9, 12, 13, 16, 17, 40):
                passages = pack_all([units(7 * count, count, dimensions) for count in (0, 1, 3, 4, 5, 8, 9, 31)])
                starts = np.cumsum([0, *(len(one) for one in passages[:-1])])
                query, out, twin = units(queries, queries, dimensions), *np.empty((2, 8, queries), np.float32)
                native.maxsim(query, b"".join(passages), starts, out)
                pure.maxsim(query, b"".join(passages), starts, twin)
                assert out.tobytes() == twin.tobytes()

    def test_numpy_encodes_the_same_bytes(self) -> None:
        for seed, dimensions in enumerate((1, 5, 64, 100, 256, 384, 1024)):
            rows = units(seed, 300, dimensions) * np.float32(10.0 ** (seed - 4))
            rows[0] = 0
            made = [(np.empty(300, np.uint16), np.empty((300, pure.row_bytes(dimensions)), np.uint8)) for _ in "ab"]
            native.tokens_encode(rows, *made[0])
            pure.tokens_encode(rows, *made[1])
            assert all((ours == twin).all() for ours, twin in zip(*made, strict=True))

    def test_the_golden_file_is_what_it_was(self, level: str) -> None:
        golden = Path(__file__).parents[1] / "golden" / "tokens" / "v1.codes"
        rows = runpy.run_path(str(golden.with_name("write_v1.py")))["rows"]()
        assert golden.read_bytes() == pack(rows), level
        found = scores(rows, [golden.read_bytes()])[0]
        assert np.abs(found - (rows @ rows.T).max(axis=1)).max() < 0.1

    def test_a_passage_without_tokens_and_a_token_of_zeros_score_nothing(self, level: str) -> None:
        packed = pack_all([units(0, 0), np.zeros((2, 64), np.float32), units(0, 1)])
        found = scores(np.concatenate([units(0, 1), np.zeros((1, 64), np.float32)]), packed)
        assert found[:2].tolist() == [[0, 0], [0, 0]], level
        assert found[2, 0] == pytest.approx(1, abs=0.02)
        assert np.signbit(found).sum() == 0

    def test_half_precision_is_taken(self) -> None:
        rows = units(4, 9)
        assert len(pack(rows.astype(np.float16))) == len(pack(rows))

    @pytest.mark.parametrize(
        "tokens",
        [
            [np.full((2, 8), np.nan, np.float32)],
            [np.full((2, 8), np.inf, np.float32)],
            [np.zeros(8, np.float32)],
            [np.zeros((2, 0), np.float32)],
            [np.zeros((2, 4097), np.float32)],
            [np.zeros((2, 8), np.float32), np.zeros((2, 9), np.float32)],
            [np.zeros((65_537, 1), np.float32)],
        ],
    )
    def test_what_is_no_token_vectors_is_refused(self, tokens: Any) -> None:
        with pytest.raises(ProviderError):
            pack_all(tokens)

    @pytest.mark.parametrize("query", [np.zeros(64), np.zeros((1, 0)), np.full((1, 64), np.nan)])
    def test_what_is_no_query_is_refused(self, query: Any) -> None:
        with pytest.raises(InvalidInput):
            scores(query, [pack(units(0, 2))])

    def test_bytes_that_are_no_codes_are_refused(self, level: str) -> None:
        good = pack(units(0, 3))
        for bad in (
            b"",
            good[:7],
            good[:-1],
            b"\x02" + good[1:],
            good[:1] + b"\x01" + good[2:],
            good[:2] + b"\0\0" + good[4:],
            good[:2] + b"\xff\xff" + good[4:],
            good[:4] + b"\xff\xff\xff\xff" + good[8:],
            pack(units(0, 3, 65)),
        ):
            with pytest.raises(Corrupt):
                scores(units(0, 1), [bad])
            assert level

    def test_starts_outside_are_refused(self, level: str) -> None:
        kernels = _pure if level == "numpy" else native
        good, out = pack(units(0, 3)), np.empty((1, 1), np.float32)
        for start in (-1, 1, len(good) - 8, len(good), 2**62, -(2**63)):
            with pytest.raises(ValueError, match="codes at"):
                kernels.maxsim(units(0, 1), good, np.array([start]), out)

    def test_other_arrays_are_refused(self, level: str) -> None:
        kernels = _pure if level == "numpy" else native
        good, query, starts, out = pack(units(0, 3)), units(0, 2), np.zeros(1, np.int64), np.empty((1, 2), np.float32)
        for bad in (
            (query[0], good, starts, out),
            (query.astype(np.float64), good, starts, out),
            (units(0, 257), good, starts, np.empty((1, 257), np.float32)),
            (query, good, starts.astype(np.int32), out),
            (query, good, starts, out.T.copy()),
            (query, good, starts, np.empty((2, 2), np.float32)),
            (query * np.float32(np.nan), good, starts, out),
        ):
            with pytest.raises(ValueError, match=r"query|starts"):
                kernels.maxsim(*bad)


def write(database: Database, seqs: Sequence[int], tokens: Any, space: int = 1, parts: int = 1) -> None:
    rows = [(seq, space, part, codes := pack(tokens), zlib.crc32(codes)) for seq in seqs for part in range(parts)]
    with database.write() as connection:
        connection.executemany(
            "INSERT OR REPLACE INTO tokens (seq, space, part, codes, checksum) VALUES (?, ?, ?, ?, ?)", rows
        )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "memory.db")
    yield made
    made.close()


class TestStore:
    def test_scores_come_in_the_order_asked_for_with_all_passages(self, database: Database) -> None:
        rows = {seq: units(seq, 4) for seq in (3, 5, 9)}
        for seq, tokens in rows.items():
            write(database, [seq], tokens, parts=2 if seq == 5 else 1)
        write(database, [5], units(77, 2), space=2)
        query, store = units(1, 3), TokenStore(database, 1)
        for _ in range(2):  # from the database, from RAM
            found = store.match(query, np.array([9, 4, 5, 3]))
            assert found.owner.tolist() == [0, 2, 2, 3]
            assert found.part.tolist() == [0, 0, 1, 0]
            expected = scores(query, [pack(rows[seq]) for seq in (9, 5, 5, 3)])
            assert found.scores.tobytes() == expected.tobytes()

    def test_best_takes_each_records_best_passage(self, database: Database) -> None:
        write(database, [1], units(1, 4))
        with database.write() as connection:
            for number, seed in enumerate((5, 6, 7)):
                codes = pack(units(seed, 1))
                connection.execute("INSERT INTO tokens VALUES (2, 1, ?, ?, ?)", (number, codes, zlib.crc32(codes)))
        store, query = TokenStore(database, 1), units(6, 1)
        best, part = store.match(query, np.array([3, 2, 1])).best(np.ones(1, np.float32))
        assert np.isnan(best[0])
        assert part.tolist() == [-1, 1, 0]
        assert best[1] == pytest.approx(1, abs=0.02)
        alone, part = store.match(query, np.array([1])).best(np.ones(1, np.float32))
        assert (alone[0], part[0]) == (best[2], 0)

    def test_one_statement_reads_what_is_missing_and_none_the_rest(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(database, range(1, 50), units(0, 3))
        asked: list[Any] = []
        query = Database.query

        def counted(self: Database, *rest: Any) -> Any:
            asked.append(rest)
            return query(self, *rest)

        monkeypatch.setattr(Database, "query", counted)
        store = TokenStore(database, 1)
        store.match(units(0, 2), np.arange(1, 40))
        store.match(units(0, 2), np.arange(20, 60))  # 50 to 59 have none
        store.match(units(0, 2), np.arange(1, 60))
        assert len(asked) == 2

    def test_what_was_half_read_when_memory_ended_is_not_gone_on_with(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(database, range(1, 6), units(0, 3))
        store, query = TokenStore(database, 1), units(2, 1)
        wanted = np.array([1, 2, 5])
        expected = store.match(query, wanted).scores.tobytes()
        store.drop(np.array([2]))
        insert, left = np.insert, [2]

        def failing(*rest: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise MemoryError
            return insert(*rest)

        with monkeypatch.context() as patch:
            patch.setattr(np, "insert", failing)
            with pytest.raises(MemoryError):
                store.match(query, wanted)
        assert store.match(query, wanted).scores.tobytes() == expected

    def test_a_dropped_row_is_read_again(self, database: Database) -> None:
        write(database, [1, 2], units(1, 3))
        store, query = TokenStore(database, 1), units(2, 1)
        before = store.match(query, np.array([1, 2])).scores
        write(database, [1], query)
        with database.write() as connection:
            connection.execute("DELETE FROM tokens WHERE seq = 2")
        store.drop(np.array([1, 2, 7]))
        after = store.match(query, np.array([1, 2]))
        assert after.owner.tolist() == [0]
        assert after.scores[0, 0] > 0.9 > before[0, 0]
        store.clear()
        assert store.bytes == 0
        assert store.match(query, np.array([1, 2])).owner.tolist() == [0]

    def test_ram_stays_within_the_budget_and_answers_stay_right(self, database: Database) -> None:
        tokens = {seq: units(seq, 20) for seq in range(1, 200)}
        for seq, rows in tokens.items():
            write(database, [seq], rows)
        store, query = TokenStore(database, 1, budget=20_000), units(0, 2)
        random = np.random.default_rng(0)
        for _ in range(60):
            asked = random.permutation(199)[:12] + 1
            expected = scores(query, [pack(tokens[seq]) for seq in asked.tolist()])
            assert store.match(query, asked).scores.tobytes() == expected.tobytes()
            assert store._used <= 20_000
            if random.random() < 0.3:
                store.drop(random.permutation(199)[:20] + 1)

    def test_damaged_codes_are_logged_and_left_out(self, database: Database, caplog: pytest.LogCaptureFixture) -> None:
        write(database, [1, 2, 3, 4], units(0, 3))
        with database.write() as connection:
            connection.execute("UPDATE tokens SET codes = zeroblob(length(codes)) WHERE seq = 1")
            connection.execute("UPDATE tokens SET checksum = 0 WHERE seq = 2")
            other = pack(units(0, 2, 32))[:-1]
            connection.execute("UPDATE tokens SET codes = ?, checksum = ? WHERE seq = 3", (other, zlib.crc32(other)))
        found = TokenStore(database, 1).match(units(0, 1), np.array([1, 2, 3, 4]))
        assert found.owner.tolist() == [3]
        assert [record.args for record in caplog.records if "left out" in record.message] != []
        assert len(caplog.records) == 3

    def test_another_dimension_is_refused(self, database: Database) -> None:
        write(database, [1], units(0, 3))
        with pytest.raises(InvalidInput):
            TokenStore(database, 1).match(units(0, 1, 65), np.array([1]))

    def test_nothing_asked_is_nothing_found(self, database: Database) -> None:
        found = TokenStore(database, 1).match(units(0, 2), np.empty(0, np.int64))
        assert found.scores.shape == (0, 2)
        assert found.best(np.ones(2, np.float32))[0].shape == (0,)

    def test_a_record_of_too_many_passages_takes_part_with_the_first(self, database: Database) -> None:
        write(database, [1], units(0, 1), parts=MOST_PARTS + 3)
        assert len(TokenStore(database, 1).match(units(0, 1), np.array([1])).owner) == MOST_PARTS

    def test_spans_are_those_of_the_passages(self, database: Database) -> None:
        with database.write() as connection:
            for part, span in enumerate(((0, 5), (5, 9))):
                connection.execute("INSERT INTO vectors VALUES (4, 1, ?, ?, ?, x'', 0)", (part, *span))
        assert TokenStore(database, 1).spans([4, 4, 5], [1, 0, 0]) == [(5, 9), (0, 5), None]

    def test_threads_may_share_it(self, database: Database) -> None:
        tokens = {seq: units(seq, 5) for seq in range(1, 60)}
        for seq, rows in tokens.items():
            write(database, [seq], rows)
        store, query = TokenStore(database, 1, budget=9_000), units(0, 3)
        expected = {seq: scores(query, [pack(rows)]) for seq, rows in tokens.items()}
        wrong: list[int] = []

        def search(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(40):
                asked = random.permutation(59)[:8] + 1
                found = store.match(query, asked).scores
                wrong.extend(
                    seq for seq, row in zip(asked.tolist(), found, strict=True) if (row != expected[seq]).any()
                )
                store.drop(asked[:2])

        threads = [threading.Thread(target=search, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


class TestMatches:
    def test_as_many_passages_as_records_are_not_always_one_each(self) -> None:
        found = Matches(
            3, np.array([[0.1], [0.2], [0.9]], np.float32), np.array([1, 2, 2]), np.array([0, 0, 1], np.int32)
        )
        assert not found.one_each
        best, part = found.best(np.ones(1, np.float32))
        assert np.isnan(best[0])
        assert best[1:].tolist() == pytest.approx([0.1, 0.9])
        assert part.tolist() == [-1, 0, 1]
        assert Matches(3, found.scores, np.arange(3), found.part).one_each
