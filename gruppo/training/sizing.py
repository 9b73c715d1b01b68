"""Sizes that depend on the memory of the machine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gruppo.config.recipe import Recipe
from gruppo.models.loading import ModelSource, load_model
from gruppo.models.lora import add_adapters
from gruppo.models.policy import LanguageModel
from gruppo.training.disk_estimate import Disk, forecast_disk
from gruppo.training.inputs import RunInputs, workload
from gruppo.training.memory_estimate import ChosenSizes, budget_bytes, choose_sizes
from gruppo.training.memory_footprint import measure_footprint, process_bytes
from gruppo.utils.progress import Progress


def load_and_choose(
    recipe: Recipe, source: ModelSource, inputs: RunInputs, device: torch.device, dtype: str, progress: Progress
) -> tuple[LanguageModel, ChosenSizes]:
    """Load the policy, and choose the sizes within the recipe's budget."""
    free = Free.now(recipe, device)
    policy = load_model(source, device.type, dtype, progress, recipe.model.attention)
    policy = add_adapters(policy, recipe.model.lora, recipe.run.seed)
    return policy, free.choose(recipe, policy, inputs, progress)


@dataclass(frozen=True)
class Free:
    """The memory budget of a recipe and the memory that the process uses, in bytes, before the weights are loaded."""

    budget: int
    process: int

    @classmethod
    def now(cls, recipe: Recipe, device: torch.device) -> Free:
        """The current state of the machine."""
        return cls(budget_bytes(recipe.run.memory, device), process_bytes(device))

    def choose(self, recipe: Recipe, policy: LanguageModel, inputs: RunInputs, progress: Progress) -> ChosenSizes:
        """Choose the sizes for a policy with its adapters."""
        footprint = measure_footprint(policy, self.process, progress, recipe.optimizer.state)
        return choose_sizes(footprint, workload(recipe, inputs), self.budget)


def disk_of(recipe: Recipe, policy: LanguageModel, inputs: RunInputs, start_weights: bool = False) -> Disk:
    """The estimated disk space of a run of this policy, including its tables."""
    return forecast_disk(recipe, policy, workload(recipe, inputs), start_weights)
