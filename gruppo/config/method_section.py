"""The tables [method] and [critic]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gruppo.config.methods import METHODS
from gruppo.config.sections import SURROGATES, Fraction, Section
from gruppo.errors import nearest


class Method(Section):
    """The objective. `name` selects a row of defaults for the other fields; fields set in the recipe take
    precedence."""

    name: str = "grpo"
    """A row of gruppo.config.methods.METHODS (`gruppo methods` prints the table): sft, rft, online-rft, dpo, ppo, grpo,
    grpo-process, dr-grpo, dapo, gspo, cispo, rloo, reinforce-pp."""
    source: Literal["policy", "initial", "dataset"] = "policy"
    """Where completions come from: "policy" samples from the current policy in every step, "initial" samples from a
    frozen copy of the initial policy, "dataset" reads them from the rows of the task and samples nothing."""
    baseline: Literal["group", "leave-one-out", "batch", "none", "indicator"] = "group"
    """Baseline subtracted from each reward: the mean of its "group", of the other completions of its group
    ("leave-one-out"), of the whole step ("batch"), or nothing ("none"). "indicator" replaces the reward with 1 for a
    correct completion and 0 for any other."""
    scale: Literal["group", "batch", "none"] = "group"
    """Advantage scaling (std normalization): divide by the standard deviation of the "group", by that of the whole step
    ("batch"), or not at all ("none")."""
    advantage_epsilon: Annotated[float, Field(ge=0)] = 1e-6
    """ε: added to the standard deviation that advantages are divided by."""
    credit: Literal["completion", "token", "step", "pair", "value"] = "completion"
    """Advantage granularity. "completion": one advantage per completion, from its reward. "token": one per token, from
    the reward still to come, with the KL penalty of each token subtracted at that token (REINFORCE++). "step": step
    rewards, each applied to the tokens up to the end of its step, in addition to outcome rewards (process
    supervision). "pair": pairs of a correct and an incorrect completion of the same prompt (DPO). "value": one per
    token, relative to the prediction of a value model (PPO's critic, see [critic])."""
    success_threshold: float = 0.5
    """A completion is correct if its reward is greater than this. Used by baseline = "indicator", max_per_prompt, pairs
    and the labels of a [reward_model]."""
    deduplicate: bool = False
    """Leave out completions whose text repeats that of an earlier completion of the same prompt."""
    max_per_prompt: Annotated[int, Field(ge=0)] = 0
    """Maximum correct completions, or pairs, used per prompt; the first ones are kept. 0 keeps all."""
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    """β of DPO: factor on the difference between the two log-ratios, policy to reference, of a pair."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio π_θ/π_old: one per "token", or one per completion ("sequence": the geometric mean over its
    tokens, GSPO)."""
    surrogate: Annotated[str, Field(min_length=1)] = "clipped"
    """Policy term of the loss: "clipped" (DeepSeekMath Eq. 3), "clipped-weight" (detached clipped ratio times log π,
    CISPO), "log-likelihood" (log π without a ratio), or "package.module:function" with the signature of the functions
    in gruppo.algorithms.losses."""
    aggregation: Literal["sequence-mean", "sequence-sum", "group-token-mean", "token-mean", "constant"] = (
        "sequence-mean"
    )
    """How token losses are combined: "sequence-mean" averages over the tokens of each completion (DeepSeekMath Eq. 3),
    "sequence-sum" sums them, "group-token-mean" averages over all tokens of a group (DAPO), "token-mean" over all
    tokens of the step, "constant" sums and divides by sampling.max_tokens (Dr. GRPO). Any remaining levels (completions
    of a group, groups) are then averaged."""
    clip_low: Fraction = 0.2
    """Lower clip range ε: the probability ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """Upper clip range ε: the probability ratio is clipped from above at 1 + clip_high."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    """β: weight of the KL term. At 0 there is no KL term, and no reference model unless credit = "pair" or
    source = "initial" needs one."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL to the reference: "k3" (DeepSeekMath Eq. 4) and "k2" (½ log²) are terms of the loss. "k1"
    (log π_old/π_ref) has zero expected gradient in the loss, so it is subtracted from the reward."""
    kl_importance: bool = False
    """Multiply the KL of each token in the loss by the probability ratio, whose gradient then counts too: the gradient
    of k3 becomes that of the KL itself (DeepSeek-V3.2, arXiv 2512.02556). TRL calls it use_bias_correction_kl."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Source of π_old: "trainer" computes it in the first update of each step; "engine" uses the log-probabilities that
    the engine recorded while sampling (sampling_logprobs) as they are."""
    tis_cap: Annotated[float, Field(ge=0)] = 0.0
    """Truncated importance sampling (TIS) cap: the policy term of each token is multiplied by
    min(π_old / π_sampling, tis_cap), which corrects for differences between trainer (π_old) and engine (π_sampling).
    0 turns it off."""
    inner_updates: Annotated[int, Field(ge=1)] = 1
    """μ of Algorithm 1: optimizer updates on the completions of each step. TRL calls it num_iterations."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Number of parts that the completions of a step are split into. Each of the inner_updates goes through the parts
    in order, with one optimizer update for each part and averages over that part alone. Advantages and π_old are those
    of the whole step, before its first update. Groups stay whole unless there are fewer groups than parts. TRL has
    steps_per_generation / gradient_accumulation_steps parts; verl's ppo_mini_batch_size is the size of a part."""
    mask_truncated: bool = False
    """Treat completions that were truncated at sampling.max_tokens as if they had not been sampled."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    """Dynamic sampling (DAPO): groups whose rewards are all equal are dropped, and other prompts are sampled in their
    place, in up to this many rounds per step. 0 keeps all groups and samples no others."""

    @model_validator(mode="before")
    @classmethod
    def _fill_from_row(cls, data: Any) -> Any:
        name = data.get("name", "grpo") if isinstance(data, Mapping) else "grpo"
        row = METHODS.get(name) if isinstance(name, str) else None
        return {**row.settings, **data} if row is not None and isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _parameters_agree(self) -> Self:
        if self.name not in METHODS:
            raise ValueError(f'name = "{self.name}": unknown method{nearest(self.name, METHODS)}')
        self._source_agrees()
        if self.credit in {"token", "value"} and not {self.baseline, self.scale} <= {"batch", "none"}:
            raise ValueError(
                f'credit = "{self.credit}" gives every token its own advantage, which baseline = "{self.baseline}" and '
                f'scale = "{self.scale}" do not support; write "batch" or "none" for both, or credit = "completion"'
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError(
                'scale = "group" with baseline = "none": groups of equal rewards would stay unscaled, others not; '
                'write scale = "batch" or "none"'
            )
        if self.surrogate == "log-likelihood" and self.inner_updates > 1:
            raise ValueError(
                f'inner_updates = {self.inner_updates}: surrogate = "log-likelihood" has no ratio to correct for '
                'a policy that has changed since sampling; write inner_updates = 1, or surrogate = "clipped"'
            )
        if self.minibatches > 1 and self.surrogate == "log-likelihood" and self.source == "policy":
            raise ValueError(
                f'minibatches = {self.minibatches}: surrogate = "log-likelihood" has no ratio to correct for a policy '
                "that has changed since sampling; write minibatches = 1 and a smaller sampling.prompts_per_step, or "
                'surrogate = "clipped"'
            )
        if self.credit == "step" and (self.baseline, self.scale) != ("group", "group"):
            raise ValueError(
                f'credit = "step" normalizes within the group; baseline = "{self.baseline}", scale = "{self.scale}": '
                'write "group" for both'
            )
        if self.credit == "step" and self.dynamic_sampling_rounds:
            raise ValueError(
                f"dynamic_sampling_rounds = {self.dynamic_sampling_rounds}: compares the rewards of completions, but "
                'credit = "step" learns from the rewards of steps; write dynamic_sampling_rounds = 0'
            )
        if self.ratio == "sequence" and self.credit in {"token", "step", "value"}:
            raise ValueError('ratio = "sequence" needs one advantage per completion; write credit = "completion"')
        if ":" not in self.surrogate and self.surrogate not in SURROGATES:
            raise ValueError(f'surrogate = "{self.surrogate}": unknown{nearest(self.surrogate, SURROGATES)}')
        return self

    def _source_agrees(self) -> None:
        """Check the fields that depend on `source`, and on pairs. Raises ValueError if they disagree."""
        if self.source != "policy" and self.tis_cap:
            raise ValueError(
                f'tis_cap = {self.tis_cap}: completions of source = "{self.source}" were not sampled from '
                "the current policy; write tis_cap = 0"
            )
        if self.old_logprobs == "engine" and self.source != "policy":
            raise ValueError(
                f'old_logprobs = "engine": completions of source = "{self.source}" were not sampled from the current '
                'policy; write old_logprobs = "trainer"'
            )
        if self.old_logprobs == "engine" and (self.tis_cap or self.needs_scores):
            what = "tis_cap" if self.tis_cap else 'a KL in the reward, or credit = "pair",'
            raise ValueError(
                f'old_logprobs = "engine": {what} needs the trainer\'s log-probabilities; '
                'write old_logprobs = "trainer"'
            )
        if self.source == "dataset" and self.dynamic_sampling_rounds:
            raise ValueError(
                f'dynamic_sampling_rounds = {self.dynamic_sampling_rounds}: source = "dataset" samples nothing; write '
                "dynamic_sampling_rounds = 0"
            )
        if self.source == "dataset" and self.credit != "pair" and self.baseline != "indicator":
            raise ValueError(
                f'baseline = "{self.baseline}": every completion of source = "dataset" is correct, so there is nothing '
                'to compare; write method.name = "sft", or baseline = "indicator"'
            )
        if self.baseline == "indicator" and self.scale != "none":
            raise ValueError(f'scale = "{self.scale}" with baseline = "indicator": write scale = "none"')
        if self.credit != "pair":
            return
        if self.minibatches > 1:
            raise ValueError(
                f'minibatches = {self.minibatches} with credit = "pair": the coefficients of all pairs come from '
                "the policy before the step; write minibatches = 1 and a smaller sampling.prompts_per_step"
            )
        required = {
            "baseline": "none",
            "scale": "none",
            "surrogate": "log-likelihood",
            "ratio": "token",
            "kl_coef": 0.0,
        }
        for name, value in required.items():
            if getattr(self, name) != value:
                fix = "0" if name == "kl_coef" else f'"{value}"'
                raise ValueError(f'{name} = {getattr(self, name)!r} with credit = "pair": write {name} = {fix}')
        if self.aggregation not in {"sequence-mean", "sequence-sum"}:
            raise ValueError(
                f'aggregation = "{self.aggregation}" with credit = "pair": write "sequence-mean" (log-ratios averaged '
                'over a completion, DeepSeekMath Eq. 12) or "sequence-sum" (summed, the usual DPO)'
            )

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the initial policy is needed: for a KL, for pairs, or to sample from."""
        return self.kl_coef > 0 or self.credit == "pair" or self.source == "initial"

    @property
    def needs_scores(self) -> bool:
        """Whether advantages need log-probabilities of policy and reference: for a KL in the reward, or for pairs."""
        return self.kl_in_reward or self.credit == "pair"

    @property
    def needs_critic(self) -> bool:
        """Whether advantages need a value model (PPO's critic)."""
        return self.credit == "value"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL is a term of the loss."""
        return self.kl_coef > 0 and self.kl_estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL is subtracted from the reward."""
        return self.kl_coef > 0 and self.kl_estimator == "k1"


class Critic(Section):
    """The value model (PPO's critic, `method.credit = "value"`). Other methods have no critic."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Initial weights, as in model.name. Default: the policy's initial weights. The value head starts at 0."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate after warm-up. Warm-up, schedule and everything else are as in [optimizer]."""
    clip: Annotated[float, Field(ge=0)] = 0.2
    """Clip range of the value loss: how far a value may move from its value at sampling time before its loss stops
    decreasing. 0 turns clipping off."""
    gamma: Fraction = 1.0
    """γ: discount factor per token."""
    gae_lambda: Fraction = 0.95
    """λ of generalized advantage estimation (GAE): 1 compares full returns with values, 0 looks one token ahead."""
