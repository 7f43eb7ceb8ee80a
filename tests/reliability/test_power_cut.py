"""A power cut at any moment: the system calls of a writer are traced, and the disk is rebuilt as it may be found."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.reliability.disk import CALLS, Said, events
from tests.reliability.writer import Expected, problems, stored

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")]

#: (workloads, changes in each, states of the disk in all)
WORKLOADS, CHANGES, STATES = (10, 30, 2_000) if os.environ.get("AGENTMEM_RELIABILITY") == "full" else (2, 25, 150)


def traced(folder: Path, trace: Path, seed: int) -> None:
    command = ["strace", "-f", "-qq", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(trace)]
    writer = [sys.executable, "-m", "tests.reliability.writer", str(folder), str(seed), str(CHANGES)]
    done = subprocess.run([*command, *writer], capture_output=True, check=False)
    if done.returncode and b"ptrace" in done.stderr:
        pytest.skip("processes can't be traced here")
    assert done.returncode == 0, done.stderr.decode()


def check_states(folder: Path, trace: Path, seed: int, wanted: int) -> Expected:
    """Rebuild ``wanted`` states of the disk, spread over all moments, and open each."""
    count = sum(1 for _ in events(trace, str(folder)))
    chance = random.Random(seed)
    # Every moment has its turn where there are enough states to go round.
    moments = [at for at in range(count) for _ in range(wanted // count)]
    turns = Counter(moments + chance.sample(range(count), wanted - len(moments)))
    expected = Expected()
    states = 0
    for at, (disk, event) in enumerate(events(trace, str(folder))):
        if isinstance(event, Said):
            expected.heard(event.line)
        for _ in range(turns[at]):
            shutil.rmtree(folder, ignore_errors=True)
            for path, content in disk.after_a_cut(chance).items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content)
            try:
                expected.check(stored(folder))
                if states % 10 == 0:
                    assert problems(folder) == []
            except Exception as error:
                raise AssertionError(f"after event {at} ({event}) of {count}") from error
            states += 1
    assert states == wanted
    return expected


@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_no_power_cut_loses_what_was_told_to_be_stored(tmp_path: Path, seed: int) -> None:
    traced(tmp_path / "memory", tmp_path / "trace", seed)
    expected = check_states(tmp_path / "memory", tmp_path / "trace", seed, STATES // WORKLOADS)
    assert expected.changes == CHANGES


def test_a_program_that_does_not_sync_would_be_found_out(tmp_path: Path) -> None:
    traced(tmp_path / "memory", tmp_path / "trace", 1)
    calls = (tmp_path / "trace").read_text().splitlines(keepends=True)
    (tmp_path / "trace").write_text("".join(call for call in calls if "fdatasync(" not in call))
    with pytest.raises(AssertionError, match="after event"):
        check_states(tmp_path / "memory", tmp_path / "trace", 1, 100)
