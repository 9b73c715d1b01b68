"""The import rule of the design: downward only, and the heavy libraries only where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

# Rooms from the bottom up; a module imports from its own level or below.
LEVELS = [
    ["errors", "findings", "userpath"],
    ["types", "methods", "config", "schema", "reporting", "imports", "interruption", "callbacks", "hub"],
    ["disk", "machine"],
    ["kernels"],
    ["maths", "stats", "tasks", "opening", "runlog", "results", "watch", "figures"],
    ["attention", "body", "models", "adapters", "tools"],
    ["engines", "rewards", "packing", "checkpoint", "tables", "preflight", "steps"],
    ["sizes", "nonfinite", "host", "environments", "dialogue"],
    ["episodes"],
    ["rollout", "objective", "heads", "critic", "updates", "reward_model", "labels", "judge", "audit", "recorded"],
    ["evaluation", "forecast"],
    ["disk_forecast", "submissions"],
    ["preparation"],
    ["loop"],
    ["inspection", "derivative"],
    ["trial"],
    ["entry", "check", "exporting", "labelling", "replaying", "measuring"],
    ["summary"],
    ["console"],
    ["asking"],
    ["cli"],
]
RANK = {room: rank for rank, rooms in enumerate(LEVELS) for room in rooms}
PACKAGE = Path("gruppo")


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_place() -> None:
    assert {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"} == set(RANK)


def test_imports_go_downward_only() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if room(path) == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "gruppo" and len(parts) > 1 and parts[1] in RANK and RANK[parts[1]] > RANK[room(path)]:
                wrong.append(f"{path} imports {name}")
    assert wrong == []


def test_maths_imports_torch_jaxtyping_and_kernels_only() -> None:
    for path in (PACKAGE / "maths").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "jaxtyping", "gruppo"}
        own = tuple(name for name in imports(path) if name.startswith("gruppo"))
        assert all(name.startswith(("gruppo.maths", "gruppo.kernels")) for name in own)


def loaded_by(code: str) -> set[str]:
    report = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.split()
    )


def test_help_and_recipes_need_no_torch() -> None:
    assert not {"torch", "transformers", "numpy"} & loaded_by("import gruppo.cli")
    assert not {"torch", "transformers", "numpy"} & loaded_by("from gruppo import load_recipe")
    assert not {"torch", "transformers", "numpy"} & loaded_by("import gruppo.schema")
    assert not {"torch", "transformers"} & loaded_by("from gruppo import train, export, load_result, Callback")


def test_reward_processes_need_no_torch() -> None:
    rooms = "import gruppo.rewards.worker, gruppo.rewards.rules, gruppo.rewards.formats, gruppo.rewards.lengths"
    rooms += ", gruppo.host, gruppo.tools.guess"
    assert not {"torch", "transformers", "sympy"} & loaded_by(rooms)
    used = 'from gruppo.tasks.answers import same_mathematics; same_mathematics("1", "1")'
    assert not {"torch", "transformers"} & loaded_by(used)
