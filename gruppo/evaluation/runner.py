"""Running evaluation sets: answers, verdicts, figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.loading import load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Task
from gruppo.data.loading import Dataset
from gruppo.data.tokenization import tokenize_part
from gruppo.engines import build_engine
from gruppo.engines.base import Engine
from gruppo.engines.native.engine import choose_slots
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_eval_sets
from gruppo.evaluation.metrics import figures_of
from gruppo.evaluation.sets import EvalSet, make_eval_set
from gruppo.evaluation.verdicts import mark, vote
from gruppo.models.loading import ModelSource, find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.models.precision import choose_device, choose_dtype
from gruppo.rewards.grading.verdicts import Verdict
from gruppo.rollout.multi_turn import open_multi_turn
from gruppo.rollout.sampling import sample_groups
from gruppo.runs.console import choose_progress
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop
from gruppo.utils.text import as_json

Sampler = Callable[..., list[list[Completion]]]  # as `sample_groups`


@dataclass(frozen=True)
class Evaluation:
    """Answers to the questions of an exam and their grades, a list for each question. `scores`: what a reward model
    gives each answer, where there is one."""

    exam: EvalSet
    answers: Sequence[Sequence[Completion]]
    verdicts: Sequence[Sequence[Verdict]]
    scores: Sequence[Sequence[float]] | None = None

    @property
    def completions(self) -> list[Completion]:
        """One question's after another's."""
        return list(chain.from_iterable(self.answers))

    @property
    def correct(self) -> list[bool]:
        """One question's after another's."""
        return [verdict.correct for own in self.verdicts for verdict in own]

    def figures(self) -> dict[str, Any]:
        """See `gruppo.evaluation.metrics.figures_of`."""
        return figures_of(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """A row an answer, for a table."""
        return answer_rows(self.exam, self.exam.prompts, self.answers, self.verdicts, self.scores)


def answer_rows(
    exam: EvalSet,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    graded: Sequence[Sequence[Verdict]],
    scores: Sequence[Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """A row an answer to some of an exam's questions, with the columns of gruppo.runs.tables.EVALUATIONS."""
    return [
        {
            "eval_set": exam.name,
            "prompt_id": prompt.id,
            "sample": number,
            "question": asked if isinstance(asked := prompt.columns.get("question"), str) else prompt.text,
            "columns": as_json(dict(prompt.columns)),
            "answer": completion.text,
            "correct": verdict.correct,
            "extracted": verdict.extracted,
            "rule": verdict.rule,
            "other_rules": as_json(dict(verdict.others)),
            "vote": vote(verdict),
            "score": None if scores is None else scores[place][number],
            "finish_reason": completion.finish_reason or None,
            "episode": None if completion.episode is None else as_json(asdict(completion.episode)),
            "token_ids": list(completion.token_ids),
            "mask": list(completion.mask),
            "logprobs": list(completion.sampling_logprobs),
        }
        for place, (prompt, own, verdicts_of) in enumerate(zip(prompts, answers, graded, strict=True))
        for number, (completion, verdict) in enumerate(zip(own, verdicts_of, strict=True))
    ]


def answer(
    engine: Engine,
    exam: EvalSet,
    places: range,
    seed: int,
    progress: Progress,
    stop: Stop,
    sample: Sampler = sample_groups,
) -> list[list[Completion]]:
    """`exam.samples` answers to each of its questions at `places`. The same seed draws the same random numbers at every
    evaluation of a run, so that two of them differ by the policy alone."""
    streams = [[(seed, 0, place, number, 1) for number in range(exam.samples)] for place in places]
    prompts = [exam.prompts[place] for place in places]
    return sample(engine, prompts, streams, exam.options, progress, stop, f"Evaluating {exam.name}".rstrip())


def graded(exam: EvalSet, places: range, answers: Sequence[Sequence[Completion]], stop: Stop) -> list[list[Verdict]]:
    """The verdicts on answers to an exam's questions at `places`."""
    made = []
    for place, own in zip(places, answers, strict=True):
        prompt, verdicts_of = exam.prompts[place], []
        for completion in own:
            stop.check()
            verdicts_of.append(mark(completion.text, prompt, exam.graders[prompt.task]))
        made.append(verdicts_of)
    return made


def hold(
    exam: EvalSet, engine: Engine, seed: int, progress: Progress, stop: Stop, sample: Sampler = sample_groups
) -> Evaluation:
    """The whole exam, in memory."""
    answers, verdicts_of = [], []
    for places in exam.chunks():
        made = answer(engine, exam, places, seed, progress, stop, sample)
        answers += made
        verdicts_of += graded(exam, places, made, stop)
    return Evaluation(exam, answers, verdicts_of)


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
    grader: str | None = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: bool | Progress = True,
    stop: Stop | None = None,
) -> Evaluation:
    """Accuracy of a model on the held-out part of a task, or on all rows of a task without one; greedy by default.

    `task`: a name, the fields of [task], or a Task; `options` are those of a task by name. `questions`: how many at
    the most, from the start. `samples`: answers a question. `decoding`: fields of [evaluation.decoding], such as
    temperature and top_p. `grader`: by default the task's own. `tokenizer`: that of a model in memory. Raises
    UsageError for whatever of the arguments is wrong, by its name in a recipe.
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
        recipe, None if isinstance(model, str | Path) else model, tokenizer, progress=progress, stop=stop
    )


def evaluate_recipe(
    recipe: Recipe,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool | Progress = True,
    stop: Stop | None = None,
) -> Evaluation:
    """The [evaluation] that a recipe describes, of its model or of one in memory. Raises UsageError."""
    progress, stop = choose_progress(progress), stop or Stop()
    if recipe.evaluation is None:
        raise UsageError("evaluation: missing; the recipe describes no evaluation: write [evaluation] in it")
    with ExitStack() as stack:
        alone = recipe.model_copy(update={"benchmarks": []})
        candidate = open_eval_sets(alone, progress, stack, model, tokenizer)
        return hold(candidate.exams[0], candidate.engine, recipe.run.seed, progress, stop, candidate.sample)


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to answer the exams of a recipe, by `sample`."""

    source: ModelSource
    policy: LanguageModel
    engine: Engine
    exams: list[EvalSet]
    sample: Sampler


def open_eval_sets(
    recipe: Recipe,
    progress: Progress,
    stack: ExitStack,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Candidate:
    """Read a recipe's exams and load its model, or take one in memory; processes of an environment are left to `stack`.
    Whatever is wrong with the exams is a UsageError before weights are loaded."""
    choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))
    rows = read_eval_sets(recipe, progress)
    source = find_model(
        recipe.model.name if model is None else model, progress, tokenizer, recipe.model.trust_remote_code
    )
    opened = open_multi_turn(recipe, None, progress, stack)
    tools = opened.tools(source.tokenizer) if opened else None

    def tokenize(part: Dataset, room: int, most: int) -> list[Prompt]:
        with progress.bar(f"Tokenizing {part.name}", min(len(part.rows), most), "prompts") as advance:
            context, known = source.context, source.vocabulary
            return tokenize_part(part, source.tokenizer, context, room, known, most, advance, tools)[0]

    exams = [make_eval_set(each, recipe, tokenize) for each in rows]
    policy = load_model(source, recipe.model.device, recipe.model.dtype, progress)
    prompts = [prompt for exam in exams for prompt in exam.prompts]
    sample: Sampler = sample_groups
    room = max(exam.options.max_tokens for exam in exams)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if opened is not None:
        sample = opened.episodes(policy.tokenizer, policy.eos_ids, prompts).sample
        longest += room  # what was written before a turn is its prompt
    wanted = max(len(exam.prompts) * exam.samples for exam in exams)
    return Candidate(source, policy, build_engine(policy, choose_slots(policy, longest, room, wanted)), exams, sample)
