"""Options shared by several commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gruppo.errors import RunError, UsageError

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a TOML file; examples are in recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Set a field of the recipe; may be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto (the first available of cuda, mps, cpu).")]
Dtype = Annotated[
    str, typer.Option(help="Compute dtype: float32, bfloat16, or auto (bfloat16 if natively supported, else float32).")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model; read them first.")
]


@contextmanager
def resumable(command: Sequence[object], set_: Sequence[str] | None, folder: Path) -> Iterator[None]:
    """Handle SIGINT and SIGTERM in the block. If it is interrupted or the disk is full, print the command to resume."""
    from gruppo.runs.atomic import WriteError
    from gruppo.utils.signals import Interrupted, stop_on_signals

    overrides = [part for override in set_ or [] for part in ("--set", override)]
    again = shlex.join(["gruppo", *map(str, command), *overrides, "--out", str(folder), "--resume"])
    try:
        with stop_on_signals(kills=True):
            yield
    except Interrupted as end:
        message = str(end) or "Interrupted; everything done so far is saved. Resume with:"
        sys.stderr.write(f"{message}\n  {again}\n")
        raise typer.Exit(130) from None
    except WriteError as error:
        raise RunError(f"{error}; free some space and resume with: {again}") from error


def named_option(text: str) -> tuple[str, Any]:
    """Name and value of "name=value". The value is parsed as TOML, else taken as text. Raises UsageError."""
    from gruppo.config.loading import toml_value

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--option {text}: must have the form name=value; write e.g. --option maximum=20")
    return name.strip(), toml_value(value)
