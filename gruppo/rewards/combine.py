"""The weighted sum of what several reward functions give a completion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gruppo.types import Reward, Steps

# What a function gave for one completion: a number, None, rewards of steps, or (text) the reason of its failure.
Value = float | str | Steps | None


def combine(
    names: Sequence[str], weights: Sequence[float], values: Sequence[Value], extra: Mapping[str, Any]
) -> Reward:
    """One completion's reward from what each function gave.

    total = Σ weight · value over the functions that gave a number. A failure makes the completion abstain, and so does
    None from all of them: total None, never a substitute number. Rewards of steps stand beside the total.
    """
    given = dict(zip(names, values, strict=True))
    parts = {name: float(value) if isinstance(value, int | float) else None for name, value in given.items()}
    steps = {name: value for name, value in given.items() if isinstance(value, Steps)}
    failures = {name: value for name, value in given.items() if isinstance(value, str)}
    if failures:
        told = "; ".join(f"{name}: {why}" for name, why in failures.items())
        return Reward(None, parts, told, extra, failures=failures)
    weighed = [weight * value for weight, value in zip(weights, parts.values(), strict=True) if value is not None]
    if not weighed and not steps:
        return Reward(None, parts, None, extra)
    total = sum(weighed, 0.0)
    return (
        Reward(total, parts, None, extra, steps)
        if math.isfinite(total)
        else Reward(None, parts, "sum overflows", extra)
    )


def with_part(reward: Reward, name: str, weight: float, value: float | str | None) -> Reward:
    """A reward with one part more, as if a function had given it; text is the reason of a failure."""
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
