"""Answers from elsewhere: a file of completions, read so that they are graded as our own.

A row holds one completion or several, under one of the names in COMPLETIONS: text, a list of texts, or messages whose
last one counts. Of a task's questions, it says which by `prompt_id`, by the question's own text, or by its number from
0 (`index`, `idx`, `doc_id`, `id`); without a task, it brings its own reference (`answer`, `reference`, …) and other
columns that the grader reads. Rows of `samples.parquet` and of lm-evaluation-harness's samples are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gruppo.engines import SamplingOptions
from gruppo.errors import UsageError
from gruppo.evaluation import Exam
from gruppo.preflight import ExamRows
from gruppo.reporting import Reporter
from gruppo.tasks import data_file
from gruppo.tasks.answers import Named, find_grader
from gruppo.tasks.files import read_file
from gruppo.types import Completion, Prompt, Row

COMPLETIONS = (
    "completions", "completion", "responses", "response", "outputs", "output", "generations", "generation",
    "generated_text", "model_output", "prediction", "resps", "text",
)  # fmt: skip
REFERENCES = ("answer", "reference", "reference_answer", "gold", "golden", "target", "ground_truth", "expected_answer")
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
NUMBERS = ("index", "idx", "doc_id", "id")


def read_submission(
    path: Path, exams: Sequence[ExamRows], grader: str | None, reporter: Reporter
) -> tuple[Exam, list[list[Completion]]]:
    """The answers of a file, and the exam that they are to; of the questions of `exams`, or of the rows themselves
    where there are none, by `grader` then ("number" by default). Several rows may answer one question. Raises
    UsageError for a row that cannot be read, which it shows."""
    rows = list(read_file(data_file(str(path)), {}, reporter))
    if not rows:
        raise UsageError(f"--answers {path}: has no rows; write a line for each completion")
    prompts: dict[str, Prompt] = {}
    answers: dict[str, list[Completion]] = {}
    known = _Known(exams)
    for number, row in enumerate(rows):
        where = f"--answers {path}, row {number + 1}"
        given = _unwrapped(row)
        texts = _texts(given, where)
        prompt = known.find(given, where) if exams else _own(given, number, path.stem, where)
        before = prompts.setdefault(prompt.id, prompt)
        if before.columns != prompt.columns:
            raise UsageError(f"{where}: has the id of another question, {prompt.id!r}; {_shown(row)}")
        reason = "length" if given.get("finish_reason") == "length" else "stop"
        said = "finish_reason" in given
        answers.setdefault(prompt.id, []).extend(_completion(text, reason if said else "") for text in texts)
    if exams:
        name, domain = exams[0].name, exams[0].domain
        graders = {part: each for exam in exams for part, each in exam.graders.items()}
    else:
        asked = grader or "number"
        name, domain, graders = path.stem, None, {path.stem: Named(asked, find_grader(asked))}
    fewest = min(map(len, answers.values()))
    exam = Exam(name, list(prompts.values()), graders, SamplingOptions(0.0, 1), fewest, 0, domain)
    if known.count > len(prompts):
        reporter.note(f"{path}: answers {len(prompts):,} of {known.count:,} questions; the figures are of those")
    return exam, list(answers.values())


def _completion(text: str, reason: Any) -> Completion:
    return Completion((), (), (), reason, 0, text)


def _unwrapped(row: Row) -> Row:
    """The row with what lies one level deeper: lm-evaluation-harness's `doc`, our own `columns`."""
    if isinstance(row.get("doc"), Mapping):
        return {**row["doc"], **{name: value for name, value in row.items() if name != "doc"}}
    if isinstance(row.get("columns"), str) and "sample" in row and "answer" in row:
        try:
            columns = json.loads(row["columns"])
        except (ValueError, RecursionError):
            columns = None
        if isinstance(columns, dict):
            kept = {name: row[name] for name in ("prompt_id", "question", "finish_reason") if name in row}
            return {**columns, **kept, "completion": row["answer"]}
    return row


def _texts(row: Row, where: str) -> list[str]:
    name = next((name for name in COMPLETIONS if row.get(name) is not None), None)
    if name is None:
        raise UsageError(f"{where}: has no completion; name it {', '.join(COMPLETIONS[:3])}, …; {_shown(row)}")
    texts = _said(row[name])
    if not texts:
        raise UsageError(f"{where}: {name} holds no text; {_shown(row)}")
    return texts


def _said(value: Any) -> list[str]:
    """The texts in a value: itself, those of a list, or the last of messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        held = next((value[name] for name in ("text", "content", *COMPLETIONS) if name in value), None)
        return _said(held)
    if isinstance(value, list | tuple):
        if value and all(isinstance(each, Mapping) and "role" in each for each in value):
            return _said(value[-1])
        return [text for each in value for text in _said(each)]
    return []


class _Known:
    """The questions of exams, by what a row may call them."""

    def __init__(self, exams: Sequence[ExamRows]) -> None:
        self.by_id: dict[str, Prompt] = {}
        self.by_text: dict[str, Prompt] = {}
        self.in_order: list[Prompt] = []
        for exam in exams:
            for part in exam.parts:
                for number, row in zip(part.numbers, part.rows, strict=True):
                    columns = {key: value for key, value in row.items() if key != "prompt"}
                    prompt = Prompt(f"{part.name}/{number}", row["prompt"], (), part.name, columns)
                    self.in_order.append(prompt)
                    self.by_id[prompt.id] = prompt
                    for text in (prompt.text, columns.get("question")):
                        if isinstance(text, str):
                            self.by_text.setdefault(_plain(text), prompt)

    @property
    def count(self) -> int:
        """Of all questions."""
        return len(self.in_order)

    def find(self, row: Row, where: str) -> Prompt:
        """The question that a row answers. Raises UsageError where it cannot be told."""
        if row.get("prompt_id") in self.by_id:
            return self.by_id[row["prompt_id"]]
        for name in QUESTIONS:
            text = row.get(name)
            if isinstance(text, list):
                text = "".join(_said(text)[-1:])
            if isinstance(text, str) and _plain(text) in self.by_text:
                return self.by_text[_plain(text)]
        for name in NUMBERS:
            number = row.get(name)
            if isinstance(number, str) and number.isascii() and number.isdecimal():
                number = int(number)
            if type(number) is int and 0 <= number < self.count:
                return self.in_order[number]
        raise UsageError(
            f"{where}: answers no question of the task that can be told; give its prompt_id, its text as question, or "
            f"its number from 0 as index; {_shown(row)}"
        )


def _own(row: Row, number: int, name: str, where: str) -> Prompt:
    """The question that a row brings."""
    reference = next((each for each in REFERENCES if row.get(each) is not None), None)
    if reference is None and "solution" not in row:
        raise UsageError(
            f"{where}: has no reference; name it {', '.join(REFERENCES[:4])}, …, or name the task with --task; "
            f"{_shown(row)}"
        )
    columns = {key: value for key, value in row.items() if key not in COMPLETIONS and key != "finish_reason"}
    if reference is not None:
        columns["answer"] = row[reference]
    text = next((text for each in QUESTIONS for text in _said(row.get(each))[-1:]), "")
    told = next((row[each] for each in ("prompt_id", *NUMBERS) if row.get(each) is not None), None)
    return Prompt(f"{name}/{number}" if told is None else str(told), text or f"row {number + 1}", (), name, columns)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _shown(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return f"the row is {text[:300]}{'…' if len(text) > 300 else ''}"
