"""What pip makes of the project: sdist, wheel, and a wheel where no C compiler was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the sources, as a clone would have them."""
    target = tmp_path_factory.mktemp("tree") / "agentmem"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__", "memory", "results")
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


def build(tree: Path, out: Path, kind: str, **environment: str) -> Path:
    shutil.rmtree(tree / "build", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    [made] = out.iterdir()
    return made


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the package from this folder and nothing of an editable installation of the checkout."""
    alone = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
    )
    return subprocess.run([sys.executable, "-c", alone + code], capture_output=True, text=True, check=False, cwd=folder)


def test_the_wheel_has_all_parts_and_one_serves_every_python(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, tmp_path / "dist", "wheel")
    assert "-cp311-abi3-" in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"agentmem/py.typed", "agentmem/_native.pyi", "agentmem/adapters/providers/local.py"} <= names
    assert any(name.startswith("agentmem/_native.abi3") for name in names)
    assert not any(name.startswith(("tests/", "adapters/", "native/")) for name in names)


def test_the_sdist_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    sdist = build(tree, tmp_path / "dist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    wheel = build(unpacked, tmp_path / "wheel", "wheel")
    assert any(name.startswith("agentmem/_native.abi3") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.skipif(sys.platform != "linux", reason="only the linker of Linux puts the sanitizers before Python")
def test_the_native_tests_pass_under_the_sanitizers(tree: Path, tmp_path: Path) -> None:
    probe = [os.environ.get("CC", "gcc"), "-shared", "-fPIC", "-fsanitize=address,undefined", "-x", "c", "-"]
    try:
        built = subprocess.run([*probe, "-o", str(tmp_path / "probe")], input=b"", capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    if built.returncode:
        pytest.skip("this compiler has no sanitizers")
    command = ["sh", str(tree / "scripts" / "sanitize"), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


PAGES = """
import logging, pathlib, tempfile
logging.basicConfig(format="%(message)s")
import numpy as np
from agentmem.activation.store import PageStore
from agentmem.database import Database
folder = pathlib.Path(tempfile.mkdtemp())
for name in ("a", "b"):
    store = PageStore(Database(folder / f"{name}.db"), folder / name, grid=16)
    view = store.view(b"s" * 32)
    states = np.arange(2 * 16 * 8, dtype=np.float32).reshape(2, 16, 8)
    assert view.seal(b"i" * 32, range(16), 0, [(states, states + 1)], [()]) == 1
    [page] = view.longest(b"i" * 32, range(16))
    keys, values = np.zeros_like(states), np.zeros_like(states)
    page.read_layers([keys], [values], 0)
    assert (keys == states).all() and (values == states + 1).all()
from agentmem import Memory
import agentmem
with Memory(folder / "m", embedder="hash") as memory:
    memory.add("works")
    assert memory.search("works")
print(agentmem.__file__)
"""


def test_without_a_compiler_it_installs_works_and_says_so_once(tree: Path, tmp_path: Path) -> None:
    wheel = build(tree, tmp_path / "dist", "wheel", CC="no-such-compiler")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in names)
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    done = run(site, PAGES)
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(site) in done.stdout
    assert len([line for line in done.stderr.splitlines() if "numpy" in line or "_pure" in line]) == 1
