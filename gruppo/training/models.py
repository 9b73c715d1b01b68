"""The models of a run (policy, reference, value and reward model), sharded over the ranks, and their optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gruppo.config.recipe import Recipe
from gruppo.models.loading import ModelSource, load_model
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import Loaded, Ranks
from gruppo.models.reward_model import load_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.training.optimizer import Trainable, make_optimizer
from gruppo.utils.progress import Progress


@dataclass
class TrainedModels:
    """The models of a run on one rank. `sampled`, `initial`: see `gruppo.models.ranks.Models`."""

    policy: LanguageModel
    reference: LanguageModel | None
    sampled: LanguageModel
    initial: LanguageModel | None
    optimizer: torch.optim.Optimizer
    critic: Trainable | None
    reward_model: Trainable | None


def load_critic(
    recipe: Recipe, source: ModelSource, policy: LanguageModel, dtype: str, progress: Progress
) -> ScalarModel:
    """The value model, computed like the policy."""
    layers = load_model(source, policy.device.type, dtype, progress, recipe.model.attention)
    return ScalarModel.on(replace(layers, recompute=policy.recompute, compiled=policy.compiled))


def load_scorer(
    recipe: Recipe, source: ModelSource, policy: LanguageModel, dtype: str, progress: Progress
) -> ScalarModel:
    """The reward model, computed like the policy."""
    settings = recipe.reward_model
    assert settings is not None
    loaded = load_reward_model(source, settings.kind, policy.device.type, dtype, progress, recipe.model.attention)
    layers = replace(loaded.policy, recompute=policy.recompute, compiled=policy.compiled)
    return replace(loaded, policy=layers)


def distribute(recipe: Recipe, loaded: Loaded, ranks: Ranks, apart: bool = False) -> TrainedModels:
    """Shard the models over the ranks, in place, and make their optimizers. `apart`: see `Ranks.distribute`."""
    initial = recipe.method.source == "initial"
    models = ranks.distribute(loaded.policy, recipe.method.needs_reference, initial, apart)

    def trainable(model: ScalarModel | None, trained: bool = True) -> Trainable | None:
        if model is None:
            return None
        sharded = ranks.distribute_scalar(model)
        optimizer = make_optimizer(recipe.optimizer, sharded.module, sharded.policy) if trained else None
        return Trainable(sharded, optimizer)

    trains_scorer = recipe.reward_model is not None and recipe.reward_model.prompts > 0
    optimizer = make_optimizer(recipe.optimizer, models.policy.model, models.policy)
    return TrainedModels(*models, optimizer, trainable(loaded.critic), trainable(loaded.scorer, trains_scorer))


def chosen_policy(policy: LanguageModel, recipe: Recipe, chosen: Mapping[str, Any]) -> LanguageModel:
    """The policy as the settings that were chosen for this machine compute it."""
    # `recompute` is missing in runs from before the option existed.
    return replace(policy, recompute=chosen.get("recompute", False), compiled=recipe.model.compile)
