"""Reward functions of all kinds, valid and invalid, for the tests of the reward contract."""

from __future__ import annotations

import asyncio
import os
import time


def likes_letters(completions, **kwargs):
    """Share of letters a to m in a completion."""
    return [sum("a" <= letter <= "m" for letter in text) / max(1, len(text)) for text in completions]


letters_again = likes_letters  # the same judgment under another name


def begins_with_a_letter(completions, **kwargs):
    """Often the same for a whole group."""
    return [float(text[:1] in "abcd") for text in completions]


def steps(completions, completion_ids, **kwargs):
    """One step per token except the last: 1 for a letter a to m, else 0; None for a completion of one token."""
    return [
        {"step_rewards": ["a" <= letter <= "m" for letter in text[: len(ids) - 1]], "step_ends": range(len(ids) - 1)}
        if len(ids) > 1 and len(text) >= len(ids) - 1
        else None
        for text, ids in zip(completions, completion_ids, strict=True)
    ]


def invalid_steps(completions, **kwargs):
    """Invalid step rewards, selected by the completion's text."""
    return [
        {
            "names": {"rewards": [1]},
            "few": {"step_rewards": [1.0, 0.0], "step_ends": [0]},
            "back": {"step_rewards": [1.0, 0.0], "step_ends": [1, 0]},
            "late": {"step_rewards": [1.0], "step_ends": [99]},
            "nan": {"step_rewards": [float("nan")], "step_ends": [0]},
            "text": {"step_rewards": "1", "step_ends": ["0"]},
            "half": {"step_rewards": [1.0], "step_ends": [0.5]},
        }[text]
        for text in completions
    ]


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def named_arguments_only(completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]


async def waits(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [2.0] * len(completions)


_semaphore = asyncio.Semaphore(1)


async def shares_a_semaphore(completions, **kwargs):
    async def one():
        async with _semaphore:
            await asyncio.sleep(0.01)
            return 1.0

    return await asyncio.gather(*(one() for _ in completions))


def sometimes(completions, **kwargs):
    return [None if text == "skip" else 1.0 for text in completions]


def never(completions, **kwargs):
    return [None] * len(completions)


def logs(completions, log_metric, log_extra, trainer_state, **kwargs):
    log_metric("answers", len(completions))
    log_extra("seen", [text.upper() for text in completions])
    return [float(trainer_state.global_step)] * len(completions)


def misbehaves(completions, **kwargs):
    word = completions[0]
    if word == "hang":
        time.sleep(60)
    if word == "spin":
        while True:
            pass
    if word == "exit":
        os._exit(3)
    if word == "system exit":
        raise SystemExit(4)
    if word == "unprintable":
        raise RuntimeError("lone \ud800 surrogate")
    if word == "raise":
        raise RuntimeError("broken on purpose")
    answers = {
        "short": [1.0],
        "text": "12",
        "none": None,
        "words": ["one", 1.0],
        "nan": [float("nan"), 1.0],
        "infinite": [float("inf"), 1.0],
        "huge": [10**400, 1.0],
    }
    if word == "prints":
        print("x" * 5_000_000)
    return answers.get(word, [1.0] * len(completions))


def needs_more(completions, solution, **kwargs):
    return [0.0] * len(completions)


def takes_nothing(prompts):
    return [0.0]


def positional(completions, /):
    return [0.0]


class Callable:
    def __call__(self, completions, **kwargs):
        return [3.0] * len(completions)


instance = Callable()
not_callable = 3


def ends_in_a_vowel(completions, **kwargs):
    """A rule for step labels."""
    return [float(text[-1:] in {"a", "e", "i", "o", "u"}) for text in completions]


def always_half(completions, **kwargs):
    return [0.5 for _ in completions]


def number_types(completions, **kwargs):
    """Numbers of all types and values that are not numbers, selected by the completion's text."""
    import decimal
    import fractions

    import numpy as np
    import torch

    kinds = {
        "bool": True,
        "int": 2,
        "numpy": np.float32(0.5),
        "numpy int": np.int64(3),
        "0-d array": np.array(1.5),
        "torch": torch.tensor(2.5, requires_grad=True),
        "decimal": decimal.Decimal("0.25"),
        "fraction": fractions.Fraction(1, 4),
        "text": "1.0",
        "bytes": b"1.0",
        "bytearray": bytearray(b"1.0"),
        "numpy text": np.str_("1.0"),
        "nan": float("nan"),
        "infinite": -float("inf"),
        "numpy nan": np.float64("nan"),
        "huge": 10**400,
        "complex": 1j,
        "list": [1.0],
        "unprintable": _Unprintable(),
        "none": None,
    }
    return [kinds[text] for text in completions]


class _Unprintable:
    def __float__(self):
        raise _UnprintableError

    def __repr__(self):
        raise SystemExit(3)

    __str__ = __repr__


class _UnprintableError(Exception):
    def __str__(self):
        raise SystemExit(3)
