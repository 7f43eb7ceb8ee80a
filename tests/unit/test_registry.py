"""LoRA versions: stored whole or not at all, switched per scope, retired with their records."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agentmem.database import Database
from agentmem.errors import Corrupt, Full, InvalidInput, NotFound, ScopeError, TrainingError
from agentmem.parametric.corpus import record_digest
from agentmem.parametric.gate import GateReport, Thresholds
from agentmem.parametric.lora import CONFIG, WEIGHTS, Lora, content_digest
from agentmem.parametric.registry import MANIFEST, LoraVersion, Registry
from agentmem.parametric.train import Trained
from agentmem.types import Scope

GOOD = GateReport(recall_trained=1, recall_held_out=1, drift=0.01, intrusion=0, passed=True)
BAD = GateReport(recall_trained=1, recall_held_out=1, drift=0.9, intrusion=1, passed=False)
ANA = Scope(user="ana")
CHAT = Scope(user="ana", session="s1")


def trained(seed: int = 0, records: tuple[str, ...] = ("r1", "r2")) -> Trained:
    chance = torch.Generator().manual_seed(seed)
    weights = {"model.layers.0.mlp.up_proj": (torch.randn(2, 8, generator=chance), torch.randn(8, 2, generator=chance))}
    return Trained(
        lora=Lora(2, 4.0, "tiny", weights, {"base": "ab", "records": repr(records)}),
        losses=(1.0, 0.5),
        cpu_seconds=1.5,
        seconds=1.0,
        seed=seed,
        epochs=2,
        recipe={"rank": 2},
        identity="ab",
        base="local:tiny",
        records={record: record_digest(f"text of {record}") for record in records},
    )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "memory.db")
    yield database
    database.close()


@pytest.fixture
def registry(database: Database, tmp_path: Path) -> Registry:
    times = iter(range(1_700_000_000, 1_800_000_000))
    return Registry(database, tmp_path / "lora", clock=lambda: float(next(times)))


def names(registry: Registry, folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_a_version_is_files_a_row_and_lineage(registry: Registry, database: Database, tmp_path: Path) -> None:
    version = registry.add(trained(), scope=ANA, gate=GOOD)
    folder = tmp_path / "lora" / version.digest
    assert content_digest(folder) == version.digest
    assert version.name == f"lora-{version.digest[:12]}"
    assert (version.state, version.active, version.records, version.base) == (
        "ready",
        False,
        ("r1", "r2"),
        "local:tiny",
    )
    assert version.bytes == sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert version.recipe == {"rank": 2, "epochs": 2}
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["contents"] == trained().records
    assert manifest["gate"]["passed"]
    rows = database.query("SELECT record FROM lineage WHERE kind = 'lora' AND key = ?", (version.digest,))
    assert [row["record"] for row in rows] == ["r1", "r2"]
    assert registry.versions(ANA) == [version]
    assert registry.get(version.name, ANA) == registry.get(version.digest, ANA) == version
    assert registry.bytes() > version.bytes
    assert "2 records" in str(version)
    assert version.name in version._repr_html_()
    assert LoraVersion.model_validate_json(version.model_dump_json()) == version


def test_adding_it_again_gives_the_same_version(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(trained(), scope=ANA, gate=GOOD)
    assert registry.add(trained(), scope=ANA, gate=GOOD) == first
    assert names(registry, tmp_path / "lora") == {first.digest}


def test_two_scopes_never_share_a_version(registry: Registry) -> None:
    narrow = registry.add(trained(), scope=CHAT, gate=GOOD)
    wide = registry.add(trained(), scope=ANA, gate=GOOD)
    assert narrow.digest != wide.digest
    registry.activate([wide], ANA)
    with pytest.raises(ScopeError):
        registry.activate([narrow], ANA)


def test_adding_it_again_repairs_damaged_files(registry: Registry, tmp_path: Path) -> None:
    first = registry.add(trained(), scope=ANA, gate=GOOD)
    (tmp_path / "lora" / first.digest / WEIGHTS).write_bytes(b"damaged")
    assert registry.verify() == [
        f"LoRA version {first.name}: the files of {first.name} are damaged (digest differs): train it again"
    ]
    registry.add(trained(), scope=ANA, gate=GOOD)
    assert registry.verify() == []


def test_the_nearest_activation_answers(registry: Registry) -> None:
    one, two = (registry.add(trained(seed), scope=ANA, gate=GOOD) for seed in (1, 2))
    assert registry.active(CHAT) == ()
    (active,) = registry.activate([one], ANA)
    assert active.active
    assert registry.active(CHAT) == (registry.get(one, CHAT),)
    assert registry.active(Scope(user="ana", agent="x", session="y"))
    assert registry.active(Scope(user="bob")) == ()
    assert registry.active(Scope()) == ()
    registry.activate([two.name], CHAT)
    assert digest(registry, CHAT) == two.digest
    assert digest(registry, ANA) == one.digest
    registry.activate([], CHAT)
    assert registry.active(CHAT) == ()
    assert [version.active for version in registry.versions(ANA)] == [False, True]


def digest(registry: Registry, scope: Scope) -> str | None:
    """The digests that act, with a space between them; None for the base."""
    return " ".join(version.digest for version in registry.active(scope)) or None


def test_rollback_goes_back_one_activation_at_a_time(registry: Registry) -> None:
    one, two = (registry.add(trained(seed), scope=ANA, gate=GOOD) for seed in (1, 2))
    registry.activate([one], ANA)
    registry.activate([two], ANA)
    assert [back.digest for back in registry.rollback(ANA)] == [one.digest]
    assert registry.rollback(ANA) == ()
    assert registry.rollback(ANA) == ()


def test_a_version_that_failed_its_gate_stays_inactive_unless_forced(registry: Registry) -> None:
    version = registry.add(trained(), scope=ANA, gate=BAD)
    assert version.state == "failed"
    with pytest.raises(TrainingError, match="did not pass its gate"):
        registry.activate([version], ANA)
    assert registry.active(ANA) == ()
    registry.activate([version], ANA, force=True)
    assert digest(registry, ANA) == version.digest


def test_other_scopes_neither_see_nor_use_it(registry: Registry) -> None:
    version = registry.add(trained(), scope=ANA, gate=GOOD)
    with pytest.raises(NotFound):
        registry.get(version.digest, Scope(user="bob"))
    with pytest.raises(NotFound):
        registry.activate([version], Scope(user="bob"))
    with pytest.raises(ScopeError, match="can't answer for all of"):
        registry.activate([version], Scope())
    assert registry.versions(Scope(user="bob")) == []
    assert registry.versions(Scope()) == [version]
    with pytest.raises(InvalidInput):
        registry.get("", ANA)


def test_it_carries_what_a_provider_needs(registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    version = registry.add(trained(), scope=ANA, gate=GOOD)
    registry.activate([version], ANA)
    (ref,) = registry.refs(CHAT, identity=b"\xab")
    assert (ref.name, ref.digest, ref.scale) == (version.name, version.digest, 1.0)
    assert Path(ref.path) == tmp_path / "lora" / version.digest
    with caplog.at_level(logging.WARNING, "agentmem"):
        assert registry.refs(CHAT, identity=b"\xcd") == ()
    assert "another base model" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_version_is_not_used(
    registry: Registry, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    version = registry.add(trained(), scope=ANA, gate=GOOD)
    registry.activate([version], ANA)
    weights = tmp_path / "lora" / version.digest / WEIGHTS
    content = weights.read_bytes()
    if damage == "gone":
        weights.unlink()
    else:
        weights.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    with caplog.at_level(logging.WARNING, "agentmem"):
        assert registry.active(CHAT) == ()
        assert registry.refs(CHAT, identity=b"\xab") == ()
    assert "is not used" in caplog.text
    with pytest.raises(NotFound if damage == "gone" else Corrupt):
        registry.ref(version)
    assert len(registry.verify()) == 1


def test_retiring_takes_it_out_everywhere_and_deletes_its_files(
    registry: Registry, database: Database, tmp_path: Path
) -> None:
    old = registry.add(trained(1, ("r1",)), scope=ANA, gate=GOOD)
    new = registry.add(trained(2, ("r1", "r2")), scope=ANA, gate=GOOD)
    other = registry.add(trained(3, ("r3",)), scope=ANA, gate=GOOD)
    registry.activate([old], ANA)
    registry.activate([new], ANA)
    registry.activate([new], CHAT)
    assert registry.made_from(["r2", "r9"]) == [new.digest]
    assert set(registry.made_from(["r1"])) == {old.digest, new.digest}
    assert registry.retire([new.digest, "unknown"]) == [new.digest]
    assert registry.active(ANA) == ()  # the base, not the older version by itself
    assert registry.active(CHAT) == ()
    assert names(registry, tmp_path / "lora") == {old.digest, other.digest}
    assert registry.made_from(["r2"]) == []
    assert not database.query("SELECT * FROM activations WHERE digest = ?", (new.digest,))
    assert registry.get(new, ANA).state == "retired"
    with pytest.raises(TrainingError, match="retired"):
        registry.activate([new], ANA, force=True)
    rows = database.query("SELECT manifest FROM loras WHERE digest = ?", (new.digest,))
    assert record_digest("text of r2") not in rows[0]["manifest"]
    assert registry.retire([new.digest]) == []
    assert [back.digest for back in registry.rollback(ANA)] == [old.digest]


def test_retiring_the_only_one_leaves_what_the_level_above_answers_with(registry: Registry) -> None:
    above, here = (registry.add(trained(seed, (f"r{seed}",)), scope=ANA, gate=GOOD) for seed in (1, 2))
    registry.activate([above], ANA)
    registry.activate([here], CHAT)
    registry.retire([here.digest])
    assert digest(registry, CHAT) == above.digest


def test_a_forgotten_or_changed_record_can_not_come_back(
    registry: Registry, database: Database, tmp_path: Path
) -> None:
    with database.write() as connection:
        connection.execute("INSERT INTO tombstones (record, at) VALUES ('r2', 1.0)")
        columns = "id, text, role, tenant, user, agent, session, metadata, trust, created, version, checksum"
        values = "'r7', 'new text', 'user', '', 'ana', '', '', '{}', 'trusted', 1, 2, 0"
        connection.execute(f"INSERT INTO records ({columns}) VALUES ({values})")
    with pytest.raises(TrainingError, match="r2 was forgotten"):
        registry.add(trained(), scope=ANA, gate=GOOD)
    with pytest.raises(TrainingError, match="r7 was changed"):
        registry.add(trained(records=("r7",)), scope=ANA, gate=GOOD)
    assert registry.versions(ANA) == []
    assert names(registry, tmp_path / "lora") == set()
    assert not database.query("SELECT * FROM lineage")


def test_a_full_disk_keeps_nothing_and_what_was_there(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentmem.parametric import registry as module

    first = registry.add(trained(1), scope=ANA, gate=GOOD)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(Full):
        registry.add(trained(2), scope=ANA, gate=GOOD)
    assert registry.versions(ANA) == [first]
    assert names(registry, tmp_path / "lora") == {first.digest}


def test_a_failed_commit_leaves_no_row_and_the_next_open_no_files(
    registry: Registry, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_staging: Path, _digest: str) -> None:
        publish(_staging, _digest)
        raise KeyboardInterrupt

    publish = registry._files.publish
    monkeypatch.setattr(registry._files, "publish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        registry.add(trained(), scope=ANA, gate=GOOD)
    assert registry.versions(ANA) == []
    Registry(database, tmp_path / "lora", clock=lambda: 0.0)
    assert names(registry, tmp_path / "lora") == set()


def test_threads_add_and_switch_at_once(registry: Registry) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for seed in range(number * 10, number * 10 + 5):
                version = registry.add(trained(seed), scope=ANA, gate=GOOD)
                registry.activate([version], Scope(user="ana", session=str(number)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(registry.versions(ANA)) == 20
    assert registry.verify() == []


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, agentmem.parametric.registry; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_registry import ANA, GOOD, Database, Registry, trained
folder = Path(sys.argv[1])
registry = Registry(Database(folder / "memory.db"), folder / "lora", clock=lambda: 0.0)
print("ready", flush=True)
for seed in range(1, 100000):
    version = registry.add(trained(seed, (f"r{seed}",)), scope=ANA, gate=GOOD)
    registry.activate([version], ANA)
    print(version.digest, flush=True)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_an_add_leaves_the_state_before_it(tmp_path: Path) -> None:
    """Six times: what was acknowledged is there and active, nothing half-written is, and the files match the rows."""
    acknowledged: list[str] = []
    for number in range(6):
        arguments = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            acknowledged += [writer.stdout.readline().strip() for _ in range(5 + number)]
            os.kill(writer.pid, signal.SIGKILL)
            acknowledged += [line.strip() for line in writer.stdout if len(line) == 65]
        database = Database(tmp_path / "memory.db")
        registry = Registry(database, tmp_path / "lora", clock=lambda: 0.0)
        stored = {version.digest for version in registry.versions(ANA)}
        assert set(acknowledged) <= stored
        assert names(registry, tmp_path / "lora") == stored
        assert registry.verify() == []
        assert registry.active(ANA)
        lineage = {row["key"] for row in database.query("SELECT key FROM lineage WHERE kind = 'lora'")}
        assert lineage == stored
        database.close()


def test_several_versions_act_as_one_activation(registry: Registry) -> None:
    one, two = (registry.add(trained(seed, (f"r{seed}",)), scope=ANA, gate=GOOD) for seed in (1, 2))
    assert [v.digest for v in registry.activate([one, two, one], ANA)] == [one.digest, two.digest]
    assert [ref.records for ref in registry.refs(CHAT, identity=b"\xab")] == [("r1",), ("r2",)]
    assert len(registry.refs(CHAT, identity=None)) == 2
    with pytest.raises(NotFound):
        registry.activate([two, "lora-nobody"], ANA)
    assert digest(registry, ANA) == f"{one.digest} {two.digest}"
    registry.activate([], ANA)
    assert registry.active(ANA) == ()
    assert len(registry.rollback(ANA)) == 2


def test_retiring_one_shard_leaves_the_others_acting(registry: Registry, database: Database) -> None:
    one, two = (registry.add(trained(seed, (f"r{seed}",)), scope=ANA, gate=GOOD) for seed in (1, 2))
    registry.activate([one], ANA)
    registry.activate([one, two], ANA)
    registry.activate([one, two], CHAT)
    registry.retire([one.digest], records=["r1"])
    assert digest(registry, ANA) == digest(registry, CHAT) == two.digest
    [job] = database.query("SELECT * FROM jobs WHERE kind = 'retrain'")
    note = json.loads(job["note"])
    assert (job["record"], note["records"], note["forced"]) == (one.digest, ["r1"], False)
    assert sorted(note["places"]) == [["", "ana", "", ""], ["", "ana", "", "s1"]]
    assert registry.rollback(ANA) == ()


def test_a_version_that_is_active_may_stay_so_after_it_was_forced(registry: Registry) -> None:
    bad, good = registry.add(trained(1), scope=ANA, gate=BAD), registry.add(trained(2), scope=ANA, gate=GOOD)
    registry.activate([bad], ANA, force=True)
    assert len(registry.activate([bad, good], ANA)) == 2


def test_the_same_weights_under_other_thresholds_are_judged_anew(registry: Registry) -> None:
    registry.add(trained(), scope=ANA, gate=BAD)
    strict = GOOD.model_copy(update={"thresholds": Thresholds(drift=0.001)})
    assert registry.add(trained(), scope=ANA, gate=strict).state == "ready"
    assert [version.state for version in registry.versions(ANA)] == ["ready"]


def test_verify_names_what_does_not_belong_together(registry: Registry, database: Database, tmp_path: Path) -> None:
    one, two = (registry.add(trained(seed), scope=ANA, gate=GOOD) for seed in (1, 2))
    registry.activate([one], ANA)
    assert registry.verify() == []
    (tmp_path / "lora" / one.digest / MANIFEST).write_text("{}")
    (tmp_path / "lora" / ("0" * 64)).mkdir()
    with database.write() as connection:
        connection.execute("DELETE FROM lineage WHERE key = ? AND record = 'r1'", (two.digest,))
        connection.execute("UPDATE activations SET digest = 'ffff' WHERE digest = ?", (one.digest,))
    problems = "\n".join(registry.verify())
    assert f"{one.name}: its manifest.json is not what the database says" in problems
    assert f"{two.name}: its lineage is not what it learnt" in problems
    assert "lora-ffff, which is not there" in problems
    assert "0000 belongs to no LoRA version" in problems


def test_a_run_s_checkpoint_is_kept_until_it_is_done_or_its_record_goes(
    registry: Registry, database: Database, tmp_path: Path
) -> None:
    contents = {"r1": record_digest("text of r1")}
    for again in (False, True):
        with contextlib.suppress(KeyboardInterrupt), registry.run("k", contents) as state:
            assert state is not None
            assert state.exists() is again
            state.write_text("half")
            with registry.run("k", contents) as other:  # one process at a time
                assert other is None
            raise KeyboardInterrupt
    Registry(database, tmp_path / "lora", clock=lambda: 0.0)
    assert names(registry, tmp_path / "lora") == {".run-k"}
    with database.write() as connection:
        connection.execute("INSERT INTO tombstones (record, at) VALUES ('r1', 1.0)")
    registry.drop_runs()
    assert names(registry, tmp_path / "lora") == set()
    with registry.run("k", {}) as state:
        assert state is not None
        state.write_text("whole")
    assert names(registry, tmp_path / "lora") == set()


def test_a_run_that_nobody_came_back_to_goes_with_time(registry: Registry, database: Database, tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), registry.run("k", {"r1": "d"}):
        raise KeyboardInterrupt
    for path in (tmp_path / "lora" / ".run-k", *(tmp_path / "lora" / ".run-k").iterdir()):
        os.utime(path, (1.0, 1.0))
    Registry(database, tmp_path / "lora", clock=lambda: 0.0)
    assert names(registry, tmp_path / "lora") == set()


def test_two_processes_activate_at_once_and_one_of_them_is_last(tmp_path: Path, registry: Registry) -> None:
    one, two = (registry.add(trained(seed), scope=ANA, gate=GOOD) for seed in (1, 2))
    code = ACTIVATOR.format(folder=str(Path(__file__).parent))
    runs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), version.digest]) for version in (one, two)]
    assert [run.wait(120) for run in runs] == [0, 0]
    assert digest(registry, ANA) in {one.digest, two.digest}
    assert registry.verify() == []


ACTIVATOR = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_registry import ANA, Database, Registry
folder = Path(sys.argv[1])
registry = Registry(Database(folder / "memory.db"), folder / "lora", clock=lambda: 0.0)
for _ in range(50):
    assert registry.activate([sys.argv[2]], ANA)[0].digest == sys.argv[2]
    assert len(registry.active(ANA)) == 1
"""
