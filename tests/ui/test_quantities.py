"""The numbers of each token, against numpy by hand: what they follow from, what is missing, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gruppo.ui.quantities import COMPLETION, Numbers, Quantity, Ranges, as_numbers, rounded

QUANTITIES = {one.key: one for one in COMPLETION}
SAMPLING, OLD, REF = [-0.1, -2.0, -0.7], [-0.15, -1.5, -0.7], [-0.2, -1.0, -0.9]


def cell(values: Sequence[float | None] | None) -> Numbers | None:
    return as_numbers(pa.scalar(values, pa.list_(pa.float64())))


def row(**columns: Sequence[float | None] | None) -> dict[str, Any]:
    given = {"sampling_logprobs": SAMPLING, "old_logprobs": OLD, "ref_logprobs": REF, "entropy": [0.5, 1.5, 0.0],
             "advantages": [1.0, 1.0, -1.0], "values": None, "returns": None, **columns}  # fmt: skip
    return {"token_ids": [4, 5, 6], **{name: cell(values) for name, values in given.items()}}


def of(key: str, **columns: Sequence[float | None] | None) -> list[float | str | None] | None:
    numbers = QUANTITIES[key].of(row(**columns))
    return None if numbers is None else rounded(numbers)


def test_quantities_of_a_completion_follow_from_its_columns() -> None:
    sampling, old, ref = np.array(SAMPLING), np.array(OLD), np.array(REF)
    assert of("advantage") == [1, 1, -1]
    assert of("sampling_logprob") == SAMPLING
    assert of("old_logprob") == OLD
    assert of("ref_logprob") == REF
    assert of("entropy") == [0.5, 1.5, 0]
    assert of("ratio") == pytest.approx((np.exp(old) / np.exp(sampling)).tolist(), rel=1e-6)
    assert of("difference") == pytest.approx([-0.05, 0.5, 0.0], abs=1e-7)
    fraction = np.exp(ref) / np.exp(old)
    assert of("kl") == pytest.approx((fraction - np.log(fraction) - 1).tolist(), rel=1e-6)  # DeepSeekMath Eq. 4
    assert of("kl")[1] == pytest.approx(math.exp(0.5) - 0.5 - 1, rel=1e-6)  # type: ignore[index]


def test_the_kl_of_nearly_equal_policies_is_not_rounded_away() -> None:
    kl = of("kl", old_logprobs=[-1.0] * 3, ref_logprobs=[-1.0 + 1e-6] * 3)
    assert kl == pytest.approx([0.5e-12] * 3, rel=1e-3)


@pytest.mark.parametrize("key", ["value", "return"])
def test_numbers_of_a_value_model_are_none_without_one(key: str) -> None:
    assert of(key) is None


def test_values_of_tokens_leave_out_the_value_after_the_last_one() -> None:
    assert of("value", values=[0.1, 0.2, 0.3, 0.9]) == [0.1, 0.2, 0.3]
    assert of("return", returns=[1.0, 1.0, 1.0]) == [1, 1, 1]


def test_a_missing_column_is_none_in_all_that_needs_it() -> None:
    assert [of(key, ref_logprobs=None) for key in ("ref_logprob", "kl")] == [None, None]
    assert of("ratio", ref_logprobs=None) is not None
    offline = {"sampling_logprobs": None}
    assert [of(key, **offline) for key in ("sampling_logprob", "ratio", "difference")] == [None] * 3
    assert of("kl", **offline) is not None
    assert [of(key, old_logprobs=None) for key in ("old_logprob", "ratio", "difference", "kl")] == [None] * 4


def test_a_missing_number_is_none_at_its_token() -> None:
    assert of("old_logprob", old_logprobs=[None, -1.5, -0.7]) == [None, -1.5, -0.7]
    ratio = of("ratio", old_logprobs=[None, -1.5, -0.7], sampling_logprobs=[-0.1, None, -0.7])
    assert ratio == [None, None, 1.0]
    assert of("entropy", entropy=[None, None, None]) is None


@pytest.mark.parametrize("length", [2, 0])
def test_too_few_numbers_are_not_recorded(length: int) -> None:
    assert of("advantage", advantages=[1.0] * length) is None


def test_pairs_of_unequal_length_have_no_ratio() -> None:
    assert of("ratio", old_logprobs=[-1.0] * 4) is None


def test_numbers_that_json_does_not_have_are_texts() -> None:
    assert of("advantage", advantages=[math.nan, math.inf, -math.inf]) == ["NaN", "inf", "-inf"]
    assert of("ratio", old_logprobs=[1000.0, -math.inf, -0.7], sampling_logprobs=[-1.0] * 3)[:2] == ["inf", 0.0]  # type: ignore[index]
    assert of("difference", old_logprobs=[-math.inf] * 3, sampling_logprobs=[-math.inf] * 3) == ["NaN"] * 3
    assert of("advantage", advantages=[math.nan, None, 1.0]) == ["NaN", None, 1.0]


@pytest.mark.parametrize("value", [0.1, -0.123456789, 1e-300, 1e300, 123456789.0, 5e-324, 0.0, 1.7976931348623157e308])
def test_seven_significant_digits(value: float) -> None:
    (short,) = rounded(Numbers(np.array([value]), np.array([True])))
    assert isinstance(short, float)
    assert short == pytest.approx(value, rel=5e-7, abs=5e-308)


def test_seven_digits_are_written() -> None:
    assert rounded(Numbers(np.array([-0.123456789, 2 / 3]), np.array([True, True]))) == [-0.1234568, 0.6666667]


def ranges(quantity: Quantity, *completions: tuple[Sequence[float | None], Sequence[bool]]) -> dict[str, Any]:
    found = Ranges([quantity])
    for values, mask in completions:
        found.add({quantity.key: cell(values)}, mask)
    return found.described()[0]


def test_ranges_are_over_sampled_tokens_of_all_completions() -> None:
    found = ranges(
        QUANTITIES["advantage"], ([1.0, 9.0, -3.0], [True, False, True]), ([0.5, None, math.nan], [True] * 3)
    )
    assert (found["recorded"], found["of"]) == (2, 2)
    assert (found["mean"], found["low"], found["high"]) == (-0.5, -3, 1)
    assert found["limit"] == 3


def test_the_limit_of_a_ratio_is_that_of_its_logarithm() -> None:
    found = ranges(QUANTITIES["ratio"], ([0.25, 1.0, 2.0], [True] * 3))
    assert found["limit"] == pytest.approx(np.quantile(np.abs(np.log([0.25, 1.0, 2.0])), 0.99), rel=5e-3)
    assert ranges(QUANTITIES["ratio"], ([0.0, 0.0], [True] * 2))["limit"] == 1


def test_one_token_does_not_decide_the_colors_of_the_others() -> None:
    values = [-0.1] * 999 + [-50.0]
    assert ranges(QUANTITIES["sampling_logprob"], (values, [True] * 1000))["limit"] < 1
    assert ranges(QUANTITIES["advantage"], (values, [True] * 1000))["limit"] == 50  # an exact scale


def test_the_percentile_of_a_long_completion_is_sampled_evenly() -> None:
    values = np.linspace(0, 1, 50_000).tolist()
    assert ranges(QUANTITIES["entropy"], (values, [True] * 50_000))["limit"] == pytest.approx(0.99, abs=0.002)


def test_nothing_recorded_has_no_range_and_a_limit_of_1() -> None:
    found = Ranges(COMPLETION)
    found.add(dict.fromkeys(QUANTITIES), [True])
    for one in found.described():
        assert (one["recorded"], one["of"], one["mean"], one["low"], one["high"], one["limit"]) == (
            0,
            1,
            *[None] * 3,
            1,
        )
        assert one["needs"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, math.inf]])
def test_only_zeros_or_no_finite_numbers_have_a_limit_of_1(values: list[float]) -> None:
    assert ranges(QUANTITIES["entropy"], (values, [True, True]))["limit"] == 1


def test_ranges_of_huge_numbers_stay_numbers_of_json() -> None:
    found = ranges(QUANTITIES["advantage"], ([1.7976931348623157e308] * 2, [True, True]))
    assert all(found[name] is None or math.isfinite(found[name]) for name in ("mean", "low", "high", "limit"))


def test_the_mean_leaves_out_what_was_not_sampled_or_is_not_finite() -> None:
    numbers = Numbers(np.array([1.0, 5.0, math.inf, 2.0]), np.array([True, True, True, False]))
    assert numbers.mean([True, False, True, True]) == 1
    assert numbers.mean([False, False, True, True]) is None
    huge = Numbers(np.array([1.7e308, 1.7e308]), np.array([True, True])).mean([True, True])
    assert huge is None or math.isfinite(huge)
