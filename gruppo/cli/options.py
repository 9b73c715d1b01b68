"""Options that several commands share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gruppo.errors import RunError, UsageError

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a TOML file; see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a field of the recipe; may be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: cuda, then mps, then cpu.")]
Dtype = Annotated[str, typer.Option(help="Precision of products: float32, bfloat16, or auto: bfloat16 where quick.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python files that come with the model; read them first.")
]


@contextmanager
def resumable(command: Sequence[object], set_: Sequence[str] | None, folder: Path) -> Iterator[None]:
    """Signals are heeded in the block, and an end before its time says by which command to go on."""
    from gruppo.runs.atomic import WriteError
    from gruppo.utils.signals import Interrupted, stop_on_signals

    changes = [part for each in set_ or [] for part in ("--set", each)]
    again = shlex.join(["gruppo", *map(str, command), *changes, "--out", str(folder), "--resume"])
    try:
        with stop_on_signals(kills=True):
            yield
    except Interrupted as end:
        begun = str(end) or "Interrupted; what was done before is saved. Go on with:"
        sys.stderr.write(f"{begun}\n  {again}\n")
        raise typer.Exit(130) from None
    except WriteError as error:
        raise RunError(f"{error}; make room, and go on with: {again}") from error


def named_option(text: str) -> tuple[str, Any]:
    """The name and value of "name=value", read as TOML."""
    from gruppo.config.loading import toml_value

    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--option {text}: not of the form name=value; write e.g. --option maximum=20")
    return name.strip(), toml_value(value)
