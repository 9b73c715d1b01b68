"""Who gets which advantage: credit for completions, steps, tokens, pairs and values."""

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
        if any(group.trained) and not group.has_nonzero_advantage:
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
        known = [total_reward(group, number) - float(_penalties(group, number, settings).sum()) for number in used]
        rewards.append(torch.tensor(known, dtype=torch.float64))
    alone = 2 if settings.baseline == "leave-one-out" else 1
    compared = [each for each in rewards if len(each) >= alone]
    if settings.baseline == "indicator":
        made = iter([indicators(each, settings.success_threshold) for each in compared])
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
        sides = [number for number in used if total_reward(group, number) > settings.success_threshold]
        pairs = list(zip(sides, [number for number in used if number not in set(sides)], strict=True))
        if not pairs:
            continue
        ratios = {number: _log_ratio(group, number, mean) for number in used}
        chosen, rejected = (torch.stack([ratios[pair[side]] for pair in pairs]) for side in (0, 1))
        made = dpo_loss(chosen, rejected, settings.dpo_beta)
        for (right, wrong), coefficient in zip(pairs, made.coefficient.tolist(), strict=True):
            for number, sign in ((right, 2), (wrong, -2)):
                mask = group.completions[number].mask
                group.advantages[number] = [sign * coefficient if sampled else 0.0 for sampled in mask]
        metrics.mean("dpo/loss", float(made.loss.sum()), len(pairs))
        metrics.mean("dpo/margin", float((chosen - rejected).sum()), len(pairs))
        metrics.mean("dpo/accuracy", int((chosen > rejected).sum()), len(pairs))


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
    returns = [
        returns_to_go(total_reward(group, number), _penalties(group, number, settings)) for group, number in places
    ]
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
        rewards[-1] += total_reward(group, number)
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


def total_reward(group: Group, number: int) -> float:
    """The reward of a trained completion."""
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
