"""`gruppo eval`: a model on the exams of a recipe, into a folder that a kill leaves whole; answers from elsewhere; and
two evaluations compared.

The folder: recipe.toml, environment.json, evaluations/step-NNNNNN.parquet (a part each, which a resume keeps), then
samples.parquet (a row a sample), events.jsonl (a line for every answer on which rules of extraction disagree) and
results.json (the figures).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo.config.recipe import Recipe
from gruppo.data.tokenization import data_sha256
from gruppo.errors import UsageError
from gruppo.evaluation.compare import read_evaluation
from gruppo.evaluation.datasets import read_eval_sets
from gruppo.evaluation.external_completions import read_submission
from gruppo.evaluation.metrics import ambiguous
from gruppo.evaluation.results import HELD_OUT, NEEDED_COLUMNS, RESULTS, EvalResult, sets_of
from gruppo.evaluation.runner import Candidate, answer, answer_rows, graded, open_eval_sets
from gruppo.evaluation.sets import EvalSet, check_graders
from gruppo.models.loading import find_like
from gruppo.models.ops.cpu.build import kernels_sha256
from gruppo.models.packing import most_tokens
from gruppo.models.reward_model import NAME, load_reward_model
from gruppo.models.weights import weights_sha256
from gruppo.rollout.reward_model import RewardModelScorer
from gruppo.runs.atomic import publish, write_whole, writing
from gruppo.runs.folder import EVALUATION, RunFolder, check_folder, telling_what_stands
from gruppo.runs.reading import read_table
from gruppo.runs.tables import EVALUATIONS
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.files import file_sha256
from gruppo.utils.oom_retry import BatchSizes
from gruppo.utils.progress import Progress
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def measure(
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    progress: Progress,
    stop: Stop,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> EvalResult:
    """Hold all exams of a recipe, [evaluation] and [[benchmarks]], and score the answers with its [reward_model], if
    there is one. With `out` parts are kept as they are made; with `resume` those that are there are not made again.
    Raises UsageError."""
    if recipe.evaluation is None and not recipe.benchmarks:
        raise UsageError(
            "evaluation: missing; the recipe describes no evaluation: write [evaluation] or [[benchmarks]]"
        )
    _check(recipe, out, resume)
    with ExitStack() as stack:
        candidate = open_eval_sets(recipe, progress, stack, model, tokenizer)
        scorer = _Scorer(recipe, candidate, progress) if recipe.reward_model is not None else None
        identity = {
            "weights_sha256": weights_sha256(candidate.policy.model),
            "data_sha256": data_sha256([prompt for exam in candidate.exams for prompt in exam.prompts], ()),
            "kernels": kernels_sha256(candidate.policy.dtype),
            "dtype": str(candidate.policy.dtype).removeprefix("torch."),
        }
        if scorer is not None:
            identity["reward_model_sha256"] = weights_sha256(scorer.scorer.model.module)
        papers = [_paper(recipe, candidate, exam, scorer, progress, stop) for exam in candidate.exams]
        return _write(recipe, papers, identity, out, stack, progress)


def grade_file(
    recipe: Recipe, path: Path, asks: bool, out: Path | None, resume: bool, progress: Progress, stop: Stop
) -> EvalResult:
    """Grade the completions of a file (see `gruppo.evaluation.external_completions`) and tabulate them, without a model. `asks`: they
    answer the questions of the recipe's exam; otherwise each row brings its own. Raises UsageError."""
    _check(recipe, out, resume)
    exams = [] if not asks else read_eval_sets(recipe, progress)
    exam, answers, unanswered = read_submission(
        path, exams, recipe.evaluation.grader if recipe.evaluation else None, progress
    )
    check_graders(exam.graders, exam.prompts)

    def make(places: range) -> list[dict[str, Any]]:
        own = [answers[place] for place in places]
        prompts = [exam.prompts[place] for place in places]
        return answer_rows(exam, prompts, own, graded(exam, places, own, stop))

    paper = _EvalJob(exam, make, {"unanswered": unanswered} if asks else {})
    with ExitStack() as stack:
        return _write(recipe, [paper], {"answers_sha256": file_sha256(path)}, out, stack, progress)


def _check(recipe: Recipe, out: Path | None, resume: bool) -> None:
    """Raise UsageError where an evaluation of the recipe may not go into the folder."""
    if out is not None:
        check_folder(out, recipe, resume, EVALUATION)
    elif resume:
        raise UsageError("--resume: goes on with the folder that --out names; name it")


@dataclass(frozen=True)
class _EvalJob:
    """An exam, what makes the rows of some of its questions, and figures of it that no row tells."""

    exam: EvalSet
    make: Callable[[range], list[dict[str, Any]]]
    beside: Mapping[str, Any] = field(default_factory=dict)


def _paper(
    recipe: Recipe, candidate: Candidate, exam: EvalSet, scorer: _Scorer | None, progress: Progress, stop: Stop
) -> _EvalJob:
    """An exam that the model answers."""

    def make(places: range) -> list[dict[str, Any]]:
        answers = answer(candidate.engine, exam, places, recipe.run.seed, progress, stop, candidate.sample)
        verdicts = graded(exam, places, answers, stop)
        prompts = [exam.prompts[place] for place in places]
        return answer_rows(exam, prompts, answers, verdicts, scorer.scores(prompts, answers) if scorer else None)

    return _EvalJob(exam, make, {"decoding": {**asdict(exam.options), "stop": list(exam.options.stop)}})


def _write(
    recipe: Recipe,
    papers: Sequence[_EvalJob],
    identity: Mapping[str, Any],
    out: Path | None,
    stack: ExitStack,
    progress: Progress,
) -> EvalResult:
    """Make the parts that are not there, and figures of all. Raises UsageError where the folder was made of something
    else."""
    run = None
    if out is not None:
        stack.enter_context(telling_what_stands(out))
        run = RunFolder(out)
        stack.callback(run.close)
        run.start_same(recipe, EVALUATION, identity)
        if (out / RESULTS).is_file():
            return read_evaluation(out)
    tables, number = [], 0
    for paper in papers:
        name = paper.exam.name or HELD_OUT
        with progress.bar(f"Asking {name}", len(paper.exam.prompts), "questions") as advance:
            for places in paper.exam.chunks():
                number += 1
                path = None if run is None else run.path / "evaluations" / f"step-{number:06d}.parquet"
                if path is None or not path.is_file():
                    rows = paper.make(places)
                    if run is not None:
                        run.table("evaluations", number, rows, EVALUATIONS)
                    tables.append(pa.Table.from_pylist(rows, EVALUATIONS).select(NEEDED_COLUMNS.names))
                else:
                    with _part_of(path):
                        tables.append(read_table(path, NEEDED_COLUMNS))
                advance(len(places))
    beside = {paper.exam.name: {"domain": paper.exam.domain, **paper.beside} for paper in papers}
    measured = EvalResult(recipe.model.name, sets_of(tables, beside), out)
    if run is not None:
        _finish(run, measured)
    return measured


@contextmanager
def _part_of(path: Path) -> Iterator[None]:
    """A part that is damaged can be made again."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{error}, or delete it, and it is made again with --resume") from None


class _Scorer:
    """The recipe's reward model, and what it gives answers."""

    def __init__(self, recipe: Recipe, candidate: Candidate, progress: Progress) -> None:
        """Raises UsageError where there is no such model, or one that does not read the policy's tokens."""
        assert recipe.reward_model is not None
        self.settings, policy = recipe.reward_model, candidate.policy
        source = find_like(self.settings.name, "reward_model.name", candidate.source, progress)
        model = load_reward_model(source, self.settings.kind, policy.device.type, recipe.model.dtype, progress)
        longest = max(
            len(prompt.token_ids) + exam.options.max_tokens for exam in candidate.exams for prompt in exam.prompts
        )
        sizes = BatchSizes(min(4 * longest, most_tokens(longest)), 1, longest)
        self.scorer = RewardModelScorer(model, self.settings, policy.tokenizer, sizes)

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """A score an answer: the model's probability that it is right; of a process model, the least one of its steps,
        and 0 for an answer without any."""
        groups = [
            Group(prompt, own, [Reward(0.0, {})] * len(own)) for prompt, own in zip(prompts, answers, strict=True)
        ]
        self.scorer.score(groups)
        return [[self._score(reward) for reward in group.rewards] for group in groups]

    def _score(self, reward: Reward) -> float:
        if self.settings.kind == "outcome":
            return reward.parts.get(NAME) or 0.0
        steps = reward.steps.get(NAME)
        return min(steps.rewards, default=0.0) if steps else 0.0


def _finish(run: RunFolder, measured: EvalResult) -> None:
    """All samples in one table, the events of grading, and last the figures, whose file says that all is there."""
    path, temporary = run.path / "samples.parquet", run.path / "samples.writing"
    events = []
    with writing(path, temporary):
        with pq.ParquetWriter(temporary, EVALUATIONS, compression="zstd", write_page_checksum=True) as writer:
            for part in sorted((run.path / "evaluations").glob("step-*.parquet")):
                table = read_table(part, EVALUATIONS)
                writer.write_table(table)
                events += [_event(row) for row in table.select(NEEDED_COLUMNS.names).to_pylist() if ambiguous(row)]
        publish(temporary, path)
    write_whole(run.path / "events.jsonl", "".join(json.dumps(each) + "\n" for each in events).encode())
    run.write_json(RESULTS, measured.as_dict())


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    """An answer on which rules of extraction disagree."""
    others = json.loads(row["other_rules"])
    odd = ", ".join(name for name, other in others.items() if other != row["correct"])
    said = {True: "right", False: "wrong"}
    message = f"{row['prompt_id']}: {row['rule']} says {said[row['correct']]}, and {odd} {said[not row['correct']]}"
    kept = {name: row[name] for name in ("eval_set", "prompt_id", "sample", "correct", "rule", "extracted")}
    return {
        "step": 0,
        "kind": "ambiguous_answer",
        "message": message,
        **kept,
        "other_rules": others,
        "answer": row["answer"],
    }
