"""`gruppo label` and `reward-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Overrides, RecipeFile, resumable


def label(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder of the labels.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the labels in the folder.")] = False,
) -> None:
    """Sample completions and label them by rule, each step too (Math-Shepherd); [reward_model] says how.

    The labels are Parquet files in OUT/labels, a row a completion.
    """
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.reward_model_api import label as make

    progress = ConsoleProgress()
    with resumable(["label", recipe], set_, out):
        made = make(settings, out=out, resume=resume, progress=progress)
    steps = "" if made.soft is None else f"; {made.steps} steps, right from {made.soft:.1%} of their ends"
    progress.result(f"{made.completions} completions, {made.right:.1%} right{steps}: {made.path / 'labels'}")


def reward_model(
    recipe: RecipeFile,
    labels: Annotated[Path, typer.Argument(help="Folder that gruppo label wrote, or that of a run.")],
    out: Annotated[Path, typer.Option(help="Folder of the result.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in the folder.")] = False,
) -> None:
    """Train the recipe's [reward_model] on labels; the result is in OUT/model, for transformers or for a recipe."""
    from gruppo.config.loading import load_recipe

    settings = load_recipe(recipe, set_ or [])
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.reward_model_api import train_reward_model

    progress = ConsoleProgress()
    with resumable(["reward-model", recipe, labels], set_, out):
        made = train_reward_model(settings, labels, out=out, resume=resume, progress=progress)
    progress.result(f"{made.updates} updates; held-out figures before and after, {made.path / 'model'}:")
    for name in sorted({*made.before, *made.after}):
        pair = ["-" if each is None else f"{each:.3f}" for each in (made.before.get(name), made.after.get(name))]
        progress.result(f"  {name:<18} {pair[0]:>9} -> {pair[1]:>9}")
