"""Sampling and scoring the rows of `evaluate()` with the policy of a run, or with a model before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from gruppo.config.recipe import Recipe
from gruppo.data.chat_options import ChatOptions
from gruppo.data.chat_template import end_renderer
from gruppo.data.loading import Dataset, checked_rows
from gruppo.data.tokenization import tokenize_part
from gruppo.engines import NATIVE
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.memory import Free, Sampled, decoding_of, open_engine_within
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device
from gruppo.rollout.episodes import Episodes, Opened
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.scoring import score_groups
from gruppo.rollout.workers.rewards import Rewards
from gruppo.types import Group, Prompt, Row
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

_EVALUATION = 7  # marks the random streams of evaluate()


@dataclass(frozen=True)
class Sampler:
    """A policy, and what samples from it: the engine of a run, or one that is opened for each evaluation within the
    memory budget. `episodes`: in place of single turns, with an environment."""

    policy: LanguageModel
    engine: Engine | Free
    params: SamplingParams
    episodes: Episodes | None

    @classmethod
    def loaded(
        cls, recipe: Recipe, model: tuple[Any, Any] | None, opened: Opened | None, progress: Progress
    ) -> Sampler:
        """A sampler from the model of a recipe, or from a model in memory with its tokenizer, as it is."""
        name, tokenizer = model or (recipe.model.name, None)
        source = find_model(name, progress, tokenizer, recipe.model.trust_remote_code)
        free = Free.now(recipe.run.memory, choose_device(recipe.model.device))
        policy = load_model(source, recipe.model.device, recipe.model.dtype, progress, recipe.model.attention)
        settings = recipe.sampling
        stop = tuple(settings.stop)
        params = SamplingParams(settings.temperature, settings.max_tokens, stop=stop, keep_stop=bool(stop))
        episodes = opened.episodes(policy.tokenizer, policy.eos_ids, ()) if opened else None
        return cls(policy, free, params, episodes)

    def groups(
        self,
        rows: Sequence[Row],
        chat: Mapping[str, Any],
        size: int,
        pool: Rewards,
        state: Mapping[str, Any],
        seed: int,
        progress: Progress,
        opened: Opened | None,
    ) -> list[Group]:
        """`size` scored completions of every row. The same seed gives the same random numbers each time.

        `chat`: variables of the chat template; `state`: becomes `trainer_state`. Raises UsageError for a row that
        cannot be tokenized.
        """
        checked = checked_rows(rows, "eval_dataset")
        part = Dataset("eval_dataset", checked, range(len(checked)), chat=ChatOptions(chat))
        policy, weight = self.policy, self.episodes.weight if self.episodes else None
        tools = opened.tools(policy.tokenizer) if opened else None
        with ExitStack() as stack:
            stack.callback(end_renderer)
            prompts, _ = tokenize_part(part, policy.tokenizer, policy.context, self.params.max_tokens, tools=tools)
        streams = [[(seed, place, number, _EVALUATION) for number in range(size)] for place in range(len(prompts))]
        stop = Stop()
        with ExitStack() as stack:
            engine = self._engine(prompts, size, stack, progress)
            if self.episodes is not None:
                prompts, completions = self.episodes.play(
                    engine, prompts, streams, self.params, progress, stop, "Evaluating"
                )
            else:
                completions = sample_groups(engine, prompts, streams, self.params, progress, stop, "Evaluating")
            engine.sleep()
        return score_groups(prompts, completions, pool, state, Metrics(), progress, stop, weight)

    def _engine(self, prompts: Sequence[Prompt], size: int, stack: ExitStack, progress: Progress) -> Engine:
        """The engine that samples `size` completions of every prompt. `stack` closes it if it is no run's."""
        if not isinstance(self.engine, Free):
            return self.engine
        longest, limit = max(len(prompt.token_ids) for prompt in prompts), self.params.max_tokens
        decoding, turns = decoding_of(self.params), self.episodes is not None
        work = Sampled(len(prompts) * size, len(prompts), longest, limit, decoding, "max_completion_length", turns)
        engine, _ = open_engine_within(self.engine, self.policy, NATIVE, [work], stack, progress)
        return engine
