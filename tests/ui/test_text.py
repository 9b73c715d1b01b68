"""Numbers as the pages write them."""

from __future__ import annotations

import math

import pytest

from gruppo.ui.text import height, number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.28125, "0.2813"), (-0.28125, "−0.2813"), (0.5, "0.5"), (0.0, "0"), (17.724, "17.72"), (12345.6, "12,346"),
        (2.5e-7, "2.5e−07"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers_are_rounded_as_the_scripts_of_the_pages_round(value: float | None, text: str) -> None:
    """0.28125 is 0.2813 in a curve's title too, where JavaScript writes it."""
    assert number(value) == text


def test_bars_of_equal_rewards_say_whether_they_are_positive() -> None:
    assert [height(value, 0.0, 1.0) for value in (0.0, 0.5, 1.0)] == [12, 56, 100]
    assert (height(1.0, 1.0, 1.0), height(0.0, 0.0, 0.0), height(-1.0, -1.0, -1.0)) == (100, 12, 12)
