"""The training and evaluation rows of a recipe, with a grader for each evaluation set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Evaluation
from gruppo.data.benchmark_table import default_grader, domain
from gruppo.data.loading import Dataset, load_questions, load_training
from gruppo.errors import UsageError
from gruppo.rewards import REWARDS, RewardFunction, check_option_names, reward_path
from gruppo.rewards.grading.graders import Named, find_grader
from gruppo.rewards.grading.last_number import last_number
from gruppo.runs.folder import check_folder
from gruppo.types import Row
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class EvalSetRows:
    """The rows of an exam: of the run's [evaluation], whose `name` is "", or of one of its [[benchmarks]]. `parts`:
    several where the held-out rows of mixed tasks are asked. `graders`: by the names of the parts. `domain`:
    "in-domain" where the recipe trains on questions of its kind."""

    name: str
    settings: Evaluation
    parts: list[Dataset]
    graders: dict[str, Named]
    domain: str | None


@dataclass(frozen=True)
class Data:
    """The rows of a run: those to train on, by task, and those of its exams."""

    training: list[Dataset]
    exams: list[EvalSetRows]

    @property
    def columns(self) -> list[str]:
        """Those that every training row has, besides the prompt: what rewards are offered."""
        return sorted(set.intersection(*(set(row) for part in self.training for row in part.rows)) - {"prompt"})


def preflight(
    recipe: Recipe,
    folder: Path,
    resume: bool,
    rewards: Sequence[str | RewardFunction],
    rows: Sequence[Row] | None,
    progress: Progress,
) -> Data:
    """Check folder, reward names and data, and read the data. Raises UsageError."""
    check_folder(folder, recipe, resume)
    return read_data(recipe, rewards, rows, progress)


def read_data(
    recipe: Recipe, rewards: Sequence[str | RewardFunction], rows: Sequence[Row] | None, progress: Progress
) -> Data:
    """Check reward names and data, and read the data. Raises UsageError."""
    if recipe.method.source == "dataset" and rewards:
        raise UsageError(f'reward = {rewards[0]!r}: method.source = "dataset" scores nothing; leave it out')
    names = [reward_path(each) for each in rewards if isinstance(each, str)]
    check_option_names(rewards, recipe.reward.options)
    data = _read(recipe, rows, progress)
    if REWARDS["last_number"] in names:
        _require_numbers(data)
    if REWARDS["reasoning_gym"] in names and not any(
        {"dataset", "parameters"} <= set(part.rows[0]) for part in data.training
    ):
        raise UsageError(
            'reward.functions = ["reasoning_gym"]: scores rows of reasoning-gym only, and no task is one; write e.g. '
            'task.name = "reasoning-gym/leg_counting", or another reward'
        )
    return data


def _require_numbers(data: Data) -> None:
    for part in data.training:
        for number, row in zip(part.numbers, part.rows, strict=True):
            if "answer" in row and last_number(str(row["answer"])) is None:
                raise UsageError(
                    f"{part.name}, row {number + 1}: answer = {row['answer']!r} holds no number, which the reward "
                    '"last_number" compares with; write a number, or take "exact_match"'
                )


def _read(recipe: Recipe, rows: Sequence[Row] | None, progress: Progress) -> Data:
    settings = recipe.evaluation
    own = settings is not None and settings.task is None
    fields = [f"mixture[{place}]" for place in range(len(recipe.mixture))] or ["task"]
    training, held_out = [], []
    for task, field in zip(recipe.tasks, fields, strict=True):
        train, held = load_training(task, field, own, progress, rows, recipe.method.source == "dataset")
        training.append(train)
        held_out += [] if held is None else [held]
    exams = []
    if settings is not None and own:
        parts = _told_apart(held_out)
        names = [task.name if rows is None else "" for task in recipe.tasks]
        graders = {part.name: _grader(settings, name) for part, name in zip(parts, names, strict=True)}
        exams = [EvalSetRows("", settings, parts, graders, "in-domain")]
    return Data(_told_apart(training), exams + _own_exams(recipe, progress))


def read_eval_sets(recipe: Recipe, progress: Progress) -> list[EvalSetRows]:
    """The exams of a recipe; its training rows are read only where they hold out what is asked. Raises UsageError."""
    if recipe.evaluation is not None and recipe.evaluation.task is None:
        return _read(recipe, None, progress).exams
    return _own_exams(recipe, progress)


def _own_exams(recipe: Recipe, progress: Progress) -> list[EvalSetRows]:
    """Exams that name their tasks."""
    named = bool("task" in recipe.model_fields_set or recipe.mixture or recipe.reward.functions)
    trained = [task.name for task in recipe.tasks] if named else None  # an evaluation alone trains on nothing
    asked = [("", "evaluation.task", recipe.evaluation)] if recipe.evaluation and recipe.evaluation.task else []
    asked += [(each.title, f"benchmarks[{place}].task", each) for place, each in enumerate(recipe.benchmarks)]
    exams = []
    for name, field, settings in asked:
        assert settings.task is not None
        part = load_questions(settings.task, field, progress)
        grader = _grader(settings, settings.task.name)
        place = None if trained is None else domain(settings.task.name, trained)
        exams.append(EvalSetRows(name, settings, [part], {part.name: grader}, place))
    return exams


def _grader(settings: Evaluation, task: str) -> Named:
    """The grader of a task's answers. Raises UsageError for an unknown one."""
    name = settings.grader or default_grader(task)
    return Named(name, find_grader(name))


def _told_apart(parts: Sequence[Dataset]) -> list[Dataset]:
    """The parts with names of their own, so that no two prompts have one id."""
    names = [part.name for part in parts]
    return [
        part if (before := names[:place].count(part.name)) == 0 else replace(part, name=f"{part.name}#{before + 1}")
        for place, part in enumerate(parts)
    ]
