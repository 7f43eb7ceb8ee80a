"""What replies and reports say of attention in place and of records as KV: what happened, and nothing else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmem.database import Database
from agentmem.ledger.accounts import Accounts
from agentmem.ledger.report import Report
from agentmem.ledger.uses import Ledger
from agentmem.types import Attended, CacheUse, Scope, Usage

sys.path.insert(0, str(Path(__file__).parent))  # tests/ is no package

from test_local_provider import Stored, Tiny, asked, local, text
from test_record_kv import WINDOW, Kept


@pytest.fixture
def provider(tiny_model: Tiny, tmp_path: Path) -> Iterator[Any]:
    made = local(tiny_model(tmp_path / "llama", max_position_embeddings=WINDOW), tmp_path, attention="in_place")
    yield made
    made.close()


def test_a_prompt_shorter_than_a_page_was_not_attended_in_place(provider: Any, tmp_path: Path) -> None:
    with Stored(tmp_path / "store", grid=256, codec="int8") as store:
        short = provider.generate(asked(text(60), pages=store, max_tokens=2))
        longer = provider.generate(asked(text(300), pages=store, max_tokens=2))
    assert short.attended is None
    assert longer.attended.tokens == 256
    assert longer.attended.record_tokens == 0


def test_stored_states_are_not_used_once_their_model_failed(provider: Any, tmp_path: Path) -> None:
    with Kept(tmp_path / "kept") as kept:
        recall = kept.trusted(provider, kept.asked())
        kept.records.note(recall.subject, {"passed": False})
        assert not provider._ready().records.recall(kept.asked()).composed


def test_the_report_counts_the_tokens_of_records_that_came_as_kv(tmp_path: Path) -> None:
    database = Database(tmp_path / "memory.db")
    ledger = Ledger(database, time.time)
    for attended in (
        None,
        Attended(codec="raw", record_tokens=40),
        Attended(codec="raw", tokens=64, bytes=5, stock_bytes=9, record_tokens=2),
    ):
        ledger.note("chat", "local:x", Scope(), Usage(input_tokens=100), cache=CacheUse(attended=attended))
    [line] = Accounts(ledger, Scope()).lines()
    database.close()
    assert (line.attended_tokens, line.record_tokens, line.spared_bytes) == (64, 42, 4)
    shown = str(Report(lines=[line], bytes={}, records=0, pages=0, loras=0))
    assert "records as KV" in shown
    assert "42" in shown
