"""`gruppo.train`: from a recipe to a run. Mistakes that need no torch to be seen are told before it is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import preflight
from gruppo.rewards import RewardFunction
from gruppo.runs.folder import telling_what_stands
from gruppo.runs.results import Result
from gruppo.training.callbacks import Callback, Callbacks
from gruppo.types import Row
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.signals import stop_on_signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    reward: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
    prompts: Sequence[Row] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback | Callable[..., Any] | object] = (),
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run a recipe, from a file, a mapping or a Recipe.

    `reward`: a function, an import path or several, in place of the recipe's. `prompts`: rows with a `prompt` (text
    or messages) and more columns, in place of the rows of the recipe's task; the other fields of [task] hold for them
    too. `model`: a causal language model of transformers with its `tokenizer`, in place of the recipe's model.name; a
    copy is trained, the model itself is left as it is. `callbacks`: objects with some of the methods of
    gruppo.Callback, or functions f(step, metrics, groups). `overrides`: "section.field=value". `out`: the run folder,
    by default runs/<name>. `resume`: go on with the run that the folder holds, if it holds one.

    A callback that returns gruppo.STOP ends the run early, with its result; summary["state"] is then "stopped". The
    first SIGINT or SIGTERM ends it at the next safe point with a checkpoint; summary["state"] is then "interrupted". A
    second one raises KeyboardInterrupt.
    Raises UsageError for what the caller can mend, RunError where a run could not go on (WriteError, a kind of it, on a
    full disk), gruppo.utils.signals.Interrupted where a signal came before the run had begun, and what a callback
    raises.
    """
    told, rewards = Callbacks(callbacks), _listed(reward)
    if tokenizer is not None and model is None:
        raise UsageError("tokenizer: is taken with a model in memory only; give model=… too, or leave it out")
    if isinstance(model, str):
        raise UsageError(f'model = "{model}": is a name; write it as model.name in the recipe')
    named = [] if model is None else [f"model.name=given:{type(model).__name__}"]
    settings = _as_given(load_recipe(recipe, [*overrides, *named]), rewards, prompts is not None)
    folder = Path(out) if out is not None else Path("runs") / settings.run.name
    given = settings.reward.functions if rewards is None else rewards
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(telling_what_stands(folder))
        shown = progress or NullProgress()
        with stop.interruptible():
            data = preflight(settings, folder, resume, given, prompts, shown)
            from gruppo.training.loop import run_training
            from gruppo.training.run import TrainingRun
            from gruppo.training.setup import prepare

            held = None if model is None else (model, tokenizer)
            prepared = prepare(settings, folder, resume, given, data, shown, stack, held)
        summary = TrainingRun(prepared, shown, stop, told).execute(run_training)
        return Result(prepared.run.path, prepared.run.metrics(), summary)


def _listed(reward: str | RewardFunction | Sequence[str | RewardFunction] | None) -> list[str | RewardFunction] | None:
    if reward is None:
        return None
    if isinstance(reward, str) or callable(reward):
        return [reward]
    return list(reward)


def _as_given(recipe: Recipe, rewards: Sequence[str | RewardFunction] | None, rows: bool) -> Recipe:
    """The recipe as the run folder should tell it: rewards and questions that were given in place of its own."""
    changes: dict[str, Any] = {}
    if rewards is not None:
        names = [
            each if isinstance(each, str) else f"given:{getattr(each, '__qualname__', type(each).__name__)}"
            for each in rewards
        ]
        options = {name: held for name, held in recipe.reward.options.items() if name in names}
        if not recipe.reward.functions:
            options = recipe.reward.options  # whatever fits no function given is a mistake
        others = {"functions": names, "options": options}
        changes["reward"] = recipe.reward.model_copy(update=others)
    if rows:
        if recipe.mixture:
            raise UsageError("prompts: rows are given, and the recipe has a [[mixture]]; take one of them")
        changes["task"] = recipe.task.model_copy(update={"name": "given:prompts", "options": {}, "split": None})
    return recipe.model_copy(update=changes)
