"""Verification of an exported folder: it is evaluated on the run's own evaluation set.

Merging adapters, casting to bfloat16 and writing files can change what a model answers. The exported folder answers
the questions that the run's evaluation asked after the same step, with the same random numbers, and the two are
compared, paired by question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.results import NEEDED_COLUMNS
from gruppo.evaluation.runner import evaluate_recipe
from gruppo.runs.eval_metrics import accuracies, compare, questions_of
from gruppo.runs.reading import read_table
from gruppo.runs.trust import Code, evaluation_code, refusal
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.progress import Progress

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Verification:
    """An exported folder against the run, on the run's own evaluation set.

    `recorded`, `measured`: accuracy of the run after the step, and of the folder. `difference`: measured - recorded,
    with its 95% `interval`, paired by question. `smallest`: the smallest difference that this many `questions` can
    show. `answers`: their number; `changed`: how many of them have another text. `by`: what answered, if it was not the
    engine of the run.
    """

    recorded: float
    measured: float
    difference: float
    interval: tuple[float, float]
    smallest: float
    questions: int
    answers: int
    changed: int
    by: str = ""

    @property
    def holds(self) -> bool:
        """Whether the interval contains 0."""
        low, high = self.interval
        return low <= 0 <= high

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"held-out accuracy {self.measured:.1%}, the run's {self.recorded:.1%}: difference {self.difference:+.1%} "
            f"(95% interval {low:+.1%} to {high:+.1%}, paired, {self.questions:,} questions, which can show "
            f"{self.smallest:.1%}); {self.changed:,} of {self.answers:,} answers differ"
            f"{self.by and f'; answered by {self.by}'}"
        )


@dataclass(frozen=True)
class Recorded:
    """The answers that a run recorded after `step`, and the recipe of their evaluation."""

    recipe: Recipe
    step: int
    rows: Rows

    def verify(self, folder: Path, dtype: str, trust_remote_code: bool, progress: Progress) -> Verification:
        """Evaluate an exported folder with the compute dtype of the run.

        Raises RunError if the paired interval of the difference does not contain 0, and UsageError if the questions
        are not those that the run asked.
        """
        recipe = self.recipe_for(str(folder.absolute()), dtype, trust_remote_code)
        verification = compared(self.rows, evaluate_recipe(recipe, progress=progress).rows())
        return self.accepted(verification, folder, "Export with --dtype float32, or the adapter alone with --adapter")

    def recipe_for(self, model_name: str, dtype: str, trust_remote_code: bool) -> Recipe:
        """The recipe of the evaluation with another model and compute dtype."""
        device = "cpu" if self.recipe.model.device == "cpu" else "auto"
        changes = {"name": model_name, "lora": None, "device": device, "dtype": dtype, "compile": False}
        if device == "auto":
            changes["attention"] = "auto"
        model = self.recipe.model.model_copy(update={**changes, "trust_remote_code": trust_remote_code})
        return self.recipe.model_copy(update={"model": model})

    def accepted(self, verification: Verification, what: Path, fix: str) -> Verification:
        """The verification of a folder or file. Raises RunError if it does not hold. `fix`: how to export instead."""
        if not verification.holds:
            kind = "folder" if what.is_dir() else "file"
            raise RunError(
                f"{what}: does not answer as the run did after step {self.step}: {verification}. The {kind} is kept; "
                f"do not use it. {fix}"
            )
        return verification


def code_to_run(run: Path, recipe: Recipe | None = None) -> list[Code]:
    """The code of somebody else's run folder that its own evaluation would run; nothing if it contains no run.

    `recipe`: the one in the folder, if it was read already.
    """
    if recipe is None:
        if not (run / "recipe.toml").is_file():
            return []
        recipe = load_recipe(run / "recipe.toml")
    return evaluation_code(run, recipe.model_copy(update={"benchmarks": []}))


def read_recorded(run: Path, recipe: Recipe, step: int, trust: bool) -> Recorded:
    """The recorded answers of a run's own evaluation after `step`.

    Raises UsageError if the run has not evaluated this step, if its questions were passed from Python, or if the
    evaluation would run code of somebody else's run folder without `trust`.
    """
    if recipe.evaluation is None:
        raise UsageError(f"--verify: the recipe in {run} has no [evaluation]; leave --verify out, or use `gruppo eval`")
    tasks = [recipe.evaluation.task] if recipe.evaluation.task else recipe.tasks
    for task in tasks:
        if task.name.startswith(IN_MEMORY):
            raise UsageError(
                f'--verify: the questions of {run} ("{task.name}") were passed from Python, so they cannot be asked '
                "again; leave --verify out, or evaluate the folder with gruppo.evaluate"
            )
    if (code := code_to_run(run, recipe)) and not trust:
        raise refusal(run, code, "pass trust=True")
    path = run / "evaluations" / f"step-{step:06d}.parquet"
    table = read_table(path, NEEDED_COLUMNS).to_pylist() if path.is_file() else []
    rows = [row for row in table if row["eval_set"] == ""]
    if not rows:
        known = sorted(int(found.stem.removeprefix("step-")) for found in path.parent.glob("step-*.parquet"))
        raise UsageError(
            f"--verify: {run} has no evaluation of its own set after step {step}; export a step that it evaluated "
            f"({', '.join(map(str, known)) or 'there is none'}), or leave --verify out"
        )
    return Recorded(recipe, step, rows)


def compared(recorded: Rows, measured: Rows) -> Verification:
    """The comparison of two sets of rows of `gruppo.runs.tables.EVALUATIONS`.

    Raises UsageError if they do not answer the same questions equally often.
    """
    before, after = questions_of(recorded), questions_of(measured)
    found = compare(before, after)
    texts, others = (
        {(row["prompt_id"], row["sample"]): row["answer"] for row in rows} for rows in (recorded, measured)
    )
    if found["left_out"] or texts.keys() != others.keys():
        raise UsageError(
            f"--verify: the evaluation now has {len(after)} questions, and the run asked {len(before)}, which are not "
            "the same; restore the data of its evaluation, or leave --verify out"
        )
    low, high = found["interval"]
    return Verification(
        float(accuracies(before).mean()),
        float(accuracies(after).mean()),
        found["difference"],
        (low, high),
        found["smallest"],
        found["questions"],
        len(texts),
        sum(others[key] != text for key, text in texts.items()),
    )
