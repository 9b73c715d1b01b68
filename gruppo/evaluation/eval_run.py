"""`gruppo eval`: a model on the exams of a recipe, into a folder that a kill leaves whole; answers from elsewhere; and
two evaluations compared.

The folder: recipe.toml, environment.json, evaluations/step-NNNNNN.parquet (a part each, which a resume keeps), then
samples.parquet (a row a sample), events.jsonl (a line for every answer on which rules of extraction disagree) and
results.json (the figures).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo import __version__
from gruppo.config.recipe import Recipe
from gruppo.data.datasets import read_exams
from gruppo.errors import UsageError
from gruppo.evaluation.external_completions import read_submission
from gruppo.evaluation.metrics import Question, compare, disputed, figures_of, questions_of
from gruppo.evaluation.sets import Candidate, Exam, answer, answer_rows, check_graders, graded, open_exams
from gruppo.models.ops.cpu.build import kernels_sha256
from gruppo.models.policy import weights_sha256
from gruppo.models.reward_model import NAME, load_reward_model
from gruppo.runs.atomic import writing
from gruppo.runs.folder import EVALUATION, RunFolder, check_folder, publish, telling_what_stands, write_whole
from gruppo.runs.reading import read_object, read_table, require_own
from gruppo.runs.tables import EVALUATIONS
from gruppo.training.checkpoint import file_sha256
from gruppo.training.oom_retry import Sizes
from gruppo.training.packing import most_tokens
from gruppo.training.reward_model import Judge
from gruppo.training.setup import data_sha256, find_like
from gruppo.types import Completion, Group, Prompt, Reward
from gruppo.utils.progress import Reporter
from gruppo.utils.signals import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NEEDED = pa.schema(
    [
        EVALUATIONS.field(name)
        for name in (
            "exam", "prompt_id", "question", "answer", "correct", "extracted", "rule", "other_rules", "vote", "score",
            "finish_reason", "sample",
        )
    ]
)  # fmt: skip
RESULTS = "results.json"
HELD_OUT = "held-out"  # what a run's own exam, which has no name, is called beside others


@dataclass(frozen=True)
class Sheet:
    """What was answered in an exam: its questions, and the figures of results.json."""

    questions: list[Question]
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """The exams of a model, by name. `path`: the folder, if there is one."""

    model: str
    sheets: dict[str, Sheet]
    path: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        exams = {name: dict(sheet.figures) for name, sheet in self.sheets.items()}
        return {"model": self.model, "gruppo": __version__, "exams": exams}


def measure(
    recipe: Recipe,
    out: Path | None,
    resume: bool,
    reporter: Reporter,
    stop: Stop,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Measured:
    """Hold all exams of a recipe, [evaluation] and [[benchmarks]], and score the answers with its [reward_model], if
    there is one. With `out` parts are kept as they are made; with `resume` those that are there are not made again.
    Raises UsageError."""
    if recipe.evaluation is None and not recipe.benchmarks:
        raise UsageError(
            "evaluation: missing; the recipe describes no evaluation: write [evaluation] or [[benchmarks]]"
        )
    _check(recipe, out, resume)
    with ExitStack() as stack:
        candidate = open_exams(recipe, reporter, stack, model, tokenizer)
        scorer = _Scorer(recipe, candidate, reporter) if recipe.reward_model is not None else None
        identity = {
            "weights_sha256": weights_sha256(candidate.policy.model),
            "data_sha256": data_sha256([prompt for exam in candidate.exams for prompt in exam.prompts], ()),
            "kernels": kernels_sha256(candidate.policy.dtype),
            "dtype": str(candidate.policy.dtype).removeprefix("torch."),
        }
        if scorer is not None:
            identity["reward_model_sha256"] = weights_sha256(scorer.judge.model.module)
        papers = [_paper(recipe, candidate, exam, scorer, reporter, stop) for exam in candidate.exams]
        return _write(recipe, papers, identity, out, stack, reporter)


def grade_file(
    recipe: Recipe, path: Path, asks: bool, out: Path | None, resume: bool, reporter: Reporter, stop: Stop
) -> Measured:
    """Grade the completions of a file (see `gruppo.evaluation.external_completions`) and tabulate them, without a model. `asks`: they
    answer the questions of the recipe's exam; otherwise each row brings its own. Raises UsageError."""
    _check(recipe, out, resume)
    exams = [] if not asks else read_exams(recipe, reporter)
    exam, answers, unanswered = read_submission(
        path, exams, recipe.evaluation.grader if recipe.evaluation else None, reporter
    )
    check_graders(exam.graders, exam.prompts)

    def make(places: range) -> list[dict[str, Any]]:
        own = [answers[place] for place in places]
        prompts = [exam.prompts[place] for place in places]
        return answer_rows(exam, prompts, own, graded(exam, places, own, stop))

    paper = _Paper(exam, make, {"unanswered": unanswered} if asks else {})
    with ExitStack() as stack:
        return _write(recipe, [paper], {"answers_sha256": file_sha256(path)}, out, stack, reporter)


def _check(recipe: Recipe, out: Path | None, resume: bool) -> None:
    """Raise UsageError where an evaluation of the recipe may not go into the folder."""
    if out is not None:
        check_folder(out, recipe, resume, EVALUATION)
    elif resume:
        raise UsageError("--resume: goes on with the folder that --out names; name it")


@dataclass(frozen=True)
class _Paper:
    """An exam, what makes the rows of some of its questions, and figures of it that no row tells."""

    exam: Exam
    make: Callable[[range], list[dict[str, Any]]]
    beside: Mapping[str, Any] = field(default_factory=dict)


def _paper(
    recipe: Recipe, candidate: Candidate, exam: Exam, scorer: _Scorer | None, reporter: Reporter, stop: Stop
) -> _Paper:
    """An exam that the model answers."""

    def make(places: range) -> list[dict[str, Any]]:
        answers = answer(candidate.engine, exam, places, recipe.run.seed, reporter, stop, candidate.sample)
        verdicts = graded(exam, places, answers, stop)
        prompts = [exam.prompts[place] for place in places]
        return answer_rows(exam, prompts, answers, verdicts, scorer.scores(prompts, answers) if scorer else None)

    return _Paper(exam, make, {"decoding": {**asdict(exam.options), "stop": list(exam.options.stop)}})


def _write(
    recipe: Recipe,
    papers: Sequence[_Paper],
    identity: Mapping[str, Any],
    out: Path | None,
    stack: ExitStack,
    reporter: Reporter,
) -> Measured:
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
        with reporter.progress(f"Asking {name}", len(paper.exam.prompts), "questions") as advance:
            for places in paper.exam.chunks():
                number += 1
                path = None if run is None else run.path / "evaluations" / f"step-{number:06d}.parquet"
                if path is None or not path.is_file():
                    rows = paper.make(places)
                    if run is not None:
                        run.table("evaluations", number, rows, EVALUATIONS)
                    tables.append(pa.Table.from_pylist(rows, EVALUATIONS).select(_NEEDED.names))
                else:
                    with _part_of(path):
                        tables.append(read_table(path, _NEEDED))
                advance(len(places))
    beside = {paper.exam.name: {"domain": paper.exam.domain, **paper.beside} for paper in papers}
    measured = Measured(recipe.model.name, _sheets(tables, beside), out)
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

    def __init__(self, recipe: Recipe, candidate: Candidate, reporter: Reporter) -> None:
        """Raises UsageError where there is no such model, or one that does not read the policy's tokens."""
        assert recipe.reward_model is not None
        self.settings, policy = recipe.reward_model, candidate.policy
        source = find_like(self.settings.name, "reward_model.name", candidate.source, reporter)
        model = load_reward_model(source, self.settings.kind, policy.device.type, recipe.model.dtype, reporter)
        longest = max(
            len(prompt.token_ids) + exam.options.max_tokens for exam in candidate.exams for prompt in exam.prompts
        )
        sizes = Sizes(min(4 * longest, most_tokens(longest)), 1, longest)
        self.judge = Judge(model, None, self.settings, policy.tokenizer, sizes, 1.0)

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Completion]]) -> list[list[float]]:
        """A score an answer: the model's probability that it is right; of a process model, the least one of its steps,
        and 0 for an answer without any."""
        groups = [
            Group(prompt, own, [Reward(0.0, {})] * len(own)) for prompt, own in zip(prompts, answers, strict=True)
        ]
        self.judge.score(groups)
        return [[self._score(reward) for reward in group.rewards] for group in groups]

    def _score(self, reward: Reward) -> float:
        if self.settings.kind == "outcome":
            return reward.parts.get(NAME) or 0.0
        steps = reward.steps.get(NAME)
        return min(steps.rewards, default=0.0) if steps else 0.0


def _sheets(tables: Sequence[pa.Table], beside: Mapping[str, Mapping[str, Any]]) -> dict[str, Sheet]:
    """The rows of every exam as questions, with their figures, and `beside` them what no row tells."""
    held: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for table in tables:
        for row in table.to_pylist():
            held[row["exam"]].append(row)
    return {
        name or HELD_OUT: Sheet(questions_of(held[name]), {**told, **figures_of(held[name])})
        for name, told in beside.items()
    }


def _finish(run: RunFolder, measured: Measured) -> None:
    """All samples in one table, the events of grading, and last the figures, whose file says that all is there."""
    path, temporary = run.path / "samples.parquet", run.path / "samples.writing"
    events = []
    with writing(path, temporary):
        with pq.ParquetWriter(temporary, EVALUATIONS, compression="zstd", write_page_checksum=True) as writer:
            for part in sorted((run.path / "evaluations").glob("step-*.parquet")):
                table = read_table(part, EVALUATIONS)
                writer.write_table(table)
                events += [_event(row) for row in table.select(_NEEDED.names).to_pylist() if disputed(row)]
        publish(temporary, path)
    write_whole(run.path / "events.jsonl", "".join(json.dumps(each) + "\n" for each in events).encode())
    run.write_json(RESULTS, measured.as_dict())


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    """An answer on which rules of extraction disagree."""
    others = json.loads(row["other_rules"])
    odd = ", ".join(name for name, other in others.items() if other != row["correct"])
    said = {True: "right", False: "wrong"}
    message = f"{row['prompt_id']}: {row['rule']} says {said[row['correct']]}, and {odd} {said[not row['correct']]}"
    kept = {name: row[name] for name in ("exam", "prompt_id", "sample", "correct", "rule", "extracted")}
    return {"step": 0, "kind": "grading", "message": message, **kept, "other_rules": others, "answer": row["answer"]}


def read_evaluation(folder: Path) -> Measured:
    """An evaluation that is done, from its folder. Raises UsageError where it holds none, or a damaged one."""
    require_own(folder)
    if not (folder / RESULTS).is_file():
        raise UsageError(f"{folder}: holds no evaluation that is finished; repeat its command with --resume")
    held = read_object(folder / RESULTS)
    exams: Any = held.get("exams")
    model: Any = held.get("model")
    if (
        not isinstance(model, str)
        or not isinstance(exams, dict)
        or any(type(each) is not dict for each in exams.values())
    ):
        raise UsageError(f"{folder / RESULTS}: is damaged; evaluate again with another --out")
    table = read_table(folder / "samples.parquet", _NEEDED)
    there = {name or HELD_OUT: name for name in table["exam"].to_pylist()}
    if set(there) != set(exams):
        raise UsageError(
            f"{folder / RESULTS}: is of other exams than samples.parquet; evaluate again into another --out"
        )
    return Measured(model, _sheets([table], {there[name]: _beside(exams[name]) for name in exams}), folder)


def _beside(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("domain", "decoding", "unanswered") if name in figures}


def compare_all(first: Measured, second: Measured) -> dict[str, dict[str, Any]]:
    """The second's figures less the first's, by the name of each exam that both held; see `gruppo.evaluation.metrics.compare`.
    Raises UsageError where they held none in common."""
    shared = [name for name in first.sheets if name in second.sheets]
    if not shared:
        held = [f"{each.model} has {', '.join(each.sheets)}" for each in (first, second)]
        raise UsageError(f"nothing to compare: {'; '.join(held)}; evaluate both on one task")
    made = {}
    for name in shared:
        one, other = first.sheets[name], second.sheets[name]
        made[name] = compare(one.questions, other.questions) | {"settings": _apart(one.figures, other.figures)}
    return made


def _apart(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """In which settings two exams differ, in words."""
    one, other = ({"samples": each["samples"], **each.get("decoding", {})} for each in (first, second))
    names = sorted(name for name in one.keys() & other.keys() if one[name] != other[name])
    return [f"{name} {one[name]} and {other[name]}" for name in names]
