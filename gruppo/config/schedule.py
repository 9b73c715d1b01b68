"""Length, warm-up and learning rate of a run, computed from the recipe."""

from __future__ import annotations

import math
from fractions import Fraction

from gruppo.config.sections import Optimizer, Run


def warmup_steps(settings: Optimizer, steps: int) -> int:
    """Steps of warm-up in a run of `steps` steps, at most `steps` with warmup_ratio."""
    if settings.warmup_ratio is None:
        return settings.warmup_steps
    return math.ceil(_decimal(settings.warmup_ratio) * steps)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then constant, or linear or cosine decay to 0."""
    warmup = warmup_steps(settings, steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.learning_rate * factor[settings.schedule]


def steps_of_epochs(run: Run, prompts: int, prompts_per_step: int) -> int:
    """Steps of run.epochs passes over `prompts` prompts: enough for all of them, in iterations of equal length."""
    assert run.epochs is not None
    steps = math.ceil(_decimal(run.epochs) * prompts / prompts_per_step)
    return math.ceil(Fraction(steps, run.iterations)) * run.iterations


def _decimal(number: float) -> Fraction:
    """The number as it is written, so that 0.1 × 30 is 3 and not a little more."""
    return Fraction(repr(float(number)))
