"""No room left, a file-size limit, a sync that fails: errors by name; what was stored stays, can be read and erased."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentmem import Memory

pytestmark = pytest.mark.slow

#: Adds until ten adds in a row failed; then reads, searches and erases. Says all of it as JSON.
FILLER = """
import json, resource, signal, sys
from agentmem import AgentMemError, Full, Memory, StoreError
folder, limit = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = {"stored": {}, "errors": [], "read": False, "erased": [], "refused": []}
def tried(what, verb, *arguments):
    try:
        return verb(*arguments)
    except AgentMemError as error:
        said[what].append(type(error).__name__)
memory = Memory(folder, embedder="hash")
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
while len(said["errors"]) < 10:
    number = len(said["stored"]) + len(said["errors"])
    made = tried("errors", memory.add, f"fact {number} " + "and more words of it " * 20)
    if made:
        said["stored"][made[0].id] = made[0].text
said["read"] = said["stored"].keys() <= {record.id for record in memory.list(limit=10**6)}
said["found"] = len(memory.search("fact 3", k=3))
for id_ in list(said["stored"])[:9]:
    if tried("refused", memory.forget, id_):
        said["erased"].append(id_)
        del said["stored"][id_]
    made = tried("errors", memory.add, "something in between " * 200)
    if made:
        said["stored"][made[0].id] = made[0].text
tried("refused", memory.close)
sys.stdout.write(json.dumps(said))
"""


def fill(folder: Path, limit: int = 0, under: tuple[str, ...] = ()) -> dict[str, object]:
    command = [*under, sys.executable, "-c", FILLER, str(folder), str(limit)]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    said: dict[str, object] = json.loads(done.stdout)
    return said


def check(folder: Path, said: dict[str, object], errors: set[str]) -> None:
    """All stored records are there, and at most the one that failed at its sync besides."""
    assert set(said["errors"]) <= errors  # type: ignore[call-overload]
    assert said["read"]
    assert said["found"] == 3
    with Memory(folder, embedder="hash") as memory:
        there = {record.id: record.text for record in memory.list(limit=10**6)}
        stored: dict[str, str] = said["stored"]  # type: ignore[assignment]
        assert {id_: there.get(id_) for id_ in stored} == stored
        assert len(there) - len(stored) <= 1
        assert not set(said["erased"]) & set(there)  # type: ignore[call-overload]
        assert memory.add("room again")
        assert memory.verify().problems == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_on_a_full_disk_everything_stored_can_be_read_and_erased(small_disk: Path) -> None:
    said = fill(small_disk / "memory")
    assert len(said["erased"]) == 9, said["refused"]  # type: ignore[arg-type]
    (small_disk / "memory").rename(small_disk / "moved")
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    check(small_disk / "moved", said, {"Full"})


def test_a_file_size_limit_is_a_typed_error_and_loses_nothing(tmp_path: Path) -> None:
    check(tmp_path / "memory", fill(tmp_path / "memory", limit=700_000), {"Full", "StoreError"})


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_sync_that_fails_is_a_typed_error_and_loses_nothing(tmp_path: Path) -> None:
    faults = ("-e", "trace=fdatasync,fsync", "-e", "inject=fdatasync,fsync:error=EIO:when=20+")
    said = fill(tmp_path / "memory", under=("strace", "-f", "-qq", "-o", os.devnull, *faults))
    assert len(said["stored"]) > 5  # type: ignore[arg-type]
    assert len(said["refused"]) > 0  # type: ignore[arg-type]
    check(tmp_path / "memory", said, {"StoreError"})
