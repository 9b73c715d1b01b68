"""Advantage granularity: advantages per completion, step, token or pair, or from a value model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from gruppo.algorithms.advantages import advantages, gae, indicators, process_advantages, returns_to_go
from gruppo.algorithms.losses import dpo_loss
from gruppo.config.method_section import Critic, Method
from gruppo.types import Group, Steps
from gruppo.utils.metrics import Metrics


def assign_advantages(
    groups: Sequence[Group],
    settings: Method,
    metrics: Metrics,
    step_weights: Mapping[str, float] | None = None,
    critic: Critic | None = None,
) -> None:
    """Fill in `advantages` of all groups, and `skipped` of groups whose advantages are all 0.

    Call this after `mark_trained` and `select`. Completions that are not trained on count in no mean or standard
    deviation. If the KL is part of the reward (k1), and for pairs (DPO), `old_logprobs` and `ref_logprobs` of the
    trained completions must be set.

    `step_weights`: the weights of the reward functions that score steps, by name; 1 if not listed. `critic`: the table
    [critic] of the recipe, required for credit "value". In this case `values` must be set, and `returns` is filled in.
    """
    if settings.credit == "pair":
        _pair_advantages(groups, settings, metrics)
        return
    trained = [(group, index) for group in groups for index, used in enumerate(group.trained) if used]
    if settings.credit == "token":
        rows = _token_advantages(trained, settings)
    elif settings.credit == "value":
        assert critic is not None
        rows = _value_advantages(groups, trained, settings, critic)
    else:
        rows = _completion_advantages(groups, settings)
    for (group, index), row in zip(trained, rows, strict=True):
        group.advantages[index] = row
    if settings.credit == "step":
        for group in groups:
            _add_step_advantages(group, step_weights, settings.advantage_epsilon)
    for group in groups:
        if any(group.trained) and not group.has_nonzero_advantage:
            group.skipped = f"all advantages are 0: {_why_all_zero(group, settings)}"


def _why_all_zero(group: Group, settings: Method) -> str:
    if settings.baseline == "indicator":
        return "no completion is correct"
    return "only one trained completion" if sum(group.trained) == 1 else "every trained completion has the same reward"


def _completion_advantages(groups: Sequence[Group], settings: Method) -> list[list[float]]:
    """One advantage per completion, the same for all of its tokens; 0 if the group has no other to compare with."""
    rewards = []
    for group in groups:
        used = [index for index, trained in enumerate(group.trained) if trained]
        totals = [total_reward(group, index) - float(_penalties(group, index, settings).sum()) for index in used]
        rewards.append(torch.tensor(totals, dtype=torch.float64))
    smallest = 2 if settings.baseline == "leave-one-out" else 1
    compared = [row for row in rewards if len(row) >= smallest]
    if settings.baseline == "indicator":
        results = iter([indicators(row, settings.success_threshold) for row in compared])
    else:
        results = iter(advantages(compared, settings.baseline, settings.scale, settings.advantage_epsilon))
    values = [next(results) if len(row) >= smallest else torch.zeros_like(row) for row in rewards]
    masks = [
        completion.mask
        for group in groups
        for completion, used in zip(group.completions, group.trained, strict=True)
        if used
    ]
    return [
        [value if sampled else 0.0 for sampled in mask]
        for value, mask in zip(chain(*(row.tolist() for row in values)), masks, strict=True)
    ]


def _add_step_advantages(group: Group, weights: Mapping[str, float] | None, epsilon: float) -> None:
    """Process supervision (DeepSeekMath §4.1.3): add step advantages to the advantages of the outcome rewards.

    The step rewards of each reward function are normalized over the group separately from the outcome rewards and from
    other functions, then multiplied by the weight of the function.
    """
    used = [index for index, trained in enumerate(group.trained) if trained]
    lengths = [len(group.completions[index].token_ids) for index in used]
    for name in sorted({name for index in used for name in group.rewards[index].steps}):
        steps = [group.rewards[index].steps.get(name, Steps((), ())) for index in used]
        scored = [(torch.tensor(step.rewards, dtype=torch.float64), step.ends) for step in steps]
        weight = (weights or {}).get(name, 1.0)
        for index, added in zip(used, process_advantages([scored], [lengths], epsilon)[0], strict=True):
            outcome, mask = group.advantages[index], group.completions[index].mask
            group.advantages[index] = [
                before + weight * more if sampled else 0.0
                for before, more, sampled in zip(outcome, added.tolist(), mask, strict=True)
            ]


def _pair_advantages(groups: Sequence[Group], settings: Method, metrics: Metrics) -> None:
    """DPO coefficients as advantages: the correct completions of each group are paired with its wrong ones, in order.

    Each trained completion is in exactly one pair, so a group has half as many pairs as trained completions. The factor
    2 turns weights per completion into weights per pair. With aggregation "sequence-mean", Δ is averaged over tokens,
    and so is the coefficient, through the token weights.
    """
    mean = settings.aggregation == "sequence-mean"
    for group in groups:
        used = [index for index, trained in enumerate(group.trained) if trained]
        correct = [index for index in used if total_reward(group, index) > settings.success_threshold]
        pairs = list(zip(correct, [index for index in used if index not in set(correct)], strict=True))
        if not pairs:
            continue
        ratios = {index: _log_ratio(group, index, mean) for index in used}
        chosen, rejected = (torch.stack([ratios[pair[side]] for pair in pairs]) for side in (0, 1))
        result = dpo_loss(chosen, rejected, settings.dpo_beta)
        for (better, worse), coefficient in zip(pairs, result.coefficient.tolist(), strict=True):
            for index, sign in ((better, 2), (worse, -2)):
                mask = group.completions[index].mask
                group.advantages[index] = [sign * coefficient if sampled else 0.0 for sampled in mask]
        metrics.mean("dpo/loss", float(result.loss.sum()), len(pairs))
        metrics.mean("dpo/margin", float((chosen - rejected).sum()), len(pairs))
        metrics.mean("dpo/accuracy", int((chosen > rejected).sum()), len(pairs))


def _log_ratio(group: Group, index: int, mean: bool) -> Tensor:
    """Δ of a completion in nats: log π_old - log π_ref, summed over its sampled tokens, or averaged with `mean`."""
    old, ref = group.old_logprobs[index], group.ref_logprobs[index]
    assert old is not None
    assert ref is not None
    mask = torch.tensor(group.completions[index].mask)
    ratios = (torch.tensor(old, dtype=torch.float64) - torch.tensor(ref, dtype=torch.float64))[mask]
    return ratios.sum() / max(1, len(ratios)) if mean else ratios.sum()


def _token_advantages(trained: Sequence[tuple[Group, int]], settings: Method) -> list[list[float]]:
    """One advantage per token: its return-to-go, normalized over all sampled tokens of the step."""
    masks = [torch.tensor(group.completions[index].mask) for group, index in trained]
    returns = [
        returns_to_go(total_reward(group, index), _penalties(group, index, settings)) for group, index in trained
    ]
    sampled = [row[mask] for row, mask in zip(returns, masks, strict=True)]
    scaled = _normalized(sampled, settings) if sampled else torch.zeros(0)
    rows = []
    for mask, part in zip(masks, scaled.split([len(row) for row in sampled]), strict=True):
        rows.append(torch.zeros(len(mask), dtype=part.dtype).masked_scatter(mask, part).tolist())
    return rows


def _value_advantages(
    groups: Sequence[Group], trained: Sequence[tuple[Group, int]], settings: Method, critic: Critic
) -> list[list[float]]:
    """Generalized advantage estimation over the sampled tokens of each completion, then `baseline` and `scale` over the
    step. The reward is on the last sampled token, and the KL penalty on every sampled token."""
    for group in groups:
        group.returns = [None] * len(group.completions)
    masks, estimates = [], []
    for group, index in trained:
        mask, values = torch.tensor(group.completions[index].mask, dtype=torch.bool), group.values[index]
        rewards = -_penalties(group, index, settings)[mask]
        if not len(rewards):
            group.returns[index] = [0.0] * len(mask)
            masks.append(mask)
            estimates.append(rewards)
            continue
        assert values is not None
        rewards[-1] += total_reward(group, index)
        states = torch.tensor(values, dtype=torch.float64)
        estimate = gae(rewards, torch.cat([states[:-1][mask], states[-1:]]), critic.gamma, critic.gae_lambda)
        returns = torch.zeros(len(mask), dtype=torch.float64).masked_scatter(mask, estimate.returns)
        group.returns[index] = returns.tolist()
        masks.append(mask)
        estimates.append(estimate.advantages)
    if not estimates:
        return []
    scaled = _normalized(estimates, settings)
    parts = scaled.split([len(row) for row in estimates])
    return [
        torch.zeros(len(mask), dtype=torch.float64).masked_scatter(mask, part).tolist()
        for mask, part in zip(masks, parts, strict=True)
    ]


def _normalized(rows: Sequence[Tensor], settings: Method) -> Tensor:
    """Advantages over the values of all rows together."""
    return advantages([torch.cat(list(rows))], settings.baseline, settings.scale, settings.advantage_epsilon)[0]


def total_reward(group: Group, index: int) -> float:
    """The total reward of a trained completion."""
    total = group.rewards[index].total
    assert total is not None
    return total


def _penalties(group: Group, index: int, settings: Method) -> Tensor:
    """β log(π_old/π_ref) per token of a completion; 0 for tokens that were not sampled.

    All 0 if the KL is not part of the reward.
    """
    old, ref = group.old_logprobs[index], group.ref_logprobs[index]
    mask = torch.tensor(group.completions[index].mask, dtype=torch.bool)
    if not settings.kl_in_reward:
        return torch.zeros(len(mask), dtype=torch.float64)
    assert old is not None
    assert ref is not None
    difference = torch.tensor(old, dtype=torch.float64) - torch.tensor(ref, dtype=torch.float64)
    return settings.kl_coef * torch.where(mask, difference, 0.0)
