"""A reward is a function in TRL's signature, sync or async:

    reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called by keyword, once a group, with G entries in every list. `completions` are texts, or lists of messages
where the prompts are messages. None means "does not apply to this completion"; {"step_rewards": […], "step_ends": […]}
judges the steps of a completion, each by the token (counted from 0) on which it ends. `trainer_state`, `log_extra` and
`log_metric` are passed to a function that names them or takes **kwargs. A class is made first, with its options;
docs/rewards.md has the built-in rewards and the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gruppo.config.renames import REWARDS as RENAMED
from gruppo.errors import UsageError, nearest

REWARDS = {
    "last_number": "gruppo.rewards.answers:last_number",
    "exact_match": "gruppo.rewards.answers:exact_match",
    "math_verify": "gruppo.rewards.answers:MathVerify",
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
    if name in RENAMED:
        raise UsageError(f'reward.functions = "{name}": this reward is called "{RENAMED[name]}" now; write that')
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
