"""Messages name options as on the command line, and every one of them is worded for Python too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import typer

from gruppo.cli.main import app
from gruppo.errors import _FLAGS, worded

OPTION = re.compile(r"(?<![\w-])--[a-z]")
# Texts for a terminal, which show commands to type.
SHOWN = {"runs/report.py", "training/reproduce.py: and X more; --json has all"}


def texts(path: Path) -> Iterator[str]:
    """Every text in a file of the package except docstrings, with X in place of each value."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | alone:
            yield node.value


def messages() -> list[str]:
    """Every message outside gruppo/cli that mentions an option. Options of other programs stand alone in their text."""
    found = []
    for path in sorted(Path("gruppo").rglob("*.py")):
        place = path.relative_to("gruppo").as_posix()
        for text in () if place.startswith("cli/") or place in SHOWN or place == "errors.py" else texts(path):
            if OPTION.search(text) and " " in text and f"{place}: {text.strip()}" not in SHOWN:
                found.append(text)
    return found


def test_every_message_is_worded_for_python() -> None:
    found = messages()
    assert len(found) > 40
    for text in found:
        assert not OPTION.search(re.sub(r"`[^`]*`", "", worded(text))), text


def test_every_option_in_a_message_exists() -> None:
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    options = {name: option for command in commands for option in command.params for name in option.opts}
    assert {f"--{flag}" for flag in _FLAGS} <= options.keys()
    for text in messages():
        for name in re.findall(r"(?<![\w-])--[a-z-]+", re.sub(r"`[^`]*`", "", text)):
            assert name in options, text
            is_flag = getattr(options[name], "is_flag", False)
            assert is_flag == (name[2:] in _FLAGS), f"{name} is an option with{'out' if is_flag else ''} a value"
