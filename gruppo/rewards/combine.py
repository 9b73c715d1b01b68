"""Weighted sum of the values that several reward functions return for a completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gruppo.types import Reward, Steps

# A function's result for one completion: a number, None, step rewards, or the reason of its failure (text).
Value = float | str | Steps | None


def combine(
    names: Sequence[str], weights: Sequence[float], values: Sequence[Value], extra: Mapping[str, Any]
) -> Reward:
    """Combine the values of all functions for one completion into its reward.

    total = Σ weight · value over the functions that returned a number. The completion is excluded (total None, never a
    substitute number) if a function failed, if all returned None, or if the sum overflows. Step rewards are stored next
    to the total, which is 0 if there is no number.
    """
    by_name = dict(zip(names, values, strict=True))
    parts = {name: float(value) if isinstance(value, int | float) else None for name, value in by_name.items()}
    steps = {name: value for name, value in by_name.items() if isinstance(value, Steps)}
    failures = {name: value for name, value in by_name.items() if isinstance(value, str)}
    if failures:
        reasons = "; ".join(f"{name}: {why}" for name, why in failures.items())
        return Reward(None, parts, reasons, extra, failures=failures)
    weighted = [weight * value for weight, value in zip(weights, parts.values(), strict=True) if value is not None]
    if not weighted and not steps:
        return Reward(None, parts, None, extra)
    total = sum(weighted, 0.0)
    return (
        Reward(total, parts, None, extra, steps)
        if math.isfinite(total)
        else Reward(None, parts, "sum overflows", extra)
    )


def overall(reward: Reward, weights: Mapping[str, float], otherwise: float = 1.0) -> float | None:
    """The reward as one number: its total plus, for every function that scores steps, the mean of the step rewards
    times the function's weight (`otherwise` if `weights` lacks it). None if the completion is excluded."""
    if reward.total is None:
        return None
    means = {name: sum(steps.rewards) / len(steps.rewards) for name, steps in reward.steps.items() if steps.rewards}
    return reward.total + sum(weights.get(name, otherwise) * mean for name, mean in means.items())


def with_part(reward: Reward, name: str, weight: float, value: float | str | None) -> Reward:
    """Return the reward with one more part, as if another function had returned `value`.

    A text as `value` is the reason of a failure and excludes the completion.
    """
    if isinstance(value, str):
        why = "; ".join(filter(None, (reward.failure, f"{name}: {value}")))
        parts, failures = {**reward.parts, name: None}, {**reward.failures, name: value}
        return replace(reward, total=None, parts=parts, failure=why, failures=failures)
    known = reward.total is not None or reward.failure is None
    if value is None or not known:
        return replace(reward, parts={**reward.parts, name: value})
    total = weight * value + (reward.total or 0.0)
    failure = None if math.isfinite(total) else "sum overflows"
    return replace(reward, total=None if failure else total, parts={**reward.parts, name: value}, failure=failure)
