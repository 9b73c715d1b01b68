"""Packing of groups into micro-batches. Each prompt occurs once and is followed by its completions.

Token weights are computed here over the whole step before it is split. So the split into micro-batches and the order of
the groups cannot change the objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gruppo.models.policy import LanguageModel
from gruppo.types import Group
from gruppo.utils.transfer import real_dtype, upload

MAX_TOKENS = 1024  # per micro-batch on a CPU, where larger ones do not make matmuls faster
ACCELERATOR_TOKENS = 65_536  # on an accelerator, which small micro-batches would leave idle; memory decides below this


def most_tokens(prompt_tokens: int, accelerator: bool) -> int:
    """Maximum number of tokens of a micro-batch.

    A prompt is at most half of it. Otherwise long prompts would be computed again for every few completions.
    """
    return max(ACCELERATOR_TOKENS if accelerator else MAX_TOKENS, 2 * prompt_tokens)


TokenWeights = Callable[[list[list[int]]], list[list[float]]]
Part = list[list[int]]  # the numbers of some completions of each group

# Called with the tokens of every micro-batch; returns the numbers of those to train on, and of those to run idle.
Share = Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]


@dataclass(slots=True)
class Batch:
    """A micro-batch. Tensors over T are read by the model, tensors over N are the completion tokens in the loss.

    The last token of a completion is predicted but never read, so it is not in T. `layout` has the lengths of each
    prompt and its completions in T. `predictors[n]` is the position in T whose hidden state predicts `targets[n]`.
    `members` lists the completions in N, in order, as (group index, completion index, number of tokens), and
    `sequences` the number of each token's completion among them; completions are never split between batches. `trained`
    are the tokens whose weight is not 0: known here, because selecting them on a device would wait for it.
    `sampling_logprobs` are None if those of a completion are not known. The method fills in `old_logprobs`,
    `ref_logprobs` and the policy's `entropy` before the step. `values` and `returns` are set with a value model only.
    """

    token_ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    layout: list[tuple[int, list[int]]]
    predictors: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    advantages: Float[Tensor, " N"]
    weights: Float[Tensor, " N"]
    sequences: Int[Tensor, " N"]
    trained: Int[Tensor, " U"]
    members: list[tuple[int, int, int]] = field(default_factory=list)
    sampling_logprobs: Float[Tensor, " N"] | None = None
    old_logprobs: Float[Tensor, " N"] | None = None
    ref_logprobs: Float[Tensor, " N"] | None = None
    entropy: Float[Tensor, " N"] | None = None
    values: Float[Tensor, " N"] | None = None
    returns: Float[Tensor, " N"] | None = None


def split(groups: Sequence[Group], parts: int) -> list[Part]:
    """Split the completions of a step into parts, in order: whole groups, or completions if there are fewer groups than
    parts.

    The parts differ by at most one group, or completion; some are empty if there are fewer completions than parts.
    """
    places = [(index, number) for index, group in enumerate(groups) for number in range(len(group.completions))]
    whole = len(groups) >= parts
    total = len(groups) if whole else len(places)
    result: list[Part] = [[[] for _ in groups] for _ in range(parts)]
    for place, (index, number) in enumerate(places):
        result[(index if whole else place) * parts // total][index].append(number)
    return result


def pack(
    groups: Sequence[Group],
    token_weights: TokenWeights,
    budget: int,
    with_kl: bool,
    device: torch.device | str = "cpu",
    part: Part | None = None,
    share: Share | None = None,
) -> list[Batch]:
    """Pack groups into micro-batches of at most `budget` read tokens, or one completion if it alone is longer.

    `part`: the completions to pack, as if no others had been sampled; by default all. `share`: chooses the
    micro-batches of this process, by default all; those that it runs idle come last.

    Completions that are not trained on are left out, as if they had not been sampled. Without a KL term in the loss
    (`with_kl` False), completions whose advantages are all 0 are also left out, because their gradient is 0; they still
    count in the weights.
    """
    used, lengths = trained_lengths(groups, part)
    packer = _Packer(budget, device)
    for index, (group, weights) in enumerate(zip(groups, token_weights(lengths), strict=True)):
        for number, weight in zip(used[index], weights, strict=True):
            if group.completions[number].token_ids and (with_kl or any(group.advantages[number])):
                packer.add(index, number, group, weight)
    return packer.batches(share)


def trained_lengths(groups: Sequence[Group], part: Part | None) -> tuple[Part, list[list[int]]]:
    """The numbers of the completions of each group that are trained on, and their numbers of sampled tokens."""
    numbers = [list(range(len(group.completions))) for group in groups] if part is None else part
    used = [[number for number in row if group.trained[number]] for group, row in zip(groups, numbers, strict=True)]
    lengths = [[sum(group.completions[number].mask) for number in row] for group, row in zip(groups, used, strict=True)]
    return used, lengths


class _Packer:
    def __init__(self, budget: int, device: torch.device | str) -> None:
        self.budget, self.device = budget, device
        self.plans: list[list[tuple[int, int, Group, float]]] = []
        self.tokens: list[int] = []  # of each plan

    def add(self, index: int, number: int, group: Group, weight: float) -> None:
        """Add a completion to the last micro-batch, or to a new one if it does not fit."""
        completion, prompt = len(group.completions[number].token_ids) - 1, len(group.prompt.token_ids)
        continues = bool(self.plans) and self.plans[-1][-1][0] == index
        needed = completion if continues else completion + prompt
        if not self.plans or self.tokens[-1] + needed > self.budget:
            self.plans.append([])
            self.tokens.append(0)
            needed = completion + prompt
        self.plans[-1].append((index, number, group, weight))
        self.tokens[-1] += needed

    def batches(self, share: Share | None) -> list[Batch]:
        """The micro-batches as tensors: all of them, or a share."""
        own, idle = (range(len(self.plans)), []) if share is None else share(self.tokens)
        batches = [self._batch(self.plans[place]) for place in own]
        return batches + [as_idle(self._batch(self.plans[place])) for place in idle]

    def _batch(self, plan: list[tuple[int, int, Group, float]]) -> Batch:
        token_ids: list[int] = []
        positions: list[int] = []
        layout: list[tuple[int, list[int]]] = []
        predictors: list[int] = []
        targets: list[int] = []
        names = ("advantages", "weights", "sampling_logprobs", "values", "returns")
        columns: dict[str, list[float]] = {name: [] for name in names}
        members: list[tuple[int, int, int]] = []
        current = None
        for index, number, group, weight in plan:
            prompt, completion = group.prompt.token_ids, group.completions[number]
            if index != current:
                current, prompt_end = index, len(token_ids) + len(prompt)
                token_ids += prompt
                positions += range(len(prompt))
                layout.append((len(prompt), []))
            predictors += [prompt_end - 1, *range(len(token_ids), len(token_ids) + len(completion.token_ids) - 1)]
            token_ids += completion.token_ids[:-1]
            positions += range(len(prompt), len(prompt) + len(completion.token_ids) - 1)
            if len(completion.token_ids) > 1:
                layout[-1][1].append(len(completion.token_ids) - 1)
            members.append((index, number, len(completion.token_ids)))
            targets += completion.token_ids
            columns["advantages"] += group.advantages[number]
            columns["weights"] += [weight if sampled else 0.0 for sampled in completion.mask]
            columns["sampling_logprobs"] += completion.sampling_logprobs
            if group.returns:
                columns["values"] += (group.values[number] or [])[:-1]
                columns["returns"] += group.returns[number] or []
        if not columns["returns"]:
            del columns["values"], columns["returns"]
        sampled = zip(columns["sampling_logprobs"], columns["weights"], strict=True)
        if any(weight and math.isnan(value) for value, weight in sampled):
            del columns["sampling_logprobs"]
        return make_batch(token_ids, positions, layout, predictors, targets, columns, members, self.device)


def as_idle(batch: Batch) -> Batch:
    """The micro-batch with weights of 0 and without members: it is computed, and changes and records nothing."""
    return replace(batch, weights=torch.zeros_like(batch.weights), trained=batch.trained[:0], members=[])


def make_batch(
    token_ids: Sequence[int],
    positions: Sequence[int],
    layout: list[tuple[int, list[int]]],
    predictors: Sequence[int],
    targets: Sequence[int],
    columns: Mapping[str, Sequence[float]],
    members: list[tuple[int, int, int]],
    device: torch.device | str,
) -> Batch:
    """The micro-batch on the device, in two transfers: whole numbers and reals. `columns`: its reals, by name."""
    sequences = [number for number, (_, _, length) in enumerate(members) for _ in range(length)]
    trained = [place for place, weight in enumerate(columns["weights"]) if weight]
    whole = {
        "token_ids": token_ids,
        "positions": positions,
        "predictors": predictors,
        "targets": targets,
        "sequences": sequences,
        "trained": trained,
    }
    on_device = dict(zip(whole, upload(list(whole.values()), torch.long, device), strict=True))
    on_device |= zip(columns, upload(list(columns.values()), real_dtype(device), device), strict=True)
    return Batch(layout=layout, members=members, **on_device)


def score(policy: LanguageModel, batch: Batch, temperature: float) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probabilities of the completion tokens of the batch, and the entropy at each, in nats at `temperature`.

    Call this inside `policy.precision()`. Both results are float32, or float64 for a float64 policy.
    """
    return policy.score_tokens(
        batch.token_ids, batch.positions, batch.layout, batch.predictors, batch.targets, temperature
    )
