"""Numbers of twice the precision of float32, for devices that have no float64.

A pair is the unevaluated sum of two float32 numbers, high + low with |low| <= ulp(high) / 2, so it has 48 bits or more.
Sums and products are Knuth's and Dekker's error-free transformations (D. E. Knuth, The Art of Computer Programming,
volume 2, section 4.2.2; T. J. Dekker, "A floating-point technique for extending the available precision", 1971). They
need every single operation to be rounded as IEEE 754 says, which torch's elementwise operators do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

_SPLITTER = 2.0**12 + 1  # splits the 24 bits of a float32 into two numbers of 12 bits


@dataclass(frozen=True, eq=False)
class Pair:
    """The numbers high + low, elementwise. Arithmetic has a relative error of 2^-46 at most where no sum cancels."""

    high: Float[Tensor, "..."]
    low: Float[Tensor, "..."]

    @staticmethod
    def of(numbers: Float[Tensor, "..."]) -> Pair:
        """float64 numbers, rounded to pairs (an error of 2^-49, relative), or float32 numbers."""
        high = numbers.to(torch.float32)
        return Pair(high, (numbers - high).to(torch.float32))

    def map(self, function: Callable[[Tensor], Tensor]) -> Pair:
        """The pair of the function's results for both parts. The function must be linear, like a choice of elements."""
        return Pair(function(self.high), function(self.low))

    def __add__(self, other: Pair) -> Pair:
        high, error = _two_sum(self.high, other.high)
        return _normalized(high, error + (self.low + other.low))

    def __sub__(self, other: Pair) -> Pair:
        return self + other.map(torch.neg)

    def __mul__(self, other: Pair) -> Pair:
        high, error = _two_product(self.high, other.high)
        return _normalized(high, error + (self.high * other.low + self.low * other.high))

    def __gt__(self, other: Pair | float) -> Tensor:
        return (self - _paired(other, self.high)).high > 0

    def __ge__(self, other: Pair | float) -> Tensor:
        return (self - _paired(other, self.high)).high >= 0

    def running_sums(self) -> Pair:
        """The sums of the first 1, 2, … numbers along the last dimension, by recursive doubling."""
        total, size, reach = self, self.high.shape[-1], 1
        while reach < size:
            total = total + total.map(lambda part, reach=reach: pad(part, (reach, 0))[..., :size])  # type: ignore[misc]
            reach *= 2
        return total


def _paired(other: Pair | float, like: Tensor) -> Pair:
    if isinstance(other, Pair):
        return other
    return Pair.of(torch.tensor(other, dtype=torch.float64)).map(lambda part: part.to(like.device))


def _two_sum(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum, and its error."""
    total = one + other
    part = total - one
    return total, (one - (total - part)) + (other - part)


def _normalized(high: Tensor, low: Tensor) -> Pair:
    """high + low as a pair, for |low| <= |high| or high = 0."""
    total = high + low
    return Pair(total, low - (total - high))


def _two_product(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded product, and its error."""
    product = one * other
    (a, b), (c, d) = _split(one), _split(other)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _split(number: Tensor) -> tuple[Tensor, Tensor]:
    scaled = number * _SPLITTER
    high = scaled - (scaled - number)
    return high, number - high
