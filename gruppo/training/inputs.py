"""The prompts, offline completions and evaluation sets of a run, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from gruppo.config.recipe import Recipe
from gruppo.data.loading import Dataset
from gruppo.data.mixture import Mixture
from gruppo.data.offline import OfflineCompletions, offline_completions
from gruppo.data.tokenization import ToolTexts, tokenize_part
from gruppo.engines.base import SamplingParams
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import Data
from gruppo.evaluation.sets import EvalSet, make_eval_set
from gruppo.models.loading import ModelSource
from gruppo.rollout.multi_turn import OpenedEnvironments
from gruppo.training.disk_estimate import eval_set_count
from gruppo.training.memory_estimate import (
    EvalWorkload,
    Workload,
)
from gruppo.types import Prompt
from gruppo.utils.progress import Progress


@dataclass(frozen=True)
class RunInputs:
    """What a run asks of its model: prompts to train on (with their completions, where rows bring them), how they are
    answered, and the exams that it holds."""

    prompts: Mixture
    given: Mapping[str, OfflineCompletions]
    exams: list[EvalSet]
    sampling: SamplingParams
    filtered: dict[str, int]

    @property
    def questions(self) -> list[Prompt]:
        """Of all exams."""
        return [prompt for exam in self.exams for prompt in exam.prompts]

    @property
    def all_prompts(self) -> Iterator[Prompt]:
        """Those to train on and those to evaluate on."""
        return chain(self.prompts, self.questions)


def tokenize_data(
    recipe: Recipe, data: Data, source: ModelSource, progress: Progress, opened: OpenedEnvironments | None = None
) -> RunInputs:
    """The prompts and questions of a recipe. Raises UsageError where one does not fit the model, or the grader."""
    limit = recipe.sampling.max_tokens
    tokens = _Tokens(source, progress, opened.tools(source.tokenizer) if opened else None)
    parts = [tokens.of(part, limit) for part in data.training]
    given: dict[str, OfflineCompletions] = {}
    if recipe.method.source == "dataset":
        parts = [
            tokens.answered(part, prompts, limit, recipe.method.credit == "pair", given)
            for part, prompts in zip(data.training, parts, strict=True)
        ]
    prompts = Mixture(parts, [task.weight for task in recipe.tasks], recipe.run.seed)
    exams = [make_eval_set(each, recipe, tokens.of) for each in data.exams]
    return RunInputs(prompts, given, exams, SamplingParams(recipe.sampling.temperature, limit), tokens.filtered)


def workload(recipe: Recipe, inputs: RunInputs) -> Workload:
    """What the recipe asks for at the most, by its longest prompt and question."""
    return Workload(
        prompt_tokens=max(len(prompt.token_ids) for prompt in inputs.prompts),
        max_tokens=inputs.sampling.max_tokens,
        prompts_per_step=recipe.sampling.prompts_per_step,
        group_size=max(map(len, inputs.given.values())) if inputs.given else recipe.sampling.group_size,
        reference=recipe.method.needs_reference,
        critic=recipe.method.needs_critic,
        reward_model=recipe.reward_model is not None,
        exams=tuple(
            EvalWorkload(
                name=exam.name,
                questions=len(exam.prompts),
                samples=exam.samples,
                question_tokens=max(len(prompt.token_ids) for prompt in exam.prompts),
                answer_tokens=exam.options.max_tokens,
                times=eval_set_count(recipe, exam.every),
            )
            for exam in inputs.exams
        ),
        turns=recipe.environment is not None,
    )


class _Tokens:
    """Turns the rows of tasks into prompts, and counts those that were left out."""

    def __init__(self, source: ModelSource, progress: Progress, tools: ToolTexts | None = None) -> None:
        self.source, self.progress, self.tools = source, progress, tools
        self.filtered: dict[str, int] = {}

    def of(self, part: Dataset, max_tokens: int, most: int | None = None) -> list[Prompt]:
        """See `gruppo.data.tokenization.tokenize_part`."""
        source = self.source
        total = min(len(part.rows), most or len(part.rows))
        with self.progress.bar(f"Tokenizing {part.name}", total, "prompts") as advance:
            prompts, left_out = tokenize_part(
                part, source.tokenizer, source.context, max_tokens, source.vocabulary, most, advance, self.tools
            )
        self._left_out(part, left_out, len(prompts))
        return prompts

    def answered(
        self,
        part: Dataset,
        prompts: Sequence[Prompt],
        max_tokens: int,
        pairs: bool,
        given: dict[str, OfflineCompletions],
    ) -> list[Prompt]:
        """Those of the prompts whose completions, which go into `given`, have at most `max_tokens` tokens; a longer one
        is refused, unless the task says that it is left out."""
        kept = []
        with self.progress.bar(f"Tokenizing completions of {part.name}", len(prompts), "rows") as advance:
            for prompt in prompts:
                made = offline_completions(prompt, self.source.tokenizer, pairs)
                advance(1)
                longest = max(len(completion.token_ids) for completion, _ in made)
                if longest <= max_tokens:
                    given[prompt.id] = made
                    kept.append(prompt)
                elif not part.filter_overlong:
                    raise UsageError(
                        f"{prompt.id}: a completion has {longest} tokens, more than sampling.max_tokens = "
                        f'{max_tokens}; raise that, or write {part.field}.overlong = "filter" to leave such rows out'
                    )
        self._left_out(part, len(prompts) - len(kept), len(kept))
        if not kept:
            raise UsageError(
                f"sampling.max_tokens = {max_tokens}: every completion of {part.name} is longer; write a larger one"
            )
        return kept

    def _left_out(self, part: Dataset, count: int, kept: int) -> None:
        if count:
            self.filtered[part.name] = self.filtered.get(part.name, 0) + count
            self.progress.note(f"{part.name}: left out {count} rows that are too long; {kept} are used")
