"""The same tensors through TRL's loss and verl's published formulas.

If the definitions agree, the numbers must agree; if not, the difference is shown here and explained in
docs/paper_map.md. TRL's loss is TRL's code, called with a trainer that returns fixed log-probabilities.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gruppo.algorithms.advantages import advantages
from gruppo.algorithms.losses import policy_loss
from gruppo.config.method_section import Method
from gruppo.training.policy_loss import find_surrogate, token_weights

trl = pytest.importorskip("trl", reason="TRL is a test extra: make test installs it")

PROMPTS, SIZE, LONGEST = 3, 4, 6
MAX_TOKENS = 9


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    """Twelve completions of 1 to 6 tokens, padded on the right; ratios from 0.5 to 2 in both directions."""
    generator = torch.Generator().manual_seed(3)
    count = PROMPTS * SIZE
    lengths = torch.randint(1, LONGEST + 1, (count,), generator=generator)

    def noise() -> Tensor:
        return torch.randn(count, LONGEST, generator=generator, dtype=torch.float64)

    logprobs = -1 - noise().abs()
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * noise(),
        "ref": logprobs + 0.3 * noise(),
        "sampling": logprobs + 0.2 * noise(),
        "mask": (torch.arange(LONGEST) < lengths[:, None]).long(),
        "rewards": torch.randn(count, generator=generator, dtype=torch.float64),
    }


def by_trl(rows: dict[str, Tensor], advantage: Tensor, **settings: Any) -> tuple[float, Tensor]:
    """TRL 1.16's GRPOTrainer._compute_loss on these log-probabilities, and its gradient with respect to them."""
    logprobs = rows["logprobs"].clone().requires_grad_()
    chosen: dict[str, Any] = {
        "loss_type": "grpo", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "importance_sampling_level": "token", "use_vllm": False, **settings,
    }  # fmt: skip
    trainer = SimpleNamespace(
        **chosen,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        vllm_importance_sampling_correction=True,
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    )
    empty = torch.zeros(len(logprobs), 0, dtype=torch.long)
    ids = torch.zeros_like(rows["mask"])
    inputs = {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": ids, "completion_mask": rows["mask"],
        "advantages": advantage, "old_per_token_logps": rows["old"], "ref_per_token_logps": rows["ref"],
        "num_items_in_batch": rows["mask"].sum(),
        "importance_sampling_ratio": (rows["old"] - rows["sampling"]).exp().clamp(max=1.1),
    }  # fmt: skip
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return float(loss.detach()), gradient


def ours(rows: dict[str, Tensor], advantage: Tensor, settings: Method) -> tuple[float, Tensor]:
    """Our loss and its gradient on the same log-probabilities."""
    logprobs = rows["logprobs"].clone().requires_grad_()
    mask = rows["mask"].bool()
    lengths = mask.sum(-1)
    grouped = lengths.view(PROMPTS, SIZE).tolist()
    weights = torch.tensor(
        [w for group in token_weights(settings, MAX_TOKENS)(grouped) for w in group], dtype=torch.float64
    )
    importance = (rows["old"] - rows["sampling"]).exp().clamp(max=settings.tis_cap)
    result = policy_loss(
        logprobs[mask],
        rows["old"][mask],
        advantage.repeat_interleave(lengths),
        weights.repeat_interleave(lengths),
        settings.clip_low,
        settings.clip_high,
        rows["ref"][mask],
        settings.kl_coef if settings.kl_in_loss else 0.0,
        settings.kl_estimator,
        find_surrogate(settings.surrogate),
        torch.arange(len(lengths)).repeat_interleave(lengths) if settings.ratio == "sequence" else None,
        importance[mask] if settings.tis_cap else None,
    )
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    return float(result.loss.detach()), gradient


def by_groups(rows: dict[str, Tensor], settings: Method) -> Tensor:
    return torch.cat(advantages(list(rows["rewards"].view(PROMPTS, SIZE)), settings.baseline, settings.scale))


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        (Method(kl_coef=0.0), {}),
        (Method(), {"beta": 0.04}),
        (Method(clip_high=0.28, kl_coef=0.0), {"epsilon_high": 0.28}),
        (Method(name="dr-grpo"), {"loss_type": "dr_grpo"}),
        (Method(aggregation="token-mean", kl_coef=0.1), {"loss_type": "dapo", "beta": 0.1}),
        (Method(aggregation="token-mean", kl_coef=0.0), {"loss_type": "bnpo"}),
        (Method(name="gspo"), {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
        (Method(name="gspo", clip_low=0.2, clip_high=0.3, kl_coef=0.04),
         {"importance_sampling_level": "sequence", "epsilon_high": 0.3, "beta": 0.04}),
        # TRL's epsilon_high is the bound itself; our clip_high is added to 1.
        (Method(name="cispo", aggregation="token-mean", clip_high=0.5), {"loss_type": "cispo", "epsilon_high": 1.5}),
        (Method(tis_cap=1.1), {"beta": 0.04, "use_vllm": True}),
        (Method(tis_cap=1.1, aggregation="token-mean"), {"beta": 0.04, "use_vllm": True, "loss_type": "dapo"}),
    ],
    ids=["no-kl", "grpo", "clip-higher", "dr-grpo", "dapo-kl", "bnpo", "gspo", "gspo-kl", "cispo", "tis", "tis-dapo"],
)  # fmt: skip
def test_loss_and_gradient_equal_trl(rows: dict[str, Tensor], settings: Method, theirs: dict[str, Any]) -> None:
    advantage = by_groups(rows, settings)
    loss, gradient = ours(rows, advantage, settings)
    expected, expected_gradient = by_trl(rows, advantage, **theirs)
    assert loss == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    assert float(gradient.abs().max()) > 0


def test_dapo_of_the_paper_differs_from_trls(rows: dict[str, Tensor]) -> None:
    """The paper averages over the tokens of a group, TRL and verl over those of the batch; we support both."""
    settings = Method(name="dapo")
    advantage = by_groups(rows, settings)
    theirs = by_trl(rows, advantage, loss_type="dapo", epsilon_high=0.28)[0]
    assert ours(rows, advantage, settings)[0] != pytest.approx(theirs, abs=1e-4)
    assert ours(rows, advantage, settings.model_copy(update={"aggregation": "token-mean"}))[0] == pytest.approx(theirs)


def trl_advantages(rewards: Tensor, scale: str) -> Tensor:
    """TRL 1.16, _generate_and_score_completions: group mean; sample std of group or batch, plus 1e-4."""
    grouped = rewards.view(PROMPTS, SIZE)
    centered = rewards - grouped.mean(1).repeat_interleave(SIZE)
    if scale == "none":
        return centered
    spread = grouped.std(1).repeat_interleave(SIZE) if scale == "group" else rewards.std().expand_as(rewards)
    return centered / (spread + 1e-4)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_trls_except_for_its_epsilon(rows: dict[str, Tensor], scale: str) -> None:
    got = by_groups(rows, Method(scale=scale))  # type: ignore[arg-type]
    torch.testing.assert_close(got, trl_advantages(rows["rewards"], scale), rtol=1e-3, atol=0)


def verl_agg_loss(losses: Tensor, mask: Tensor, mode: str) -> Tensor:
    """verl 0.9, agg_loss: the four modes as documented."""
    if mode == "token-mean":
        return (losses * mask).sum() / mask.sum()
    by_row = (losses * mask).sum(-1)
    if mode == "seq-mean-token-sum":
        return by_row.mean()
    if mode == "seq-mean-token-mean":
        return (by_row / mask.sum(-1)).mean()
    return by_row.sum() / (len(mask) * MAX_TOKENS)  # seq-mean-token-sum-norm


@pytest.mark.parametrize(
    ("aggregation", "mode"),
    [("token-mean", "token-mean"), ("sequence-sum", "seq-mean-token-sum"), ("sequence-mean", "seq-mean-token-mean"),
     ("constant", "seq-mean-token-sum-norm")],
)  # fmt: skip
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_equals_verls(rows: dict[str, Tensor], aggregation: str, mode: str, level: str) -> None:
    """Clipped policy loss without the dual clip (c = 3 binds if Â < 0 and ρ > 3; no ratio here is that large)."""
    settings = Method(aggregation=aggregation, ratio=level, kl_coef=0.0, clip_high=0.25)  # type: ignore[arg-type]
    advantage = by_groups(rows, settings)
    logprobs, mask = rows["logprobs"].clone().requires_grad_(), rows["mask"]
    log_ratio = logprobs - rows["old"]
    if level == "sequence":  # GSPO-token: s_i · π/sg[π]
        mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        log_ratio = mean.detach() + logprobs - logprobs.detach()
    ratio = log_ratio.exp()
    assert float(ratio.detach()[mask.bool()].max()) < 3
    unclipped = -advantage[:, None] * ratio
    losses = torch.maximum(unclipped, -advantage[:, None] * ratio.clamp(0.8, 1.25))
    expected = verl_agg_loss(losses, mask, mode)
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    loss, gradient = ours(rows, advantage, settings)
    assert loss == pytest.approx(float(expected.detach()), abs=1e-12)
    if level == "token" or aggregation == "sequence-mean":
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    else:  # GSPO-token gives each token its own gradient: the same sum over the completion, distributed differently
        torch.testing.assert_close(gradient.sum(-1), expected_gradient.sum(-1), rtol=0, atol=1e-12)


def test_dual_clip_of_verl_is_not_used() -> None:
    """ρ = 5, Â = -1: Eq. 3 gives 5, verl's default limits it to 3."""
    one = torch.ones(1, dtype=torch.float64)
    assert float(policy_loss(one * math.log(5), one * 0, -one, one, 0.2, 0.2).loss) == pytest.approx(5.0)


def test_advantages_equal_verls(rows: dict[str, Tensor]) -> None:
    """compute_grpo_outcome_advantage (ε 1e-6), Dr. GRPO, RLOO with n/(n-1), REINFORCE++ whitened over tokens."""
    grouped = rows["rewards"].view(PROMPTS, SIZE)
    grpo = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(by_groups(rows, Method()), grpo.flatten())
    torch.testing.assert_close(by_groups(rows, Method(name="dr-grpo")), (grouped - grouped.mean(1)[:, None]).flatten())
    rloo = grouped * SIZE / (SIZE - 1) - grouped.mean(1, keepdim=True) * SIZE / (SIZE - 1)
    torch.testing.assert_close(by_groups(rows, Method(name="rloo")), rloo.flatten())
    lengths = rows["mask"].sum(-1)
    tokens = rows["rewards"].repeat_interleave(lengths)
    whitened = (tokens - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8)
    torch.testing.assert_close(advantages([tokens], "batch", "batch")[0], whitened, rtol=1e-5, atol=0)
