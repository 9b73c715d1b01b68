"""Read rows of public benchmarks, whose copies name their columns differently, as question, answer and choices.

There is one reader per family: word problems, formulas, multiple choice. An error quotes the row that cannot be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gruppo.data.arrow import plain
from gruppo.data.boxes import last_box
from gruppo.data.options import LETTERS, letters_of, options_of, split_options, without_letters
from gruppo.errors import UsageError
from gruppo.types import Row
from gruppo.utils.text import text_of_content

_QUESTION = ("question", "problem", "question_concat", "input", "query", "original_text", "squestion", "prompt", "text")
_NUMBER = (
    "answer_number", "final_ans", "numerical_answer", "result", "target", "golden", "answer", "final_answer",
    "ground_truth", "expected_answer", "label", "lsolutions", "result_float", "output",
)  # fmt: skip
_FORMULA = ("answer", "final_answer", "ground_truth", "expected_answer", "target", "gold", "label")
_LETTER = ("correct", "label", "gold", "answerkey", "answer", "correct_option", "target", "answer_index", "solution")
_ANSWERS = {*_NUMBER, *_FORMULA, *_LETTER} - {"solution"}
_OPTIONS = ("options", "choices", "possible answers", "possible_answers")
# Other columns that are kept, and our names for them.
_KEPT = {
    "id": "id", "idx": "id", "unique_id": "id", "level": "level", "type": "type", "subject": "topic", "topic": "topic",
    "category": "category", "grade": "grade", "reasoning_step": "reasoning_step", "num_digits": "num_digits",
    "equation": "equation", "solution_type": "type", "solution-type": "type", "year": "year", "part": "part",
    "solution": "solution", "rationale": "solution", "other": "source",
}  # fmt: skip


def read_row(read: Callable[[Mapping[str, Any]], Row], row: Mapping[str, Any]) -> Row:
    """Read a row with one of the readers below. A list of several answers becomes a list of alternatives in `answer`.

    Raises UsageError if the reader cannot read the row with one of the answers.
    """
    listed = (name for name, value in row.items() if isinstance(value, list | tuple) and len(value) > 1)
    column = next((name for name in listed if str(name).strip().lower() in _ANSWERS), None)
    if column is None:
        return read(row)
    rows = [read({**row, column: answer}) for answer in row[column]]
    answers = list(dict.fromkeys(each["answer"] for each in rows))
    return {**rows[0], "answer": answers if len(answers) > 1 else answers[0]}


def read_number(row: Mapping[str, Any]) -> Row:
    """Read a word problem: a question (or body and question) with a number or with a solution that ends with "#### 18".

    Returns a row with `question` and `answer`. Raises UsageError if the question or a number in the answer is missing.
    """
    read = read_number_or_words(row)
    if not any(letter.isdigit() for letter in read["answer"]):
        raise _unreadable(row, f"its answer {read['answer']!r} contains no number")
    return read


def read_number_or_words(row: Mapping[str, Any]) -> Row:
    """Read a word problem as `read_number` does; its answer may also be in words, such as "Mrs. Hilt".

    Raises UsageError if the question or the answer is missing.
    """
    columns = _lowered(row)
    body, asked = columns.get("body"), columns.get("question")
    question = f"{_text(body)} {_text(asked)}" if body and asked else _question(columns, row)
    found = _answer(columns, _NUMBER, row)
    found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
    text = _text(found)
    kept = _others(columns)
    if "####" in text:
        kept["solution"], text = text, text.rpartition("####")[2]
    elif (box := last_box(text)) is not None:
        kept["solution"], text = text, box[1]
    return {**kept, "question": question, "answer": text.strip()}


def read_formula(row: Mapping[str, Any]) -> Row:
    """Read a problem with an answer in LaTeX, or with a solution that has the answer in a box.

    Returns a row with `question` and `answer`. Raises UsageError if either is missing.
    """
    columns = _lowered(row)
    question = _bare(_question(columns, row, ("problem", *_QUESTION)))
    found = next((columns[name] for name in _FORMULA if _has_value(columns.get(name))), None)
    if found is None:
        box = last_box(_text(columns.get("solution") or ""))
        if box is None:
            raise _unreadable(row, f"it has no answer (one of {', '.join(_FORMULA)}) and no solution with a box")
        found = box[1]
    answer = _text(found[0] if isinstance(found, list | tuple) and found else found)
    if "\\boxed" in answer and (box := last_box(answer)) is not None:
        answer = box[1]
    return {**_others(columns), "question": question, "answer": answer}


def read_choice(row: Mapping[str, Any]) -> Row:
    """Read a question with options and the letter, letters, index or text of the correct ones.

    Returns a row with `question`, `choices` (without letters) and `answer` (letters). Raises UsageError if one of them
    is missing, if there are fewer than two options, or if the answer is not one of them.
    """
    columns = _lowered(row)
    question = _question(columns, row)
    choices = _choices(columns)
    bare = _bare(question)
    if not choices or bare != question:
        question, within = _within(bare)
        choices = choices or within
    if len(choices) < 2:
        raise _unreadable(
            row, f"it has no options (a list or text in one of {', '.join(_OPTIONS)}; or columns A, B, …)"
        )
    found = _answer(columns, _LETTER, row)
    found = found[0] if isinstance(found, list | tuple) and len(found) == 1 else found
    try:
        answer = letters_of(found, choices)
    except UsageError as error:
        raise _unreadable(row, str(error)) from None
    if LETTERS.index(answer[-1]) >= len(choices):
        raise _unreadable(row, f"its answer {answer} is not one of its {len(choices)} options")
    kept = {name: value for name, value in _others(columns).items() if value != found}
    return {**kept, "question": question, "choices": choices, "answer": answer}


def _choices(columns: Mapping[str, Any]) -> list[str]:
    given = next((columns[name] for name in _OPTIONS if _has_value(columns.get(name))), None)
    if given is None:
        single = [columns.get(letter.lower()) for letter in LETTERS]
        return [_text(option) for option in single[: single.index(None)]] if None in single else []
    if isinstance(given, str):
        return split_options(given)
    if isinstance(given, Mapping):
        return options_of({"choices": given})
    return without_letters([_text(option) for option in given])


_PROMPTED = re.compile(
    r"\s*(?:Q:|问题[：:])(.*?)"
    r"(?:答案[：:](?:从A到[A-Z][，,]\s*我们应选择)?|A:(?: Among A through [A-Z], the answer is)?)?\s*",
    re.DOTALL,
)


def _bare(question: str) -> str:
    """A question without the words around it that ask for an answer: "问题：… 答案："."""
    prompted = _PROMPTED.fullmatch(question)
    return prompted[1].strip() if prompted else question


def _within(question: str) -> tuple[str, list[str]]:
    """Split options off the question that contains them: "… Answer Choices: (A)4 (B)5"; [] if there are none."""
    for opening in ("Answer Choices:", "Options:", "从以下选项中选择:", "选项:", "选项：", "\n"):
        before, found, after = question.partition(opening)
        if found and len(options := split_options(after)) > 1:
            return before.strip(), options
    return question, []


def _lowered(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise _unreadable(row, "it is not an object with columns")
    return {str(name).strip().lower(): value for name, value in row.items()}


def _question(columns: Mapping[str, Any], row: Mapping[str, Any], names: Iterable[str] = _QUESTION) -> str:
    for name in names:
        if isinstance(columns.get(name), str) and columns[name].strip():
            return _tidied(columns[name])
    asked = columns.get("messages") or columns.get("prompt")
    if isinstance(asked, list) and asked and isinstance(asked[0], Mapping):
        user = [message for message in asked if message.get("role") == "user" and message.get("content")]
        if user:
            return _tidied(text_of_content(user[-1]["content"]))
    raise _unreadable(row, f"it has no question (one of {', '.join(names)}, or messages)")


def _tidied(text: str) -> str:
    return text.strip().rstrip("\\").strip()


def _answer(columns: Mapping[str, Any], names: Iterable[str], row: Mapping[str, Any]) -> Any:
    for name in names:
        if _has_value(columns.get(name)):
            return columns[name]
    raise _unreadable(row, f"it has no answer (one of {', '.join(names)})")


def _has_value(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _text(value: Any) -> str:
    """A value as text, whole numbers without decimals: 14.0 is "14"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _others(columns: Mapping[str, Any]) -> Row:
    return {ours: plain(columns[name]) for name, ours in _KEPT.items() if _has_value(columns.get(name))}


def _unreadable(row: Any, reason: str) -> UsageError:
    shown = str(row)
    names = f"; its columns: {', '.join(map(str, row))}" if isinstance(row, Mapping) else ""
    return UsageError(f"cannot be read: {reason}{names}; the row: {shown[:300]}{'…' if len(shown) > 300 else ''}")
