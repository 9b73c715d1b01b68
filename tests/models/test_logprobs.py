"""Chunked log-probabilities against log_softmax; KL estimators against exact sums over a tiny vocabulary."""

import pytest
import torch

from gruppo.algorithms.kl import kl_estimate
from gruppo.models.logprobs import OutputHead, token_logprobs
from gruppo.models.ops.linear import product


def inputs(count: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, head, torch.randint(13, (count,), generator=generator)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_values_and_gradients_equal_log_softmax(temperature: float, chunk: int) -> None:
    """trl#3029: the temperature is part of the distribution. Chunking must not change the result."""
    hidden, head, targets = inputs()
    got, entropy = token_logprobs(hidden, OutputHead(head), targets, temperature, chunk)
    full = torch.log_softmax(hidden @ head.T / temperature, dim=-1)
    expected = full.gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), rtol=0, atol=1e-12)
    factors = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    got_gradients = torch.autograd.grad((got * factors).sum(), (hidden, head))
    expected_gradients = torch.autograd.grad((expected * factors).sum(), (hidden, head))
    for one, other in zip(got_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 2.0), (2.5, 1.5)])
@pytest.mark.parametrize("biased", [False, True])
def test_head_with_bias_scale_and_soft_cap(scale: float, softcap: float | None, biased: bool) -> None:
    """GPT-J and Phi have a bias, Cohere and Granite a scale, Gemma a soft cap: values and all gradients."""
    hidden, weight, targets = inputs(7)
    bias = torch.linspace(-1, 1, 13, dtype=torch.float64).requires_grad_() if biased else None
    got, entropy = token_logprobs(hidden, OutputHead(weight, bias, scale, softcap), targets, 0.8, 3)
    logits = hidden @ weight.T + (bias if biased else 0.0)
    logits = logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)
    full = torch.log_softmax(logits / 0.8, dim=-1)
    expected = full.gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(full.exp() * full).sum(-1), rtol=0, atol=1e-12)
    leaves = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    factors = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    pairs = zip(
        torch.autograd.grad((got * factors).sum(), leaves),
        torch.autograd.grad((expected * factors).sum(), leaves),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (2.5, 1.5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kept_logits_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, scale: float, softcap: float | None
) -> None:
    """Chunks of 4, 4 and 3 tokens, parts of 5, 5 and 3 entries: 9 products forward, and as many as were not kept again.
    A second backward pass finds nothing kept."""
    computed: list[int] = []

    def counted(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        computed.append(len(rows) * len(weight))
        return product(rows, weight)

    monkeypatch.setattr("gruppo.models.logprobs.product", counted)
    hidden, weight, targets = inputs()
    wide = torch.promote_types(dtype, torch.float32)
    hidden, weight = hidden.detach().to(wide).requires_grad_(), weight.detach().to(dtype)
    itemsize = (dtype if softcap is None else wide).itemsize
    factors, gradients = torch.linspace(-1, 1, len(targets), dtype=wide), []
    for kept_bytes, again in ((0, 9), (52 * itemsize, 6), (10**9, 0)):
        computed.clear()
        master = weight.detach().to(wide).requires_grad_()
        head = OutputHead(weight, None, scale, softcap, master)
        got, _ = token_logprobs(hidden, head, targets, 0.8, 4, 5, kept_bytes)
        for passes in (1, 2):
            hidden.grad = master.grad = None
            (got * factors).sum().backward(retain_graph=True)
            assert len(computed) == 9 + again + (passes - 1) * 9
            assert hidden.grad is not None
            assert master.grad is not None
            gradients.append(torch.cat([hidden.grad.flatten(), master.grad.flatten()]))
    assert sum(computed[:9]) == 11 * 13
    for gradient in gradients[1:]:
        assert torch.equal(gradient, gradients[0])


def test_gradcheck() -> None:
    hidden, head, targets = inputs(5)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, OutputHead(w), targets, 0.9, 2)[0], (hidden, head))


def test_no_tokens() -> None:
    hidden, head, _ = inputs(0)
    logprobs, entropy = token_logprobs(hidden, OutputHead(head), torch.zeros(0, dtype=torch.long), 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert head.grad is not None
    assert not head.grad.any()


def test_bfloat16_matmuls_accumulate_in_float32() -> None:
    hidden, head, targets = inputs()
    low = token_logprobs(hidden.float(), OutputHead(head.bfloat16()), targets, 1.0)[0]
    assert low.dtype == torch.float32
    full = torch.log_softmax(hidden @ head.T, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
    assert float((low - full).abs().max().detach()) < 0.1


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.log_softmax(torch.randn(5, generator=generator, dtype=torch.float64), -1)


def expected_estimate(logits: torch.Tensor, ref: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected value of the estimate under π_θ, and its expected gradient with the samples fixed."""
    logprobs = torch.log_softmax(logits, -1)
    estimates = kl_estimate(logprobs, ref, kind)
    probabilities = logprobs.exp().detach()
    (gradient,) = torch.autograd.grad((probabilities * estimates).sum(), logits)
    return (probabilities * estimates).sum().detach(), gradient


def test_k3_expected_value_is_the_kl() -> None:
    logits, ref = distributions()
    logprobs = torch.log_softmax(logits.detach(), -1)
    value, _ = expected_estimate(logits, ref, "k3")
    torch.testing.assert_close(value, (logprobs.exp() * (logprobs - ref)).sum(), rtol=0, atol=1e-14)


def test_k3_expected_gradient_is_that_of_the_reverse_direction() -> None:
    """With the samples fixed, the gradient of k3 is that of KL(π_ref‖π_θ)."""
    logits, ref = distributions()
    other = (ref.exp() * (ref - torch.log_softmax(logits, -1))).sum()
    (expected,) = torch.autograd.grad(other, logits)
    torch.testing.assert_close(expected_estimate(logits, ref, "k3")[1], expected, rtol=0, atol=1e-14)


def test_k2_expected_gradient_is_that_of_the_kl() -> None:
    logits, ref = distributions()
    logprobs = torch.log_softmax(logits, -1)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    torch.testing.assert_close(expected_estimate(logits, ref, "k2")[1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_never_negative_and_zero_at_equality(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref = (-10 * torch.rand(1000, generator=generator) for _ in range(2))
    assert bool((kl_estimate(logprobs, ref, kind) >= 0).all())
    assert not kl_estimate(ref, ref, kind).any()


def test_k1_is_refused() -> None:
    """open-instruct#534: k1 in the loss has an expected gradient of zero."""
    with pytest.raises(ValueError, match="k1"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k1")
