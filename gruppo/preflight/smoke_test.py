"""What a few dozen completions of the model show before a run: where they end, what the rewards say of them and how
long they take, how many groups would carry a signal, and whether engine and trainer give the same log-probabilities."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gruppo.algorithms.filtering import mark_trained
from gruppo.config.method_section import Method
from gruppo.config.recipe import Recipe
from gruppo.engines import build_engine
from gruppo.engines.base import SamplingParams
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.preflight.gradient_check import Derivative, compare, shortened, signal, with_arbitrary_rewards
from gruppo.rollout.multi_turn import MultiTurnSampler
from gruppo.rollout.offline import offline_groups
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.scoring import score_groups
from gruppo.rollout.workers.rewards import RewardPool
from gruppo.training.inputs import RunInputs
from gruppo.training.memory_estimate import ChosenSizes
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop
from gruppo.utils.stats import wilson_interval

PROMPTS = 32  # whose groups are sampled, at the most
COMPARED_TOKENS = 4096  # whose log-probabilities are compared, at the most
GRADED = 2, 4  # prompts and completions of each that the gradient is compared on
MEAN_DIFFERENCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.05}  # nats; see docs/decisions.md
GRADIENT_ERROR = {"float64": 1e-4, "float32": 1e-2, "bfloat16": 0.25}
ENOUGH = 22  # groups: where none of them carries a signal, fewer than 15 % of all do (95 %)
ABSTAINED = 0.2  # share of completions from which on it is a problem
FEW_SIGNALS = 0.2
ALMOST_ALL = 0.5  # of the completions cut


class _Late(Exception):  # noqa: N818  not an error
    """The time that was given is over."""


class _Deadline(Stop):
    """A stop that also ends what takes too long."""

    def __init__(self, stop: Stop, seconds: float) -> None:
        super().__init__()
        self.stop, self.end = stop, time.monotonic() + seconds

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for, _Late where the time is over."""
        self.stop.check()
        if time.monotonic() > self.end:
            raise _Late


@dataclass
class Trial:
    """Groups with their rewards; `unscored`: those of the last round, where rewards took too long. Seconds of sampling
    and of rewarding these groups, on this machine; `late`: the time was over before the last round was done; `whole`:
    all that were wanted are there."""

    groups: list[Group] = field(default_factory=list)
    unscored: list[Group] = field(default_factory=list)
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0
    late: bool = False
    whole: bool = False

    @property
    def tells(self) -> bool:
        """Whether it is many enough for what none of its groups shows."""
        return self.whole or len(self.groups) >= ENOUGH

    @property
    def completions(self) -> list[Completion]:
        """All that were sampled."""
        return [each for group in [*self.groups, *self.unscored] for each in group.completions]

    @property
    def rewards(self) -> list[Reward]:
        """All that were given."""
        return [each for group in self.groups for each in group.rewards]


def try_out(
    recipe: Recipe,
    policy: LanguageModel,
    inputs: RunInputs,
    pool: RewardPool,
    slots: int,
    seconds: float,
    progress: Progress,
    stop: Stop,
    episodes: MultiTurnSampler | None = None,
) -> Trial:
    """Sample and score groups as the first steps of a run would, until there are enough or `seconds` are over, for
    sampling and for rewards each. A round has twice as many groups as the one before, if the time seems to allow them,
    so that a slow machine shows some."""
    engine, size, made = build_engine(policy, slots), recipe.sampling.group_size, Trial()
    wanted, most = min(PROMPTS, len(inputs.prompts)), max(1, slots // size)
    state = {"global_step": 0, "max_steps": recipe.run.steps, "max_tokens": recipe.sampling.max_tokens}
    count = 1
    while count and not made.late:
        cursor = len(made.groups)
        prompts = inputs.prompts.draw(cursor, count)
        streams = [[(recipe.run.seed, 0, cursor + i, j) for j in range(size)] for i in range(count)]
        start = time.monotonic()
        try:
            until = _Deadline(stop, seconds - made.sampling_seconds)
            asked = engine, prompts, streams, inputs.sampling, progress, until, "Sampling a trial"
            if episodes is None:
                sampled = sample_groups(*asked)
            else:
                prompts, sampled = episodes.play(*asked)
            made.sampling_seconds += time.monotonic() - start
            start = time.monotonic()
            until = _Deadline(stop, seconds - made.reward_seconds)
            made.unscored = [
                Group(prompt, each, [Reward(None, {})] * size) for prompt, each in zip(prompts, sampled, strict=True)
            ]
            weight = None if episodes is None else episodes.weight
            made.groups += score_groups(prompts, sampled, pool, state, Metrics(), progress, until, weight)
            made.unscored = []
            made.reward_seconds += time.monotonic() - start
        except _Late:
            made.late = True
        each = max(made.sampling_seconds, made.reward_seconds) / max(1, len(made.groups))
        left = seconds - max(made.sampling_seconds, made.reward_seconds)
        count = min(2 * count, most, wanted - len(made.groups), int(left / each) if each else wanted)
    made.whole = len(made.groups) == wanted
    return made


def judge_trial(recipe: Recipe, trial: Trial, weights: Mapping[str, float], seconds: float) -> list[Finding]:
    """Findings on completions, rewards and signals of a trial. `weights`: of whatever rewards, by name."""
    if not trial.completions:
        each = recipe.sampling.group_size
        return [Finding(
            "warning", "completions", f"not one group of {each} completions of up to {recipe.sampling.max_tokens} "
            f"tokens was sampled in {seconds:g} s", "completions, rewards and signals were not looked at",
            "give more time with --seconds",
        )]  # fmt: skip
    found = [judge_completions(trial.completions, recipe)]
    if trial.unscored:
        found.append(Finding(
            "problem", "reward", f"it did not come to an end on {sum(len(g.completions) for g in trial.unscored)} "
            f"completions in {seconds:g} s", "steps would wait for it, and completions abstain",
            "make it quicker, write more reward.workers, or give more time with --seconds",
        ))  # fmt: skip
    if trial.groups:
        found += judge_rewards(recipe, trial, weights)
    if any(each.total is not None for each in trial.rewards):
        found.append(judge_signal(recipe, trial, weights))
    return found


def judge_completions(completions: Sequence[Completion], recipe: Recipe) -> Finding:
    """Whether completions end by themselves."""
    lengths = sorted(len(each.token_ids) for each in completions)
    cut = sum(each.finish_reason == "length" for each in completions)
    share, most = cut / len(completions), recipe.sampling.max_tokens
    low, high = wilson_interval(cut, len(completions))
    figures = {
        "completions": len(completions), "cut": cut, "interval": [low, high], "length_mean": statistics.mean(lengths),
        "length_median": statistics.median(lengths),
    }  # fmt: skip
    told = (
        f"{cut} of {len(completions)} are cut at {most} tokens ({share:.0%}; 95 % interval {low:.0%} to {high:.0%}), "
    )
    told += f"half have fewer than {lengths[len(lengths) // 2] + 1}"
    masked = recipe.method.mask_truncated
    if cut == len(completions):
        return Finding(
            "problem" if masked else "warning", "completions", f"{told}; none of them emits an end token",
            "method.mask_truncated leaves none to be trained on" if masked
            else "answers that are not finished are judged, and nothing teaches the model to end",
            "write a larger sampling.max_tokens, or see that the chat template ends answers with an end token", figures,
        )  # fmt: skip
    if share >= ALMOST_ALL:
        return Finding(
            "warning", "completions", told, "answers that are not finished are judged",
            "write a larger sampling.max_tokens, or ask for shorter answers", figures,
        )  # fmt: skip
    return Finding("ok", "completions", told, figures=figures)


def judge_rewards(recipe: Recipe, trial: Trial, weights: Mapping[str, float]) -> list[Finding]:
    """What the rewards gave, how often nothing, and how long they took."""
    rewards = trial.rewards
    totals = [each.total for each in rewards if each.total is not None]
    silent, found = len(rewards) - len(totals), []
    figures: dict[str, Any] = {"completions": len(rewards), "abstained": silent}
    if silent:
        reasons = Counter(each.failure or "every function gave None" for each in rewards if each.total is None)
        reason, _ = reasons.most_common(1)[0]
        grave = silent / len(rewards) >= ABSTAINED
        found.append(Finding(
            "problem" if grave else "warning", "abstentions", f"{silent} of {len(rewards)} completions have no reward "
            f"({silent / len(rewards):.0%}), most often: {reason[:200]}", "they are left out of training",
            "mend the reward", figures,
        ))  # fmt: skip
    if not totals:
        return [*found, _timing(recipe, trial)]
    parts = {
        name: [value for each in rewards if (value := each.parts.get(name)) is not None] for name in weights
    }  # fmt: skip
    steps = {
        name: [value for each in rewards if name in each.steps for value in each.steps[name].rewards]
        for name in weights
    }
    told = "; ".join(
        f"{name} {min(held):.4g} to {max(held):.4g}, mean {statistics.fmean(held):.4g}{what}"
        for named, what in ((parts, ""), (steps, " (steps)"))
        for name, held in named.items()
        if held
    )
    figures |= {"min": min(totals), "max": max(totals), "mean": statistics.fmean(totals)}
    constant = len(set(totals)) == 1 and len(totals) > 1 and not any(each.steps for each in rewards)
    if constant and recipe.reward_model is None:
        right = recipe.method.baseline == "indicator" and totals[0] > recipe.method.success_threshold
        learns = recipe.method.baseline == "none" or right
        found.append(Finding(
            "warning" if learns or not trial.tells else "problem", "reward",
            f"all {len(totals)} completions have the same reward, {totals[0]:.4g} ({told})",
            "all completions are learned from alike" if learns
            else "no completion is better than another, so nothing is learned",
            "read some completions (gruppo sample), and look whether the reward reads them as they are", figures,
        ))  # fmt: skip
    else:
        found.append(Finding("ok", "reward", told, figures=figures))
    return [*found, _timing(recipe, trial)]


def _timing(recipe: Recipe, trial: Trial) -> Finding:
    count = len(trial.rewards)
    size = recipe.sampling.prompts_per_step * recipe.sampling.group_size
    each, sampling = trial.reward_seconds / count, trial.sampling_seconds / len(trial.completions)
    figures = {"seconds_each": each, "seconds_step": each * size, "sampling_seconds_step": sampling * size}
    told = f"{_seconds(each)} a completion, {_seconds(each * size)} a step; sampling takes {_seconds(sampling * size)}"
    if each > sampling:
        return Finding(
            "warning", "reward's time", told, "most of a step would be waiting for rewards",
            f"make the reward quicker, or write more reward.workers than {recipe.reward.workers}", figures,
        )  # fmt: skip
    return Finding("ok", "reward's time", told, figures=figures)


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2g} ms"
        if seconds < 0.01
        else f"{seconds * 1e3:.0f} ms"
    )


def judge_signal(recipe: Recipe, trial: Trial, weights: Mapping[str, float]) -> Finding:
    """How many groups would teach something, at this group size and at others."""
    method, size = recipe.method, recipe.sampling.group_size
    groups = [Group(group.prompt, group.completions, group.rewards) for group in trial.groups]
    signal(groups, method, recipe.critic, dict(weights))
    count = sum(group.has_nonzero_advantage for group in groups)
    low, high = wilson_interval(count, len(groups))
    others = other_sizes(groups, method, size)
    figures = {
        "groups": len(groups), "with_signal": count, "interval": [low, high], "group_size": size,
        "share_at": {str(each): share for each, share in others.items()},
    }  # fmt: skip
    told = (
        f"{count} of {len(groups)} groups of {size} carry one ({count / len(groups):.0%}; 95 % interval {low:.0%} to "
    )
    told += f"{high:.0%})"
    if others:
        sizes = [f"{'at least ' if each > size else ''}{share:.0%} of {each}" for each, share in others.items()]
        told += "; by the rates of these prompts " + ", ".join(sizes)
    known = recipe.reward_model is None
    if not count:
        return Finding(
            "problem" if known and trial.tells else "warning", "signal", told,
            "a group of equal rewards teaches nothing" + ("" if known else "; the reward model was not tried"),
            "take easier or harder questions, a reward that tells completions apart, or a larger group_size", figures,
        )  # fmt: skip
    if count / len(groups) < FEW_SIGNALS:
        return Finding(
            "warning", "signal", told, "most of the sampling teaches nothing",
            'take questions of another difficulty, a larger group_size, or method.name = "dapo", which draws others',
            figures,
        )  # fmt: skip
    return Finding("ok", "signal", told, figures=figures)


def other_sizes(groups: Sequence[Group], method: Method, size: int) -> dict[int, float]:
    """The share of groups that would carry a signal at other group sizes, where that is a matter of a group alone.

    Fewer than were sampled: the chance that so many of them, drawn without replacement, differ; no bias. More: by the
    observed frequencies of a prompt, which call a prompt whose completions were all alike one that never differs, so
    that the share is at least this.
    """
    if method.credit == "step" or method.baseline not in {"group", "leave-one-out", "indicator"} | (
        {"none"} if method.credit == "pair" else set()
    ):
        return {}
    sides = method.baseline == "indicator" or method.credit == "pair"
    observed: list[Counter[Any]] = []
    for group in groups:
        mark_trained([group], method.mask_truncated)
        values = [reward.total for reward, used in zip(group.rewards, group.trained, strict=True) if used]
        observed.append(
            Counter(value > method.success_threshold for value in values if value is not None)
            if sides
            else Counter(values)
        )
    least = 1 if method.baseline == "indicator" else 2
    chosen = sorted({max(least, size // 4), max(least, size // 2), size * 2, size * 4} - {size})
    return {
        each: statistics.fmean(_differs(counts, each, method.baseline == "indicator") for counts in observed)
        for each in chosen
    }


def _differs(counts: Counter[Any], size: int, any_right: bool) -> float:
    """The chance that a group of `size` has two values, or with `any_right` a right one."""
    total = sum(counts.values())
    if not total:
        return 0.0
    alike = [counts[False]] if any_right else list(counts.values())
    if size <= total:
        return 1 - sum(math.comb(each, size) for each in alike) / math.comb(total, size)
    return 1 - math.fsum((each / total) ** size for each in alike)


@torch.no_grad()
def compare_logprobs(policy: LanguageModel, groups: Sequence[Group], temperature: float, budget: int) -> Finding:
    """The engine's log-probabilities of what it sampled beside the trainer's."""
    taken: list[Group] = []
    tokens = 0
    for group in groups:
        held: list[Completion] = []
        for completion in group.completions:
            tokens += len(completion.token_ids)
            if tokens <= COMPARED_TOKENS or not (taken or held):
                held.append(completion)
        if held:
            made = Group(group.prompt, held, [Reward(0.0, {})] * len(held))
            mark_trained([made], mask_truncated=False)
            taken.append(made)
    apart = []
    for batch in pack(taken, lambda lengths: [[1.0] * len(row) for row in lengths], budget, True, policy.device):
        with policy.precision():
            trainers = score(policy, batch, temperature)[0].double()
        drawn = batch.weights != 0
        apart.append((trainers - batch.sampling_logprobs.double())[drawn].abs().cpu())
    return judge_difference(torch.cat(apart), str(policy.dtype).removeprefix("torch."))


def judge_difference(apart: torch.Tensor, dtype: str) -> Finding:
    """The finding on |log π by the trainer - log π by the engine|, in nats."""
    mean, most, bound = float(apart.mean()), float(apart.max()), MEAN_DIFFERENCE[dtype]
    figures = {"tokens": len(apart), "mean": mean, "max": most, "bound": bound}
    told = (
        f"log-probabilities of {len(apart)} tokens are {mean:.2g} nats apart in the mean, {most:.2g} at the most; the "
    )
    told += f"bound of the mean is {bound:g} in {dtype}"
    if not mean <= bound:
        return Finding(
            "problem", "engine", told, "what is trained would not be what was sampled",
            'write model.dtype = "float32"; if it is so there too, report it with the name of the model', figures,
        )  # fmt: skip
    return Finding("ok", "engine", told, figures=figures)


def compare_gradient(
    recipe: Recipe, policy: LanguageModel, inputs: RunInputs, chosen: ChosenSizes, progress: Progress, stop: Stop
) -> Finding:
    """The gradient beside finite differences, on a few short completions with arbitrary rewards."""
    with progress.bar("Comparing the gradient", None, ""):
        groups = _short_groups(recipe, policy, inputs, progress, stop)
        made = compare(policy, groups, recipe, chosen.micro_batch_tokens, chosen.budget_bytes)
    if made is None:
        return Finding(
            "note", "gradient", "it was not compared with finite differences: there is none on a few completions, or "
            "no memory for the comparison",
        )  # fmt: skip
    return judge_gradient(made, ":" in recipe.method.surrogate)


def _short_groups(
    recipe: Recipe, policy: LanguageModel, inputs: RunInputs, progress: Progress, stop: Stop
) -> list[Group]:
    prompts, most = GRADED
    drawn = _distinct(inputs.prompts.draw(0, min(len(inputs.prompts), PROMPTS)))
    shortest = sorted(drawn, key=lambda each: len(each.token_ids))[:prompts]
    if inputs.given:
        return shortened(offline_groups(shortest, inputs.given), most)
    size = min(recipe.sampling.group_size, most)
    options = SamplingParams(recipe.sampling.temperature, min(12, recipe.sampling.max_tokens))
    streams = [[(recipe.run.seed, 0, place, number, 2) for number in range(size)] for place in range(len(shortest))]
    sampled = sample_groups(
        build_engine(policy, size * len(shortest)), shortest, streams, options, progress, stop, "Sampling"
    )
    groups = [
        Group(prompt, each, [Reward(0.0, {})] * len(each)) for prompt, each in zip(shortest, sampled, strict=True)
    ]
    return with_arbitrary_rewards(groups, recipe.method)


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    return list({prompt.id: prompt for prompt in prompts}.values())


def judge_gradient(made: Derivative, own: bool) -> Finding:
    """The finding on a comparison; `own`: the policy term is the user's function."""
    bound = GRADIENT_ERROR[made.backward_dtype]
    if made.differences_dtype != "float64":
        bound = max(bound, 0.1)
    figures = {
        "relative_error": made.error, "bound": bound, "backward": list(made.backward),
        "differences": list(made.differences), "dtypes": [made.backward_dtype, made.differences_dtype],
    }  # fmt: skip
    where = f"along {len(made.backward)} random directions" if made.differences_dtype == "float64" else "along itself"
    told = (
        f"{where} it is {made.error:.1g} (relative) from finite differences in {made.differences_dtype}; the bound is "
    )
    told += f"{bound:g} in {made.backward_dtype}"
    if not made.error <= bound and own:
        return Finding(
            "warning", "gradient", told, "the run would not go down the objective of the recipe, unless "
            "method.surrogate detaches a part of it on purpose", "compare its gradient with its paper", figures,
        )  # fmt: skip
    if not made.error <= bound:
        return Finding(
            "problem", "gradient", told, "the run would not go down the objective of the recipe",
            "report it with the recipe and the name of the model: nothing in the recipe can mend it", figures,
        )  # fmt: skip
    return Finding("ok", "gradient", told, figures=figures)


def skipped(why: str) -> Finding:
    """The finding on all that sampling would have shown."""
    return Finding("note", "completions", f"none were sampled: {why}; rewards, signals and engine were not looked at")
