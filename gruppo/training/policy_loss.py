"""The loss of a micro-batch, and the log-probabilities that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import chain

import torch
from torch import Tensor

from gruppo.algorithms import aggregation
from gruppo.algorithms.losses import Surrogate, policy_loss
from gruppo.config.method_section import Method
from gruppo.config.sections import SURROGATES
from gruppo.errors import UsageError
from gruppo.models.packing import Batch, TokenWeights, score
from gruppo.models.policy import LanguageModel
from gruppo.models.ranks import ALONE, Ranks
from gruppo.types import Group
from gruppo.utils.imports import import_attribute
from gruppo.utils.metrics import Metrics

_AGGREGATIONS = {
    "sequence-mean": aggregation.sequence_mean_weights,
    "sequence-sum": aggregation.sequence_sum_weights,
    "group-token-mean": aggregation.group_token_mean_weights,
    "token-mean": aggregation.token_mean_weights,
    "constant": aggregation.constant_weights,
}


def token_weights(settings: Method, max_tokens: int) -> TokenWeights:
    """The token weights that implement a method's aggregation."""
    return partial(_AGGREGATIONS[settings.aggregation], max_tokens=max_tokens)


@cache
def find_surrogate(name: str) -> Surrogate:
    """The policy term with this name or import path.

    Raises UsageError if it cannot be imported, or if a trial on two tokens does not return two numbers.
    """
    surrogate: Surrogate = import_attribute(SURROGATES.get(name, name), "method.surrogate")
    trial = torch.zeros(2), torch.ones(2), torch.ones(2), 0.2, 0.2
    try:
        shape = surrogate(*trial).shape
    except Exception as error:  # the function may be user-defined
        raise UsageError(
            f'method.surrogate = "{name}": fails on a trial ({type(error).__name__}: {error}); write '
            "def surrogate(logprobs, ratio, advantages, clip_low, clip_high) -> one number per token"
        ) from error
    if shape != (2,):
        raise UsageError(
            f'method.surrogate = "{name}": returns shape {tuple(shape)} for 2 tokens; return one number per token'
        )
    return surrogate


@torch.no_grad()
def score_old(
    policy: LanguageModel,
    batches: Sequence[Batch],
    settings: Method,
    temperature: float,
    metrics: Metrics,
    fresh: bool = True,
) -> None:
    """Fill in π_old and the entropy of batches whose first update comes after the policy has changed."""
    for batch in batches:
        with policy.precision():
            batch.old_logprobs, batch.entropy = score(policy, batch, temperature)
        _describe_sampling(batch, settings, metrics, fresh)


@torch.no_grad()
def score_batches(
    policy: LanguageModel, reference: LanguageModel, batches: Sequence[Batch], temperature: float, metrics: Metrics
) -> None:
    """Fill in π_old and π_ref of batches before advantages are computed: for a KL in the reward."""
    for batch in batches:
        with policy.precision():
            batch.old_logprobs, batch.entropy = score(policy, batch, temperature)
            batch.ref_logprobs = score(reference, batch, temperature)[0]
        ratios = batch.old_logprobs - batch.ref_logprobs
        metrics.mean("policy/kl", _total(ratios, batch), len(batch.trained))


def batch_loss(
    policy: LanguageModel,
    reference: LanguageModel | None,
    batch: Batch,
    settings: Method,
    temperature: float,
    metrics: Metrics,
    fresh: bool = True,
) -> Tensor:
    """The micro-batch's part of the loss of an update. Call it inside `policy.precision()`.

    If the batch has no π_old yet, the policy has not changed in this step: the log-probabilities of this pass are
    π_old, and the batch keeps them for the following updates. It also keeps the entropy of its first pass.
    Log-probabilities of the reference are computed once per batch. `fresh`: see `is_fresh`.
    """
    if settings.kl_in_loss and batch.ref_logprobs is None:
        assert reference is not None
        with torch.no_grad():
            batch.ref_logprobs = score(reference, batch, temperature)[0]
    logprobs, entropy = score(policy, batch, temperature)
    dtype = logprobs.dtype
    if batch.old_logprobs is None:
        batch.old_logprobs = logprobs.detach()
    if batch.entropy is None:
        batch.entropy = entropy
        _describe_sampling(batch, settings, metrics, fresh)
    importance = _importance(batch, settings.tis_cap)
    result = policy_loss(
        logprobs,
        batch.old_logprobs.to(dtype),
        batch.advantages.to(dtype),
        batch.weights.to(dtype),
        settings.clip_low,
        settings.clip_high,
        batch.ref_logprobs,
        settings.kl_coef if settings.kl_in_loss else 0.0,
        settings.kl_estimator,
        find_surrogate(settings.surrogate),
        batch.sequences if settings.ratio == "sequence" else None,
        None if importance is None else importance.to(dtype),
        settings.kl_importance,
    )
    tokens = len(batch.trained)
    if not tokens:
        return result.loss
    ratios = result.ratio[batch.trained]
    metrics.mean("policy/ratio_mean", ratios.sum(), tokens)
    metrics.maximum("policy/ratio_max", ratios.max())
    metrics.minimum("policy/ratio_min", ratios.min())
    metrics.mean("policy/clipped_low", _total(result.clipped_low, batch), tokens)
    metrics.mean("policy/clipped_high", _total(result.clipped_high, batch), tokens)
    if settings.kl_in_loss:
        metrics.mean("policy/kl", _total(result.kl, batch), tokens)
    return result.loss


def _total(values: Tensor, batch: Batch) -> Tensor:
    """The sum over the batch's trained tokens."""
    return values[batch.trained].sum()


def is_fresh(groups: Sequence[Group], step: int) -> bool:
    """Whether a step's completions were sampled by the weights that the step begins with. Only then does the difference
    between the log-probabilities of engine and trainer measure rounding, and not learning."""
    return not any(completion.staleness(step) for group in groups for completion in group.completions)


def _describe_sampling(batch: Batch, settings: Method, metrics: Metrics, fresh: bool) -> None:
    """Metrics of the policy at the start of the step: its entropy, and how far the log-probabilities of the engine that
    sampled are from π_old."""
    tokens = len(batch.trained)
    if not tokens:
        return
    assert batch.entropy is not None
    assert batch.old_logprobs is not None
    metrics.mean("policy/entropy", _total(batch.entropy, batch), tokens)
    if settings.source == "policy" and batch.sampling_logprobs is not None:
        if fresh:
            drift = (batch.old_logprobs - batch.sampling_logprobs).abs()[batch.trained]
            metrics.mean("engine/logprob_difference_mean", drift.sum(), tokens)
            metrics.maximum("engine/logprob_difference_max", drift.max())
        importance = _importance(batch, settings.tis_cap)
        if importance is not None:
            metrics.mean("engine/importance_mean", _total(importance, batch), tokens)
            metrics.mean("engine/importance_capped", _total(importance == settings.tis_cap, batch), tokens)


def _importance(batch: Batch, cap: float | None) -> Tensor | None:
    """min(π_old / π_sampling, cap) of every token. None, which stands for 1, without a cap or if π_sampling is not
    known."""
    if not cap or batch.sampling_logprobs is None:
        return None
    assert batch.old_logprobs is not None
    return (batch.old_logprobs - batch.sampling_logprobs).exp().clamp(max=cap)


def keep_logprobs(groups: Sequence[Group], batches: Sequence[Batch], ranks: Ranks = ALONE) -> None:
    """Copy the computed per-token log-probabilities and entropies from the batches of all ranks back to the groups, to
    be recorded."""
    for computed in ranks.gather([kept for batch in batches for kept in _computed(batch)]):
        for index, number, name, values in computed:
            getattr(groups[index], name)[number] = values


def _computed(batch: Batch) -> Iterator[tuple[int, int, str, list[float]]]:
    """Group index, completion index, and the name and values of what was computed for the completion's tokens."""
    for name in ("old_logprobs", "ref_logprobs", "entropy"):
        computed: Tensor | None = getattr(batch, name)
        if computed is None:
            continue
        values, start = computed.tolist(), 0
        for index, number, length in batch.members:
            yield index, number, name, values[start : start + length]
            start += length


def put_logprobs(groups: Sequence[Group], batches: Sequence[Batch], dtype: torch.dtype) -> None:
    """Fill the batches with the log-probabilities and entropies that `keep_logprobs` copied to their groups."""
    for batch in batches:
        for name in ("old_logprobs", "ref_logprobs", "entropy"):
            kept = [getattr(groups[index], name)[number] for index, number, _ in batch.members]
            if all(logprobs is not None for logprobs in kept):
                values = list(chain(*kept))
                setattr(batch, name, torch.tensor(values, dtype=dtype, device=batch.targets.device))
