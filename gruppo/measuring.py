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
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from gruppo import __version__
from gruppo.checkpoint import file_sha256
from gruppo.config import Recipe
from gruppo.disk import writing
from gruppo.errors import UsageError
from gruppo.evaluation import Candidate, Exam, answer, answer_rows, check_graders, graded, open_exams
from gruppo.figures import Question, compare, figures
from gruppo.interruption import Stop
from gruppo.judge import Judge
from gruppo.kernels import kernels_sha256
from gruppo.models import weights_sha256
from gruppo.opening import read_object, read_table, require_own
from gruppo.packing import most_tokens
from gruppo.preflight import read_exams
from gruppo.preparation import data_sha256, find_like
from gruppo.reporting import Reporter
from gruppo.reward_model import NAME, load_reward_model
from gruppo.runlog import EVALUATION, RunFolder, check_folder, publish, telling_what_stands, write_whole
from gruppo.sizes import Sizes
from gruppo.submissions import read_submission
from gruppo.tables import EVALUATIONS
from gruppo.types import Completion, Group, Prompt, Reward

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
HELD_OUT = "held-out"  # what a run's own exam, which has no name, is called beside others


@dataclass(frozen=True)
class Sheet:
    """What was answered in an exam, as its rows have it."""

    domain: str | None
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
        sheets = {name: {"domain": sheet.domain, **sheet.figures} for name, sheet in self.sheets.items()}
        return {"model": self.model, "gruppo": __version__, "exams": sheets}


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
    if out is not None:
        check_folder(out, recipe, resume, EVALUATION)
        if (out / "results.json").is_file():
            return read_evaluation(out)
    with ExitStack() as stack:
        stack.enter_context(telling_what_stands(out) if out is not None else nullcontext())
        candidate = open_exams(recipe, reporter, stack, model, tokenizer)
        scorer = _Scorer(recipe, candidate, reporter) if recipe.reward_model is not None else None
        run = None
        if out is not None:
            run = RunFolder(out)
            stack.callback(run.close)
            prompts = [prompt for exam in candidate.exams for prompt in exam.prompts]
            identity = {
                "weights_sha256": weights_sha256(candidate.policy.model),
                "data_sha256": data_sha256(prompts, ()),
                "kernels": kernels_sha256(candidate.policy.dtype),
                "dtype": str(candidate.policy.dtype).removeprefix("torch."),
            }
            run.start_same(recipe, EVALUATION, identity)
        papers = [_paper(recipe, candidate, exam, scorer, reporter, stop) for exam in candidate.exams]
        return _write(recipe.model.name, papers, run, reporter)


def grade_file(
    recipe: Recipe, path: Path, asks: bool, out: Path | None, resume: bool, reporter: Reporter, stop: Stop
) -> Measured:
    """Grade the completions of a file (see `gruppo.submissions`) and tabulate them, without a model. `asks`: they
    answer the questions of the recipe's exam; otherwise each row brings its own. Raises UsageError."""
    exams = [] if not asks else read_exams(recipe, reporter)
    exam, answers = read_submission(path, exams, recipe.evaluation.grader if recipe.evaluation else None, reporter)
    check_graders(exam.graders, exam.prompts)
    with ExitStack() as stack:
        run = None
        if out is not None:
            check_folder(out, recipe, resume, EVALUATION)
            if (out / "results.json").is_file():
                return read_evaluation(out)
            stack.enter_context(telling_what_stands(out))
            run = RunFolder(out)
            stack.callback(run.close)
            run.start_same(recipe, EVALUATION, {"answers_sha256": file_sha256(path)})

        def make(places: range) -> list[dict[str, Any]]:
            own = [answers[place] for place in places]
            prompts = [exam.prompts[place] for place in places]
            return answer_rows(exam, prompts, own, graded(exam, places, own, stop))

        return _write(str(path), [_Paper(exam.name, exam.domain, list(exam.chunks()), make)], run, reporter)


@dataclass(frozen=True)
class _Paper:
    """An exam as parts, and what makes the rows of one."""

    name: str
    domain: str | None
    chunks: Sequence[range]
    make: Callable[[range], list[dict[str, Any]]]


def _paper(
    recipe: Recipe, candidate: Candidate, exam: Exam, scorer: _Scorer | None, reporter: Reporter, stop: Stop
) -> _Paper:
    """An exam that the model answers."""

    def make(places: range) -> list[dict[str, Any]]:
        answers = answer(candidate.engine, exam, places, recipe.run.seed, reporter, stop, candidate.sample)
        verdicts = graded(exam, places, answers, stop)
        prompts = [exam.prompts[place] for place in places]
        return answer_rows(exam, prompts, answers, verdicts, scorer.scores(prompts, answers) if scorer else None)

    return _Paper(exam.name, exam.domain, list(exam.chunks()), make)


def _write(model: str, papers: Sequence[_Paper], run: RunFolder | None, reporter: Reporter) -> Measured:
    """Make the parts that are not there, and figures of all."""
    tables, number = [], 0
    for paper in papers:
        with reporter.progress(f"Asking {paper.name or HELD_OUT}", sum(map(len, paper.chunks)), "questions") as advance:
            for places in paper.chunks:
                number += 1
                path = None if run is None else run.path / "evaluations" / f"step-{number:06d}.parquet"
                if path is None or not path.is_file():
                    rows = paper.make(places)
                    if run is not None:
                        run.table("evaluations", number, rows, EVALUATIONS)
                    tables.append(pa.Table.from_pylist(rows, EVALUATIONS).select(_NEEDED.names))
                else:
                    tables.append(read_table(path, _NEEDED))
                advance(len(places))
    sheets = _sheets(tables, {paper.name: paper.domain for paper in papers})
    measured = Measured(model, sheets, None if run is None else run.path)
    if run is not None:
        _finish(run, measured)
    return measured


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


def _sheets(tables: Sequence[pa.Table], domains: Mapping[str, str | None]) -> dict[str, Sheet]:
    """The rows of every exam as questions, with their figures."""
    held: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in _rows(tables):
        held[row["exam"]][row["prompt_id"]].append(row)
    made = {}
    for name, domain in domains.items():
        own = list(held[name].values())
        rows = [row for each in own for row in each]
        questions = [_question(each) for each in own]
        ends = [row["finish_reason"] == "stop" for row in rows if row["finish_reason"]]
        shares = {
            **({"ended_share": sum(ends) / len(ends)} if ends else {}),
            "answered_share": sum(row["vote"] is not None for row in rows) / len(rows),
            "disagreement_share": sum(map(_disagrees, rows)) / len(rows),
        }
        made[name or HELD_OUT] = Sheet(domain, questions, figures(questions) | shares)
    return made


def _question(rows: Sequence[Mapping[str, Any]]) -> Question:
    scores = [row["score"] for row in rows]
    return Question(
        rows[0]["prompt_id"],
        rows[0]["question"],
        [row["correct"] for row in rows],
        [row["vote"] for row in rows],
        None if None in scores else scores,
    )


def _rows(tables: Sequence[pa.Table]) -> Iterator[dict[str, Any]]:
    for table in tables:
        yield from table.to_pylist()


def _disagrees(row: Mapping[str, Any]) -> bool:
    return any(other != row["correct"] for other in json.loads(row["other_rules"]).values())


def _finish(run: RunFolder, measured: Measured) -> None:
    """All samples in one table, the events of grading, and last the figures, whose file says that all is there."""
    path, temporary = run.path / "samples.parquet", run.path / "samples.writing"
    events = []
    with writing(path, temporary):
        with pq.ParquetWriter(temporary, EVALUATIONS, compression="zstd", write_page_checksum=True) as writer:
            for part in sorted((run.path / "evaluations").glob("step-*.parquet")):
                table = read_table(part, EVALUATIONS)
                writer.write_table(table)
                events += [_event(row) for row in table.select(_NEEDED.names).to_pylist() if _disagrees(row)]
        publish(temporary, path)
    write_whole(run.path / "events.jsonl", "".join(json.dumps(each) + "\n" for each in events).encode())
    run.write_json("results.json", measured.as_dict())


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
    if not (folder / "results.json").is_file():
        raise UsageError(f"{folder}: holds no evaluation that is done; give what `gruppo eval --out` wrote")
    require_own(folder)
    held = read_object(folder / "results.json")
    exams, model = held.get("exams"), held.get("model")
    if not isinstance(exams, dict) or not isinstance(model, str):
        raise UsageError(f"{folder}/results.json: is damaged; evaluate again with another --out")
    table = read_table(folder / "samples.parquet", _NEEDED)
    names = set(table["exam"].to_pylist())
    domains = {name: exams.get(name or HELD_OUT, {}).get("domain") for name in sorted(names)}
    return Measured(model, _sheets([table], domains), folder)


def compare_all(first: Measured, second: Measured) -> dict[str, dict[str, Any]]:
    """The second's figures less the first's, by the name of each exam that both held; see `gruppo.figures.compare`.
    Raises UsageError where they held none in common."""
    shared = [name for name in first.sheets if name in second.sheets]
    if not shared:
        held = [f"{each.model} has {', '.join(each.sheets)}" for each in (first, second)]
        raise UsageError(f"nothing to compare: {'; '.join(held)}; evaluate both on one task")
    return {name: compare(first.sheets[name].questions, second.sheets[name].questions) for name in shared}
