"""Group-relative advantages against hand-worked numbers, and the degenerate groups."""

import math

import pytest
import torch

from gruppo.maths.advantages import EPSILON, group_advantages, masked_group_advantages


def test_two_of_four_right_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean ½, sample std √(1/3)."""
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    size = 0.5 / (math.sqrt(1 / 3) + EPSILON)
    assert got.tolist() == pytest.approx([size, -size, -size, size], abs=1e-15)


def test_uneven_rewards_by_hand() -> None:
    """Rewards 1, 2, 6: mean 3, sample variance (4 + 1 + 9) / 2 = 7."""
    got = group_advantages(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([each / (math.sqrt(7) + 1e-6) for each in (-2, -1, 3)], abs=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    """NeMo#4161, AReaL#1673: the rounding residue of a mean must not be divided by ε."""
    for dtype in (torch.float32, torch.float64):
        assert group_advantages(torch.full((size,), value, dtype=dtype)).tolist() == [0.0] * size


def test_group_of_one_has_advantage_zero() -> None:
    """verl trains a group of one on its raw reward."""
    assert masked_group_advantages([5.0]) == [0.0]


def test_abstained_completion_leaves_mean_and_std() -> None:
    """slime#1414, slime#2230: an uneven group is normalised by itself."""
    with_gap = masked_group_advantages([1.0, None, 2.0, 6.0])
    assert with_gap[1] == 0.0
    assert [with_gap[0], *with_gap[2:]] == masked_group_advantages([1.0, 2.0, 6.0])


def test_all_abstained() -> None:
    assert masked_group_advantages([None, None]) == [0.0, 0.0]
    assert masked_group_advantages([]) == []


def test_one_left_after_abstentions_is_a_group_of_one() -> None:
    assert masked_group_advantages([None, 3.0, None]) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reward_that_is_not_finite_is_refused(bad: float) -> None:
    """ms-swift#8123: a NaN reward spreads over its group."""
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, bad]))


def test_huge_rewards_keep_their_advantages() -> None:
    """Squares of 1e300 overflow; the advantages of 0, 1, 2 and of 0, 1e300, 2e300 are the same but for ε."""
    huge = group_advantages(torch.tensor([0.0, 1e300, 2e300], dtype=torch.float64))
    assert huge.tolist() == pytest.approx([-1.0, 0.0, 1.0])
