"""Completions from elsewhere: a file of completions, read so that they are graded like gruppo's.

A row contains one completion or several, under one of the names in `COMPLETIONS`: text, a list of texts, or messages,
of which the last one counts. If the recipe names a task, a row identifies its question by `prompt_id`, by the
question's text, or by its number from 0 (`index`, `idx`, `doc_id`, `id`). Without a task, a row brings its own
reference (`answer`, `reference`, …) and any other columns that the grader reads. Rows of `samples.parquet` and samples
of lm-evaluation-harness are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gruppo.data.files import read_file
from gruppo.data.loading import data_file
from gruppo.data.values import require_memory, row_bytes
from gruppo.engines.base import SamplingParams
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import EvalSetRows
from gruppo.evaluation.results import HELD_OUT
from gruppo.evaluation.sets import EvalSet
from gruppo.rewards.grading.graders import Named, find_grader
from gruppo.types import Completion, Prompt, Row
from gruppo.utils.progress import Progress
from gruppo.utils.text import text_of_content

COMPLETIONS = (
    "completions", "completion", "responses", "response", "outputs", "output", "generations", "generation",
    "generated_text", "model_output", "prediction", "resps", "text",
)  # fmt: skip
REFERENCES = ("answer", "reference", "reference_answer", "gold", "golden", "target", "ground_truth", "expected_answer")
QUESTIONS = ("question", "problem", "prompt", "query", "instruction", "input")
NUMBERS = ("index", "idx", "doc_id", "id")


@dataclass(frozen=True)
class Answered:
    """An evaluation set with the questions that a file answers. `answers`: completions by question; `unanswered`: how
    many questions of the set the file does not answer."""

    eval_set: EvalSet
    answers: list[list[Completion]]
    unanswered: int


def read_external_completions(
    path: Path, eval_sets: Sequence[EvalSetRows], grader: str | None, limit: int, progress: Progress
) -> list[Answered]:
    """The evaluation sets that the file's rows answer, in the order of `eval_sets`.

    The questions come from `eval_sets`, or, if it is empty, from the rows; they are then one set, graded by `grader`
    ("numeric_answer" by default). Several rows may answer the same question. A set without any answer is left out.
    Raises UsageError for a row that cannot be read, where the message shows the row, and for rows that need more than
    `limit` bytes.
    """
    rows: list[Row] = []
    memory = 0
    try:
        for number, row in enumerate(read_file(data_file(str(path)), {}, limit, progress), start=1):
            memory += row_bytes(row, f"row {number}", limit, (*COMPLETIONS, "messages"))
            require_memory(memory, limit, "task.memory")
            rows.append(row)
    except UsageError as error:
        raise UsageError(f"--answers {path}: {error}") from None
    if not rows:
        raise UsageError(f"--answers {path}: has no rows; write one row per completion")
    prompts: dict[tuple[int, str], Prompt] = {}
    answers: dict[tuple[int, str], list[Completion]] = {}
    index = _QuestionIndex(eval_sets)
    for number, row in enumerate(rows):
        where = f"--answers {path}, row {number + 1}"
        fields = _unwrapped(row)
        texts = _texts(fields, where)
        if eval_sets:
            place, prompt = index.find(fields, where)
        else:
            place, prompt = 0, _prompt_from_row(fields, number, path.stem, where)
        before = prompts.setdefault((place, prompt.id), prompt)
        if (before.text, before.columns.get("answer")) != (prompt.text, prompt.columns.get("answer")):
            raise UsageError(f"{where}: has the id of another question, {prompt.id!r}; {_shown(row)}")
        finish_reason = fields.get("finish_reason")
        reason: Any = finish_reason if finish_reason in ("stop", "length") else ""
        answers.setdefault((place, prompt.id), []).extend(Completion((), (), (), reason, 0, text) for text in texts)
    if eval_sets:
        sets = [(rows_.name, rows_.domain, rows_.graders, index.counts[place]) for place, rows_ in enumerate(eval_sets)]
    else:
        grader_name = grader or "numeric_answer"
        sets = [(path.stem, None, {path.stem: Named(grader_name, find_grader(grader_name))}, 0)]
    answered = []
    for place, (name, domain, graders, count) in enumerate(sets):
        found = {key: prompt for key, prompt in prompts.items() if key[0] == place}
        if not found:
            progress.note(f"{name or HELD_OUT}: {path} answers none of its {count:,} questions; it is left out")
            continue
        completions = [answers[key] for key in found]
        samples = min(map(len, completions))
        eval_set = EvalSet(name, list(found.values()), graders, SamplingParams(0.0, 1), samples, 0, domain)
        answered.append(Answered(eval_set, completions, max(0, count - len(found))))
    return answered


def _unwrapped(row: Row) -> Row:
    """The row with nested fields moved up: `doc` of lm-evaluation-harness, `columns` of samples.parquet."""
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
    """The completions of a row. Raises UsageError if there are none."""
    name = next((name for name in COMPLETIONS if row.get(name) is not None), None)
    messages = row.get("messages")
    if name is None and isinstance(messages, list) and messages and isinstance(messages[-1], Mapping):
        name = "messages" if messages[-1].get("role") == "assistant" else None
    if name is None:
        raise UsageError(f"{where}: has no completion; name it {', '.join(COMPLETIONS[:3])}, …; {_shown(row)}")
    texts = _texts_in(row[name])
    if not texts:
        raise UsageError(f"{where}: {name} contains no text; {_shown(row)}")
    return texts


def _texts_in(value: Any) -> list[str]:
    """The texts in a value: the value itself, the items of a list, or the last of a list of messages.

    A null in a list is an empty answer. Unpaired surrogates, which cannot be written, are replaced.
    """
    if isinstance(value, str):
        return [value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, Mapping) and isinstance(value.get("content"), list):
        return _texts_in(text_of_content(value["content"]))
    if isinstance(value, Mapping):
        inner = next((value[name] for name in ("text", "content", "message", *COMPLETIONS) if name in value), None)
        return _texts_in(inner)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) and "role" in item for item in value):
            return _texts_in(value[-1]) or [""]  # null beside a tool call
        return [text for item in value for text in ([""] if item is None else _texts_in(item))]
    return []


_Question = tuple[int, Prompt]  # the place of its evaluation set, and the question


class _QuestionIndex:
    """Finds the questions of evaluation sets by id, text or number."""

    def __init__(self, eval_sets: Sequence[EvalSetRows]) -> None:
        self.by_id: dict[str, _Question] = {}
        self.by_dataset_id: dict[str, _Question] = {}
        self.by_text: dict[str, _Question] = {}
        self.in_order: list[_Question] = []
        self.counts = [sum(len(part.rows) for part in eval_set.parts) for eval_set in eval_sets]  # questions
        for place, part in ((place, part) for place, eval_set in enumerate(eval_sets) for part in eval_set.parts):
            for number, row in zip(part.numbers, part.rows, strict=True):
                columns = {key: value for key, value in row.items() if key != "prompt"}
                question = place, Prompt(f"{part.name}/{number}", row["prompt"], (), part.name, columns)
                self.in_order.append(question)
                self.by_id.setdefault(question[1].id, question)
                if isinstance(columns.get("id"), str | int):
                    self.by_dataset_id.setdefault(str(columns["id"]), question)
                for text in _question_texts(question[1]):
                    self.by_text.setdefault(text, question)

    def find(self, row: Row, where: str) -> _Question:
        """The question that a row answers, by its id, its text, or its number, with the place of its evaluation set.

        If the row has a number and a text, they must agree. Raises UsageError if no question matches.
        """
        if isinstance(prompt_id := row.get("prompt_id"), str) and prompt_id in self.by_id:
            return self.by_id[prompt_id]
        texts = [_plain(text) for name in QUESTIONS for text in _texts_in(row.get(name))[-1:]]
        for text in texts:
            if text in self.by_text:
                return self.by_text[text]
        question = self._by_number(row)
        if question is None:
            raise UsageError(
                f"{where}: matches no question of the task; give its prompt_id, its text as question, or its number "
                f"from 0 as index; {_shown(row)}"
            )
        prompt = question[1]
        known_texts = _question_texts(prompt)
        if texts and not any(known in text or text in known for text in texts for known in known_texts):
            raise UsageError(
                f"{where}: has the number of {prompt.id} and the text of another question; give the text as the task "
                f"has it, or only the number, which counts from 0; {_shown(row)}"
            )
        return question

    def _by_number(self, row: Row) -> _Question | None:
        dataset_id = row.get("id")
        if self.by_dataset_id and isinstance(dataset_id, str | int):
            return self.by_dataset_id.get(str(dataset_id))
        for name in NUMBERS:
            number = row.get(name)
            if isinstance(number, float) and number.is_integer():
                number = int(number)
            if isinstance(number, str) and number.isascii() and number.isdecimal():
                number = int(number)
            if type(number) is int and 0 <= number < len(self.in_order):
                return self.in_order[number]
        return None


def _question_texts(prompt: Prompt) -> list[str]:
    """The texts by which a row may quote a question: the question alone, or the whole prompt."""
    question = prompt.columns.get("question")
    return [_plain(text) for text in (question, prompt.text) if isinstance(text, str) and text.strip()]


def _prompt_from_row(row: Row, number: int, name: str, where: str) -> Prompt:
    """The question that a row brings itself. Raises UsageError if it has no reference."""
    reference = next((column for column in REFERENCES if row.get(column) is not None), None)
    if reference is None and "solution" not in row:
        raise UsageError(
            f"{where}: has no reference; name it {', '.join(REFERENCES[:4])}, …, or name the task with --task; "
            f"{_shown(row)}"
        )
    columns = {key: value for key, value in row.items() if key not in COMPLETIONS and key != "finish_reason"}
    columns["answer"] = row["solution" if reference is None else reference]
    text = next((text for column in QUESTIONS for text in _texts_in(row.get(column))[-1:]), "")
    row_id = next((row[key] for key in ("prompt_id", *NUMBERS) if isinstance(row.get(key), str | int)), None)
    prompt_id = f"{name}/{number}" if row_id is None else str(row_id)
    return Prompt(prompt_id, text or f"row {number + 1}", (), name, columns)


def _plain(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def _shown(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return f"the row is {text[:300]}{'…' if len(text) > 300 else ''}"
