"""What can be checked of a run without torch: folder, reward names, data. Seconds matter to whoever mistyped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gruppo.config import Recipe
from gruppo.errors import UsageError
from gruppo.reporting import Reporter
from gruppo.rewards import REWARDS, RewardFunction, check_option_names, reward_path
from gruppo.runlog import check_folder
from gruppo.tasks import Part, load_questions, load_training
from gruppo.tasks.answers import Grader, find_grader, last_number
from gruppo.types import Row


@dataclass(frozen=True)
class Data:
    """The rows of a run, by task: those to train on, and those to evaluate on (several where tasks are mixed)."""

    training: list[Part]
    questions: list[Part]
    grader: Grader | None

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
    reporter: Reporter,
) -> Data:
    """Check folder, reward names and data, and read the data. Raises UsageError."""
    check_folder(folder, recipe, resume)
    return read_data(recipe, rewards, rows, reporter)


def read_data(
    recipe: Recipe, rewards: Sequence[str | RewardFunction], rows: Sequence[Row] | None, reporter: Reporter
) -> Data:
    """Check reward names and data, and read the data. Raises UsageError."""
    if recipe.method.source == "rows" and rewards:
        raise UsageError(f'reward = {rewards[0]!r}: method.source = "rows" scores nothing; leave it out')
    names = [reward_path(each) for each in rewards if isinstance(each, str)]
    check_option_names(rewards, recipe.reward.options)
    data = _read(recipe, rows, reporter)
    if REWARDS["number"] in names:
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
                    '"number" compares with; write a number, or take "exact_match"'
                )


def _read(recipe: Recipe, rows: Sequence[Row] | None, reporter: Reporter) -> Data:
    settings = recipe.evaluation
    grader = find_grader(settings.grader) if settings else None
    own = settings is not None and settings.task is None
    fields = [f"mixture[{place}]" for place in range(len(recipe.mixture))] or ["task"]
    training, questions = [], []
    for task, field in zip(recipe.tasks, fields, strict=True):
        train, held = load_training(task, field, own, reporter, rows, recipe.method.source == "rows")
        training.append(train)
        questions += [] if held is None else [held]
    if settings is not None and settings.task is not None:
        questions = [load_questions(settings.task, "evaluation.task", reporter)]
    return Data(_told_apart(training), _told_apart(questions), grader)


def read_questions(recipe: Recipe, reporter: Reporter) -> list[Part]:
    """What a recipe's evaluation asks: the rows of its own task, or those that its tasks hold out."""
    if recipe.evaluation is not None and recipe.evaluation.task is not None:
        return [load_questions(recipe.evaluation.task, "evaluation.task", reporter)]
    return _read(recipe, None, reporter).questions


def _told_apart(parts: Sequence[Part]) -> list[Part]:
    """The parts with names of their own, so that no two prompts have one id."""
    names = [part.name for part in parts]
    return [
        part if (before := names[:place].count(part.name)) == 0 else replace(part, name=f"{part.name}#{before + 1}")
        for place, part in enumerate(parts)
    ]
