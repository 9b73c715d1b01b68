"""Group-relative advantages against numbers worked out by hand, and degenerate groups."""

import math

import pytest
import torch

from gruppo.algorithms.advantages import EPSILON, advantages, gae, indicators, process_advantages, returns_to_go


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    return advantages([rewards])[0]


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_two_of_four_correct_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean ½, sample std √(1/3)."""
    got = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    unit = 0.5 / (math.sqrt(1 / 3) + EPSILON)
    assert got.tolist() == pytest.approx([unit, -unit, -unit, unit], abs=1e-15)


def test_uneven_rewards_by_hand() -> None:
    """Rewards 1, 2, 6: mean 3, sample variance (4 + 1 + 9) / 2 = 7."""
    got = group_advantages(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([deviation / (math.sqrt(7) + 1e-6) for deviation in (-2, -1, 3)], abs=1e-15)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e30])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(value: float, size: int) -> None:
    """NeMo#4161, AReaL#1673: the rounding error of a mean must not be divided by ε."""
    for dtype in (torch.float32, torch.float64):
        assert group_advantages(torch.full((size,), value, dtype=dtype)).tolist() == [0.0] * size


def test_group_of_one_has_advantage_zero() -> None:
    """Unlike in verl, which trains a group of one on its raw reward."""
    assert advantages([column(5.0)])[0].tolist() == [0.0]


def test_no_rewards_at_all() -> None:
    assert advantages([]) == []
    assert advantages([column()])[0].tolist() == []


# Two groups, 1 2 6 and 3 3: means 3 and 3, standard deviations √7 and 0; all five: mean 3, variance (4+1+9)/4 = 3.5.
GROUPS = [column(1.0, 2.0, 6.0), column(3.0, 3.0)]


@pytest.mark.parametrize(
    ("baseline", "scale", "first", "second"),
    [
        ("group", "group", [-2 / math.sqrt(7), -1 / math.sqrt(7), 3 / math.sqrt(7)], [0, 0]),
        ("group", "none", [-2, -1, 3], [0, 0]),
        ("group", "batch", [-2 / math.sqrt(3.5), -1 / math.sqrt(3.5), 3 / math.sqrt(3.5)], [0, 0]),
        ("leave-one-out", "none", [1 - 4, 2 - 3.5, 6 - 1.5], [0, 0]),
        ("leave-one-out", "group", [-3 / math.sqrt(7), -1.5 / math.sqrt(7), 4.5 / math.sqrt(7)], [0, 0]),
        ("batch", "batch", [-2 / math.sqrt(3.5), -1 / math.sqrt(3.5), 3 / math.sqrt(3.5)], [0, 0]),
        ("batch", "none", [-2, -1, 3], [0, 0]),
        ("none", "none", [1, 2, 6], [3, 3]),
        ("none", "batch", [r / math.sqrt(3.5) for r in (1, 2, 6)], [r / math.sqrt(3.5) for r in (3, 3)]),
    ],
)
def test_baselines_and_scales_by_hand(baseline: str, scale: str, first: list[float], second: list[float]) -> None:
    got = advantages(GROUPS, baseline, scale)
    assert got[0].tolist() == pytest.approx(first, abs=1e-5)
    assert got[1].tolist() == second if not any(second) else got[1].tolist() == pytest.approx(second, abs=1e-5)


def test_batch_baseline_distinguishes_groups_of_equal_rewards() -> None:
    """A group of ones among zeros has nonzero advantages with batch normalization, but not with group normalization."""
    groups = [column(1.0, 1.0), column(0.0, 0.0)]
    unit = 0.5 / (math.sqrt(1 / 3) + EPSILON)
    assert [group.tolist() for group in advantages(groups, "batch", "batch")] == [
        pytest.approx([unit] * 2), pytest.approx([-unit] * 2)
    ]  # fmt: skip
    assert [group.tolist() for group in advantages(groups)] == [[0.0, 0.0]] * 2


def test_batch_normalization_accepts_a_group_of_one() -> None:
    got = advantages([column(1.0), column(3.0)], "batch", "batch")
    assert [float(advantage) for advantage in got] == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)], abs=1e-5)


def test_leave_one_out_refuses_a_group_of_one() -> None:
    with pytest.raises(ValueError, match="group of one"):
        advantages([column(1.0)], "leave-one-out", "none")


@pytest.mark.parametrize(("baseline", "scale"), [("mean", "group"), ("group", "std"), ("none", "group")])
def test_unknown_names_are_refused(baseline: str, scale: str) -> None:
    with pytest.raises(ValueError, match="write"):
        advantages([column(1.0, 2.0)], baseline, scale)


def test_returns_to_go_by_hand() -> None:
    assert returns_to_go(1.0, column(0.1, 0.2, 0.4)).tolist() == pytest.approx([0.3, 0.4, 0.6])
    assert returns_to_go(1.0, column()).tolist() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reward_that_is_not_finite_is_refused(bad: float) -> None:
    """ms-swift#8123: a NaN reward spreads over its group."""
    with pytest.raises(ValueError, match="finite"):
        group_advantages(torch.tensor([1.0, bad]))


def test_huge_rewards_keep_their_advantages() -> None:
    """Squares of 1e300 overflow; 0, 1, 2 and 0, 1e300, 2e300 have the same advantages except for ε."""
    huge = group_advantages(torch.tensor([0.0, 1e300, 2e300], dtype=torch.float64))
    assert huge.tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_indicators_by_hand() -> None:
    assert indicators(column(0.0, 0.5, 0.6, 1.0), 0.5).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_process_advantages_by_hand() -> None:
    """Steps of two completions: 1 and 0 (ends 1 and 3 of 5 tokens), 1 (end 0 of 2). All: mean 2/3, std √(1/3)."""
    steps = [(column(1.0, 0.0), [1, 3]), (column(1.0), [0])]
    ((first, second),) = process_advantages([steps], [[5, 2]])
    high, low = (1 / 3) / (math.sqrt(1 / 3) + EPSILON), (-2 / 3) / (math.sqrt(1 / 3) + EPSILON)
    assert first.tolist() == pytest.approx([high + low, high + low, low, low, 0.0], abs=1e-15)
    assert second.tolist() == pytest.approx([high, 0.0], abs=1e-15)


def test_process_advantages_with_different_numbers_of_steps() -> None:
    """Three steps, none and one, with rewards 3, 3, 0 and 0: mean 1.5, std √3."""
    steps = [(column(3.0, 3.0, 0.0), [0, 1, 2]), (column(), []), (column(0.0), [1])]
    ((first, none, last),) = process_advantages([steps], [[3, 2, 2]])
    unit = 1.5 / (math.sqrt(3) + EPSILON)
    assert first.tolist() == pytest.approx([unit, 0.0, -unit], abs=1e-15)
    assert none.tolist() == [0.0, 0.0]
    assert last.tolist() == pytest.approx([-unit, -unit], abs=1e-15)


@pytest.mark.parametrize("rewards", [[0.3, 0.3], [0.1 + 0.2], []])
def test_equal_step_rewards_give_exactly_zero(rewards: list[float]) -> None:
    ends = list(range(len(rewards)))
    ((advantage,),) = process_advantages([[(column(*rewards), ends)]], [[4]])
    assert advantage.tolist() == [0.0] * 4


def test_step_rewards_are_normalized_per_group() -> None:
    one, other = [(column(0.0, 1.0), [0, 1])], [(column(10.0, 30.0), [0, 1])]
    (first,), (second,) = process_advantages([one, other], [[2], [2]])
    assert first.tolist() == pytest.approx(second.tolist(), rel=1e-5)


@pytest.mark.parametrize("ends", [[0], [1, 0], [0, 0], [-1, 0], [0, 2]])
def test_ends_that_do_not_fit_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="step_ends"):
        process_advantages([[(column(0.0, 1.0), ends)]], [[2]])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_equals_the_direct_sum(gamma: float, lam: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(7, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    result = gae(rewards, values, gamma, lam)
    for t in range(7):
        direct = 0.0
        for later in range(t, 7):
            delta = float(rewards[later] + gamma * values[later + 1] - values[later])
            direct += (gamma * lam) ** (later - t) * delta
        assert float(result.advantages[t]) == pytest.approx(direct, abs=1e-12)
        assert float(result.returns[t]) == pytest.approx(direct + float(values[t]), abs=1e-12)


def test_gae_of_no_tokens_and_with_an_invalid_discount() -> None:
    assert gae(column(), column(0.0), 1.0, 0.95).advantages.tolist() == []
    with pytest.raises(ValueError, match=r"gamma = 1.1"):
        gae(column(1.0), column(0.0, 0.0), 1.1, 0.5)
