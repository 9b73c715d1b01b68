"""Statistics of values over two crossed factors, such as seeds and questions; Student's t; Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gruppo.utils.stats import standard_error

Alternative = Literal["two-sided", "greater", "less"]


@dataclass(frozen=True)
class MeanEstimate:
    """A mean with its standard error, the degrees of freedom of that error, and a 95 % interval."""

    mean: float
    error: float
    degrees: float
    interval: tuple[float, float]

    def p_value(self, alternative: Alternative = "two-sided") -> float:
        """The probability of a mean at least this far from 0, in the direction of the alternative, if the true one
        is 0."""
        above = student_above(self.mean / self.error, self.degrees)
        if alternative == "two-sided":
            return min(1.0, 2 * min(above, 1 - above))
        return above if alternative == "greater" else 1 - above


def crossed_mean(values: np.ndarray, share: float = 0.95) -> MeanEstimate:
    """The mean of `values`, a row per seed and a column per question, as an estimate for other seeds and questions.

    The model has two crossed random effects: value = mean + seed + question + rest, all independent with mean 0. With
    the mean squares M of the analysis of variance, Var(mean) is estimated by (M_seed + M_question - M_rest) / (S Q),
    and by no less than max(M_seed, M_question) / (S Q). Its degrees of freedom are Satterthwaite's, at least S - 1, and
    the interval is Student's. So with two seeds that disagree, the interval is wide.

    Assumptions: seeds and questions are random samples of those that the statement is about; every seed has answered
    every question; the means of seeds and of questions are roughly normal. For a comparison, `values` are differences
    of two arms on one question with one seed, which makes the test paired over both.

    With a single seed only the questions vary, and the interval says nothing about other seeds. If all values are
    equal, the error is that of `standard_error`, as for pairs of one seed. Raises ValueError for fewer than two
    questions.
    """
    seeds, questions = values.shape
    if questions < 2:
        raise ValueError(f"{questions} questions are too few; pass at least two")
    mean = float(values.mean())
    by_question = values.mean(axis=0)
    of_questions = seeds * float(((by_question - mean) ** 2).sum()) / (questions - 1)
    variance, degrees = of_questions, float(questions - 1)
    if seeds > 1:
        by_seed = values.mean(axis=1)
        of_seeds = questions * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
        rest = values - by_seed[:, None] - by_question + mean
        of_rest = float((rest**2).sum()) / ((seeds - 1) * (questions - 1))
        variance, degrees = _combined(
            (of_seeds, seeds - 1), (of_questions, questions - 1), (of_rest, (seeds - 1) * (questions - 1))
        )
    error = math.sqrt(variance / (seeds * questions))
    if error <= 1e-12:
        error, degrees = standard_error(by_question), float(questions - 1)
    half = student_quantile((1 + share) / 2, degrees) * error
    return MeanEstimate(mean, error, degrees, (mean - half, mean + half))


def _combined(
    of_seeds: tuple[float, int], of_questions: tuple[float, int], of_rest: tuple[float, int]
) -> tuple[float, float]:
    """The estimated variance, times the number of values, and its degrees of freedom. Arguments: mean squares with
    their degrees of freedom."""
    combined = of_seeds[0] + of_questions[0] - of_rest[0]
    largest = max(of_seeds, of_questions)
    if combined <= largest[0]:
        return largest[0], float(largest[1])
    spread = sum(square**2 / degrees for square, degrees in (of_seeds, of_questions, of_rest))
    return combined, max(float(of_seeds[1]), combined**2 / spread)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Holm 1979): the largest chance of any false claim, if claims are made below it.

    The i-th smallest of n is multiplied by n - i + 1; none is below a smaller one, and none above 1.
    """
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def student_above(value: float, degrees: float) -> float:
    """The probability that Student's t with these degrees of freedom is above `value`."""
    tail = 0.5 * _incomplete_beta(degrees / (degrees + value * value), degrees / 2, 0.5)
    return tail if value >= 0 else 1 - tail


def student_quantile(probability: float, degrees: float) -> float:
    """The value that Student's t is below with this probability, at least ½, by bisection."""
    low, high = 0.0, 1.0
    while student_above(high, degrees) > 1 - probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student_above(middle, degrees) > 1 - probability else (low, middle)
    return (low + high) / 2


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    if x > (a + 1) / (a + b + 2):  # where the fraction of the other tail converges quickly
        return 1.0 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 100_000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
