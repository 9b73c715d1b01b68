"""The table of methods, and what a method makes of scored groups: advantages and a loss.

A method is data source × reward × per-token signal × loss (DeepSeekMath §5.2.1); the loop is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gruppo import config
from gruppo.maths.advantages import masked_group_advantages
from gruppo.maths.losses import policy_loss
from gruppo.models import LanguageModel
from gruppo.packing import Batch, score
from gruppo.types import Group, Metrics


def assign_advantages(groups: Sequence[Group], mask_truncated: bool) -> None:
    """Fill in `trained`, `advantages` and `skipped` of every group.

    A completion whose reward is unknown, or that was cut while `mask_truncated`, is not trained on and leaves the
    group's mean and standard deviation.
    """
    for group in groups:
        pairs = list(zip(group.completions, group.rewards, strict=True))
        group.trained = [r.total is not None and not (mask_truncated and c.finish_reason == "length") for c, r in pairs]
        known = [r.total if used else None for (_, r), used in zip(pairs, group.trained, strict=True)]
        values = masked_group_advantages(known)
        group.advantages = [[value] * len(c.token_ids) for value, c in zip(values, group.completions, strict=True)]
        group.old_logprobs = [None] * len(pairs)
        group.ref_logprobs = [None] * len(pairs)
        if not any(group.trained):
            group.skipped = "no completion is trained on: every reward abstained, or every completion was cut"
        elif not group.has_signal:
            group.skipped = "all advantages are 0: " + (
                "one completion" if sum(group.trained) == 1 else "every trained completion has the same reward"
            )


def batch_loss(
    policy: LanguageModel,
    reference: LanguageModel | None,
    batch: Batch,
    settings: config.Method,
    temperature: float,
    metrics: Metrics,
) -> Tensor:
    """The micro-batch's part of the step's loss. Call it inside `policy.precision()`.

    The first call on a batch keeps its log-probabilities as π_old (the policy has not moved since it sampled) and
    computes those of the reference; later calls, the other inner updates, use both.
    """
    if settings.kl_coef and batch.ref_logprobs is None:
        assert reference is not None
        with torch.no_grad():
            batch.ref_logprobs = score(reference, batch, temperature)[0]
    logprobs, entropy = score(policy, batch, temperature)
    first = batch.old_logprobs is None
    if batch.old_logprobs is None:
        batch.old_logprobs = logprobs.detach()
    dtype = logprobs.dtype
    result = policy_loss(
        logprobs,
        batch.old_logprobs,
        batch.advantages.to(dtype),
        batch.weights.to(dtype),
        settings.clip_low,
        settings.clip_high,
        batch.ref_logprobs,
        settings.kl_coef,
        settings.kl_estimator,
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
    if settings.kl_coef:
        metrics.mean("policy/kl", float(result.kl[used].sum()), tokens)
    if first:
        metrics.mean("policy/entropy", float(entropy[used].sum()), tokens)
        drift = (batch.old_logprobs - batch.sampling_logprobs).abs()[used]
        metrics.mean("engine/logprob_difference_mean", float(drift.sum()), tokens)
        metrics.maximum("engine/logprob_difference_max", float(drift.max()))
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
