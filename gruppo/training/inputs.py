"""The prompts, offline completions and evaluation sets of a run, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from gruppo.config.recipe import Recipe
from gruppo.config.sections import RewardModel
from gruppo.data.loading import Dataset
from gruppo.data.mixture import Mixture
from gruppo.data.offline import OfflineCompletions, offline_completions
from gruppo.data.tokenization import ToolTexts, tokenize_part
from gruppo.engines.base import SamplingParams
from gruppo.engines.memory import Sampled, decoding_of
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data
from gruppo.evaluation.sets import EvalSet, make_eval_set
from gruppo.models.loading import ModelSource
from gruppo.rollout.episodes import Opened
from gruppo.training.disk_estimate import eval_set_count
from gruppo.training.memory_estimate import EvalWorkload, Workload
from gruppo.types import Prompt
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run: prompts to train on, evaluation sets and sampling parameters.

    `offline`: the completions that dataset rows bring, by prompt id. `filtered`: rows left out as too long, by task.
    """

    prompts: Mixture
    offline: Mapping[str, OfflineCompletions]
    eval_sets: list[EvalSet]
    sampling: SamplingParams
    filtered: dict[str, int]

    @property
    def questions(self) -> list[Prompt]:
        """The prompts of all evaluation sets."""
        return [prompt for eval_set in self.eval_sets for prompt in eval_set.prompts]

    @property
    def all_prompts(self) -> Iterator[Prompt]:
        """The prompts to train on, then those to evaluate on."""
        return chain(self.prompts, self.questions)


def tokenize_data(
    recipe: Recipe, data: Data, source: ModelSource, progress: Progress, opened: Opened | None = None
) -> RunInputs:
    """Tokenize the prompts and questions of a recipe. Raises UsageError if one does not fit the model or the grader."""
    limit = recipe.sampling.max_tokens
    tokenizer = _Tokenizer(source, progress, opened.tools(source.tokenizer) if opened else None)
    parts = [tokenizer.tokenize(part, limit) for part in data.training]
    offline: dict[str, OfflineCompletions] = {}
    if recipe.method.source == "dataset":
        parts = [
            tokenizer.add_completions(part, prompts, limit, recipe.method.credit == "pair", offline)
            for part, prompts in zip(data.training, parts, strict=True)
        ]
    prompts = Mixture(parts, [task.weight for task in recipe.tasks], recipe.run.seed)
    eval_sets = [make_eval_set(rows, recipe, tokenizer.tokenize, source.tokenizer) for rows in data.eval_sets]
    stop = tuple(recipe.sampling.stop)
    sampling = SamplingParams(recipe.sampling.temperature, limit, stop=stop, keep_stop=bool(stop))
    return RunInputs(prompts, offline, eval_sets, sampling, tokenizer.filtered)


def with_steps(recipe: Recipe, inputs: RunInputs, progress: Progress) -> Recipe:
    """The recipe with run.steps in place of run.epochs. Raises UsageError if other fields do not fit the steps."""
    epochs, prompts, size = recipe.run.epochs, len(inputs.prompts), recipe.sampling.prompts_per_step
    if epochs is None:
        return recipe
    try:
        resolved = recipe.with_steps(prompts)
    except ValueError as error:
        raise UsageError(f"run.epochs = {epochs:g}, with {prompts} prompts: {error}") from None
    progress.note(f"run.epochs = {epochs:g}: {resolved.run.steps} steps of {size} prompts ({prompts} in all)")
    return resolved


def workload(recipe: Recipe, inputs: RunInputs) -> Workload:
    """Upper bounds of the work that the recipe asks for, from its longest prompt and question."""
    cluster, longest = recipe.cluster, max(len(prompt.token_ids) for prompt in inputs.prompts)
    return Workload(
        prompt_tokens=longest,
        max_tokens=inputs.sampling.max_tokens,
        prompts_per_step=recipe.sampling.prompts_per_step,
        group_size=max(map(len, inputs.offline.values())) if inputs.offline else recipe.sampling.group_size,
        reference=recipe.method.needs_reference and recipe.model.lora is None,
        critic=recipe.method.needs_critic,
        reward_model=recipe.reward_model is not None,
        eval_sets=tuple(
            EvalWorkload(
                name=eval_set.name,
                questions=len(eval_set.prompts),
                samples=eval_set.samples,
                question_tokens=max(len(prompt.token_ids) for prompt in eval_set.prompts),
                answer_tokens=eval_set.options.max_tokens,
                times=eval_set_count(recipe, eval_set.every),
                decoding=decoding_of(eval_set.options),
            )
            for eval_set in inputs.eval_sets
        ),
        turns=recipe.environment is not None,
        samples_elsewhere=recipe.engine.has_own_process,
        lag=recipe.lag,
        engines=cluster is not None and cluster.engines > 0,
        shards=0 if cluster is None or cluster.trainers == 1 else cluster.shards or cluster.trainers,
        labels=labeled(recipe, recipe.reward_model, longest, inputs.sampling.max_tokens, recipe.reward_model.prompts)
        if recipe.reward_model is not None and recipe.reward_model.prompts
        else None,
    )


def labeled(recipe: Recipe, settings: RewardModel, prompt_tokens: int, max_tokens: int, prompts: int) -> Sampled:
    """Upper bounds of what is sampled to label completions of `prompts` prompts at a time.

    A step is labeled by continuations, whose prompt is all that was written before; there may be as many prompts as
    slots.
    """
    completions = prompts * recipe.sampling.group_size
    if settings.kind == "outcome":
        return Sampled(completions, prompts, prompt_tokens, max_tokens)
    return Sampled(completions * settings.continuations, completions, prompt_tokens + max_tokens, max_tokens)


class _Tokenizer:
    """Turns the rows of tasks into prompts, and counts the rows that are left out."""

    def __init__(self, source: ModelSource, progress: Progress, tools: ToolTexts | None = None) -> None:
        self.source, self.progress, self.tools = source, progress, tools
        self.filtered: dict[str, int] = {}

    def tokenize(self, part: Dataset, max_tokens: int, most: int | None = None) -> list[Prompt]:
        """See `gruppo.data.tokenization.tokenize_part`."""
        source = self.source
        total = min(len(part.rows), most or len(part.rows))
        with self.progress.bar(f"Tokenizing {part.name}", total, "prompts") as advance:
            prompts, left_out = tokenize_part(
                part, source.tokenizer, source.context, max_tokens, source.vocabulary, most, advance, self.tools
            )
        self._left_out(part, left_out, len(prompts))
        return prompts

    def add_completions(
        self,
        part: Dataset,
        prompts: Sequence[Prompt],
        max_tokens: int,
        pairs: bool,
        offline: dict[str, OfflineCompletions],
    ) -> list[Prompt]:
        """The prompts whose completions have at most `max_tokens` tokens; the completions are added to `offline`.

        Raises UsageError for a longer completion, unless the task filters overlong rows.
        """
        kept = []
        with self.progress.bar(f"Tokenizing completions of {part.name}", len(prompts), "rows") as advance:
            for prompt in prompts:
                completions = offline_completions(prompt, self.source.tokenizer, pairs)
                advance(1)
                longest = max(len(completion.token_ids) for completion, _ in completions)
                if longest <= max_tokens:
                    offline[prompt.id] = completions
                    kept.append(prompt)
                elif not part.filter_overlong:
                    raise UsageError(
                        f"{prompt.id}: a completion has {longest} tokens, more than sampling.max_tokens = "
                        f'{max_tokens}; raise it, or write {part.field}.overlong = "filter" to leave out such rows'
                    )
        self._left_out(part, len(prompts) - len(kept), len(kept))
        if not kept:
            raise UsageError(f"sampling.max_tokens = {max_tokens}: every completion of {part.name} is longer; raise it")
        return kept

    def _left_out(self, part: Dataset, count: int, kept: int) -> None:
        if count:
            self.filtered[part.name] = self.filtered.get(part.name, 0) + count
            self.progress.note(f"{part.name}: left out {count} rows that are too long; {kept} are used")
