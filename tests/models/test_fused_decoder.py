"""The fused decoder against transformers' modules: values, gradients, and when weights are prepared again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.config.sections import Optimizer
from gruppo.models import fused_decoder
from gruppo.models.compatibility import wrap_model
from gruppo.models.footprint import saved_bytes
from gruppo.models.ops.cpu.build import why_missing
from gruppo.models.ops.linear import packed, product
from gruppo.models.packing import Batch, pack, score
from gruppo.models.policy import LanguageModel
from gruppo.training.optimizer import make_optimizer
from tests.architectures import ARCHITECTURES, make_architecture
from tests.training.test_invariance import prepared, random_groups

FUSED = ["llama", "llama-untied", "qwen2", "qwen3", "mistral"]


def one_batch() -> Batch:
    (batch,) = pack(prepared(random_groups()), sequence_mean_weights, 10**9, with_kl=True)
    return batch


def gradients(policy: LanguageModel) -> dict[str, Tensor]:
    policy.model.zero_grad()
    batch = one_batch()
    with policy.precision():
        (score(policy, batch, 0.9)[0] * batch.advantages * batch.weights).sum().backward()
    return {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}


def test_architectures_with_a_fused_decoder() -> None:
    assert [name for name in ARCHITECTURES if make_architecture(name).body is not None] == FUSED


@pytest.mark.parametrize("name", FUSED)
def test_gradients_equal_the_modules(name: str) -> None:
    policy = make_architecture(name, torch.float64)
    plain = replace(make_architecture(name, torch.float64), body=None)
    fused, expected = gradients(policy), gradients(plain)
    assert fused.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(fused[key], gradient, atol=1e-12, rtol=1e-9)


@pytest.mark.skipif(why_missing(torch.float32) is not None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FUSED)
def test_projected_rows_are_kept_in_place_of_heads(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    """With heads as wide as the kernels need: against the modules in float64, and against heads that are kept."""
    features, make_config = ARCHITECTURES[name]

    def with_wide_heads() -> PreTrainedConfig:
        config = make_config()
        config.head_dim = 16
        return config

    monkeypatch.setitem(ARCHITECTURES, name, (features, with_wide_heads))
    policy, layout = make_architecture(name, dtype), [(8, [5, 7])]
    found, recomputed = gradients(policy), gradients(replace(policy, recompute=True))
    with policy.precision():
        kept = saved_bytes(policy, layout)
        monkeypatch.setattr(fused_decoder, "SharedPrefixAttention", type(None))
        kept_heads = saved_bytes(policy, layout)
    heads = policy.model.config.num_attention_heads + 2 * policy.model.config.num_key_value_heads
    row = heads * 16 * (4 if name == "qwen3" else 4 - dtype.itemsize)
    assert kept_heads - kept == policy.model.config.num_hidden_layers * 20 * row
    for key, gradient in gradients(policy).items():
        assert torch.equal(gradient, found[key])
        assert torch.equal(gradient, recomputed[key])
    expected = gradients(replace(make_architecture(name, torch.float64), body=None))
    distance = sum(float((found[key] - each).square().sum()) for key, each in expected.items())
    size = sum(float(each.square().sum()) for each in expected.values())
    assert found.keys() == expected.keys()
    assert math.sqrt(distance / size) < (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_token_in_a_prompt_gets_a_gradient(fused: bool) -> None:
    """For models whose end-of-turn token is also the padding token; against a finite difference."""
    template = make_architecture("llama", torch.float64)
    template.model.config.pad_token_id = token = int(one_batch().token_ids[0])
    torch.manual_seed(0)
    fresh = wrap_model(type(template.model)(template.model.config).double(), template.tokenizer, torch.float64)
    policy = fresh if fused else replace(fresh, body=None)
    weight, batch, small = policy.model.get_input_embeddings().weight, one_batch(), 1e-6
    direction = torch.randn_like(weight[token])
    with torch.no_grad():
        weight[token] = 0.02 * torch.randn_like(weight[token])  # it starts as zeros, where norms have a kink
    gradient = gradients(policy)["model.embed_tokens.weight"][token]

    def loss(shift: float) -> float:
        with torch.no_grad():
            weight[token] += shift * direction
            value = (score(policy, batch, 0.9)[0] * batch.advantages * batch.weights).sum()
            weight[token] -= shift * direction
        return float(value)

    slope = (loss(small) - loss(-small)) / (2 * small)
    assert abs(slope) > 1e-3
    assert float(gradient @ direction) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "gpt-neox", "mixtral"])
def test_recomputation_saves_memory_and_changes_no_gradient(name: str) -> None:
    policy = make_architecture(name, torch.float64)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.nbytes
        return tensor

    results = []
    for recompute in (False, True):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(gradients(replace(policy, recompute=recompute)))
    assert kept[1] < kept[0] / 2
    for key, gradient in results[0].items():
        assert torch.equal(results[1][key], gradient)


@pytest.mark.parametrize("name", FUSED)
def test_weights_are_prepared_again_after_each_update(name: str) -> None:
    """Also with the fused optimizer, which does not mark them as changed; with and without gradients."""
    policy = make_architecture(name)
    optimizer, batch = make_optimizer(Optimizer(learning_rate=0.01), policy.model, policy), one_batch()
    for _ in range(2):
        gradients(policy)
        optimizer.step()
        plain = replace(policy, body=None)
        torch.testing.assert_close(score(policy, batch, 1.0)[0], score(plain, batch, 1.0)[0], atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(score(policy, batch, 1.0)[0], score(plain, batch, 1.0)[0], atol=1e-5, rtol=1e-5)


def test_unchanged_weights_are_prepared_once() -> None:
    policy = make_architecture("llama")
    assert policy.body is not None
    with torch.no_grad():
        first = policy.body.prepare(torch.bfloat16, True)
        assert policy.body.prepare(torch.bfloat16, True) is first
        policy.body.decoder.layers[1].mlp.down_proj.weight.mul_(2)
        policy.generation.advance()
        assert policy.body.prepare(torch.bfloat16, True) is not first


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_packed_matmuls(rows: int) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(rows, 48), torch.randn(80, 48).bfloat16(), torch.randn(80).bfloat16()
    expected = (hidden.bfloat16().double() @ weight.double().T + bias.double()).float()
    torch.testing.assert_close(product(hidden, packed(weight), bias).float(), expected, atol=0.05, rtol=0.01)
    assert packed(weight.float()) is not None
    assert packed(weight.float()).dtype == torch.float32


def test_frozen_parameters_get_no_gradient() -> None:
    policy = make_architecture("llama")
    policy.model.get_input_embeddings().weight.requires_grad_(False)
    policy.model.get_decoder().layers[0].mlp.up_proj.weight.requires_grad_(False)
    trained = gradients(policy)
    names = {name for name, each in policy.model.named_parameters() if each.requires_grad}
    assert trained.keys() == names
    assert len(names) < len(list(policy.model.parameters()))
