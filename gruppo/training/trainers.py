"""What trains the models of a run: the same objects on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from gruppo.config.recipe import Recipe
from gruppo.models.ranks import Ranks
from gruppo.rollout.reward_model import RewardModelScorer
from gruppo.training.model_files import ModelFiles
from gruppo.training.models import TrainedModels
from gruppo.training.nonfinite import Guard
from gruppo.training.policy_trainer import PolicyTrainer
from gruppo.training.reward_model import RewardModelTrainer
from gruppo.training.value_model import ValueModelTrainer
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class Trainers:
    """Trainers of policy, value model and reward model, what scores with the reward model, and the models' files."""

    policy: PolicyTrainer
    value_model: ValueModelTrainer
    scorer: RewardModelScorer | None
    reward_model: RewardModelTrainer | None
    files: ModelFiles


def make_trainers(
    recipe: Recipe, models: TrainedModels, sizes: BatchSizes, guard: Guard, progress: Progress, ranks: Ranks
) -> Trainers:
    """The trainers of a run on this rank."""
    reference, models.reference = models.reference, None  # only the trainer keeps the reference, because it replaces it
    policy = PolicyTrainer(models.policy, reference, models.optimizer, recipe, sizes, guard, progress, ranks)
    value_model = ValueModelTrainer(models.critic, recipe, sizes, guard, progress, ranks)
    scorer, reward_model, part = None, None, models.reward_model
    if part is not None and recipe.reward_model is not None:
        scorer = RewardModelScorer(part.model, recipe.reward_model, models.policy.tokenizer, sizes, ranks)
        if part.optimizer is not None:
            reward_model = RewardModelTrainer(scorer, part.optimizer, recipe.optimizer.max_grad_norm)
    files = ModelFiles(models.policy, models.optimizer, models.critic, models.reward_model, ranks)
    return Trainers(policy, value_model, scorer, reward_model, files)
