"""Sizes that depend on the memory of the machine."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from gruppo.config.recipe import Recipe
from gruppo.config.sections import RewardModel
from gruppo.engines.memory import Free
from gruppo.models.footprint import measure_footprint
from gruppo.models.loading import ModelSource, load_model
from gruppo.models.lora import add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.rollout.reward_model import Sample
from gruppo.training.disk_estimate import Disk, forecast_disk
from gruppo.training.inputs import RunInputs, workload
from gruppo.training.memory_estimate import ChosenSizes, Workload, choose_sizes
from gruppo.utils.progress import Progress


def load_and_choose(
    recipe: Recipe, source: ModelSource, inputs: RunInputs, device: torch.device, dtype: str, progress: Progress
) -> tuple[LanguageModel, ChosenSizes]:
    """Load the policy, and choose the sizes within the recipe's budget."""
    free = Free.now(recipe.run.memory, device)
    policy = load_model(source, device.type, dtype, progress, recipe.model.attention)
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    return policy, choose_for_run(free, recipe, policy, inputs, progress)


def choose_for_run(
    free: Free, recipe: Recipe, policy: LanguageModel, inputs: RunInputs, progress: Progress
) -> ChosenSizes:
    """Choose the sizes for a policy with its adapters. `free`: from before the weights were loaded."""
    footprint = measure_footprint(policy, free.process, progress, recipe.optimizer.state)
    return choose_sizes(footprint, workload(recipe, inputs), free.budget)


def choose_for_labels(
    free: Free, recipe: Recipe, settings: RewardModel, model: ScalarModel, samples: Sequence[Sample], progress: Progress
) -> ChosenSizes:
    """Choose the sizes for training a reward model on labeled samples. Nothing is sampled, so slots do not matter.

    `free`: from before its weights were loaded. Raises UsageError if not even one completion fits.
    """
    footprint = measure_footprint(model, free.process, progress, recipe.optimizer.state)
    return choose_sizes(
        footprint,
        labels_workload(samples, settings.batch_size),
        free.budget,
        "labels of shorter completions (a smaller sampling.max_tokens in gruppo label), or a smaller reward_model.name",
    )


def labels_workload(samples: Sequence[Sample], batch_size: int) -> Workload:
    """Upper bounds of the work of one update of a reward model, which reads completions to their last token."""
    most = max(Counter(sample.prompt.token_ids for sample in samples).values())
    group = min(batch_size, most)
    return Workload(
        prompt_tokens=max(len(sample.prompt.token_ids) for sample in samples),
        max_tokens=max(len(sample.completion.token_ids) for sample in samples) + 1,
        prompts_per_step=math.ceil(batch_size / group),
        group_size=group,
        samples_elsewhere=True,
    )


def disk_of(recipe: Recipe, policy: LanguageModel, inputs: RunInputs, start_weights: bool = False) -> Disk:
    """The estimated disk space of a run of this policy, including its tables."""
    return forecast_disk(recipe, policy, workload(recipe, inputs), start_weights)
