"""The objects that flow through gruppo, in the order in which they are made.

    tasks -> Prompt -> engine -> Completion -> rewards -> Reward -> rollout -> Group -> packing -> Batch -> loss

Legend of symbols, used in every shape of the project:
    B  batch rows             P  prompts of a step        H  hidden width
    T  packed tokens          G  completions of a group   V  vocabulary
    N  completion tokens of a batch (the tokens that a loss can see)

Words: `logprobs` are those of the policy being trained (π_θ), `old_logprobs` those of the policy that sampled, by
the trainer (π_old), `sampling_logprobs` those that the engine drew from, `ref_logprobs` those of the reference
(π_ref). All are natural logarithms (nats). A per-token tensor aligns with its *own* token.
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
    """A question as the model reads it.

    `content` is the text or the messages of the row, `token_ids` what the engine and the loss see, `columns` every
    other column of the row: rewards and graders get them by name.
    """

    id: str
    content: str | list[Message]
    token_ids: tuple[int, ...]
    task: str
    columns: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The question for a human reader: the text itself or the last message."""
        return self.content if isinstance(self.content, str) else str(self.content[-1].get("content", ""))


@dataclass(frozen=True, slots=True)
class Episode:
    """What an environment tells of a completion: how often it answered (`turns`), how many tools or blocks of Python
    the model called and how many of those calls failed; its reward, None where it gives none. `failure`: in words, why
    it could not go on, or not judge."""

    turns: int = 0
    calls: int = 0
    errors: int = 0
    reward: float | None = None
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, as token ids. `mask` is False where a token was not sampled (tool output) and carries no loss; its
    sampling log-probability is then no number that means anything (0). `episode`: there with an environment only.

    `finish_reason`: "stop" if the model ended its turn (the end token is the last of `token_ids`), "length" if it
    was cut at the maximum. It comes from the engine, never from looking for a padding id.
    """

    token_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    mask: tuple[bool, ...]
    finish_reason: FinishReason
    policy_version: int
    text: str
    episode: Episode | None = None


class Steps(NamedTuple):
    """Rewards of a completion's steps, and the token (counted from 0) on which each step ends, rising."""

    rewards: tuple[float, ...]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reward:
    """The reward of one completion: `total` is the weighted sum of `parts`, or None if the completion abstains.

    A part is None where its function returned None ("does not apply"). `steps`: what functions that judge steps gave,
    by name; with nothing but steps, `total` is 0. `failure` says in words why nothing usable was given, `failures`
    which functions failed, each with its reason; a failure is never turned into a number.
    """

    total: float | None
    parts: Mapping[str, float | None]
    failure: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, Steps] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """A prompt, its G completions and their rewards; then, from the method, what the loss needs of them.

    `trained[i]`: completion i takes part in the objective (its reward is known and it is not masked).
    `advantages[i]`: Â of completion i, one number a token.
    `values[i]`: by the value model, of the state before each token of completion i and of the one after the last;
    `returns[i]`: what values should have been, one number a token. Both are there with a value model only.
    `skipped`: why the group made no gradient, in words, or None.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Sequence[Reward]
    trained: list[bool] = field(default_factory=list)
    advantages: list[list[float]] = field(default_factory=list)
    old_logprobs: list[list[float] | None] = field(default_factory=list)
    ref_logprobs: list[list[float] | None] = field(default_factory=list)
    values: list[list[float] | None] = field(default_factory=list)
    returns: list[list[float] | None] = field(default_factory=list)
    skipped: str | None = None

    @property
    def has_nonzero_advantage(self) -> bool:
        """True if any token of any trained completion has an advantage other than 0."""
        return any(any(row) for row, used in zip(self.advantages, self.trained, strict=True) if used)
