"""Answers to questions: sampled, graded, and every one of them kept.

An exam is a set of questions with the way in which they are answered and graded: the held-out questions of a run, or a
task of [[benchmarks]]. Graders know nothing of rewards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.recipe import Decoding, Recipe, Task, load_recipe
from gruppo.data.datasets import ExamRows, read_exams
from gruppo.data.loading import Part, tokenize_part
from gruppo.data.mixture import interleaved
from gruppo.engines.base import Engine, SamplingOptions
from gruppo.engines.native.engine import NativeEngine, choose_slots
from gruppo.errors import RunError, UsageError
from gruppo.evaluation.metrics import figures_of
from gruppo.models.policy import LanguageModel, ModelSource, choose_device, choose_dtype, find_model, load_model
from gruppo.rewards.grading.graders import GRADERS, Named, last_number
from gruppo.rewards.grading.verdicts import Verdict, verdicts
from gruppo.rollout.multi_turn import open_episodes
from gruppo.rollout.sampling import sample_groups
from gruppo.runs.tables import as_json
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import Reporter, Silent
from gruppo.utils.signals import Stop

Sampler = Callable[..., list[list[Completion]]]  # as `sample_groups`
Tokenize = Callable[[Part, int, int], list[Prompt]]  # a part's prompts, with room for so many tokens, at most so many
CHUNK = 1024  # answers that are sampled in one go; what was sampled before is kept where a folder is written


@dataclass(frozen=True)
class Exam:
    """Questions, how they are answered, and who grades the answers.

    `name`: of the task, "" for the held-out questions of a run. `graders`: by the task of a prompt. `every`:
    steps between two times that it is held in a run, 0 for its beginning and end only. `domain`: whether the recipe
    trains on questions of its kind.
    """

    name: str
    prompts: Sequence[Prompt]
    graders: Mapping[str, Named]
    options: SamplingOptions
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


@dataclass(frozen=True)
class Evaluation:
    """Answers to the questions of an exam and their grades, a list for each question. `scores`: what a reward model
    gives each answer, where there is one."""

    exam: Exam
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
    exam: Exam,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    graded: Sequence[Sequence[Verdict]],
    scores: Sequence[Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """A row an answer to some of an exam's questions, with the columns of gruppo.runs.tables.EVALUATIONS."""
    return [
        {
            "exam": exam.name,
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


def vote(verdict: Verdict) -> str | None:
    """What an answer says, equal for equal answers; None where nothing could be extracted. All right answers are equal;
    others are by the value of a number, or else by their text without case and space."""
    if verdict.correct:
        return "right"
    if verdict.extracted is None:
        return None
    number = last_number(verdict.extracted) if _NUMERIC.fullmatch(verdict.extracted.strip()) else None
    return f"= {number}" if number is not None else f": {''.join(verdict.extracted.split()).casefold()}"


_NUMERIC = re.compile(r"[-−+$€£]?[\d,./]+%?", re.ASCII)


def mark(text: str, prompt: Prompt, grader: Named) -> Verdict:
    """The verdict on an answer. Raises RunError where a grader of the user's raises, or gives anything but yes or no;
    it has no rules of extraction, and votes by the last number, or else by the whole text."""
    if grader.name in GRADERS:
        try:
            return verdicts(text, prompt.columns, grader.name)
        except Exception as error:
            raise _failed(grader.name, prompt, error) from error
    number = last_number(text)
    said = text.strip() if number is None else str(number)
    return Verdict(_graded(grader, text, prompt), said or None, grader.name)


def _graded(named: Named, text: str, prompt: Prompt) -> bool:
    try:
        verdict: Any = named.grader(text, prompt.columns)
    except Exception as error:
        raise _failed(named.name, prompt, error) from error
    if hasattr(verdict, "item"):
        verdict = verdict.item()  # numpy's bool
    if hasattr(verdict, "close"):
        verdict.close()  # a coroutine that nobody will await
    if not isinstance(verdict, bool) and verdict not in (0, 1):
        raise RunError(
            f"evaluation.grader: gives {type(verdict).__name__} {verdict!r} on {prompt.id}, not True or False"
        )
    return bool(verdict)


def _failed(name: str, prompt: Prompt, error: Exception) -> RunError:
    return RunError(f'evaluation.grader = "{name}": fails on {prompt.id} ({type(error).__name__}: {error})')


def sampling_options(decoding: Decoding, max_tokens: int) -> SamplingOptions:
    """The engine's options of a recipe's decoding. Raises UsageError where the minimum is above the maximum."""
    if decoding.min_tokens > max_tokens:
        raise UsageError(
            f"evaluation.decoding.min_tokens = {decoding.min_tokens}: is more than max_tokens = {max_tokens}; lower it"
        )
    return SamplingOptions(max_tokens=max_tokens, **{**decoding.model_dump(), "stop": tuple(decoding.stop)})


def make_exam(rows: ExamRows, recipe: Recipe, tokenize: Tokenize) -> Exam:
    """An exam of rows, with each grader tried on an empty answer to every question. Raises UsageError where a question
    does not fit the model, or the grader."""
    settings = rows.settings
    limit = settings.max_tokens or recipe.sampling.max_tokens
    options = sampling_options(settings.decoding, limit)
    prompts = interleaved([tokenize(part, limit, settings.questions) for part in rows.parts], settings.questions)
    exam = Exam(rows.name, prompts, rows.graders, options, settings.samples, settings.every, rows.domain)
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


def answer(
    engine: Engine,
    exam: Exam,
    places: range,
    seed: int,
    reporter: Reporter,
    stop: Stop,
    sample: Sampler = sample_groups,
) -> list[list[Completion]]:
    """`exam.samples` answers to each of its questions at `places`. The same seed draws the same random numbers at every
    evaluation of a run, so that two of them differ by the policy alone."""
    streams = [[(seed, 0, place, number, 1) for number in range(exam.samples)] for place in places]
    prompts = [exam.prompts[place] for place in places]
    return sample(engine, prompts, streams, exam.options, reporter, stop, f"Evaluating {exam.name}".rstrip())


def graded(exam: Exam, places: range, answers: Sequence[Sequence[Completion]], stop: Stop) -> list[list[Verdict]]:
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
    exam: Exam, engine: Engine, seed: int, reporter: Reporter, stop: Stop, sample: Sampler = sample_groups
) -> Evaluation:
    """The whole exam, in memory."""
    answers, verdicts_of = [], []
    for places in exam.chunks():
        made = answer(engine, exam, places, seed, reporter, stop, sample)
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
    reporter: Reporter | None = None,
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
    """The [evaluation] that a recipe describes, of its model or of one in memory. Raises UsageError."""
    reporter, stop = reporter or Silent(), stop or Stop()
    if recipe.evaluation is None:
        raise UsageError("evaluation: missing; the recipe describes no evaluation: write [evaluation] in it")
    with ExitStack() as stack:
        alone = recipe.model_copy(update={"benchmarks": []})
        candidate = open_exams(alone, reporter, stack, model, tokenizer)
        return hold(candidate.exams[0], candidate.engine, recipe.run.seed, reporter, stop, candidate.sample)


@dataclass(frozen=True)
class Candidate:
    """A model that is ready to answer the exams of a recipe, by `sample`."""

    source: ModelSource
    policy: LanguageModel
    engine: Engine
    exams: list[Exam]
    sample: Sampler


def open_exams(
    recipe: Recipe,
    reporter: Reporter,
    stack: ExitStack,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Candidate:
    """Read a recipe's exams and load its model, or take one in memory; processes of an environment are left to `stack`.
    Whatever is wrong with the exams is a UsageError before weights are loaded."""
    choose_dtype(recipe.model.dtype, choose_device(recipe.model.device))
    rows = read_exams(recipe, reporter)
    source = find_model(
        recipe.model.name if model is None else model, reporter, tokenizer, recipe.model.trust_remote_code
    )
    opened = open_episodes(recipe, None, reporter, stack)
    tools = opened.tools(source.tokenizer) if opened else None

    def tokenize(part: Part, room: int, most: int) -> list[Prompt]:
        with reporter.progress(f"Tokenizing {part.name}", min(len(part.rows), most), "prompts") as advance:
            context, known = source.context, source.vocabulary
            return tokenize_part(part, source.tokenizer, context, room, known, most, advance, tools)[0]

    exams = [make_exam(each, recipe, tokenize) for each in rows]
    policy = load_model(source, recipe.model.device, recipe.model.dtype, reporter)
    prompts = [prompt for exam in exams for prompt in exam.prompts]
    sample: Sampler = sample_groups
    room = max(exam.options.max_tokens for exam in exams)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if opened is not None:
        sample = opened.episodes(policy.tokenizer, policy.eos_ids, prompts).sample
        longest += room  # what was written before a turn is its prompt
    wanted = max(len(exam.prompts) * exam.samples for exam in exams)
    return Candidate(source, policy, NativeEngine(policy, choose_slots(policy, longest, room, wanted)), exams, sample)
