"""The adapters with the oldest SDKs that pyproject.toml allows, as the rest of the suite tests them with the newest.

pip installs those into a folder; the tests of what is sent, read and mapped run against them in a process of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SDKS = ("openai", "anthropic", "ollama")
TESTS = [
    *("tests/unit/test_openai.py", "tests/unit/test_openai_responses.py", "tests/unit/test_openai_compatible.py"),
    *("tests/unit/test_anthropic.py", "tests/unit/test_anthropic_replies.py", "tests/unit/test_ollama.py"),
    *("tests/contract/test_openai_wire.py", "tests/contract/test_marked_prefixes.py"),
    *("tests/contract/test_wrap.py", "tests/contract/test_wrap_caches.py"),
]
#: Of the faults, those in which an SDK has a part of its own: statuses, streams, what it makes of half a reply.
FAULTS = "test_a_fault_gives and (responses or anthropic or ollama) and (cut or event or empty or 429)"


def lowest() -> dict[str, str]:
    """The oldest version of each SDK that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [re.match(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"]]
    found = {bound[1]: bound[2].split(".") for bound in bounds if bound is not None and bound[1] in SDKS}
    return {name: ".".join([*parts, "0", "0"][:3]) for name, parts in found.items()}


def pip_install(folder: Path, *packages: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--retries", "1", "--timeout", "10", "--target", str(folder), *packages],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode and ("from versions: none" in done.stderr or "No module named pip" in done.stderr):
        pytest.skip("needs pip and a package index")
    assert done.returncode == 0, done.stderr


def missing(folder: Path) -> list[str]:
    """What the installed packages need and this environment lacks."""
    needs: set[str] = set()
    for distribution in importlib.metadata.distributions(path=[str(folder)]):
        for requirement in distribution.requires or ():
            name = re.match(r"[\w.-]+", requirement)
            if name is not None and "extra ==" not in requirement:
                needs.add(name[0])
    here = {str(d.metadata["Name"]).lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return sorted(need for need in needs if need.lower().replace("_", "-") not in here)


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that imports the oldest SDKs."""
    folder = tmp_path_factory.mktemp("oldest")
    pip_install(folder, *(f"{name}=={version}" for name, version in lowest().items()))
    if needs := missing(folder):
        pip_install(folder, *needs)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def run(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_the_oldest_are_what_is_imported(oldest: dict[str, str]) -> None:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    assert run(oldest, "-c", code, *SDKS).split() == [lowest()[name] for name in SDKS]


def test_what_is_sent_read_and_mapped_is_the_same_with_them(oldest: dict[str, str]) -> None:
    told = run(oldest, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS)
    assert int(re.findall(r"(\d+) passed", told)[0]) > 200


def test_their_faults_are_typed_errors_too(oldest: dict[str, str]) -> None:
    told = run(oldest, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/contract/test_faults.py", "-k", FAULTS)
    assert int(re.findall(r"(\d+) passed", told)[0]) > 50
