"""The runs of a study: the recipe and the folder of every arm with every seed."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.loading import load_recipe, overlaid
from gruppo.config.packaged import packaged_recipes
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.study.file import Arm, Budget, StudyFile, read_study
from gruppo.utils.paths import from_here, is_file, user_path


@dataclass(frozen=True)
class PlannedRun:
    """An arm with one seed. `start`: the run whose trained model it begins with; None if its recipe names a model."""

    arm: Arm
    seed: int
    recipe: Recipe
    folder: Path
    budget: Budget
    start: PlannedRun | None = None

    @property
    def name(self) -> str:
        """Its name in the study."""
        return f"{self.arm.name}/seed-{self.seed}"

    @property
    def model(self) -> Path:
        """The folder of the model that its training ends with."""
        return self.folder / "model"

    @property
    def lineage(self) -> list[PlannedRun]:
        """The run, its start, the start of that, and so on."""
        return [self, *([] if self.start is None else self.start.lineage)]


@dataclass(frozen=True)
class Study:
    """A study: its file, where it lies, and its runs, in the order in which they are trained.

    The first seed of every arm comes first, so that a study that is not finished compares all arms. A start comes
    before the runs that begin with its model.
    """

    path: Path
    file: StudyFile
    runs: list[PlannedRun]

    @property
    def folder(self) -> Path:
        """The folder of the runs."""
        return self._beside(self.file.study.runs or f"runs/{self.file.study.name}")

    @property
    def records(self) -> Path:
        """The folder of the records."""
        given = self.file.study.records
        return self._beside(given) if given else self.folder / "records"

    @property
    def page(self) -> Path:
        """The page that is written."""
        given = self.file.study.page
        return self._beside(given) if given else self.folder / "study.md"

    def _beside(self, given: str) -> Path:
        """A path of the file, which is relative to the file's folder."""
        path = self.path.parent / user_path(given)
        return from_here(path) if ".." in path.parts else path

    def runs_of(self, arm: str) -> list[PlannedRun]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm.name == arm]

    def begun_with(self, run: PlannedRun) -> list[PlannedRun]:
        """The runs that begin with the model of a run."""
        return [other for other in self.runs if other.start is run]

    def selected(self, only: Collection[str]) -> list[PlannedRun]:
        """The runs of these arms, and those that they begin with; all runs if no arm is given."""
        names = {one.name for run in self.runs if not only or run.arm.name in only for one in run.lineage}
        return [run for run in self.runs if run.name in names]


def load_study(path: Path) -> Study:
    """Read a study and the recipes of all its runs. Raises UsageError."""
    file = read_study(path)
    study = Study(path, file, [])
    pairs = [(place, arm, seed) for arm in file.arms for place, seed in enumerate(file.seeds_of(arm))]
    for _, arm, seed in sorted(pairs, key=lambda pair: pair[0]):
        _planned(study, arm, seed)
    _require_apart(study)
    return study


def _planned(study: Study, arm: Arm, seed: int) -> PlannedRun:
    """The run of an arm with a seed. It is added to the study, after its start, unless it is there."""
    for run in study.runs_of(arm.name):
        if run.seed == seed:
            return run
    start = None
    if arm.start is not None:
        other = study.file.arm(arm.start)
        seeds = study.file.seeds_of(other)
        start = _planned(study, other, seed if seed in seeds else seeds[0])
    folder = study.folder / arm.name / f"seed-{seed}"
    run = PlannedRun(arm, seed, _recipe(study, arm, seed, start), folder, study.file.budget_of(arm), start)
    study.runs.append(run)
    return run


def require_arms(study: Study, only: Iterable[str]) -> None:
    """Raise UsageError unless these are names of arms."""
    known = {arm.name for arm in study.file.arms}
    if unknown := [name for name in only if name not in known]:
        raise UsageError(f"--only {unknown[0]}: is no arm of {study.path}; it has {', '.join(sorted(known))}")


def _require_apart(study: Study) -> None:
    """Raise UsageError if records would be written into run folders."""
    records, given = study.records.resolve(), study.file.study.records
    for folder in (run.folder.resolve() for run in study.runs):
        if folder.is_relative_to(records) or records.is_relative_to(folder):
            raise UsageError(
                f'{study.path}: study.records = "{given}": holds the runs, or lies in one; write another folder, e.g. '
                f'"{study.file.study.name}-records"'
            )


def _recipe(study: Study, arm: Arm, seed: int, start: PlannedRun | None) -> Recipe:
    """The recipe of an arm with a seed. Raises UsageError."""
    where, budget, name = f"{study.path}: arm {arm.name}", study.file.budget_of(arm), study.file.study.name
    run: dict[str, Any] = {"name": f"{name}-{arm.name}-{seed}"[:100], "seed": seed}
    if budget.steps is not None:
        run["steps"] = budget.steps
    layers = [{"run": run}, *(_nested(key, value, where) for key, value in arm.changes.items())]
    base = study.file.recipe if arm.recipe is None else arm.recipe
    assert base is not None
    tables = {"extends": base} if isinstance(base, str) else dict(base)
    if "extends" in tables:
        tables["extends"] = _located(tables["extends"], study.path, where)
    if start is not None:
        for layer in [*layers, *([] if arm.recipe is None else [tables])]:
            _require_no_model(layer, where, start)
        layers.append({"model": {"name": str(start.model.resolve())}})
    try:
        recipe = load_recipe(overlaid([*layers, tables]))
    except UsageError as error:
        raise UsageError(
            "; ".join(f"{where}: {line.removeprefix('recipe: ')}" for line in str(error).splitlines())
        ) from (error)
    if recipe.cluster is not None and recipe.cluster.trainers > 1:
        raise UsageError(
            f"{where}: cluster.trainers = {recipe.cluster.trainers}: a study trains in one process; write trainers = 1"
        )
    _require_reachable(recipe, budget, where)
    return recipe


def _require_no_model(layer: Mapping[str, Any], where: str, start: PlannedRun) -> None:
    """Raise UsageError if a layer of the recipe of an arm with a start names a model."""
    table = layer.get("model")
    if isinstance(table, Mapping) and "name" in table:
        raise UsageError(
            f'{where}: model.name = "{table["name"]}": the arm begins with the model of start = "{start.arm.name}"; '
            "remove one of the two"
        )


def _nested(key: str, value: Any, where: str) -> dict[str, Any]:
    """{"a": {"b": value}} for the key a.b, which is written as in TOML."""
    try:
        layer: Any = tomllib.loads(f"{key} = 0")
    except ValueError:
        raise UsageError(f'{where}: changes: "{key}" is no field; write e.g. "method.name" = "rft"') from None
    path: list[str] = []
    while isinstance(layer, dict):
        ((name, layer),) = layer.items()
        path.append(name)
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def _located(name: Any, file: Path, where: str) -> str:
    """The recipe that a study's file names: a path relative to it, or the name of a packaged recipe."""
    path = file.parent / user_path(str(name))
    if is_file(path):
        return str(path.resolve())
    if name in packaged_recipes():
        return str(name)
    raise UsageError(
        f'{where}: recipe = "{name}": there is no file {path}; give a path relative to {file}, or a name that '
        "`gruppo recipes` lists"
    )


def _require_reachable(recipe: Recipe, budget: Budget, where: str) -> None:
    """Raise UsageError if the run would end before it can have spent its budget of tokens."""
    if budget.tokens is None or recipe.method.source == "dataset" or recipe.run.epochs is not None:
        return
    sampling, rounds = recipe.sampling, 1 + recipe.method.dynamic_sampling_rounds
    step = sampling.prompts_per_step * sampling.group_size * sampling.max_tokens * rounds
    if step * recipe.run.steps < budget.tokens:
        raise UsageError(
            f"{where}: run.steps = {recipe.run.steps}: samples at most {step * recipe.run.steps:,} tokens, but "
            f"budget.tokens = {budget.tokens:,}; write at least steps = {-(-budget.tokens // step)}, and more because "
            "completions can be shorter"
        )


def written(changes: Mapping[str, Any]) -> list[str]:
    """Changes as text, one per field."""
    lines = []
    for key, value in changes.items():
        if isinstance(value, Mapping):
            lines += [f"{key}.{line}" for line in written(value)]
        else:
            lines.append(f"{key} = {_plain(value)}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return str(value)
