"""The gradient check agrees with finite differences for every method, and detects a wrong gradient."""

from __future__ import annotations

import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.config.sections import Lora
from gruppo.models.lora import add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.models.weights import weights_sha256
from gruppo.preflight.gradient_check import TOKENS, Derivative, compare, shortened, with_arbitrary_rewards
from gruppo.training import policy_loss as losses_of_batches
from gruppo.types import Group, Reward
from tests.architectures import make_architecture
from tests.conftest import make_group, make_policy, random_groups

MEMORY = 2**40


def recipe(**method: object):
    return load_recipe({"model": {"name": "m"}, "method": method, "sampling": {"max_tokens": 8}})


def compared(policy: LanguageModel, allowed: int = MEMORY, **method: object) -> Derivative:
    settings = recipe(**method)
    made = compare(policy, with_arbitrary_rewards(random_groups(), settings.method), settings, 1024, allowed)
    assert made is not None
    return made


@pytest.mark.parametrize(
    "name", ["grpo", "grpo-process", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce-pp", "ppo", "rft", "dpo"]
)
def test_it_agrees_for_every_method(policy: LanguageModel, name: str) -> None:
    before = weights_sha256(policy.model)
    made = compared(policy, name=name, **({"source": "policy"} if name == "dpo" else {}))
    assert (made.backward_dtype, made.differences_dtype) == ("float32", "float64")
    assert made.error < 1e-4
    assert weights_sha256(policy.model) == before
    assert all(each.grad is None for each in policy.model.parameters())


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "gpt2"])
def test_it_agrees_for_other_architectures(name: str) -> None:
    assert compared(make_architecture(name)).error < 1e-2


def test_it_agrees_for_adapters_and_bfloat16() -> None:
    adapted = add_adapters(make_policy(), Lora(rank=4), 0)
    assert compared(adapted, kl_coef=0.0).error < 1e-4
    assert compared(make_policy(torch.bfloat16)).backward_dtype == "float32"


def test_without_memory_it_goes_along_the_gradient(policy: LanguageModel) -> None:
    before = weights_sha256(policy.model)
    made = compared(policy, allowed=0)
    assert (made.differences_dtype, len(made.backward)) == ("float32", 1)
    assert made.error < 0.05
    assert weights_sha256(policy.model) == before


@pytest.mark.parametrize("allowed", [MEMORY, 0])
def test_a_gradient_that_is_wrong_is_noticed(
    policy: LanguageModel, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    right = losses_of_batches.policy_loss

    def wrong(*arguments: object):
        made = right(*arguments)  # type: ignore[arg-type]
        return made._replace(loss=1.5 * made.loss - 0.5 * made.loss.detach())

    monkeypatch.setattr(losses_of_batches, "policy_loss", wrong)
    assert compared(policy, allowed=allowed).error > 0.1


def test_what_a_layer_leaves_out_is_noticed(policy: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from gruppo.preflight import gradient_check

    right = gradient_check._gradients

    def without_a_layer(*arguments: object):
        made = right(*arguments)  # type: ignore[arg-type]
        return {name: torch.zeros_like(each) if "layers.0.mlp" in name else each for name, each in made.items()}

    monkeypatch.setattr(gradient_check, "_gradients", without_a_layer)
    assert compared(policy).error > 0.05


def test_without_a_gradient_there_is_nothing_to_compare(policy: LanguageModel) -> None:
    alike = [Group(g.prompt, g.completions, [Reward(1.0, {})] * len(g.completions)) for g in random_groups()]
    assert compare(policy, alike, recipe(kl_coef=0.0), 1024, MEMORY) is None


def test_completions_are_cut_short() -> None:
    (made,) = shortened([make_group([1], [[2] * 50, [3], [4]], [1.0, 0.0, 1.0])], 2)
    assert [len(each.token_ids) for each in made.completions] == [TOKENS, 1]
    assert len(made.rewards) == 2


def test_the_error_is_relative() -> None:
    assert Derivative([1.0, 2.0], [1.0, 2.0], "float32", "float64").error == 0
    assert Derivative([3.0, 0.0], [3.0, 4.0], "float32", "float64").error == pytest.approx(0.8)
    assert Derivative([1.0], [0.0], "float32", "float64").error == float("inf")
    assert Derivative([0.0], [0.0], "float32", "float64").error == 0
