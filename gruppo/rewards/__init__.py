"""A reward is a function in TRL's signature, sync or async:

    reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called by keyword, once a group, with G entries in every list. `completions` are texts, or lists of messages
where the prompts are messages. None means "does not apply to this completion"; {"step_rewards": […], "step_ends": […]}
judges the steps of a completion, each by the token (counted from 0) on which it ends. `trainer_state`, `log_extra` and
`log_metric` are passed to a function that names them or takes **kwargs. A class is made first, with its options;
docs/rewards.md has the built-in rewards and the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gruppo.errors import UsageError, nearest
from gruppo.types import Reward, Steps

REWARDS = {
    "number": "gruppo.rewards.answers:number",
    "exact_match": "gruppo.rewards.answers:exact_match",
    "math": "gruppo.rewards.answers:Mathematics",
    "choice": "gruppo.rewards.answers:choice",
    "think_format": "gruppo.rewards.format:think_format",
    "regex": "gruppo.rewards.format:Regex",
    "overlong": "gruppo.rewards.length:Overlong",
    "repetition": "gruppo.rewards.length:Repetition",
    "classifier": "gruppo.rewards.classifier:Classifier",
    "reasoning_gym": "gruppo.rewards.reasoning_gym:reasoning_gym",
}
PREFIXES = ("verl", "verifiers")  # of names whose functions go through gruppo.rewards.interop

RewardFunction = Callable[..., Any]


def reward_path(name: str) -> str:
    """Import path of a reward by built-in name or import path. Raises UsageError for an unknown name."""
    if name in REWARDS:
        return REWARDS[name]
    prefix, path = split_prefix(name)
    if prefix and ":" not in path:
        raise UsageError(
            f'reward.functions = "{name}": "{prefix}:" needs an import path behind it; write '
            f'"{prefix}:package.module:function" or "{prefix}:file.py:function"'
        )
    if ":" not in name:
        raise UsageError(
            f'reward.functions = "{name}": unknown reward{nearest(name, REWARDS)}; or write "package.module:function" '
            'or "file.py:function"'
        )
    return name


def split_prefix(name: str) -> tuple[str, str]:
    """("verl", "file.py:f") of "verl:file.py:f"; ("", name) of a name without an adapter's prefix."""
    prefix, _, path = name.partition(":")
    return (prefix, path) if prefix in PREFIXES else ("", name)


def check_option_names(functions: Sequence[str | RewardFunction], options: Mapping[str, Any]) -> None:
    """Raise UsageError for options of a function that is not among them, or that was given as an object."""
    names = [function for function in functions if isinstance(function, str)]
    for name, values in options.items():
        if name not in names:
            raise UsageError(
                f"reward.options.{name} = {values}: no such function in reward.functions"
                f"{nearest(name, names) if names else '; bind the arguments of a function by functools.partial'}"
            )


def text_of(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion that is text, or messages whose last one counts."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


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
