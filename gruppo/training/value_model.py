"""The value model of PPO: its values, its loss, and its updates.

V(s_t) is read at the token before t, where the policy predicts t, so policy and value model read the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from gruppo.algorithms.losses import value_loss
from gruppo.config.method_section import Critic
from gruppo.config.recipe import Recipe
from gruppo.models.packing import Batch
from gruppo.models.ranks import ALONE, Ranks, metrics_of_all, on_all_ranks
from gruppo.models.value_head import ScalarModel, read_states
from gruppo.rollout.source import Step
from gruppo.training.nonfinite import Guard
from gruppo.training.optimizer import Trainable
from gruppo.training.policy_trainer import Learner, StepBatches
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress


def score_values(
    critic: ScalarModel, groups: Sequence[Group], budget: int, device: torch.device, ranks: Ranks = ALONE
) -> None:
    """Fill in `values` of every trained completion: for the state before each token, and for the state after the last.

    The value after the last token is the critic's if the completion was truncated, and 0 if it finished (EOS).
    """
    for group in groups:
        group.values = [None] * len(group.completions)
    states = ranks.gather([*read_states(critic, groups, budget, device, ranks.share)])
    for index, number, values in chain.from_iterable(states):
        truncated = groups[index].completions[number].finish_reason == "length"
        groups[index].values[number] = [*values[:-1], values[-1] if truncated else 0.0]


def critic_loss(critic: ScalarModel, batch: Batch, settings: Critic, metrics: Metrics) -> Tensor:
    """The micro-batch's part of the value model's loss, with the policy's token weights.

    Call it inside `policy.precision()`.
    """
    assert batch.values is not None
    assert batch.returns is not None
    numbers = critic.numbers(batch)
    dtype = numbers.dtype
    values, returns, weights = (tensor.to(dtype) for tensor in (batch.values, batch.returns, batch.weights))
    loss = value_loss(numbers, values, returns, weights, settings.clip)
    count, trained = len(batch.trained), batch.trained
    if count:
        error = (numbers.detach() - returns)[trained]
        metrics.mean("value/mean", numbers.detach()[trained].sum(), count)
        metrics.mean("value/return_mean", returns[trained].sum(), count)
        metrics.mean("value/error", error.square().sum(), count)
        if settings.clip:
            moved = (numbers.detach() - values).abs()[trained] > settings.clip
            metrics.mean("value/clipped", moved.sum(), count)
    return loss


class ValueModelTrainer:
    """Trains the value model next to the policy, on the same batches.

    Its learning rate follows the policy's schedule. Without a value model (`critic` is None) it does nothing.
    """

    def __init__(
        self,
        critic: Trainable | None,
        recipe: Recipe,
        sizes: BatchSizes,
        guard: Guard,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.critic = None if critic is None else critic.model
        self.settings, self.sizes = recipe.critic, sizes
        self.policy_rate = recipe.optimizer.learning_rate
        self.learner = None
        if critic is not None and critic.optimizer is not None:
            model, max_grad_norm = critic.model, recipe.optimizer.max_grad_norm
            self.learner = Learner(
                model.policy, model.module, critic.optimizer, max_grad_norm, sizes, guard, progress, "value model's ",
                "critic.learning_rate", ranks,
            )  # fmt: skip

    def score(self, groups: Sequence[Group], step: Step) -> None:
        """Fill in the values of trained completions."""
        if self.critic is not None:
            self._score(groups, step)

    @on_all_ranks
    def _score(self, groups: Sequence[Group], step: Step) -> None:
        assert self.critic is not None
        with step.timer("score"):
            device = self.critic.policy.device
            attempt = partial(score_values, self.critic, groups, device=device, ranks=self.ranks)
            self.sizes.run_with_retry("micro_batch_tokens", "scoring", attempt)

    def update(self, batches: StepBatches, rate: float, number: int, step: Step) -> None:
        """Update `number` (from 0) of the step; `rate`: the policy's learning rate in that step."""
        if self.critic is not None:
            self._update(batches, rate, number, step)

    @on_all_ranks
    def _update(self, batches: StepBatches, rate: float, number: int, step: Step) -> None:
        assert self.critic is not None
        assert self.learner is not None
        share = rate / self.policy_rate if self.policy_rate else 1.0
        with step.timer("update"), metrics_of_all(self.ranks, step.metrics) as metrics:
            loss = partial(critic_loss, self.critic, settings=self.settings, metrics=metrics)
            total, norm = self.learner.update(batches, loss, share * self.settings.learning_rate, number, metrics)
        step.metrics.mean("value/loss", total)
        step.metrics.mean("value/gradient_norm", norm)
