"""Every method: its paper's loss in plain loops, and the gradient coefficient.

The loops know nothing of baselines, advantage scaling, surrogates and aggregations; the code knows nothing of method
names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch

from gruppo.algorithms import aggregation, losses
from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained, select
from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.method_section import Critic, Method
from gruppo.config.methods import METHODS
from gruppo.errors import UsageError
from gruppo.models.packing import pack
from gruppo.models.policy import LanguageModel
from gruppo.training.policy_loss import batch_loss, find_surrogate, keep_logprobs, score_batches, token_weights
from gruppo.types import Group, Reward, Steps
from gruppo.utils.metrics import Metrics
from tests.conftest import make_group, make_policy, random_groups
from tests.training.test_invariance import distance, rows_logprobs

TEMPERATURE, MAX_TOKENS, EPSILON = 0.8, 12, 1e-6
Rows = list[list[torch.Tensor]]  # by group and completion, one value per token
Loss = Callable[[list[list[float]], Rows, Rows, Rows], torch.Tensor]


def normalized(rewards: list[float]) -> list[float]:
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (std + EPSILON) for reward in rewards]


def sft(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath Eq. 6: the mean of log π over each completion; all completions are correct."""
    return online_rft([[1.0] * len(group) for group in rewards], new, old, ref)


def online_rft(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath Eq. 11, and 8 for RFT: as SFT on the correct completions, divided by the number sampled."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        for i, reward in enumerate(group):
            if reward > 0.5:
                total += new[q][i].sum() / (len(rewards) * len(group) * len(new[q][i]))
    return -total


def dpo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath Eq. 12: Δ is averaged over the completion. Pairs are the first correct and the first wrong
    completion of a question, the second of both, and so on."""
    losses = []
    for q, group in enumerate(rewards):
        delta = [(new[q][i] - ref[q][i]).sum() / len(new[q][i]) for i in range(len(group))]
        correct, wrong = ([i for i, r in enumerate(group) if (r > 0.5) == side] for side in (True, False))
        pairs = [-torch.log(torch.sigmoid(0.1 * (delta[i] - delta[j]))) for i, j in zip(correct, wrong, strict=False)]
        losses += [sum(pairs) / len(pairs)] if pairs else []
    return sum(losses) / len(losses)  # type: ignore[return-value]


def grpo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath Eq. 3 and 4."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        for i, advantage in enumerate(normalized(group)):
            for t in range(len(new[q][i])):
                ratio = torch.exp(new[q][i][t] - old[q][i][t])
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                log = ref[q][i][t] - new[q][i][t]
                total += (gain - 0.04 * (log.exp() - log - 1)) / (len(rewards) * len(group) * len(new[q][i]))
    return -total


def steps_of(reward: float, length: int) -> Steps:
    """Two steps, or one if the completion has a single token; the last ends one token early if possible."""
    return Steps((reward, -reward / 2), (0, max(1, length - 2))) if length > 1 else Steps((reward,), (0,))


def grpo_process(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath §4.1.3: step rewards normalized per group; a token gets the sum over steps ending at t or later."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        steps = [steps_of(reward, len(new[q][i])) for i, reward in enumerate(group)]
        normal = iter(normalized([reward for labels in steps for reward in labels.rewards]))
        for i, labels in enumerate(steps):
            ended = [(next(normal), end) for end in labels.ends]
            for t in range(len(new[q][i])):
                advantage = sum(value for value, end in ended if end >= t)
                ratio = torch.exp(new[q][i][t] - old[q][i][t])
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                log = ref[q][i][t] - new[q][i][t]
                total += (gain - 0.04 * (log.exp() - log - 1)) / (len(rewards) * len(group) * len(new[q][i]))
    return -total


def values_of(reward: float, length: int) -> list[float]:
    """Values of a finished completion (EOS), one more than tokens."""
    return [0.1 * place - 0.3 * reward for place in range(length)] + [0.0]


def ppo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """DeepSeekMath Eq. 1 and 2: the reward at the last token, -β log(π_old/π_ref) at every token; GAE, λ = 0.95."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        for i, reward in enumerate(group):
            length = len(new[q][i])
            values = values_of(reward, length)
            token_rewards = [-0.04 * float(old[q][i][t] - ref[q][i][t]) for t in range(length)]
            token_rewards[-1] += reward
            for t in range(length):
                advantage = sum(
                    0.95 ** (s - t) * (token_rewards[s] + values[s + 1] - values[s]) for s in range(t, length)
                )
                ratio = torch.exp(new[q][i][t] - old[q][i][t])
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                total += gain / (len(rewards) * len(group) * length)
    return -total


def dr_grpo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2503.20783: no division by the std, a constant in place of the length."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        for i, reward in enumerate(group):
            advantage = reward - statistics.mean(group)
            for t in range(len(new[q][i])):
                ratio = torch.exp(new[q][i][t] - old[q][i][t])
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                total += gain / (len(rewards) * len(group) * MAX_TOKENS)
    return -total


def dapo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2503.14476 Eq. 8: the mean over all tokens of a group, clip-higher."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        tokens = sum(len(row) for row in new[q])
        for i, advantage in enumerate(normalized(group)):
            for t in range(len(new[q][i])):
                ratio = torch.exp(new[q][i][t] - old[q][i][t])
                total += torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage) / (len(rewards) * tokens)
    return -total


def gspo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2507.18071 Eq. 5 and 7: the length-normalized sequence ratio."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        for i, advantage in enumerate(normalized(group)):
            ratio = ((new[q][i].sum() - old[q][i].sum()).exp()) ** (1 / len(new[q][i]))
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
            total += gain / (len(rewards) * len(group))
    return -total


def cispo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2506.13585 Eq. 4 and 5, without a lower bound; the upper bound is 5."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        tokens = sum(len(row) for row in new[q])
        for i, advantage in enumerate(normalized(group)):
            for t in range(len(new[q][i])):
                weight = min(5.0, math.exp(float(new[q][i][t].detach() - old[q][i][t])))
                total += weight * advantage * new[q][i][t] / (len(rewards) * tokens)
    return -total


def rloo(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2402.14740: the mean of the other completions as baseline, log π of the whole sequence, the KL in the reward."""
    total = torch.zeros((), dtype=torch.float64)
    for q, group in enumerate(rewards):
        full = [r - 0.05 * float((old[q][i] - ref[q][i]).sum()) for i, r in enumerate(group)]
        for i, reward in enumerate(full):
            others = [r for j, r in enumerate(full) if j != i]
            total += (reward - statistics.mean(others)) * new[q][i].sum() / (len(rewards) * len(group))
    return -total


def reinforce_pp(rewards: list[list[float]], new: Rows, old: Rows, ref: Rows) -> torch.Tensor:
    """2501.03262: A_t = r - β Σ_{s ≥ t} KL_s, normalized over the batch; clipped; the mean over the batch's tokens."""
    tokens = []
    for q, group in enumerate(rewards):
        for i, reward in enumerate(group):
            for t in range(len(new[q][i])):
                kl = sum(float(old[q][i][s] - ref[q][i][s]) for s in range(t, len(new[q][i])))
                tokens.append((reward - 0.01 * kl, new[q][i][t], old[q][i][t]))
    total = torch.zeros((), dtype=torch.float64)
    for advantage, (_, here, before) in zip(normalized([token[0] for token in tokens]), tokens, strict=True):
        ratio = torch.exp(here - before)
        total += torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) / len(tokens)
    return -total


PAPERS: dict[str, Loss] = {
    "grpo": grpo, "dr-grpo": dr_grpo, "dapo": dapo, "gspo": gspo, "cispo": cispo, "rloo": rloo,
    "reinforce-pp": reinforce_pp, "sft": sft, "rft": online_rft, "online-rft": online_rft, "dpo": dpo,
    "grpo-process": grpo_process, "ppo": ppo,
}  # fmt: skip


def test_every_method_is_tested() -> None:
    assert set(PAPERS) == set(METHODS)


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel, LanguageModel]:
    """The policy, the policy that sampled, and the reference."""
    policy, sampled = make_policy(torch.float64), make_policy(torch.float64)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
    policy.generation.advance()
    return policy, sampled, make_policy(torch.float64, seed=1)


def rows_of(model: LanguageModel, groups: list[Group]) -> Rows:
    return [
        rows_logprobs(model.model, [(list(g.prompt.token_ids), list(c.token_ids)) for c in g.completions], "none")
        for g in groups
    ]


def computed(
    settings: Method, models: tuple[LanguageModel, LanguageModel, LanguageModel], groups: list[Group], budget: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """As in the training loop: scored by the policy that sampled, then an update of the current policy."""
    policy, sampled, reference = models
    weights = token_weights(settings, MAX_TOKENS)
    mark_trained(groups, settings.mask_truncated)
    select(groups, settings)
    if settings.needs_scores:
        before = pack(groups, weights, budget, with_kl=True)
        score_batches(sampled, reference, before, TEMPERATURE, Metrics())
        keep_logprobs(groups, before)
    for group in groups:
        sizes = [len(completion.token_ids) for completion in group.completions]
        totals = [float(reward.total or 0) for reward in group.rewards]
        group.values = [values_of(total, size) for total, size in zip(totals, sizes, strict=True)]
    assign_advantages(groups, settings, Metrics(), critic=Critic())
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in pack(groups, weights, budget, with_kl=settings.kl_in_loss):
        with torch.no_grad():
            batch_loss(sampled, reference, batch, settings, TEMPERATURE, Metrics())
        loss = batch_loss(policy, reference, batch, settings, TEMPERATURE, Metrics())
        loss.backward()
        total += float(loss.detach())
    return total, {
        name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("moved", [False, True], ids=["on policy", "after an inner update"])
@pytest.mark.parametrize("budget", [10**9, 30], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_equal_the_paper(
    name: str, budget: int, moved: bool, models: tuple[LanguageModel, LanguageModel, LanguageModel]
) -> None:
    if moved and name == "dpo":
        pytest.skip("one update per step: the coefficient comes from the policy being updated")
    policy, sampled, reference = models if moved else (models[0], models[0], models[2])
    groups = random_groups(groups=3, size=4)
    rewards = [[float(reward.total or 0) for reward in group.rewards] for group in groups]
    for group in groups:
        if name == "sft":
            group.rewards = [Reward(1.0, {})] * len(group.rewards)
        if name == "grpo-process":
            pairs = list(zip(group.rewards, group.completions, strict=True))
            steps = [steps_of(float(reward.total or 0), len(completion.token_ids)) for reward, completion in pairs]
            group.rewards = [Reward(0.0, {}, steps={"judge": labels}) for labels in steps]
    policy.model.zero_grad(set_to_none=True)
    with torch.no_grad():
        old, ref = rows_of(sampled, groups), rows_of(reference, groups)
    new = rows_of(policy, groups)
    if not moved:
        old = [[row.detach() for row in group] for group in new]
    expected = PAPERS[name](rewards, new, old, ref)
    expected.backward()
    gradient = {key: weight.grad.clone() for key, weight in policy.model.named_parameters() if weight.grad is not None}
    loss, got = computed(Method(name=name), (policy, sampled, reference), groups, budget)
    if name != "dpo":  # its loss is only a metric; see test_methods.py
        assert loss == pytest.approx(float(expected.detach()), abs=1e-9)
    assert distance(got, gradient) < 1e-9


# One token of advantage 2 at ρ = 0.5, 1 and 6, weight 1; β = 0.1 with π_ref = 2 π_θ if the loss has a KL term.
# ∂J/∂logprob by hand: ρÂ up to the upper clip, then 0 (clipped); the clipped ρ times Â (CISPO); Â (log π alone).
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sft", [2.0, 2.0, 2.0]),
        ("rft", [2.0, 2.0, 2.0]),
        ("online-rft", [2.0, 2.0, 2.0]),
        ("dpo", [2.0, 2.0, 2.0]),
        ("grpo", [1.0 + 0.1, 2.0 + 0.1, 0.0 + 0.1]),
        ("ppo", [1.0, 2.0, 0.0]),
        ("grpo-process", [1.0 + 0.1, 2.0 + 0.1, 0.0 + 0.1]),
        ("dr-grpo", [1.0, 2.0, 0.0]),
        ("dapo", [1.0, 2.0, 0.0]),
        ("gspo", [1.0, 2.0, 0.0]),
        ("cispo", [1.0, 2.0, 10.0]),
        ("rloo", [2.0, 2.0, 2.0]),
        ("reinforce-pp", [1.0, 2.0, 0.0]),
    ],
)
def test_gradient_coefficient_by_hand(name: str, expected: list[float]) -> None:
    settings = Method(name=name)
    for ratio, coefficient in zip((0.5, 1.0, 6.0), expected, strict=True):
        logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        result = losses.policy_loss(
            logprobs,
            torch.tensor([-1.0 - math.log(ratio)], dtype=torch.float64),
            torch.tensor([2.0], dtype=torch.float64),
            torch.ones(1, dtype=torch.float64),
            settings.clip_low,
            settings.clip_high,
            torch.tensor([-1.0 + math.log(2)], dtype=torch.float64),
            0.1 if settings.kl_in_loss else 0.0,
            settings.kl_estimator,
            find_surrogate(settings.surrogate),
            torch.zeros(1, dtype=torch.long) if settings.ratio == "sequence" else None,
        )
        (gradient,) = torch.autograd.grad(-result.loss, logprobs)
        assert float(gradient) == pytest.approx(coefficient, abs=1e-12), ratio


def test_kl_with_importance_has_the_gradient_of_the_kl_by_hand() -> None:
    """d/dlogπ of ρ (r - log r - 1), r = π_ref/π: at π = ½, π_old = ¼ and π_ref = ⅛, ρ = 2 and r = ¼, so
    ρ (r - log r - 1) + ρ (1 - r) = -ρ log r = 2 log 4: ρ times the log-ratio, whose mean over π_old is the KL's
    gradient."""
    half, quarter, eighth = (torch.tensor([math.log(p)], dtype=torch.float64) for p in (0.5, 0.25, 0.125))
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    logprobs = half.requires_grad_()
    result = losses.policy_loss(logprobs, quarter, zero, one, 0.2, 0.2, eighth, kl_coef=1.0, kl_importance=True)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert float(gradient) == pytest.approx(2 * math.log(4), abs=1e-12)
    assert float(result.kl) == pytest.approx(2 * (0.25 + math.log(4) - 1), abs=1e-12)


def test_dapo_clips_higher_by_hand() -> None:
    """ρ = 1.25 keeps its gradient with clip_high = 0.28, but not with 0.2."""
    for high, expected in ((0.28, 1.25), (0.2, 0.0)):
        logprobs = torch.tensor([math.log(1.25)], dtype=torch.float64, requires_grad=True)
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        (gradient,) = torch.autograd.grad(-losses.policy_loss(logprobs, zero, one, one, 0.2, high).loss, logprobs)
        assert float(gradient) == pytest.approx(expected)


def test_sequence_ratio_by_hand() -> None:
    """Log-ratios 0.1, 0.3 and (masked) 9; then -0.2: means 0.2 and -0.2. Each token gets 1/|o| of the gradient."""
    logprobs = torch.tensor([0.1, 0.3, 9.0, -0.2], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(4, dtype=torch.float64)
    advantages = torch.tensor([1.0, 1.0, 1.0, 3.0], dtype=torch.float64)
    weights = torch.tensor([0.25, 0.25, 0.0, 0.5], dtype=torch.float64)
    result = losses.policy_loss(logprobs, zero, advantages, weights, 0.5, 0.5, sequences=torch.tensor([0, 0, 0, 1]))
    assert result.ratio.tolist() == pytest.approx([math.exp(0.2)] * 3 + [math.exp(-0.2)])
    assert float(result.loss.detach()) == pytest.approx(-(0.5 * math.exp(0.2) + 0.5 * 3 * math.exp(-0.2)))
    (gradient,) = torch.autograd.grad(-result.loss, logprobs)
    assert gradient.tolist() == pytest.approx(
        [0.25 * math.exp(0.2), 0.25 * math.exp(0.2), 0.0, 0.5 * 3 * math.exp(-0.2)]
    )


# Two prompts; completions of 2 and 4 tokens, and of 5, 0 and 1.
LENGTHS = [[2, 4], [5, 0, 1]]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (aggregation.sequence_mean_weights, [[1 / 8, 1 / 16], [1 / 30, 0, 1 / 6]]),
        (aggregation.sequence_sum_weights, [[1 / 4, 1 / 4], [1 / 6, 0, 1 / 6]]),
        (aggregation.group_token_mean_weights, [[1 / 12, 1 / 12], [1 / 12, 0, 1 / 12]]),
        (aggregation.token_mean_weights, [[1 / 12, 1 / 12], [1 / 12, 0, 1 / 12]]),
        (aggregation.constant_weights, [[1 / 40, 1 / 40], [1 / 60, 0, 1 / 60]]),
    ],
)
def test_aggregations_by_hand(weights: Callable, expected: list[list[float]]) -> None:
    got = weights(LENGTHS, 10)
    for row, wanted in zip(got, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-15)
    assert weights([[], []], 10) == [[], []]


def test_group_and_step_token_means_differ_if_group_sizes_do() -> None:
    """2 and 8 tokens: the group mean weights both prompts equally; the step mean gives the longer one four fifths."""
    assert aggregation.group_token_mean_weights([[2], [8]]) == [[1 / 4], [1 / 16]]
    assert aggregation.token_mean_weights([[2], [8]]) == [[1 / 10], [1 / 10]]


def test_truncated_importance_weights_by_hand() -> None:
    """π_old/π_sampling = e^½, e^-1 and e^2, capped at 2: the policy term is weighted, the KL term is not."""
    policy, reference = make_policy(torch.float64), make_policy(torch.float64, seed=1)
    group = make_group([1, 2], [[3, 4], [5]], [1.0, 0.0])
    settings = Method(tis_cap=2.0, kl_coef=0.3)
    mark_trained([group], False)
    assign_advantages([group], settings, Metrics())
    (batch,) = pack([group], token_weights(settings, MAX_TOKENS), 100, with_kl=True)
    with torch.no_grad():
        batch_loss(policy, reference, batch, settings, TEMPERATURE, Metrics())
    assert batch.old_logprobs is not None
    batch.sampling_logprobs = batch.old_logprobs - torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    batch.old_logprobs, batch.entropy, ref = None, None, batch.ref_logprobs
    metrics = Metrics()
    loss = float(batch_loss(policy, reference, batch, settings, TEMPERATURE, metrics).detach())
    kl = torch.expm1(ref - batch.old_logprobs) - (ref - batch.old_logprobs)
    factors = [math.exp(0.5), math.exp(-1.0), 2.0]
    expected = -sum(
        float(w) * (factor * float(a) - 0.3 * float(k))
        for w, factor, a, k in zip(batch.weights, factors, batch.advantages, kl, strict=True)
    )
    assert loss == pytest.approx(expected, abs=1e-12)
    reduced = metrics.reduce()
    assert reduced["engine/importance_capped"] == pytest.approx(1 / 3)
    assert reduced["engine/importance_mean"] == pytest.approx(sum(factors) / 3)


def test_kl_in_the_reward_excludes_tool_output() -> None:
    """Neither the penalty nor the normalization of REINFORCE++ includes tokens that were not sampled."""
    settings = Method(name="reinforce-pp", kl_coef=0.5)
    group = make_group([1], [[2, 3, 4], [5]], [1.0, 0.0])
    object.__setattr__(group.completions[0], "mask", (True, False, True))
    mark_trained([group], False)
    group.old_logprobs, group.ref_logprobs = [[-1.0, -9.0, -1.0], [-2.0]], [[-1.2, -1.0, -1.6], [-1.0]]
    assign_advantages([group], settings, Metrics())
    returns = [1 - 0.5 * (0.2 + 0.6), 1 - 0.5 * 0.6, 0 - 0.5 * -1.0]
    first, last, other = normalized(returns)
    assert group.advantages[0] == pytest.approx([first, 0.0, last])
    assert group.advantages[1] == pytest.approx([other])


def test_leave_one_out_with_one_completion_left_has_zero_advantage() -> None:
    groups = [make_group([1], [[2], [3]], [1.0, None]), make_group([1], [[2], [3]], [1.0, 0.0])]
    mark_trained(groups, False)
    assign_advantages(groups, Method(baseline="leave-one-out", scale="none", kl_coef=0.0), Metrics())
    assert groups[0].advantages == [[0.0], [0.0]]
    assert groups[0].skipped == "all advantages are 0: only one trained completion"
    assert groups[1].advantages == [[1.0], [-1.0]]


def test_excluded_completion_does_not_affect_mean_and_std() -> None:
    """slime#1414, slime#2230: a group of uneven size is normalized over its remaining completions."""
    group = make_group([1], [[2], [3], [4], [5]], [1.0, None, 2.0, 6.0])
    alone = make_group([1], [[2], [4], [5]], [1.0, 2.0, 6.0])
    mark_trained([group, alone], False)
    assign_advantages([group], Method(), Metrics())
    assign_advantages([alone], Method(), Metrics())
    assert group.advantages[1] == [0.0]
    assert [group.advantages[0], *group.advantages[2:]] == alone.advantages
    assert [row[0] for row in alone.advantages] == pytest.approx(normalized([1.0, 2.0, 6.0]))


def test_excluded_completions_do_not_affect_the_batch_statistics() -> None:
    whole = [make_group([1], [[2], [3]], [1.0, 3.0]), make_group([1], [[2], [3]], [0.0, None])]
    mark_trained(whole, False)
    assign_advantages(whole, Method(name="reinforce-pp", kl_coef=0.0), Metrics())
    values = normalized([1.0, 3.0, 0.0])
    assert [whole[0].advantages[0][0], whole[0].advantages[1][0], whole[1].advantages[0][0]] == pytest.approx(values)


def test_recipe_fields_override_the_method() -> None:
    method = load_recipe({"model": {"name": "m"}, "method": {"name": "dapo", "clip_high": 0.5}}).method
    assert (method.clip_high, method.aggregation, method.kl_coef) == (0.5, "group-token-mean", 0.0)
    assert load_recipe({"model": {"name": "m"}}, ["method.name=gspo"]).method.ratio == "sequence"


def test_methods_resolve_to_their_settings() -> None:
    for name, row in METHODS.items():
        method = Method(name=name)
        assert {key: getattr(method, key) for key in row.settings} == dict(row.settings)
        assert load_recipe({"model": {"name": "m"}, "method": method.model_dump()}).method == method


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"method": {"name": "dapoo"}}, ["method.name", "dapoo", '"dapo"']),
        ({"method": {"credit": "token"}}, ["method.credit", "baseline", '"batch"']),
        ({"method": {"name": "reinforce-pp", "ratio": "sequence"}}, ["method.ratio", 'credit = "completion"']),
        ({"method": {"name": "rloo", "inner_updates": 2}}, ["method.inner_updates = 2", "inner_updates = 1"]),
        ({"method": {"surrogate": "cliped"}}, ["method.surrogate", "cliped", '"clipped"']),
        ({"method": {"name": "rloo"}, "sampling": {"group_size": 1}}, ["sampling.group_size = 1", "leave-one-out"]),
    ],
)
def test_meaningless_combinations_are_refused(data: dict, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"model": {"name": "m"}, **data})
    for word in words:
        assert word in str(caught.value)


def test_user_defined_surrogate() -> None:
    surrogate = find_surrogate("tests/functions_of_users.py:soft_surrogate")
    assert surrogate(torch.zeros(1), torch.full((1,), 3.0), torch.ones(1), 0.2, 0.2).tolist() == pytest.approx([0.75])
    for name in ("tests/functions_of_users.py:surrogate_of_one_number", "tests/functions_of_users.py:nothing_here"):
        with pytest.raises(UsageError, match=r"method\.surrogate"):
            find_surrogate(name)
