"""Every warning and every kind of event says what to do, or is known to need nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gruppo.runs.warnings import CHECKS
from gruppo.training.changes import KIND
from gruppo.ui.advice import ADVICE, NOTHING_TO_DO, advice_for


def written_kinds() -> set[str]:
    """The kinds of events that the code writes: the constant first arguments of `….event(…)`."""
    kinds = {KIND}
    for path in Path("gruppo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "event":
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant):
                    kinds.add(first.value)
    return kinds


def test_every_kind_of_event_has_advice_or_needs_none() -> None:
    kinds = written_kinds()
    assert {"reward_failed", "memory", "nonfinite", "resume", "changed", "warning"} <= kinds
    assert kinds <= ADVICE.keys() | NOTHING_TO_DO
    assert not ADVICE.keys() & NOTHING_TO_DO


def test_every_warning_has_advice() -> None:
    assert CHECKS.keys() <= ADVICE.keys()


def test_advice_names_fields_that_recipes_have() -> None:
    schema = " ".join(Path("docs/recipe.md").read_text(encoding="utf-8").split())
    sections = ("sampling", "method", "optimizer", "reward", "reward_model", "task", "model", "evaluation")
    for text in ADVICE.values():
        for word in text.replace(",", " ").replace(";", " ").replace(")", " ").replace("(", " ").split():
            section, dot, field = word.rstrip(".:").partition(".")
            if dot and section in sections and field:
                assert f"`{field}`" in schema or f"{section}.{field}" in schema or f"{field} =" in schema, word


@pytest.mark.parametrize(
    ("event", "begins"),
    [
        ({"kind": "warning", "warning": "lengths", "passed": False}, "Longer"),
        ({"kind": "warning", "warning": "lengths", "passed": True}, ""),
        ({"kind": "memory", "warning": ""}, "Nothing"),
        ({"kind": "resume", "warning": ""}, ""),
        ({"kind": "unheard of", "warning": "also"}, ""),
        ({}, ""),
    ],
)
def test_advice_for_an_event(event: dict[str, object], begins: str) -> None:
    found = advice_for(event)
    assert found.startswith(begins)
    assert bool(found) == bool(begins)
