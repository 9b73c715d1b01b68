"""`gruppo label` and `reward-model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gruppo.cli.options import Overrides, RecipeFile, TrustCode, load_chosen_recipe, resumable


def label(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="Folder to write the labels to.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the labeling in the folder.")] = False,
    trust: TrustCode = False,
) -> None:
    """Sample completions and label them by rule.

    [reward_model] has the settings; with kind = "process" every step is labeled too (Math-Shepherd). The labels are
    Parquet files in OUT/labels, one row per completion.
    """
    settings = load_chosen_recipe(recipe, set_, trust)
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.reward_model_api import label as label_completions

    progress = ConsoleProgress()
    with resumable(["label", recipe], set_, out):
        labels = label_completions(settings, out=out, resume=resume, progress=progress)
    steps = "" if labels.soft is None else f"; {labels.steps} steps, mean soft label {labels.soft:.1%}"
    progress.result(f"{labels.completions} completions, {labels.right:.1%} correct{steps}: {labels.path / 'labels'}")


def reward_model(
    recipe: RecipeFile,
    labels: Annotated[Path, typer.Argument(help="A folder written by gruppo label, or a run folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write the reward model to.")],
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the training in the folder.")] = False,
    trust: TrustCode = False,
) -> None:
    """Train the recipe's [reward_model] on labels.

    OUT/model can be loaded by transformers, or named in a recipe (reward_model.name).
    """
    settings = load_chosen_recipe(recipe, set_, trust)
    from gruppo.runs.console import ConsoleProgress
    from gruppo.training.reward_model_api import train_reward_model

    progress = ConsoleProgress()
    with resumable(["reward-model", recipe, labels], set_, out):
        trained = train_reward_model(settings, labels, out=out, resume=resume, progress=progress)
    progress.result(f"{trained.updates} updates, saved to {trained.path / 'model'}. Held-out metrics before and after:")
    for name in sorted({*trained.before, *trained.after}):
        values = trained.before.get(name), trained.after.get(name)
        before, after = ("-" if value is None else f"{value:.3f}" for value in values)
        progress.result(f"  {name:<18} {before:>9} -> {after:>9}")
