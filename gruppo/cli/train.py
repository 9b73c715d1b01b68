"""`gruppo train`, `check`, `recipes`, `methods` and `schema`: commands for recipes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gruppo import __version__
from gruppo.cli.options import Overrides, RecipeFile, TrustCode, load_chosen_recipe, resumable
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.cluster.ranks import ProcessRanks
    from gruppo.config.recipe import Recipe
    from gruppo.runs.console import ConsoleProgress
    from gruppo.runs.results import Result


def train(
    recipe: RecipeFile,
    set_: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<run.name>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in the folder; start it if there is none.")
    ] = False,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe with every default and its meaning, and exit.")
    ] = False,
    trust: TrustCode = False,
) -> None:
    """Train a model with a recipe.

    Ctrl-C saves the run and stops; a second Ctrl-C stops immediately.
    """
    from gruppo.cluster.torchrun import check_launch, own_rank

    if own_rank():
        if not show:  # rank 0 shows the recipe
            _follow(recipe, set_)
        return
    settings = load_chosen_recipe(recipe, set_, trust or show)
    if show:
        from gruppo.config.schema import annotated

        typer.echo(visible(annotated(settings)), nl=False)
        return
    check_launch(settings)
    folder = out if out is not None else Path("runs") / settings.run.name
    from gruppo.runs.console import ConsoleProgress

    progress = ConsoleProgress()
    with resumable(["train", recipe], set_, folder):
        progress.note(f"gruppo {__version__}: {recipe} -> {folder}")
        from gruppo.training.api import run_recipe

        with _ranks(settings) as ranks:
            result, _ = run_recipe(settings, out=folder, resume=resume, progress=progress, ranks=ranks)
        if result.summary["state"] == "interrupted":
            from gruppo.runs.status import read_status
            from gruppo.utils.signals import Interrupted

            status = read_status(folder)
            step, steps = result.summary["steps"], settings.run.steps if status is None else status.steps
            raise Interrupted(f"Interrupted after step {step} of {steps}; everything is saved. Resume with:")
    _show_result(progress, result)


def _ranks(settings: Recipe) -> AbstractContextManager[ProcessRanks | None]:
    """The ranks that a launcher has started, which this process leads; None if the run is to start them, or has one."""
    from gruppo.cluster.torchrun import is_launched, joined_launched

    if settings.cluster is None or settings.cluster.trainers == 1 or not is_launched():
        return nullcontext()
    return joined_launched(settings)


def _follow(recipe: Path, set_: list[str] | None) -> None:
    """Take part in the run of rank 0, which alone reports what is wrong with the recipe."""
    from gruppo.cluster.torchrun import check_launch, joined_launched
    from gruppo.config.loading import load_recipe
    from gruppo.errors import UsageError

    try:
        settings = load_recipe(recipe, set_ or [])
        check_launch(settings)
    except UsageError:
        raise typer.Exit(2) from None
    with joined_launched(settings) as ranks:
        from gruppo.cluster.follower import follow

        follow(ranks)


def _show_result(progress: ConsoleProgress, result: Result) -> None:
    """Print the summary of a finished run, taken from the run folder alone."""
    from gruppo.runs.report import describe_run

    progress.result(describe_run(result.path, result.summary, result.metrics))


def check(
    recipe: RecipeFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes and seconds.")] = False,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Skip the smoke test: sample no completions, compute no rewards or advantages."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Maximum seconds for sampling in the smoke test, and again for its rewards.")
    ] = 60.0,
    trust: TrustCode = False,
) -> None:
    """Estimate memory, time and disk, and report problems.

    Shows memory by part, time per step and in total. Nothing is trained or written. Exit code 0 without problems, 1
    with problems, 2 if training would refuse the recipe.
    """
    from gruppo.preflight.check import check_recipe, describe_check

    settings = load_chosen_recipe(recipe, set_, trust)
    from gruppo.runs.console import ConsoleProgress

    progress = ConsoleProgress()
    result = check_recipe(settings, quick=quick, seconds=seconds, progress=progress)
    if as_json:
        import json

        typer.echo(json.dumps(result.as_dict()))
    else:
        progress.result(describe_check(result))
    if result.problems:
        raise typer.Exit(1)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe: gruppo recipes NAME > my.toml")] = None,
) -> None:
    """List the recipes that come with gruppo, or print one.

    `gruppo train NAME` runs a recipe of this list.
    """
    import shutil
    import textwrap
    from itertools import zip_longest

    from gruppo.config.packaged import as_copy, described, packaged_recipes
    from gruppo.errors import UsageError, nearest

    known = packaged_recipes()
    if name is None:
        width = max(map(len, known)) + 2
        for each, path in known.items():
            lines = textwrap.wrap(described(path), max(40, shutil.get_terminal_size().columns - width))
            for label, line in zip_longest([each], lines, fillvalue=""):
                typer.echo(f"{label:<{width}}{line}")
    elif name in known:
        typer.echo(as_copy(known[name]), nl=False)
    else:
        raise UsageError(f"recipe {name}: does not come with gruppo{nearest(name, known)}; gruppo recipes lists them")


def methods() -> None:
    """Print the table of methods.

    Each method has an equation, a data source, a reward, an advantage per token, a loss and its default settings.
    """
    from gruppo.config.methods import describe_methods

    typer.echo(describe_methods())


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print docs/recipe.md, every field with its meaning, instead.")
    ] = False,
) -> None:
    """Print the JSON schema of recipes.

    TOML editors use it to complete and validate recipes.
    """
    import json

    from gruppo.config import schema as formats

    if markdown:
        typer.echo(formats.markdown(), nl=False)
    else:
        typer.echo(json.dumps(formats.json_schema(), indent=2, ensure_ascii=False))
