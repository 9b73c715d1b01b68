"""How much of a step's gradient is signal: its agreement between two halves of the step's groups.

The gradient G = a + b is a sum over n groups, with n_a of them in the first half. Groups are independent samples, so
E[a·b] = n_a n_b |μ|², where μ is the expected gradient of a group, and n²/(n_a n_b) · a·b is an unbiased estimate of
|E G|². Its share of |G|² is the signal; the rest is noise, the trace of the covariance of G. The noise scale
(McCandlish et al. 2018, arXiv 1812.06162, Eq. 2.8) is that trace for a single completion, divided by |E G|²: the number
of completions in a step whose gradient is half signal and half noise. Completions of a group are not independent, so
the number holds for groups of the recipe's size.

The first half is an additional pass before the update. b is not computed, but G - a. Updates do not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gruppo.models.packing import Part, TokenWeights, trained_lengths
from gruppo.models.ranks import ALONE, Ranks
from gruppo.training.shard_files import local_tensor
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.random_numbers import generator_of
from gruppo.utils.transfer import as_floats, real_dtype

COORDINATES = 4_000_000  # of a rank's gradient, at most, that are compared


@dataclass(frozen=True)
class Halves:
    """The groups of an update in two halves.

    `part`: the completions of the first half. `weights`: token weights as in the whole update. `first`, `second`: the
    numbers of groups. `completions`: of both.
    """

    part: Part
    weights: TokenWeights
    first: int
    second: int
    completions: int


def split_in_halves(groups: Sequence[Group], part: Part | None, weights: TokenWeights, step: int) -> Halves | None:
    """Split the groups that an update learns from at random, as a function of the step's number alone. None if there
    are fewer than two.

    Groups without a nonzero advantage count: their gradient is known to be 0. `part`: the completions of the update, by
    default all; completions that are not trained on count as if they had not been sampled.
    """
    used, lengths = trained_lengths(groups, part)
    places = [place for place, numbers in enumerate(used) if numbers]
    if len(places) < 2:
        return None
    order = generator_of((step,)).permutation(len(places))
    first = {places[place] for place in order[: len(places) // 2]}
    chosen = [numbers if place in first else [] for place, numbers in enumerate(used)]
    return Halves(chosen, fixed(weights, lengths), len(first), len(places) - len(first), sum(map(len, used)))


def fixed(weights: TokenWeights, lengths: list[list[int]]) -> TokenWeights:
    """Token weights of some of the groups as parts of a whole with these lengths. Groups that are left out have no
    lengths."""
    whole = weights(lengths)
    return lambda rows: [kept if row else [] for kept, row in zip(whole, rows, strict=True)]


@torch.no_grad()
def sampled_gradient(module: nn.Module) -> Tensor:
    """Every k-th coordinate of this rank's gradient, at most COORDINATES of them, as a copy.

    k is 1 or a prime number, so that all columns of a matrix are sampled alike.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total = sum(local_tensor(parameter).numel() for parameter in trained)
    stride = _prime(-(-total // COORDINATES))
    parts = []
    for parameter in trained:
        shard = local_tensor(parameter if parameter.grad is None else parameter.grad).detach().flatten()[::stride]
        parts.append(torch.zeros_like(shard) if parameter.grad is None else shard)
    whole = torch.cat(parts)
    return whole.to(real_dtype(whole.device), copy=True)


def _prime(least: int) -> int:
    """1, or the smallest prime number from `least` on."""
    number = max(1, least)
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


@dataclass(frozen=True)
class Noise:
    """What two halves of a gradient say.

    `agreement`: the cosine of the angle between them. `signal`: the estimated share of the squared norm of the whole
    gradient that is signal; noise can make it negative. `scale`: the noise scale in completions, None without signal.
    """

    agreement: float
    signal: float
    scale: float | None


def noise_of(products: Sequence[float], halves: Halves) -> Noise | None:
    """The noise of a gradient, from a·a, a·b and b·b of its halves a and b. None if it is 0 or not finite."""
    first, both, second = products
    squared_norm = first + 2 * both + second
    if not (squared_norm > 0 and math.isfinite(squared_norm)):
        return None
    groups = halves.first + halves.second
    signal = both * groups**2 / (halves.first * halves.second) / squared_norm
    scale = halves.completions * (1 - signal) / signal if signal > 0 else None
    return Noise(both / math.sqrt(first * second) if both else 0.0, signal, scale)


class HalfGradient:
    """The gradient of the first half of an update, to be compared with that of the whole update."""

    def __init__(self, module: nn.Module, halves: Halves, ranks: Ranks = ALONE) -> None:
        """Keeps a copy of the module's gradient, which is that of the first half."""
        self.module, self.halves, self.ranks = module, halves, ranks
        self._first = sampled_gradient(module)

    def compare(self, metrics: Metrics) -> None:
        """Compare with the module's gradient, which is that of the whole update, and record the noise. Changes
        nothing."""
        second = sampled_gradient(self.module) - self._first
        own = as_floats([self._first @ self._first, self._first @ second, second @ second])
        noise = noise_of([sum(values) for values in zip(*self.ranks.gather(own), strict=True)], self.halves)
        if noise is not None:
            metrics.mean("gradient/agreement", noise.agreement)
            metrics.mean("gradient/signal", noise.signal)
            if noise.scale is not None:
                metrics.mean("gradient/noise_scale", noise.scale)
