"""The evaluations of a study: what is evaluated where, running it, and reading the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
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
from gruppo.study.file import BEFORE, INITIAL, Arm, EvaluationSet
from gruppo.study.record_files import MANIFEST
from gruppo.study.states import RunState, has_model
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop


@dataclass(frozen=True)
class PlannedEvaluation:
    """A model that answers the questions of an evaluation: the result of a run, or a model that no run has trained.

    `run`: the run, or one of those that begin with the model. `like`: the run with whose settings the model is
    evaluated. `record`: the folder of its record.
    """

    table: EvaluationSet
    run: PlannedRun
    like: PlannedRun
    recipe: Recipe
    folder: Path
    record: Path
    initial: bool = False

    @property
    def name(self) -> str:
        """Its name in the study."""
        end = "" if self.like.arm is self.run.arm else f" with the settings of {self.like.arm.name}"
        return f"{self.table.title} of {INITIAL if self.initial else self.run.name}{end}"

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
            if run.start is None:
                initial = untrained_evaluation(study, table, run)
                planned.setdefault(initial.folder, initial)
    for run in study.runs:
        if (state := states[run.name]).complete:
            for trained in evaluations_of(study, run, state):
                if trained.done or has_model(run, state):
                    planned.setdefault(trained.folder, trained)
    return list(planned.values())


def evaluations_of(study: Study, run: PlannedRun, state: RunState) -> list[PlannedEvaluation]:
    """The evaluations of the result of a run: its own, and those of the runs that begin with it, with their
    settings."""
    planned = [
        _trained_evaluation(study, table, run, state, one)
        for table in study.file.evaluations
        for one in (run, *study.begun_with(run))
    ]
    return list({one.folder: one for one in planned}.values())


def final_evaluation(study: Study, table: EvaluationSet, run: PlannedRun, state: RunState) -> PlannedEvaluation:
    """The evaluation of the result of a run."""
    return _trained_evaluation(study, table, run, state, run)


def initial_evaluation(
    study: Study, table: EvaluationSet, run: PlannedRun, states: Mapping[str, RunState]
) -> PlannedEvaluation:
    """The evaluation of the model that a run begins with, as the run evaluates."""
    if run.start is None:
        return untrained_evaluation(study, table, run)
    return _trained_evaluation(study, table, run.start, states[run.start.name], run)


def untrained_evaluation(study: Study, table: EvaluationSet, run: PlannedRun) -> PlannedEvaluation:
    """The evaluation of the model that the recipe of a run names."""
    recipe = evaluation_recipe(table, run.recipe, run.recipe.model.name)
    name = _name(table, INITIAL, recipe, recipe.model.name)
    return PlannedEvaluation(table, run, run, recipe, study.folder / name, study.records / name, initial=True)


def untrained_models(study: Study, table: EvaluationSet, arms: Collection[str]) -> list[tuple[str, str]]:
    """The models that the recipes of these arms name, as the arms evaluate them: an arm of each, and what it is for
    readers. Arms with equal settings share one."""
    found: dict[Path, Arm] = {}
    for run in study.runs:
        if run.start is None and run.arm.name in arms:
            found.setdefault(untrained_evaluation(study, table, run).folder, run.arm)
    return [(arm.name, BEFORE if len(found) == 1 else f"{BEFORE} ({arm.title})") for arm in found.values()]


def _trained_evaluation(
    study: Study, table: EvaluationSet, run: PlannedRun, state: RunState, like: PlannedRun
) -> PlannedEvaluation:
    """The evaluation of the result of a run with the settings of another."""
    recipe = evaluation_recipe(table, like.recipe, str(run.model.resolve()))
    name = _name(table, f"{run.arm.name}-seed-{run.seed}", recipe, state.weights)
    return PlannedEvaluation(table, run, like, recipe, study.folder / name, study.records / name)


def _name(table: EvaluationSet, name: str, recipe: Recipe, model: str) -> Path:
    """The place of an evaluation in the folders of runs and records. It ends with a hash of the model and of all
    settings, so another model, or other settings, have another place."""
    settings = recipe.model_dump(exclude_defaults=True)
    settings["model"]["name"] = model
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return Path("evaluations", table.title, f"{name}-{digest[:8]}")


def evaluation_recipe(table: EvaluationSet, trained: Recipe, model: str) -> Recipe:
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
