"""The value model of PPO: a language model's layers with a head that gives a number at each token.

V(s_t) is read at the token before t, where the policy predicts t, so policy and value model read the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gruppo.config import Critic
from gruppo.maths.losses import value_loss
from gruppo.models import LanguageModel
from gruppo.packing import Batch, pack, predicting_states
from gruppo.types import Completion, Group, Metrics


@dataclass(frozen=True)
class ScalarModel:
    """`policy`: the layers (its output head is not used); `head`: from a hidden state to a number, never narrow."""

    policy: LanguageModel
    head: nn.Linear

    @classmethod
    def on(cls, policy: LanguageModel) -> ScalarModel:
        """A head of zeros on a model's layers, so that every number begins as 0."""
        weight = policy.head.weight
        wide = torch.promote_types(policy.dtype, torch.float32)
        head = nn.Linear(weight.shape[1], 1, device=policy.device, dtype=wide)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(policy, head)

    @property
    def module(self) -> nn.Module:
        """Layers and head: what is trained and saved."""
        return nn.ModuleDict({"model": self.policy.model.get_decoder(), "score": self.head})

    def numbers(self, batch: Batch) -> Float[Tensor, " N"]:
        """One at the state before each completion token. Call it inside `policy.precision()`."""
        hidden = predicting_states(self.policy, batch)
        with torch.autocast(self.policy.device.type, enabled=False):
            made: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return made[:, 0]


@torch.no_grad()
def score_values(critic: ScalarModel, groups: Sequence[Group], budget: int, device: torch.device) -> None:
    """Fill in `values` of every trained completion: of the state before each token, and of the one after the last: the
    critic's where the completion was cut, 0 where it ended by itself."""
    longer = [
        replace(
            group,
            completions=[_longer(each) for each in group.completions],
            advantages=[[0.0] * (len(each.token_ids) + 1) for each in group.completions],
            values=[],
            returns=[],
        )
        for group in groups
    ]
    for group in groups:
        group.values = [None] * len(group.completions)
    for batch in pack(longer, _ones, budget, with_kl=True, device=device):
        with critic.policy.precision():
            numbers = critic.numbers(batch).double().cpu()
        start = 0
        for index, number, length in batch.members:
            own = numbers[start : start + length].tolist()
            cut = groups[index].completions[number].finish_reason == "length"
            groups[index].values[number] = [*own[:-1], own[-1] if cut else 0.0]
            start += length


def _longer(completion: Completion) -> Completion:
    """With a token behind its last one, which is then read; an empty one stays empty."""
    if not completion.token_ids:
        return completion
    return replace(
        completion,
        token_ids=(*completion.token_ids, completion.token_ids[-1]),
        mask=(*completion.mask, False),
        sampling_logprobs=(*completion.sampling_logprobs, 0.0),
    )


def _ones(lengths: list[list[int]]) -> list[list[float]]:
    return [[1.0] * len(group) for group in lengths]


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
