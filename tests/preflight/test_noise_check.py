"""The noise of the gradient of the smoke test's groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.models.packing import pack
from gruppo.preflight.gradient_check import fill_advantages
from gruppo.preflight.noise_check import _products, estimate_noise, report_noise
from gruppo.training.gradient_noise import sampled_gradient
from gruppo.training.optimizer import accumulate
from gruppo.training.policy_loss import batch_loss, token_weights
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import NullProgress
from tests.conftest import make_policy, random_groups

pytestmark = pytest.mark.usefixtures("quick_workers")


def recipe_of(**method: Any) -> Recipe:
    return load_recipe({
        "model": {"name": "x"}, "method": method, "reward": {"functions": ["numeric_answer"]},
        "sampling": {"prompts_per_step": 5, "group_size": 4, "max_tokens": 8},
    })  # fmt: skip


def test_the_sum_over_groups_is_the_gradient_of_the_step() -> None:
    recipe, policy, groups = recipe_of(aggregation="token-mean", kl_coef=0.1), make_policy(), random_groups(groups=5)
    fill_advantages(groups, recipe.method, recipe.critic)
    products = _products(recipe, policy, groups, 30, lambda _: None)
    method = recipe.method.model_copy(update={"kl_coef": 0.0})
    batches = pack(groups, token_weights(method, 8), 30, False)
    accumulate(batches, lambda batch: batch_loss(policy, None, batch, method, 1.0, Metrics()), policy, lambda _: None)
    gradient = sampled_gradient(policy.model)
    policy.model.zero_grad(set_to_none=True)
    assert products is not None
    assert products[0] == pytest.approx(float(gradient @ gradient), rel=1e-4)
    (found,) = estimate_noise(recipe, policy, groups, {}, 30, NullProgress())
    assert found == report_noise(recipe, 5, *products)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_estimates_have_no_bias() -> None:
    """Gradients of 6 groups with |μ|² = 1 and a spread of 4: with 5 prompts the signal is 5 of 9."""
    rng, recipe, found = np.random.default_rng(0), recipe_of(), []
    for _ in range(300):
        each = np.full(400, 1 / 20) + rng.normal(0, 2 / 20, (6, 400))
        figures = report_noise(recipe, 6, float((each.sum(axis=0) ** 2).sum()), float((each**2).sum())).figures
        found.append(figures["signal"])
    assert np.mean(found) == pytest.approx(5 / 9, abs=0.02)


def test_nearly_only_noise_is_a_note() -> None:
    recipe = recipe_of()
    clear = report_noise(recipe, 4, 15.0, 4.0)  # |μ|² = 11/12, spread 1/12
    assert clear.severity == "ok"
    assert clear.figures["noise_scale"] == pytest.approx(4 / 11)
    lost = report_noise(recipe, 4, 4.02, 4.0)
    assert lost.severity == "note"
    assert "more completions per step" in lost.change
    none = report_noise(recipe, 4, 3.0, 4.0)
    assert none.figures["noise_scale"] is None
    assert "no signal was seen" in none.what


def test_what_cannot_be_estimated_is_left_out() -> None:
    policy, groups = make_policy(), random_groups(groups=5)
    for recipe, sampled in (
        (recipe_of(name="ppo"), groups),
        (recipe_of(name="dpo"), groups),
        (recipe_of(), groups[:3]),
        (recipe_of(), [groups[0]] * 400),
    ):
        found = estimate_noise(recipe, policy, sampled, {}, 30, NullProgress())
        assert (found == []) == (len(sampled) != 400)
    assert found[0].figures["groups"] < 400
