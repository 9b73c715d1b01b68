"""The metrics of a step under the names that TRL logs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gruppo.types import Group

# TRL's name -> gruppo's name of the same number.
SAME: Mapping[str, str] = {
    "loss": "loss/total",
    "grad_norm": "optimizer/gradient_norm",
    "learning_rate": "optimizer/learning_rate",
    "entropy": "policy/entropy",
    "kl": "policy/kl",
    "clip_ratio/low_mean": "policy/clipped_low",
    "clip_ratio/high_mean": "policy/clipped_high",
    "sampling/sampling_logp_difference/mean": "engine/logprob_difference_mean",
    "sampling/sampling_logp_difference/max": "engine/logprob_difference_max",
    "step_time": "time/step",
    "rewards/accuracies": "dpo/accuracy",
}

_LOGGED = "reward/log/"  # begins the names of what reward functions log


def of_step(values: Mapping[str, Any], groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """The metrics of a step of training. `values`: its line of metrics.jsonl; `names`: of the reward functions.

    A step without an update has loss and gradient norm 0.
    """
    logs = {name: values[ours] for name, ours in SAME.items() if values.get(ours) is not None}
    if "dpo/loss" in values:  # what gruppo differentiates for pairs has another value
        logs["loss"] = values["dpo/loss"]
    logs = {"loss": 0.0, "grad_norm": 0.0, **logs, **of_groups(groups, names)}
    if {"clip_ratio/low_mean", "clip_ratio/high_mean"} <= logs.keys():
        logs["clip_ratio/region_mean"] = logs["clip_ratio/low_mean"] + logs["clip_ratio/high_mean"]
    logs |= {name.removeprefix(_LOGGED): value for name, value in values.items() if name.startswith(_LOGGED)}
    return logs


def of_groups(groups: Sequence[Group], names: Sequence[str]) -> dict[str, float]:
    """The metrics of completions and rewards. Lengths are in tokens; a metric of nothing is left out."""
    completions = [completion for group in groups for completion in group.completions]
    lengths = [sum(completion.mask) for completion in completions]
    ended = [sum(c.mask) for c in completions if c.finish_reason == "stop"]
    logs: dict[str, float] = {}
    for part, sizes in (("", lengths), ("terminated_", ended)):
        if sizes:
            logs[f"completions/mean_{part}length"] = statistics.fmean(sizes)
            logs[f"completions/min_{part}length"] = min(sizes)
            logs[f"completions/max_{part}length"] = max(sizes)
    if completions:
        logs["completions/clipped_ratio"] = 1 - len(ended) / len(completions)
    rewards = [reward for group in groups for reward in group.rewards]
    for name in names:
        found = [value for reward in rewards if (value := reward.parts.get(name)) is not None]
        logs |= _spread(f"rewards/{name}/mean", f"rewards/{name}/std", found)
    totals = [[reward.total for reward in group.rewards if reward.total is not None] for group in groups]
    logs |= _spread("reward", "reward_std", [total for row in totals for total in row])
    known = [row for row in totals if row]
    if rewards and known:
        logs["frac_reward_zero_std"] = statistics.fmean(math.isclose(max(row), min(row)) for row in known)
    called = [completion.episode for completion in completions if completion.episode is not None]
    if called:
        calls = sum(episode.calls for episode in called)
        logs["tools/call_frequency"] = calls / len(called)
        logs["tools/failure_frequency"] = sum(episode.errors for episode in called) / calls if calls else 0.0
    return logs


def _spread(mean: str, std: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation under these names; NaN for the deviation of one value."""
    if not values:
        return {}
    return {mean: statistics.fmean(values), std: statistics.stdev(values) if len(values) > 1 else float("nan")}


def tokens_of(groups: Iterable[Group]) -> int:
    """Tokens of all completions with their prompts."""
    return sum(len(group.prompt.token_ids) + len(one.token_ids) for group in groups for one in group.completions)


def averaged(logs: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """The mean of each metric over several steps, without NaN; None if nothing else is left."""
    result: dict[str, float | None] = {}
    for name in dict.fromkeys(name for one in logs for name in one):
        found = [one[name] for one in logs if name in one and not math.isnan(one[name])]
        result[name] = statistics.fmean(found) if found else None
    return result
