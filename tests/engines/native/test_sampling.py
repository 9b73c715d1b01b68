"""Sampling of tokens, in float64 and in pairs of float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gruppo.engines.base import SamplingParams
from gruppo.engines.native.sampling import sample_tokens, truncated_probabilities
from gruppo.models.ops.pairs import Pair

TRUNCATED = [
    SamplingParams(0.8, 1, top_k=40),
    SamplingParams(1.2, 1, top_p=0.9),
    SamplingParams(1.0, 1, min_p=0.01),
    SamplingParams(1.5, 1, top_k=100, top_p=0.8, min_p=0.02),
]
PLAIN = SamplingParams(0.8, 1)


def in_pairs(uniforms: Tensor) -> Tensor:
    pair = Pair.of(uniforms)
    return torch.stack([pair.high, pair.low], dim=-1)


def logits_and_uniforms(rows: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, size, generator=generator)
    return logits, torch.rand(rows, generator=generator, dtype=torch.float64)


def test_inverse_distribution_function_by_hand_in_pairs() -> None:
    """Probabilities ½, 0, ¼, ¼: u below ½ is token 0, below ¾ token 2, else token 3; never token 1."""
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.25, 0.25]])).repeat(8, 1)
    uniforms = torch.tensor(
        [0.0, 0.499, 0.5 - 2**-46, 0.5, 0.749, 0.75 - 2**-46, 0.75, 1 - 2**-53], dtype=torch.float64
    )
    tokens, logprobs = sample_tokens(logits, in_pairs(uniforms), SamplingParams(1.0, 1))
    assert tokens.tolist() == [0, 0, 0, 2, 2, 2, 3, 3]
    expected = torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(logprobs.exp(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [PLAIN, *TRUNCATED])
@pytest.mark.parametrize("size", [3, 256, 1000])
def test_pairs_choose_the_tokens_of_float64(options: SamplingParams, size: int) -> None:
    """In double precision the sum of probabilities up to each token, and the token whose interval contains u."""
    logits, uniforms = logits_and_uniforms(3000, size)
    tokens, logprobs = sample_tokens(logits, in_pairs(uniforms), options)
    weights = truncated_probabilities(logits, options)
    ends = weights.double().cumsum(dim=-1)
    expected = (ends <= uniforms[:, None] * ends[:, -1:]).sum(dim=-1)
    distance = ((ends / ends[:, -1:]) - uniforms[:, None]).abs().amin(dim=-1)
    decided = distance > 1e-6  # blocks are summed in float32
    assert float(decided.double().mean()) > 0.99
    assert torch.equal(tokens[decided], expected[decided])
    torch.testing.assert_close(logprobs, weights.gather(-1, tokens[:, None]).squeeze(-1).log(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [PLAIN, *TRUNCATED])
def test_pairs_and_float64_agree_in_every_row(monkeypatch: pytest.MonkeyPatch, options: SamplingParams) -> None:
    monkeypatch.setattr("gruppo.engines.native.sampling.sample", lambda *_: None)  # kernels sum in another order
    logits, uniforms = logits_and_uniforms(20_000, 700, seed=1)
    wide, narrow = sample_tokens(logits, uniforms, options), sample_tokens(logits, in_pairs(uniforms), options)
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1], narrow[1])


def test_frequencies_of_rare_tokens_in_pairs() -> None:
    """A grid of numbers finer than float32 next to 1: a token of probability 2^-30 gets its share of it."""
    logits = torch.full((1, 512), -torch.inf)
    logits[0, 0], logits[0, 300] = 0.0, -30 * math.log(2)  # in two blocks, whose sums are added in pairs
    grid = 1 - (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000 * 2**-28
    tokens, _ = sample_tokens(logits.expand(4000, -1), in_pairs(grid), SamplingParams(1.0, 1))
    assert tokens.tolist() == [300] * 1000 + [0] * 3000


@pytest.mark.parametrize("paired", [True, False])
def test_token_of_probability_zero_is_never_sampled(paired: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 8 * torch.randn(400, 1500, generator=generator)
    logits[:, torch.rand(1500, generator=generator) < 0.9] = -torch.inf
    logits[:, -300:] = -torch.inf
    uniforms = torch.linspace(0, 1 - 2**-53, 400, dtype=torch.float64)
    tokens, logprobs = sample_tokens(
        logits, in_pairs(uniforms) if paired else uniforms, SamplingParams(1.0, 1, min_p=1e-9)
    )
    assert bool(logits.gather(-1, tokens[:, None]).isfinite().all())
    assert bool(logprobs.isfinite().all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_have_no_log_probability_in_pairs(bad: float) -> None:
    logits = torch.zeros(3, 500)
    logits[1, 10:] = bad
    tokens, logprobs = sample_tokens(logits, in_pairs(torch.tensor([0.5, 0.5, 0.999], dtype=torch.float64)), PLAIN)
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == [250, 499]


def test_inverse_distribution_function_by_hand_in_float64() -> None:
    """Probabilities ½, 0, ¼, ¼: u below ½ is token 0, below ¾ token 2, else token 3; never token 1."""
    logits = torch.log(torch.tensor([[0.5, 0.0, 0.25, 0.25]], dtype=torch.float64)).repeat(6, 1)
    uniforms = torch.tensor([0.0, 0.499, 0.5, 0.749, 0.75, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, SamplingParams(1.0, 1))
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25, 0.25], dtype=torch.float64))


def test_sampling_in_blocks_equals_the_plain_sum() -> None:
    """A vocabulary of several blocks, not a multiple of the block size: the same token as by a plain cumulative sum."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, 1000, generator=generator, dtype=torch.float64)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms, SamplingParams(0.8, 1))
    plain = torch.softmax(logits / 0.8, -1)
    expected = (plain.cumsum(-1) <= uniforms[:, None]).sum(-1)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logprobs, plain.gather(-1, tokens[:, None]).squeeze(-1).log(), rtol=0, atol=1e-12)


def test_greedy_takes_the_most_likely_token_and_reports_temperature_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([0.9]), SamplingParams(0.0, 1))
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1)[:, 1])
