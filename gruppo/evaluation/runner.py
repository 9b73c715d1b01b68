"""Running evaluation sets: sampling answers, grading them, and computing figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gruppo.config.loading import RecipeError, load_recipe
from gruppo.config.recipe import Recipe
from gruppo.config.sections import Task
from gruppo.data.chat_template import end_renderer
from gruppo.data.loading import Dataset
from gruppo.data.tokenization import tokenize_part
from gruppo.data.transform import INHERITED
from gruppo.engines import check_engine
from gruppo.engines.base import Engine
from gruppo.engines.memory import Free, Sampled, SamplingMemory, decoding_of, open_engine_within
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import read_eval_sets
from gruppo.evaluation.metrics import figures_of
from gruppo.evaluation.sets import EvalSet, make_eval_set
from gruppo.evaluation.verdicts import grade_answer, vote
from gruppo.models.attention.backends import check_compute
from gruppo.models.footprint import held_bytes
from gruppo.models.loading import ModelSource, find_model, load_model
from gruppo.models.policy import LanguageModel
from gruppo.models.value_head import ScalarModel
from gruppo.rewards.grading.verdicts import Verdict
from gruppo.rollout.episodes import Opened
from gruppo.rollout.multi_turn import open_multi_turn
from gruppo.rollout.sampling import sample_groups
from gruppo.runs.console import choose_progress
from gruppo.types import Completion, Prompt
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop
from gruppo.utils.text import as_json
from gruppo.utils.token_text import TokenTexts
from gruppo.utils.waiting import watched

Sampler = Callable[..., list[list[Completion]]]  # same signature as `sample_groups`


@dataclass(frozen=True)
class Evaluation:
    """Answers to an evaluation set and their grades, one list per question.

    `scores`: reward model scores of the answers, if there is a reward model.
    """

    eval_set: EvalSet
    answers: Sequence[Sequence[Completion]]
    verdicts: Sequence[Sequence[Verdict]]
    scores: Sequence[Sequence[float]] | None = None

    @property
    def completions(self) -> list[Completion]:
        """All answers, question by question."""
        return list(chain.from_iterable(self.answers))

    @property
    def correct(self) -> list[bool]:
        """Whether each answer is correct, question by question."""
        return [verdict.correct for verdicts in self.verdicts for verdict in verdicts]

    def figures(self) -> dict[str, Any]:
        """See `gruppo.evaluation.metrics.figures_of`."""
        return figures_of(self.rows())

    def rows(self) -> list[dict[str, Any]]:
        """One table row per answer."""
        return answer_rows(self.eval_set, self.eval_set.prompts, self.answers, self.verdicts, self.scores)


def answer_rows(
    eval_set: EvalSet,
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[Completion]],
    verdicts: Sequence[Sequence[Verdict]],
    scores: Sequence[Sequence[float]] | None = None,
) -> list[dict[str, Any]]:
    """One row per answer to some questions of a set, with the columns of `gruppo.runs.tables.EVALUATIONS`.

    The texts of tokens are None if the answers come from a file.
    """
    texts = None if eval_set.tokenizer is None else TokenTexts(eval_set.tokenizer, special=True)
    return [
        {
            "eval_set": eval_set.name,
            "prompt_id": prompt.id,
            "sample": number,
            "question": question if isinstance(question := prompt.columns.get("question"), str) else prompt.text,
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
            "prompt_token_ids": list(prompt.token_ids) if texts else None,
            "prompt_token_texts": texts.of(prompt.token_ids) if texts else None,
            "token_ids": list(completion.token_ids),
            "token_texts": texts.of(completion.token_ids, prompt.token_ids) if texts else None,
            "mask": list(completion.mask),
            "logprobs": list(completion.sampling_logprobs),
        }
        for place, (prompt, completions, grades) in enumerate(zip(prompts, answers, verdicts, strict=True))
        for number, (completion, verdict) in enumerate(zip(completions, grades, strict=True))
    ]


def sample_answers(
    engine: Engine,
    eval_set: EvalSet,
    places: range,
    seed: int,
    progress: Progress,
    stop: Stop,
    sample: Sampler = sample_groups,
) -> list[list[Completion]]:
    """Sample `eval_set.samples` answers to each question at `places`.

    The same seed gives the same random numbers at every evaluation of a run, so that two evaluations differ only by the
    policy.
    """
    streams = [[(seed, 0, place, number, 1) for number in range(eval_set.samples)] for place in places]
    prompts = [eval_set.prompts[place] for place in places]
    return sample(engine, prompts, streams, eval_set.options, progress, stop, f"Evaluating {eval_set.name}".rstrip())


def grade_answers(
    eval_set: EvalSet, places: range, answers: Sequence[Sequence[Completion]], stop: Stop
) -> list[list[Verdict]]:
    """Grade the answers to the questions at `places`."""
    verdicts = []
    for place, completions in zip(places, answers, strict=True):
        prompt, question_verdicts = eval_set.prompts[place], []
        for completion in completions:
            stop.check()
            question_verdicts.append(grade_answer(completion.text, prompt, eval_set.graders[prompt.task]))
        verdicts.append(question_verdicts)
    return verdicts


def run_eval_set(
    eval_set: EvalSet, engine: Engine, seed: int, progress: Progress, stop: Stop, sample: Sampler = sample_groups
) -> Evaluation:
    """Run a whole evaluation set in memory."""
    answers, verdicts = [], []
    for places in eval_set.chunks():
        part = sample_answers(engine, eval_set, places, seed, progress, stop, sample)
        answers += part
        verdicts += grade_answers(eval_set, places, part, stop)
    return Evaluation(eval_set, answers, verdicts)


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
    engine: str = "native",
    memory: float | str = 0.6,
    trust_remote_code: bool = False,
    progress: bool | Progress = True,
    stop: Stop | None = None,
) -> Evaluation:
    """Evaluate a model on a task, greedily by default.

    The questions are the held-out part of the task, or all its rows if it has none. `task`: a name, the fields of
    [task], or a Task. `options`: options of a task given by name. `questions`: maximum number of questions, from the
    start. `samples`: answers per question. `decoding`: fields of [evaluation.decoding], such as temperature and top_p.
    `grader`: the task's own by default. `engine`, `memory`: as engine.name and run.memory in a recipe.
    `tokenizer`: for a model passed from Python. Raises UsageError for an invalid argument.
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
    name = str(model) if isinstance(model, str | Path) else "in-memory"
    tables = {
        "run": {"seed": seed, "memory": memory},
        "model": {"name": name, "device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
        "engine": {"name": engine},
        "evaluation": settings,
    }
    in_memory = None if isinstance(model, str | Path) else model
    try:
        return evaluate_recipe(load_recipe(tables), in_memory, tokenizer, progress=progress, stop=stop)
    except UsageError as error:
        given = task if isinstance(task, str) else None
        raise RecipeError(*(_with_arguments(line, given) for line in str(error).splitlines())) from error


def _with_arguments(message: str, task: str | None) -> str:
    """A message about fields of a recipe, in the words of the arguments of `evaluate`. `task`: given by its name."""
    message = message.removeprefix("recipe: ").replace(INHERITED, "")
    message = re.sub(r"a temperature in \[evaluation\.decoding\]", 'decoding={"temperature": 1.0}', message)
    message = re.sub(r'(columns = )\{(\w+) = ("[^"]*")\}', r'\1{"\2": \3}', message)
    start = r"(?<![\w./-])"  # not within a path
    if task is not None:
        field = rf"write {start}evaluation\.task\.(\w+) = (\{{[^{{}}]*\}}|\"[^\"]*\")"
        message = re.sub(field, lambda found: f'write task = {{"name": "{task}", "{found[1]}": {found[2]}}}', message)
    message = re.sub(rf"{start}evaluation\.task\.name\b", "task", message)
    message = re.sub(rf"{start}evaluation\.task\.options\.(\w+)", r'options["\1"]', message)
    message = re.sub(rf"{start}evaluation\.(task|decoding)\.(\w+)", r'\1["\2"]', message)
    message = re.sub(rf"{start}model\.name\b", "model", message)
    message = re.sub(rf"{start}engine\.name\b", "engine", message)
    return re.sub(rf"{start}(?:evaluation|model|run)\.([a-z_]+)(?= =|[:;,]|$)", r"\1", message)


def evaluate_recipe(
    recipe: Recipe,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    progress: bool | Progress = True,
    stop: Stop | None = None,
) -> Evaluation:
    """Run a recipe's [evaluation] with its model, or with a model passed from Python. Raises UsageError."""
    stop = stop or Stop()
    if recipe.evaluation is None:
        raise UsageError("evaluation: missing; the recipe describes no evaluation: write [evaluation] in it")
    with ExitStack() as stack:
        shown, _ = stack.enter_context(watched(choose_progress(progress)))
        without_benchmarks = recipe.model_copy(update={"benchmarks": []})
        candidate = open_eval_sets(without_benchmarks, shown, stack, model, tokenizer)
        return run_eval_set(candidate.eval_sets[0], candidate.engine, recipe.run.seed, shown, stop, candidate.sample)


@dataclass(frozen=True)
class Candidate:
    """A model with the evaluation sets that it is to answer.

    `sample`: the function that samples its answers. `judge`: the reward model that scores them, if any. `memory`: the
    estimate at the peak.
    """

    source: ModelSource
    policy: LanguageModel
    engine: Engine
    eval_sets: list[EvalSet]
    sample: Sampler
    memory: SamplingMemory
    judge: ScalarModel | None = None


def open_eval_sets(
    recipe: Recipe,
    progress: Progress,
    stack: ExitStack,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load_judge: Callable[[ModelSource, LanguageModel], ScalarModel | None] = lambda source, policy: None,
) -> Candidate:
    """Read a recipe's evaluation sets and load its model, or use the model passed from Python.

    `stack` ends the processes of an environment, of chat templates and of the engine. `load_judge`: loads the reward
    model that scores the answers, whose memory counts too. Raises UsageError for problems with the evaluation sets or
    the engine, before weights are loaded, and if run.memory is too little.
    """
    device, dtype = check_compute(recipe.model)
    check_engine(recipe, device, dtype)
    questions = read_questions(recipe, progress, stack, model, tokenizer)
    free = Free.now(recipe.run.memory, device)
    policy = load_model(questions.source, recipe.model.device, recipe.model.dtype, progress, recipe.model.attention)
    judge = load_judge(questions.source, policy)
    others = 0 if judge is None else held_bytes(judge)
    engine, memory = open_engine_within(free, policy, recipe.engine, questions.sampled, stack, progress, others)
    sample = questions.sampler(policy.tokenizer, policy.eos_ids)
    return Candidate(questions.source, policy, engine, questions.eval_sets, sample, memory, judge)


@dataclass(frozen=True)
class Questions:
    """Evaluation sets as token ids for a model whose weights are not loaded. `opened`: the environment, if any."""

    source: ModelSource
    eval_sets: list[EvalSet]
    opened: Opened | None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of all sets."""
        return [prompt for eval_set in self.eval_sets for prompt in eval_set.prompts]

    @property
    def room(self) -> int:
        """The maximum number of tokens of an answer, or of a turn of it."""
        return max(eval_set.options.max_tokens for eval_set in self.eval_sets)

    @property
    def longest(self) -> int:
        """The maximum number of tokens of a prompt. The prompt of a turn includes all earlier turns."""
        longest = max(len(prompt.token_ids) for prompt in self.prompts)
        return longest if self.opened is None else longest + self.room

    @property
    def sampled(self) -> list[Sampled]:
        """What the engine samples: the largest part of each set."""
        works, benchmarks = [], 0
        for eval_set in self.eval_sets:
            count, options = max(map(len, eval_set.chunks())), eval_set.options
            longest = max(len(prompt.token_ids) for prompt in eval_set.prompts)
            table = f"benchmarks[{benchmarks}]" if eval_set.name else "evaluation"
            benchmarks += bool(eval_set.name)
            decoding, field = decoding_of(options), f"{table}.max_tokens"
            turns = self.opened is not None
            works.append(Sampled(count * eval_set.samples, count, longest, options.max_tokens, decoding, field, turns))
        return works

    def sampler(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int]) -> Sampler:
        """The function that samples answers."""
        return sample_groups if self.opened is None else self.opened.episodes(tokenizer, eos_ids, self.prompts).sample


def read_questions(
    recipe: Recipe,
    progress: Progress,
    stack: ExitStack,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Questions:
    """Read a recipe's evaluation sets, and make token ids of them. The arguments are those of `open_eval_sets`."""
    stack.callback(end_renderer)
    all_rows = read_eval_sets(recipe, progress)
    opened = open_multi_turn(recipe, None, progress, stack)
    source = find_model(
        recipe.model.name if model is None else model, progress, tokenizer, recipe.model.trust_remote_code
    )
    tools = opened.tools(source.tokenizer) if opened else None

    def tokenize(part: Dataset, room: int, most: int) -> list[Prompt]:
        with progress.bar(f"Tokenizing {part.name}", min(len(part.rows), most), "prompts") as advance:
            context, known = source.context, source.vocabulary
            return tokenize_part(part, source.tokenizer, context, room, known, most, advance, tools)[0]

    return Questions(source, [make_eval_set(rows, recipe, tokenize, source.tokenizer) for rows in all_rows], opened)
