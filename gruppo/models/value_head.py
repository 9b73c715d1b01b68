"""A language model's layers with a head that gives a number at each token: value models and reward models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.models.packing import Batch, pack
from gruppo.models.policy import LanguageModel, predicting_states
from gruppo.types import Completion, Group


@dataclass(frozen=True)
class ScalarModel:
    """`policy`: the layers (its output head is not used); `head`: from a hidden state to a number, never narrow."""

    policy: LanguageModel
    head: nn.Linear

    @classmethod
    def on(cls, policy: LanguageModel, bias: bool = True) -> ScalarModel:
        """A head of zeros on a model's layers, so that every number begins as 0."""
        weight = policy.head.weight
        wide = torch.promote_types(policy.dtype, torch.float32)
        head = nn.Linear(weight.shape[1], 1, bias=bias, device=policy.device, dtype=wide)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return cls(policy, head)

    @cached_property
    def module(self) -> nn.Module:
        """Layers and head: what is trained and saved."""
        return ScalarScorer(self)

    def numbers(self, batch: Batch) -> Float[Tensor, " N"]:
        """One at the state before each completion token. Call it inside `policy.precision()`."""
        numbers: Tensor = self.module(batch.token_ids, batch.positions, batch.layout, batch.predictors)
        return numbers


class ScalarScorer(nn.Module):
    """Layers and head as one module, whose forward reads every weight; see `gruppo.models.policy.TokenScorer`."""

    def __init__(self, model: ScalarModel) -> None:
        super().__init__()
        self.model: Any = model.policy.model.get_decoder()
        self.score, self.policy = model.head, model.policy

    def forward(
        self,
        token_ids: Int[Tensor, " T"],
        positions: Int[Tensor, " T"],
        layout: Sequence[tuple[int, Sequence[int]]],
        predictors: Int[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """One number at each predicting state; see `Batch`."""
        hidden = predicting_states(self.policy, token_ids, positions, layout, predictors)
        with torch.autocast(self.policy.device.type, enabled=False):
            numbers: Tensor = self.score(hidden.to(self.score.weight.dtype))
        return numbers[:, 0]


def pack_states(groups: Sequence[Group], budget: int, device: torch.device) -> list[Batch]:
    """Micro-batches of the trained completions in which the state after the last token is there too: a completion of k
    tokens has k + 1 places, the number t (from 0) being the state before token t."""
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
    return pack(longer, lambda lengths: [[1.0] * len(own) for own in lengths], budget, with_kl=True, device=device)


@torch.no_grad()
def read_states(
    model: ScalarModel, groups: Sequence[Group], budget: int, device: torch.device
) -> Iterator[tuple[int, int, list[float]]]:
    """Group, completion, and the model's number at each state of it, the one after the last token included."""
    for batch in pack_states(groups, budget, device):
        with model.policy.precision():
            numbers = model.numbers(batch).double().cpu()
        start = 0
        for index, number, length in batch.members:
            yield index, number, numbers[start : start + length].tolist()
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
