"""The noise of the gradient, estimated from the groups of the smoke test; see `gruppo.training.gradient_noise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gruppo.config.recipe import Recipe
from gruppo.errors import out_of_memory
from gruppo.models.packing import pack, trained_lengths
from gruppo.models.policy import LanguageModel
from gruppo.preflight.findings import Finding
from gruppo.preflight.gradient_check import fill_advantages
from gruppo.training.gradient_noise import fixed, sampled_gradient
from gruppo.training.optimizer import accumulate
from gruppo.training.policy_loss import batch_loss, token_weights
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Advance, Progress
from gruppo.utils.system import release_memory

LEAST = 4  # groups
TOKENS, ACCELERATOR_TOKENS = 4_096, 65_536  # at most, of prompts and completions
SIGNAL_LEAST = 0.05  # share of the squared gradient, as in the warning noisy_gradient


def estimate_noise(
    recipe: Recipe,
    policy: LanguageModel,
    sampled: Sequence[Group],
    weights: Mapping[str, float],
    micro_batch_tokens: int,
    progress: Progress,
) -> list[Finding]:
    """The finding on the noise of the gradient of a step. Empty if there are too few groups, if advantages depend on
    more than rewards, or without the memory. `weights`: reward weights by name."""
    method = recipe.method
    if recipe.reward_model is not None or method.needs_scores or method.needs_critic:
        return []
    groups = _few(sampled, TOKENS if policy.device.type == "cpu" else ACCELERATOR_TOKENS)
    if len(groups) < LEAST:
        return []
    fill_advantages(groups, method, recipe.critic, dict(weights))
    try:
        with progress.bar("Measuring the noise of the gradient", len(groups), "groups") as advance:
            products = _products(recipe, policy, groups, micro_batch_tokens, advance)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return []
    finally:
        policy.model.zero_grad(set_to_none=True)
        release_memory()
    return [] if products is None else [report_noise(recipe, len(groups), *products)]


def _few(sampled: Sequence[Group], most: int) -> list[Group]:
    """Copies of the first groups, with at most so many tokens."""
    groups, tokens = [], 0
    for group in sampled:
        tokens += len(group.prompt.token_ids) + sum(len(one.token_ids) for one in group.completions)
        if tokens > most:
            break
        groups.append(Group(group.prompt, group.completions, group.rewards))
    return groups


def _products(
    recipe: Recipe, policy: LanguageModel, groups: Sequence[Group], tokens: int, advance: Advance
) -> tuple[float, float] | None:
    """The squared norm of the sum of the groups' gradients, and the sum of their squared norms; None if all are 0."""
    method = recipe.method.model_copy(update={"kl_coef": 0.0})
    used, lengths = trained_lengths(groups, None)
    weights = fixed(token_weights(method, recipe.sampling.max_tokens), lengths)
    whole, squares = torch.zeros((), dtype=torch.float64), 0.0
    for place in range(len(groups)):
        part = [numbers if own == place else [] for own, numbers in enumerate(used)]
        batches = pack(groups, weights, tokens, False, policy.device, part)
        accumulate(
            batches,
            lambda batch: batch_loss(policy, None, batch, method, recipe.sampling.temperature, Metrics()),
            policy,
            lambda _: None,
        )
        gradient = sampled_gradient(policy.model)
        policy.model.zero_grad(set_to_none=True)
        whole = gradient + whole.to(gradient.device, gradient.dtype)
        squares += float(gradient @ gradient)
        advance(1)
    return (float(whole @ whole), squares) if squares else None


def report_noise(recipe: Recipe, groups: int, of_sum: float, squares: float) -> Finding:
    """The finding on the noise, given |Σ c|² and Σ |c|² of the gradients c of so many groups.

    With μ = E c, an unbiased estimate of |μ|² is (|Σ c|² - Σ |c|²) / n(n - 1), and of tr Cov(c)
    (Σ |c|² - |Σ c|²/n) / (n - 1).
    """
    size, prompts = recipe.sampling.group_size, recipe.sampling.prompts_per_step
    expected = (of_sum - squares) / (groups * (groups - 1))
    spread = (squares - of_sum / groups) / (groups - 1)
    signal = max(0.0, prompts * expected / (prompts * expected + spread)) if expected > 0 else 0.0
    scale = size * spread / expected if expected > 0 else None
    figures = {"groups": groups, "signal": signal, "noise_scale": scale, "completions": prompts * size}
    rough = f"a rough estimate from {groups} groups"
    if scale is None:
        return Finding(
            "note", "gradient noise", f"no signal was seen in the gradients of {groups} groups",
            "they may be too few; gradient/signal and gradient/noise_scale of the run say more", figures=figures,
        )  # fmt: skip
    what = (
        f"half of the squared gradient would be signal with about {scale:.2g} completions per step; with this recipe's "
        f"{prompts * size} it is {signal:.0%} ({rough})"
    )
    if signal < SIGNAL_LEAST:
        return Finding(
            "note", "gradient noise", what, "updates would be mostly noise, and learning slow",
            "more completions per step, or a lower optimizer.learning_rate; watch gradient/signal", figures,
        )  # fmt: skip
    return Finding("ok", "gradient noise", what, figures=figures)
