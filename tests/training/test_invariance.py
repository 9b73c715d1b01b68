"""The same step gives the same loss and the same gradient, however it is split, packed, padded, shared or ordered.

The expected values are computed naively: transformers' attention, one completion at a time or a padded batch, the
full logits, and Eq. 3 in plain loops.
"""

from __future__ import annotations

import math

import pytest
import torch

from gruppo.algorithms.aggregation import sequence_mean_weights
from gruppo.algorithms.credit import assign_advantages
from gruppo.algorithms.filtering import mark_trained
from gruppo.config.method_section import Method
from gruppo.models.compatibility import wrap_model
from gruppo.models.packing import pack
from gruppo.models.policy import LanguageModel
from gruppo.training.policy_loss import batch_loss
from gruppo.types import Group
from gruppo.utils.metrics import Metrics
from tests.architectures import ARCHITECTURES, make_architecture
from tests.conftest import make_group, make_policy, random_groups

TEMPERATURE = 0.8
SETTINGS = Method(kl_coef=0.05)
Gradient = dict[str, torch.Tensor]


def prepared(groups: list[Group], mask_truncated: bool = False) -> list[Group]:
    mark_trained(groups, mask_truncated)
    assign_advantages(groups, SETTINGS, Metrics())
    return groups


def packed(
    policy: LanguageModel,
    reference: LanguageModel,
    groups: list[Group],
    budget: int = 10**9,
    settings: Method = SETTINGS,
) -> tuple[float, Gradient]:
    """Loss and gradient as the loop computes them."""
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    batches = pack(groups, sequence_mean_weights, budget, with_kl=settings.kl_coef > 0)
    for batch in batches:
        loss = batch_loss(policy, reference, batch, settings, TEMPERATURE, Metrics())
        loss.backward()
        total += float(loss.detach())
    return total, {name: each.grad.clone() for name, each in policy.model.named_parameters() if each.grad is not None}


def rows_logprobs(model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], padding: str) -> list[torch.Tensor]:
    """log π of every completion's tokens, from transformers' forward pass with full logits."""
    if padding == "none":
        outputs = [model(torch.tensor([prompt + completion])).logits[0] for prompt, completion in rows]
    else:
        longest = max(len(prompt + completion) for prompt, completion in rows)
        ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
        spans = []
        for row, (prompt, completion) in enumerate(rows):
            size = len(prompt + completion)
            spans.append(slice(longest - size, longest) if padding == "left" else slice(0, size))
            ids[row, spans[-1]], mask[row, spans[-1]] = torch.tensor(prompt + completion), 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        outputs = [logits[row, span] for row, span in enumerate(spans)]
    found = []
    for (prompt, completion), logits in zip(rows, outputs, strict=True):
        full = torch.log_softmax(logits[len(prompt) - 1 : -1] / TEMPERATURE, -1)
        found.append(full.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1))
    return found


def naive(
    policy: LanguageModel, reference: LanguageModel, groups: list[Group], padding: str = "none"
) -> tuple[float, Gradient]:
    """Eq. 3 and 4 as written in the paper, on policy."""
    policy.model.zero_grad(set_to_none=True)
    prompts = [group for group in groups if any(group.trained)]
    total = torch.zeros((), dtype=policy.model.dtype)
    for group in prompts:
        used = [index for index, trained in enumerate(group.trained) if trained]
        rows = [(list(group.prompt.token_ids), list(group.completions[index].token_ids)) for index in used]
        logprobs = rows_logprobs(policy.model, rows, padding)
        with torch.no_grad():
            ref = rows_logprobs(reference.model, rows, padding)
        for index, here, there in zip(used, logprobs, ref, strict=True):
            for t in range(len(here)):
                ratio = torch.exp(here[t] - here[t].detach())
                advantage = group.advantages[index][t]
                clipped = torch.clamp(ratio, 0.8, 1.2) * advantage
                kl = torch.exp(there[t] - here[t]) - (there[t] - here[t]) - 1
                term = torch.minimum(ratio * advantage, clipped) - SETTINGS.kl_coef * kl
                total = total - term / (len(prompts) * len(used) * len(here))
    total.backward()
    gradient = {name: each.grad.clone() for name, each in policy.model.named_parameters() if each.grad is not None}
    return float(total.detach()), gradient


def distance(one: Gradient, other: Gradient) -> float:
    """‖one - other‖ / ‖other‖ over all parameters."""
    assert one.keys() == other.keys()
    apart = math.sqrt(sum(float((one[name] - other[name]).square().sum()) for name in one))
    return apart / math.sqrt(sum(float(each.square().sum()) for each in other.values()))


def assert_equal(one: tuple[float, Gradient], other: tuple[float, Gradient], bound: float) -> None:
    """The same loss and the same gradient."""
    assert one[0] == pytest.approx(other[0], abs=bound * 10)
    assert distance(one[1], other[1]) < bound


# Models of which transformers computes a part in float32 in any dtype: a soft-capped softmax, Cohere's norm, routers.
FLOAT32_PARTS = {"gemma2", "cohere", "mixtral", "qwen3-moe", "deepseek-v3"}
CASES = [("llama", torch.float32), *((name, torch.float64) for name in ARCHITECTURES)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{str(case[1])[6:]}")
def setting(request: pytest.FixtureRequest) -> tuple[LanguageModel, LanguageModel, float]:
    """Policy, reference, and the bound: 1e-9 in float64, 1e-5 of the gradient's norm in float32, 1e-6 in between."""
    name, dtype = request.param
    bound = 1e-5 if dtype == torch.float32 else 1e-6 if name in FLOAT32_PARTS else 1e-9
    return make_architecture(name, dtype), make_architecture(name, dtype, seed=1), bound


Setting = tuple[LanguageModel, LanguageModel, float]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("uneven", [True, False], ids=["uneven", "even"])
def test_packing_with_shared_prefix_equals_equation_3(setting: Setting, padding: str, uneven: bool) -> None:
    """trl#2708, trl#6800, open-instruct#1642: mask, positions and leaks; trl#2995: this is GRPO, not a token mean."""
    policy, reference, bound = setting
    if padding != "none" and policy.model.config.model_type == "gemma2":
        pytest.skip("transformers' soft-capped softmax gives NaN in padded rows")
    groups = prepared(random_groups(uneven=uneven))
    expected = naive(policy, reference, groups, padding)
    assert_equal(packed(policy, reference, groups), expected, bound)


def test_micro_batch_size_does_not_affect_the_result(setting: Setting) -> None:
    """verl#5625, trl#3021, trl#6024, trl#6369: from one completion per micro-batch to the whole step in one."""
    policy, reference, bound = setting
    groups = prepared(random_groups())
    loss, gradient = packed(policy, reference, groups)
    for budget in (1, 10, 17, 30, 60):
        cut_loss, cut_gradient = packed(policy, reference, groups, budget)
        assert cut_loss == pytest.approx(loss, abs=bound * 10)
        assert distance(cut_gradient, gradient) < bound


def test_smallest_budget_gives_one_micro_batch_per_completion() -> None:
    groups = prepared(random_groups())
    batches = pack(groups, sequence_mean_weights, 1, with_kl=True)
    assert [len(batch.members) for batch in batches] == [1] * 12


def test_sharing_the_prefix_does_not_affect_the_result(setting: Setting) -> None:
    """A prompt computed once per group, or once per completion: one group per completion, with the same weights."""
    policy, reference, bound = setting
    groups = prepared(random_groups())
    loss, gradient = packed(policy, reference, groups)
    weights = sequence_mean_weights([[len(c.token_ids) for c in group.completions] for group in groups])
    alone, alone_weights = [], []
    for group, row in zip(groups, weights, strict=True):
        for index in range(len(group.completions)):
            single = Group(group.prompt, [group.completions[index]], [group.rewards[index]])
            single.trained, single.advantages = [True], [group.advantages[index]]
            alone.append(single)
            alone_weights.append([row[index]])
    policy.model.zero_grad(set_to_none=True)
    (batch,) = pack(alone, lambda _: alone_weights, 10**9, with_kl=True)
    assert len(batch.layout) == 12
    unshared = batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, Metrics())
    unshared.backward()
    unshared_gradient = {name: each.grad for name, each in policy.model.named_parameters() if each.grad is not None}
    assert float(unshared.detach()) == pytest.approx(loss, abs=bound * 10)
    assert distance(unshared_gradient, gradient) < bound


def test_order_of_groups_and_completions_does_not_affect_the_result(setting: Setting) -> None:
    policy, reference, bound = setting
    groups = prepared(random_groups())
    loss, gradient = packed(policy, reference, groups, 40)
    turned = []
    for group in groups[::-1]:
        turned.append(Group(group.prompt, group.completions[::-1], group.rewards[::-1]))
    other_loss, other_gradient = packed(policy, reference, prepared(turned), 40)
    assert other_loss == pytest.approx(loss, abs=bound * 10)
    assert distance(other_gradient, gradient) < bound


def test_same_prompt_twice_is_two_groups(setting: Setting) -> None:
    """NeMo: identical prompts merged into one group. trl#3098, trl#6673: completions paired with another prompt."""
    policy, reference, bound = setting
    one, two = random_groups(groups=2)
    twin = make_group(list(one.prompt.token_ids), [list(c.token_ids) for c in two.completions], [5.0, 1.0, 1.0, 7.0])
    groups = prepared([one, twin])
    expected = naive(policy, reference, groups)
    assert_equal(packed(policy, reference, groups), expected, bound)


def test_an_excluded_completion_is_as_if_never_sampled(setting: Setting) -> None:
    """trl#6369: it counts in neither numerator nor denominator."""
    policy, reference, bound = setting
    (group,) = random_groups(groups=1)
    prompt, ids = list(group.prompt.token_ids), [list(c.token_ids) for c in group.completions]
    failed = prepared([make_group(prompt, ids, [1.0, None, 3.0, 0.0])])
    never = prepared([make_group(prompt, [ids[0], ids[2], ids[3]], [1.0, 3.0, 0.0])])
    expected = packed(policy, reference, never)
    assert_equal(packed(policy, reference, failed), expected, bound)


def test_an_excluded_group_is_as_if_never_sampled(setting: Setting) -> None:
    policy, reference, bound = setting
    first, second = random_groups(groups=2)
    lost = make_group([1, 2], [[3], [4]], [None, None])
    expected = packed(policy, reference, prepared([first, second]))
    assert_equal(packed(policy, reference, prepared([first, lost, second])), expected, bound)


def test_a_group_without_nonzero_advantage_counts_and_costs_nothing_without_kl(setting: Setting) -> None:
    """It stays in the denominator of Eq. 3; omitting its backward pass changes nothing."""
    policy, reference, bound = setting
    settings = Method(kl_coef=0.0)
    flat = make_group([1, 2, 3], [[4, 5], [6]], [1.0, 1.0])
    (lively,) = random_groups(groups=1)
    groups = prepared([lively, flat])
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=False)
    assert {index for index, _, _ in batch.members} == {0}
    loss, gradient = packed(policy, reference, groups, settings=settings)
    whole = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    policy.model.zero_grad(set_to_none=True)
    (full,) = (batch_loss(policy, reference, each, settings, TEMPERATURE, Metrics()) for each in whole)
    full.backward()
    full_gradient = {name: each.grad for name, each in policy.model.named_parameters() if each.grad is not None}
    assert float(full.detach()) == pytest.approx(loss, abs=bound * 10)
    assert distance(full_gradient, gradient) < bound


def test_a_group_without_nonzero_advantage_keeps_its_kl(setting: Setting) -> None:
    """trl#7068: equal rewards must not lose the KL term."""
    policy, reference, bound = setting
    flat = prepared([make_group([1, 2, 3], [[4, 5], [6]], [1.0, 1.0])])
    expected = naive(policy, reference, flat)
    assert expected[0] > 0
    assert_equal(packed(policy, reference, flat), expected, bound)


def test_tool_output_has_no_loss(setting: Setting) -> None:
    """trl#4975, trl#5144: masked tokens are read but not trained on, and do not count in |o_i|."""
    policy, reference, _ = setting
    (group,) = random_groups(groups=1, size=2)
    ids = [5, 6, 7, 8]
    prompt = list(group.prompt.token_ids)
    groups = prepared([make_group(prompt, [ids, [9, 10]], [1.0, 0.0])])
    masked = groups[0].completions[0]
    object.__setattr__(masked, "mask", (True, False, False, True))
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    assert batch.weights.tolist() == [1 / 4, 0, 0, 1 / 4, 1 / 4, 1 / 4]
    batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, Metrics())
    assert batch.token_ids.tolist() == [*prompt, 5, 6, 7, 9]


def test_one_token_completions(setting: Setting) -> None:
    """Their token is predicted by the prompt alone, so the model reads none of their tokens."""
    policy, reference, bound = setting
    groups = prepared([make_group([1, 2, 3], [[4], [5], [6, 7]], [1.0, 0.0, 0.5])])
    expected = naive(policy, reference, groups)
    assert_equal(packed(policy, reference, groups), expected, bound)


def test_an_empty_completion_counts_in_its_group_and_has_no_tokens(setting: Setting) -> None:
    policy, reference, _ = setting
    groups = prepared([make_group([1, 2], [[], [4]], [1.0, 0.0])])
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    assert batch.targets.tolist() == [4]
    assert batch.weights.tolist() == [0.5]
    assert math.isfinite(float(batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, Metrics()).detach()))


def test_truncated_and_masked_completions_give_no_batch() -> None:
    group = make_group([1, 2], [[3, 4], [5, 6]], [1.0, 0.0])
    for completion in group.completions:
        object.__setattr__(completion, "finish_reason", "length")
    prepared([group], mask_truncated=True)
    assert group.trained == [False, False]
    assert group.advantages == [[0.0, 0.0], [0.0, 0.0]]
    assert group.skipped is not None
    assert pack([group], sequence_mean_weights, 10, with_kl=True) == []


def test_truncated_completion_is_trained_on_unless_masked() -> None:
    group = make_group([1, 2], [[3, 4], [5, 6], [7]], [1.0, 0.0, 0.5])
    object.__setattr__(group.completions[0], "finish_reason", "length")
    prepared([group], mask_truncated=False)
    assert group.trained == [True, True, True]
    prepared([group], mask_truncated=True)
    assert group.trained == [False, True, True]
    assert group.advantages[1][0] == -group.advantages[2][0] != 0


def test_a_group_of_one_has_no_nonzero_advantage() -> None:
    group = make_group([1, 2], [[3, 4]], [7.0])
    prepared([group], mask_truncated=False)
    assert not group.has_nonzero_advantage
    assert group.skipped == "all advantages are 0: only one trained completion"


def test_inner_updates_use_the_first_forward_pass_as_old() -> None:
    """tt-blacksmith#731: with μ > 1 the ratio must leave 1 after the first update."""
    policy, reference = make_policy(), make_policy(seed=1)
    (batch,) = pack(prepared(random_groups()), sequence_mean_weights, 10**9, with_kl=True)
    first, second = Metrics(), Metrics()
    batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, first).backward()
    old = batch.old_logprobs
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.sub_(0.05 * parameter.grad)
    policy.generation.advance()
    batch_loss(policy, reference, batch, SETTINGS, TEMPERATURE, second)
    assert batch.old_logprobs is old
    assert first.reduce()["policy/ratio_max"] == 1.0
    assert second.reduce()["policy/ratio_max"] > 1.001


def test_dropout_is_off() -> None:
    """trl#3000: a policy with dropout would be scored with a different distribution than it samples from."""
    policy = make_policy()
    policy.model.train()
    assert not wrap_model(policy.model, policy.tokenizer).model.training
    packed(policy, policy, prepared(random_groups()))
    assert not policy.model.training
    assert not any(module.training for module in policy.frozen_copy().model.modules())


def test_advantages_are_normalized_once() -> None:
    """gem#113: the loss uses the group's advantages unchanged."""
    groups = prepared(random_groups())
    (batch,) = pack(groups, sequence_mean_weights, 10**9, with_kl=True)
    expected = [value for group in groups for row in group.advantages for value in row]
    assert batch.advantages.tolist() == expected
    first = torch.tensor([row[0] for row in groups[0].advantages], dtype=torch.float64)
    assert float(first.std()) == pytest.approx(1, abs=1e-5)
    assert float(first.mean()) == pytest.approx(0, abs=1e-12)
