"""Reward functions in TRL's signature, sync or async:

    reward(prompts, completions, completion_ids, **columns) -> list[float | None]

A reward is called by keyword, once per group, with G entries in every list. `completions` are texts, or lists of
messages if the prompts are messages. None means "does not apply to this completion". {"step_rewards": […],
"step_ends": […]} scores the steps of a completion; a step's end is the index of its last token, counted from 0.
`trainer_state`, `log_extra` and `log_metric` are passed to functions that name them or take **kwargs. A class is
instantiated once, with its options. docs/rewards.md lists the built-in rewards and describes the interface in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.config.labels import label_mistake, options_name, split_label
from gruppo.config.renames import REWARDS as RENAMED
from gruppo.errors import UsageError, nearest
from gruppo.types import Message
from gruppo.utils.imports import IN_MEMORY
from gruppo.utils.text import text_of_content

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
    "llm_judge": "gruppo.rewards.remote.judge:LLMJudge",
    "remote": "gruppo.rewards.remote.server:Remote",
}


PREFIXES = ("verl", "verifiers")  # name prefixes that select an adapter in gruppo.rewards.interop


RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class RewardRun:
    """What a run tells a reward object that has a method `use_run`, once in each process, before the first call.

    `name`: of the reward in metrics and tables. `timeout`: seconds that one call may take. `cache`: a file that the
    reward may create to keep answers in, shared by the run's processes and its resumes; None to keep none.
    """

    name: str
    timeout: float
    cache: Path | None = None


def reward_path(name: str) -> str:
    """Return the import path of a reward, given its built-in name or an import path, with or without a label.

    Raises UsageError if the name is unknown, or if an adapter's prefix has no import path after it.
    """
    if mistake := label_mistake(name):
        raise UsageError(f"reward.functions = {mistake}")
    _, name = split_label(name)
    if name in REWARDS:
        return REWARDS[name]
    prefix, path = split_prefix(name)
    if prefix and ":" not in path:
        raise UsageError(
            f'reward.functions = "{name}": "{prefix}:" must be followed by an import path; write '
            f'"{prefix}:package.module:function" or "{prefix}:file.py:function"'
        )
    if name in RENAMED:
        raise UsageError(f'reward.functions = "{name}": this reward was renamed; write "{RENAMED[name]}"')
    if ":" not in name:
        raise UsageError(
            f'reward.functions = "{name}": unknown reward{nearest(name, REWARDS)}; or write "package.module:function" '
            'or "file.py:function"'
        )
    return name


def split_prefix(name: str) -> tuple[str, str]:
    """Split off an adapter's prefix: "verl:file.py:f" -> ("verl", "file.py:f"); without one, ("", name)."""
    prefix, _, path = name.partition(":")
    return (prefix, path) if prefix in PREFIXES else ("", name)


def listed_rewards(
    reward: str | RewardFunction | Sequence[str | RewardFunction] | None,
) -> list[str | RewardFunction] | None:
    """The argument `reward` of public functions as a list; None stays None. Raises UsageError if it is no reward."""
    if reward is None:
        return None
    if isinstance(reward, str) or callable(reward):
        return [reward]
    if not isinstance(reward, Sequence) or not all(isinstance(one, str) or callable(one) for one in reward):
        raise UsageError(
            f"reward = {reward!r}: must be a function f(prompts, completions, **columns) -> list of numbers, the name "
            'of a reward such as "last_number", or a list of these'
        )
    return list(reward)


def recipe_name(reward: str | RewardFunction) -> str:
    """The entry of a reward in reward.functions; one that was passed from Python gets a name that is not imported."""
    return reward if isinstance(reward, str) else f"{IN_MEMORY}{getattr(reward, '__qualname__', type(reward).__name__)}"


def check_option_names(functions: Sequence[str | RewardFunction], options: Mapping[str, Any]) -> None:
    """Raise UsageError for options of a function that is not in `functions`, or was passed as an object."""
    names = [options_name(function) for function in functions if isinstance(function, str)]
    for name, values in options.items():
        if name not in names:
            raise UsageError(
                f"reward.options.{name} = {values}: no such function in reward.functions"
                f"{nearest(name, names) if names else '; bind the arguments of a function with functools.partial'}"
            )


def text_of(completion: str | Sequence[Message]) -> str:
    """Text of a completion: the completion itself if it is text, else the content of its last message."""
    return completion if isinstance(completion, str) else text_of_content(completion[-1].get("content"))


def conversation(prompt: Sequence[Message], completion: str | Sequence[Message]) -> list[Message]:
    """Prompt and completion as messages; if the prompt ends with the start of an answer, both are joined."""
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if prompt[-1]["role"] == "assistant":
        start = prompt[-1]
        joined = {**start, "content": text_of_content(start["content"]) + text_of_content(answer[0]["content"])}
        return [*prompt[:-1], joined, *answer[1:]]
    return [*prompt, *answer]


def plain_text(messages: Sequence[Message]) -> str:
    """The contents of messages, joined by line breaks: a conversation for a model without a chat template."""
    return "\n".join(text_of_content(message["content"]) for message in messages)


def whole_text(prompt: str | Sequence[Message], completion: str | Sequence[Message]) -> str:
    """Prompt and completion as one text: joined, or for a conversation the contents of its messages by line breaks."""
    return prompt + text_of(completion) if isinstance(prompt, str) else plain_text(conversation(prompt, completion))
