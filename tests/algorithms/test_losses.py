"""Losses against numbers worked out by hand and the gradient coefficient of the paper."""

import math

import pytest
import torch

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.algorithms.losses import policy_loss, value_loss


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_at_ratio(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and ∂J/∂logprob of one token of weight 1, clipped at 0.8 and 1.2."""
    logprobs = column(-1.0).requires_grad_()
    old = column(-1.0 - math.log(ratio))
    result = policy_loss(logprobs, old, column(advantage), column(1.0), clip_low=0.2, clip_high=0.2)
    (gradient,) = torch.autograd.grad(-result.loss, logprobs)
    return float(result.loss.detach()), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (0.5, 1.0, -0.5, 0.5),  # min(0.5, 0.8): the ratio itself, gradient ρÂ
        (1.0, 1.0, -1.0, 1.0),
        (1.5, 1.0, -1.2, 0.0),  # min(1.5, 1.2): clipped, no gradient
        (0.5, -2.0, 1.6, 0.0),  # min(-1.0, -1.6): clipped, no gradient
        (1.0, -2.0, 2.0, -2.0),
        (1.5, -2.0, 3.0, -3.0),  # min(-3.0, -2.4): the ratio itself
    ],
)
def test_clipped_objective_equals_hand_worked_numbers(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    got_loss, got_gradient = loss_at_ratio(ratio, advantage)
    assert got_loss == pytest.approx(loss, abs=1e-12)
    assert got_gradient == pytest.approx(gradient, abs=1e-12)


def test_clip_low_and_clip_high_are_separate() -> None:
    def loss(ratio: float, advantage: float) -> float:
        old = column(-math.log(ratio))
        return float(policy_loss(column(0.0), old, column(advantage), column(1.0), 0.1, 0.5).loss)

    assert loss(2.0, 1.0) == pytest.approx(-1.5)
    assert loss(0.5, -1.0) == pytest.approx(0.9)


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
def test_gradient_is_the_papers_coefficient(beta: float) -> None:
    """Eq. 21: on policy, GC = Â + β (π_ref/π_θ - 1), times the token's weight."""
    generator = torch.Generator().manual_seed(1)
    logprobs = (-3 * torch.rand(7, generator=generator, dtype=torch.float64)).requires_grad_()
    ref = -3 * torch.rand(7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(7, generator=generator, dtype=torch.float64)
    weights = torch.rand(7, generator=generator, dtype=torch.float64)
    result = policy_loss(logprobs, logprobs.detach(), advantages, weights, 0.2, 0.2, ref, beta)
    (gradient,) = torch.autograd.grad(-result.loss, logprobs)
    expected = weights * (advantages + beta * (torch.exp(ref - logprobs.detach()) - 1))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


def test_loss_value_with_kl_by_hand() -> None:
    """One token at ρ = 1, Â = 2, π_ref/π_θ = 2: J = 2 - 0.5 (2 - ln 2 - 1)."""
    result = policy_loss(
        column(-2.0), column(-2.0), column(2.0), column(0.25), 0.2, 0.2, column(-2.0 + math.log(2)), 0.5
    )
    assert float(result.loss) == pytest.approx(-0.25 * (2 - 0.5 * (1 - math.log(2))), abs=1e-12)
    assert float(result.kl) == pytest.approx(1 - math.log(2), abs=1e-12)


def test_masked_nan_is_removed_by_selection_not_multiplication() -> None:
    """OpenRLHF#1240: NaN · 0 is NaN; a masked token must reach neither loss nor gradient."""
    logprobs = column(-1.0, math.nan).requires_grad_()
    result = policy_loss(
        logprobs, column(-1.0, math.inf), column(1.0, math.nan), column(1.0, 0.0), 0.2, 0.2, column(-1.5, math.nan), 0.1
    )
    result.loss.backward()
    assert math.isfinite(float(result.loss.detach()))
    assert logprobs.grad is not None
    assert logprobs.grad[0] != 0
    assert logprobs.grad[1] == 0


def test_all_masked_is_zero_not_nan() -> None:
    """unsloth-zoo#1286: 0/0 if everything is masked."""
    logprobs = column(-1.0, -2.0).requires_grad_()
    result = policy_loss(logprobs, logprobs.detach(), column(1.0, 1.0), column(0.0, 0.0), 0.2, 0.2)
    result.loss.backward()
    assert float(result.loss.detach()) == 0
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0, 0]


def test_no_tokens_is_zero() -> None:
    empty = column()
    assert float(policy_loss(empty, empty, empty, empty, 0.2, 0.2).loss) == 0


def test_clip_flags_are_set_only_if_the_clip_binds() -> None:
    old = column(0.0, 0.0, 0.0, 0.0)
    logprobs = torch.log(column(1.5, 1.5, 0.5, 0.5))
    result = policy_loss(logprobs, old, column(1.0, -1.0, 1.0, -1.0), torch.ones(4, dtype=torch.float64), 0.2, 0.2)
    assert result.clipped_high.tolist() == [True, False, False, False]
    assert result.clipped_low.tolist() == [False, False, False, True]


def test_weights_are_equation_3_by_hand() -> None:
    """Two prompts; lengths 2, 4 and 5, -, 1: w = 1/P · 1/G · 1/|o|; the empty completion counts in G."""
    weights = sequence_mean_weights([[2, 4], [5, 0, 1]])
    assert weights == [[1 / 8, 1 / 16], [1 / 30, 0.0, 1 / 6]]


def test_prompt_without_trained_completions_does_not_count_in_the_denominator() -> None:
    assert sequence_mean_weights([[2], []]) == [[0.5], []]
    assert sequence_mean_weights([[], []]) == [[], []]


@pytest.mark.parametrize(
    ("low", "high", "word"), [(-0.1, 0.2, "clip_low"), (1.1, 0.2, "clip_low"), (0.2, -1.0, "clip_high")]
)
def test_clips_out_of_range_are_refused(low: float, high: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        policy_loss(column(0.0), column(0.0), column(0.0), column(1.0), low, high)


def test_kl_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(column(0.0), column(0.0), column(0.0), column(1.0), 0.2, 0.2, None, 0.1)


def test_value_loss_by_hand() -> None:
    """Returns 1; values 0.5, 2, 0.9, before 0.6, 1.1, 0, clip 0.2: ½ of max(.25, .25), max(1, .09), max(.01, .64)."""
    values = torch.tensor([0.5, 2.0, 0.9, float("nan")], dtype=torch.float64)
    old = torch.tensor([0.6, 1.1, 0.0, 0.0], dtype=torch.float64)
    returns, weights = torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    assert float(value_loss(values, old, returns, weights, 0.2)) == pytest.approx(0.5 * (0.25 + 0.5 + 2 * 0.64))
    assert float(value_loss(values, old, returns, weights, 0.0)) == pytest.approx(0.5 * (0.25 + 0.5 + 0.02))
    with pytest.raises(ValueError, match="clip = -1"):
        value_loss(values, old, returns, weights, -1.0)
