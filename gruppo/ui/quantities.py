"""The numbers of each token that can be shown: their names, how they follow from the columns, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

_SAMPLE = 2_000  # numbers of a completion that a percentile is computed from, evenly spaced
_DIGITS = 7  # significant digits


@dataclass(frozen=True)
class Numbers:
    """One number per token. `values`: float64 of shape (tokens,). `known`: False where a number is not recorded."""

    values: np.ndarray
    known: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def first(self, count: int) -> Numbers:
        """Those of the first `count` tokens."""
        return Numbers(self.values[:count], self.known[:count])

    def finite(self, mask: Sequence[bool]) -> np.ndarray:
        """The recorded finite numbers of sampled tokens."""
        finite: np.ndarray = self.values[self.known & np.isfinite(self.values) & np.asarray(mask, dtype=bool)]
        return finite

    def mean(self, mask: Sequence[bool]) -> float | None:
        """Mean over the sampled tokens that have a finite number; None if there are none, or their sum overflows."""
        finite = self.finite(mask)
        with np.errstate(over="ignore"):
            return _short(float(finite.mean())) if len(finite) else None


def _short(value: float) -> float | None:
    """The value with 7 significant digits; None if it is not finite, which JSON has no number for."""
    short = float(f"{value:.{_DIGITS}g}")
    return short if math.isfinite(short) else None


def as_numbers(value: pa.ListScalar) -> Numbers | None:
    """The numbers in a cell of a table; None if the cell is empty."""
    if not value.is_valid:
        return None
    known = value.values.is_valid().to_numpy(zero_copy_only=False)
    return Numbers(value.values.cast(pa.float64()).to_numpy(zero_copy_only=False), known)


def rounded(numbers: Numbers) -> list[float | str | None]:
    """JSON numbers with 7 significant digits; None where nothing is recorded, else "NaN", "inf" or "-inf"."""
    values = numbers.values
    with np.errstate(all="ignore"):
        size = np.floor(np.log10(np.abs(np.where((values == 0) | ~np.isfinite(values), 1.0, values))))
        scale = np.power(10.0, np.clip(_DIGITS - 1 - size, -300, 300))
        short = (np.round(values * scale) / scale).tolist()
    if numbers.known.all() and np.isfinite(values).all():
        return list(short)
    return [
        (one if math.isfinite(one) else "NaN" if math.isnan(one) else str(one)) if known else None
        for one, known in zip(short, numbers.known.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Quantity:
    """A number of each token.

    `scale`: how it is colored: "diverging" around 0, "ratio" around 1 by its logarithm, "low" (from 0 downward, dark
    is low) or "high" (from 0 upward). `exact`: whether the scale ends at the largest value; otherwise at the 99th
    percentile of the absolute value, so that one token does not decide. `needs`: when it is recorded.
    """

    key: str
    label: str
    meaning: str
    unit: str
    scale: str
    needs: str
    compute: Callable[[Mapping[str, Any]], Numbers | None]
    exact: bool = False

    def of(self, row: Mapping[str, Any]) -> Numbers | None:
        """The numbers of a completion; None if they are not recorded, or do not fit its tokens."""
        with np.errstate(all="ignore"):
            numbers = self.compute(row)
        count = len(row["token_ids"])
        if numbers is None or len(numbers) < count or not numbers.known[:count].any():
            return None
        return numbers.first(count)


def _column(name: str) -> Callable[[Mapping[str, Any]], Numbers | None]:
    return lambda row: row[name]


def _pair(
    one: str, other: str, function: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Mapping[str, Any]], Numbers | None]:
    """A function of the difference of two columns."""

    def compute(row: Mapping[str, Any]) -> Numbers | None:
        first, second = row[one], row[other]
        if first is None or second is None or len(first) != len(second):
            return None
        return Numbers(function(first.values - second.values), first.known & second.known)

    return compute


_UPDATE = "in groups that an update used"
_REFERENCE = "in runs with a reference (method.kl_coef > 0, or DPO)"
_VALUES = "in runs with a value model (PPO)"

_ENGINE = Quantity(
    "sampling_logprob", "log-probability, engine", "log π_sampling, which the engine recorded while it sampled", "nats",
    "low", "for sampled completions", _column("sampling_logprobs"),
)  # fmt: skip
COMPLETION = (
    Quantity(
        "advantage", "advantage", "Â of the token in the loss", "", "diverging", "with every group",
        _column("advantages"), exact=True,
    ),
    _ENGINE,
    Quantity(
        "old_logprob", "log-probability, trainer", "log π_old, which the trainer computed before the step", "nats",
        "low", _UPDATE, _column("old_logprobs"),
    ),
    Quantity(
        "ref_logprob", "log-probability, reference", "log π_ref", "nats", "low", _REFERENCE, _column("ref_logprobs")
    ),
    Quantity(
        "ratio", "ratio π_old / π_sampling", "trainer to engine, before the cap of method.tis_cap; not π_θ / π_old, "
        "which is 1 before the first update", "", "ratio", _UPDATE, _pair("old_logprobs", "sampling_logprobs", np.exp),
    ),
    Quantity(
        "difference", "difference, trainer − engine", "log π_old - log π_sampling", "nats", "diverging", _UPDATE,
        _pair("old_logprobs", "sampling_logprobs", np.positive),
    ),
    Quantity(
        "kl", "KL to the reference (k3)", "π_ref/π_old - log(π_ref/π_old) - 1, from this token alone", "nats", "high",
        _REFERENCE, _pair("ref_logprobs", "old_logprobs", lambda difference: np.expm1(difference) - difference),
    ),
    Quantity(
        "entropy", "entropy", "of the policy before the step, over all tokens that could have come here", "nats",
        "high", _UPDATE, _column("entropy"),
    ),
    Quantity(
        "value", "value", "the value model's prediction before the token", "", "diverging", _VALUES,
        _column("values"), exact=True,
    ),
    Quantity(
        "return", "return", "target of the value", "", "diverging", _VALUES, _column("returns"), exact=True,
    ),
)  # fmt: skip
ANSWER = (
    Quantity(
        "sampling_logprob", _ENGINE.label, _ENGINE.meaning, "nats", "low", "for answers of gruppo's own engine",
        _column("logprobs"),
    ),
)  # fmt: skip


class Ranges:
    """Ranges of quantities over the sampled tokens of all completions of a group."""

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        self.quantities = quantities
        self._completions = 0
        self._recorded = dict.fromkeys((one.key for one in quantities), 0)
        self._sampled: dict[str, list[np.ndarray]] = {one.key: [] for one in quantities}
        self._totals = {one.key: [0.0, 0.0, math.inf, -math.inf] for one in quantities}  # count, sum, lowest, highest

    def add(self, numbers: Mapping[str, Numbers | None], mask: Sequence[bool]) -> None:
        """Count the numbers of a completion."""
        self._completions += 1
        for key, one in numbers.items():
            if one is None:
                continue
            self._recorded[key] += 1
            finite = one.finite(mask)
            if len(finite):
                total = self._totals[key]
                total[0] += len(finite)
                with np.errstate(over="ignore"):
                    total[1] += float(finite.sum())
                total[2], total[3] = min(total[2], float(finite.min())), max(total[3], float(finite.max()))
                places = np.linspace(0, len(finite) - 1, min(len(finite), _SAMPLE)).astype(int)
                self._sampled[key].append(finite[places])

    def described(self) -> list[dict[str, Any]]:
        """For a page: name, meaning, number of completions that have it, mean, lowest, highest, and `limit`, at which
        the colors end: an absolute value, for a ratio of its logarithm; 1 if all are 0."""
        return [self._described(one) for one in self.quantities]

    def _described(self, quantity: Quantity) -> dict[str, Any]:
        count, total, low, high = self._totals[quantity.key]
        size = 0.0
        if count:
            values = np.concatenate(self._sampled[quantity.key])
            with np.errstate(all="ignore"):
                sizes = np.abs(np.log(values) if quantity.scale == "ratio" else values)
            sizes = sizes[np.isfinite(sizes)]
            largest = max(abs(low), abs(high)) if quantity.exact else float(sizes.max(initial=0.0))
            size = largest if quantity.exact or not len(sizes) else float(np.quantile(sizes, 0.99)) or largest
        short = [_short(one) for one in (total / count, low, high)] if count else [None] * 3
        return {
            "key": quantity.key,
            "label": quantity.label,
            "meaning": quantity.meaning,
            "unit": quantity.unit,
            "scale": quantity.scale,
            "needs": quantity.needs,
            "recorded": self._recorded[quantity.key],
            "of": self._completions,
            "mean": short[0],
            "low": short[1],
            "high": short[2],
            "limit": float(f"{min(size, 1e308):.3g}") or 1.0,
        }
