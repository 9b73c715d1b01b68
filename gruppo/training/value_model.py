"""The value model of PPO.

V(s_t) is read at the token before t, where the policy predicts t, so policy and value model read the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gruppo.algorithms.losses import value_loss
from gruppo.config.recipe import Critic
from gruppo.models.value_head import ScalarModel, read_states
from gruppo.training.packing import Batch
from gruppo.types import Group, Metrics


def score_values(critic: ScalarModel, groups: Sequence[Group], budget: int, device: torch.device) -> None:
    """Fill in `values` of every trained completion: of the state before each token, and of the one after the last: the
    critic's where the completion was cut, 0 where it ended by itself."""
    for group in groups:
        group.values = [None] * len(group.completions)
    for index, number, own in read_states(critic, groups, budget, device):
        cut = groups[index].completions[number].finish_reason == "length"
        groups[index].values[number] = [*own[:-1], own[-1] if cut else 0.0]


def critic_loss(critic: ScalarModel, batch: Batch, settings: Critic, metrics: Metrics) -> Tensor:
    """The micro-batch's part of the value model's loss, whose tokens weigh as in the policy's. Call it inside
    `policy.precision()`."""
    assert batch.values is not None
    assert batch.returns is not None
    numbers = critic.numbers(batch)
    dtype = numbers.dtype
    values, returns, weights = (each.to(dtype) for each in (batch.values, batch.returns, batch.weights))
    loss = value_loss(numbers, values, returns, weights, settings.clip)
    used = weights != 0
    count = float(used.sum())
    if count:
        error = (numbers.detach() - returns)[used]
        metrics.mean("value/mean", float(numbers.detach()[used].sum()), count)
        metrics.mean("value/return_mean", float(returns[used].sum()), count)
        metrics.mean("value/error", float(error.square().sum()), count)
        if settings.clip:
            moved = (numbers.detach() - values).abs()[used] > settings.clip
            metrics.mean("value/clipped", float(moved.sum()), count)
    return loss
