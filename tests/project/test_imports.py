"""Import rules: packages import downward only, no import cycles, and heavy libraries only where they are needed."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

# A package may import from itself and from packages left of the arrow before it.
RULE = (
    "errors, types -> utils -> config -> conversion, planning, runs, data, algorithms, actors -> models -> engines, "
    "rewards -> rollout -> evaluation -> training -> cluster -> preflight -> study -> trl, ui -> cli"
)
DASHBOARD = {"errors", "utils", "config", "runs", "ui"}  # the dashboard may import nothing else
RANK = {name: rank for rank, names in enumerate(RULE.split(" -> ")) for name in names.split(", ")}
PACKAGE = Path("gruppo")
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(path: Path, deferred: bool = True) -> set[str]:
    """Modules that a file imports; `deferred`: including imports inside functions and for type checking."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if deferred else iter(tree.body)
    modules = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {name if name in MODULES else node.module for name in names}
    return modules


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_only_two_modules_are_outside_packages() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "types.py", "errors.py"}
    assert {package(module) for module in MODULES} - {""} == set(RANK)


def test_packages_import_downward_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports(path)
        if package(module) and package(name) and name.startswith("gruppo.") and name in MODULES
        if package(name) != package(module) and RANK[package(name)] >= RANK[package(module)]
    ]
    assert wrong == []


def test_the_dashboard_imports_what_reads_run_folders_only() -> None:
    found = {package(name) for module, path in MODULES.items() if package(module) == "ui" for name in imports(path)
             if name.split(".")[0] == "gruppo"}  # fmt: skip
    assert found - {""} == DASHBOARD  # "": gruppo itself, for its version


def test_there_are_no_import_cycles() -> None:
    graph = {
        module: {name for name in imports(path, deferred=False) if name in MODULES} for module, path in MODULES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_algorithms_import_torch_and_gruppo_only() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "jaxtyping", "gruppo"}, path


def loaded_by(code: str) -> set[str]:
    report = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    "code",
    [
        "import gruppo.cli.main",
        "from gruppo import load_recipe",
        "import gruppo.config.schema",
        "from gruppo import train, export, load_result, Callback",
        "import gruppo.runs, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(gruppo.runs.__path__):\n"
        "    importlib.import_module('gruppo.runs.' + module.name)",
        "import gruppo.ui.app, gruppo.ui.server",
    ],
)
def test_torch_is_not_loaded_by_light_imports(code: str) -> None:
    assert not {"torch", "transformers"} & loaded_by(code)


def test_reward_processes_need_no_torch() -> None:
    modules = "import gruppo.rollout.workers.reward_main, gruppo.rewards.answers, gruppo.rewards.format"
    modules += ", gruppo.rewards.length, gruppo.rollout.environments.worker_main"
    modules += ", gruppo.rollout.environments.guess_number"
    assert not {"torch", "transformers", "sympy"} & loaded_by(modules)
    used = 'from gruppo.rewards.grading.math_verify import same_mathematics; same_mathematics("1", "1")'
    assert not {"torch", "transformers"} & loaded_by(used)


@pytest.mark.parametrize("path", sorted([*Path("benchmarks").rglob("*.py"), *Path("scripts").glob("*.py")]), ids=str)
def test_benchmarks_and_scripts_import_names_that_exist(path: Path) -> None:
    """They run rarely, so a renamed function would go unnoticed."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gruppo":
            if node.module and node.module.startswith(("gruppo.actors", "gruppo.engines.fleet")):
                pytest.importorskip("ray")
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or f"{node.module}.{alias.name}" in MODULES, alias.name


def test_a_result_alone_reaches_the_dashboard() -> None:
    """Its methods `view` and `report` import it by name, when they are called."""
    named = {path.name for path in (PACKAGE / "runs").rglob("*.py") if "gruppo.ui" in path.read_text(encoding="utf-8")}
    assert named == {"results.py"}
