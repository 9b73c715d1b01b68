"""Evaluation sets: questions, how they are answered, and who grades the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from gruppo.config.recipe import Recipe
from gruppo.config.sections import Decoding
from gruppo.data.loading import Dataset
from gruppo.data.mixture import interleaved
from gruppo.engines.base import SamplingParams
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.datasets import EvalSetRows
from gruppo.evaluation.verdicts import mark
from gruppo.rewards.grading.graders import GRADERS, Named
from gruppo.types import Prompt

Tokenize = Callable[
    [Dataset, int, int], list[Prompt]
]  # a part's prompts, with room for so many tokens, at most so many


CHUNK = 1024  # answers that are sampled in one go; what was sampled before is kept where a folder is written


@dataclass(frozen=True)
class EvalSet:
    """Questions, how they are answered, and who grades the answers.

    `name`: of the task, "" for the held-out questions of a run. `graders`: by the task of a prompt. `every`:
    steps between two times that it is held in a run, 0 for its beginning and end only. `domain`: whether the recipe
    trains on questions of its kind.
    """

    name: str
    prompts: Sequence[Prompt]
    graders: Mapping[str, Named]
    options: SamplingParams
    samples: int
    every: int
    domain: str | None

    def due(self, step: int, at_end: bool) -> bool:
        """Whether it is held after so many steps."""
        return step == 0 or at_end or (self.every > 0 and step % self.every == 0)

    def chunks(self) -> Iterator[range]:
        """The places of questions that are answered in one go. Which these are decides, in bfloat16, the last digits
        of what is sampled; so they depend on the exam alone."""
        size = max(1, CHUNK // self.samples)
        return (range(start, min(start + size, len(self.prompts))) for start in range(0, len(self.prompts), size))


def sampling_params(decoding: Decoding, max_tokens: int) -> SamplingParams:
    """The engine's options of a recipe's decoding. Raises UsageError where the minimum is above the maximum."""
    if decoding.min_tokens > max_tokens:
        raise UsageError(
            f"evaluation.decoding.min_tokens = {decoding.min_tokens}: is more than max_tokens = {max_tokens}; lower it"
        )
    return SamplingParams(max_tokens=max_tokens, **{**decoding.model_dump(), "stop": tuple(decoding.stop)})


def make_eval_set(rows: EvalSetRows, recipe: Recipe, tokenize: Tokenize) -> EvalSet:
    """An exam of rows, with each grader tried on an empty answer to every question. Raises UsageError where a question
    does not fit the model, or the grader."""
    settings = rows.settings
    limit = settings.max_tokens or recipe.sampling.max_tokens
    options = sampling_params(settings.decoding, limit)
    prompts = interleaved([tokenize(part, limit, settings.questions) for part in rows.parts], settings.questions)
    exam = EvalSet(rows.name, prompts, rows.graders, options, settings.samples, settings.every, rows.domain)
    check_graders(exam.graders, prompts)
    return exam


def check_graders(graders: Mapping[str, Named], prompts: Sequence[Prompt]) -> None:
    """Try graders on an empty answer to every question, before any work. Raises UsageError where one fails."""
    for prompt in prompts:
        try:
            mark("", prompt, graders[prompt.task])
        except RunError as error:
            own = graders[prompt.task].name not in GRADERS
            raise UsageError(f"{error}; write def grader(text, columns) -> bool" if own else str(error)) from None
