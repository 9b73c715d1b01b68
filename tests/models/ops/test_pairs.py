"""Pairs of float32 against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from gruppo.models.ops.pairs import Pair


def exact(pair: Pair) -> list[Fraction]:
    return [Fraction(high) + Fraction(low) for high, low in zip(pair.high.tolist(), pair.low.tolist(), strict=True)]


def numbers(seed: int, count: int = 2000) -> Tensor:
    """Positive numbers of many magnitudes, with all 53 bits."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, count, generator=generator, dtype=torch.float64)
    return uniform[0] * torch.exp2(-30 * uniform[1])


def near(found: list[Fraction], expected: list[Fraction], bits: int) -> None:
    assert all(abs(one - other) <= abs(other) / 2**bits for one, other in zip(found, expected, strict=True))


def test_a_pair_has_the_bits_of_two_numbers() -> None:
    values = numbers(0)
    pair = Pair.of(values)
    assert pair.high.dtype == pair.low.dtype == torch.float32
    near(exact(pair), [Fraction(value) for value in values.tolist()], 48)
    assert torch.equal((pair.high + pair.low), pair.high)
    assert exact(Pair.of(torch.tensor([1 - 2**-53], dtype=torch.float64))) == [1 - Fraction(1, 2**53)]


def test_sums_differences_and_products_against_exact_arithmetic() -> None:
    one, other = Pair.of(numbers(1)), Pair.of(numbers(2))
    pairs = list(zip(exact(one), exact(other), strict=True))
    near(exact(one + other), [a + b for a, b in pairs], 46)
    near(exact(one * other), [a * b for a, b in pairs], 45)
    wrong = [abs(found - (a - b)) / (a + b) for found, (a, b) in zip(exact(one - other), pairs, strict=True)]
    assert max(wrong) <= Fraction(1, 2**46)


def test_comparisons_see_the_last_bit() -> None:
    one, same = Pair.of(numbers(3)), Pair.of(numbers(3))
    above, below = (Pair(one.high, one.low + sign * one.high * 2**-46) for sign in (1, -1))
    assert bool((above > one).all())
    assert not bool((below > one).any())
    assert bool((one >= same).all())
    assert not bool((one > same).any())
    assert not bool((below >= one).any())
    third = Pair.of(torch.full((1,), 1 / 3, dtype=torch.float64))
    assert bool((third >= 1 / 3).all())
    assert not bool((third > 1 / 3).any())


@pytest.mark.parametrize("size", [1, 2, 255, 1000])
def test_running_sums_against_exact_arithmetic(size: int) -> None:
    values = numbers(4, size).float()
    sums, total = [], Fraction(0)
    for value in values.tolist():
        total += Fraction(value)
        sums.append(total)
    near(exact(Pair.of(values).running_sums()), sums, 44)
