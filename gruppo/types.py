"""The data types that flow through gruppo, in the order in which they are created.

    tasks -> Prompt -> engine -> Completion -> rewards -> Reward -> rollout -> Group -> packing -> Batch -> loss

Symbols used in the shapes of all modules:
    B  batch rows             P  prompts per step         H  hidden size
    T  packed tokens          G  completions per group    V  vocabulary size
    N  completion tokens of a batch (the tokens that a loss is computed on)

Log-probabilities, all natural logarithms (nats):
    logprobs           of the policy being trained (π_θ)
    old_logprobs       of the policy that sampled, computed by the trainer (π_old)
    sampling_logprobs  of the policy that sampled, recorded by the engine while sampling
    ref_logprobs       of the reference (π_ref)

The entry of a per-token tensor at position t belongs to token t itself, not to the next token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Message = dict[str, Any]


Row = dict[str, Any]


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt of the task, tokenized.

    `content`: the text or the messages of the row. `token_ids`: the tokens that engine and loss see. `columns`: all
    other columns of the row, passed to rewards and graders by name. `template_options`: what the chat template gets
    besides the messages. `ending`: the text of the last few tokens, special tokens included, which shows what a chat
    template puts before the answer; "" if unknown.
    """

    id: str
    content: str | list[Message]
    token_ids: tuple[int, ...]
    task: str
    columns: Mapping[str, Any]
    template_options: Mapping[str, Any] = field(default_factory=dict)
    ending: str = ""

    @property
    def text(self) -> str:
        """The prompt for a human reader: the text itself, or the content of the last message."""
        return self.content if isinstance(self.content, str) else str(self.content[-1].get("content") or "")


@dataclass(frozen=True, slots=True)
class Episode:
    """What the environment reports about a completion.

    `turns`: number of its answers. `calls`: tools or Python blocks that the model called, of which `errors` failed.
    `reward`: the reward of the environment, None if it gives none. `failure`: why the environment could not continue or
    not give a reward, in words. `columns`: what reward functions get for this completion by name, besides the columns
    of its prompt; "completion_ids" is in place of its token ids.
    """

    turns: int = 0
    calls: int = 0
    errors: int = 0
    reward: float | None = None
    failure: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion, as token ids.

    `mask`: False for tokens that were not sampled (tool output). They carry no loss, and their sampling log-probability
    is a placeholder (0). Sampling log-probabilities that are not known are NaN. `finish_reason`: "stop" if the model
    finished (the EOS token is the last of `token_ids`), "length" if the completion was truncated at the maximum length.
    It comes from the engine, never from a search for padding ids. `episode`: set only with an environment.
    """

    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    mask: tuple[bool, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str
    episode: Episode | None = None

    def staleness(self, step: int) -> int:
        """How many updates lie between the weights that sampled it and those that `step` trains."""
        return step - 1 - self.policy_version


class Steps(NamedTuple):
    """Rewards of the steps of a completion, and the token (from 0, increasing) on which each step ends."""

    rewards: tuple[float, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one completion.

    `total`: the weighted sum of `parts`, or None if the completion is excluded. `parts`: rewards by function name; None
    if the function returned None ("does not apply"). `steps`: step rewards by function name; with step rewards only,
    `total` is 0. `failure`: why there is no usable reward, in words. `failures`: reasons by the name of the functions
    that failed. A failure is never converted to a number. `printed`: what each function printed while it scored the
    group of the completion.
    """

    total: float | None
    parts: Mapping[str, float | None]
    failure: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, Steps] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    printed: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """A prompt with its G completions and rewards, and the inputs of the loss that the method adds.

    `trained[i]`: whether completion i takes part in the objective (its reward is known and it is not masked).
    `advantages[i]`: Â of completion i, one value per token. `entropy[i]`: of the policy before the step, in nats.
    `values[i]`: predictions of the value model for the state before each token of completion i, and for the state after
    the last one. `returns[i]`: targets of these values, one per token. Both are set only with a value model.
    `skipped`: why the group has no gradient, in words, or None.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Sequence[Reward]
    trained: list[bool] = field(default_factory=list)
    advantages: list[list[float]] = field(default_factory=list)
    old_logprobs: list[list[float] | None] = field(default_factory=list)
    ref_logprobs: list[list[float] | None] = field(default_factory=list)
    entropy: list[list[float] | None] = field(default_factory=list)
    values: list[list[float] | None] = field(default_factory=list)
    returns: list[list[float] | None] = field(default_factory=list)
    skipped: str | None = None

    @property
    def has_nonzero_advantage(self) -> bool:
        """Whether any token of a trained completion has a nonzero advantage."""
        return any(any(row) for row, used in zip(self.advantages, self.trained, strict=True) if used)
