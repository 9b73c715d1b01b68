"""Greedy accuracy on questions, with an interval, and every answer kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.engines import Engine, SamplingOptions
from gruppo.engines.native import NativeEngine, choose_slots
from gruppo.errors import RunError, UsageError
from gruppo.interruption import Stop
from gruppo.models import choose_device, choose_dtype, find_model, load_model
from gruppo.reporting import Reporter, Silent
from gruppo.rollout import sample_groups
from gruppo.stats import wilson_interval
from gruppo.tables import as_json
from gruppo.tasks import load_rows, tokenize_rows
from gruppo.tasks.answers import Grader, find_grader, last_number
from gruppo.types import Completion, Prompt


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to questions and their grades, in the order of the questions."""

    prompts: Sequence[Prompt]
    completions: Sequence[Completion]
    correct: Sequence[bool]

    def figures(self) -> dict[str, Any]:
        """accuracy with its 95 % interval (Wilson), and the shares of answers that end by themselves and that hold a
        number: fractions of all questions."""
        count = len(self.prompts)
        low, high = wilson_interval(sum(self.correct), count)
        return {
            "accuracy": sum(self.correct) / count,
            "interval": [low, high],
            "questions": count,
            "ended_share": sum(c.finish_reason == "stop" for c in self.completions) / count,
            "number_share": sum(last_number(c.text) is not None for c in self.completions) / count,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row a question, for a table."""
        return [
            {
                "prompt_id": prompt.id,
                "question": prompt.text,
                "columns": as_json(dict(prompt.columns)),
                "answer": completion.text,
                "correct": correct,
                "finish_reason": completion.finish_reason,
                "token_ids": list(completion.token_ids),
                "logprobs": list(completion.sampling_logprobs),
            }
            for prompt, completion, correct in zip(self.prompts, self.completions, self.correct, strict=True)
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


def answer_questions(
    engine: Engine, prompts: Sequence[Prompt], grader: Grader, max_tokens: int, reporter: Reporter, stop: Stop
) -> Evaluation:
    """Answer every question greedily and grade it."""
    options = SamplingOptions(temperature=0.0, max_tokens=max_tokens)
    streams = [[(number,)] for number in range(len(prompts))]
    sampled = sample_groups(engine, prompts, streams, options, reporter, stop, "Evaluating")
    completions = [group[0] for group in sampled]
    correct = [grade(grader, c.text, prompt) for prompt, c in zip(prompts, completions, strict=True)]
    return Evaluation(prompts, completions, correct)


def evaluate(
    model: str | Path | PreTrainedModel,
    task: str = "arithmetic",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    options: Mapping[str, Any] | None = None,
    questions: int | None = None,
    max_tokens: int = 256,
    grader: str = "number",
    device: str = "auto",
    dtype: str = "auto",
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> Evaluation:
    """Greedy accuracy of a model on the held-out part of a task, or on all rows of a .jsonl file.

    `questions`: how many at the most, from the start. `tokenizer`: that of a model in memory. Raises
    UsageError for whatever of the arguments is wrong.
    """
    reporter, stop = reporter or Silent(), stop or Stop()
    if max_tokens < 1 or (questions is not None and questions < 1):
        raise UsageError(f"questions = {questions}, max_tokens = {max_tokens}: must be at least 1")
    choose_dtype(dtype, choose_device(device))
    judge = find_grader(grader)
    rows = load_rows(task, "train" if task.endswith(".jsonl") else "test", options or {}, "task", "options")[:questions]
    source = find_model(str(model) if isinstance(model, Path) else model, reporter, tokenizer)
    prompts = tokenize_rows(rows, source.tokenizer, source.context, max_tokens, task, source.vocabulary)
    check_grader(judge, prompts)
    policy = load_model(source, device, dtype, reporter)
    slots = choose_slots(policy, max(len(prompt.token_ids) for prompt in prompts), max_tokens, len(prompts))
    return answer_questions(NativeEngine(policy, slots), prompts, judge, max_tokens, reporter, stop)
