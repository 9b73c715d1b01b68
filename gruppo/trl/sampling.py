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
from gruppo.engines import build_engine
from gruppo.engines.base import Engine, SamplingParams
from gruppo.engines.native.engine import choose_slots
from gruppo.models.loading import find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.rollout.episodes import Episodes, Opened
from gruppo.rollout.sampling import sample_groups
from gruppo.rollout.scoring import score_groups
from gruppo.rollout.workers.rewards import Rewards
from gruppo.types import Group, Row
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

_EVALUATION = 7  # marks the random streams of evaluate()


@dataclass(frozen=True)
class Sampler:
    """A policy, and what samples from it. `episodes`: in place of single turns, with an environment."""

    policy: LanguageModel
    engine: Engine
    params: SamplingParams
    episodes: Episodes | None

    @classmethod
    def loaded(
        cls, recipe: Recipe, model: tuple[Any, Any] | None, opened: Opened | None, progress: Progress
    ) -> Sampler:
        """A sampler from the model of a recipe, or from a model in memory with its tokenizer, as it is."""
        name, tokenizer = model or (recipe.model.name, None)
        source = find_model(name, progress, tokenizer, recipe.model.trust_remote_code)
        policy = load_model(source, recipe.model.device, recipe.model.dtype, progress, recipe.model.attention)
        settings = recipe.sampling
        stop = tuple(settings.stop)
        params = SamplingParams(settings.temperature, settings.max_tokens, stop=stop, keep_stop=bool(stop))
        wanted = settings.prompts_per_step * settings.group_size
        engine = build_engine(policy, choose_slots(policy, policy.context, settings.max_tokens, wanted))
        episodes = opened.episodes(policy.tokenizer, policy.eos_ids, ()) if opened else None
        return cls(policy, engine, params, episodes)

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
        if self.episodes is not None:
            prompts, completions = self.episodes.play(
                self.engine, prompts, streams, self.params, progress, stop, "Evaluating"
            )
        else:
            completions = sample_groups(self.engine, prompts, streams, self.params, progress, stop, "Evaluating")
        self.engine.sleep()
        return score_groups(prompts, completions, pool, state, Metrics(), progress, stop, weight)
