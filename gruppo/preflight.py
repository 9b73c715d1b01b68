"""What can be checked of a run without torch: folder, reward names, data. Seconds matter to whoever mistyped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gruppo.config import Recipe
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction, check_option_names, reward_path
from gruppo.runlog import check_folder
from gruppo.tasks import Split, checked_rows, load_rows
from gruppo.tasks.answers import Grader, find_grader, last_number
from gruppo.types import Row


@dataclass(frozen=True)
class Data:
    """The rows of a run. `rows_name`, `questions_name`: what errors and ids call them."""

    rows: list[Row]
    rows_name: str
    questions: list[Row]
    questions_name: str
    grader: Grader | None

    @property
    def columns(self) -> list[str]:
        """Those that every training row has, besides the prompt: what rewards are offered."""
        return sorted(set.intersection(*(set(row) for row in self.rows)) - {"prompt"})


def preflight(
    recipe: Recipe, folder: Path, resume: bool, rewards: Sequence[str | RewardFunction], rows: Sequence[Row] | None
) -> Data:
    """Check folder, reward names and data, and read the data. Raises UsageError."""
    check_folder(folder, recipe, resume)
    names = [reward_path(each) for each in rewards if isinstance(each, str)]
    check_option_names(rewards, recipe.reward.options)
    data = _read(recipe, rows)
    if "gruppo.rewards.rules:number" in names:
        for number, row in enumerate(data.rows, start=1):
            if "answer" in row and last_number(str(row["answer"])) is None:
                raise UsageError(
                    f"{data.rows_name}, row {number}: answer = {row['answer']!r} holds no number, which the reward "
                    '"number" compares with; write a number, or take "exact_match"'
                )
    return data


def _read(recipe: Recipe, rows: Sequence[Row] | None) -> Data:
    if rows is None:
        train_rows, name = load_rows(recipe.task.name, "train", recipe.task.options), recipe.task.name
    else:
        train_rows, name = checked_rows(rows, "prompts"), "prompts"
    settings = recipe.evaluation
    if settings is None:
        return Data(train_rows, name, [], "", None)
    grader = find_grader(settings.grader)
    if settings.task is not None:
        held = settings.task.name
        split: Split = "train" if held.endswith(".jsonl") else "test"
        questions = load_rows(held, split, settings.task.options, "evaluation.task.name", "evaluation.task.options")
        return Data(train_rows, name, questions[: settings.questions], held, grader)
    if rows is not None:
        raise UsageError("evaluation.task: missing; prompts given as rows have no held-out part: name a task or file")
    questions = load_rows(recipe.task.name, "test", recipe.task.options)
    return Data(train_rows, name, questions[: settings.questions], f"{name} (held out)", grader)
