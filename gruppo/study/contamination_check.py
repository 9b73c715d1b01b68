"""The contamination check of a study: its evaluations against what its arms train on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.evaluation.datasets import read_data, read_eval_sets
from gruppo.study.arms import Study
from gruppo.study.contamination import overlap, texts_of
from gruppo.study.evaluations import evaluation_recipe
from gruppo.study.file import Arm, EvaluationSet
from gruppo.study.record_files import read_facts, write_facts
from gruppo.utils.progress import Progress

FILE = "contamination.json"


def check_contamination(study: Study, progress: Progress) -> None:
    """Compare the questions of every evaluation with the training questions of every arm and of its start, and
    write FILE.

    What was compared before with the same tables is kept. Raises UsageError if rows cannot be read.
    """
    path = study.records / FILE
    known, found = read_facts(path), {}
    training: dict[str, list[str]] = {}
    for table in study.file.evaluations:
        for arm in study.file.arms:
            recipe, sources = _compared(study, table, arm)
            key = _key(recipe, *sources.values())
            if key not in known and key not in found:
                for source, trained in sources.items():
                    if source not in training:
                        data = read_data(trained, trained.reward.functions, None, progress)
                        training[source] = texts_of(data.training)
                (rows,) = read_eval_sets(recipe, progress)
                questions = texts_of(rows.parts)[: table.questions]
                found[key] = overlap(questions, [text for source in sources for text in training[source]]).as_dict()
            known.setdefault(key, found.get(key))
    if found:
        write_facts(path, known)


def contamination_of(study: Study) -> list[dict[str, Any]]:
    """What was found, one entry per evaluation and kind of training data: `evaluation`, `arms`, and `found`, which is
    None if it is not checked yet."""
    path = study.records / FILE
    known, entries = read_facts(path), []
    for table in study.file.evaluations:
        by_key: dict[str, list[str]] = {}
        for arm in study.file.arms:
            recipe, sources = _compared(study, table, arm)
            by_key.setdefault(_key(recipe, *sources.values()), []).append(arm.name)
        entries += [{"evaluation": table.title, "arms": arms, "found": known.get(key)} for key, arms in by_key.items()]
    return entries


def _compared(study: Study, table: EvaluationSet, arm: Arm) -> tuple[Recipe, dict[str, Recipe]]:
    """The recipe of an evaluation, and those that the models of an arm are trained with, also by its starts: one for
    each source of training questions."""
    run = study.runs_of(arm.name)[0]
    recipe = evaluation_recipe(table, run.recipe, run.recipe.model.name)
    return recipe, {_key(one.recipe): one.recipe for one in run.lineage}


def _key(*recipes: Recipe) -> str:
    """A hash of where the rows of recipes come from."""
    tables = [
        [task.model_dump(exclude_defaults=True) for task in recipe.tasks]
        + [entry.model_dump(exclude_defaults=True) for entry in recipe.benchmarks]
        for recipe in recipes
    ]
    return hashlib.sha256(json.dumps(tables, sort_keys=True, default=str).encode()).hexdigest()[:16]
