"""How long the rest of a study takes: from its finished runs, or from `gruppo check`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.study.arms import PlannedRun, Study
from gruppo.study.attempts import read_attempts
from gruppo.study.file import EvaluationSet
from gruppo.study.record_files import read_facts, write_facts
from gruppo.study.states import RunState
from gruppo.utils.progress import Progress

FILE = "estimates.json"
# Fields that do not change how long a step takes. Arms that differ in nothing else share one measurement.
UNTIMED = {
    "run": ("name", "seed", "steps", "epochs", "checkpoint_every", "noise_every"),
    "method": (
        *("name", "scale", "advantage_epsilon", "dpo_beta", "aggregation"),
        *("clip_low", "clip_high", "kl_estimator", "kl_importance", "tis_cap"),
    ),
    "optimizer": (
        *("learning_rate", "schedule", "warmup_steps", "warmup_ratio"),
        *("beta1", "beta2", "epsilon", "weight_decay", "max_grad_norm"),
    ),
}


class Estimator:
    """Estimates seconds of runs and evaluations.

    An arm whose runs have recorded steps is as fast in its other runs. For another arm `gruppo check` is asked, once:
    its answer is kept among the records, and assumes completions of the maximum length, so that it is an upper
    bound. `checks`: False to ask nothing; then such an arm has no estimate.
    """

    def __init__(self, study: Study, states: Mapping[str, RunState], progress: Progress, checks: bool = True) -> None:
        self.study, self.states, self.progress, self.checks = study, states, progress, checks
        self._seconds = {
            attempt["name"]: attempt["seconds"]
            for attempt in read_attempts(study.records)
            if attempt["outcome"] in ("done", "stopped")
        }

    def run(self, run: PlannedRun, start: RunState) -> float | None:
        """Seconds until a run that goes on from `start` is done, without its evaluations."""
        budget = run.budget
        if budget.minutes is not None:
            return max(0.0, 60 * budget.minutes - start.seconds)
        arm = [self.states[other.name] for other in self.study.runs_of(run.arm.name)]
        steps, tokens = sum(other.steps for other in arm), sum(other.tokens for other in arm)
        seconds = sum(other.seconds for other in arm)
        if steps and tokens:
            if budget.tokens is not None:
                return max(0.0, budget.tokens - start.tokens) * seconds / tokens
            return max(0, run.recipe.run.steps - start.steps) * seconds / steps
        checked = self._checked(run)
        if checked is None:
            return None
        step_seconds, sampling = float(checked["step_seconds"]), run.recipe.sampling
        if budget.tokens is None:
            return run.recipe.run.steps * step_seconds
        most = sampling.prompts_per_step * sampling.group_size * sampling.max_tokens
        return budget.tokens / most * step_seconds

    def evaluation(self, table: EvaluationSet) -> float | None:
        """Seconds of an evaluation: the mean of those that are done; None if none is."""
        others = [seconds for name, seconds in self._seconds.items() if name.startswith(f"{table.title} of ")]
        return sum(others) / len(others) if others else None

    def _checked(self, run: PlannedRun) -> Mapping[str, Any] | None:
        """What `gruppo check --quick` says of a run; of one with a start as if it began with the first untrained model,
        which is as large and always there."""
        model = run.recipe.model.model_copy(update={"name": run.lineage[-1].recipe.model.name})
        recipe = run.recipe.model_copy(update={"model": model})
        path = self.study.records / FILE
        known = read_facts(path)
        key = _key(recipe)
        if key in known:
            entry: Mapping[str, Any] = known[key]
            return entry
        if not self.checks:
            return None
        from gruppo.preflight.check import check_recipe

        try:
            check = check_recipe(recipe, quick=True, progress=self.progress)
        except UsageError:
            return None  # training reports it
        entry = {"step_seconds": check.seconds_per_step}
        write_facts(path, {**known, key: entry})
        return entry


def _key(recipe: Recipe) -> str:
    """A name for all recipes whose steps take as long as those of this one."""
    values = recipe.as_mapping()
    for table, fields in UNTIMED.items():
        values[table] = {name: value for name, value in values[table].items() if name not in fields}
    values["method"]["kl_coef"] = values["method"]["kl_coef"] > 0  # the reference is what takes time
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def total(seconds: Sequence[float | None]) -> float:
    """The sum of what is known."""
    return sum(value for value in seconds if value is not None)


def clock(seconds: float | None) -> str:
    """A duration for readers."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
