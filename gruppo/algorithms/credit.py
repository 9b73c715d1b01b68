"""What a method makes of scored groups: who is trained on, advantages, and the loss of a micro-batch.

The recipe's [method] says which; see `methods.py` for the table of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import chain

import torch
from torch import Tensor

from gruppo.algorithms import losses
from gruppo.algorithms.advantages import advantages, gae, indicators, process_advantages, returns_to_go
from gruppo.algorithms.losses import Surrogate, pair_loss, policy_loss
from gruppo.config.recipe import SURROGATES, Critic, Method
from gruppo.errors import UsageError
from gruppo.models.policy import LanguageModel
from gruppo.training.packing import Batch, TokenWeights, score
from gruppo.types import Group, Metrics, Steps
from gruppo.utils.imports import import_attribute

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


def select(groups: Sequence[Group], settings: Method) -> None:
    """Take out of the objective, after `mark_trained`, what the method does not learn from: repetitions (`distinct`),
    right completions beyond `most_per_prompt`, and with credit "pair" whatever has no partner.

    A completion that goes is treated as if it had not been sampled.
    """
    for group in groups:
        used = [number for number, trained in enumerate(group.trained) if trained]
        if settings.distinct:
            texts = [group.completions[number].text for number in used]
            used = [number for place, number in enumerate(used) if texts[place] not in texts[:place]]
        right = [number for number in used if _reward(group, number) > settings.right]
        wrong = [number for number in used if number not in set(right)]
        most = settings.most_per_prompt or len(used)
        if settings.credit == "pair":
            most = min(most, len(right), len(wrong))
            wrong = wrong[:most]
        kept = {*right[:most], *wrong}
        if any(group.trained) and not kept:
            group.skipped = "no pair: it has no right completion, or no wrong one"
        group.trained = [number in kept for number in range(len(group.trained))]


def assign_advantages(
    groups: Sequence[Group],
    settings: Method,
    metrics: Metrics,
    step_weights: Mapping[str, float] | None = None,
    critic: Critic | None = None,
) -> None:
    """Fill in `advantages`, and `skipped` where they are all 0, after `mark_trained` and `select`.

    A completion that is not trained on leaves every mean and standard deviation. Where the KL stands in the reward
    (k1), and for pairs, `old_logprobs` and `ref_logprobs` of trained completions must be there. `step_weights`: those
    of reward functions that judge steps, by name; 1 where there is none. `critic`: that table of the recipe, where
    credit is "value"; then `values` must be there, and `returns` are filled in.
    """
    if settings.credit == "pair":
        _pair_advantages(groups, settings, metrics)
        return
    places = [(group, number) for group in groups for number, used in enumerate(group.trained) if used]
    if settings.credit == "token":
        made = _token_advantages(places, settings)
    elif settings.credit == "value":
        assert critic is not None
        made = _value_advantages(groups, places, settings, critic)
    else:
        made = _completion_advantages(groups, settings)
    for (group, number), values in zip(places, made, strict=True):
        group.advantages[number] = values
    if settings.credit == "step":
        for group in groups:
            _add_step_advantages(group, step_weights)
    for group in groups:
        if any(group.trained) and not group.has_signal:
            group.skipped = f"all advantages are 0: {_why_no_signal(group, settings)}"


def _why_no_signal(group: Group, settings: Method) -> str:
    if settings.baseline == "indicator":
        return "no completion is right"
    return "one completion" if sum(group.trained) == 1 else "every trained completion has the same reward"


def _completion_advantages(groups: Sequence[Group], settings: Method) -> list[list[float]]:
    """One advantage a completion, the same for all of its tokens; one that has nobody to be compared with has 0."""
    rewards = []
    for group in groups:
        used = [number for number, trained in enumerate(group.trained) if trained]
        known = [_reward(group, number) - float(_penalties(group, number, settings).sum()) for number in used]
        rewards.append(torch.tensor(known, dtype=torch.float64))
    alone = 2 if settings.baseline == "leave-one-out" else 1
    compared = [each for each in rewards if len(each) >= alone]
    if settings.baseline == "indicator":
        made = iter([indicators(each, settings.right) for each in compared])
    else:
        made = iter(advantages(compared, settings.baseline, settings.scale))
    values = [next(made) if len(each) >= alone else torch.zeros_like(each) for each in rewards]
    masks = [
        completion.mask
        for group in groups
        for completion, used in zip(group.completions, group.trained, strict=True)
        if used
    ]
    return [
        [value if sampled else 0.0 for sampled in mask]
        for value, mask in zip(chain(*(each.tolist() for each in values)), masks, strict=True)
    ]


def _add_step_advantages(group: Group, weights: Mapping[str, float] | None) -> None:
    """Process supervision (§4.1.3) added to what the outcome rewards gave: each function's step rewards normalised over
    the group, apart from the outcome's and from each other's, times its weight."""
    used = [number for number, trained in enumerate(group.trained) if trained]
    lengths = [len(group.completions[number].token_ids) for number in used]
    for name in sorted({name for number in used for name in group.rewards[number].steps}):
        steps = [group.rewards[number].steps.get(name, Steps((), ())) for number in used]
        given = [(torch.tensor(each.rewards, dtype=torch.float64), each.ends) for each in steps]
        weight = (weights or {}).get(name, 1.0)
        for number, added in zip(used, process_advantages([given], [lengths])[0], strict=True):
            held, mask = group.advantages[number], group.completions[number].mask
            group.advantages[number] = [
                before + weight * more if sampled else 0.0
                for before, more, sampled in zip(held, added.tolist(), mask, strict=True)
            ]


def _pair_advantages(groups: Sequence[Group], settings: Method, metrics: Metrics) -> None:
    """The coefficients of DPO, each group's right completions paired with its wrong ones in order.

    Each stands in one pair, so that half of a group's trained completions are its pairs: the 2 makes the weights of
    completions those of pairs. `sequence-mean` averages both Δ and, by the weights of tokens, the coefficient.
    """
    mean = settings.aggregation == "sequence-mean"
    for group in groups:
        used = [number for number, trained in enumerate(group.trained) if trained]
        sides = [number for number in used if _reward(group, number) > settings.right]
        pairs = list(zip(sides, [number for number in used if number not in set(sides)], strict=True))
        if not pairs:
            continue
        ratios = {number: _log_ratio(group, number, mean) for number in used}
        chosen, rejected = (torch.stack([ratios[pair[side]] for pair in pairs]) for side in (0, 1))
        made = pair_loss(chosen, rejected, settings.pair_beta)
        for (right, wrong), coefficient in zip(pairs, made.coefficient.tolist(), strict=True):
            for number, sign in ((right, 2), (wrong, -2)):
                mask = group.completions[number].mask
                group.advantages[number] = [sign * coefficient if sampled else 0.0 for sampled in mask]
        metrics.mean("pair/loss", float(made.loss.sum()), len(pairs))
        metrics.mean("pair/margin", float((chosen - rejected).sum()), len(pairs))
        metrics.mean("pair/accuracy", int((chosen > rejected).sum()), len(pairs))


def _log_ratio(group: Group, number: int, mean: bool) -> Tensor:
    """Δ of a completion: log π_θ - log π_ref over its sampled tokens, averaged or summed."""
    old, ref = group.old_logprobs[number], group.ref_logprobs[number]
    assert old is not None
    assert ref is not None
    mask = torch.tensor(group.completions[number].mask)
    ratios = (torch.tensor(old, dtype=torch.float64) - torch.tensor(ref, dtype=torch.float64))[mask]
    return ratios.sum() / max(1, len(ratios)) if mean else ratios.sum()


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


def _value_advantages(
    groups: Sequence[Group], places: Sequence[tuple[Group, int]], settings: Method, critic: Critic
) -> list[list[float]]:
    """Generalised advantage estimation over the sampled tokens of each completion: its reward on the last one, the KL
    penalty on each; then what `baseline` and `scale` say, over the step."""
    for group in groups:
        group.returns = [None] * len(group.completions)
    masks, estimates = [], []
    for group, number in places:
        mask, values = torch.tensor(group.completions[number].mask, dtype=torch.bool), group.values[number]
        rewards = -_penalties(group, number, settings)[mask]
        if not len(rewards):
            group.returns[number] = [0.0] * len(mask)
            masks.append(mask)
            estimates.append(rewards)
            continue
        assert values is not None
        rewards[-1] += _reward(group, number)
        states = torch.tensor(values, dtype=torch.float64)
        made = gae(rewards, torch.cat([states[:-1][mask], states[-1:]]), critic.gamma, critic.gae_lambda)
        returns = torch.zeros(len(mask), dtype=torch.float64).masked_scatter(mask, made.returns)
        group.returns[number] = returns.tolist()
        masks.append(mask)
        estimates.append(made.advantages)
    if not estimates:
        return []
    scaled = advantages([torch.cat(estimates)], settings.baseline, settings.scale)[0]
    parts = scaled.split([len(each) for each in estimates])
    return [
        torch.zeros(len(mask), dtype=torch.float64).masked_scatter(mask, own).tolist()
        for mask, own in zip(masks, parts, strict=True)
    ]


def _reward(group: Group, number: int) -> float:
    total = group.rewards[number].total
    assert total is not None
    return total


def _penalties(group: Group, number: int, settings: Method) -> Tensor:
    """β log(π_old/π_ref) of each token of a completion, 0 where it was not sampled and without a KL in the reward."""
    old, ref = group.old_logprobs[number], group.ref_logprobs[number]
    mask = torch.tensor(group.completions[number].mask, dtype=torch.bool)
    if not settings.kl_in_reward:
        return torch.zeros(len(mask), dtype=torch.float64)
    assert old is not None
    assert ref is not None
    apart = torch.tensor(old, dtype=torch.float64) - torch.tensor(ref, dtype=torch.float64)
    return settings.kl_coef * torch.where(mask, apart, 0.0)


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
    if first and settings.source == "live":
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


def put_logprobs(groups: Sequence[Group], batches: Sequence[Batch], dtype: torch.dtype) -> None:
    """The other way: fill in batches with the log-probabilities that `keep_logprobs` copied to their groups."""
    for batch in batches:
        for name in ("old_logprobs", "ref_logprobs"):
            kept = [getattr(groups[index], name)[number] for index, number, _ in batch.members]
            if all(each is not None for each in kept):
                values = list(chain(*kept))
                setattr(batch, name, torch.tensor(values, dtype=dtype, device=batch.targets.device))
