"""``python -m agentmem``: each command on a real folder, its output and exit code, and a worker that ends by signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agentmem import Memory
from agentmem.commands import main

FACTS = ["My sister lives in Porto.", "My dog is called Biscuit.", "I work as a nurse.", "I am allergic to peanuts."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> str:
    return f"local:{tiny_model(tmp_path_factory.mktemp('model') / 'tiny')}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no agentmem.toml of the developer's is read
    monkeypatch.setenv("AGENTMEM_EMBEDDER", "hash")
    monkeypatch.setenv("AGENTMEM_PAGE_TOKENS", "16")
    for name in ("AGENTMEM_PATH", "AGENTMEM_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path, model: str) -> str:
    """A memory with records and a few chats on a small model of random weights."""
    with Memory(tmp_path / "m", model=model) as mem:
        ana = mem.scope(user="ana")
        ana.add(FACTS)
        for _ in range(3):
            ana.chat("Where does my sister live?", max_tokens=2)
    return str(tmp_path / "m")


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(argv) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out if code == 0 else captured.err


def test_a_dry_run_changes_nothing_and_a_run_makes_what_it_said(
    folder: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--path", folder, "--model", model)
    first = said(capsys, "consolidate", "--dry-run", *where)
    assert re.match(r"would make \d+ moves", first)
    assert said(capsys, "consolidate", "--dry-run", *where) == first
    made = said(capsys, "consolidate", "--user", "ana", *where)
    assert re.match(r"made \d+ moves", made)
    assert said(capsys, "verify", *where).startswith("10 records")


def test_a_budget_of_nothing_makes_nothing_that_costs(
    folder: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--path", folder, "--model", model)
    told = said(capsys, "consolidate", "--budget", "seconds=0", "--budget", "bytes=0", *where)
    made = int(told.split()[1])
    assert all(": costs 0 CPU-s" in line for line in told.splitlines()[1 : 1 + made])
    wrong = said(capsys, "consolidate", "--budget", "hours=1", *where, code=2)
    assert wrong.startswith("agentmem: InvalidInput: ")
    assert wrong.count("\n") == 1


def test_jobs_are_listed_paused_and_resumed(folder: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--path", folder, "--model", model)
    assert "is not paused" in said(capsys, "jobs", *where)
    assert "is paused" in said(capsys, "jobs", "--pause", *where)
    assert "is paused" in said(capsys, "jobs", *where)
    assert "is not paused" in said(capsys, "jobs", "--resume", *where)


def test_report_tells_the_scope_and_writes_a_page(
    folder: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert "chat" in said(capsys, "--path", folder, "report", "--user", "ana", "--html", str(page))
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert "StoreError" in said(capsys, "--path", folder, "report", "--html", str(tmp_path / "no" / "x"), code=1)


def test_explain_tells_where_a_record_lives(folder: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Memory(folder) as mem:
        record = mem.scope(user="ana").list()[0]
    told = said(capsys, "explain", record.id, "--path", folder, "--model", model)
    assert told.startswith(f"[{record.id}] user: {FACTS[0]}")
    assert "plaintext: user='ana'" in told
    assert "NotFound" in said(capsys, "explain", "nobody", "--path", folder, code=2)
    assert "NotFound" in said(capsys, "explain", record.id, "--path", folder, "--user", "ben", code=2)


def test_verify_fails_where_something_is_damaged(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    pages = sorted((Path(folder) / "pages").rglob("*.page"))
    assert pages
    assert "all sound" in said(capsys, "verify", "--path", folder)
    content = bytearray(pages[0].read_bytes())
    content[len(content) // 2] ^= 1
    pages[0].write_bytes(content)
    assert main(["verify", "--path", folder]) == 1
    assert "1 problems" in capsys.readouterr().out


def test_without_a_model_nothing_seems_to_be_consolidated(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("consolidate", "worker"):
        assert "ConfigError: no model" in said(capsys, command, "--path", folder, code=2)


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("consolidate", "worker", "jobs", "report", "verify"):
        error = said(capsys, command, "--path", str(tmp_path / "no"), code=2)
        assert error == f"agentmem: NotFound: there is no memory in {tmp_path / 'no'}: name its folder with --path\n"
    assert not (tmp_path / "no").exists()


def test_settings_come_from_the_file_and_are_checked(
    folder: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(f'path = "{folder}"\nmodel = "{model}"\nconsolidate_idle = 0.01\n', encoding="utf-8")
    assert "all sound" in said(capsys, "--config", str(config), "verify")
    config.write_text('pathh = "x"\n', encoding="utf-8")
    assert "ConfigError" in said(capsys, "verify", "--config", str(config), code=2)


@pytest.mark.parametrize(
    "wrong", [["worker", "--idle", "0"], ["worker", "--every", "x"], ["no"], [], ["consolidate", "--budget", "x"]]
)
def test_wrong_arguments_are_told_by_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert "usage: agentmem" in capsys.readouterr().err


# ---- the worker, as the process that it is ---------------------------------------------------------------------------


def worker(folder: str, model: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "agentmem", "worker", "--path", folder, "--model", model, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_worker_does_what_is_due_once(folder: str, model: str) -> None:
    first = worker(folder, model, "--once")
    out, error = first.communicate(timeout=120)
    assert (first.returncode, error) == (0, "")
    assert out.splitlines()[0] == f"worker on {folder}: what is due now"
    assert out.splitlines()[-1] == "worker stopped"
    second = worker(folder, model, "--once")
    out, _ = second.communicate(timeout=120)
    assert "nothing is due" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_by_signal_with_status_0(folder: str, model: str, number: signal.Signals) -> None:
    process = worker(folder, model, "--idle", "0.2")
    assert process.stdout is not None
    # A line at once, also in a pipe.
    assert process.stdout.readline() == f"worker on {folder}: after 0.2 s of silence\n"
    time.sleep(0.5)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")
    assert out.splitlines()[-1] == "worker stopped"


def test_a_worker_and_a_chat_share_a_folder(folder: str, model: str) -> None:
    process = worker(folder, model, "--every", "0.2")
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"worker on {folder}: every 0.2 s\n"
        with Memory(folder, model=model) as mem:
            for number in range(6):
                mem.scope(user="ana").chat(f"Where does my sister live, for the {number}th time?", max_tokens=2)
                time.sleep(0.1)
            assert mem.verify().ok
    finally:
        process.terminate()
        out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, ""), out
    with Memory(folder, model=model) as mem:
        assert mem.verify().ok
        assert len(mem.list(limit=100)) == len(FACTS) + 18


def test_two_workers_make_each_move_once(folder: str, model: str) -> None:
    with Memory(folder, model=model) as mem:
        mem.activation.evict()  # so that there is something to do: the head is to be primed
        planned = mem.consolidate(dry_run=True).moves
    assert planned
    workers = [worker(folder, model, "--once") for _ in range(2)]
    said_by = [process.communicate(timeout=120) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], said_by
    lines = [line for out, _ in said_by for line in out.splitlines()]
    done = [line.split(" UTC ")[1].split(":")[0] for line in lines if line.startswith("done")]
    assert done
    assert len(done) == len(set(done)), said_by
    with Memory(folder, model=model) as mem:
        assert not mem.consolidate(dry_run=True).moves
        assert mem.verify().ok


def test_tco_compares_a_workload_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "tco.csv"
    small = ("--users", "50", "--sample", "8", "--offers", "deepseek:deepseek-v4-flash")
    told = said(capsys, "tco", *small, "--csv", str(table))
    assert "deepseek" in told
    assert table.read_text(encoding="utf-8").count("\n") > 1
    assert "NotFound" in said(capsys, "--path", str(tmp_path / "no"), "tco", code=2)
