"""Calls of reward functions: their arguments, and what they answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gruppo.rewards.combine import Value
from gruppo.rollout.workers.printed import MOST
from gruppo.rollout.workers.process import writable_message
from gruppo.types import Completion, Prompt, Steps


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one call: G values, the metrics and columns that the function logged, and what it printed."""

    values: list[Value]
    metrics: Mapping[str, Sequence[float]]
    extra: Mapping[str, Sequence[Any]]
    printed: str = ""


def call_arguments(prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    """Arguments of a reward function. Every list has G entries."""
    size = len(completions)
    conversation = not isinstance(prompt.content, str)
    of_completions = [{} if c.episode is None else c.episode.columns for c in completions]
    names = dict.fromkeys(name for columns in of_completions for name in columns)
    return {
        **{name: [value] * size for name, value in prompt.columns.items()},
        **{name: [columns.get(name) for columns in of_completions] for name in names},
        "prompts": [prompt.content] * size,
        "prompt_endings": [prompt.ending] * size,
        "completions": [[{"role": "assistant", "content": c.text}] if conversation else c.text for c in completions],
        "completion_ids": [
            columns.get("completion_ids", list(completion.token_ids))
            for columns, completion in zip(of_completions, completions, strict=True)
        ],
    }


def outcome_of(answer: Mapping[str, Any], completions: Sequence[Completion]) -> Outcome:
    """The outcome of a call from the answer of what ran it, which is checked: it can be anything."""
    if "failure" not in answer:
        try:
            values, metrics, extra = answer["values"], answer["metrics"], answer["extra"]
            _require_form(values, metrics, extra)
            checked = [_value(value, completion) for value, completion in zip(values, completions, strict=True)]
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
            answer = {"failure": "its process returned an invalid answer; does it change Python's own modules?"}
        else:
            return Outcome(checked, metrics, extra, _printed(answer))
    return Outcome([answer["failure"]] * len(completions), {}, {}, _printed(answer))


def _printed(answer: Mapping[str, Any]) -> str:
    """What a call printed, as text that can be stored; the function can have changed anything in its process."""
    text = answer.get("printed")
    return text[: 2 * MOST].encode("utf-8", "replace").decode() if isinstance(text, str) else ""


def _require_form(values: Any, metrics: Any, extra: Any) -> None:
    """Raise ValueError unless the parts of an answer have the form that the worker uses. The function runs in the
    process that answers, and can have changed anything in it."""
    logged = [value for column in metrics.values() for value in column]
    if not all(type(value) in (int, float) for value in logged):
        raise ValueError("a metric is not a number")
    if not all(isinstance(column, list) for column in (values, *extra.values())):
        raise ValueError("not lists")


def _value(value: Any, completion: Completion) -> Value:
    """A value from a worker. Step ends that do not match the completion are a failure."""
    if value is None:
        return None
    if not isinstance(value, dict):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError("not a finite number")
        return float(value)
    if "bad" in value:
        return writable_message(str(value["bad"]))
    rewards, ends = (tuple(value[name]) for name in ("rewards", "ends"))
    if not all(type(reward) in (int, float) for reward in rewards) or not all(type(end) is int for end in ends):
        raise ValueError("not numbers")
    steps, size = Steps(rewards, ends), len(completion.token_ids)
    rising = all(before < after for before, after in pairwise(steps.ends))
    if len(steps.ends) != len(steps.rewards) or not rising or not all(0 <= end < size for end in steps.ends):
        return (
            f"step_ends = {list(steps.ends)[:20]} for {len(steps.rewards)} step_rewards and {size} tokens: must be one "
            "per reward, strictly increasing, and within the completion"
        )
    return steps
