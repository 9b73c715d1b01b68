"""What a method makes of scored groups: who is trained on, advantages, and the loss of a micro-batch.

The recipe's [method] says which; see `methods.py` for the table of names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from itertools import chain

import torch
from torch import Tensor

from gruppo.config import SURROGATES, Method
from gruppo.errors import UsageError
from gruppo.imports import import_attribute
from gruppo.maths import losses
from gruppo.maths.advantages import advantages, returns_to_go
from gruppo.maths.losses import Surrogate, policy_loss
from gruppo.models import LanguageModel
from gruppo.packing import Batch, TokenWeights, score
from gruppo.types import Group, Metrics

_AGGREGATIONS = {
    "sequence-mean": losses.sequence_mean_weights,
    "sequence-sum": losses.sequence_sum_weights,
    "group-token-mean": losses.group_token_mean_weights,
    "token-mean": losses.token_mean_weights,
    "constant": losses.constant_weights,
}


def token_weights(settings: Method, max_tokens: int) -> TokenWeights:
    """The aggregation of a method as the weights of tokens."""
    return partial(_AGGREGATIONS[settings.aggregation], max_tokens=max_tokens)


@cache
def find_surrogate(name: str) -> Surrogate:
    """The policy term of that name or import path. Raises UsageError where it cannot be imported, or where a trial on
    two tokens does not give two numbers."""
    surrogate: Surrogate = import_attribute(SURROGATES.get(name, name), "method.surrogate")
    trial = torch.zeros(2), torch.ones(2), torch.ones(2), 0.2, 0.2
    try:
        shape = surrogate(*trial).shape
    except Exception as error:  # the function is the user's
        raise UsageError(
            f'method.surrogate = "{name}": fails on a trial ({type(error).__name__}: {error}); write '
            "def surrogate(logprobs, ratio, advantages, clip_low, clip_high) -> a number a token"
        ) from error
    if shape != (2,):
        raise UsageError(
            f'method.surrogate = "{name}": gives shape {tuple(shape)} for 2 tokens; write a number a token'
        )
    return surrogate


def mark_trained(groups: Sequence[Group], mask_truncated: bool) -> None:
    """Fill in `trained` of every group: a completion whose reward is unknown, or that was cut while `mask_truncated`,
    is not trained on."""
    for group in groups:
        group.trained = [
            reward.total is not None and not (mask_truncated and completion.finish_reason == "length")
            for completion, reward in zip(group.completions, group.rewards, strict=True)
        ]
        group.advantages = [[0.0] * len(completion.token_ids) for completion in group.completions]
        group.old_logprobs = [None] * len(group.completions)
        group.ref_logprobs = [None] * len(group.completions)
        if not any(group.trained):
            group.skipped = "no completion is trained on: every reward abstained, or every completion was cut"


def rewards_differ(group: Group) -> bool:
    """True if two trained completions of the group have different rewards."""
    return len({reward.total for reward, used in zip(group.rewards, group.trained, strict=True) if used}) > 1


def drop(group: Group, why: str) -> None:
    """Take a group out of the objective, as if it had not been sampled; `why`, unless there is a reason already."""
    group.trained, group.skipped = [False] * len(group.trained), group.skipped or why


def assign_advantages(groups: Sequence[Group], settings: Method) -> None:
    """Fill in `advantages`, and `skipped` where they are all 0, after `mark_trained`.

    A completion that is not trained on leaves every mean and standard deviation. Where the KL stands in the reward
    (k1), `old_logprobs` and `ref_logprobs` of trained completions must be there.
    """
    places = [(group, number) for group in groups for number, used in enumerate(group.trained) if used]
    if settings.credit == "token":
        made = _token_advantages(places, settings)
    else:
        made = _completion_advantages(groups, settings)
    for (group, number), values in zip(places, made, strict=True):
        group.advantages[number] = values
    for group in groups:
        if any(group.trained) and not group.has_signal:
            group.skipped = "all advantages are 0: " + (
                "one completion" if sum(group.trained) == 1 else "every trained completion has the same reward"
            )


def _completion_advantages(groups: Sequence[Group], settings: Method) -> list[list[float]]:
    """One advantage a completion, the same for all of its tokens; one that has nobody to be compared with has 0."""
    rewards = []
    for group in groups:
        used = [number for number, trained in enumerate(group.trained) if trained]
        known = [_reward(group, number) - float(_penalties(group, number, settings).sum()) for number in used]
        rewards.append(torch.tensor(known, dtype=torch.float64))
    alone = 2 if settings.baseline == "leave-one-out" else 1
    made = iter(advantages([each for each in rewards if len(each) >= alone], settings.baseline, settings.scale))
    values = [next(made) if len(each) >= alone else torch.zeros_like(each) for each in rewards]
    lengths = [
        len(completion.token_ids)
        for group in groups
        for completion, used in zip(group.completions, group.trained, strict=True)
        if used
    ]
    return [[value] * length for value, length in zip(chain(*(each.tolist() for each in values)), lengths, strict=True)]


def _token_advantages(places: Sequence[tuple[Group, int]], settings: Method) -> list[list[float]]:
    """An advantage a token: what is still to come there, compared with that of all tokens of the step."""
    masks = [torch.tensor(group.completions[number].mask) for group, number in places]
    returns = [returns_to_go(_reward(group, number), _penalties(group, number, settings)) for group, number in places]
    sampled = [each[mask] for each, mask in zip(returns, masks, strict=True)]
    made = advantages([torch.cat(sampled)], settings.baseline, settings.scale)[0] if sampled else torch.zeros(0)
    values = []
    for mask, own in zip(masks, made.split([len(each) for each in sampled]), strict=True):
        values.append(torch.zeros(len(mask), dtype=own.dtype).masked_scatter(mask, own).tolist())
    return values


def _reward(group: Group, number: int) -> float:
    total = group.rewards[number].total
    assert total is not None
    return total


def _penalties(group: Group, number: int, settings: Method) -> Tensor:
    """β log(π_old/π_ref) of each token of a completion, 0 where it was not sampled and without a KL in the reward."""
    old, ref = group.old_logprobs[number], group.ref_logprobs[number]
    mask = torch.tensor(group.completions[number].mask, dtype=torch.float64)
    if not settings.kl_in_reward:
        return torch.zeros_like(mask)
    assert old is not None
    assert ref is not None
    return settings.kl_coef * mask * (torch.tensor(old, dtype=mask.dtype) - torch.tensor(ref, dtype=mask.dtype))


@torch.no_grad()
def score_batches(
    policy: LanguageModel, reference: LanguageModel, batches: Sequence[Batch], temperature: float, metrics: Metrics
) -> None:
    """Fill in π_old and π_ref of batches before any advantage is known: for a KL in the reward."""
    for batch in batches:
        with policy.precision():
            batch.old_logprobs = score(policy, batch, temperature)[0]
            batch.ref_logprobs = score(reference, batch, temperature)[0]
        used = batch.weights != 0
        metrics.mean("policy/kl", float((batch.old_logprobs - batch.ref_logprobs)[used].sum()), float(used.sum()))


def batch_loss(
    policy: LanguageModel,
    reference: LanguageModel | None,
    batch: Batch,
    settings: Method,
    temperature: float,
    metrics: Metrics,
) -> Tensor:
    """The micro-batch's part of the step's loss. Call it inside `policy.precision()`.

    The first call on a batch keeps its log-probabilities as π_old (the policy has not moved since it sampled) and
    computes those of the reference; later calls, the other inner updates, use both.
    """
    if settings.kl_in_loss and batch.ref_logprobs is None:
        assert reference is not None
        with torch.no_grad():
            batch.ref_logprobs = score(reference, batch, temperature)[0]
    logprobs, entropy = score(policy, batch, temperature)
    first = batch.old_logprobs is None
    if batch.old_logprobs is None:
        batch.old_logprobs = logprobs.detach()
    dtype = logprobs.dtype
    importance = None
    if settings.importance_cap:
        importance = (batch.old_logprobs - batch.sampling_logprobs).exp().clamp(max=settings.importance_cap).to(dtype)
    result = policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages.to(dtype),
        batch.weights.to(dtype),
        settings.clip_low,
        settings.clip_high,
        batch.ref_logprobs,
        settings.kl_coef if settings.kl_in_loss else 0.0,
        settings.kl_estimator,
        find_surrogate(settings.surrogate),
        batch.sequences if settings.ratio == "sequence" else None,
        importance,
    )
    used = batch.weights != 0
    tokens = float(used.sum())
    if not tokens:
        return result.loss
    metrics.mean("policy/ratio_mean", float(result.ratio[used].sum()), tokens)
    metrics.maximum("policy/ratio_max", float(result.ratio[used].max()))
    metrics.minimum("policy/ratio_min", float(result.ratio[used].min()))
    metrics.mean("policy/clipped_low", float(result.clipped_low[used].sum()), tokens)
    metrics.mean("policy/clipped_high", float(result.clipped_high[used].sum()), tokens)
    if settings.kl_in_loss:
        metrics.mean("policy/kl", float(result.kl[used].sum()), tokens)
    if first:
        metrics.mean("policy/entropy", float(entropy[used].sum()), tokens)
        drift = (batch.old_logprobs - batch.sampling_logprobs).abs()[used]
        metrics.mean("engine/logprob_difference_mean", float(drift.sum()), tokens)
        metrics.maximum("engine/logprob_difference_max", float(drift.max()))
        if importance is not None:
            metrics.mean("engine/importance_mean", float(importance[used].sum()), tokens)
            metrics.mean("engine/importance_capped", float((importance[used] == settings.importance_cap).sum()), tokens)
    return result.loss


def keep_logprobs(groups: Sequence[Group], batches: Sequence[Batch]) -> None:
    """Copy the per-token log-probabilities that were computed back to the groups, to be written down."""
    for batch in batches:
        start = 0
        for index, number, length in batch.members:
            stretch = slice(start, start + length)
            for kept, computed in (
                (groups[index].old_logprobs, batch.old_logprobs),
                (groups[index].ref_logprobs, batch.ref_logprobs),
            ):
                if computed is not None:
                    kept[number] = computed[stretch].tolist()
            start += length
