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
from gruppo.runs.console import choose_progress
from gruppo.runs.folder import telling_what_stands
from gruppo.runs.results import Result
from gruppo.training.callbacks import Callback, Callbacks
from gruppo.types import Row
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop, stop_on_signals

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
    progress: bool | Progress = True,
) -> Result:
    """Train a model as a recipe says.

    recipe: a TOML file, a mapping, or a `Recipe`.
    reward: a function, an import path, or several, in place of reward.functions.
    prompts: rows in place of those of the task. Each has a `prompt` (text or messages) and more columns, which reward
        functions get by name. The other fields of [task] apply to them.
    model, tokenizer: a causal language model of transformers in memory, in place of model.name. A copy is trained.
    callbacks: objects with some of the methods of `gruppo.Callback`, or functions f(step, metrics, groups). One that
        returns `gruppo.STOP` ends the run early, with its final model.
    overrides: changes of the recipe, such as "run.steps=50".
    out: the run folder; runs/<name> by default.
    resume: continue the run in the folder, if there is one.
    progress: show progress, steps and warnings on the console; False to be quiet.

    The state of the result's summary is "done", or "stopped" where a callback ended the run. Ctrl-C ends the run at the
    next safe point: everything is saved, then KeyboardInterrupt is raised. SIGTERM does the same with SystemExit. The
    same call with `resume=True` continues.

    Raises UsageError for a mistake in the arguments, recipe or data, before any expensive work; RunError where a run
    cannot go on (`WriteError`, a subclass, for a full disk); and what a callback raises.
    """
    result, stop = run_recipe(
        recipe,
        reward=reward,
        prompts=prompts,
        model=model,
        tokenizer=tokenizer,
        callbacks=callbacks,
        overrides=overrides,
        out=out,
        resume=resume,
        progress=choose_progress(progress),
    )
    if result.summary["state"] == "interrupted":
        stop.raise_for_python()
    return result


def run_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    progress: Progress,
    reward: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
    prompts: Sequence[Row] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[Callback | Callable[..., Any] | object] = (),
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    resume: bool = False,
) -> tuple[Result, Stop]:
    """See `train`. A run that a signal ended comes back with the state "interrupted", and the stop that says which."""
    told, rewards = Callbacks(callbacks), _listed(reward)
    if tokenizer is not None and model is None:
        raise UsageError("tokenizer: is taken with a model in memory only; give model=… too, or leave it out")
    if isinstance(model, str):
        raise UsageError(f'model = "{model}": is a name; write it as model.name in the recipe')
    named = [] if model is None else [f"model.name=in-memory:{type(model).__name__}"]
    settings = _as_given(load_recipe(recipe, [*overrides, *named]), rewards, prompts is not None)
    folder = Path(out) if out is not None else Path("runs") / settings.run.name
    given = settings.reward.functions if rewards is None else rewards
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(telling_what_stands(folder))
        with stop.interruptible():
            data = preflight(settings, folder, resume, given, prompts, progress)
            from gruppo.training.loop import run_training
            from gruppo.training.run import TrainingRun
            from gruppo.training.setup import prepare

            held = None if model is None else (model, tokenizer)
            prepared = prepare(settings, folder, resume, given, data, progress, stack, held)
        summary = TrainingRun(prepared, progress, stop, told).execute(run_training)
        return Result(prepared.run.path, prepared.run.metrics(), summary), stop


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
            each if isinstance(each, str) else f"in-memory:{getattr(each, '__qualname__', type(each).__name__)}"
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
        changes["task"] = recipe.task.model_copy(update={"name": "in-memory:prompts", "options": {}, "split": None})
    return recipe.model_copy(update=changes)
