"""`gruppo check`: what a recipe will take, in memory and in time, and what is wrong with it that a run would show only
after hours. It writes no run folder.

A check takes as long as loading the model, two steps' worth of timing at the most, a comparison of gradients on a few
short completions, and what `seconds` allows for sampling and for rewards each.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data, read_data
from gruppo.preflight.findings import Finding, described
from gruppo.preflight.timing import SECONDS, round_seconds, time_generation, time_update
from gruppo.utils.disk import free_bytes, gigabytes
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.signals import Stop, stop_on_signals

if TYPE_CHECKING:
    from gruppo.models.loading import ModelSource
    from gruppo.models.policy import LanguageModel
    from gruppo.rollout.multi_turn import MultiTurnSampler, OpenedEnvironments
    from gruppo.rollout.workers.rewards import RewardPool
    from gruppo.training.disk_estimate import Disk
    from gruppo.training.inputs import RunInputs
    from gruppo.training.memory_estimate import ChosenSizes, Workload


@dataclass(frozen=True)
class Check:
    """What was found. `step_seconds`: of a step, by phase, `exam_seconds` of each exam of the workload, and
    `round_seconds` of what a reward model learns at the start of each iteration, 0 where it learns nothing; all if
    every completion has max_tokens. Saving is in none, nor are completions sampled from the ends of steps.
    `disk_free`: bytes where runs/NAME would be. `findings`: what was looked at, good and bad."""

    recipe: Recipe
    device: str
    dtype: str
    chosen: ChosenSizes
    workload: Workload
    step_seconds: Mapping[str, float]
    exam_seconds: list[float]
    round_seconds: float
    disk: Disk
    disk_free: int
    findings: Sequence[Finding] = ()

    @property
    def problems(self) -> int:
        """How many findings will spoil a run."""
        return sum(each.severity == "problem" for each in self.findings)

    @property
    def total_seconds(self) -> float:
        """Of all steps, evaluations and iterations."""
        steps = self.recipe.run.steps * math.fsum(self.step_seconds.values())
        exams = zip(self.workload.exams, self.exam_seconds, strict=True)
        rounds = self.recipe.run.iterations * self.round_seconds
        return steps + rounds + math.fsum(exam.times * seconds for exam, seconds in exams)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        sizes = asdict(self.chosen)
        return {
            "device": self.device,
            "dtype": self.dtype,
            "memory": self.recipe.run.memory,
            **{name: sizes[name] for name in ("budget_bytes", "micro_batch_tokens", "slots", "recompute")},
            "memory_bytes": self.chosen.memory.as_dict(),
            "workload": asdict(self.workload),
            "steps": self.recipe.run.steps,
            "step_seconds": {**self.step_seconds, "total": math.fsum(self.step_seconds.values())},
            "exam_seconds": self.exam_seconds,
            "round_seconds": self.round_seconds,
            "total_seconds": self.total_seconds,
            "disk_bytes": self.disk.as_dict(),
            "disk_free_bytes": self.disk_free,
            "findings": [each.as_dict() for each in self.findings],
            "problems": self.problems,
        }


def check_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    quick: bool = False,
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> Check:
    """Read recipe, rewards and data as training would, load the model, choose sizes, time a little of each phase, and
    sample and score a few groups, for at most `seconds` of each. `quick`: no group is sampled.

    Raises UsageError for what training would refuse, and where the memory is too little.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be more than 0; write e.g. 60, or take --quick")
    settings, shown = load_recipe(recipe, overrides), progress or NullProgress()
    data = read_data(settings, settings.reward.functions, None, shown)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        stack.enter_context(stop.interruptible())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _measure(settings, data, shown, stop, folder, 0.0 if quick else seconds)


def _measure(recipe: Recipe, data: Data, progress: Progress, stop: Stop, folder: Path, seconds: float) -> Check:
    from gruppo.models.loading import find_model
    from gruppo.models.lora import check_adapters
    from gruppo.models.precision import choose_device, choose_dtype
    from gruppo.rollout.multi_turn import open_multi_turn
    from gruppo.training.inputs import workload
    from gruppo.training.policy_loss import find_surrogate
    from gruppo.training.setup import make_pool
    from gruppo.training.sizing import disk_of, load_and_choose

    device = choose_device(recipe.model.device)
    dtype = str(choose_dtype(recipe.model.dtype, device)).removeprefix("torch.")
    find_surrogate(recipe.method.surrogate)
    with ExitStack() as stack:
        pool = None
        opened = open_multi_turn(recipe, folder / "environment.log", progress, stack)
        if recipe.method.source != "dataset":
            log = folder / "rewards.log"
            pool = stack.enter_context(make_pool(recipe, recipe.reward.functions, data, log, progress, opened))
        source = find_model(recipe.model.name, progress, trust_remote_code=recipe.model.trust_remote_code)
        check_adapters(source, recipe.model.lora)
        inputs, refused = _tokenize(recipe, data, source, progress, opened)
        policy, chosen = load_and_choose(recipe, source, inputs, device, dtype, progress)
        episodes = opened.episodes(policy.tokenizer, policy.eos_ids, inputs.all_prompts) if opened else None
        asked = workload(recipe, inputs)
        stop.check()
        with progress.bar("Timing", None, ""):
            prompt, drawn = time_generation(policy, inputs, chosen.slots, stop)
            forward, backward, optimizer = time_update(recipe, policy, asked, chosen)
        rounds = math.ceil(asked.completions / chosen.slots)
        tokens = sum(each + sum(own) for batch in asked.micro_batches(chosen.micro_batch_tokens) for each, own in batch)
        passes = (
            int(recipe.method.kl_coef > 0 or recipe.method.credit == "pair")
            + int(recipe.method.needs_scores)
            + int(recipe.method.needs_critic)
            + int(recipe.reward_model is not None)
            + recipe.method.inner_updates * chosen.recompute
        )
        drawing = prompt * asked.prompts_per_step * asked.prompt_tokens + drawn * rounds * asked.max_tokens
        check = Check(
            recipe=recipe,
            device=device.type,
            dtype=dtype,
            chosen=chosen,
            workload=asked,
            step_seconds={
                "generate": 0.0 if recipe.method.source == "dataset" else drawing,
                "score": forward * passes * tokens,
                "update": (1 + recipe.method.needs_critic)  # a value model is updated as often
                * recipe.method.inner_updates
                * ((forward + backward) * tokens + optimizer),
            },
            exam_seconds=[
                prompt * exam.questions * exam.question_tokens
                + drawn * math.ceil(exam.answers / chosen.slots) * exam.answer_tokens
                for exam in asked.exams
            ],
            round_seconds=round_seconds(recipe, drawing, forward * tokens, backward * tokens, optimizer),
            disk=disk_of(recipe, policy, inputs),
            disk_free=free_bytes(Path("runs") / recipe.run.name),
        )
        seen = [
            *_inspect(check, policy, inputs, refused),
            *_try(check, policy, inputs, pool, seconds, progress, stop, episodes),
        ]
        return replace(check, findings=seen)


def _tokenize(
    recipe: Recipe, data: Data, source: ModelSource, progress: Progress, opened: OpenedEnvironments | None
) -> tuple[RunInputs, str | None]:
    """The prompts, and what training says where it refuses some that are too long: then without these."""
    from gruppo.training.inputs import tokenize_data

    try:
        return tokenize_data(recipe, data, source, progress, opened), None
    except UsageError as error:
        filtering = replace(data, training=[replace(part, filter_overlong=True) for part in data.training])
        try:
            inputs = tokenize_data(recipe, filtering, source, progress, opened)
        except UsageError:
            raise error from None
        return inputs, str(error)


def _inspect(check: Check, policy: LanguageModel, inputs: RunInputs, refused: str | None) -> list[Finding]:
    """All that is seen without sampling."""
    from gruppo.preflight import static_checks as inspection

    recipe, prompts = check.recipe, list(inputs.prompts)
    most = recipe.sampling.max_tokens
    limit = min(policy.context - most, *(task.max_prompt_tokens or policy.context for task in recipe.tasks))
    return [
        *inspection.inspect_recipe(recipe),
        *inspection.inspect_model(policy, check.dtype),
        *inspection.inspect_tokens(policy),
        *inspection.inspect_start(policy.tokenizer, prompts),
        *inspection.inspect_template(policy, prompts),
        inspection.inspect_lengths(prompts, limit, most, inputs.filtered, refused),
        *inspection.inspect_given(inputs.given, most),
        *inspection.inspect_overlap(prompts, inputs.questions),
        _memory(check, policy),
        _time(check),
        _disk(check),
        _kernels(policy),
    ]


def _memory(check: Check, policy: LanguageModel) -> Finding:
    from gruppo.training.memory_estimate import process_bytes
    from gruppo.utils.system import free_memory

    memory, chosen = check.chosen.memory, check.chosen
    there = free_memory(policy.device) + process_bytes(policy.device)
    told = f"{memory.peak / 1e9:.2f} GB at the peak, of {chosen.budget_bytes / 1e9:.2f} that run.memory allows"
    figures = {"peak_bytes": memory.peak, "budget_bytes": chosen.budget_bytes, "there_bytes": there}
    if memory.peak > there:
        return Finding(
            "problem", "memory", f"{told}; the machine has {there / 1e9:.2f} GB",
            "the run would be killed, or swap until it stands still",
            f'write run.memory = "{0.9 * there / 1e9:.1f} GB", or end what else is running', figures,
        )  # fmt: skip
    if chosen.recompute:
        return Finding(
            "note", "memory", f"{told}; activations are computed again in backward, as they do not fit",
            "an update takes a third longer", "allow more by run.memory, or a smaller sampling.max_tokens", figures,
        )  # fmt: skip
    return Finding("ok", "memory", told, figures=figures)


def _time(check: Check) -> Finding:
    step = math.fsum(check.step_seconds.values())
    told = f"{step:.1f} s a step and {_duration(check.total_seconds)} in all, if every completion is the longest"
    return Finding("ok", "time", told, figures={"step_seconds": step, "total_seconds": check.total_seconds})


def _disk(check: Check) -> Finding:
    disk, free, where = check.disk, check.disk_free, Path("runs") / check.recipe.run.name
    told = f"{gigabytes(disk.peak)} at its most, {gigabytes(free)} are free for {where}"
    figures = {"peak_bytes": disk.peak, "free_bytes": free}
    if disk.peak <= free:
        return Finding("ok", "disk", told, figures=figures)
    return Finding(
        "problem", "disk", told, "the run would stop where the disk is full",
        "make room, write run folders elsewhere by --out, or a larger run.checkpoint_every", figures,
    )  # fmt: skip


def _kernels(policy: LanguageModel) -> Finding:
    from gruppo.models.ops.cpu.build import why_missing

    missing = why_missing(policy.dtype)
    if policy.device.type != "cpu" or missing is None:
        return Finding("ok", "kernels", "compiled" if policy.device.type == "cpu" else "those of torch")
    return Finding(
        "note", "kernels", f"none for this model: {missing}", "a step takes up to half as long again",
        "install a C compiler; nothing else changes", {},
    )  # fmt: skip


def _try(
    check: Check,
    policy: LanguageModel,
    inputs: RunInputs,
    pool: RewardPool | None,
    seconds: float,
    progress: Progress,
    stop: Stop,
    episodes: MultiTurnSampler | None,
) -> list[Finding]:
    """All that a few completions show, if there are `seconds` for them, and the gradient."""
    from gruppo.preflight import smoke_test as trial
    from gruppo.rollout.environments.client import NAME

    recipe, chosen = check.recipe, check.chosen
    found = []
    if pool is None:
        found.append(trial.skipped(f'method.source = "{recipe.method.source}" brings them'))
    elif not seconds:
        found.append(trial.skipped("--quick"))
    else:
        made = trial.try_out(recipe, policy, inputs, pool, chosen.slots, seconds, progress, stop, episodes)
        weights = dict(zip(pool.names, pool.weights, strict=True))
        if episodes is not None and episodes.weight is not None:
            weights[NAME] = episodes.weight
        found += trial.judge_trial(recipe, made, weights, seconds)
        if made.completions:
            groups, heat = [*made.groups, *made.unscored], recipe.sampling.temperature
            found.append(trial.compare_logprobs(policy, groups, heat, chosen.micro_batch_tokens))
    stop.check()
    return [*found, trial.compare_gradient(recipe, policy, inputs, chosen, progress, stop)]


def describe_check(check: Check) -> str:
    """The findings as a page of text."""
    chosen, asked, memory = check.chosen, check.workload, check.chosen.memory
    held = check.recipe.run.memory
    source = f'run.memory = "{held}"' if isinstance(held, str) else f"run.memory = {held:g} of what is free"
    phases = ["sampling", "training", *(["evaluation"] if asked.answers else [])]
    columns = {phase: memory.parts(phase) for phase in phases}
    lines = [f"{'Memory, in GB':<24}" + "".join(f"{phase:>12}" for phase in phases)]
    for name in dict.fromkeys(name for parts in columns.values() for name in parts):
        cells = "".join(
            f"{columns[phase][name] / 1e9:>12.2f}" if name in columns[phase] else " " * 12 for phase in phases
        )
        lines.append(f"  {name:<22}{cells}".rstrip())
    lines.append(f"  {'together':<22}" + "".join(f"{sum(columns[phase].values()) / 1e9:>12.2f}" for phase in phases))
    recompute = "computed again in backward, as they do not fit" if chosen.recompute else "kept"
    lines += [
        f"  peak {memory.peak / 1e9:.2f} of a budget of {chosen.budget_bytes / 1e9:.2f} ({source})",
        "",
        f"Chosen: micro-batches of {chosen.micro_batch_tokens} tokens, {chosen.slots} completions in flight,",
        f"activations {recompute}; {check.dtype} on {check.device}",
        "",
        f"Time, if every completion has {asked.max_tokens} tokens and every prompt {asked.prompt_tokens};",
        "measured on short completions, rewards and saving not counted",
    ]
    lines += [f"  {name:<22}{seconds:>12.1f} s a step" for name, seconds in check.step_seconds.items()]
    step = math.fsum(check.step_seconds.values())
    lines.append(f"  {'a step':<22}{step:>12.1f} s, {check.recipe.run.steps} steps")
    for exam, seconds in zip(asked.exams, check.exam_seconds, strict=True):
        lines.append(f"  {exam.name or 'an evaluation':<22}{seconds:>12.1f} s × {exam.times}")
    if check.round_seconds:
        lines.append(f"  {'the reward model':<22}{check.round_seconds:>12.1f} s × {check.recipe.run.iterations}")
    lines.append(f"  {'the whole run':<22}{_duration(check.total_seconds):>12}")
    return "\n".join([*lines, "", *_describe_disk(check), "", described(check.findings)])


def _describe_disk(check: Check) -> list[str]:
    disk, where = check.disk, Path("runs") / check.recipe.run.name
    lines = [f"Disk, if every completion has {check.workload.max_tokens} tokens"]
    lines += [f"  {name:<22}{gigabytes(size):>12}" for name, size in disk.parts.items()]
    lines.append(f"  {'the finished run':<22}{gigabytes(disk.total):>12}")
    lines.append(f"  {'at its most':<22}{gigabytes(disk.peak):>12}, while a checkpoint is written")
    lines.append(f"  {'free':<22}{gigabytes(check.disk_free):>12} for {where}")
    return lines


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
