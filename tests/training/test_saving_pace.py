"""Checkpoints take at most a tenth of the time of a training, on any disk."""

from __future__ import annotations

from itertools import pairwise

import pytest

from gruppo.training.saving_pace import FIRST_RATE, SHARE, SavingPace


def simulated(update: float, checkpoint: float, every: int, updates: int, size: int = 10**6) -> tuple[list[int], float]:
    """The updates after which a checkpoint is saved, and the share of the time that saving takes. Times in seconds."""
    now, saved = 0.0, []
    pace = SavingPace(size, clock=lambda: now)
    for number in range(1, updates + 1):
        now += update
        if number % every == 0 and pace.allows:
            with pace.saving():
                now += checkpoint
            saved.append(number)
    return saved, pace.spent / now


def test_quick_checkpoints_are_saved_whenever_they_are_due() -> None:
    saved, _ = simulated(update=1.0, checkpoint=0.5, every=6, updates=60)
    assert saved == list(range(6, 61, 6))


@pytest.mark.parametrize("checkpoint", [2.0, 6.0, 40.0])
def test_slow_checkpoints_are_saved_less_often(checkpoint: float) -> None:
    """After the first one, which is saved before its time is known."""
    saved, share = simulated(update=1.0, checkpoint=checkpoint, every=6, updates=2000)
    assert SHARE / 2 < share <= SHARE
    between = [late - early for early, late in pairwise(saved)]
    assert max(between[1:]) <= checkpoint / SHARE + 6
    assert all(number % 6 == 0 for number in saved)


def test_the_first_checkpoint_of_a_large_model_waits_until_it_pays() -> None:
    size = 1_600_000_000
    saved, share = simulated(update=1.0, checkpoint=8.0, every=6, updates=200, size=size)
    assert (size / FIRST_RATE) * (1 / SHARE - 1) <= saved[0] < (size / FIRST_RATE) * (1 / SHARE - 1) + 6
    assert share <= SHARE
