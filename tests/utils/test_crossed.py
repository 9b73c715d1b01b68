"""Means over two crossed factors, Student's t, and Holm's correction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gruppo.utils.crossed import crossed_mean, holm, student_above, student_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.30265), (2.5, 3.57465), (10, 2.22814), (1e7, 1.959964)]
)
def test_quantiles_are_those_of_tables(degrees: float, quantile: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(quantile, rel=2e-4)
    assert student_above(quantile, degrees) == pytest.approx(0.025, rel=2e-3)
    assert student_above(-quantile, degrees) == pytest.approx(0.975, rel=1e-4)


def test_a_table_worked_out_by_hand() -> None:
    """Seeds differ by 0.2 on average, questions by 0.4: M_seed = 3·2·0.1² = 0.06, M_question = 2·2·0.4²/2 = 0.32."""
    values = np.array([[0.0, 0.4, 0.8], [0.2, 0.6, 1.0]])
    found = crossed_mean(values)
    assert found.mean == pytest.approx(0.5)
    variance = (0.06 + 0.32) / 6  # the rest is 0
    degrees = 0.38**2 / (0.06**2 / 1 + 0.32**2 / 2)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.degrees == pytest.approx(degrees)
    half = student_quantile(0.975, degrees) * math.sqrt(variance)
    assert found.interval == pytest.approx((0.5 - half, 0.5 + half))
    assert found.p_value() == pytest.approx(2 * found.p_value("greater"))
    assert found.p_value("less") == pytest.approx(1 - found.p_value("greater"))


def test_seeds_that_disagree_make_the_interval_wide() -> None:
    """A thousand questions do not help if two seeds say the opposite: one degree of freedom."""
    values = np.repeat([[0.1], [-0.05]], 1000, axis=1)
    found = crossed_mean(values)
    assert found.degrees == pytest.approx(1)
    assert found.interval[0] < -0.9
    assert found.p_value() > 0.5
    assert crossed_mean(values[:1]).p_value() < 1e-6, "the questions of one seed alone would claim it"


def test_the_error_rate_is_the_level() -> None:
    rng = np.random.default_rng(0)
    false = sum(
        crossed_mean(rng.normal(0, 0.1, (3, 1)) + rng.normal(0, 0.3, (1, 40)) + rng.normal(0, 0.3, (3, 40))).p_value()
        < 0.05
        for _ in range(300)
    )
    assert 5 <= false <= 26, "5 % of 300, give or take three standard deviations"


def test_equal_values_leave_doubt() -> None:
    found = crossed_mean(np.zeros((2, 10)))
    assert found.p_value() == 1
    assert found.interval[1] > 0.2
    with pytest.raises(ValueError, match="at least two"):
        crossed_mean(np.zeros((2, 1)))


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
