"""The rules of the house, kept by tests: what may import what, what importing costs, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import agentmem

ROOT = Path(__file__).resolve().parents[2]

#: Calls go down: a module imports only from rooms further down this list, or from its own.
ORDER = [
    ["testing"],
    ["__main__"],
    ["commands"],
    ["wrapping"],
    ["async_memory"],
    ["memory"],
    ["async_handles"],
    ["handles"],
    ["reply_stream", "opening", "reporting"],
    ["background"],
    ["wrapped_turns", "consolidate"],
    ["moving", "explaining"],
    ["snapshots"],
    ["learning", "distilling"],
    ["retraining"],
    ["teaching"],
    ["kinds", "chat", "transfer", "histories", "reconciling", "reembedding", "counting"],
    ["recalling"],
    ["verbatim", "wrapped_marks", "heads"],
    ["acting", "extraction", "asked", "asking", "planning", "cores"],
    ["economics"],
    ["flows"],
    ["forgetting"],
    ["publishing"],
    ["engine"],
    ["importers", "serving", "jobs", "tco"],
    ["prompt", "ledger", "flow"],
    ["plaintext", "activation", "parametric", "planner"],
    ["provider", "database", "config", "tokens", "progress", "activity", "pickles", "images"],
    ["cache_rules", "loras", "figures", "kv"],
    ["schema", "watermark"],
    ["_pure"],
    ["_native"],
    ["types"],
    ["value"],
    ["errors"],
]
#: Lines above which a file is asking to be two ("about 500").
LONGEST = 520
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports when it runs, deferred imports too; type-checking ones are left out."""
    top = path.relative_to(ROOT).with_suffix("").parts
    package = ["agentmem", *top[1:]] if top[0] == "agentmem" else ["agentmem", *top]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            package_itself = node.module is None or module == "agentmem"
            yield from ([f"{module}.{alias.name}" for alias in node.names] if package_itself else [module])


def room(name: str) -> str:
    return name.removeprefix("agentmem.").split(".")[0]


@pytest.mark.parametrize("path", [p for p in sources("agentmem") if p.name != "__init__.py"], ids=lambda p: str(p.name))
def test_calls_go_down(path: Path) -> None:
    mine = path.relative_to(ROOT / "agentmem").with_suffix("").parts[0]
    for name in imports(path):
        if name != "agentmem" and not name.startswith("agentmem."):
            continue
        assert not name.startswith("agentmem.adapters"), f"{path.name} imports an adapter ({name})"
        other = room(name)
        if other != mine:
            assert LEVEL[mine] < LEVEL[other] or {mine, other} <= {"config", "provider", "tokens"}, (
                f"{mine} imports {other}"
            )


@pytest.mark.parametrize("path", sources("adapters"), ids=lambda p: p.name)
def test_adapters_import_core_and_their_siblings_only(path: Path) -> None:
    above = {"memory", "async_memory", "kinds", "chat", "transfer", "flows", "engine", "prompt", "ledger"}
    for name in imports(path):
        if name.startswith("agentmem."):
            assert room(name) not in above, f"{path.name} imports {name}"


def test_importing_agentmem_is_light() -> None:
    code = "import agentmem, sys; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"torch", "faiss", "transformers", "openai", "anthropic", "ollama", "numpy", "httpx", "rich", "tiktoken"}
    assert not heavy & loaded


def test_importing_memory_loads_no_model_or_vendor_library() -> None:
    code = "from agentmem import Memory, AsyncMemory; import sys; print(' '.join(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not {"torch", "faiss", "transformers", "openai", "anthropic", "ollama"} & loaded


def cost_of_import(module: str) -> int:
    """Microseconds of ``import module`` in a new interpreter, everything it loads included; the least of five."""
    costs = []
    for _ in range(5):
        command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
        # "import time: self [us] | cumulative | name": the sum of all "self" is the whole cost.
        costs.append(sum(int(cost) for line in lines for cost in re.findall(r"^import time:\s+(\d+) \|", line)))
    return min(costs)


def test_importing_agentmem_costs_less_than_twice_pydantic() -> None:
    assert cost_of_import("agentmem") < 2 * cost_of_import("pydantic")


def test_all_names_exist_and_say_where_they_live() -> None:
    for name in agentmem.__all__:
        value = getattr(agentmem, name)
        if isinstance(value, type):
            assert value.__module__ == "agentmem", name
    assert sorted(agentmem.__all__) == sorted(set(agentmem.__all__))


@pytest.mark.parametrize("path", [*sources("agentmem"), *sources("adapters")], ids=lambda p: p.name)
def test_every_module_says_what_it_exports(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "__init__.py":
        return
    assert ast.get_docstring(tree), "no module docstring"
    listed = [n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    assert listed, "no __all__"
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    names |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    names |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    names |= {(a.asname or a.name) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    names |= set(re.findall(r'^    if name == "(\w+)":', path.read_text(encoding="utf-8"), re.MULTILINE))  # __getattr__
    assert set(ast.literal_eval(listed[0].value)) <= names


def test_no_pickle_on_any_path() -> None:
    for path in [*sources("agentmem"), *sources("adapters")]:
        for name in imports(path):
            assert name.split(".")[0] not in ("pickle", "joblib", "shelve", "marshal"), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize(
    "path", [*sources("agentmem"), *sources("adapters"), *(ROOT / "native").glob("*.[ch]")], ids=lambda p: p.name
)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_examples_stay_under_60_lines() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name


def test_readme_draws_the_tree_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(agentmem/ .*?)```", readme, re.DOTALL)
    assert block, "README.md has no tree"
    drawn, parents = set(), {0: ""}
    for line in block[1].splitlines():
        match = re.match(r"( *)([\w./-]+)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 2, match[2]
        path = parents.get(depth, "") + name
        parents[depth + 1] = path if name.endswith("/") else parents.get(depth, "")
        drawn.add(path.rstrip("/"))
    real = {
        str(p.relative_to(ROOT))
        for f in ("agentmem", "adapters")
        for p in sources(f)
        if not p.name.startswith("__init__")
    }
    assert drawn >= real, f"not in README.md's tree: {sorted(real - drawn)}"
    assert all((ROOT / path).exists() for path in drawn), sorted(p for p in drawn if not (ROOT / p).exists())


def test_changelog_and_package_have_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == project["version"] == agentmem.__version__
