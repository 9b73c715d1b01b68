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

from gruppo.data.files import read_file
from gruppo.data.loading import data_file
from gruppo.engines.base import SamplingParams
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import EvalSetRows
from gruppo.evaluation.sets import EvalSet
from gruppo.rewards.grading.graders import Named, find_grader
from gruppo.types import Completion, Prompt, Row
from gruppo.utils.progress import Progress

COMPLETIONS = (
    "completions", "completion", "responses", "response", "outputs", "output", "generations", "generation",
    "generated_text", "model_output", "prediction", "resps", "text",
)  # fmt: skip
REFERENCES = ("answer", "reference", "reference_answer", "gold", "golden", "target", "ground_truth", "expected_answer")
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
NUMBERS = ("index", "idx", "doc_id", "id")


def read_submission(
    path: Path, exams: Sequence[EvalSetRows], grader: str | None, progress: Progress
) -> tuple[EvalSet, list[list[Completion]], int]:
    """The answers of a file, and the exam that they are to; of the questions of `exams`, or of the rows themselves
    where there are none, by `grader` then ("numeric_answer" by default); and how many questions of the exam nothing answers.
    Several rows may answer one question. Raises UsageError for a row that cannot be read, which it shows."""
    try:
        rows = list(read_file(data_file(str(path)), {}, progress))
    except UsageError as error:
        raise UsageError(f"--answers {path}: {error}") from None
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
        if (before.text, before.columns.get("answer")) != (prompt.text, prompt.columns.get("answer")):
            raise UsageError(f"{where}: has the id of another question, {prompt.id!r}; {_shown(row)}")
        ends = given.get("finish_reason")
        reason: Any = ends if ends in ("stop", "length") else ""
        answers.setdefault(prompt.id, []).extend(Completion((), (), (), reason, 0, text) for text in texts)
    if exams:
        name, domain = exams[0].name, exams[0].domain
        graders = {part: each for exam in exams for part, each in exam.graders.items()}
    else:
        asked = grader or "numeric_answer"
        name, domain, graders = path.stem, None, {path.stem: Named(asked, find_grader(asked))}
    fewest = min(map(len, answers.values()))
    exam = EvalSet(name, list(prompts.values()), graders, SamplingParams(0.0, 1), fewest, 0, domain)
    return exam, list(answers.values()), max(0, known.count - len(prompts))


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
    talk = row.get("messages")
    if name is None and isinstance(talk, list) and talk and isinstance(talk[-1], Mapping):
        name = "messages" if talk[-1].get("role") == "assistant" else None
    if name is None:
        raise UsageError(f"{where}: has no completion; name it {', '.join(COMPLETIONS[:3])}, …; {_shown(row)}")
    texts = _said(row[name])
    if not texts:
        raise UsageError(f"{where}: {name} holds no text; {_shown(row)}")
    return texts


def _said(value: Any) -> list[str]:
    """The texts in a value: itself, those of a list, or the last of messages. A null in a list is an answer that was
    not given; halves of characters, which cannot be written, are replaced."""
    if isinstance(value, str):
        return [value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, Mapping):
        held = next((value[name] for name in ("text", "content", "message", *COMPLETIONS) if name in value), None)
        return _said(held)
    if isinstance(value, list | tuple):
        if value and all(isinstance(each, Mapping) and "role" in each for each in value):
            return _said(value[-1])
        return [text for each in value for text in ([""] if each is None else _said(each))]
    return []


class _Known:
    """The questions of exams, by what a row may call them."""

    def __init__(self, exams: Sequence[EvalSetRows]) -> None:
        self.by_id: dict[str, Prompt] = {}
        self.by_own_id: dict[str, Prompt] = {}
        self.by_text: dict[str, Prompt] = {}
        self.in_order: list[Prompt] = []
        for part in (part for exam in exams for part in exam.parts):
            for number, row in zip(part.numbers, part.rows, strict=True):
                columns = {key: value for key, value in row.items() if key != "prompt"}
                prompt = Prompt(f"{part.name}/{number}", row["prompt"], (), part.name, columns)
                self.in_order.append(prompt)
                self.by_id[prompt.id] = prompt
                if isinstance(columns.get("id"), str | int):
                    self.by_own_id.setdefault(str(columns["id"]), prompt)
                for text in _texts_of(prompt):
                    self.by_text.setdefault(text, prompt)

    @property
    def count(self) -> int:
        """Of all questions."""
        return len(self.in_order)

    def find(self, row: Row, where: str) -> Prompt:
        """The question that a row answers: by its id, its text, or its number, which a text that the row has must
        agree with. Raises UsageError where it cannot be told."""
        if isinstance(named := row.get("prompt_id"), str) and named in self.by_id:
            return self.by_id[named]
        texts = [_plain(text) for name in QUESTIONS for text in _said(row.get(name))[-1:]]
        for text in texts:
            if text in self.by_text:
                return self.by_text[text]
        found = self._by_number(row)
        if found is None:
            raise UsageError(
                f"{where}: answers no question of the task that can be told; give its prompt_id, its text as question, "
                f"or its number from 0 as index; {_shown(row)}"
            )
        if texts and not any(own in text or text in own for text in texts for own in _texts_of(found)):
            raise UsageError(
                f"{where}: has the number of {found.id}, and the text of another question; give the text as the task "
                f"has it, or the number alone, which counts from 0; {_shown(row)}"
            )
        return found

    def _by_number(self, row: Row) -> Prompt | None:
        own = row.get("id")
        if self.by_own_id and isinstance(own, str | int):
            return self.by_own_id.get(str(own))
        for name in NUMBERS:
            number = row.get(name)
            if isinstance(number, float) and number.is_integer():
                number = int(number)
            if isinstance(number, str) and number.isascii() and number.isdecimal():
                number = int(number)
            if type(number) is int and 0 <= number < self.count:
                return self.in_order[number]
        return None


def _texts_of(prompt: Prompt) -> list[str]:
    """What a row may say a question is: what the model reads, or the question alone."""
    asked = prompt.columns.get("question")
    return [_plain(text) for text in (asked, prompt.text) if isinstance(text, str) and text.strip()]


def _own(row: Row, number: int, name: str, where: str) -> Prompt:
    """The question that a row brings."""
    reference = next((each for each in REFERENCES if row.get(each) is not None), None)
    if reference is None and "solution" not in row:
        raise UsageError(
            f"{where}: has no reference; name it {', '.join(REFERENCES[:4])}, …, or name the task with --task; "
            f"{_shown(row)}"
        )
    columns = {key: value for key, value in row.items() if key not in COMPLETIONS and key != "finish_reason"}
    columns["answer"] = row["solution" if reference is None else reference]
    text = next((text for each in QUESTIONS for text in _said(row.get(each))[-1:]), "")
    told = next((row[each] for each in ("prompt_id", *NUMBERS) if isinstance(row.get(each), str | int)), None)
    return Prompt(f"{name}/{number}" if told is None else str(told), text or f"row {number + 1}", (), name, columns)


def _plain(text: str) -> str:
    return " ".join(text.split())


def _shown(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return f"the row is {text[:300]}{'…' if len(text) > 300 else ''}"
