"""The evaluations of a study: what is evaluated where, running it, and reading the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.eval_run import run_evaluation
from gruppo.evaluation.results import RESULTS
from gruppo.runs.eval_metrics import Question, accuracies
from gruppo.study.answer_data import keep_answers, kept_answers, read_questions
from gruppo.study.arms import PlannedRun, Study
from gruppo.study.file import INITIAL, EvaluationSet
from gruppo.study.record_files import MANIFEST
from gruppo.study.states import RunState, folder_state, has_model
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


@dataclass(frozen=True)
class PlannedEvaluation:
    """A model that answers the questions of an evaluation: the result of a run, or the model that its arm starts from.

    `run`: the run, or one of those that start from the model. `record`: the folder of its record.
    """

    table: EvaluationSet
    run: PlannedRun
    recipe: Recipe
    folder: Path
    record: Path
    initial: bool = False

    @property
    def name(self) -> str:
        """Its name in the study."""
        return f"{self.table.title} of {INITIAL if self.initial else self.run.name}"

    @property
    def done(self) -> bool:
        """Whether all answers are there, or a record of them."""
        return (self.folder / RESULTS).is_file() or (self.record / MANIFEST).is_file()

    def perform(self, progress: Progress, stop: Stop) -> None:
        """Evaluate, or go on. Raises UsageError, e.g. if the folder has answers to another evaluation."""
        run_evaluation(self.recipe, self.folder, (self.folder / "recipe.toml").is_file(), progress, stop)

    def questions(self) -> list[Question]:
        """The questions with their answers. Raises UsageError if they cannot be read."""
        return read_questions(self.folder, self.record)

    @property
    def kept(self) -> bool:
        """Whether its record is complete."""
        return kept_answers(self.folder, self.record)[0] is not None

    @property
    def remark(self) -> str:
        """What is wrong with its record, "" if nothing is."""
        try:
            return kept_answers(self.folder, self.record)[1]
        except UsageError as error:
            return str(error)

    def keep(self) -> str:
        """Write the record of what is done. Returns why it replaces another record, "" if it does not."""
        return keep_answers(self.folder, self.record)


def plan_evaluations(study: Study, states: Mapping[str, RunState]) -> list[PlannedEvaluation]:
    """The evaluations that are done, or can be: of every complete run whose model is there, and of the models before
    training, which arms share."""
    planned: dict[Path, PlannedEvaluation] = {}
    for table in study.file.evaluations:
        for run in study.runs:
            initial = initial_evaluation(study, table, run)
            planned.setdefault(initial.folder, initial)
        for run in study.runs:
            if states[run.name].complete:
                final = final_evaluation(study, table, run, states[run.name])
                if final.done or has_model(run, states[run.name]):
                    planned.setdefault(final.folder, final)
    return list(planned.values())


def final_evaluation(study: Study, table: EvaluationSet, run: PlannedRun, state: RunState) -> PlannedEvaluation:
    """The evaluation of the result of a run."""
    recipe = _recipe(table, run.recipe, str((run.folder / "model").resolve()))
    name = _name(table, f"{run.arm.name}-seed-{run.seed}", recipe, state.weights)
    return PlannedEvaluation(table, run, recipe, study.folder / name, study.records / name)


def initial_evaluation(study: Study, table: EvaluationSet, run: PlannedRun) -> PlannedEvaluation:
    """The evaluation of the model before training."""
    recipe = _recipe(table, run.recipe, run.recipe.model.name)
    name = _name(table, INITIAL, recipe, recipe.model.name)
    return PlannedEvaluation(table, run, recipe, study.folder / name, study.records / name, initial=True)


def start_of_training(study: Study, run: PlannedRun, state: RunState) -> RunState | None:
    """The state that the training of a run begins from; None if nothing is to be trained.

    A complete run is trained again if its model is gone and has not answered everything. The first note says so.
    """
    if not state.complete:
        return state
    left = [] if has_model(run, state) else unanswered(study, run, state)
    if not left:
        return None
    found = folder_state(run, study.budget)
    names = ", ".join(table.title for table in left)
    return replace(
        found, notes=[f"its model is gone and has not answered {names}, so it is trained again", *found.notes]
    )


def unanswered(study: Study, run: PlannedRun, state: RunState) -> list[EvaluationSet]:
    """The evaluations that the model of a run has not answered; all if the run is not complete."""
    tables = study.file.evaluations
    return [table for table in tables if not state.complete or not final_evaluation(study, table, run, state).done]


def _name(table: EvaluationSet, name: str, recipe: Recipe, model: str) -> Path:
    """The place of an evaluation in the folders of runs and records. It ends with a hash of the model and of all
    settings, so another model, or other settings, have another place."""
    settings = recipe.model_dump(exclude_defaults=True)
    settings["model"]["name"] = model
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return Path("evaluations", table.title, f"{name}-{digest[:8]}")


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
        "benchmarks": [table.benchmark],
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
