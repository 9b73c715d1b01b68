"""No file and no class of the package is too long to read."""

from __future__ import annotations

import ast
from pathlib import Path

FILES = {path: path.read_text(encoding="utf-8") for path in sorted(Path("gruppo").rglob("*.py"))}


def test_no_file_over_500_lines() -> None:
    assert {str(path) for path, text in FILES.items() if len(text.splitlines()) > 500} == set()


def test_no_class_over_250_lines() -> None:
    classes = {
        node.name: int(node.end_lineno or 0) - node.lineno + 1
        for text in FILES.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    }
    assert {name for name, lines in classes.items() if lines > 250} == set()


def test_the_loop_fits_on_a_screen() -> None:
    assert len(FILES[Path("gruppo/training/loop.py")].splitlines()) <= 100
