"""`gruppo reproduce`: rerun a step of a run from its stored rollouts, and compare it with what was recorded.

The training loop itself reruns the steps after the nearest earlier checkpoint, in a temporary folder with links to the
run's files. The run folder is only read, so a run that is still in progress can be reproduced too. Nothing is sampled.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError, worded
from gruppo.evaluation.datasets import read_data
from gruppo.rewards import RewardFunction
from gruppo.runs.console import choose_progress
from gruppo.runs.folder import REWARD_CACHE
from gruppo.runs.missing import steps_of, steps_text
from gruppo.runs.reading import read_lines, read_object, require_own
from gruppo.runs.trust import Code, foreign_code, refusal
from gruppo.types import Reward, Row
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import stop_on_signals
from gruppo.utils.waiting import watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gruppo.rollout.recorded import Recording
    from gruppo.training.run import TrainingRun

SHOWN = 10  # differences between completions that a section of the report lists
MACHINE_METRICS = ("time/", "memory/")
SCORING_METRICS = ("reward/log/", "audit/")  # only the reproduced step is scored again
PER_TOKEN = ("advantages", "old_logprobs", "ref_logprobs", "values", "returns")
EXACT = ("prompt_id", "prompt_token_ids", "token_ids", "mask", "trained")


@dataclass(frozen=True)
class Difference:
    """A stored value and its recomputed value, of a metric or of a completion.

    `group`, `completion`, `prompt_id`: of the completion. Of per-token values, the first that differs is given, with
    the index of its `token` (from 0).
    """

    what: str
    stored: Any
    recomputed: Any
    group: int | None = None
    completion: int | None = None
    prompt_id: str | None = None
    token: int | None = None


@dataclass(frozen=True)
class Reproduction:
    """A step that was rerun.

    `begun`: the step of the checkpoint that it started from, 0 for the initial model. `metrics`, `completions`,
    `rewards`: how many were compared (no rewards if dataset rows bring the completions). `earlier`: the first of the
    intermediate steps that differs, with its differences.
    """

    path: Path
    step: int
    begun: int
    tolerance: float
    metrics: int
    completions: int
    rewards: int
    loss: float | None
    gradient_norm: float | None
    differences: list[Difference] = field(default_factory=list)
    earlier: tuple[int, list[Difference]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        return not self.differences and self.earlier is None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        earlier = self.earlier and {
            "step": self.earlier[0],
            "differences": [asdict(found) for found in self.earlier[1]],
        }
        return {"equal": self.equal, **asdict(self), "path": str(self.path), "earlier": earlier}


def reproduce(
    run: str | Path,
    step: int,
    *,
    reward: RewardFunction | Sequence[str | RewardFunction] | None = None,
    prompts: Sequence[Row] | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tolerance: float = 0.0,
    trust: bool = False,
    progress: bool | Progress = True,
) -> Reproduction:
    """Rerun a step of a run from its stored rollouts, and compare rewards, advantages and metrics.

    The rerun starts from the nearest earlier checkpoint and repeats the updates of the steps in between from their
    stored rollouts and rewards. Reward functions are called on the completions of the step itself. If they return
    different rewards than before, that is a difference, and the rest is computed from the stored rewards. `reward`,
    `prompts`, `model`: what was passed to the run from Python. `tolerance`: difference up to which numbers are equal,
    relative to the larger one; numbers below 1e-3, which can be rounding alone, are compared as if one were 1e-3.
    `trust`: run the code that the recipe in the folder names, even if the folder comes from somebody else.
    Raises UsageError if the step cannot be reproduced, or if there is such code and no `trust`.
    """
    folder, shown = Path(run), choose_progress(progress)
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise UsageError(f"tolerance = {tolerance}: must be a finite number of at least 0; write e.g. 1e-4")
    recipe = _recipe(folder)
    given = {"reward": reward is not None, "task": prompts is not None, "model": model is not None}
    code = [item for item in code_to_run(folder) if not given.get(item.place.partition(".")[0])]
    if code and not trust:
        raise refusal(folder, code, "pass trust=True")
    line = _line(folder, step)
    functions = _reward_functions(recipe, reward, prompts, model)
    columns = _completion_columns(recipe, folder, step)
    data = replace(read_data(recipe, functions, prompts, shown), completion_columns=columns)
    with ExitStack() as stack:
        shown, _ = stack.enter_context(watched(shown))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gruppo-reproduce-")))
        damaged = _link(folder, scratch, step)
        stop = stack.enter_context(stop_on_signals())
        from gruppo.rollout.recorded import RecordedRollouts, Recording
        from gruppo.rollout.recorded_rows import read_groups
        from gruppo.training.run import TrainingRun
        from gruppo.training.setup import prepare

        quiet = _Quiet(shown)
        in_memory = None if model is None else (model, tokenizer)
        prepared = prepare(recipe, scratch, True, functions, data, quiet, stack, in_memory, folder)
        recording = Recording(folder)
        stored = recording.groups(step)
        rerun = TrainingRun(
            prepared,
            quiet,
            stop,
            source=lambda live: RecordedRollouts(**vars(live), recording=recording, scored=step),
            saves=False,
        )
        begun = _rerun(rerun, recording, step)
        recomputed = rerun.source.rewards if isinstance(rerun.source, RecordedRollouts) else []
        groups = read_groups(scratch / "rollouts" / f"step-{step:06d}.parquet")
        lines = steps_of(read_lines(scratch / "metrics.jsonl"))
        compare = _Compare(tolerance)
        differences = [
            *compare.rewards(stored, recomputed),
            *compare.rows(stored, groups),
            *compare.metrics(line, lines[step]),
        ]
        before = steps_of(read_lines(folder / "metrics.jsonl"))
        lost = set(range(begun + 1, step)) - set(before)
        if lost:
            damaged.append(f"metrics.jsonl has no metrics of {steps_text(lost)}, which were not compared")
        earlier = next(
            (
                (number, found)
                for number in range(begun + 1, step)
                if number in before
                if (found := compare.metrics(before[number], lines[number], SCORING_METRICS))
            ),
            None,
        )
        return Reproduction(
            path=folder,
            step=step,
            begun=begun,
            tolerance=tolerance,
            metrics=len(_compared(line, lines[step])),
            completions=sum(map(len, stored)),
            rewards=sum(map(len, recomputed)),
            loss=lines[step].get("loss/total"),
            gradient_norm=lines[step].get("optimizer/gradient_norm"),
            differences=differences,
            earlier=earlier,
            notes=[
                *map(
                    worded,
                    [*prepared.changes.texts, *damaged, *_notes_of(recipe), *_notes(folder, step, begun)],
                )
            ],
        )


def _rerun(run: TrainingRun, recording: Recording, last: int) -> int:
    """Rerun the steps up to `last` from the newest checkpoint in the folder. Returns the step of that checkpoint."""
    from gruppo.training.loop import train_step

    run.restore()
    begun, sizes = run.state.step, run.parts.sizes
    with run.recorder.bar("Reproducing steps", last - begun, "steps") as advance:
        while run.state.step < last:
            run.stop.check()
            due, step = run.iterations.due(), run.state.step
            now = sizes.micro_batch_tokens
            sizes.micro_batch_tokens = recording.micro_batch_tokens(step if due else step + 1, due, now)
            if due:
                run.iterations.begin()
            else:
                train_step(run, step + 1)
                advance(1)
    return begun


class _Quiet:
    """Shows progress bars only: notes and metrics were already shown when the run performed its steps."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """See `Progress`."""
        return self.shown.bar(label, total, unit)

    def note(self, text: str) -> None:
        """See `Progress`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Progress`."""


def code_to_run(folder: Path) -> list[Code]:
    """The code that reproducing a step of the run would run, if the folder comes from somebody else."""
    code = foreign_code(folder, _recipe(folder))
    # Environments are not called again, so the model's code is not run.
    return [item for item in code if item.place != "environment.run_model_code_WITHOUT_A_SANDBOX"]


def _recipe(folder: Path) -> Recipe:
    file = folder / "recipe.toml"
    if not file.is_file() or not (folder / "environment.json").is_file():
        raise UsageError(f"{folder}: contains no run; give a run folder, e.g. runs/quickstart")
    require_own(folder)
    if (folder / "folder.json").is_file():
        raise UsageError(f"{folder}: contains labels or a reward model, not a run; there are no steps to reproduce")
    return load_recipe(file)


def _line(folder: Path, step: int) -> Mapping[str, Any]:
    if not (folder / "metrics.jsonl").is_file() and any((folder / "rollouts").glob("step-*.parquet")):
        raise UsageError(
            f"{folder}: metrics.jsonl is missing, so there is nothing to compare a step with; restore it from a copy"
        )
    found = steps_of(read_lines(folder / "metrics.jsonl"))
    if step not in found:
        known = f"it has {steps_text(found)}" if found else "it has no steps yet"
        raise UsageError(f"--step {step}: {folder} has no metrics of such a step; {known}")
    return found[step]


def _reward_functions(
    recipe: Recipe,
    reward: RewardFunction | Sequence[str | RewardFunction] | None,
    prompts: Sequence[Row] | None,
    model: PreTrainedModel | None,
) -> Sequence[str | RewardFunction]:
    """The reward functions. Raises UsageError if something that the run got from Python is not passed again."""
    named = [name for name in recipe.reward.functions if name.startswith(IN_MEMORY)]
    for field_, name, missing, argument in (
        ("reward.functions", named[0] if named else "", reward is None, "reward"),
        ("task.name", recipe.task.name, prompts is None, "prompts"),
        ("model.name", recipe.model.name, model is None, "model"),
    ):
        if name.startswith(IN_MEMORY) and missing:
            raise UsageError(
                f'{field_} = "{name}": was passed from Python; call '
                f"gruppo.reproduce(run, step, {argument}=…) with the same"
            )
    if reward is None:
        return recipe.reward.functions
    return [reward] if callable(reward) else list(reward)


def _completion_columns(recipe: Recipe, folder: Path, step: int) -> tuple[str, ...]:
    """The columns that the completions of a step bring for rewards: only those of a function from Python do."""
    if recipe.environment is None or not recipe.environment.name.startswith(IN_MEMORY):
        return ()
    from gruppo.rollout.recorded import Recording
    from gruppo.rollout.recorded_rows import completion_of
    from gruppo.rollout.workers.rewards import completion_columns

    rows = [row for group in Recording(folder).groups(step) for row in group]
    return tuple(completion_columns([completion_of(row) for row in rows]))


def _link(folder: Path, scratch: Path, step: int) -> list[str]:
    """Make the scratch folder what the run folder was before the step: small files are copied, others are linked.

    Returns a note for every damaged checkpoint that was left out.
    """
    from gruppo.training.checkpoint import problem_of

    notes = []
    for name in ("recipe.toml", "environment.json", "metrics.jsonl", "events.jsonl", REWARD_CACHE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, scratch / name)
    for kind in ("checkpoints", "labels"):
        (scratch / kind).mkdir()
        for path in (folder / kind).glob("step-*"):
            number = path.stem.removeprefix("step-")
            if path.suffix in {"", ".parquet"} and number.isdecimal() and int(number) < step:
                problem = problem_of(path) if path.is_dir() else None
                if problem is None:
                    (scratch / kind / path.name).symlink_to(path.resolve())
                else:
                    notes.append(f"a nearer checkpoint could not be used: {path.name}: {problem}")
    return notes


def _notes_of(recipe: Recipe) -> Iterator[str]:
    if recipe.environment is not None:
        yield "the environment's observations and rewards are the recorded ones; the environment was not called again"
    if recipe.cluster is not None and recipe.cluster.trainers > 1:
        ranks = recipe.cluster.trainers
        yield f"{ranks} ranks trained, and one process reproduces: rounding differs; --tolerance=1e-4 allows for it"


def _notes(folder: Path, step: int, begun: int) -> Iterator[str]:
    """Notes on causes of differences."""
    environment = read_object(folder / "environment.json")
    from gruppo.models.precision import choose_device
    from gruppo.utils.system import describe

    now = describe(choose_device(environment["chosen"]["device"]))
    for name in ("torch", "transformers"):
        was, is_ = environment["packages"].get(name), now["packages"].get(name)
        if was != is_:
            yield f"{name} was {was} and is {is_}: rounding can differ; --tolerance=1e-4 allows for it"
    if environment["platform"] != now["platform"]:
        yield f"the run was made on {environment['platform']}: rounding can differ; --tolerance=1e-4 allows for it"
    for change in environment.get("changes", []):
        if change["step"] >= step and change["field"] in ("reward.functions", "environment.name"):
            yield f"after step {change['step']}, {change['message']}"
    halvings = [halving for halving in environment.get("halvings", []) if begun < halving["step"] <= step]
    for halving in halvings:
        yield (
            f"out of memory during {halving['during']} in step {halving['step']}: the whole step is reproduced with "
            "the smaller size"
        )


def _compared(stored: Mapping[str, Any], recomputed: Mapping[str, Any], excluded: Sequence[str] = ()) -> list[str]:
    """Names of the metrics to compare: all that the run recorded, except those that depend on the machine."""
    return [name for name in stored if name != "step" and not name.startswith((*MACHINE_METRICS, *excluded))]


SMALL = 1e-3  # differences of numbers that are smaller count relative to it


@dataclass(frozen=True)
class _Compare:
    tolerance: float

    def same(self, before: Any, now: Any) -> bool:
        """Whether two values are equal, numbers within the tolerance."""
        if isinstance(before, float) and isinstance(now, float | int):
            return before == now or abs(before - now) <= self.tolerance * max(abs(before), abs(now), SMALL)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            return before.keys() == now.keys() and all(self.same(before[key], now[key]) for key in before)
        if isinstance(before, list) and isinstance(now, list):
            return len(before) == len(now) and all(map(self.same, before, now))
        return bool(before == now)

    def metrics(
        self, stored: Mapping[str, Any], recomputed: Mapping[str, Any], excluded: Sequence[str] = ()
    ) -> list[Difference]:
        """Metrics that differ."""
        return [
            Difference(name, stored[name], recomputed.get(name))
            for name in _compared(stored, recomputed, excluded)
            if not self.same(stored[name], recomputed.get(name))
        ]

    def rewards(self, stored: Sequence[Sequence[Row]], recomputed: Sequence[Sequence[Reward]]) -> Iterator[Difference]:
        """Rewards that differ when the functions are called again; none if nothing was scored."""
        from gruppo.rollout.recorded_rows import reward_of

        for group, (rows, rewards) in enumerate(zip(stored, recomputed, strict=bool(recomputed))):
            for row, now in zip(rows, rewards, strict=True):
                before, after = _comparable(reward_of(row)), _comparable(now)
                if not self.same(before, after):
                    old, new = (
                        reward if reward["steps"] or reward["parts"] else reward["total"] for reward in (before, after)
                    )
                    yield Difference("reward", old, new, group, row["completion"], row["prompt_id"])

    def rows(self, stored: Sequence[Sequence[Row]], recomputed: Sequence[Sequence[Row]]) -> Iterator[Difference]:
        """Completions whose token ids or per-token values differ."""
        if len(stored) != len(recomputed):
            yield Difference("groups", len(stored), len(recomputed))
        for group, (rows, others) in enumerate(zip(stored, recomputed, strict=False)):
            for row, other in zip(rows, others, strict=True):
                place = group, row["completion"], row["prompt_id"]
                for name in EXACT:
                    if row[name] != other[name]:
                        yield Difference(name, row[name], other[name], *place)
                for name in PER_TOKEN:
                    before, now = row.get(name), other[name]
                    if self.same(before, now):
                        continue
                    if before is None or now is None or len(before) != len(now):
                        yield Difference(name, before, now, *place)
                        continue
                    token = next(t for t, (a, b) in enumerate(zip(before, now, strict=True)) if not self.same(a, b))
                    yield Difference(name, before[token], now[token], *place, token)


def _comparable(reward: Reward) -> dict[str, Any]:
    """The parts of a reward to compare: whether it failed, but not the text of the failure."""
    return {
        "total": reward.total,
        "parts": dict(reward.parts),
        "steps": {name: [list(steps.rewards), list(steps.ends)] for name, steps in reward.steps.items()},
        "failed": reward.failure is not None,
    }


def describe_reproduction(result: Reproduction) -> str:
    """The comparison as text."""
    source = f"checkpoints/step-{result.begun:06d}" if result.begun else "the initial model"
    span = f"step {result.step}" if result.begun == result.step - 1 else f"steps {result.begun + 1} to {result.step}"
    lines = [f"Step {result.step} of {result.path}, reproduced from {source} and the stored rollouts of {span}"]
    lines += [f"  Note: {note}" for note in result.notes]
    if result.earlier is not None:
        number, found = result.earlier
        lines.append(f"  Step {number}, an intermediate step, is the first that differs:")
        lines += [f"    {_difference(item)}" for item in found[:SHOWN]]
    kinds = {
        "rewards": ["reward"],
        "advantages": ["advantages", "trained"],
        "log-probabilities": ["old_logprobs", "ref_logprobs"],
        "values": ["values", "returns"],
        "token ids": ["prompt_id", "prompt_token_ids", "token_ids", "mask"],
    }
    for title, names in kinds.items():
        found = [item for item in result.differences if item.what in names]
        count = len({(item.group, item.completion) for item in found})
        whole = result.rewards if title == "rewards" else result.completions
        if not found and (not whole or title in {"values", "token ids"}):
            continue
        lines.append(f"  {title:<18}{_counted(count, whole, 'completions')}")
        lines += [f"    {_difference(item)}" for item in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"    and {len(found) - SHOWN} more; --json has all")
    if any(item.what == "reward" for item in result.differences):
        lines.append("  The rest is computed from the stored rewards.")
    metrics = [item for item in result.differences if item.completion is None]
    lines.append(f"  {'metrics':<18}{_counted(len(metrics), result.metrics, 'metrics')}")
    lines += [f"    {_difference(item)}" for item in metrics]
    if result.loss is not None:
        lines.append(f"  loss {result.loss:.6g}, gradient norm {result.gradient_norm or 0.0:.6g}")
    exact = "exactly" if not result.tolerance else f"within a relative difference of {result.tolerance:g}"
    lines.append(f"Reproduced {exact}." if result.equal else "Not reproduced: there are differences.")
    return "\n".join(lines)


def _counted(different: int, whole: int, what: str) -> str:
    return f"{whole} of {whole} {what} equal" if not different else f"{different} of {whole} {what} differ"


def _difference(found: Difference) -> str:
    where = (
        "" if found.completion is None else f" of {found.prompt_id}, group {found.group}, completion {found.completion}"
    )
    token = "" if found.token is None else f", token {found.token}"
    return f"{found.what}{where}{token}: stored {_short(found.stored)}, recomputed {_short(found.recomputed)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
