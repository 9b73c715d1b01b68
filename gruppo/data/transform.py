"""Build a row's prompt from its columns, and decide by its question whether the row is held out."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gruppo.config.units import as_bytes
from gruppo.data.arrow import plain
from gruppo.data.messages import EXAMPLES, split_answer, text_or_messages
from gruppo.data.offline import COMPLETIONS, with_prompt
from gruppo.data.values import has_bytes, is_missing, require_memory, row_bytes
from gruppo.errors import UsageError, nearest
from gruppo.types import Row

if TYPE_CHECKING:
    from gruppo.config.sections import Task

# Columns that may contain the question if a dataset has no `prompt`, most likely first.
_LIKELY = ("question", "problem", "query", "instruction", "input", "text")

# Columns that gruppo itself reads, so that they cannot hold bytes.
_READ = ("prompt", "answer", "solution", "tools", "chat_template_kwargs")


class Transformed(NamedTuple):
    """A row with its prompt. `key`: the text whose hash decides whether the row is held out."""

    row: Row
    key: str


def transform(rows: Iterable[Row], task: Task, field: str, source: str, answered: bool = False) -> list[Transformed]:
    """Apply a task's `columns` (renamed), `template` (filled in) and `system` (put in front); check every prompt.

    A row without a prompt may have `messages`: a conversation, whose last message, if it is an answer, becomes the
    column `answer`. `answered`: rows get a completion, or chosen and rejected completions (see `gruppo.data.offline`).
    `field` ("task", "mixture[1]", "evaluation.task") and `source` (name of the rows) appear in errors.

    Raises UsageError if there are no rows or too many for the task's memory, if a column is unknown, a template is
    invalid, or a value cannot be used; such an error names row, column and value.
    """
    parts = None if task.template is None else _parse(task.template, f"{field}.template")
    completion = None if task.completion is None else _parse(task.completion, f"{field}.completion")
    transformed = []
    memory, limit = 0, as_bytes(task.memory)
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if not isinstance(row, Mapping):
            raise UsageError(f"{where}: {row!r} is not a mapping; write {EXAMPLES}")
        if invalid := [column for column in row if not isinstance(column, str)]:
            raise UsageError(f"{where}: the column name {invalid[0]!r} is not text; write {EXAMPLES}")
        memory += row_bytes(row, where, limit)
        require_memory(memory, limit, f"{field}.memory")
        changed = _renamed(row, task.columns, field, where) if task.columns else dict(row)
        columns = changed
        if parts is not None:
            changed = {**changed, "prompt": _filled(parts, changed, f"{field}.template", where)}
        if answered and completion is not None:
            changed = {**changed, "completion": _filled(completion, changed, f"{field}.completion", where)}
        _refuse_bytes(changed, (*_READ, *COMPLETIONS) if answered else _READ, where)
        changed = _with_completion(changed, where) if answered else _with_question(changed, where)
        if changed.get("prompt") is None:
            raise UsageError(f"{where}: {_no_prompt(changed, field)}")
        prompt = _prompt(changed["prompt"], where)
        key = _key(prompt) if parts is None else _key_of_columns(parts, columns)
        if task.system is not None:
            prompt = _with_system(prompt, task.system)
        changed["prompt"] = prompt
        transformed.append(Transformed(changed, key if task.held_out_by == "question" else _key(prompt)))
    if not transformed:
        raise UsageError(f"{source} has no rows; give at least one row with a prompt")
    return transformed


def in_held_out(key: str, share: float) -> bool:
    """Whether a row is held out: the SHA-256 of its key, as a fraction of 1, is below `share` (0 to 1).

    The result does not depend on the order, the other rows or the seed, and is the same for equal keys.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_text(row: Row) -> str:
    """A prompt as text, messages as JSON; equal prompts give equal texts."""
    return _key(row["prompt"])


def _key(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)


def _key_of_columns(parts: _Parts, row: Row) -> str:
    """The key of a prompt from a template: the row's own prompt, if the template contains it, else its columns."""
    names = sorted({column for _, column in parts if column is not None})
    if "prompt" in names or len(names) == 1:
        return _key(plain(row["prompt" if "prompt" in names else names[0]]))
    return _key([plain(row[name]) for name in names])


def _refuse_bytes(row: Row, columns: Iterable[str], where: str) -> None:
    for column in columns:
        if has_bytes(row.get(column)):
            raise UsageError(
                f"{where}: {column} = {row[column]!r:.60} has bytes; write text, which value.decode() gives"
            )


def _with_completion(row: Row, where: str) -> Row:
    """The row with prompt and completions in one form."""
    given = {name: value for name, value in row.items() if value is not None or name not in ("prompt", *COMPLETIONS)}
    for name in ("prompt", "messages", *COMPLETIONS):
        if isinstance(given.get(name), str | list | tuple) and given[name]:
            given[name] = text_or_messages(given[name], where, name)
    return with_prompt(given, where)


def _with_question(row: Row, where: str) -> Row:
    """The row, with the prompt and the answer of its conversation if it has `messages` and no prompt."""
    if row.get("prompt") is not None or not isinstance(row.get("messages"), str | list | tuple):
        return dict(row)
    messages = text_or_messages(row["messages"], where, "messages")
    if isinstance(messages, str):
        return dict(row)
    prompt, answer = split_answer(messages)
    others = {name: value for name, value in row.items() if name != "messages"}
    if answer is not None and others.get("answer") is None and others.get("solution") is None:
        others["answer"] = answer
    return {**others, "prompt": prompt}


_Parts = Sequence[tuple[str, str | None]]


INHERITED = "; columns that this table does not set are those of [task]: write columns = {} for none"


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], field: str, where: str) -> Row:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UsageError(
                f'{field}.columns = {{{ours} = "{theirs}"}}: {where} has no column "{theirs}"{nearest(theirs, row)}; '
                f"its columns: {', '.join(row)}{INHERITED if field.endswith('.task') else ''}"
            )
    others = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**{ours: row[theirs] for ours, theirs in columns.items()}, **others}


def _parse(template: str, field: str) -> _Parts:
    """Split a template into pairs (plain text, column that follows it or None)."""
    advice = "write columns as {name}, and double literal braces: {{ }}"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"{field} = {template!r}: {error}; {advice}") from None
    for _, column, form, conversion in parsed:
        if column is not None and (not column.strip() or form or conversion):
            raise UsageError(f"{field} = {template!r}: {{{column}…}} is not the name of a column; {advice}")
    if not any(column for _, column, _, _ in parsed):
        raise UsageError(f"{field} = {template!r}: contains no column, so all prompts would be equal; {advice}")
    return [(text, column) for text, column, _, _ in parsed]


def _filled(parts: _Parts, row: Row, field: str, where: str) -> str:
    """The text of a template with the values of a row: objects and lists as JSON, any other value as plain text."""
    pieces = []
    for text, column in parts:
        pieces.append(text)
        if column is None:
            continue
        if column not in row:
            raise UsageError(
                f"{field}: {where} has no column {{{column}}}{nearest(column, row)}; its columns: {', '.join(row)}"
            )
        value = plain(row[column])
        if is_missing(value):
            raise UsageError(f"{field}: {where} has no value in {{{column}}}; give it one, or leave the row out")
        if has_bytes(value):
            raise UsageError(
                f"{field}: {where} has bytes in {{{column}}}, {value!r:.60}; write text, which value.decode() gives"
            )
        pieces.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "".join(pieces)


def _no_prompt(row: Row, field: str) -> str:
    likely = next((name for name in _LIKELY if isinstance(row.get(name), str)), None)
    names = ", ".join(row) or "none"
    if "prompt" in row:
        return "prompt = None: has no value; give it one, or leave the row out"
    if "messages" in row:
        return f"it has no prompt, and messages = {row['messages']!r:.100} is not a conversation; write {EXAMPLES}"
    if likely is None:
        return f'it has no prompt (columns: {names}); name one: {field}.columns = {{prompt = "…"}}, or a template'
    return f'it has no prompt (columns: {names}); write {field}.columns = {{prompt = "{likely}"}}'


def _prompt(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    """Check a prompt: text or a list of messages."""
    if prompt == "":
        raise UsageError(f"{where}: the prompt is empty; write {EXAMPLES}")
    return text_or_messages(prompt, where, "prompt")


def _with_system(prompt: str | list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
