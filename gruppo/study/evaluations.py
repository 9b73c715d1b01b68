"""The evaluations of a study: what is evaluated where, running it, and reading the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.compare import read_evaluation
from gruppo.evaluation.eval_run import run_evaluation
from gruppo.evaluation.results import RESULTS
from gruppo.runs.eval_metrics import Question, accuracies
from gruppo.study.arms import PlannedRun, Study
from gruppo.study.file import INITIAL, EvaluationSet
from gruppo.study.states import RunState
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


@dataclass(frozen=True)
class PlannedEvaluation:
    """A model that answers the questions of an evaluation: the result of a run, or the model that its arm starts from.

    `run`: the run, or one of those that start from the model.
    """

    table: EvaluationSet
    run: PlannedRun
    recipe: Recipe
    folder: Path
    initial: bool = False

    @property
    def name(self) -> str:
        """Its name in the study."""
        return f"{self.table.title} of {INITIAL if self.initial else self.run.name}"

    @property
    def done(self) -> bool:
        """Whether all answers are there."""
        return (self.folder / RESULTS).is_file()

    def perform(self, progress: Progress, stop: Stop) -> None:
        """Evaluate, or go on. Raises UsageError, e.g. if the folder has answers to another evaluation."""
        run_evaluation(self.recipe, self.folder, (self.folder / "recipe.toml").is_file(), progress, stop)

    def questions(self) -> list[Question]:
        """The questions with their answers. Raises UsageError if they cannot be read."""
        (result,) = read_evaluation(self.folder).sets.values()
        return result.questions


def plan_evaluations(study: Study, states: Mapping[str, RunState]) -> list[PlannedEvaluation]:
    """The evaluations of every complete run, and of the models before training, which arms share."""
    planned: dict[Path, PlannedEvaluation] = {}
    for table in study.file.evaluations:
        for run in study.runs:
            initial = initial_evaluation(study, table, run)
            planned.setdefault(initial.folder, initial)
        for run in study.runs:
            if states[run.name].complete:
                final = final_evaluation(study, table, run, states[run.name])
                planned.setdefault(final.folder, final)
    return list(planned.values())


def final_evaluation(study: Study, table: EvaluationSet, run: PlannedRun, state: RunState) -> PlannedEvaluation:
    """The evaluation of the result of a run."""
    recipe = _recipe(table, run.recipe, str((run.folder / "model").resolve()))
    folder = _folder(study, table, f"{run.arm.name}-seed-{run.seed}", recipe, state.weights)
    return PlannedEvaluation(table, run, recipe, folder)


def initial_evaluation(study: Study, table: EvaluationSet, run: PlannedRun) -> PlannedEvaluation:
    """The evaluation of the model before training."""
    recipe = _recipe(table, run.recipe, run.recipe.model.name)
    folder = _folder(study, table, INITIAL, recipe, recipe.model.name)
    return PlannedEvaluation(table, run, recipe, folder, initial=True)


def _folder(study: Study, table: EvaluationSet, name: str, recipe: Recipe, model: str) -> Path:
    """The folder of an evaluation. Its name ends with a hash of the model and of all settings, so another model, or
    other settings, have another folder."""
    settings = recipe.model_dump(exclude_defaults=True)
    settings["model"]["name"] = model
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return study.folder / "evaluations" / table.title / f"{name}-{digest[:8]}"


def _recipe(table: EvaluationSet, trained: Recipe, model: str) -> Recipe:
    """The recipe that evaluates a model as the run with the recipe `trained` would, with the seed of the evaluation.

    What only training depends on has its default, so that arms that evaluate alike have equal recipes.
    """
    given = trained.as_mapping()
    kept: dict[str, Any] = {name: given[name] for name in ("task", "mixture", "environment", "engine") if name in given}
    device = {name: value for name, value in given["model"].items() if name not in ("name", "lora", "compile")}
    tables: dict[str, Any] = {
        **kept,
        "run": {"name": "evaluation", "seed": table.seed},
        "model": {**device, "name": model},
        "sampling": {"max_tokens": trained.sampling.max_tokens, "stop": list(trained.sampling.stop)},
        "benchmarks": [table.model_dump(exclude={"seed"}, exclude_none=True, exclude_unset=True)],
    }
    try:
        return load_recipe(tables)
    except UsageError as error:
        raise UsageError(f"evaluations: {table.title}: {error}") from error


def values_of(questions: Sequence[Question], kind: str, k: int) -> np.ndarray:
    """A metric, one value per question: the accuracy, pass@k or maj@k."""
    if kind == "accuracy":
        return accuracies(questions)
    return np.array([question.curve(kind)[k - 1] for question in questions])
