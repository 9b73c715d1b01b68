"""The state of a completion that is sampled over several turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gruppo.rollout.environments.client import EnvironmentHandle
from gruppo.types import Completion, Episode, FinishReason

_TURN = 5  # marks the random streams of turns after the first


@dataclass(eq=False)
class Trajectory:
    """A completion in progress.

    `stream`: key of the random stream of its first turn. `prompt_ids`: the prompt that its group shares; if the prompts
    of a group differ, the rest of its own prompt is at the start of `ids`. `limit`: most tokens of `ids`.
    `turn_start`: index in `ids` at which the turn begins that the environment has not answered yet. `template_options`:
    those of its prompt.
    """

    stream: tuple[int, ...]
    environment: EnvironmentHandle
    prompt_ids: tuple[int, ...] = ()
    limit: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    turn_start: int = 0
    texts: list[str] = field(default_factory=list)
    samples: int = 0  # how often the engine has continued it
    turns: int = 0
    calls: int = 0
    errors: int = 0
    ignored_stops: int = 0  # stop strings after which the environment had no observation
    version: int = 0
    turn_ended: bool = False  # the last token is an EOS token, with which the model ended its turn
    finish: FinishReason | None = None
    failure: str | None = None
    environment_lost: bool = False  # the environment no longer exists
    reward: float | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Tokens that may still follow."""
        return self.limit - len(self.ids)

    @property
    def known(self) -> tuple[int, ...]:
        """Its prompt and all of its tokens so far."""
        return (*self.prompt_ids, *self.ids)

    @property
    def before_turn(self) -> tuple[int, ...]:
        """The tokens before `turn_ids`."""
        return (*self.prompt_ids, *self.ids[: self.turn_start])

    @property
    def turn_ids(self) -> list[int]:
        """Tokens that the model has sampled since the last observation, without the EOS token."""
        ids = self.ids[self.turn_start :]
        return ids[:-1] if self.turn_ended else ids

    @property
    def next_stream(self) -> tuple[int, ...]:
        """Key of the random stream of the next turn."""
        return (*self.stream, _TURN, self.samples) if self.samples else self.stream

    def append(self, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Append token ids: sampled ones with their log-probabilities, or those of an observation without."""
        self.ids += token_ids
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs
        self.mask += [logprobs is not None] * len(token_ids)

    def fail(self, why: str, environment_lost: bool = True) -> None:
        """End it with an unknown reward."""
        self.failure, self.finish, self.environment_lost = why, "stop", environment_lost

    def completion(self) -> Completion:
        """The finished completion."""
        assert self.finish is not None
        return Completion(
            token_ids=tuple(self.ids),
            sampling_logprobs=tuple(self.logprobs),
            mask=tuple(self.mask),
            finish_reason=self.finish,
            policy_version=self.version,
            text="".join(self.texts),
            episode=Episode(self.turns, self.calls, self.errors, self.reward, self.failure),
        )
