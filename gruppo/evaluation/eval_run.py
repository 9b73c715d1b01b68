"""`gruppo eval`: evaluate a model on the evaluation sets of a recipe, or grade a file of completions.

The folder contains recipe.toml, environment.json, evaluations/step-NNNNNN.parquet (one part each; --resume keeps
finished parts), samples.parquet (one row per sample), events.jsonl (one line per ambiguous answer) and results.json
(the figures). It stays intact if the process is killed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config.recipe import Recipe
from gruppo.config.units import as_bytes
from gruppo.data.chat_template import template_time
from gruppo.data.tokenization import data_sha256
from gruppo.errors import UsageError
from gruppo.evaluation.compare import read_evaluation
from gruppo.evaluation.datasets import read_eval_sets
from gruppo.evaluation.external_completions import Answered, read_external_completions
from gruppo.evaluation.metrics import ambiguous
from gruppo.evaluation.results import HELD_OUT, NEEDED_COLUMNS, RESULTS, EvalResult, sets_of
from gruppo.evaluation.runner import Candidate, answer_rows, grade_answers, open_eval_sets, sample_answers
from gruppo.evaluation.sets import EvalSet, check_graders
from gruppo.models.loading import ModelSource, find_like
from gruppo.models.ops.cpu.build import kernels_sha256
from gruppo.models.packing import most_tokens
from gruppo.models.policy import LanguageModel
from gruppo.models.reward_model import NAME, load_reward_model
from gruppo.models.value_head import ScalarModel
from gruppo.models.weights import weights_sha256
from gruppo.rollout.reward_model import RewardModelScorer
from gruppo.runs.atomic import publish, write_whole, writing
from gruppo.runs.folder import EVALUATION, RunFolder, check_folder, explaining_write_errors, start_time
from gruppo.runs.reading import read_table
from gruppo.runs.tables import EVALUATIONS, versioned
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.files import file_sha256
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop
from gruppo.utils.waiting import watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_evaluation(
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    progress: Progress,
    stop: Stop,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EvalResult:
    """Run all evaluation sets of a recipe: [evaluation] and [[benchmarks]].

    If the recipe has a [reward_model], it scores the answers. With `out`, parts are kept as they are finished; with
    `resume`, finished parts are not run again. Raises UsageError.
    """
    if recipe.evaluation is None and not recipe.benchmarks:
        raise UsageError(
            "evaluation: missing; the recipe describes no evaluation: write [evaluation] or [[benchmarks]]"
        )
    _check_out(recipe, out, resume)
    with ExitStack() as stack:
        progress, _ = stack.enter_context(watched(progress))
        started = start_time(out)
        stack.enter_context(template_time(started))
        load_judge = partial(_load_judge, recipe, progress)
        candidate = open_eval_sets(recipe, progress, stack, model, tokenizer, load_judge)
        scorer = None if candidate.judge is None else _Scorer(recipe, candidate, candidate.judge)
        prompts = [prompt for eval_set in candidate.eval_sets for prompt in eval_set.prompts]
        identity = {
            "weights_sha256": weights_sha256(candidate.policy.model),
            "data_sha256": data_sha256(prompts, ()),
            "kernels": kernels_sha256(candidate.policy.dtype),
            "dtype": str(candidate.policy.dtype).removeprefix("torch."),
        }
        if scorer is not None:
            identity["reward_model_sha256"] = weights_sha256(scorer.scorer.model.module)
        jobs = [_model_job(recipe, candidate, eval_set, scorer, progress, stop) for eval_set in candidate.eval_sets]
        facts = {"slots": candidate.engine.slots, "memory_forecast": candidate.memory.as_dict()}
        return _run_jobs(recipe, jobs, identity, out, stack, progress, started, facts)


def grade_file(
    recipe: Recipe, path: Path, has_task: bool, out: Path | None, resume: bool, progress: Progress, stop: Stop
) -> EvalResult:
    """Grade the completions of a file, without a model; see `gruppo.evaluation.external_completions`.

    `has_task`: the completions answer the questions of the recipe's evaluation set; otherwise each row brings its own
    question. Raises UsageError.
    """
    _check_out(recipe, out, resume)
    eval_sets = read_eval_sets(recipe, progress) if has_task else []
    grader = recipe.evaluation.grader if recipe.evaluation else None
    answered = read_external_completions(path, eval_sets, grader, as_bytes(recipe.task.memory), progress)
    for found in answered:
        check_graders(found.eval_set.graders, found.eval_set.prompts)
    jobs = [_file_job(found, has_task, stop) for found in answered]
    with ExitStack() as stack:
        return _run_jobs(recipe, jobs, {"answers_sha256": file_sha256(path)}, out, stack, progress)


def _file_job(found: Answered, has_task: bool, stop: Stop) -> _EvalJob:
    """The job of an evaluation set whose answers are in a file."""
    eval_set = found.eval_set

    def make_rows(places: range) -> list[dict[str, Any]]:
        part = [found.answers[place] for place in places]
        prompts = [eval_set.prompts[place] for place in places]
        return answer_rows(eval_set, prompts, part, grade_answers(eval_set, places, part, stop))

    return _EvalJob(eval_set, make_rows, {"unanswered": found.unanswered} if has_task else {})


def _check_out(recipe: Recipe, out: Path | None, resume: bool) -> None:
    """Raise UsageError if the recipe's evaluation may not be written to `out`."""
    if out is not None:
        check_folder(out, recipe, resume, EVALUATION)
    elif resume:
        raise UsageError("--resume: needs the folder to resume; name it with --out")


@dataclass(frozen=True)
class _EvalJob:
    """An evaluation set and a function that computes the rows of some of its questions.

    `extra`: figures that cannot be computed from the rows.
    """

    eval_set: EvalSet
    make_rows: Callable[[range], list[dict[str, Any]]]
    extra: Mapping[str, Any] = field(default_factory=dict)


def _model_job(
    recipe: Recipe, candidate: Candidate, eval_set: EvalSet, scorer: _Scorer | None, progress: Progress, stop: Stop
) -> _EvalJob:
    """The job of an evaluation set that the model answers."""

    def make_rows(places: range) -> list[dict[str, Any]]:
        answers = sample_answers(candidate.engine, eval_set, places, recipe.run.seed, progress, stop, candidate.sample)
        verdicts = grade_answers(eval_set, places, answers, stop)
        prompts = [eval_set.prompts[place] for place in places]
        return answer_rows(eval_set, prompts, answers, verdicts, scorer.scores(prompts, answers) if scorer else None)

    decoding = {**asdict(eval_set.options), "stop": list(eval_set.options.stop)}
    return _EvalJob(eval_set, make_rows, {"decoding": decoding})


def _run_jobs(
    recipe: Recipe,
    jobs: Sequence[_EvalJob],
    identity: Mapping[str, Any],
    out: Path | None,
    stack: ExitStack,
    progress: Progress,
    started: datetime | None = None,
    facts: Mapping[str, Any] | None = None,
) -> EvalResult:
    """Compute the missing parts, then the figures of all. `facts`: see `RunFolder.start_same`.

    Raises UsageError if the folder was written with another `identity`.
    """
    run = None
    if out is not None:
        stack.enter_context(explaining_write_errors(out))
        run = RunFolder(out)
        stack.callback(run.close)
        run.start_same(recipe, EVALUATION, identity, started, facts)
        if (out / RESULTS).is_file():
            return read_evaluation(out)
    tables, number = [], 0
    for job in jobs:
        name = job.eval_set.name or HELD_OUT
        with progress.bar(f"Evaluation set {name}", len(job.eval_set.prompts), "questions") as advance:
            for places in job.eval_set.chunks():
                number += 1
                path = None if run is None else run.path / "evaluations" / f"step-{number:06d}.parquet"
                if path is None or not path.is_file():
                    rows = job.make_rows(places)
                    if run is not None:
                        run.table("evaluations", number, rows, EVALUATIONS)
                    tables.append(pa.Table.from_pylist(rows, EVALUATIONS).select(NEEDED_COLUMNS.names))
                else:
                    with _advising_to_delete():
                        tables.append(read_table(path, NEEDED_COLUMNS))
                advance(len(places))
    extra = {job.eval_set.name: {"domain": job.eval_set.domain, **job.extra} for job in jobs}
    result = EvalResult(recipe.model.name, sets_of(tables, extra), out)
    if run is not None:
        _write_results(run, result)
    return result


@contextmanager
def _advising_to_delete() -> Iterator[None]:
    """Add to an error about a damaged part that the part may be deleted."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error}, or delete it, and --resume computes it again") from None


def _load_judge(recipe: Recipe, progress: Progress, source: ModelSource, policy: LanguageModel) -> ScalarModel | None:
    """The recipe's reward model, if it has one. Raises UsageError if it does not exist, or does not read the policy's
    tokens."""
    settings = recipe.reward_model
    if settings is None:
        return None
    found = find_like(settings.name, "reward_model.name", source, progress)
    compute = recipe.model
    return load_reward_model(found, settings.kind, policy.device.type, compute.dtype, progress, compute.attention)


class _Scorer:
    """Scores answers with the recipe's reward model."""

    def __init__(self, recipe: Recipe, candidate: Candidate, model: ScalarModel) -> None:
        assert recipe.reward_model is not None
        self.settings, policy = recipe.reward_model, candidate.policy
        longest = max(
            len(prompt.token_ids) + eval_set.options.max_tokens
            for eval_set in candidate.eval_sets
            for prompt in eval_set.prompts
        )
        sizes = BatchSizes(min(4 * longest, most_tokens(longest, policy.device.type != "cpu")), 1, longest)
        self.scorer = RewardModelScorer(model, self.settings, policy.tokenizer, sizes)

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """One score per answer: the model's probability that the answer is correct.

        With a process model: the lowest probability among its steps, or 0 if it has no step.
        """
        groups = [
            Group(prompt, completions, [Reward(0.0, {})] * len(completions))
            for prompt, completions in zip(prompts, answers, strict=True)
        ]
        self.scorer.score(groups)
        return [[self._score(reward) for reward in group.rewards] for group in groups]

    def _score(self, reward: Reward) -> float:
        if self.settings.kind == "outcome":
            return reward.parts.get(NAME) or 0.0
        steps = reward.steps.get(NAME)
        return min(steps.rewards, default=0.0) if steps else 0.0


def _write_results(run: RunFolder, result: EvalResult) -> None:
    """Write all samples as one table, then the grading events, and last results.json, which marks the end."""
    path, temporary = run.path / "samples.parquet", run.path / "samples.writing"
    events = []
    with writing(path, temporary):
        with pq.ParquetWriter(
            temporary, versioned(EVALUATIONS), compression="zstd", write_page_checksum=True
        ) as writer:
            for part in sorted((run.path / "evaluations").glob("step-*.parquet")):
                table = read_table(part, EVALUATIONS)
                writer.write_table(table)
                events += [_event(row) for row in table.select(NEEDED_COLUMNS.names).to_pylist() if ambiguous(row)]
        publish(temporary, path)
    write_whole(run.path / "events.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())
    run.write_json(RESULTS, result.as_dict())


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    """The event of an ambiguous answer."""
    others = json.loads(row["other_rules"])
    disagreeing = ", ".join(name for name, other in others.items() if other != row["correct"])
    words = {True: "correct", False: "wrong"}
    message = (
        f"{row['prompt_id']}: ambiguous answer extraction: {row['rule']} says {words[row['correct']]}, {disagreeing} "
        f"{words[not row['correct']]}"
    )
    columns = {name: row[name] for name in ("eval_set", "prompt_id", "sample", "correct", "rule", "extracted")}
    return {
        "step": 0,
        "kind": "ambiguous_answer",
        "message": message,
        **columns,
        "other_rules": others,
        "answer": row["answer"],
    }
