"""Log-probabilities as an accelerator computes them: chunks of tokens over the whole vocabulary, without C kernels.

The block and the kernels are selected by arguments, so the same code runs here.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gruppo.models.footprint import Footprint
from gruppo.models.logprobs import (
    CHUNK_BYTES,
    CHUNK_SIZE,
    KEPT_BYTES,
    PART_SIZE,
    OutputHead,
    logit_block,
    token_logprobs,
)
from gruppo.training.memory_estimate import _logits

VOCABULARY, WIDTH = 700, 16


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gruppo.models.ops.logprobs.kernels_for", lambda *_, **__: None)


def test_the_block_of_an_accelerator_is_the_whole_vocabulary() -> None:
    assert logit_block(151_936, 4, accelerator=False) == (CHUNK_SIZE, PART_SIZE, KEPT_BYTES)
    for vocabulary, itemsize in ((32_000, 4), (151_936, 4), (262_144, 4), (151_936, 8)):
        tokens, entries, kept = logit_block(vocabulary, itemsize, accelerator=True)
        assert (entries, kept) == (vocabulary, 0)
        assert CHUNK_BYTES - 64 * vocabulary * itemsize < tokens * vocabulary * itemsize <= CHUNK_BYTES
        assert tokens % 64 == 0
    assert logit_block(10**9, 4, accelerator=True) == (64, 10**9, 0)


def inputs(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(VOCABULARY, (count,), generator=generator)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("trained", ["returned", "accumulated", "frozen"])
def test_values_and_gradients_against_float64(softcap: float | None, scale: float, biased: bool, trained: str) -> None:
    """One chunk, and chunks that do not divide the tokens, in float64 and float32, against log_softmax in float64."""
    hidden64, weight64, targets = inputs(11, torch.float64)
    factors, temperature = torch.linspace(-1, 1, 11, dtype=torch.float64), 0.7
    bias64 = torch.linspace(-1, 1, VOCABULARY, dtype=torch.float64) if biased else None
    leaves = [tensor.requires_grad_() for tensor in (hidden64, weight64, bias64) if tensor is not None]
    logits = (hidden64 @ weight64.T + (0.0 if bias64 is None else bias64)) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    full = torch.log_softmax(logits / temperature, dim=-1)
    expected = full.gather(-1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * factors).sum(), leaves)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        for chunk in (4, 64):
            hidden, weight, bias = (
                None if each is None else each.detach().to(dtype).requires_grad_()
                for each in (hidden64, weight64, bias64)
            )
            assert hidden is not None
            assert weight is not None
            if trained == "frozen":
                weight.requires_grad_(False)
            head = OutputHead(weight, bias, scale, softcap, weight if trained == "accumulated" else None)
            got, entropy = token_logprobs(hidden, head, targets, temperature, chunk, VOCABULARY)
            (got * factors.to(dtype)).sum().backward()
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(entropy.double(), -(full.exp() * full).sum(-1), rtol=tolerance, atol=tolerance)
            found = [tensor.grad for tensor in (hidden, weight, bias) if tensor is not None]
            for one, other in zip(found, gradients, strict=True):
                if one is None:
                    assert trained == "frozen"
                else:
                    torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)
            assert (weight.grad is None) == (trained == "frozen")


class Memory(TorchDispatchMode):
    """Bytes of storages that torch's operations return, as long as a tensor refers to them, at their peak."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.ours = {tensor.untyped_storage().data_ptr() for tensor in before}
        self.users: dict[int, int] = {}
        self.bytes: dict[int, int] = {}
        self.peak = 0

    def _drop(self, address: int) -> None:
        self.users[address] -= 1
        if not self.users[address]:
            del self.users[address], self.bytes[address]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            address = tensor.untyped_storage().data_ptr() if isinstance(tensor, torch.Tensor) else 0
            if address and address not in self.ours and not any(tensor is each for each in args):
                self.users[address] = self.users.get(address, 0) + 1
                self.bytes[address] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor, self._drop, address)
        self.peak = max(self.peak, sum(self.bytes.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accelerator", [True, False])
def test_the_forecast_covers_what_is_allocated(
    accelerator: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never tokens × vocabulary at once: 512 tokens in chunks of 64 need less than three chunks, what is kept, and the
    gradient."""
    monkeypatch.setattr("gruppo.models.logprobs.CHUNK_BYTES", 64 * VOCABULARY * 4)
    monkeypatch.setattr("gruppo.models.logprobs.CHUNK_SIZE", 64)
    monkeypatch.setattr("gruppo.models.logprobs.PART_SIZE", 200)
    monkeypatch.setattr("gruppo.models.logprobs.KEPT_BYTES", 150 * VOCABULARY * dtype.itemsize)
    count = 512
    hidden, weight, targets = inputs(count, dtype)
    hidden, weight = hidden.float().requires_grad_(), weight.requires_grad_()
    master = weight.detach().float().requires_grad_()
    master.grad = torch.zeros_like(master)  # counted with the gradients
    tokens, entries, kept = logit_block(VOCABULARY, 4, accelerator)
    with Memory([hidden, weight, targets, master, master.grad]) as memory:
        got, _ = token_logprobs(hidden, OutputHead(weight, master=master), targets, 0.9, tokens, entries, kept)
        got.sum().backward()
    footprint = Footprint(
        process=0, weights=0, gradients=0, moments=0, reference=0, critic=0, prepared=0, kept=(), layers=1,
        cache_token=0, state_token=4 * WIDTH, logits_token=4 * VOCABULARY, wide=4, accelerator=accelerator,
        kept_logit=dtype.itemsize,
    )  # fmt: skip
    forecast = _logits(footprint, [(1, [count - 1])])
    per_token = count * (4 * WIDTH + 6 * 4)  # the gradient of the hidden states, and vectors over the tokens
    rows = 3 * tokens * WIDTH * 4
    assert forecast / 2 < memory.peak < forecast + per_token + rows
    assert memory.peak < count * VOCABULARY * 4, "tokens × vocabulary"
