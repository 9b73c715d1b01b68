"""Sampling over several turns: the model writes, an environment answers, the model continues.

All trajectories of a step advance together, or as many as there may be environments at a time. Each turn is one call of
the engine for the trajectories that are not finished. Sampled token ids are kept unchanged. An observation's tokens are
appended with mask False and log-probability 0. A token that runs past the stop string of a turn was sampled, so it is
kept, and the observation follows it.

The first turn of a completion has the random stream that it would have without an environment. The streams of later
turns extend its key by the number of the turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Environment as Settings
from gruppo.data.tokenization import ToolTexts
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.rollout.chat_rendering import ChatRenderer, tool_texts
from gruppo.rollout.environments.client import (
    Answer,
    Elsewhere,
    EnvironmentHandle,
    Environments,
    open_environments,
)
from gruppo.rollout.episodes import ROLLOUT_FUNC, Episodes, Opened, RecordedFunction
from gruppo.rollout.trajectory import Trajectory
from gruppo.types import Completion, FinishReason, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 6  # extends the key of a random stream to that of an environment's seed
_MAX_IGNORED_STOPS = 16  # per completion; after that, stop strings are ignored until the model ends its turn


class MultiTurnSampler(Episodes):
    """Samples completions of several turns, in place of `gruppo.rollout.sampling.sample_groups`.

    `weight`: weight of the environment's reward, None if it gives none.
    """

    def __init__(self, environments: Environments, dialogue: ChatRenderer, turns: int, weight: float = 1.0) -> None:
        self.environments, self.dialogue, self.turns = environments, dialogue, turns
        self.weight = weight if environments.gives_reward else None
        self._opened = 0

    def play(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        streams: Sequence[Sequence[tuple[int, ...]]],
        options: SamplingParams,
        progress: Progress,
        stop: Stop,
        label: str = "Sampling",
    ) -> tuple[list[Prompt], list[list[Completion]]]:
        """Sample one completion per random stream for every prompt. Returns the prompts and their completions.

        The first observation of an environment is appended to the prompt. If the first observations of a group differ,
        the prompt ends where they begin, and the rest is at the start of each completion. `options.max_tokens` is the
        most tokens of a completion beyond the prompt of the row, observations included. An observation that does not
        fit ends the completion with "length". A completion whose environment fails ends there; its episode says why.
        """
        groups = [
            [
                Trajectory(
                    tuple(key),
                    self._new_handle(prompt, tuple(keys[0])),
                    template_options=prompt.template_options,
                )
                for key in keys
            ]
            for prompt, keys in zip(prompts, streams, strict=True)
        ]
        with progress.bar(label, sum(map(len, groups)) * options.max_tokens, "tokens") as show:

            def advance(tokens: float) -> None:
                stop.check()
                show(tokens)

            def tick() -> None:
                advance(0)

            started: list[Prompt] = []
            try:
                for wave in _waves([len(group) for group in groups], self.environments.most):
                    started += self._reset_environments(prompts[wave], groups[wave], options, tick)
                    trajectories = [trajectory for group in groups[wave] for trajectory in group]
                    while active := [trajectory for trajectory in trajectories if trajectory.finish is None]:
                        self._sample_turn(engine, active, options, advance)
                        self._step_environments([one for one in active if one.finish is None], tick)
                    self._collect_rewards(trajectories, tick)
            finally:
                self.environments.drop()
        return started, [[trajectory.completion() for trajectory in group] for group in groups]

    def notify_of_restarts(self, notify: Callable[[str], None]) -> None:
        """See `Episodes`."""
        self.environments.notify_of_restarts(notify)

    def _new_handle(self, prompt: Prompt, key: tuple[int, ...]) -> EnvironmentHandle:
        """A handle of a new environment. `key`: the first stream of its group, which determines the seed."""
        self._opened += 1
        seed = int(np.random.SeedSequence((*key, _SEED)).generate_state(1)[0])
        return EnvironmentHandle(self._opened, {"prompt": prompt.content, **prompt.columns}, seed)

    def _reset_environments(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Trajectory]],
        options: SamplingParams,
        tick: Callable[[], None],
    ) -> list[Prompt]:
        """Reset all environments. Returns the prompts with the first observations."""
        answers = iter(
            self.environments.answer([trajectory.environment for group in groups for trajectory in group], tick)
        )
        started = []
        for prompt, group in zip(prompts, groups, strict=True):
            answered = [(trajectory, next(answers)) for trajectory in group]
            extended: dict[str, tuple[Prompt, tuple[int, ...]]] = {}  # by first observation
            for trajectory, answer in answered:
                if answer.failure:
                    trajectory.fail(answer.failure)
                    continue
                first = "".join(answer.observations or ())
                if first not in extended:
                    extended[first] = prompt, prompt.token_ids
                    if first:
                        content, ids = self.dialogue.prompt(prompt.content, first, prompt.template_options)
                        extended[first] = replace(prompt, content=content, token_ids=ids), ids
                trajectory.ids = list(extended[first][1])
            shared = common_prefix([ids for _, ids in extended.values()])
            for trajectory in group:
                if trajectory.finish is None and not shared:
                    trajectory.fail(
                        "the prompts of its group, with their first observations, have no common prefix", False
                    )
                self._set_prompt(trajectory, prompt, shared, options.max_tokens)
            whole = next(iter(extended.values()))[0] if len(extended) == 1 else prompt
            started.append(replace(whole, token_ids=shared) if shared else prompt)
        return started

    def _set_prompt(self, trajectory: Trajectory, prompt: Prompt, shared: tuple[int, ...], max_tokens: int) -> None:
        """Split the prompt of a trajectory into the part that its group shares and the rest."""
        rest, trajectory.ids = trajectory.ids[len(shared) :], []
        trajectory.prompt_ids = shared
        trajectory.limit = min(max_tokens, len(prompt.token_ids) + max_tokens - len(shared))
        if trajectory.finish is not None:
            return
        trajectory.append(rest)
        trajectory.turn_start = len(rest)
        if trajectory.room < 1:
            trajectory.ids, trajectory.logprobs, trajectory.mask = [], [], []
            why = f"its first observation leaves no room for an answer (max_tokens = {max_tokens})"
            trajectory.fail(why, environment_lost=False)

    def _accepts_observations(self, trajectory: Trajectory) -> bool:
        """Whether the environment may still answer."""
        return trajectory.turns < self.turns and trajectory.ignored_stops < _MAX_IGNORED_STOPS

    def _sample_turn(
        self, engine: Engine, active: Sequence[Trajectory], options: SamplingParams, advance: Callable[[float], None]
    ) -> None:
        """Sample a turn of each trajectory, or the rest of one. Trajectories with the same tokens so far share a
        request. The engine may keep what it has computed until the next turn, if there can be one."""
        for accepting in (True, False):
            by_prefix: dict[tuple[tuple[int, ...], bool, int, int], list[Trajectory]] = {}
            for trajectory in active:
                if self._accepts_observations(trajectory) == accepting:
                    shared = len(trajectory.prompt_ids)
                    key = trajectory.known, not trajectory.samples, len(trajectory.turn_ids), shared
                    by_prefix.setdefault(key, []).append(trajectory)
            if not by_prefix:
                continue
            stop = (*options.stop, *(self.environments.stop if accepting else ()))
            most = max(trajectory.room for batch in by_prefix.values() for trajectory in batch)
            only_later_turns = all(not first for _, first, *_ in by_prefix)
            min_tokens = 0 if only_later_turns else options.min_tokens
            turn_options = replace(options, stop=stop, max_tokens=most, min_tokens=min_tokens)
            requests = [
                Request(
                    ids,
                    [one.next_stream for one in batch],
                    [one.room for one in batch],
                    written,
                    shared,
                    keep=accepting,
                    continues=not first,
                )
                for (ids, first, written, shared), batch in by_prefix.items()
            ]
            sampled = engine.generate(requests, turn_options, advance)
            for batch, completions in zip(by_prefix.values(), sampled, strict=True):
                for trajectory, completion in zip(batch, completions, strict=True):
                    self._apply_sample(trajectory, completion, options)

    def _apply_sample(self, trajectory: Trajectory, completion: Completion, options: SamplingParams) -> None:
        """Append sampled tokens and check whether the trajectory is finished."""
        trajectory.append(completion.token_ids, completion.sampling_logprobs)
        trajectory.samples, trajectory.version = trajectory.samples + 1, completion.policy_version
        trajectory.turn_ended = completion.token_ids[-1] in self.dialogue.eos_ids
        beyond = self._turn_text(trajectory)[len(completion.text) :]
        by_recipe = completion.text.endswith if options.keep_stop else beyond.startswith
        if completion.finish_reason == "length":
            self._finish(trajectory, "length")
        elif not trajectory.turn_ended and any(map(by_recipe, options.stop)):
            self._finish(trajectory, "stop", len(beyond))
        elif trajectory.turn_ended and not self._accepts_observations(trajectory):
            self._finish(trajectory, "stop")

    def _turn_text(self, trajectory: Trajectory) -> str:
        """The text that the model has written since the last observation."""
        return self.dialogue.text(trajectory.turn_ids, trajectory.before_turn)

    def _finish(self, trajectory: Trajectory, finish: FinishReason, beyond: int = 0) -> None:
        """Finish a trajectory. `beyond`: characters to drop from its text if a stop string of the recipe ended it."""
        text = self._turn_text(trajectory)
        trajectory.texts.append(text[: len(text) - beyond])
        trajectory.finish = finish

    def _step_environments(self, active: Sequence[Trajectory], tick: Callable[[], None]) -> None:
        """Send the sampled turns to the environments and apply their answers."""
        stepped = [trajectory for trajectory in active if self._accepts_observations(trajectory)]
        for trajectory in stepped:
            trajectory.environment.texts.append(self._turn_text(trajectory))
        answers = self.environments.answer([trajectory.environment for trajectory in stepped], tick)
        for trajectory, answer in zip(stepped, answers, strict=True):
            self._apply_observation(trajectory, answer)

    def _apply_observation(self, trajectory: Trajectory, answer: Answer) -> None:
        """Append an observation, or finish the trajectory."""
        trajectory.calls, trajectory.errors = trajectory.calls + answer.calls, trajectory.errors + answer.errors
        if answer.failure is not None:
            trajectory.texts.append(self._turn_text(trajectory))
            trajectory.fail(answer.failure)
            return
        if answer.done or (answer.observations is None and trajectory.turn_ended):
            trajectory.turns += answer.done
            self._finish(trajectory, "stop")
            return
        if answer.observations is None:
            trajectory.ignored_stops += 1
            return
        trajectory.turns += 1
        as_message = trajectory.turn_ended and not isinstance(trajectory.environment.row["prompt"], str)
        if as_message:
            ids = self.dialogue.after(answer.observations, trajectory.known, trajectory.template_options)
        else:
            ids = self.dialogue.within(answer.observations, trajectory.known)
        if len(ids) >= trajectory.room:
            self._finish(trajectory, "length")
            return
        lines = "\n".join(answer.observations)
        observed = f"\n{lines}\n" if as_message else "".join(answer.observations)
        trajectory.texts += [self._turn_text(trajectory), observed]
        trajectory.append(ids)
        trajectory.turn_start, trajectory.turn_ended = len(trajectory.ids), False

    def _collect_rewards(self, trajectories: Sequence[Trajectory], tick: Callable[[], None]) -> None:
        """Get the rewards of finished trajectories and release their environments."""
        remaining = [trajectory for trajectory in trajectories if not trajectory.environment_lost]
        answers = self.environments.end([trajectory.environment for trajectory in remaining], tick)
        for trajectory, answer in zip(remaining, answers, strict=True):
            if trajectory.failure is None:
                trajectory.reward, trajectory.failure = answer.reward, answer.failure


def _waves(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of consecutive groups with at most `most` completions in all; a group with more is a slice of its own."""
    start = 0
    for place in range(len(sizes) + 1):
        if place == len(sizes) or (place > start and sum(sizes[start : place + 1]) > most):
            if place > start:
                yield slice(start, place)
            start = place


def common_prefix(lists: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest prefix of all lists."""
    if not lists:
        return ()
    least = min(map(len, lists))
    return lists[0][: next((place for place in range(least) if len({ids[place] for ids in lists}) > 1), least)]


@dataclass(frozen=True)
class OpenedEnvironments:
    """See `Opened`."""

    environments: Environments
    settings: Settings

    def tools(self, tokenizer: PreTrainedTokenizerBase) -> ToolTexts | None:
        """The description of their tools in prompts, for `gruppo.data.tokenization.tokenize_part`."""
        return tool_texts(tokenizer, self.environments.schemas)

    @property
    def gives_reward(self) -> bool:
        """See `Opened`."""
        return self.environments.gives_reward

    @property
    def digests(self) -> list[str]:
        """See `Opened`."""
        return self.environments.digests

    def episodes(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompts: Iterable[Prompt]
    ) -> MultiTurnSampler:
        """A sampler that uses the environments. Raises UsageError if prompts are conversations and the model's chat
        template cannot continue one."""
        dialogue = ChatRenderer(tokenizer, eos_ids, self.tools(tokenizer))
        if chat := next((prompt for prompt in prompts if not isinstance(prompt.content, str)), None):
            dialogue.check(chat.template_options)
        return MultiTurnSampler(self.environments, dialogue, self.settings.turns, self.settings.weight)


def open_multi_turn(
    recipe: Recipe,
    log: Path | None,
    progress: Progress,
    stack: ExitStack,
    played: bool = True,
    elsewhere: Elsewhere | None = None,
) -> Opened | None:
    """Start the environments of a recipe; None if it has none. `stack` closes them.

    `log`: file for the output of the environment class; `played`: False if nothing will be sampled;
    `elsewhere`: see `open_environments`. Raises UsageError if the environments cannot run there.
    """
    settings = recipe.environment
    if settings is None:
        return None
    if settings.name == ROLLOUT_FUNC and not played:
        return RecordedFunction()
    environments = open_environments(settings, recipe.reward.environment, log, progress, played, elsewhere)
    stack.callback(environments.close)
    return OpenedEnvironments(environments, settings)
