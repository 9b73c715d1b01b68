"""Each compiled kernel against torch in float64, and the behaviour without compiled kernels."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from gruppo.engines.base import SamplingParams
from gruppo.engines.native.sampling import sample_tokens
from gruppo.models.ops.attention import PackedLayout, attend_decoding, attend_packed, attend_packed_backward
from gruppo.models.ops.cpu import build
from gruppo.models.ops.logprobs import logprobs_backward, logprobs_of_part
from gruppo.models.ops.norm import add_norm, norm_backward
from gruppo.models.ops.rope import apply_rope, apply_rope_backward
from gruppo.models.ops.sampling import sample
from gruppo.models.ops.swiglu import gate, gate_backward

DTYPES = [torch.bfloat16, torch.float32]
needs_compiler = pytest.mark.skipif(build.why_missing(torch.float32) is not None, reason="no C compiler here")


@pytest.fixture(params=DTYPES, ids=["bfloat16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param  # type: ignore[no-any-return]


def near(result: Tensor, expected: Tensor) -> None:
    """Equal within the precision of the result's dtype; torch's operations round to it several times."""
    tolerance = 2e-6 if result.dtype != torch.bfloat16 else 2**-8 if build.library(result.dtype) else 2**-6
    torch.testing.assert_close(
        result.double(), expected.double(), rtol=tolerance, atol=tolerance * float(expected.abs().mean())
    )


@needs_compiler
def test_kernels_are_available(dtype: torch.dtype) -> None:
    assert build.library(dtype) is not None
    assert build.kernels_sha256(torch.bfloat16) != build.kernels_sha256(torch.float32) != build.NO_KERNELS
    assert build.library(torch.float64) is None
    assert build.kernels_sha256(torch.float64) == build.NO_KERNELS


@pytest.mark.parametrize("size", [1, 33, 576])
def test_add_norm(dtype: torch.dtype, size: int) -> None:
    hidden, delta, weight = torch.randn(7, size), torch.randn(7, size).to(dtype), torch.randn(size)
    total, normed = add_norm(hidden, delta, weight, 1e-5, dtype)
    near(total, hidden.double() + delta.double())
    assert normed is not None
    near(normed, rms_norm(total.double(), (size,), weight.double(), 1e-5))
    same, again = add_norm(total, None, weight, 1e-5, dtype)
    assert same is total
    assert again is not None
    assert torch.equal(again, normed)


@pytest.mark.parametrize("with_more", [True, False])
def test_norm_gradient(dtype: torch.dtype, with_more: bool) -> None:
    rows, weight = torch.randn(50, 48), torch.randn(48)
    grad, more = torch.randn(50, 48).to(dtype), torch.randn(50, 48) if with_more else None
    of_rows, of_weight = norm_backward(grad, rows, weight, 1e-5, more)
    x, w = rows.double().requires_grad_(), weight.double().requires_grad_()
    rms_norm(x, (48,), w, 1e-5).backward(grad.double())
    assert x.grad is not None
    assert w.grad is not None
    near(of_rows, x.grad + (0 if more is None else more.double()))
    near(of_weight, w.grad)


def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    gated, grad = (3 * torch.randn(9, 66)).to(dtype), torch.randn(9, 33).to(dtype)
    x = gated.double().requires_grad_()
    expected = silu(x[:, :33]) * x[:, 33:]
    expected.backward(grad.double())
    near(gate(gated), expected.detach())
    assert x.grad is not None
    near(gate_backward(gated, grad), x.grad)


def rotated(head: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.double().unsqueeze(1) for part in rope)
    first, second = head.chunk(2, dim=-1)
    return head * cos + torch.cat([-second, first], dim=-1) * sin


@pytest.mark.parametrize("normed", [True, False])
def test_rotary_embeddings_are_applied(dtype: torch.dtype, normed: bool) -> None:
    projected, rope = torch.randn(5, 4 + 2 * 2, 16).to(dtype), (torch.randn(5, 16), torch.randn(5, 16))
    weights = (torch.rand(16), torch.rand(16)) if normed else (None, None)
    results = apply_rope(projected, 4, rope, (*weights, 1e-6), torch.float32)
    x = projected.double().requires_grad_()
    query, key, value = x.split([4, 2, 2], dim=1)
    if weights[0] is not None and weights[1] is not None:
        query = rms_norm(query, (16,), weights[0].double(), 1e-6)
        key = rms_norm(key, (16,), weights[1].double(), 1e-6)
    expected = rotated(query, rope), rotated(key, rope), value
    for result, want in zip(results, expected, strict=True):
        near(result, want.detach())
    if not normed:
        grads = [torch.randn_like(result) for result in results]
        torch.autograd.backward(expected, [grad.double() for grad in grads])
        assert x.grad is not None
        near(apply_rope_backward(*grads, rope, dtype), x.grad)


@needs_compiler
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("width", [16, 48, 64, 128])
def test_attention_of_a_decoding_step(dtype: torch.dtype, width: int, window: int | None, normed: bool) -> None:
    """Against a softmax over the keys key_head each row and its prompt, row by row."""
    queries, keys, count = 6, 2, 5
    prompt_of, lengths, position = torch.tensor([1, 0, 1, 2, 0]), torch.tensor([4, 7, 1]), torch.tensor([0, 3, 5, 1, 4])
    cache = torch.randn(count + 1, keys, 6, width), torch.randn(count + 1, keys, 6, width)
    prefix = torch.randn(3, keys, 8, width), torch.randn(3, keys, 8, width)
    before = cache[0].clone(), cache[1].clone()
    projected = torch.randn(count, queries + 2 * keys, width).to(dtype)
    rope = torch.randn(count, width), torch.randn(count, width)
    weights = (torch.rand(width), torch.rand(width)) if normed else (None, None)
    result = attend_decoding(
        projected, queries, rope, (*weights, 1e-6), 0.3, window, cache, prefix,
        (prompt_of.argsort(stable=True), prompt_of, lengths[prompt_of], position),
    )  # fmt: skip
    assert result is not None
    query, key, value = apply_rope(projected.double(), queries, rope, (*weights, 1e-6), torch.float64)
    expected = torch.empty(count, queries, width, dtype=torch.float64)
    for row in range(count):
        written = int(position[row])
        before[0][row, :, written], before[1][row, :, written] = key[row].float(), value[row].float()
        shared = slice(int(lengths[prompt_of[row]]))
        all_keys = torch.cat([prefix[0][prompt_of[row], :, shared], before[0][row, :, : written + 1]], dim=1).double()
        all_values = torch.cat([prefix[1][prompt_of[row], :, shared], before[1][row, :, : written + 1]], dim=1).double()
        seen = slice(-window if window else None, None)
        for head in range(queries):
            key_head = head // (queries // keys)
            scores = 0.3 * all_keys[key_head, seen] @ query[row, head]
            expected[row, head] = torch.softmax(scores, dim=0) @ all_values[key_head, seen]
    near(result, expected.view(count, -1))
    for store, want in zip(cache, before, strict=True):
        torch.testing.assert_close(store, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_a_vocabulary_chunk_and_their_gradient(dtype: torch.dtype, temperature: float) -> None:
    logits = (5 * torch.randn(6, 300)).to(dtype)
    if build.library(dtype) is not None:
        logits[0, :100] = -torch.inf
    targets = torch.tensor([120, 0, 99, 100, 399, 400])
    target = torch.full((6,), 7.0)
    normalizer, mean = logprobs_of_part(logits, temperature, targets, 100, target)
    z = logits.double() / temperature
    near(normalizer, z.logsumexp(dim=-1))
    torch.testing.assert_close(mean.double(), (z.softmax(-1) * z).nansum(-1), rtol=1e-5, atol=1e-5)
    inside = [0, 3, 4]
    near(target[inside], z[inside, targets[inside] - 100])
    assert target[[1, 2, 5]].tolist() == [7.0, 7.0, 7.0]
    scale = torch.randn(6)
    onehot = torch.zeros_like(z)
    onehot[inside, targets[inside] - 100] = 1
    expected = scale.double()[:, None] * (onehot - (z - 6.0).exp())
    gradient = logprobs_backward(logits.clone(), temperature, targets, 100, torch.full((6,), 6.0), scale)
    assert gradient.dtype == dtype
    near(gradient, expected)


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_non_finite_logits_are_not_hidden(dtype: torch.dtype, bad: float) -> None:
    logits = torch.zeros(3, 500).to(dtype)
    logits[1, 10:] = bad
    normalizer, _ = logprobs_of_part(logits, 1.0, torch.zeros(3, dtype=torch.long), 0, torch.zeros(3))
    assert normalizer.isfinite().tolist() == [True, False, True]
    uniforms = torch.tensor([0.5, 0.5, 0.999], dtype=torch.float64)
    tokens, sampled = sample_tokens(logits, uniforms, SamplingParams(1.0, 1))
    assert sampled.isfinite().tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == [250, 499], "a row does not affect how other rows are sampled"


@needs_compiler
def test_torch_defaults_and_other_layouts_change_nothing(dtype: torch.dtype) -> None:
    """torch computes if a tensor does not have the layout or dtype that a kernel expects."""
    projected, rope = torch.randn(5, 6, 16).to(dtype), (torch.randn(5, 16), torch.randn(5, 16))
    logits, uniforms = torch.randn(5, 300).to(dtype), torch.rand(5, 2, dtype=torch.float64)
    hidden, delta, weight = torch.randn(5, 16), torch.randn(5, 16).to(dtype), torch.rand(16)

    def results() -> list[Tensor]:
        normed = add_norm(hidden, delta, weight, 1e-5, dtype)[1]
        of_weight = norm_backward(delta, hidden, weight, 1e-5)[1]
        sampled = sample(logits, 1.0, uniforms[:, 1])
        assert normed is not None
        assert sampled is not None
        return [normed, of_weight, *sampled, *apply_rope(projected, 2, rope, (None, None, 0.0), torch.float32)]

    expected = results()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, results(), expected))
    finally:
        torch.set_default_dtype(torch.float32)
    plain = sample(logits, 1.0, uniforms[:, 1].clone())
    assert plain is not None
    assert torch.equal(plain[0], expected[2])
    other_dtype = add_norm(hidden, delta.float() if dtype == torch.bfloat16 else delta.double(), weight, 1e-5, dtype)[1]
    assert other_dtype is not None
    near(other_dtype, expected[0])
    bfloat16_rope = tuple(part.to(torch.bfloat16) for part in rope)
    stores = tuple(torch.zeros(5, 2, 4, 16) for _ in range(2)), tuple(torch.zeros(1, 2, 4, 16) for _ in range(2))
    rows = [torch.arange(5), *(torch.zeros(5, dtype=torch.long) for _ in range(3))]
    assert attend_decoding(projected, 2, bfloat16_rope, (None, None, 0.0), 1.0, None, *stores, rows) is None


@needs_compiler
def test_a_damaged_library_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "gcc -pipe")
    path = build._compiled(torch.float32)
    path.write_bytes(b"")
    found = build._found.__wrapped__(torch.float32)
    assert not isinstance(found, str)
    assert path.stat().st_size


@pytest.mark.parametrize("size", [3, 256, 1000])
def test_sampling_inverts_the_distribution_function(dtype: torch.dtype, size: int) -> None:
    logits = (2 * torch.randn(1, size)).to(dtype)
    logits[0, 1] = -torch.inf
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    tokens, logprobs = sample_tokens(logits.expand(4000, -1).contiguous(), uniforms, SamplingParams(0.8, 1))
    expected = torch.softmax(logits.double() / 0.8, dim=-1)[0]
    counts = torch.bincount(tokens, minlength=size)
    assert counts[1] == 0
    assert float((counts / 4000 - expected).abs().max()) <= 1.01 / 4000
    near(logprobs.exp(), expected[tokens])
    edge = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    low, high = sample_tokens(logits.expand(2, -1).contiguous(), edge, SamplingParams(0.8, 1))[0].tolist()
    assert (low, high) == (0, size - 1)


def test_rows_do_not_depend_on_their_neighbors(dtype: torch.dtype) -> None:
    hidden, delta, weight = torch.randn(40, 64), torch.randn(40, 64).to(dtype), torch.randn(64)
    many = add_norm(hidden, delta, weight, 1e-5, dtype)[1]
    few = add_norm(hidden[7:9].clone(), delta[7:9].clone(), weight, 1e-5, dtype)[1]
    assert many is not None
    assert few is not None
    assert torch.equal(many[7:9], few)


def test_without_kernels_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Runs all tests of this file again without compiled kernels."""
    if os.environ.get("GRUPPO_KERNELS") == "0" or dtype != torch.float32:
        pytest.skip("once is enough")
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | {"GRUPPO_KERNELS": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("compiler", "message"),
    [("/nonexistent/cc", "cannot be run"), ("/bin/false", "failed"), ("/bin/true", "cannot be written to")],
)
def test_a_failing_compiler_is_reported_as_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str, message: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    with pytest.raises(build._Missing, match=message):
        build._compiled(torch.float32)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_compiler
@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize(("heads", "keys", "width"), [(6, 2, 16), (4, 4, 32), (9, 3, 64), (2, 2, 80)])
def test_packed_attention_and_its_gradient(heads: int, keys: int, width: int, window: int | None) -> None:
    """Against torch's attention over each prompt and completion alone, in float64."""
    torch.manual_seed(0)
    groups = [(3, (5, 1, 20)), (33, (17, 16)), (1, ())]
    layout = PackedLayout(groups)
    rows = int(layout.length.sum())
    tensors = [torch.randn(rows, count, width) for count in (heads, keys, keys)]
    assert layout.fits(*tensors)
    result, normalizer = attend_packed(tensors[0], tensors[1], tensors[2], layout, 0.2, window)
    query, key, value = (tensor.double().requires_grad_() for tensor in tensors)
    expected, sums, start = [], [], 0
    for prompt, completions in groups:
        completion_start = start + prompt
        for length in (0, *completions):
            place = torch.cat(
                [torch.arange(start, start + prompt), torch.arange(completion_start, completion_start + length)]
            )
            all_keys, all_values = (tensor[place].repeat_interleave(heads // keys, 1) for tensor in (key, value))
            scores = 0.2 * torch.einsum("qhd,khd->hqk", query[place], all_keys)
            distance = torch.arange(len(place))[:, None] - torch.arange(len(place))
            seen = (distance >= 0) & (distance < (window or 10**9))
            scores = scores.masked_fill(~seen, -torch.inf)
            new = slice(prompt if length else 0, None)
            expected.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), all_values)[new])
            sums.append(scores.logsumexp(-1).T[new])
            completion_start += length
        start = completion_start
    torch.testing.assert_close(result.double(), torch.cat(expected).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalizer.double(), torch.cat(sums).detach(), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(result)
    torch.cat(expected).backward(grad.double())
    gradients = attend_packed_backward(grad, tensors, (result, normalizer), layout, 0.2, window)
    for gradient, tensor in zip(gradients, (query, key, value), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(gradient.double(), tensor.grad, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86-64")
@pytest.mark.parametrize("without", ["-mno-avx", "-mno-avx512f"])
def test_attention_with_narrower_registers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without: str) -> None:
    """The kernels of processors whose registers hold 4 or 8 floats."""
    monkeypatch.setenv("GRUPPO_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, without))
    monkeypatch.setattr(build, "_found", cache(build._found.__wrapped__))
    monkeypatch.setattr("gruppo.models.ops.attention.library", build.library.__wrapped__)
    monkeypatch.setattr("gruppo.models.ops.cpu.bindings.library", build.library.__wrapped__)
    torch.manual_seed(0)
    test_attention_of_a_decoding_step(torch.float32, 48, 3, True)
    test_packed_attention_and_its_gradient(9, 3, 64, 5)
    test_packed_attention_and_its_gradient(4, 4, 48, None)
    assert len([*tmp_path.rglob("*.so")]) == 1
