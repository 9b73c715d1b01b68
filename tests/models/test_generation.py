"""Weights prepared for matmuls are prepared again if and only if the generation number has changed."""

from __future__ import annotations

import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.engines import build_engine
from gruppo.engines.base import Request, SamplingParams
from gruppo.models.policy import LanguageModel
from gruppo.training.optimizer import make_optimizer
from tests.conftest import make_policy
from tests.small_runs import recipe

REQUESTS = [Request((5, 6, 7), [(0,), (1,)])]


def head_weight(policy: LanguageModel) -> torch.Tensor:
    return policy.head.weight.clone()


@pytest.fixture
def policy() -> LanguageModel:
    """Its matmuls are in bfloat16, so every weight has a cast that can go stale."""
    return make_policy(torch.bfloat16)


def test_casts_follow_the_generation_number_alone(policy: LanguageModel) -> None:
    before = head_weight(policy)
    weight = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        weight.add_(1.0)  # the tensor's version counter changes, its address does not
    assert torch.equal(head_weight(policy), before)
    policy.generation.advance()
    assert torch.equal(head_weight(policy), weight.detach().bfloat16())


def test_a_change_that_no_version_counter_sees(policy: LanguageModel) -> None:
    """As with sharded parameters and fused optimizers: same address, same version."""
    before = head_weight(policy)
    weight = policy.model.get_output_embeddings().weight
    version = weight._version
    weight.data.numpy()[:] += 1.0
    assert weight._version == version
    policy.generation.advance()
    assert not torch.equal(head_weight(policy), before)


def test_decoder_uses_new_weights(policy: LanguageModel) -> None:
    other = make_policy(torch.bfloat16, seed=9)
    engine, params = build_engine(policy, 2), SamplingParams(0.0, 12)
    first = engine.generate(REQUESTS, params)
    for name, tensor in policy.weights().items():
        tensor.data.numpy()[:] = other.weights()[name].numpy()
    policy.generation.advance()
    changed = engine.generate(REQUESTS, params)
    assert changed != first
    assert changed == build_engine(other, 2).generate(REQUESTS, params)


def test_an_optimizer_step_advances_the_generation(policy: LanguageModel, tiny_folder: str) -> None:
    settings = load_recipe(recipe(tiny_folder))
    optimizer = make_optimizer(settings.optimizer, policy.model, policy)
    before = policy.generation.number
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert policy.generation.number == before + 1
