"""`gruppo check`: estimate memory, time and disk for a recipe, and report problems.

It finds problems that a run would show only after hours, and writes no run folder. It takes as long as loading the
model, at most two steps' worth of timing, a gradient check on a few short completions, and at most `seconds` each of
sampling and of rewards.
"""

from __future__ import annotations

import math
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.data.chat_template import end_renderer
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data, read_data, require_independent_audit
from gruppo.preflight.findings import WIDTH, Finding, format_findings
from gruppo.preflight.timing import SECONDS, round_seconds, time_generation, time_update
from gruppo.runs.trackers import require_installed
from gruppo.utils.disk import free_bytes, gigabytes
from gruppo.utils.imports import installed
from gruppo.utils.progress import NullProgress, Progress
from gruppo.utils.signals import Stop, stop_on_signals
from gruppo.utils.waiting import watched

if TYPE_CHECKING:
    from gruppo.engines.base import Engine
    from gruppo.models.loading import ModelSource
    from gruppo.models.policy import LanguageModel
    from gruppo.preflight.placement import Placement
    from gruppo.rollout.episodes import Episodes, Opened
    from gruppo.rollout.workers.rewards import RewardPool
    from gruppo.training.disk_estimate import Disk
    from gruppo.training.inputs import RunInputs
    from gruppo.training.memory_estimate import ChosenSizes, Workload


@dataclass(frozen=True)
class Check:
    """The result of a check.

    `step_seconds`: seconds per step, by phase. `eval_set_seconds`: seconds per evaluation of each set in the workload.
    `round_seconds`: seconds for the reward model per iteration, 0 if it is not trained. All of these assume completions
    of max_tokens; they do not include saving, nor completions sampled from the ends of steps. `disk_free`: free bytes
    at runs/NAME. `placement`: where the processes of a [cluster] go, None for a single one. `findings`: the results of
    all checks, good and bad.
    """

    recipe: Recipe
    device: str
    dtype: str
    chosen: ChosenSizes
    workload: Workload
    step_seconds: Mapping[str, float]
    eval_set_seconds: list[float]
    round_seconds: float
    disk: Disk
    disk_free: int
    placement: Placement | None = None
    findings: Sequence[Finding] = ()

    @property
    def problems(self) -> int:
        """Number of findings that will spoil a run."""
        return sum(finding.severity == "problem" for finding in self.findings)

    @property
    def seconds_per_step(self) -> float:
        """Seconds of a step: of all phases, or of the longer side if engines on devices of their own sample ahead."""
        total, sampling = math.fsum(self.step_seconds.values()), self.step_seconds["generate"]
        overlaps = self.recipe.lag and (self.recipe.engine.has_own_process or self.workload.engines)
        return max(sampling, total - sampling) if overlaps else total

    @property
    def total_seconds(self) -> float:
        """Seconds of all steps, evaluations and iterations."""
        steps = self.recipe.run.steps * self.seconds_per_step
        eval_sets = zip(self.workload.eval_sets, self.eval_set_seconds, strict=True)
        rounds = self.recipe.run.iterations * self.round_seconds
        return steps + rounds + math.fsum(eval_set.times * seconds for eval_set, seconds in eval_sets)

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
            "step_seconds": {**self.step_seconds, "total": self.seconds_per_step},
            "eval_set_seconds": self.eval_set_seconds,
            "round_seconds": self.round_seconds,
            "total_seconds": self.total_seconds,
            "disk_bytes": self.disk.as_dict(),
            "disk_free_bytes": self.disk_free,
            "placement": None if self.placement is None else self.placement.as_dict(),
            "findings": [finding.as_dict() for finding in self.findings],
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
    """Check a recipe.

    Reads recipe, rewards and data as training would, loads the model, chooses sizes and times a little of each phase.
    Then it samples and scores a few groups, for at most `seconds` each. `quick`: skip this smoke test.

    Raises UsageError if training would refuse the recipe, or if there is too little memory.
    """
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be more than 0; write e.g. 60, or use --quick")
    settings, shown = load_recipe(recipe, overrides), progress or NullProgress()
    require_installed(settings.run.trackers)
    require_independent_audit(settings, settings.reward.functions)
    data = read_data(settings, settings.reward.functions, None, shown)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals())
        shown, _ = stack.enter_context(watched(shown))
        stack.enter_context(stop.interruptible())
        stack.callback(end_renderer)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return _check(settings, data, shown, stop, folder, 0.0 if quick else seconds)


def _check(recipe: Recipe, data: Data, progress: Progress, stop: Stop, folder: Path, seconds: float) -> Check:
    from gruppo.engines import build_engine, check_engine
    from gruppo.models.attention.backends import check_compute
    from gruppo.models.loading import find_model
    from gruppo.models.lora import check_adapters
    from gruppo.preflight.placement import check_placement, measure_machine, measure_sent, place_processes
    from gruppo.rollout.multi_turn import open_multi_turn
    from gruppo.training.inputs import with_steps, workload
    from gruppo.training.lean_optimizers import check_state
    from gruppo.training.policy_loss import find_surrogate
    from gruppo.training.setup import make_pool
    from gruppo.training.sizing import disk_of, load_and_choose

    device, compute = check_compute(recipe.model)
    dtype = str(compute).removeprefix("torch.")
    check_engine(recipe, device, compute)
    check_state(recipe.optimizer.state)
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
        recipe = with_steps(recipe, inputs, progress)
        policy, chosen = load_and_choose(recipe, source, inputs, device, dtype, progress)
        episodes = opened.episodes(policy.tokenizer, policy.eos_ids, inputs.all_prompts) if opened else None
        work = workload(recipe, inputs)
        stop.check()
        engine = build_engine(policy, chosen.slots, settings=recipe.engine, length=work.longest)
        stack.callback(engine.close)
        with progress.bar("Timing", None, ""):
            prompt_token, decoding_step = time_generation(engine, inputs, chosen.slots, stop)
            engine.sleep()
            forward, backward, optimizer = time_update(recipe, policy, work, chosen)
        rounds = math.ceil(work.completions / chosen.slots)
        tokens = sum(
            prompt + sum(completions)
            for batch in work.micro_batches(chosen.micro_batch_tokens)
            for prompt, completions in batch
        )
        passes = (
            int(recipe.method.kl_coef > 0 or recipe.method.credit == "pair")
            + int(recipe.method.needs_scores)
            + int(recipe.method.needs_critic)
            + int(recipe.reward_model is not None)
            + recipe.method.inner_updates * chosen.recompute
            + (1 - 1 / recipe.method.minibatches) * (recipe.method.old_logprobs == "trainer")
        )
        generation = (
            prompt_token * work.prompts_per_step * work.prompt_tokens + decoding_step * rounds * work.max_tokens
        )
        check = Check(
            recipe=recipe,
            device=device.type,
            dtype=dtype,
            chosen=chosen,
            workload=work,
            step_seconds={
                "generate": 0.0 if recipe.method.source == "dataset" else generation,
                "score": forward * passes * tokens,
                "update": (1 + recipe.method.needs_critic)  # the value model gets as many updates
                * recipe.method.inner_updates
                * ((forward + backward) * tokens + recipe.method.minibatches * optimizer),
            },
            eval_set_seconds=[
                prompt_token * eval_set.questions * eval_set.question_tokens
                + decoding_step * math.ceil(eval_set.answers / chosen.slots) * eval_set.answer_tokens
                for eval_set in work.eval_sets
            ],
            round_seconds=round_seconds(recipe, generation, forward * tokens, backward * tokens, optimizer),
            disk=disk_of(recipe, policy, inputs),
            disk_free=free_bytes(Path("runs") / recipe.run.name),
        )
        placed: list[Finding] = []
        if recipe.cluster is not None and (recipe.cluster.trainers > 1 or recipe.cluster.uses_ray):
            machine = measure_machine(device)
            placement = place_processes(recipe, chosen.memory, measure_sent(recipe, policy), machine)
            check = replace(check, placement=placement)
            placed = [] if placement is None else check_placement(recipe, placement, machine)
        findings = [
            *_static_findings(check, policy, inputs, refused),
            *placed,
            *_smoke_test_findings(check, policy, engine, inputs, pool, seconds, progress, stop, episodes),
        ]
        return replace(check, findings=findings)


def _tokenize(
    recipe: Recipe, data: Data, source: ModelSource, progress: Progress, opened: Opened | None
) -> tuple[RunInputs, str | None]:
    """The tokenized prompts and None; or, if training would refuse some as too long, the others and its message."""
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


def _static_findings(check: Check, policy: LanguageModel, inputs: RunInputs, refused: str | None) -> list[Finding]:
    """The findings that need no sampling."""
    from gruppo.preflight import row_checks, static_checks, token_checks

    recipe, prompts = check.recipe, list(inputs.prompts)
    most = recipe.sampling.max_tokens
    limit = min(policy.context - most, *(task.max_prompt_tokens or policy.context for task in recipe.tasks))
    return [
        *static_checks.check_fields(recipe),
        *static_checks.check_engine_choice(recipe, check.device, installed("vllm")),
        *static_checks.check_lag(recipe),
        *static_checks.check_model(policy, check.dtype),
        *static_checks.check_end_tokens(policy),
        *token_checks.check_token_text(policy, prompts, inputs.offline),
        *static_checks.check_bos(policy.tokenizer, prompts),
        *static_checks.check_chat_template(policy, prompts),
        static_checks.check_prompt_lengths(prompts, limit, most, inputs.filtered, refused),
        *static_checks.check_dataset_completions(inputs.offline, most),
        *static_checks.check_overlap(prompts, inputs.questions),
        *row_checks.check_answers(prompts, bool(inputs.offline)),
        *row_checks.check_tool_values(prompts),
        *row_checks.check_evaluation_format(recipe, prompts, inputs.eval_sets),
        _memory(check, policy),
        _time(check),
        _disk(check),
        _kernels(policy),
    ]


def _memory(check: Check, policy: LanguageModel) -> Finding:
    from gruppo.models.footprint import process_bytes
    from gruppo.utils.system import free_memory

    memory, chosen = check.chosen.memory, check.chosen
    available = free_memory(policy.device) + process_bytes(policy.device)
    what = f"peak {memory.peak / 1e9:.2f} GB; run.memory allows {chosen.budget_bytes / 1e9:.2f} GB"
    figures = {"peak_bytes": memory.peak, "budget_bytes": chosen.budget_bytes, "there_bytes": available}
    if memory.peak > available:
        return Finding(
            "problem", "memory", f"{what}, but only {available / 1e9:.2f} GB are available",
            "the run would be killed, or become very slow through swapping",
            f'write run.memory = "{0.9 * available / 1e9:.1f} GB", or stop other programs', figures,
        )  # fmt: skip
    if chosen.recompute:
        return Finding(
            "note", "memory", f"{what}; activations do not fit and are recomputed in backward",
            "an update takes a third longer", "increase run.memory, or reduce sampling.max_tokens", figures,
        )  # fmt: skip
    return Finding("ok", "memory", what, figures=figures)


def _time(check: Check) -> Finding:
    step = check.seconds_per_step
    what = f"{step:.1f} s per step, {_duration(check.total_seconds)} in all, if every completion has max_tokens"
    return Finding("ok", "time", what, figures={"step_seconds": step, "total_seconds": check.total_seconds})


def _disk(check: Check) -> Finding:
    disk, free, where = check.disk, check.disk_free, Path("runs") / check.recipe.run.name
    what = f"at most {gigabytes(disk.peak)}; {gigabytes(free)} free for {where}"
    figures = {"peak_bytes": disk.peak, "free_bytes": free}
    if disk.peak <= free:
        return Finding("ok", "disk", what, figures=figures)
    return Finding(
        "problem", "disk", what, "the run would stop when the disk is full",
        "free some space, write the run folder to another disk with --out, or increase run.checkpoint_every", figures,
    )  # fmt: skip


def _kernels(policy: LanguageModel) -> Finding:
    from gruppo.models.ops.cpu.build import why_missing

    missing = why_missing(policy.dtype)
    if policy.device.type != "cpu" or missing is None:
        return Finding("ok", "kernels", "compiled" if policy.device.type == "cpu" else "torch's")
    return Finding(
        "note", "kernels", f"none for this model: {missing}", "a step takes up to 50% longer",
        "install a C compiler; nothing else changes", {},
    )  # fmt: skip


def _smoke_test_findings(
    check: Check,
    policy: LanguageModel,
    engine: Engine,
    inputs: RunInputs,
    pool: RewardPool | None,
    seconds: float,
    progress: Progress,
    stop: Stop,
    episodes: Episodes | None,
) -> list[Finding]:
    """The findings of the smoke test, if `seconds` is not 0, and of the gradient check."""
    from gruppo.preflight import noise_check, smoke_test
    from gruppo.rollout.environments.client import NAME

    recipe, chosen = check.recipe, check.chosen
    found = []
    if pool is None:
        found.append(smoke_test.skipped(f'method.source = "{recipe.method.source}"'))
    elif not seconds:
        found.append(smoke_test.skipped("--quick"))
    else:
        test = smoke_test.run_smoke_test(recipe, engine, inputs, pool, chosen.slots, seconds, progress, stop, episodes)
        engine.sleep()
        weights = dict(zip(pool.names, pool.weights, strict=True))
        if episodes is not None and episodes.weight is not None:
            weights[NAME] = episodes.weight
        found += smoke_test.report_smoke_test(recipe, test, weights, seconds)
        if test.completions:
            groups, temperature = [*test.groups, *test.unscored], recipe.sampling.temperature
            found.append(smoke_test.compare_logprobs(policy, groups, temperature, chosen.micro_batch_tokens))
        found += noise_check.estimate_noise(recipe, policy, test.groups, weights, chosen.micro_batch_tokens, progress)
    stop.check()
    return [*found, smoke_test.compare_gradient(recipe, policy, inputs, chosen, progress, stop)]


_PARTS = {  # of memory, if their names in JSON need an explanation
    "reward_model": "reward model",
    "prepared": "prepared weights",
    "cache": "KV cache",
    "work": "temporaries",
    "versions": "weights to sample from",
    "gathered": "gathered weights",
}
_LARGEST = 3  # maximum number of memory parts shown per phase
_LARGEST_OF_RANK = 5  # the same of a process with [cluster]


def describe_check(check: Check) -> str:
    """The estimates and findings as text of at most 80 columns."""
    estimated = {"memory", "time", "disk"}  # shown as estimates, and as findings only if not ok
    findings = [finding for finding in check.findings if finding.subject not in estimated or finding.severity != "ok"]
    parts = [_describe_memory(check), _describe_placement(check), _describe_time(check), _describe_disk(check)]
    return "\n".join([*(line for part in parts if part for line in [*part, ""]), format_findings(findings)])


def _describe_memory(check: Check) -> list[str]:
    memory, setting = check.chosen.memory, check.recipe.run.memory
    source = f'run.memory = "{setting}"' if isinstance(setting, str) else f"run.memory = {setting:g} of free memory"
    budget = check.chosen.budget_bytes
    lines = _wrapped(f"Memory, in GB: peak {memory.peak / 1e9:.2f}, budget {budget / 1e9:.2f} ({source})")
    for phase in ("sampling", "training", *(["evaluation"] if check.workload.answers else [])):
        parts = memory.parts(phase)
        lines += _row(phase, f"{sum(parts.values()) / 1e9:.2f}", _shown_parts(parts, _LARGEST), 10, 6)
    return lines


def _shown_parts(parts: Mapping[str, int], most: int) -> str:
    """The largest parts of memory, in GB, and all others together. Parts under 5 MB would print as 0.00."""
    largest = sorted((name for name in parts if parts[name] >= 5e6), key=lambda name: -parts[name])[:most]
    shown = [f"{_PARTS.get(name, name)} {parts[name] / 1e9:.2f}" for name in largest]
    others = sum(size for name, size in parts.items() if name not in largest)
    return ", ".join([*shown, f"others {others / 1e9:.2f}"])


def _describe_placement(check: Check) -> list[str]:
    placement = check.placement
    if placement is None:
        return []
    lines = ["Placement, in GB of each process on each of its devices"]
    for member in placement.members:
        parts = f": {_shown_parts(member.parts, _LARGEST_OF_RANK)}" if member.parts else ""
        held = f"{member.bytes / 1e9:.2f}" if member.parts else ""
        lines += _row(member.name, held, f"{member.place}{parts}", 12, 6)
    if placement.ray:
        lines += _row("Ray", "", placement.ray, 12, 6)
    if not placement.transfer_bytes:
        return lines
    size, seconds = placement.transfer_bytes / 1e9, placement.transfer_seconds
    text = (
        f"{size:.2f} GB of weights after each step; {seconds:.2g} s for one copy at {placement.rate / 1e9:.1f} GB/s, "
        "which is the rate of this machine's memory and not of a network"
    )
    return lines + _row("transfer", "", text, 12, 6)


def _describe_time(check: Check) -> list[str]:
    work, run, phases = check.workload, check.recipe.run, check.step_seconds
    lengths = f"if all completions have {work.max_tokens} tokens and prompts {work.prompt_tokens}"
    lines = _wrapped(f"Time, {lengths}; no rewards, no saving")
    by_phase = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
    ahead = f"; sampling is {check.recipe.lag} ahead" if check.recipe.lag else ""
    lines += _row("per step", f"{check.seconds_per_step:.1f} s", by_phase + ahead)
    for eval_set, seconds in zip(work.eval_sets, check.eval_set_seconds, strict=True):
        lines += _row(eval_set.name or "evaluation", f"{seconds:.1f} s", f"{eval_set.times} times")
    if check.round_seconds:
        lines += _row("reward model", f"{check.round_seconds:.1f} s", f"{run.iterations} times")
    return lines + _row("in all", _duration(check.total_seconds), f"{run.steps} steps, evaluations included")


def _describe_disk(check: Check) -> list[str]:
    disk, where = check.disk, Path("runs") / check.recipe.run.name
    lines = _wrapped(f"Disk, if all completions have {check.workload.max_tokens} tokens")
    checkpoints = f"{disk.kept} checkpoint{'s' if disk.kept != 1 else ''} of {gigabytes(disk.checkpoint)}"
    lines += _row("finished run", gigabytes(disk.total), f"with {checkpoints}")
    if disk.peak > disk.total:
        lines += _row("peak", gigabytes(disk.peak), "while a checkpoint is written")
    return lines + _row("free", gigabytes(check.disk_free), f"for {where}")


def _row(name: str, value: str, text: str, name_width: int = 13, value_width: int = 9) -> list[str]:
    """A line with name, value and text, continued below the text. The widths are in columns."""
    head = f"  {name:<{name_width}}{value:>{value_width}}  "
    return textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
