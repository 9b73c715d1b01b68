"""Evaluation sets: questions, decoding settings and graders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Decoding
from gruppo.data.loading import Dataset
from gruppo.data.mixture import interleaved
from gruppo.engines.base import SamplingParams
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.datasets import EvalSetRows
from gruppo.evaluation.verdicts import grade_answer
from gruppo.rewards.grading.graders import GRADERS, Named
from gruppo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Arguments: a part, the tokens of context to reserve for the answer, and the maximum number of prompts.
Tokenize = Callable[[Dataset, int, int], list[Prompt]]


CHUNK = 1024  # answers sampled at a time; with an evaluation folder, finished chunks survive a kill


@dataclass(frozen=True)
class EvalSet:
    """Questions, decoding settings and graders.

    `name`: of the task, or "" for the held-out questions of a run. `graders`: by the task of a prompt. `every`: steps
    between evaluations during a run, or 0 to evaluate only before the first and after the last step. `domain`:
    see `EvalSetRows`. `tokenizer`: the model's; None if the answers come from a file, without tokens.
    """

    name: str
    prompts: Sequence[Prompt]
    graders: Mapping[str, Named]
    options: SamplingParams
    samples: int
    every: int
    domain: str | None
    tokenizer: PreTrainedTokenizerBase | None = None

    def due(self, step: int, at_end: bool) -> bool:
        """Whether this set is evaluated at `step`."""
        return step == 0 or at_end or (self.every > 0 and step % self.every == 0)

    def chunks(self) -> Iterator[range]:
        """Index ranges of the questions that are sampled together.

        In bfloat16, the grouping affects the last digits of what is sampled, so it depends on the evaluation set alone.
        """
        size = max(1, CHUNK // self.samples)
        return (range(start, min(start + size, len(self.prompts))) for start in range(0, len(self.prompts), size))


def sampling_params(decoding: Decoding, max_tokens: int, training_stop: Sequence[str] = ()) -> SamplingParams:
    """The engine's options for a recipe's decoding.

    `training_stop`: sampling.stop, which applies unless the decoding has stop strings of its own. Raises UsageError if
    min_tokens is greater than max_tokens.
    """
    if decoding.min_tokens > max_tokens:
        raise UsageError(
            f"evaluation.decoding.min_tokens = {decoding.min_tokens}: is more than max_tokens = {max_tokens}; lower it"
        )
    inherits = decoding.stop is None
    stop = tuple(training_stop if decoding.stop is None else decoding.stop)
    fields = {**decoding.model_dump(), "stop": stop, "keep_stop": inherits and bool(stop)}
    return SamplingParams(max_tokens=max_tokens, **fields)


def make_eval_set(rows: EvalSetRows, recipe: Recipe, tokenize: Tokenize, tokenizer: PreTrainedTokenizerBase) -> EvalSet:
    """Build an evaluation set from rows, and try its graders.

    Raises UsageError if a question does not fit the model or the grader.
    """
    settings = rows.settings
    limit = settings.max_tokens or recipe.sampling.max_tokens
    options = sampling_params(settings.decoding, limit, recipe.sampling.stop)
    prompts = interleaved([tokenize(part, limit, settings.questions) for part in rows.parts], settings.questions)
    every, samples = settings.every, settings.samples
    eval_set = EvalSet(rows.name, prompts, rows.graders, options, samples, every, rows.domain, tokenizer)
    check_graders(eval_set.graders, prompts)
    return eval_set


def check_graders(graders: Mapping[str, Named], prompts: Sequence[Prompt]) -> None:
    """Try the graders on an empty answer to every question. Raises UsageError if one fails."""
    for prompt in prompts:
        try:
            grade_answer("", prompt, graders[prompt.task])
        except RunError as error:
            user_defined = graders[prompt.task].name not in GRADERS
            message = f"{error}; write def grader(text, columns) -> bool" if user_defined else str(error)
            raise UsageError(message) from None
