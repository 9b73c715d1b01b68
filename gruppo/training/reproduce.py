"""`gruppo reproduce`: a step of a run made again from its stored rollouts, and compared with what was written down.

The loop itself makes the steps from the nearest checkpoint before, in a folder of its own that holds links to what the
run has; the run folder is only read, so a run that is still going on can be replayed too. Nothing is sampled.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_data
from gruppo.rewards import RewardFunction
from gruppo.runs.console import choose_progress
from gruppo.runs.reading import read_lines, require_own
from gruppo.types import Reward, Row
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.signals import stop_on_signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gruppo.rollout.recorded import Recording
    from gruppo.training.run import TrainingRun

SHOWN = 10  # differences of completions on the page
APART = ("time/", "memory/")  # metrics of the machine
JUDGED_ANEW = ("reward/log/", "audit/")  # metrics of judging, which only the replayed step does again
PER_TOKEN = ("advantages", "old_logprobs", "ref_logprobs", "values", "returns")
EXACT = ("prompt_id", "prompt_token_ids", "token_ids", "mask", "trained")


@dataclass(frozen=True)
class Difference:
    """What was stored and what is recomputed: of a metric, or of a completion (then with its group, number and
    question; of per-token numbers the first that differs, and its token counted from 0)."""

    what: str
    stored: Any
    recomputed: Any
    group: int | None = None
    completion: int | None = None
    prompt_id: str | None = None
    token: int | None = None


@dataclass(frozen=True)
class Reproduction:
    """A step that was made again. `begun`: the checkpoint's step that it began from, 0 for the start model. `metrics`,
    `completions`, `rewards`: how many were compared (no rewards, where rows bring the completions). `earlier`: of
    the steps made on the way, the first that differs, with its differences."""

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
        """Nothing differs by more than the tolerance."""
        return not self.differences and self.earlier is None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        earlier = self.earlier and {"step": self.earlier[0], "differences": [asdict(each) for each in self.earlier[1]]}
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
    progress: bool | Progress = True,
) -> Reproduction:
    """Make a step of a run again from its stored rollouts, and compare rewards, advantages and metrics.

    It begins from the nearest earlier checkpoint and makes the updates of the steps in between from their stored
    rollouts and rewards. Reward functions are called on the completions of the step itself; where they give something
    else than they gave, that is a difference, and the rest is computed from the stored rewards. `reward`, `prompts`,
    `model`: what the run was given in memory. `tolerance`: relative difference up to which numbers are equal. Raises
    UsageError where the step cannot be made again.
    """
    folder, shown = Path(run), choose_progress(progress)
    if not (tolerance >= 0 and math.isfinite(tolerance)):
        raise UsageError(f"tolerance = {tolerance}: is not a number from 0; write e.g. 1e-4")
    recipe = _recipe(folder)
    line = _line(folder, step)
    given = _given(recipe, reward, prompts, model)
    data = read_data(recipe, given, prompts, shown)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gruppo-replay-")))
        passed = _link(folder, scratch, step)
        stop = stack.enter_context(stop_on_signals())
        from gruppo.rollout.recorded import RecordedRollouts, Recording, read_groups
        from gruppo.training.run import TrainingRun
        from gruppo.training.setup import prepare

        quiet = _Quiet(shown)
        held = None if model is None else (model, tokenizer)
        prepared = prepare(recipe, scratch, True, given, data, quiet, stack, held, folder)
        recording = Recording(folder)
        stored = recording.groups(step)
        again = TrainingRun(
            prepared,
            quiet,
            stop,
            source=lambda live: RecordedRollouts(**vars(live), recording=recording, scored=step),
            saves=False,
        )
        begun = _make_again(again, recording, step)
        recomputed = again.rollouts.rewards if isinstance(again.rollouts, RecordedRollouts) else []
        made = read_groups(scratch / "rollouts" / f"step-{step:06d}.parquet")
        lines = _steps_of(read_lines(scratch / "metrics.jsonl"))
        compare = _Compare(tolerance)
        differences = [
            *compare.rewards(stored, recomputed),
            *compare.rows(stored, made),
            *compare.metrics(line, lines[step]),
        ]
        before = _steps_of(read_lines(folder / "metrics.jsonl"))
        earlier = next(
            (
                (each, found)
                for each in range(begun + 1, step)
                if (found := compare.metrics(before[each], lines[each], JUDGED_ANEW))
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
            notes=[*prepared.changes, *passed, *_of_environment(recipe), *_notes(folder, step, begun)],
        )


def _make_again(run: TrainingRun, recording: Recording, last: int) -> int:
    """Make the steps up to `last` again, from the newest checkpoint that the folder holds; the step of that."""
    from gruppo.training.loop import train_step

    run.restore()
    begun, sizes = run.state.step, run.parts.sizes
    with run.recorder.bar("Making steps again", last - begun, "steps") as advance:
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
    """Progress alone: what a run would say of its steps was said when they were made."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """See `Progress`."""
        return self.shown.bar(label, total, unit)

    def note(self, text: str) -> None:
        """See `Progress`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Progress`."""


def _recipe(folder: Path) -> Recipe:
    held = folder / "recipe.toml"
    if not held.is_file() or not (folder / "environment.json").is_file():
        raise UsageError(f"{folder}: holds no run; give the folder of one, e.g. runs/quickstart")
    require_own(folder)
    if (folder / "folder.json").is_file():
        raise UsageError(f"{folder}: holds no run, but labels or a reward model; there are no steps to replay")
    return load_recipe(held)


def _steps_of(lines: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The lines of steps, by step."""
    return {int(line["step"]): line for line in lines if "completion/length" in line}


def _line(folder: Path, step: int) -> Mapping[str, Any]:
    found = _steps_of(read_lines(folder / "metrics.jsonl"))
    if step not in found:
        known = f"it has made steps {min(found)} to {max(found)}" if found else "it has made no step yet"
        raise UsageError(f"--step {step}: {folder} has no such step; {known}")
    return found[step]


def _given(
    recipe: Recipe,
    reward: RewardFunction | Sequence[str | RewardFunction] | None,
    prompts: Sequence[Row] | None,
    model: PreTrainedModel | None,
) -> Sequence[str | RewardFunction]:
    """The reward functions. Raises UsageError where the run had something in memory that is not given again."""
    named = [name for name in recipe.reward.functions if name.startswith("in-memory:")]
    for field_, name, missing, argument in (
        ("reward.functions", named[0] if named else "", reward is None, "reward"),
        ("task.name", recipe.task.name, prompts is None, "prompts"),
        ("model.name", recipe.model.name, model is None, "model"),
    ):
        if name.startswith("in-memory:") and missing:
            raise UsageError(
                f'{field_} = "{name}": was given in memory; call gruppo.reproduce(run, step, {argument}=…) with the same'
            )
    if reward is None:
        return recipe.reward.functions
    return [reward] if callable(reward) else list(reward)


def _link(folder: Path, scratch: Path, step: int) -> list[str]:
    """Make the scratch folder what the run folder was before the step: small files as copies, others as links. Which
    checkpoints are left out, as they are damaged, in words."""
    from gruppo.training.checkpoint import problem_of

    passed = []
    for name in ("recipe.toml", "environment.json", "metrics.jsonl", "events.jsonl"):
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
                    passed.append(f"a nearer checkpoint could not be used: {path.name}: {problem}")
    return passed


def _of_environment(recipe: Recipe) -> Iterator[str]:
    if recipe.environment is not None:
        yield "what the environment said, and its rewards, are taken as they were recorded; it was not asked again"


def _notes(folder: Path, step: int, begun: int) -> Iterator[str]:
    """What is to be known beside the comparison."""
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    from gruppo.models.precision import choose_device
    from gruppo.utils.system import describe

    now = describe(choose_device(environment["chosen"]["device"]))
    for name in ("torch", "transformers"):
        was, is_ = environment["packages"].get(name), now["packages"].get(name)
        if was != is_:
            yield f"{name} was {was} and is {is_}: rounding can differ; --tolerance 1e-4 allows for it"
    if environment["platform"] != now["platform"]:
        yield f"the run was made on {environment['platform']}: rounding can differ; --tolerance 1e-4 allows for it"
    halved = [each for each in environment.get("halvings", []) if begun < each["step"] <= step]
    for each in halved:
        yield f"memory ran out in step {each['step']} while {each['during']}: all of it is made with the smaller size"


def _compared(stored: Mapping[str, Any], made: Mapping[str, Any], apart: Sequence[str] = ()) -> list[str]:
    """Names of the metrics that can be compared: all that the run wrote down, but those of the machine."""
    return [name for name in stored if name != "step" and not name.startswith((*APART, *apart))]


@dataclass(frozen=True)
class _Compare:
    tolerance: float

    def same(self, before: Any, now: Any) -> bool:
        """Equal; numbers by the tolerance."""
        if isinstance(before, float) and isinstance(now, float | int):
            return before == now or abs(before - now) <= self.tolerance * max(abs(before), abs(now))
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            return before.keys() == now.keys() and all(self.same(before[key], now[key]) for key in before)
        if isinstance(before, list) and isinstance(now, list):
            return len(before) == len(now) and all(map(self.same, before, now))
        return bool(before == now)

    def metrics(
        self, stored: Mapping[str, Any], made: Mapping[str, Any], apart: Sequence[str] = ()
    ) -> list[Difference]:
        """Metrics that differ."""
        return [
            Difference(name, stored[name], made.get(name))
            for name in _compared(stored, made, apart)
            if not self.same(stored[name], made.get(name))
        ]

    def rewards(self, stored: Sequence[Sequence[Row]], judgements: Sequence[Sequence[Reward]]) -> Iterator[Difference]:
        """Rewards that the functions do not give again; none where nothing scored."""
        from gruppo.rollout.recorded import reward_of

        for group, (rows, rewards) in enumerate(zip(stored, judgements, strict=bool(judgements))):
            for row, now in zip(rows, rewards, strict=True):
                before, after = _comparable(reward_of(row)), _comparable(now)
                if not self.same(before, after):
                    told = [each if each["steps"] or each["parts"] else each["total"] for each in (before, after)]
                    yield Difference("reward", told[0], told[1], group, row["completion"], row["prompt_id"])

    def rows(self, stored: Sequence[Sequence[Row]], made: Sequence[Sequence[Row]]) -> Iterator[Difference]:
        """Completions that are not trained on as they were."""
        if len(stored) != len(made):
            yield Difference("groups", len(stored), len(made))
        for group, (rows, others) in enumerate(zip(stored, made, strict=False)):
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
    """What of a reward is a matter of the completion: that it failed, but not in which words."""
    return {
        "total": reward.total,
        "parts": dict(reward.parts),
        "steps": {name: [list(each.rewards), list(each.ends)] for name, each in reward.steps.items()},
        "failed": reward.failure is not None,
    }


def describe_reproduction(made: Reproduction) -> str:
    """What was found, as a page of text."""
    source = f"checkpoints/step-{made.begun:06d}" if made.begun else "the start model"
    span = f"step {made.step}" if made.begun == made.step - 1 else f"steps {made.begun + 1} to {made.step}"
    lines = [f"Step {made.step} of {made.path}, made again from {source} and the stored rollouts of {span}"]
    lines += [f"  Note: {note}" for note in made.notes]
    if made.earlier is not None:
        number, found = made.earlier
        lines.append(f"  Step {number}, on the way, is the first that differs:")
        lines += [f"    {_told(each)}" for each in found[:SHOWN]]
    kinds = {
        "rewards": ["reward"],
        "advantages": ["advantages", "trained"],
        "log-probabilities": ["old_logprobs", "ref_logprobs"],
        "values": ["values", "returns"],
        "token ids": ["prompt_id", "prompt_token_ids", "token_ids", "mask"],
    }
    for title, names in kinds.items():
        found = [each for each in made.differences if each.what in names]
        count = len({(each.group, each.completion) for each in found})
        whole = made.rewards if title == "rewards" else made.completions
        if not found and (not whole or title in {"values", "token ids"}):
            continue
        lines.append(f"  {title:<18}{_counted(count, whole, 'completions')}")
        lines += [f"    {_told(each)}" for each in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"    and {len(found) - SHOWN} more; --json has all")
    if any(each.what == "reward" for each in made.differences):
        lines.append("  The rest is computed from the stored rewards.")
    metrics = [each for each in made.differences if each.completion is None]
    lines.append(f"  {'metrics':<18}{_counted(len(metrics), made.metrics, 'metrics')}")
    lines += [f"    {_told(each)}" for each in metrics]
    if made.loss is not None:
        lines.append(f"  loss {made.loss:.6g}, gradient norm {made.gradient_norm or 0.0:.6g}")
    exact = "bit for bit" if not made.tolerance else f"within a relative difference of {made.tolerance:g}"
    lines.append(f"Equal, {exact}." if made.equal else "Different.")
    return "\n".join(lines)


def _counted(different: int, whole: int, what: str) -> str:
    return f"{whole} of {whole} {what} equal" if not different else f"{different} of {whole} {what} differ"


def _told(each: Difference) -> str:
    where = "" if each.completion is None else f" of {each.prompt_id}, group {each.group}, completion {each.completion}"
    token = "" if each.token is None else f", token {each.token}"
    return f"{each.what}{where}{token}: stored {_short(each.stored)}, recomputed {_short(each.recomputed)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
