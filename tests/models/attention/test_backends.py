"""Which attention backend computes a model, and what is refused before a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from gruppo.config.loading import load_recipe
from gruppo.errors import UsageError
from gruppo.models.attention.backends import Backend, check_attention, check_compute, choose_backend
from gruppo.models.attention.flex import SMALLEST, FlexAttention, padded_length
from gruppo.models.attention.interface import CapturingAttention, Layer
from gruppo.models.attention.shared_prefix import SharedPrefixAttention
from gruppo.models.attention.varlen import Lengths, VarlenAttention
from gruppo.models.compatibility import wrap_model
from gruppo.models.fused_decoder import FusedBody
from gruppo.models.generation import Generation
from gruppo.models.packing import pack, score
from tests.architectures import make_architecture
from tests.conftest import make_policy, random_groups
from tests.models.attention.references import ON_CPU, varlen_kernel
from tests.models.attention.test_plans import CPU, LAYERS, LAYOUTS, LONG, heads_of
from tests.training.test_invariance import prepared

CUDA, MPS = torch.device("cuda"), torch.device("mps")


def trial_of(*layers: Layer, heads: int = 4, keys: int = 2) -> CapturingAttention:
    """What a trial has seen of a model with these layers."""
    trial = CapturingAttention(SharedPrefixAttention([(1, ())]))
    for layer in layers:
        trial.layers.append(layer)
        trial.captured[layer.index] = tuple(torch.zeros(count, 1, 8) for count in (heads, keys, keys))
    return trial


def varlen(kernel: Callable[..., Tensor]) -> Backend:
    return Backend("varlen", lambda groups, device: VarlenAttention(groups, device, kernel))


def without(lack: str) -> Callable[..., Tensor]:
    def kernel(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
        return varlen_kernel(query, key, value, lengths, replace(layer, **{lack: None}))

    return kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ON_CPU)
def test_the_trial_accepts_a_backend_that_computes_the_layer(
    name: str, layer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gruppo.models.attention.backends._unfit", lambda *_: None)
    backend, problems = choose_backend(name, CPU, dtype, trial_of(LAYERS[layer]), ON_CPU)
    assert (backend.name, problems) == (name, [])


@pytest.mark.parametrize(("lack", "layer"), [("window", "wide window"), ("softcap", "cap"), ("sinks", "sinks")])
def test_the_trial_refuses_a_kernel_that_ignores_a_setting(
    lack: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a window that is longer than the sequences of the trial."""
    monkeypatch.setattr("gruppo.models.attention.backends._unfit", lambda *_: None)
    with pytest.raises(UsageError, match=r'"varlen": .*gives other numbers in layer 0.*write "auto"'):
        choose_backend("varlen", CPU, torch.bfloat16, trial_of(LAYERS[layer]), {"varlen": varlen(without(lack))})


def test_the_trial_refuses_a_kernel_without_a_gradient_or_with_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_gradient(*arguments) -> Tensor:
        return varlen_kernel(*arguments).detach()

    def wrong(query: Tensor, key: Tensor, *rest) -> Tensor:
        return varlen_kernel(query, key.detach() + 0 * key, *rest)

    monkeypatch.setattr("gruppo.models.attention.backends._unfit", lambda *_: None)
    for kernel, message in ((no_gradient, "fails in layer 0"), (wrong, "gives other numbers")):
        with pytest.raises(UsageError, match=message):
            choose_backend("varlen", CPU, torch.float32, trial_of(LAYERS["plain"]), {"varlen": varlen(kernel)})


def test_auto_takes_the_next_backend_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on cuda, for a model whose second layer has a soft cap that the first backend does not know."""

    def refuses(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, layer: Layer) -> Tensor:
        if layer.softcap is not None:
            raise ValueError("has no soft cap")
        return varlen_kernel(query, key, value, lengths, layer)

    backends = {**ON_CPU, "varlen": varlen(refuses)}
    monkeypatch.setattr("gruppo.models.attention.backends._unfit", lambda *_: None)
    monkeypatch.setattr("gruppo.models.attention.backends._ORDER", {"cpu": ("varlen", "flex", "sdpa")})
    plain, capped = LAYERS["plain"], replace(LAYERS["cap"], index=1)
    assert choose_backend("auto", CPU, torch.bfloat16, trial_of(plain), backends)[0].name == "varlen"
    backend, problems = choose_backend("auto", CPU, torch.bfloat16, trial_of(plain, capped), backends)
    assert backend.name == "flex"
    assert problems == ["varlen: fails in layer 1 (ValueError: has no soft cap)"]


def test_kernels_that_do_not_know_a_setting_say_so() -> None:
    """flash-attn knows soft caps, torch's kernel neither these nor sinks; both know windows, in their own way."""
    from gruppo.models.attention.varlen import _flash_kernel, _torch_kernel

    calls = []

    def attend(*arguments: object, **options: object) -> Tensor:
        calls.append(options)
        return torch.zeros(())

    lengths = Lengths(torch.tensor([0, 1]), torch.tensor([0, 1]), 1, 1)
    values = torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), lengths
    for kernel, name in ((_flash_kernel(attend), "sinks"), (_torch_kernel(attend), "sinks")):
        with pytest.raises(ValueError, match="sinks"):
            kernel(*values, LAYERS[name])
        kernel(*values, LAYERS["window"])
        kernel(*values, LAYERS["plain"])
    with pytest.raises(ValueError, match="soft cap"):
        _torch_kernel(attend)(*values, LAYERS["cap"])
    _flash_kernel(attend)(*values, LAYERS["cap"])
    assert [call["window_size"] for call in calls] == [(2, 0), (-1, 0), (2, 0), (-1, 0), (-1, 0)]
    assert [call.get("softcap") for call in calls] == [0.0, 0.0, None, None, 1.5]
    assert [call.get("enable_gqa") for call in calls] == [None, None, True, True, None]
    assert all(call.get("causal", True) is True for call in calls)


@pytest.mark.parametrize(("name", "device", "dtype", "message"), [
    ("cpu", CUDA, torch.bfloat16, 'model.attention = "cpu": is for a CPU, and the model is on cuda; write "auto"'),
    ("flex", CPU, torch.bfloat16, 'model.attention = "flex": needs an NVIDIA or AMD GPU .* is on cpu; write "auto"'),
    ("varlen", MPS, torch.bfloat16, 'model.attention = "varlen": needs an NVIDIA or AMD GPU .* is on mps'),
    ("varlen", CUDA, torch.float32, "computes in bfloat16 only, and model.dtype is float32"),
    ("flex", CUDA, torch.float64, "does not compute in float64"),
])  # fmt: skip
def test_combinations_that_cannot_run_are_refused(
    name: str, device: torch.device, dtype: torch.dtype, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_attention(name, device, dtype)


def test_combinations_that_run_are_not_refused() -> None:
    for name, device, dtype in (
        ("auto", MPS, torch.float32), ("sdpa", CUDA, torch.float64), ("sdpa", CPU, torch.bfloat16),
        ("varlen", CUDA, torch.bfloat16), ("flex", CUDA, torch.float32), ("cpu", CPU, torch.float64),
    ):  # fmt: skip
        check_attention(name, device, dtype)


def test_compilation_of_the_cpus_decoder_is_refused() -> None:
    def settings(attention: str):
        table = {"name": "x", "device": "cpu", "attention": attention, "compile": True}
        return load_recipe({"model": table}).model

    for attention in ("auto", "cpu"):
        with pytest.raises(UsageError, match=r'model\.compile = true: .*remove it, or write model\.attention = "sdpa"'):
            check_compute(settings(attention))
    check_compute(settings("sdpa"))


def test_the_cpus_attention_and_decoder_refuse_other_devices() -> None:
    with pytest.raises(UsageError, match='"cpu": is for a CPU, and the model is on meta'):
        SharedPrefixAttention([(1, ())], torch.device("meta"))
    policy = make_architecture("llama")
    body = FusedBody(policy.model.get_decoder().to("meta"), [], Generation())
    with pytest.raises(RuntimeError, match="the fused decoder is for a CPU, and its weights are on meta"):
        body.hidden_states(torch.zeros(1, 1).long(), torch.zeros(1, 1).long(), policy.attention([(1, ())], CPU), CPU)


def test_only_the_cpus_attention_has_the_fused_decoder() -> None:
    template = make_policy()
    for name, fused in (("auto", True), ("cpu", True), ("sdpa", False)):
        policy = wrap_model(template.model, template.tokenizer, attention=name)
        assert policy.attention.name == ("sdpa" if name == "sdpa" else "cpu")
        assert (policy.body is not None) == fused


def test_padded_lengths_are_few_and_near() -> None:
    lengths = {padded_length(tokens) for tokens in range(1, 70_000)}
    assert len(lengths) == 14
    assert all(length % 512 == 0 for length in lengths)
    assert all(tokens <= padded_length(tokens) < max(1.5 * tokens, SMALLEST + 1) for tokens in range(1, 70_000))


def test_flex_attention_is_compiled_once_for_all_layouts_of_a_length() -> None:
    """On a CPU too, without gradients. Otherwise each micro-batch would be compiled."""
    counters = torch._dynamo.utils.counters["stats"]
    before, query_shape = counters["unique_graphs"], (4, 2, 16, 16)
    for groups in (LONG["long prompt"], LONG["many groups"], LAYOUTS["uneven"], LAYOUTS["one token"]):
        query, key, value, _ = heads_of(groups, query_shape, torch.float32)
        with torch.no_grad():
            found = FlexAttention(groups, CPU).attend(LAYERS["window"], query, key, value)
            expected = ON_CPU["cpu"](groups, CPU).attend(LAYERS["window"], query, key, value)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert counters["unique_graphs"] == before + 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_compiled_layers_give_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of tokens, without compiling again; with recomputation, and with weights that change.

    The compiler records the layers and their gradients, but leaves out the slow last part, which makes C++ of them.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain = replace(make_architecture(name, torch.float64), body=None, attention=ON_CPU["sdpa"])
    compiled = replace(plain, compiled=True)
    policies = plain, compiled, replace(compiled, recompute=True)
    counters = torch._dynamo.utils.counters["stats"]
    graphs = [counters["unique_graphs"]]
    for number in range(3):
        groups = prepared(random_groups(groups=2 + number))
        (batch,) = pack(groups, lambda rows: [[1.0] * len(row) for row in rows], 10**9, with_kl=True)
        results = []
        for policy in policies:
            policy.model.zero_grad()
            logprobs = score(policy, batch, 1.0)[0]
            logprobs.sum().backward()
            gradients = [weight.grad for weight in policy.model.parameters() if weight.grad is not None]
            results.append([logprobs.detach(), *gradients])
        for others in results[1:]:
            for one, other in zip(results[0], others, strict=True):
                torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
        graphs.append(counters["unique_graphs"])
        with torch.no_grad():
            for weight in plain.model.parameters():
                weight.mul_(0.9)
    assert graphs[1] > graphs[0]
    assert graphs[1] == graphs[3]
    assert all("forward" not in vars(layer) for layer in plain.layers)
