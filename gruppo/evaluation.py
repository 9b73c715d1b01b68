"""Accuracy on questions, with an interval, and every answer kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config import Decoding, Recipe, Task, load_recipe
from gruppo.engines import Engine, SamplingOptions
from gruppo.engines.native import NativeEngine, choose_slots
from gruppo.episodes import Episodes, open_episodes
from gruppo.errors import RunError, UsageError
from gruppo.interruption import Stop
from gruppo.models import choose_device, choose_dtype, find_model, load_model
from gruppo.preflight import read_questions
from gruppo.reporting import Reporter, Silent
from gruppo.rollout import sample_groups
from gruppo.stats import bootstrap_interval, wilson_interval
from gruppo.tables import as_json
from gruppo.tasks import tokenize_part
from gruppo.tasks.answers import Grader, find_grader, last_number
from gruppo.tasks.mixture import interleaved
from gruppo.types import Completion, Prompt


@dataclass(frozen=True)
class Evaluation:
    """Answers to questions and their grades: `samples` for each of `prompts`, one question's after another's."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    correct: Sequence[bool]
    samples: int = 1

    def figures(self) -> dict[str, Any]:
        """accuracy, and the shares of answers that end by themselves and that hold a number: fractions of all answers.

        The 95 % interval of the accuracy is over questions, as the answers to one are not independent of each other:
        Wilson's where every question is all right or all wrong, as with one answer each, else a bootstrap.
        """
        count = len(self.completions)
        shares = np.array(self.correct).reshape(-1, self.samples).mean(axis=1)
        if set(shares) <= {0.0, 1.0}:
            low, high = wilson_interval(int(shares.sum()), len(shares))
        else:
            low, high = bootstrap_interval(shares)
        return {
            "accuracy": sum(self.correct) / count,
            "interval": [low, high],
            "questions": len(self.prompts),
            "samples": self.samples,
            "ended_share": sum(c.finish_reason == "stop" for c in self.completions) / count,
            "number_share": sum(last_number(c.text) is not None for c in self.completions) / count,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row an answer, for a table."""
        return [
            {
                "prompt_id": prompt.id,
                "sample": number,
                "question": prompt.text,
                "columns": as_json(dict(prompt.columns)),
                "answer": completion.text,
                "correct": correct,
                "finish_reason": completion.finish_reason,
                "token_ids": list(completion.token_ids),
                "logprobs": list(completion.sampling_logprobs),
            }
            for (prompt, number), completion, correct in zip(
                product(self.prompts, range(self.samples)), self.completions, self.correct, strict=True
            )
        ]


def check_grader(grader: Grader, prompts: Sequence[Prompt]) -> None:
    """Try the grader on an empty answer to every question, before any work. Raises UsageError where it fails."""
    for prompt in prompts:
        try:
            grade(grader, "", prompt)
        except RunError as error:
            raise UsageError(f"{error}; write def grader(text, columns) -> bool") from None


def grade(grader: Grader, text: str, prompt: Prompt) -> bool:
    """Whether an answer is right. Raises RunError where the grader raises or gives anything but yes or no."""
    try:
        verdict: Any = grader(text, prompt.columns)
    except Exception as error:
        raise RunError(f"evaluation.grader: fails on {prompt.id} ({type(error).__name__}: {error})") from error
    if hasattr(verdict, "item"):
        verdict = verdict.item()  # numpy's bool
    if hasattr(verdict, "close"):
        verdict.close()  # a coroutine that nobody will await
    if not isinstance(verdict, bool) and verdict not in (0, 1):
        raise RunError(
            f"evaluation.grader: gives {type(verdict).__name__} {verdict!r} on {prompt.id}, not True or False"
        )
    return bool(verdict)


def sampling_options(decoding: Decoding, max_tokens: int) -> SamplingOptions:
    """The engine's options of a recipe's decoding. Raises UsageError where the minimum is above the maximum."""
    if decoding.min_tokens > max_tokens:
        raise UsageError(
            f"evaluation.decoding.min_tokens = {decoding.min_tokens}: is more than max_tokens = {max_tokens}; lower it"
        )
    return SamplingOptions(max_tokens=max_tokens, **{**decoding.model_dump(), "stop": tuple(decoding.stop)})


def answer_questions(
    engine: Engine,
    prompts: Sequence[Prompt],
    grader: Grader,
    options: SamplingOptions,
    samples: int,
    seed: int,
    reporter: Reporter,
    stop: Stop,
    episodes: Episodes | None = None,
) -> Evaluation:
    """Answer every question `samples` times and grade the answers. The same seed draws the same random numbers at
    every evaluation of a run, so that two of them differ by the policy alone. `episodes`: what answers are written
    with, of several turns."""
    streams = [[(seed, 0, question, sample, 1) for sample in range(samples)] for question in range(len(prompts))]
    sample = sample_groups if episodes is None else episodes.sample
    sampled = sample(engine, prompts, streams, options, reporter, stop, "Evaluating")
    completions = [completion for group in sampled for completion in group]
    pairs = zip((prompt for prompt in prompts for _ in range(samples)), completions, strict=True)
    correct = []
    for prompt, completion in pairs:
        stop.check()
        correct.append(grade(grader, completion.text, prompt))
    return Evaluation(prompts, completions, correct, samples)


def evaluate(
    model: str | Path | PreTrainedModel,
    task: str | Mapping[str, Any] | Task = "arithmetic",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, Any] | None = None,
    questions: int | None = None,
    samples: int = 1,
    max_tokens: int = 256,
    decoding: Mapping[str, Any] | None = None,
    grader: str = "number",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> Evaluation:
    """Accuracy of a model on the held-out part of a task, or on all rows of a task without one; greedy by default.

    `task`: a name, the fields of [task], or a Task; `options` are those of a task by name. `questions`: how many at
    the most, from the start. `samples`: answers a question. `decoding`: fields of [evaluation.decoding], such as
    temperature and top_p. `tokenizer`: that of a model in memory. Raises UsageError for whatever of the arguments is
    wrong, by its name in a recipe.
    """
    if isinstance(task, Task):
        task = task.model_dump(exclude_none=True)
    fields = {"name": task, "options": dict(options or {})} if isinstance(task, str) else dict(task)
    settings = {
        "task": fields,
        "questions": 2**31 if questions is None else questions,
        "samples": samples,
        "max_tokens": max_tokens,
        "decoding": dict(decoding or {}),
        "grader": grader,
    }
    name = str(model) if isinstance(model, str | Path) else "given"
    recipe = load_recipe(
        {
            "run": {"seed": seed},
            "model": {"name": name, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
            "evaluation": settings,
        }
    )
    return evaluate_recipe(
        recipe, None if isinstance(model, str | Path) else model, tokenizer, reporter=reporter, stop=stop
    )


def evaluate_recipe(
    recipe: Recipe,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> Evaluation:
    """The evaluation that a recipe describes, of its model or of one in memory. Raises UsageError."""
    settings, reporter, stop = recipe.evaluation, reporter or Silent(), stop or Stop()
    if settings is None:
        raise UsageError("evaluation: missing; the recipe describes no evaluation: write [evaluation] in it")
    choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))
    grader = find_grader(settings.grader)
    parts = read_questions(recipe, reporter)
    limit = settings.max_tokens or recipe.sampling.max_tokens
    options = sampling_options(settings.decoding, limit)
    source = find_model(
        recipe.model.name if model is None else model, reporter, tokenizer, recipe.model.trust_remote_code
    )
    with ExitStack() as stack:
        opened = open_episodes(recipe, None, reporter, stack)
        tools = opened.tools(source.tokenizer) if opened else None
        tokenized = [
            tokenize_part(
                part, source.tokenizer, source.context, limit, source.vocabulary, settings.questions, tools=tools
            )[0]
            for part in parts
        ]
        prompts = interleaved(tokenized, settings.questions)
        check_grader(grader, prompts)
        policy = load_model(source, recipe.model.device, recipe.model.dtype, reporter)
        episodes = opened.episodes(policy.tokenizer, policy.eos_ids, prompts) if opened else None
        wanted = len(prompts) * settings.samples
        longest = max(len(prompt.token_ids) for prompt in prompts) + (limit if episodes else 0)
        slots = choose_slots(policy, longest, limit, wanted)
        engine, seed = NativeEngine(policy, slots), recipe.run.seed
        return answer_questions(engine, prompts, grader, options, settings.samples, seed, reporter, stop, episodes)
