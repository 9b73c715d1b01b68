"""`gruppo.rescore`: score the saved completions of a run with another reward, and compare with the recorded one.

The reward runs as in training: in worker processes, with a timeout, once per group, with the recorded prompts and
columns. The reward that the run's recipe names is not run; its recorded values are read.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from gruppo.config.loading import load_recipe, override_list
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Reward as RewardSettings
from gruppo.errors import UsageError
from gruppo.rewards import RewardFunction, listed_rewards, recipe_name
from gruppo.rewards.combine import overall
from gruppo.rollout.recorded_rows import CALLS, Row, completion_of, prompt_of, read_groups, reward_of
from gruppo.rollout.workers.rewards import (
    RewardPool,
    completion_columns,
    memory_per_process,
    reward_names,
    trainer_state,
)
from gruppo.runs.console import choose_progress
from gruppo.runs.missing import steps_text
from gruppo.runs.reading import old_parts, reading, require_own, step_of
from gruppo.runs.rescores import Rescores
from gruppo.runs.tables import RESCORES
from gruppo.types import Completion, Prompt, Reward
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import Stop, stop_on_signals
from gruppo.utils.text import as_json
from gruppo.utils.waiting import watched


def rescore(
    run: str | Path,
    reward: str | RewardFunction | Sequence[str | RewardFunction],
    *,
    overrides: Sequence[str] = (),
    against: str | None = None,
    steps: int | Container[int] | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    progress: bool | Progress = True,
) -> Rescores:
    """Score the saved completions of a run with another reward, and compare it with the recorded one.

    - `run`: the run folder, finished or not. It is only read.
    - `reward`: a function, a built-in name, an import path or "label = function", or several, as in reward.functions.
    - `overrides`: fields of the [reward] table, such as "reward.weights=[1, 0.5]" or "reward.options.regex.pattern=…".
      Timeout, workers and memory are those of the run by default; environment variables are never taken over.
    - `against`: the part of the recorded reward to compare with, by the name of its function; the total by default.
      Step rewards count with the mean of their steps.
    - `steps`: a step, or a collection such as range(1, 11); all by default.
    - `limit`: the largest number of groups to score, spread evenly over the steps; the first groups of each are taken.
    - `out`: a .parquet file to write every row to, with the columns of gruppo.runs.tables.RESCORES.
    - `progress`: show progress on the console; False for no output.

    Completions without a recorded or a new reward are counted, not compared. A table that cannot be read is left out,
    and `notes` of the result says so. Ctrl-C stops without a file. Raises UsageError for a mistake in the arguments, a
    folder without rollouts, and a reward that fails on every completion of the first step.
    """
    console, folder = choose_progress(progress), Path(run)
    rewards = listed_rewards(reward) or []
    recipe = _recipe(folder)
    settings = _settings(recipe, rewards, overrides)
    tables = _chosen(folder, steps, limit)
    file = None if out is None else _new_file(Path(out), folder)
    with stop_on_signals() as stop, watched(console) as (shown, _):
        rescoring = _Rescoring(folder, recipe, rewards, settings, against, shown, stop)
        rescores = rescoring.run(tables)
        stop.check()
        if file is not None:
            rescores.write(file)
    return rescores


@dataclass(frozen=True)
class _Group:
    """A recorded group: what a reward call gets, and the recorded rewards."""

    number: int
    prompt: Prompt
    completions: list[Completion]
    rewards: list[Reward]

    @property
    def columns(self) -> set[str]:
        """The names of the columns that a call gets."""
        return {*self.prompt.columns, *completion_columns(self.completions)}

    @classmethod
    def read(cls, rows: list[Row]) -> _Group:
        """The group in these rows of a rollout table."""
        return cls(rows[0]["group"], prompt_of(rows[0]), [*map(completion_of, rows)], [*map(reward_of, rows)])


@dataclass
class _Rescoring:
    """One call of `rescore`, step by step."""

    folder: Path
    recipe: Recipe
    rewards: Sequence[str | RewardFunction]
    settings: RewardSettings
    against: str | None
    progress: Progress
    stop: Stop

    def run(self, tables: Sequence[tuple[Path, int | None]]) -> Rescores:
        """Score the first groups of each table, at most as many as given; None: all. Raises UsageError if there are
        none."""
        notes: list[str] = []
        scored: list[pa.Table] = []
        pool: RewardPool | None = None
        renamed = old_parts(self.folder)
        with ExitStack() as stack, self.progress.bar("Rescoring", len(tables), "steps") as show:
            for table, most in tables:
                self.stop.check()
                try:
                    with reading(table, "restore it from a copy"):
                        groups = [_Group.read(rows) for rows in read_groups(table, renamed, CALLS)[:most]]
                except UsageError as error:
                    notes.append(str(error))
                    groups = []
                if not groups:
                    show(1)
                    continue
                if pool is None:
                    self._require_part(groups)
                    with self.stop.interruptible():
                        pool = stack.enter_context(self._pool(groups))
                scored.append(self._score(pool, step_of(table) or 0, groups, show, first=not scored))
        if not scored:
            raise UsageError(notes[0] if notes else f"{self.folder}: its rollouts have no rows; there is none to score")
        return Rescores(self.folder, pa.concat_tables(scored), notes)

    def _require_part(self, groups: Sequence[_Group]) -> None:
        parts = {name for group in groups for reward in group.rewards for name in reward.parts}
        if self.against is not None and self.against not in parts:
            raise UsageError(
                f"--against {self.against}: is not a part of the recorded reward; "
                + (f"write one of {', '.join(sorted(parts))}" if parts else "it has no parts: leave it out")
            )

    def _pool(self, groups: Sequence[_Group]) -> RewardPool:
        """The processes of the new reward. The columns that it may need are those of all these groups."""
        counts = Counter(name for group in groups for name in group.columns)
        partial = {name: f"{count} of {len(groups)} groups" for name, count in counts.items() if count < len(groups)}
        try:
            pool = RewardPool(
                self.rewards,
                self.settings.weights,
                [name for name in counts if name not in partial],
                self.settings.timeout,
                self.settings.workers,
                options=self.settings.options,
                memory=memory_per_process(self.settings),
                environment=self.settings.environment,
                progress=self.progress,
                partial_columns=partial,
            )
        except UsageError as error:
            raise UsageError(re.sub(r'^reward\.functions = "(.*?)": ', r"--reward \1: ", str(error))) from None
        pool.notify_of_restarts(self.progress.note)
        return pool

    def _score(self, pool: RewardPool, step: int, groups: Sequence[_Group], show: Advance, *, first: bool) -> pa.Table:
        """The rows of one step. `first`: raise UsageError if every completion fails."""

        def advance(amount: float) -> None:
            self.stop.check()
            show(amount / len(groups))

        calls = [(group.prompt, group.completions) for group in groups]
        rewards, _ = pool.score(calls, trainer_state(self.recipe, step), advance)
        failures = [reward.failure for group in rewards for reward in group]
        if first and all(failures):
            name = " + ".join(pool.names)
            raise UsageError(
                f"--reward {name}: fails on every completion of step {step}: {failures[0]}; fix the reward"
            )
        weights = dict(zip(pool.names, pool.weights, strict=True))
        rows = [
            {
                "step": step,
                "group": group.number,
                "completion": number,
                "prompt_id": group.prompt.id,
                "against": self.against,
                "recorded": self._recorded(old),
                "rescored": overall(new, weights),
                "reward_parts": as_json(dict(new.parts)),
                "failure": new.failure,
            }
            for group, scored in zip(groups, rewards, strict=True)
            for number, (old, new) in enumerate(zip(group.rewards, scored, strict=True))
        ]
        return pa.Table.from_pylist(rows, RESCORES)

    def _recorded(self, reward: Reward) -> float | None:
        """The recorded value that is compared; None if the completion was excluded."""
        if self.against is None:
            settings, model = self.recipe.reward, self.recipe.reward_model
            weights = dict(zip(reward_names(settings.functions), settings.weights, strict=False))
            value = overall(reward, weights, 1.0 if model is None else model.weight)
        else:
            steps = reward.steps.get(self.against)
            value = reward.parts.get(self.against) if steps is None else overall(Reward(0.0, {}, steps={"": steps}), {})
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _recipe(folder: Path) -> Recipe:
    if not (folder / "recipe.toml").is_file():
        raise UsageError(f"{folder}: contains no run; give a run folder, e.g. runs/quickstart")
    require_own(folder)
    return load_recipe(folder / "recipe.toml")


def _settings(recipe: Recipe, rewards: Sequence[str | RewardFunction], overrides: Sequence[str]) -> RewardSettings:
    """The [reward] table of the new reward: its functions, the run's limits, and the overrides."""
    overrides = override_list(overrides)
    if not rewards:
        raise UsageError('--reward []: names no reward; write e.g. "last_number", or a function')
    for override in overrides:
        field = override.partition("=")[0].strip()
        if not field.startswith("reward.") or field == "reward.functions":
            raise UsageError(
                f"--set {override}: only fields of [reward] other than functions can be set here; write e.g. "
                "--set reward.timeout=60"
            )
    limits = recipe.reward.model_dump(include={"timeout", "workers", "memory"})
    table = {"functions": [*map(recipe_name, rewards)], **limits}
    return load_recipe({"model": {"name": recipe.model.name}, "reward": table}, overrides).reward


def _chosen(folder: Path, steps: int | Container[int] | None, limit: int | None) -> list[tuple[Path, int | None]]:
    """The tables of the steps, in order, each with the largest number of its groups to score; None: all."""
    paths = sorted((folder / "rollouts").glob("step-*.parquet"))
    found = {step: path for path in paths if (step := step_of(path)) is not None}
    if not found:
        raise UsageError(f"{folder}: has no rollouts; give the folder of a run that has finished a step")
    wanted = (steps,) if isinstance(steps, int) else steps
    shown = f"{wanted.start}-{wanted.stop - 1}" if isinstance(wanted, range) else str(steps)
    if wanted is not None and (isinstance(wanted, str) or not isinstance(wanted, Container)):
        raise UsageError(f"--steps {shown}: must be a number or a collection of numbers such as range(1, 11)")
    tables = [path for step, path in found.items() if wanted is None or step in wanted]
    if not tables:
        raise UsageError(
            f"--steps {shown}: {folder} has no rollouts of such a step; it has those of {steps_text(found)}"
        )
    if limit is None:
        return [(path, None) for path in tables]
    if limit < 1:
        raise UsageError(f"--limit {limit}: must be at least 1; write e.g. --limit 100")
    count = len(tables)
    if limit < count:
        return [(tables[place * count // limit], 1) for place in range(limit)]
    return [(path, limit // count + (place < limit % count)) for place, path in enumerate(tables)]


def _new_file(file: Path, folder: Path) -> Path:
    """The file to write. Raises UsageError if it cannot be a new file outside of the run folder."""
    if file.suffix != ".parquet" or not file.absolute().parent.is_dir():
        raise UsageError(f"--out {file}: must be a .parquet file in an existing folder")
    if file.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--out {file}: is in the run folder, which is only read; write it elsewhere")
    if file.exists() or file.is_symlink():
        raise UsageError(f"--out {file}: exists already; choose another name, or remove it")
    return file
