"""`gruppo convert`: a recipe from the arguments of TRL, verl or OpenRLHF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Command
from gruppo.errors import UsageError


class Arguments(Command):
    """A command whose arguments may be the options of another program."""

    ignore_unknown_options = True


def convert(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE|ARGUMENTS...",
            help="A YAML file or a shell script, possibly followed by overrides; or a command line, after --.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write the recipe to. Default: the terminal.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            metavar="TRAINER",
            help="trl-grpo, trl-rloo, trl-dpo, trl-sft, trl-reward, verl or openrlhf. Default: guessed from the names.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes that train, by which TRL's batch per device is multiplied.")
    ] = None,
) -> None:
    """Convert the arguments of TRL, verl or OpenRLHF to a recipe.

    Comments in the recipe say where each line comes from, what has no equivalent, and what to fill in. Scripts are
    read, not run.
    """
    from gruppo.conversion.convert import convert as converted

    if out is not None and out.exists():
        raise UsageError(f"--out {out}: exists already; give the name of a new file")
    result = converted(arguments, source, processes)
    if out is None:
        typer.echo(result.recipe, nl=False)
    else:
        try:
            with out.open("x", encoding="utf-8") as stream:
                stream.write(result.recipe)
        except OSError as error:
            raise UsageError(f"--out {out}: cannot be written ({error}); give another file") from None
    typer.echo(result.summary, err=True)
    if out is not None:
        typer.echo(f"wrote {out}", err=True)
