"""Build a row's prompt from its columns, and decide by its prompt whether the row is held out."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gruppo.data.offline import with_prompt
from gruppo.errors import UsageError, nearest
from gruppo.types import Row

if TYPE_CHECKING:
    from gruppo.config.sections import Task

# Columns that may contain the question if a dataset has no `prompt`, most likely first.
_LIKELY = ("question", "problem", "query", "instruction", "input", "messages", "text")


def transform(rows: Iterable[Row], task: Task, field: str, source: str, answered: bool = False) -> list[Row]:
    """Apply a task's `columns` (renamed), `template` (filled in) and `system` (put in front); check every prompt.

    `answered`: rows also get a completion, or chosen and rejected completions (see `gruppo.data.offline`). `field`
    ("task", "mixture[1]", "evaluation.task") and `source` (name of the rows) appear in errors. Raises UsageError if
    there are no rows, a column is unknown, a template is invalid, or a prompt is neither text nor messages.
    """
    parts = None if task.template is None else _parse(task.template, f"{field}.template")
    completion = None if task.completion is None else _parse(task.completion, f"{field}.completion")
    transformed = []
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        if not isinstance(row, Mapping):
            raise UsageError(f"{where}: {row!r} is not a mapping; write {_EXAMPLES}")
        if invalid := [column for column in row if not isinstance(column, str)]:
            raise UsageError(f"{where}: the column name {invalid[0]!r} is not text; write {_EXAMPLES}")
        changed = _renamed(row, task.columns, field, where) if task.columns else dict(row)
        if parts is not None:
            changed["prompt"] = _filled(parts, changed, f"{field}.template", where)
        if answered:
            if completion is not None:
                changed["completion"] = _filled(completion, changed, f"{field}.completion", where)
            changed = with_prompt(changed, where)
        if "prompt" not in changed:
            raise UsageError(f"{where}: {_no_prompt(changed, field)}")
        changed["prompt"] = _prompt(changed["prompt"], where)
        if task.system is not None:
            changed["prompt"] = _with_system(changed["prompt"], task.system)
        transformed.append(changed)
    if not transformed:
        raise UsageError(f"{source} has no rows; give at least one row with a prompt")
    return transformed


def in_held_out(row: Row, share: float) -> bool:
    """Whether a row is held out: the SHA-256 of its prompt, as a fraction of 1, is below `share` (0 to 1).

    The result does not depend on the order, the other rows or the seed, and is the same for equal prompts.
    """
    digest = hashlib.sha256(prompt_text(row).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_text(row: Row) -> str:
    """A prompt as text, messages as JSON; equal prompts give equal texts."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)


_EXAMPLES = '{"prompt": "text"} or {"prompt": [{"role": "user", "content": "text"}]}'


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str], field: str, where: str) -> Row:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UsageError(
                f'{field}.columns = {{{ours} = "{theirs}"}}: {where} has no column "{theirs}"{nearest(theirs, row)}; '
                f"its columns: {', '.join(row)}"
            )
    others = {key: value for key, value in row.items() if key not in columns and key not in columns.values()}
    return {**{ours: row[theirs] for ours, theirs in columns.items()}, **others}


def _parse(template: str, field: str) -> Sequence[tuple[str, str | None]]:
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


def _filled(parts: Sequence[tuple[str, str | None]], row: Row, field: str, where: str) -> str:
    pieces = []
    for text, column in parts:
        pieces.append(text)
        if column is None:
            continue
        if column not in row:
            raise UsageError(
                f"{field}: {where} has no column {{{column}}}{nearest(column, row)}; its columns: {', '.join(row)}"
            )
        value = row[column]
        if value is None:
            raise UsageError(f"{field}: {where} has no value in {{{column}}}; give it one, or leave the row out")
        pieces.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
    return "".join(pieces)


def _no_prompt(row: Row, field: str) -> str:
    likely = next((name for name in _LIKELY if name in row), None)
    names = ", ".join(row) or "none"
    if likely is None:
        return f'it has no prompt (columns: {names}); name one: {field}.columns = {{prompt = "…"}}, or a template'
    return f'it has no prompt (columns: {names}); write {field}.columns = {{prompt = "{likely}"}}'


def _prompt(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    """Check a prompt: text or a list of messages. Message keys without a value, which tables add, are removed."""
    if isinstance(prompt, str):
        if not prompt:
            raise UsageError(f"{where}: the prompt is empty; write {_EXAMPLES}")
        return prompt
    if not isinstance(prompt, list | tuple) or not prompt:
        raise UsageError(f"{where}: prompt = {prompt!r} is neither text nor a list of messages; write {_EXAMPLES}")
    for message in prompt:
        if not isinstance(message, Mapping) or "content" not in message or not isinstance(message.get("role"), str):
            raise UsageError(f"{where}: prompt has the message {message!r} without role and content; write {_EXAMPLES}")
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"} for message in prompt
    ]


def _with_system(prompt: str | list[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
