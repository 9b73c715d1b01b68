"""Scalar heads on the layers of a language model, for value models and reward models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gruppo.models.packing import Batch, Share, pack
from gruppo.models.policy import LanguageModel, predicting_states
from gruppo.types import Completion, Group


@dataclass(frozen=True)
class ScalarModel:
    """The layers of `policy`, whose output head is not used, and `head`, which maps hidden states to scalars.

    The head is always in the accumulation dtype.
    """

    policy: LanguageModel
    head: nn.Linear

    @classmethod
    def on(cls, policy: LanguageModel, bias: bool = True) -> ScalarModel:
        """A model with a zero-initialized head on the layers of `policy`, so all outputs start as 0."""
        weight = policy.head.weight
        dtype = torch.promote_types(policy.dtype, torch.float32)
        head = nn.Linear(weight.shape[1], 1, bias=bias, device=policy.device, dtype=dtype)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return cls(policy, head)

    @cached_property
    def module(self) -> nn.Module:
        """Layers and head as the module that is trained and saved."""
        return ScalarScorer(self)

    def numbers(self, batch: Batch) -> Float[Tensor, " N"]:
        """The output at the state before each completion token. Call inside `policy.precision()`."""
        numbers: Tensor = self.module(batch.token_ids, batch.positions, batch.layout, batch.predictors)
        return numbers


class ScalarScorer(nn.Module):
    """Layers and head as one module whose forward reads every weight. See `gruppo.models.policy.TokenScorer`."""

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
        """The output at each predicting state. See `Batch`."""
        hidden = predicting_states(self.policy, token_ids, positions, layout, predictors)
        with torch.autocast(self.policy.device.type, enabled=False):
            numbers: Tensor = self.score(hidden.to(self.score.weight.dtype))
        return numbers[:, 0]


def pack_states(groups: Sequence[Group], budget: int, device: torch.device, share: Share | None = None) -> list[Batch]:
    """Micro-batches of the trained completions that also contain the state after the last token.

    A completion of k tokens has k + 1 states. State t (from 0) is the state before token t. `share`: see `pack`.
    """
    extended = [
        replace(
            group,
            completions=[_extended(completion) for completion in group.completions],
            advantages=[[0.0] * (len(completion.token_ids) + 1) for completion in group.completions],
            values=[],
            returns=[],
        )
        for group in groups
    ]

    def weights(lengths: list[list[int]]) -> list[list[float]]:
        return [[1.0] * len(row) for row in lengths]

    return pack(extended, weights, budget, with_kl=True, device=device, share=share)


@torch.no_grad()
def read_states(
    model: ScalarModel, groups: Sequence[Group], budget: int, device: torch.device, share: Share | None = None
) -> Iterator[tuple[int, int, list[float]]]:
    """Yield group index, completion index, and the outputs at all states, including the one after the last token.

    `share`: see `pack`.
    """
    for batch in pack_states(groups, budget, device, share):
        with model.policy.precision():
            numbers = model.numbers(batch).cpu().double()
        start = 0
        for index, number, length in batch.members:
            yield index, number, numbers[start : start + length].tolist()
            start += length


def _extended(completion: Completion) -> Completion:
    """The completion with its last token repeated, so that the last token is read. An empty completion stays empty."""
    if not completion.token_ids:
        return completion
    return replace(
        completion,
        token_ids=(*completion.token_ids, completion.token_ids[-1]),
        mask=(*completion.mask, False),
        sampling_logprobs=(*completion.sampling_logprobs, 0.0),
    )
