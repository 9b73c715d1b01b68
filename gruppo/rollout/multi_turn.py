"""Sampling over several turns: the model writes, an environment answers, the model goes on.

All completions of a step go on together (or as many as there may be environments at a time): each turn is one call of
the engine over those that are not over. Sampled
token ids stay as they were drawn; those of an answer are appended, with mask False and 0 for a log-probability. Tokens
that ran on past the text that ended a turn were sampled, so they stay, and the answer follows them.

The first turn of a completion has the random stream that it would have without an environment; later ones have its key
and the number of the turn behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Environment as Settings
from gruppo.data.tokenization import ToolTexts
from gruppo.engines.base import Engine, Request, SamplingParams
from gruppo.rollout.chat_rendering import ChatRenderer, tool_texts
from gruppo.rollout.environments.client import Answer, EnvironmentHandle, Environments, open_environments
from gruppo.types import Completion, Episode, FinishReason, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TURN, _SEED = 5, 6  # what keys of random streams of later turns, and of an environment's seed, go on with
_STOPS_IN_VAIN = 16  # in a completion, after which its turns are no longer looked at until the model ends them


@dataclass(eq=False)
class Trajectory:
    """A completion under way. `ids` begin with what its own prompt has beyond the one that its group shares; `since`:
    where the turn began that the environment has not answered yet."""

    stream: tuple[int, ...]
    play: EnvironmentHandle
    shared: tuple[int, ...] = ()
    limit: int = 0
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    since: int = 0
    texts: list[str] = field(default_factory=list)
    draws: int = 0
    turns: int = 0
    calls: int = 0
    errors: int = 0
    in_vain: int = 0
    version: int = 0
    ended: bool = False  # the model ended its turn by an end token
    finish: FinishReason | None = None
    failure: str | None = None
    lost: bool = False  # its environment is no longer there
    reward: float | None = None

    @property
    def room(self) -> int:
        return self.limit - len(self.ids)

    def append(self, token_ids: Sequence[int], logprobs: Sequence[float] | None = None) -> None:
        """Put token ids behind the others: sampled ones with their log-probabilities, or an environment's."""
        self.ids += token_ids
        self.logprobs += [0.0] * len(token_ids) if logprobs is None else logprobs
        self.mask += [logprobs is not None] * len(token_ids)

    def fail(self, why: str, lost: bool = True) -> None:
        """It is over, and its reward is not known."""
        self.failure, self.finish, self.lost = why, "stop", lost

    def completion(self) -> Completion:
        """As it is now that it is over."""
        assert self.finish is not None
        told = Episode(self.turns, self.calls, self.errors, self.reward, self.failure)
        return Completion(
            token_ids=tuple(self.ids),
            sampling_logprobs=tuple(self.logprobs),
            mask=tuple(self.mask),
            finish_reason=self.finish,
            policy_version=self.version,
            text="".join(self.texts),
            episode=told,
        )


class MultiTurnSampler:
    """What samples completions of several turns, in the place of `gruppo.rollout.sampling.sample_groups`. `weight`: of the
    environment's reward; None where it gives none."""

    def __init__(self, environments: Environments, dialogue: ChatRenderer, turns: int, weight: float = 1.0) -> None:
        self.environments, self.dialogue, self.turns = environments, dialogue, turns
        self.weight = weight if environments.gives_reward else None
        self._numbers = 0

    def sample(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        streams: Sequence[Sequence[tuple[int, ...]]],
        options: SamplingParams,
        progress: Progress,
        stop: Stop,
        label: str = "Sampling",
    ) -> list[list[Completion]]:
        """Completions of every prompt, one for each of its streams; see `play`, which also gives the prompts as they
        were with what environments said first."""
        return self.play(engine, prompts, streams, options, progress, stop, label)[1]

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
        """Prompts and their completions.

        What an environment says first ends the prompt; where the completions of a group were told different things, the
        prompt ends where these begin, and the rest begins each completion. `options.max_tokens` is the most tokens of a
        completion with all that was said in it, beyond the prompt of the row: an answer that does not fit ends it with
        "length". A completion whose environment fails ends there; its episode says why.
        """
        groups = [
            [Trajectory(tuple(key), self._play(prompt, tuple(keys[0]))) for key in keys]
            for prompt, keys in zip(prompts, streams, strict=True)
        ]
        with progress.bar(label, sum(map(len, groups)) * options.max_tokens, "tokens") as show:

            def advance(tokens: float) -> None:
                stop.check()
                show(tokens)

            def tick() -> None:
                advance(0)

            begun: list[Prompt] = []
            try:
                for wave in _waves([len(group) for group in groups], self.environments.most):
                    begun += self._begin(prompts[wave], groups[wave], options, tick)
                    own = [course for group in groups[wave] for course in group]
                    while going := [course for course in own if course.finish is None]:
                        self._draw(engine, going, options, advance)
                        self._answer([course for course in going if course.finish is None], tick)
                    self._end(own, tick)
            finally:
                self.environments.drop()
        return begun, [[course.completion() for course in group] for group in groups]

    def close(self) -> None:
        """End the processes of the environments."""
        self.environments.close()

    def _play(self, prompt: Prompt, key: tuple[int, ...]) -> EnvironmentHandle:
        """The environment of a completion, which has its group's seed."""
        self._numbers += 1
        seed = int(np.random.SeedSequence((*key, _SEED)).generate_state(1)[0])
        return EnvironmentHandle(self._numbers, {"prompt": prompt.content, **prompt.columns}, seed)

    def _begin(
        self,
        prompts: Sequence[Prompt],
        groups: Sequence[Sequence[Trajectory]],
        options: SamplingParams,
        tick: Callable[[], None],
    ) -> list[Prompt]:
        """Reset all environments; the prompts with what these said."""
        answers = iter(self.environments.answer([course.play for group in groups for course in group], tick))
        made = []
        for prompt, group in zip(prompts, groups, strict=True):
            told = [(course, next(answers)) for course in group]
            whole: dict[str, tuple[Prompt, tuple[int, ...]]] = {}
            for course, answer in told:
                if answer.failure:
                    course.fail(answer.failure)
                    continue
                said = "".join(answer.observations or ())
                if said not in whole:
                    content, ids = self.dialogue.prompt(prompt.content, said) if said else ("", prompt.token_ids)
                    whole[said] = (replace(prompt, content=content, token_ids=ids) if said else prompt), ids
                course.ids = list(whole[said][1])
            shared = _common([ids for _, ids in whole.values()])
            for course in group:
                if course.finish is None and not shared:
                    course.fail("the prompts of its group, with what is said first, have no beginning in common", False)
                self._seat(course, prompt, shared, options.max_tokens)
            one = next(iter(whole.values()))[0] if len(whole) == 1 else prompt
            made.append(replace(one, token_ids=shared) if shared else prompt)
        return made

    def _seat(self, course: Trajectory, prompt: Prompt, shared: tuple[int, ...], max_tokens: int) -> None:
        """Divide what a completion begins with into the group's prompt and its own beginning."""
        own, course.ids = course.ids[len(shared) :], []
        course.shared = shared
        course.limit = min(max_tokens, len(prompt.token_ids) + max_tokens - len(shared))
        if course.finish is not None:
            return
        course.append(own)
        course.since = len(own)
        if course.room < 1:
            course.ids, course.logprobs, course.mask = [], [], []
            course.fail(f"what it says first leaves no room for an answer (max_tokens = {max_tokens})", lost=False)

    def _asks(self, course: Trajectory) -> bool:
        """Whether the environment may still answer."""
        return course.turns < self.turns and course.in_vain < _STOPS_IN_VAIN

    def _draw(
        self, engine: Engine, going: Sequence[Trajectory], options: SamplingParams, advance: Callable[[float], None]
    ) -> None:
        """A turn of each completion, or what is left of one. Those that stand at the same tokens share them."""
        for asks in (True, False):
            alike: dict[tuple[tuple[int, ...], bool], list[Trajectory]] = {}
            for course in going:
                if self._asks(course) == asks:
                    alike.setdefault(((*course.shared, *course.ids), not course.draws), []).append(course)
            if not alike:
                continue
            stop = (*options.stop, *(self.environments.stop if asks else ()))
            most = max(course.room for own in alike.values() for course in own)
            later = all(not first for _, first in alike)
            own = replace(options, stop=stop, max_tokens=most, min_tokens=0 if later else options.min_tokens)
            requests = [
                Request(ids, [_key(course) for course in each], [course.room for course in each])
                for (ids, _), each in alike.items()
            ]
            for each, drawn in zip(alike.values(), engine.generate(requests, own, advance), strict=True):
                for course, completion in zip(each, drawn, strict=True):
                    self._take(course, completion, options)

    def _take(self, course: Trajectory, completion: Completion, options: SamplingParams) -> None:
        """Append what was drawn, and see whether the completion is over."""
        course.append(completion.token_ids, completion.sampling_logprobs)
        course.draws, course.version = course.draws + 1, completion.policy_version
        course.ended = completion.token_ids[-1] in self.dialogue.eos_ids
        drawn = completion.token_ids[:-1] if course.ended else completion.token_ids
        beyond = self.dialogue.text(drawn)[len(completion.text) :]
        if completion.finish_reason == "length":
            self._over(course, "length")
        elif not course.ended and any(beyond.startswith(text) for text in options.stop):
            self._over(course, "stop", len(beyond))
        elif course.ended and not self._asks(course):
            self._over(course, "stop")

    def _turn(self, course: Trajectory) -> str:
        """What the model has written since the environment answered."""
        ids = course.ids[course.since :]
        return self.dialogue.text(ids[:-1] if course.ended else ids)

    def _over(self, course: Trajectory, finish: FinishReason, beyond: int = 0) -> None:
        """End a completion; of its text the last letters are not kept, where a text of the recipe's ended it."""
        text = self._turn(course)
        course.texts.append(text[: len(text) - beyond])
        course.finish = finish

    def _answer(self, asking: Sequence[Trajectory], tick: Callable[[], None]) -> None:
        """Let the environments answer to the turns that were made."""
        asking = [course for course in asking if self._asks(course)]
        for course in asking:
            ids = course.ids[course.since :]
            course.play.texts.append(self.dialogue.heard(ids[:-1] if course.ended else ids))
        answers = self.environments.answer([course.play for course in asking], tick)
        for course, answer in zip(asking, answers, strict=True):
            self._hear(course, answer)

    def _hear(self, course: Trajectory, answer: Answer) -> None:
        """Go on with an answer, or end."""
        course.calls, course.errors = course.calls + answer.calls, course.errors + answer.errors
        if answer.failure is not None:
            course.texts.append(self._turn(course))
            course.fail(answer.failure)
            return
        if answer.done or (answer.observations is None and course.ended):
            course.turns += answer.done
            self._over(course, "stop")
            return
        if answer.observations is None:
            course.in_vain += 1
            return
        course.turns += 1
        message = course.ended and not isinstance(course.play.row["prompt"], str)
        say = self.dialogue.after if message else self.dialogue.within
        ids = say(answer.observations)
        if len(ids) >= course.room:
            self._over(course, "length")
            return
        said = "\n".join(answer.observations)
        course.texts += [self._turn(course), f"\n{said}\n" if message else "".join(answer.observations)]
        course.append(ids)
        course.since, course.ended = len(course.ids), False

    def _end(self, courses: Sequence[Trajectory], tick: Callable[[], None]) -> None:
        """Ask for the rewards, and let go of the environments."""
        over = [course for course in courses if not course.lost]
        for course, answer in zip(over, self.environments.end([course.play for course in over], tick), strict=True):
            if course.failure is None:
                course.reward, course.failure = answer.reward, answer.failure


def _waves(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Stretches of groups with `most` completions together, or a single group where that alone has more."""
    start = 0
    for place in range(len(sizes) + 1):
        if place == len(sizes) or (place > start and sum(sizes[start : place + 1]) > most):
            if place > start:
                yield slice(start, place)
            start = place


def _key(course: Trajectory) -> tuple[int, ...]:
    """The random stream of a completion's next turn."""
    return (*course.stream, _TURN, course.draws) if course.draws else course.stream


def _common(lists: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all begin with."""
    if not lists:
        return ()
    least = min(map(len, lists))
    return lists[0][: next((place for place in range(least) if len({ids[place] for ids in lists}) > 1), least)]


@dataclass(frozen=True)
class OpenedEnvironments:
    """The environments of a recipe before its model is loaded."""

    environments: Environments
    settings: Settings

    def tools(self, tokenizer: PreTrainedTokenizerBase) -> ToolTexts | None:
        """What prompts have to say of them, for `gruppo.data.tokenization.tokenize_part`."""
        return tool_texts(tokenizer, self.environments.schemas)

    def episodes(
        self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompts: Iterable[Prompt]
    ) -> MultiTurnSampler:
        """What samples with them. Raises UsageError where the model's chat template cannot go on with a conversation,
        and the prompts are some."""
        dialogue = ChatRenderer(tokenizer, eos_ids, self.tools(tokenizer))
        if any(not isinstance(prompt.content, str) for prompt in prompts):
            dialogue.check()
        return MultiTurnSampler(self.environments, dialogue, self.settings.turns, self.settings.weight)


def open_multi_turn(
    recipe: Recipe, log: Path | None, progress: Progress, stack: ExitStack, played: bool = True
) -> OpenedEnvironments | None:
    """Start the environments of a recipe, which `stack` closes; None where it has none. `log`: a file for what a class
    prints; `played`: False where nothing is sampled. Raises UsageError."""
    settings = recipe.environment
    if settings is None:
        return None
    environments = open_environments(settings, recipe.reward.environment, log, progress, played)
    stack.callback(environments.close)
    return OpenedEnvironments(environments, settings)
