"""Every module of gruppo that is imported anywhere exists, also in tests that only other environments run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("gruppo", "tests", "benchmarks", "scripts", "examples", "studies")


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of all that a file imports from gruppo and from the tests."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def exists(name: str) -> bool:
    """Whether a name is a module, or is bound at the top level of one, or of its `__init__.py`."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    module = path.parent / "__init__.py" if path.parent.is_dir() else path.parent.with_suffix(".py")
    if not module.is_file():
        return False
    text = module.read_text()
    return "__getattr__" in text or path.name in text


def test_what_is_imported_from_gruppo_exists() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 500
    missing = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in files
        for line, name in imported(file)
        if name.split(".")[0] in ("gruppo", "tests") and not exists(name)
    ]
    assert missing == []
