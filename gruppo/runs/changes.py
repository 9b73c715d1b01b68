"""What has changed in a recipe since its run was started or last resumed, and whether the run can continue with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.cluster_section import Cluster
from gruppo.config.recipe import Recipe
from gruppo.config.resume import FIXED, LENGTH, REASONS, rule_of
from gruppo.config.schedule import learning_rate, warmup_steps
from gruppo.errors import UsageError
from gruppo.runs.reading import read_object
from gruppo.utils.paths import user_path

INCOMPARABLE = ("evaluation.every",)  # changes of [evaluation] after which accuracies can still be compared


@dataclass(frozen=True)
class Change:
    """A field that is not what it was when the run was started or last resumed. None: the field is not set."""

    field: str
    old: Any
    new: Any
    effect: str = ""

    @property
    def message(self) -> str:
        """The change in words. None means that the field is not set."""
        return f"{self.field} was {_short(self.old)} and is {_short(self.new)}{self.effect}"

    @property
    def rule(self) -> str:
        """See `gruppo.config.resume.RULES`."""
        return rule_of(self.field)

    @property
    def of_evaluation(self) -> bool:
        """Whether it changes what the run evaluates, or when."""
        return self.field.startswith(("evaluation", "benchmarks"))

    @property
    def ends_comparison(self) -> bool:
        """Whether accuracies of [evaluation] from before the change cannot be compared with those after it."""
        return self.field.startswith("evaluation") and self.field not in INCOMPARABLE

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"field": self.field, "old": _plain(self.old), "new": _plain(self.new), "message": self.message}


def differences(before: Recipe, now: Recipe) -> list[Change]:
    """The fields that differ between two recipes."""
    return list(_differences(_effective(before), _effective(now)))


def allowed_changes(folder: Path, before: Recipe, now: Recipe, checkpoints: Mapping[int, Path]) -> list[Change]:
    """The fields that differ, if the run in the folder can continue with the new recipe.

    `checkpoints`: its checkpoints by step. Raises UsageError for a field that cannot change, with the reason and a fix.
    A recipe whose run.epochs is not resolved yet is not checked for its length.
    """
    found = differences(before, now)
    if now.run.epochs is not None:
        found = [change for change in found if change.rule != LENGTH]
    result = folder / "model"
    again = f'start a new run from its result (model.name = "{result}")' if result.is_dir() else "start a new run"
    fixed = [change for change in found if change.rule == FIXED]
    if fixed:
        reasons = "; ".join(f"{change.message}, but {REASONS[_table(change.field)]}" for change in fixed)
        raise UsageError(
            f"--resume {folder}: the recipe has changed since: {reasons}; restore {_them(fixed)}, or {again} with "
            "another --out"
        )
    length = [change for change in found if change.rule == LENGTH]
    if length and (problem := length_problem(before, now, *steps_and_iterations(checkpoints))):
        changes = "; ".join(change.message for change in length)
        raise UsageError(f"--resume {folder}: {changes}: {problem}, or {again} with another --out")
    return [_with_effect(change) for change in found]


def _with_effect(change: Change) -> Change:
    if change.ends_comparison:
        effect = ": accuracies before and after this change are not compared"
        return Change(change.field, change.old, change.new, effect)
    return change


def _them(changes: list[Change]) -> str:
    return "it" if len(changes) == 1 else "them"


def _table(field: str) -> str:
    return field.partition(".")[0].partition("[")[0]


def steps_and_iterations(checkpoints: Mapping[int, Path]) -> tuple[int, int]:
    """The steps that are done and the iterations that have begun, from the newest readable checkpoint."""
    for step, checkpoint in sorted(checkpoints.items(), reverse=True):
        try:
            return step, int(read_object(checkpoint / "state.json").get("iteration", 1))
        except (OSError, UsageError, ValueError, TypeError):
            continue  # the run does not continue from it either
    return 0, 0


def length_problem(before: Recipe, now: Recipe, done: int, begun: int) -> str | None:
    """Why the steps that are done would not be those of a run with the new recipe, and what to write; None if they are.

    `done`: steps; `begun`: outer iterations.
    """
    old, new = before.run, now.run
    if new.steps < done:
        return f"{done} steps are done; write run.steps = {done} or more"
    part, new_part = old.steps // old.iterations, new.steps // new.iterations
    same = begun <= 1 or part == new_part
    if not same or (begun and (begun - 1) * new_part >= new.steps) or -(-done // new_part) > begun:
        whole = max(1, -(-max(done, new.steps) // part))
        return (
            f"{begun} of the run's iterations have begun, of {part} steps each, and the others have to be of this "
            f"length too; write run.steps = {whole * part} and run.iterations = {whole}"
        )
    rates = ((learning_rate(one.optimizer, step, one.run.steps) for one in (before, now)) for step in range(done))
    if all(old_rate == new_rate for old_rate, new_rate in rates):
        return None
    warmups = warmup_steps(before.optimizer, old.steps), warmup_steps(now.optimizer, new.steps)
    if warmups[0] != warmups[1] and (old.steps == new.steps or before.optimizer.schedule == "constant"):
        return (
            f"the warm-up would take {warmups[1]} steps, but {done} steps are done with a warm-up of {warmups[0]}; "
            f"write optimizer.warmup_steps = {warmups[0]}"
        )
    return (
        f'with optimizer.schedule = "{before.optimizer.schedule}" the learning rates of the {done} steps that are done '
        "depend on the length, so only a constant schedule can be extended or shortened; restore the length"
    )


def _effective(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, where recipes that mean the same are equal: with the stop strings that evaluations
    take from [sampling], with all weights of rewards, with the defaults of [cluster], and with files of functions as
    absolute paths."""
    values = recipe.as_mapping()
    values.setdefault("cluster", Cluster().model_dump())
    reward = values["reward"]
    reward["functions"] = [_located(name) for name in reward["functions"]]
    reward["weights"] = reward["weights"] or [1.0] * len(reward["functions"])
    for table, field in (("environment", "name"), ("method", "surrogate"), ("reward_model", "split")):
        if values.get(table):
            values[table][field] = _located(values[table][field])
    for settings in [values.get("evaluation"), *values.get("benchmarks", [])]:
        if settings is not None:
            settings["decoding"].setdefault("stop", values["sampling"]["stop"])
    return values


def _located(name: str) -> str:
    """An import path of a file with the file's absolute path; any other name unchanged."""
    file, colon, function = name.rpartition(":")
    return f"{user_path(file).absolute()}:{function}" if colon and file.endswith(".py") else name


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif pairs := _tables(old, new):
            for place, (one, other) in enumerate(pairs):
                yield from _differences(one, other, f"{prefix}{key}[{place}].")
        elif old != new:
            yield Change(f"{prefix}{key}", old, new)


def _tables(old: Any, new: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of [[tables]] of two recipes if both have the same number of tables, else an empty list."""
    both = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    return list(zip(old, new, strict=True)) if both and all(isinstance(entry, dict) for entry in (*old, *new)) else []


def _short(value: Any) -> str:
    text = "not set" if value is None else repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _plain(value: Any) -> Any:
    """The value if JSON has it, else its text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
