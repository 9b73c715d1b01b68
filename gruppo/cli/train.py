"""`gruppo train`, `check`, `methods` and `schema`: recipes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gruppo import __version__
from gruppo.cli.options import Overrides, RecipeFile, resumable
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.runs.console import ConsoleProgress
    from gruppo.runs.results import Result


def train(
    recipe: RecipeFile,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. By default runs/<name of the recipe>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the folder; start it where there is none.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe with every default and its meaning; train nothing.")
    ] = False,
) -> None:
    """Train a model as a recipe says.

    Ctrl-C saves and stops; a second Ctrl-C stops at once.
    """
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    if show:
        from gruppo.config.schema import annotated

        typer.echo(visible(annotated(settings)), nl=False)
        return
    folder = out if out is not None else Path("runs") / settings.run.name
    from gruppo.runs.console import ConsoleProgress

    progress = ConsoleProgress()
    progress.note(f"gruppo {__version__}: {recipe} -> {folder}")
    from gruppo.training.api import run_recipe

    with resumable(["train", recipe], set_, folder):
        result, _ = run_recipe(settings, out=folder, resume=resume, progress=progress)
        if result.summary["state"] == "interrupted":
            from gruppo.utils.signals import Interrupted

            step, steps = result.summary["steps"], settings.run.steps
            raise Interrupted(f"Interrupted after step {step} of {steps}; everything is saved. Go on with:")
    _show_result(progress, result)


def _show_result(progress: ConsoleProgress, result: Result) -> None:
    """The summary that ends a run, from the run folder alone."""
    from gruppo.runs.report import describe_run

    progress.result(describe_run(result.path, result.summary, result.metrics))


def check(
    recipe: RecipeFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, in bytes and seconds.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Sample nothing: no completions, rewards or signals.")] = False,
    seconds: Annotated[
        float, typer.Option(help="Most seconds for sampling a trial, and as many for its rewards.")
    ] = 60.0,
) -> None:
    """Say what a recipe will take (memory by part, time a step and in all), and what is wrong with it.

    Nothing is trained or written. Exit code 0 without a problem, 1 with one, 2 for what training refuses.
    """
    from gruppo.config.loading import load_recipe
    from gruppo.preflight.check import check_recipe, describe_check

    settings = load_recipe(recipe, set_ or [])
    from gruppo.runs.console import ConsoleProgress

    progress = ConsoleProgress()
    found = check_recipe(settings, quick=quick, seconds=seconds, progress=progress)
    if as_json:
        import json

        typer.echo(json.dumps(found.as_dict()))
    else:
        progress.result(describe_check(found))
    if found.problems:
        raise typer.Exit(1)


def methods() -> None:
    """Print the table of methods: data source, reward, signal on a token, loss, equation."""
    from gruppo.config.methods import describe_methods

    typer.echo(describe_methods())


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/recipe.md instead: every field with its meaning.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes, by which TOML editors complete and check them."""
    import json

    from gruppo.config import schema as described

    if markdown:
        typer.echo(described.markdown(), nl=False)
    else:
        typer.echo(json.dumps(described.json_schema(), indent=2, ensure_ascii=False))
