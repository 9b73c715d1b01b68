"""Tasks, graders, surrogates, step splitters and rewards as users might write them, valid and broken."""

from __future__ import annotations

import os
import time


def task(split):
    return [{"prompt": "a", "answer": "a"}]


def broken_task(split):
    raise RuntimeError("broken on purpose")


def no_rows(split):
    return None


async def asynchronous(text, columns):
    return False


def raises(text, columns):
    raise RuntimeError("broken on purpose")


def soft_surrogate(logprobs, ratio, advantages, clip_low, clip_high):
    return ratio / (1 + ratio) * advantages


def surrogate_of_one_number(logprobs, ratio, advantages, clip_low, clip_high):
    return (ratio * advantages).sum()


def begins_early(text, columns):
    return bool(text) and text[0] in "abcdefghijklm"


def every_two(text):
    """Split into steps of two characters."""
    return [*range(2, len(text), 2), len(text)] if text else []


def words_backwards(text):
    return sorted(range(1, len(text) + 1), reverse=True)


def no_ends(text):
    return None


def fails_on_short_texts(text):
    if len(text) < 4:
        raise RuntimeError("broken on purpose")
    return [len(text)]


_graded = []


def right_at_first(text, columns):
    """True for the first three calls: the trial call and two evaluations of one question."""
    _graded.append(text)
    return len(_graded) <= 3


def slow_surrogate(logprobs, ratio, advantages, clip_low, clip_high):
    """Takes a minute in the first update if SLOW is set; its trial call, on small tensors, stays fast."""
    if len(logprobs) > 40 and os.environ.get("SLOW"):
        print("updating", flush=True)
        time.sleep(60)
    return ratio * advantages


def sleeps(completions, **kwargs):
    """A reward that takes 30 seconds if SLOW is set."""
    if os.environ.get("SLOW"):
        time.sleep(30)
    return [float(len(completion) % 2) for completion in completions]


def by_level(completions: list, level: list, **columns: object) -> list[float]:
    return [float(value) for value in level]


def fails_on_a(completions, **kwargs):
    if any(text.startswith("a") for text in completions):
        raise ValueError("a group begins with an a")
    return [text.count("b") / 8 for text in completions]


def always_fails(completions, **kwargs):
    raise ValueError("always")


def from_env(completions: list[str], env_reward: list[float], **columns: object) -> list[float]:
    """Here, where processes that call it import no torch."""
    return env_reward
