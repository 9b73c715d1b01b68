"""Smoke test: sample and score a few dozen completions before a run.

It reports how many completions are truncated, reward values and reward time, the share of groups with a nonzero
advantage, and whether engine and trainer agree on log-probabilities. It also reports the gradient check.
"""

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
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.probe import largest_drift
from gruppo.models.packing import pack, score
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.preflight.gradient_check import Derivative, compare, fill_advantages, shortened, with_arbitrary_rewards
from gruppo.rollout.episodes import Episodes
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

PROMPTS = 32  # maximum number of sampled groups
COMPARED_TOKENS = 4096  # maximum number of tokens whose log-probabilities are compared
GRADIENT_GROUPS = 2, 4  # prompts, and completions per prompt, of the gradient check
GRADIENT_ERROR = {"float64": 1e-4, "float32": 1e-2, "bfloat16": 0.25}
ENOUGH_GROUPS = 22  # if none of them has a nonzero advantage, fewer than 15% of all groups do (95% confidence)
MANY_EXCLUDED = 0.2  # from this share of completions on, excluded completions are a problem
FEW_NONZERO = 0.2  # below this share of groups, warn
MANY_TRUNCATED = 0.5  # from this share of completions on, warn


class _TimeUp(Exception):  # noqa: N818  not an error
    """The time limit has passed."""


class _Deadline(Stop):
    """A stop that also ends work after a time limit."""

    def __init__(self, stop: Stop, seconds: float) -> None:
        super().__init__()
        self.stop, self.end = stop, time.monotonic() + seconds

    def check(self) -> None:
        """Raise Interrupted if a stop was requested, _TimeUp if the time limit has passed."""
        self.stop.check()
        if time.monotonic() > self.end:
            raise _TimeUp


@dataclass
class SmokeTest:
    """Sampled groups with their rewards.

    `unscored`: groups of the last round, if rewards took too long. `sampling_seconds`, `reward_seconds`: for all
    groups, on this machine. `timed_out`: the time was up before the last round was done. `complete`: all planned groups
    were sampled and scored.
    """

    groups: list[Group] = field(default_factory=list)
    unscored: list[Group] = field(default_factory=list)
    sampling_seconds: float = 0.0
    reward_seconds: float = 0.0
    timed_out: bool = False
    complete: bool = False

    @property
    def conclusive(self) -> bool:
        """Whether there are enough groups to draw a conclusion from what none of them shows."""
        return self.complete or len(self.groups) >= ENOUGH_GROUPS

    @property
    def completions(self) -> list[Completion]:
        """All sampled completions."""
        return [completion for group in [*self.groups, *self.unscored] for completion in group.completions]

    @property
    def rewards(self) -> list[Reward]:
        """The rewards of all scored groups."""
        return [reward for group in self.groups for reward in group.rewards]


def run_smoke_test(
    recipe: Recipe,
    engine: Engine,
    inputs: RunInputs,
    pool: RewardPool,
    slots: int,
    seconds: float,
    progress: Progress,
    stop: Stop,
    episodes: Episodes | None = None,
) -> SmokeTest:
    """Sample and score groups like the first steps of a run.

    It ends when there are enough groups, or after `seconds` of sampling or `seconds` of rewards. Each round has twice
    as many groups as the one before, if the time seems to suffice, so that a slow machine finishes at least a few.
    """
    size, test = recipe.sampling.group_size, SmokeTest()
    wanted, most = min(PROMPTS, len(inputs.prompts)), max(1, slots // size)
    state = {"global_step": 0, "max_steps": recipe.run.steps, "max_tokens": recipe.sampling.max_tokens}
    count = 1
    while count and not test.timed_out:
        cursor = len(test.groups)
        prompts = inputs.prompts.draw(cursor, count)
        streams = [[(recipe.run.seed, 0, cursor + i, j) for j in range(size)] for i in range(count)]
        start = time.monotonic()
        try:
            deadline = _Deadline(stop, seconds - test.sampling_seconds)
            arguments = engine, prompts, streams, inputs.sampling, progress, deadline, "Smoke test"
            if episodes is None:
                sampled = sample_groups(*arguments)
            else:
                prompts, sampled = episodes.play(*arguments)
            test.sampling_seconds += time.monotonic() - start
            start = time.monotonic()
            deadline = _Deadline(stop, seconds - test.reward_seconds)
            test.unscored = [
                Group(prompt, completions, [Reward(None, {})] * size)
                for prompt, completions in zip(prompts, sampled, strict=True)
            ]
            weight = None if episodes is None else episodes.weight
            test.groups += score_groups(prompts, sampled, pool, state, Metrics(), progress, deadline, weight)
            test.unscored = []
            test.reward_seconds += time.monotonic() - start
        except _TimeUp:
            test.timed_out = True
        slower = max(test.sampling_seconds, test.reward_seconds)
        per_group = slower / max(1, len(test.groups))
        left = seconds - slower
        count = min(2 * count, most, wanted - len(test.groups), int(left / per_group) if per_group else wanted)
    test.complete = len(test.groups) == wanted
    return test


def report_smoke_test(recipe: Recipe, test: SmokeTest, weights: Mapping[str, float], seconds: float) -> list[Finding]:
    """Findings on completions, rewards and advantages. `weights`: reward weights by name."""
    if not test.completions:
        size = recipe.sampling.group_size
        return [Finding(
            "warning", "completions", f"not even one group of {size} completions of up to {recipe.sampling.max_tokens} "
            f"tokens was sampled in {seconds:g} s", "completions, rewards and advantages were not checked",
            "give more time with --seconds",
        )]  # fmt: skip
    found = [report_completions(test.completions, recipe)]
    if test.unscored:
        count = sum(len(group.completions) for group in test.unscored)
        found.append(Finding(
            "problem", "reward", f"it did not finish on {count} completions in {seconds:g} s",
            "steps would wait for it, and completions would be excluded",
            "make it faster, increase reward.workers, or give more time with --seconds",
        ))  # fmt: skip
    if test.groups:
        found += report_rewards(recipe, test, weights)
    if any(reward.total is not None for reward in test.rewards):
        found.append(report_advantages(recipe, test, weights))
    return found


def report_completions(completions: Sequence[Completion], recipe: Recipe) -> Finding:
    """How many completions are truncated."""
    lengths = sorted(len(completion.token_ids) for completion in completions)
    truncated = sum(completion.finish_reason == "length" for completion in completions)
    share, most = truncated / len(completions), recipe.sampling.max_tokens
    low, high = wilson_interval(truncated, len(completions))
    figures = {
        "completions": len(completions), "truncated": truncated, "interval": [low, high],
        "length_mean": statistics.mean(lengths), "length_median": statistics.median(lengths),
    }  # fmt: skip
    what = (
        f"{truncated} of {len(completions)} truncated at {most} tokens ({share:.0%}; 95% interval {low:.0%} to "
        f"{high:.0%}); median length {lengths[len(lengths) // 2]}"
    )
    masked = recipe.method.mask_truncated
    if truncated == len(completions):
        return Finding(
            "problem" if masked else "warning", "completions", f"{what}; none of them emits an EOS token",
            "with method.mask_truncated, no completion is left to train on" if masked
            else "unfinished answers are scored, and nothing teaches the model to finish",
            "increase sampling.max_tokens, or check that the chat template ends answers with an EOS token", figures,
        )  # fmt: skip
    if share >= MANY_TRUNCATED:
        return Finding(
            "warning", "completions", what, "unfinished answers are scored",
            "increase sampling.max_tokens, or ask for shorter answers", figures,
        )  # fmt: skip
    return Finding("ok", "completions", what, figures=figures)


def report_rewards(recipe: Recipe, test: SmokeTest, weights: Mapping[str, float]) -> list[Finding]:
    """Reward values, excluded completions, and reward time."""
    rewards = test.rewards
    totals = [reward.total for reward in rewards if reward.total is not None]
    excluded, found = len(rewards) - len(totals), []
    figures: dict[str, Any] = {"completions": len(rewards), "excluded": excluded}
    if excluded:
        reasons = Counter(
            reward.failure or "every function returned None" for reward in rewards if reward.total is None
        )
        reason, _ = reasons.most_common(1)[0]
        many = excluded / len(rewards) >= MANY_EXCLUDED
        found.append(Finding(
            "problem" if many else "warning", "excluded completions", f"{excluded} of {len(rewards)} have no reward "
            f"({excluded / len(rewards):.0%}); most common reason: {reason[:200]}", "they are left out of training",
            "fix the reward", figures,
        ))  # fmt: skip
    if not totals:
        return [*found, _reward_time(recipe, test)]
    parts = {
        name: [value for reward in rewards if (value := reward.parts.get(name)) is not None] for name in weights
    }  # fmt: skip
    steps = {
        name: [value for reward in rewards if name in reward.steps for value in reward.steps[name].rewards]
        for name in weights
    }
    what = "; ".join(
        f"{name} {min(values):.4g} to {max(values):.4g}, mean {statistics.fmean(values):.4g}{suffix}"
        for by_name, suffix in ((parts, ""), (steps, " (steps)"))
        for name, values in by_name.items()
        if values
    )
    figures |= {"min": min(totals), "max": max(totals), "mean": statistics.fmean(totals)}
    constant = len(set(totals)) == 1 and len(totals) > 1 and not any(reward.steps for reward in rewards)
    if constant and recipe.reward_model is None:
        correct = recipe.method.baseline == "indicator" and totals[0] > recipe.method.success_threshold
        learns = recipe.method.baseline == "none" or correct
        found.append(Finding(
            "warning" if learns or not test.conclusive else "problem", "reward",
            f"all {len(totals)} completions have the same reward, {totals[0]:.4g} ({what})",
            "the method learns from all completions equally" if learns
            else "no completion is better than another, so nothing is learned",
            "read some completions (gruppo sample), and check that the reward can parse them", figures,
        ))  # fmt: skip
    else:
        found.append(Finding("ok", "reward", what, figures=figures))
    return [*found, _reward_time(recipe, test)]


def _reward_time(recipe: Recipe, test: SmokeTest) -> Finding:
    count = len(test.rewards)
    size = recipe.sampling.prompts_per_step * recipe.sampling.group_size
    scoring, sampling = test.reward_seconds / count, test.sampling_seconds / len(test.completions)
    figures = {"seconds_each": scoring, "seconds_step": scoring * size, "sampling_seconds_step": sampling * size}
    what = (
        f"{_seconds(scoring)} per completion, {_seconds(scoring * size)} per step; sampling takes "
        f"{_seconds(sampling * size)} per step"
    )
    if scoring > sampling:
        return Finding(
            "warning", "reward time", what, "a step would mostly wait for rewards",
            f"make the reward faster, or increase reward.workers = {recipe.reward.workers}", figures,
        )  # fmt: skip
    return Finding("ok", "reward time", what, figures=figures)


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.2g} ms"
        if seconds < 0.01
        else f"{seconds * 1e3:.0f} ms"
    )


def report_advantages(recipe: Recipe, test: SmokeTest, weights: Mapping[str, float]) -> Finding:
    """The share of groups with a nonzero advantage, at this group size and at others."""
    method, size = recipe.method, recipe.sampling.group_size
    groups = [Group(group.prompt, group.completions, group.rewards) for group in test.groups]
    fill_advantages(groups, method, recipe.critic, dict(weights))
    count = sum(group.has_nonzero_advantage for group in groups)
    low, high = wilson_interval(count, len(groups))
    others = other_sizes(groups, method, size)
    figures = {
        "groups": len(groups), "nonzero_advantage": count, "interval": [low, high], "group_size": size,
        "share_at": {str(other): share for other, share in others.items()},
    }  # fmt: skip
    what = (
        f"in {count} of {len(groups)} groups of {size} ({count / len(groups):.0%}; 95% interval {low:.0%} to "
        f"{high:.0%})"
    )
    if others:
        sizes = [f"{'at least ' if other > size else ''}{share:.0%} of {other}" for other, share in others.items()]
        what += "; estimated for groups of other sizes: " + ", ".join(sizes)
    known = recipe.reward_model is None
    if not count:
        return Finding(
            "problem" if known and test.conclusive else "warning", "nonzero advantage", what,
            "a group with equal rewards teaches nothing" + ("" if known else "; the reward model was not tried"),
            "use easier or harder questions, a reward that distinguishes completions, or a larger group_size", figures,
        )  # fmt: skip
    if count / len(groups) < FEW_NONZERO:
        return Finding(
            "warning", "nonzero advantage", what, "most of the sampling teaches nothing",
            'use questions of another difficulty, a larger group_size, or method.name = "dapo", which samples other '
            "questions instead", figures,
        )  # fmt: skip
    return Finding("ok", "nonzero advantage", what, figures=figures)


def other_sizes(groups: Sequence[Group], method: Method, size: int) -> dict[int, float]:
    """The estimated share of groups with a nonzero advantage at other group sizes, by size.

    Smaller sizes: the probability that a subset of the sampled completions has different rewards, which is unbiased.
    Larger sizes: from the observed reward frequencies of each prompt. A prompt whose rewards were all equal counts as
    one whose rewards never differ, so this is a lower bound. Empty if an advantage depends on more than the outcome
    rewards of its group.
    """
    if method.credit == "step" or method.baseline not in {"group", "leave-one-out", "indicator"} | (
        {"none"} if method.credit == "pair" else set()
    ):
        return {}
    by_success = method.baseline == "indicator" or method.credit == "pair"
    observed: list[Counter[Any]] = []
    for group in groups:
        mark_trained([group], method.mask_truncated)
        values = [reward.total for reward, used in zip(group.rewards, group.trained, strict=True) if used]
        observed.append(
            Counter(value > method.success_threshold for value in values if value is not None)
            if by_success
            else Counter(values)
        )
    least = 1 if method.baseline == "indicator" else 2
    chosen = sorted({max(least, size // 4), max(least, size // 2), size * 2, size * 4} - {size})
    return {
        other: statistics.fmean(_differs(counts, other, method.baseline == "indicator") for counts in observed)
        for other in chosen
    }


def _differs(counts: Counter[Any], size: int, any_correct: bool) -> float:
    """The probability that a group of `size` has two different values, or with `any_correct`, a correct completion."""
    total = sum(counts.values())
    if not total:
        return 0.0
    equal = [counts[False]] if any_correct else list(counts.values())
    if size <= total:
        return 1 - sum(math.comb(count, size) for count in equal) / math.comb(total, size)
    return 1 - math.fsum((count / total) ** size for count in equal)


@torch.no_grad()
def compare_logprobs(policy: LanguageModel, groups: Sequence[Group], temperature: float, budget: int) -> Finding:
    """Compare the engine's log-probabilities of its samples with the trainer's."""
    chosen: list[Group] = []
    tokens = 0
    for group in groups:
        completions: list[Completion] = []
        for completion in group.completions:
            tokens += len(completion.token_ids)
            if tokens <= COMPARED_TOKENS or not (chosen or completions):
                completions.append(completion)
        if completions:
            part = Group(group.prompt, completions, [Reward(0.0, {})] * len(completions))
            mark_trained([part], mask_truncated=False)
            chosen.append(part)
    differences = []
    for batch in pack(chosen, lambda lengths: [[1.0] * len(row) for row in lengths], budget, True, policy.device):
        with policy.precision():
            logprobs = score(policy, batch, temperature)[0]
        sampling = batch.sampling_logprobs
        assert sampling is not None
        differences.append((logprobs.to(sampling.dtype) - sampling)[batch.trained].abs().cpu().double())
    return report_engine_difference(torch.cat(differences), policy.dtype)


def report_engine_difference(differences: torch.Tensor, dtype: torch.dtype) -> Finding:
    """The finding on |log π of the trainer - log π of the engine|, in nats, one value per token. `dtype`: that of
    matmuls."""
    mean, most, bound = float(differences.mean()), float(differences.max()), largest_drift(dtype)
    figures = {"tokens": len(differences), "mean": mean, "max": most, "bound": bound}
    what = (
        f"log-probabilities of {len(differences)} tokens differ from the trainer's by {mean:.2g} nats on average, at "
        f"most {most:.2g}; bound of the mean in {str(dtype).removeprefix('torch.')}: {bound:g}"
    )
    if not mean <= bound:
        return Finding(
            "problem", "engine", what, "the trained distribution would not be the sampled one",
            'write model.dtype = "float32"; if the problem remains, report it with the name of the model', figures,
        )  # fmt: skip
    return Finding("ok", "engine", what, figures=figures)


def compare_gradient(
    recipe: Recipe, policy: LanguageModel, inputs: RunInputs, chosen: ChosenSizes, progress: Progress, stop: Stop
) -> Finding:
    """Compare the gradient with finite differences, on a few short completions with arbitrary rewards."""
    with progress.bar("Checking the gradient", None, ""):
        groups = _short_groups(recipe, policy, inputs, progress, stop)
        derivative = compare(policy, groups, recipe, chosen.micro_batch_tokens, chosen.budget_bytes)
    if derivative is None:
        return Finding(
            "note", "gradient", "not compared with finite differences: the gradient of the few completions is zero, or "
            "there is no memory for the comparison",
        )  # fmt: skip
    return report_gradient(derivative, ":" in recipe.method.surrogate)


def _short_groups(
    recipe: Recipe, policy: LanguageModel, inputs: RunInputs, progress: Progress, stop: Stop
) -> list[Group]:
    count, most = GRADIENT_GROUPS
    prompts = _distinct(inputs.prompts.draw(0, min(len(inputs.prompts), PROMPTS)))
    shortest = sorted(prompts, key=lambda prompt: len(prompt.token_ids))[:count]
    if inputs.offline:
        return shortened(offline_groups(shortest, inputs.offline), most)
    size = min(recipe.sampling.group_size, most)
    options = SamplingParams(recipe.sampling.temperature, min(12, recipe.sampling.max_tokens))
    streams = [[(recipe.run.seed, 0, place, number, 2) for number in range(size)] for place in range(len(shortest))]
    sampled = sample_groups(
        build_engine(policy, size * len(shortest)), shortest, streams, options, progress, stop, "Sampling"
    )
    groups = [
        Group(prompt, completions, [Reward(0.0, {})] * len(completions))
        for prompt, completions in zip(shortest, sampled, strict=True)
    ]
    return with_arbitrary_rewards(groups, recipe.method)


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    return list({prompt.id: prompt for prompt in prompts}.values())


def report_gradient(derivative: Derivative, user_defined: bool) -> Finding:
    """The finding on a gradient comparison. `user_defined`: the policy term is a function of the user."""
    bound = GRADIENT_ERROR[derivative.backward_dtype]
    if derivative.differences_dtype != "float64":
        bound = max(bound, 0.1)
    figures = {
        "relative_error": derivative.error, "bound": bound, "backward": list(derivative.backward),
        "differences": list(derivative.differences),
        "dtypes": [derivative.backward_dtype, derivative.differences_dtype],
    }  # fmt: skip
    exact = derivative.differences_dtype == "float64"
    where = f"along {len(derivative.backward)} random directions" if exact else "along the gradient"
    what = (
        f"differs from finite differences in {derivative.differences_dtype} by {derivative.error:.1g} (relative, "
        f"{where}); bound in {derivative.backward_dtype}: {bound:g}"
    )
    if not derivative.error <= bound and user_defined:
        return Finding(
            "warning", "gradient", what, "the run would not minimize the recipe's loss, unless method.surrogate "
            "detaches a part of it on purpose", "compare the gradient with the paper of the method", figures,
        )  # fmt: skip
    if not derivative.error <= bound:
        return Finding(
            "problem", "gradient", what, "the run would not minimize the recipe's loss",
            "report it with the recipe and the name of the model; no change of the recipe can fix it", figures,
        )  # fmt: skip
    return Finding("ok", "gradient", what, figures=figures)


def skipped(why: str) -> Finding:
    """The finding if the smoke test did not run."""
    return Finding("note", "completions", f"none sampled ({why}); rewards, advantages and engine were not checked")
