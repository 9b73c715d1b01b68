"""`gruppo.train`: run a recipe. Mistakes that can be detected without torch are reported before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.labels import options_name
from gruppo.config.loading import load_recipe, override_list
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import preflight
from gruppo.rewards import RewardFunction, listed_rewards, recipe_name
from gruppo.runs.console import choose_progress
from gruppo.runs.folder import explaining_write_errors
from gruppo.runs.results import Result
from gruppo.training.callbacks import Callback, Callbacks
from gruppo.types import Row
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop, stop_on_signals
from gruppo.utils.waiting import watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gruppo.models.ranks import Ranks
    from gruppo.training.attempts import Team
    from gruppo.training.setup import Local


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
    """Train a model according to a recipe.

    - `recipe`: a TOML file, a mapping, or a `Recipe`.
    - `reward`: a function, an import path, or several, in place of reward.functions.
    - `prompts`: rows in place of the task's rows. Each row has a `prompt` (text or messages) and optional further
      columns, which reward functions receive by name. The other fields of [task] apply to these rows.
    - `model`, `tokenizer`: a transformers causal language model in memory, in place of model.name. A copy is trained.
    - `callbacks`: objects with one or more methods of `gruppo.Callback`, or functions f(step, metrics, groups).
      Returning `gruppo.STOP` ends the run early; the final model is saved.
    - `overrides`: changes to the recipe, such as "run.steps=50".
    - `out`: the run folder; `runs/NAME` by default, with the name of the recipe.
    - `resume`: continue the run in the folder, if there is one.
    - `progress`: show progress, steps and warnings on the console; False for no output.

    The state of the result's summary is "done", or "stopped" if a callback ended the run. Ctrl-C ends the run at the
    next safe point: everything is saved, then KeyboardInterrupt is raised. SIGTERM does the same with SystemExit. The
    same call with `resume=True` continues.

    Raises UsageError for a mistake in the arguments, recipe or data, before any expensive work; RunError if the run
    cannot continue (`WriteError`, a subclass, for a full disk); and any exception that a callback raises.
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
    if result.summary.get("state") == "interrupted":
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
    local: Local | None = None,
    ranks: Ranks | None = None,
) -> tuple[Result, Stop]:
    """Like `train`, but a run ended by a signal returns the state "interrupted". The `Stop` says which signal.

    `local`: objects that the run uses in this process; `reward` then only names the functions. `ranks`: those that
    train, of which this process is the leader, if something else has started them.
    """
    listeners, rewards = Callbacks(callbacks), listed_rewards(reward)
    if tokenizer is not None and model is None:
        raise UsageError("tokenizer: needs a model passed from Python; pass model=… too, or leave tokenizer out")
    if isinstance(model, str):
        raise UsageError(f'model = "{model}": is a name, not a model; write it as model.name in the recipe')
    model_override = [] if model is None else [f"model.name={IN_MEMORY}{type(model).__name__}"]
    settings = _with_arguments(
        load_recipe(recipe, [*override_list(overrides), *model_override]), rewards, prompts is not None
    )
    folder = Path(out) if out is not None else Path("runs") / settings.run.name
    functions = settings.reward.functions if rewards is None else rewards
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(explaining_write_errors(folder))
        shown, watcher = stack.enter_context(watched(progress))
        with stop.interruptible():
            data = preflight(settings, folder, resume, functions, prompts, shown)
            team = _team(settings, ranks, model, shown, stack)
        from gruppo.training.attempts import Attempt, run_attempts

        in_memory = None if model is None else (model, tokenizer)
        attempt = Attempt(folder, functions, data, shown, watcher, stop, listeners, in_memory, local)
        return run_attempts(attempt, team, resume), stop


def _team(
    recipe: Recipe, ranks: Ranks | None, model: PreTrainedModel | None, progress: Progress, stack: ExitStack
) -> Team:
    """The ranks of a run: those that were given, this process alone, or those that it starts."""
    from gruppo.models.ranks import ALONE
    from gruppo.training.attempts import FixedTeam

    if ranks is not None or recipe.cluster is None or recipe.cluster.trainers == 1:
        return FixedTeam(recipe, ranks or ALONE)
    opening = import_module("gruppo.cluster.opening")  # it builds on this package, so it is imported by name
    started: Team = opening.start_ranks(recipe, model, progress, stack)
    return started


def _with_arguments(recipe: Recipe, rewards: Sequence[str | RewardFunction] | None, rows: bool) -> Recipe:
    """The recipe to store in the run folder. It names the rewards and prompts that were passed from Python."""
    changes: dict[str, Any] = {}
    if rewards is not None:
        names = [*map(recipe_name, rewards)]
        keys = set(map(options_name, names))
        options = {name: value for name, value in recipe.reward.options.items() if name in keys}
        if not recipe.reward.functions:
            options = recipe.reward.options  # options that match no function are reported as a mistake
        changes["reward"] = recipe.reward.model_copy(update={"functions": names, "options": options})
    if rows:
        if recipe.mixture:
            raise UsageError(
                "prompts: rows are passed from Python, but the recipe has a [[mixture]]; use only one of them"
            )
        changes["task"] = recipe.task.model_copy(update={"name": f"{IN_MEMORY}prompts", "options": {}, "split": None})
    return recipe.model_copy(update=changes)
