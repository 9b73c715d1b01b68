"""The tables [method] and [critic]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gruppo.config.methods import METHODS
from gruppo.config.sections import SURROGATES, Fraction, Section
from gruppo.errors import nearest


class Method(Section):
    """The objective. A method is a row of defaults for the other fields; what a recipe writes itself goes first."""

    name: str = "grpo"
    """A row of gruppo.config.methods.METHODS (`gruppo methods` prints them): sft, rft, online-rft, dpo, ppo, grpo,
    grpo-process, dr-grpo, dapo, gspo, cispo, rloo, reinforce-pp."""
    source: Literal["policy", "initial", "dataset"] = "policy"
    """Where completions come from: the policy of the step, the start model, or the rows of the task."""
    baseline: Literal["group", "leave-one-out", "batch", "none", "indicator"] = "group"
    """What is taken off a reward: the mean of its group, of the others of its group, of the whole step, or nothing;
    "indicator" puts 1 for a right completion and 0 for any other in its place."""
    scale: Literal["group", "batch", "none"] = "group"
    """The standard deviation that an advantage is divided by: its group's, the whole step's, or none."""
    credit: Literal["completion", "token", "step", "pair", "value"] = "completion"
    """What a signal is of: a completion's reward; of each token, with the KL penalty in the reward where it arises; of
    steps, by rewards that judge them, with outcome rewards beside; of pairs of a right and a wrong completion of a
    question (DPO); or of each token, compared with what a value model expects (PPO, see [critic])."""
    success_threshold: float = 0.5
    """A completion is right if its reward is more than this: for "indicator" and pairs."""
    deduplicate: bool = False
    """Leave out completions of a question that repeat an earlier one's text."""
    max_per_prompt: Annotated[int, Field(ge=0)] = 0
    """At most so many right completions of a question, or pairs, are used, the first ones; 0 is all."""
    dpo_beta: Annotated[float, Field(gt=0)] = 0.1
    """β of DPO: how strongly a pair's log-ratios to the reference are told apart."""
    ratio: Literal["token", "sequence"] = "token"
    """π_θ/π_old of each token, or of the whole completion (geometric mean of its tokens')."""
    surrogate: Annotated[str, Field(min_length=1)] = "clipped"
    """The policy term: "clipped" (Eq. 3), "clipped-weight" (detached clipped ratio times log π), "log-likelihood"
    (log π alone), or "package.module:function" in the signature of those in gruppo.algorithms.losses."""
    aggregation: Literal["sequence-mean", "sequence-sum", "group-token-mean", "token-mean", "constant"] = (
        "sequence-mean"
    )
    """How tokens are averaged: within each completion (Eq. 3), not at all, over the tokens of a group, over those of
    the step, or summed and divided by max_tokens; then over completions and groups."""
    clip_low: Fraction = 0.2
    """ε of the lower clip: the probability ratio is clipped from below at 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """ε of the upper clip: the probability ratio is clipped from above at 1 + clip_high."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.04
    """β, the weight of the KL term; 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL: "k3" (the paper's Eq. 4) and "k2" (½ log²) stand in the loss; "k1" (log π_old/π_ref) has no
    expected gradient there and is taken off the reward."""
    old_logprobs: Literal["trainer", "engine"] = "trainer"
    """Where π_old comes from: the trainer computes it in the first update of a step, or the engine's sampling
    log-probabilities are taken as they are."""
    tis_cap: Annotated[float, Field(ge=0)] = 0.0
    """Truncated importance sampling: tokens are weighted by π_old of the trainer over that of the engine, at most
    this; 0 is off."""
    inner_updates: Annotated[int, Field(ge=1)] = 1
    """μ, optimizer updates on each step's completions."""
    mask_truncated: bool = False
    """Treat a completion that was cut at max_tokens as if it had not been sampled."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    """How often a step draws other questions for its groups without signal, which are dropped; 0 keeps them."""

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
                f'credit = "{self.credit}" gives each token its own signal, which baseline = "{self.baseline}" and '
                f'scale = "{self.scale}" do not know; write "batch" or "none" for both, or credit = "completion"'
            )
        if self.baseline == "none" and self.scale == "group":
            raise ValueError(
                'scale = "group" with baseline = "none" would leave groups of equal rewards unscaled beside others; '
                'write scale = "batch" or "none"'
            )
        if self.surrogate == "log-likelihood" and self.inner_updates > 1:
            raise ValueError(
                f'inner_updates = {self.inner_updates}: surrogate = "log-likelihood" has no ratio that corrects for '
                'a policy that has moved; write inner_updates = 1, or surrogate = "clipped"'
            )
        if self.credit == "step" and (self.baseline, self.scale) != ("group", "group"):
            raise ValueError(
                f'credit = "step" normalises within the group; baseline = "{self.baseline}", scale = "{self.scale}": '
                'write "group" for both'
            )
        if self.credit == "step" and self.dynamic_sampling_rounds:
            raise ValueError(
                f"dynamic_sampling_rounds = {self.dynamic_sampling_rounds}: tells groups by the rewards of completions, and "
                'credit = "step" learns from those of steps; write dynamic_sampling_rounds = 0'
            )
        if self.ratio == "sequence" and self.credit in {"token", "step", "value"}:
            raise ValueError('ratio = "sequence" needs one advantage a completion; write credit = "completion"')
        if ":" not in self.surrogate and self.surrogate not in SURROGATES:
            raise ValueError(f'surrogate = "{self.surrogate}": unknown{nearest(self.surrogate, SURROGATES)}')
        return self

    def _source_agrees(self) -> None:
        """Fields that go together with where completions come from, and with pairs. Raises ValueError."""
        if self.source != "policy" and self.tis_cap:
            raise ValueError(
                f'tis_cap = {self.tis_cap}: completions of source = "{self.source}" were not drawn from '
                "the policy; write tis_cap = 0"
            )
        if self.old_logprobs == "engine" and self.source != "policy":
            raise ValueError(
                f'old_logprobs = "engine": completions of source = "{self.source}" were not sampled from the policy; '
                'write old_logprobs = "trainer"'
            )
        if self.old_logprobs == "engine" and (self.tis_cap or self.needs_scores):
            what = "tis_cap" if self.tis_cap else "a KL in the reward, or a pair,"
            raise ValueError(f'old_logprobs = "engine": {what} needs those of the trainer; write "trainer"')
        if self.source == "dataset" and self.dynamic_sampling_rounds:
            raise ValueError(
                f'dynamic_sampling_rounds = {self.dynamic_sampling_rounds}: source = "dataset" samples nothing; write dynamic_sampling_rounds = 0'
            )
        if self.baseline == "indicator" and self.scale != "none":
            raise ValueError(f'scale = "{self.scale}" with baseline = "indicator": write scale = "none"')
        if self.credit != "pair":
            return
        wanted = {"baseline": "none", "scale": "none", "surrogate": "log-likelihood", "ratio": "token", "kl_coef": 0.0}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                fix = "0" if name == "kl_coef" else f'"{value}"'
                raise ValueError(f'{name} = {getattr(self, name)!r} with credit = "pair": write {name} = {fix}')
        if self.aggregation not in {"sequence-mean", "sequence-sum"}:
            raise ValueError(
                f'aggregation = "{self.aggregation}" with credit = "pair": write "sequence-mean" (log-ratios averaged '
                'over a completion, the paper\'s Eq. 12) or "sequence-sum" (summed, as is usual)'
            )

    @property
    def needs_reference(self) -> bool:
        """A frozen copy of the start model is needed: for a KL, for pairs, or to sample from."""
        return self.kl_coef > 0 or self.credit == "pair" or self.source == "initial"

    @property
    def needs_scores(self) -> bool:
        """Log-probabilities of policy and reference are needed before advantages: for a KL in the reward, for pairs."""
        return self.kl_in_reward or self.credit == "pair"

    @property
    def needs_critic(self) -> bool:
        """Advantages come from a value model."""
        return self.credit == "value"

    @property
    def kl_in_loss(self) -> bool:
        """The KL is a term of the loss."""
        return self.kl_coef > 0 and self.kl_estimator != "k1"

    @property
    def kl_in_reward(self) -> bool:
        """The KL is taken off the reward."""
        return self.kl_coef > 0 and self.kl_estimator == "k1"


class Critic(Section):
    """The value model of PPO (`method.credit = "value"`); other methods have none."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Where its weights come from, as model.name; by default the policy's start weights. Its head begins at 0."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    """Learning rate after warm-up; warm-up, schedule and all else are those of [optimizer]."""
    clip: Annotated[float, Field(ge=0)] = 0.2
    """How far a value may move from what it was when the step was sampled before its loss stops to fall; 0 is no
    clipping."""
    gamma: Fraction = 1.0
    """γ, the discount of a reward for each token until it comes."""
    gae_lambda: Fraction = 0.95
    """λ of generalised advantage estimation: 1 compares whole returns with values, 0 looks one token ahead."""
