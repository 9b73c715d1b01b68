"""Options shared by several commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from gruppo.errors import RunError, UsageError
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.config.recipe import Recipe
    from gruppo.runs.trust import Code

RecipeFile = Annotated[Path, typer.Argument(help="A TOML file, or a name that `gruppo recipes` lists.")]
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
TrustCode = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that a run folder or file from somebody else names; read it first."),
]


class Command(TyperCommand):
    """A command that answers the name of a recipe's field, or of another trainer's option, with its own option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in the base class. Raises UsageError for an unknown option whose meaning is known."""
        given = list(args)  # the base class removes what it has read
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # of click or, in later versions, of typer
                self._answer(str(getattr(error, "option_name", "")), given)
            raise

    def _answer(self, option: str, given: Sequence[str]) -> None:
        from gruppo.config.loading import as_override

        place = next((place for place, text in enumerate(given) if text.partition("=")[0] == option), len(given))
        _, equals, value = given[place].partition("=") if place < len(given) else ("", "", "")
        if not equals and not "".join(given[place + 1 : place + 2]).startswith("--"):
            value = "".join(given[place + 1 : place + 2])
        options = {name for parameter in self.params for name in parameter.opts}
        table = ["evaluation"] if self.name == "eval" else []
        answer = as_override([*table, option.lstrip("-")], value)
        field = re.match(r"write --set '?[\w.]*\.(\w+)=", answer or "")
        own = f"--{field[1].replace('_', '-')}" if field else ""
        if own in options:
            answer = f"write {own} {shlex.quote(value)}".rstrip()
        if answer and (own in options or "--set" in options):
            raise UsageError(f"{option}: no such option; {answer}")


def load_chosen_recipe(file: Path, set_: Sequence[str] | None, trusted: bool) -> Recipe:
    """Load the recipe that the command line names. One that lies in a run folder from somebody else needs consent."""
    from gruppo.config.loading import load_recipe
    from gruppo.config.packaged import recipe_path
    from gruppo.runs.trust import foreign_code

    recipe, folder = load_recipe(file, set_ or []), recipe_path(file).resolve().parent
    if (folder / "environment.json").is_file() and (folder / "recipe.toml").is_file():
        require_consent(file.parent, foreign_code(folder, recipe), trusted)
    return recipe


def require_consent(source: Path, code: Sequence[Code], trusted: bool) -> None:
    """Return if the code that `source` names may run: it is `trusted`, or the user says so on the terminal.

    Raises UsageError otherwise, with the command to write.
    """
    if not code or trusted:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        from gruppo.runs.trust import refusal

        raise refusal(source, code, f"write: {shlex.join(['gruppo', *sys.argv[1:], '--trust'])}")
    lines = [f"{source} names code, and does not come from you on this machine:", *(f"  {item}" for item in code)]
    sys.stderr.writelines(f"{visible(line)}\n" for line in lines)
    if not typer.confirm("It runs with your permissions. Have you read it, and should it run?", err=True):
        raise UsageError(f"{source}: nothing was run")


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
