"""One group of a step, or all answers to one question of an evaluation, token by token, as data for a page.

Everything comes from a table of the run folder. A number that is not in it is None, never 0. JSON has no number for
NaN and infinities, so they are the texts "NaN", "inf" and "-inf". The other numbers have 7 significant digits, those
of float32.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa

from gruppo.errors import UsageError, is_visible
from gruppo.runs.reading import matching_rows, own_table, reading
from gruppo.runs.tables import EVALUATIONS, ROLLOUTS_AHEAD
from gruppo.ui.quantities import ANSWER, COMPLETION, Numbers, Ranges, as_numbers, rounded
from gruppo.ui.rendering import MOST_CHARACTERS, markdown
from gruppo.utils.nesting import too_deep
from gruppo.utils.text import as_json, text_of_content

PAGE_COMPLETIONS, PAGE_TOKENS = 16, 20_000  # the most on a page; one completion is on it in any case
MOST_RENDERED = 60_000  # characters of a page that are rendered as Markdown
MOST_TEXT = 200_000  # characters of one text
_NOT_FUNCTIONS = frozenset({"environment", "reward_model"})  # parts of a reward that no function returned
_SPECIAL = re.compile(r"<[|｜][^<>\s]{1,60}[|｜]>|</?[A-Za-z][\w.:-]{0,40}>|\[/?[A-Z][A-Z_]{1,40}\]")
_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)|^```python\b.*?(?:^```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)


def group_data(
    run: Path, step: int, group: int, offset: int = 0, limit: int = PAGE_COMPLETIONS, *, named: str | None = None
) -> dict[str, Any]:
    """A group of a step: its prompt, and completions from `offset` on, with all that is recorded per token.

    `step` counts from 1, `group` from 0. At most `limit` completions (at most PAGE_COMPLETIONS) of PAGE_TOKENS tokens
    in total are returned; `page` says which. Ranges and statistics are over the whole group. `named`: how the run is
    called in commands, by default its path. Raises UsageError if the step has no such group, or its table is damaged.
    """
    path = own_table(run, "rollouts", step)
    page = _Page(offset, limit)
    ranges = Ranges(COMPLETION)
    for row in _rows(path, ROLLOUTS_AHEAD, {"group": group}):
        numbers = {quantity.key: quantity.of(row) for quantity in COMPLETION}
        ranges.add(numbers, row["mask"])
        page.add(row, partial(_completion, row, numbers))
    if page.first is None:
        raise UsageError(f"{path}: step {step} has no group {group}; choose one of its groups, which count from 0")
    first = page.first
    rewards = [one["reward"] for one in page.outline if isinstance(one["reward"], float)]
    return {
        "kind": "group",
        "run": named or str(run),
        "step": step,
        "group": group,
        "skipped": first["skipped"],
        "prompt": _prompt(first, first["prompt"]),
        **page.contents(ranges),
        "rewards": {"known": len(rewards), "mean": sum(rewards) / len(rewards) if rewards else None},
        "commands": _commands(named or str(run), step, group, _object(first["reward_parts"])),
    }


def answers_data(
    run: Path, step: int, eval_set: str, prompt_id: str, offset: int = 0, limit: int = PAGE_COMPLETIONS
) -> dict[str, Any]:
    """All answers to one question of the evaluation after `step`, in the form of `group_data`, with their verdicts.

    `eval_set`: the name of a benchmark, "" for the task's own held-out questions. Raises UsageError if the evaluation
    has no such question, or its table is damaged.
    """
    path = own_table(run, "evaluations", step)
    page, ranges = _Page(offset, limit), Ranges(ANSWER)
    for row in _rows(path, EVALUATIONS, {"eval_set": eval_set, "prompt_id": prompt_id}):
        numbers = {quantity.key: quantity.of(row) for quantity in ANSWER}
        ranges.add(numbers, row["mask"])
        page.add(row, partial(_answer, row, numbers))
    if page.first is None:
        raise UsageError(f"{path}: has no question {prompt_id!r}; choose one of the evaluation's questions")
    return {
        "kind": "answers",
        "run": str(run),
        "step": step,
        "eval_set": eval_set,
        "skipped": None,
        "prompt": _prompt(page.first, page.first["question"]),
        **page.contents(ranges),
        "commands": [],
    }


class _Page:
    """The completions from `offset` on, up to the limits, and one line about every completion."""

    def __init__(self, offset: int, limit: int) -> None:
        self.offset, self.limit = max(0, offset), max(1, min(limit, PAGE_COMPLETIONS))
        self.first: dict[str, Any] | None = None
        self.outline: list[dict[str, Any]] = []
        self._shown: list[dict[str, Any]] = []
        self._tokens, self._full = 0, False

    def add(self, row: dict[str, Any], build: Callable[[], dict[str, Any]]) -> None:
        """Count a row, and build its completion if it is on the page."""
        self.first = self.first or row
        place, length = len(self.outline), len(row["token_ids"])
        number = row["completion"] if "completion" in row else row["sample"]
        reward = number_or_text(row["reward"] if "reward" in row else row["score"])
        self.outline.append({"number": number, "tokens": length, "reward": reward, "correct": row.get("correct")})
        if place < self.offset or self._full:
            return
        if len(self._shown) == self.limit or (self._shown and self._tokens + length > PAGE_TOKENS):
            self._full = True
            return
        self._tokens += length
        self._shown.append(build())

    def contents(self, ranges: Ranges) -> dict[str, Any]:
        """The fields of the data that both kinds of pages share."""
        left = MOST_RENDERED
        for one in self._shown:
            left -= min(len(one["text"]), MOST_CHARACTERS)
            one["rendered"] = str(markdown(one["text"])) if left >= 0 else None
        return {
            "quantities": ranges.described(),
            "completions": self._shown,
            "outline": self.outline,
            "page": {"offset": self.offset, "shown": len(self._shown), "total": len(self.outline)},
        }


def _rows(path: Path, schema: pa.Schema, where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The matching rows of a table. Lists of numbers are `Numbers`; other lists, and missing values, are Python's."""
    for table in matching_rows(path, schema, where):
        for place in range(len(table)):
            with reading(path, "restore it from a copy"):  # texts may be no UTF-8
                row = {name: _cell(table[name][place]) for name in schema.names}
            row["token_ids"] = row["token_ids"] or []
            count = len(row["token_ids"])
            row["mask"] = row["mask"] if _fits(row["mask"], count) else [True] * count
            row["token_texts"] = row["token_texts"] if _fits(row["token_texts"], count) else None
            yield row


def _cell(value: pa.Scalar) -> Any:
    if pa.types.is_list(value.type) and pa.types.is_floating(value.type.value_type):
        return as_numbers(value)
    return value.as_py()


def _fits(values: Sequence[Any] | None, count: int) -> bool:
    return values is not None and len(values) == count and None not in values


def _completion(row: dict[str, Any], numbers: Mapping[str, Numbers | None]) -> dict[str, Any]:
    final = row["values"]
    return {
        **_tokens(row, numbers, row["text"], row["completion"]),
        "policy_version": row["policy_version"],
        "staleness": row["staleness"],
        "reward": number_or_text(row["reward"]),
        "parts": _object(row["reward_parts"]),
        "steps": _steps(_object(row["steps"]), len(row["token_ids"])),
        "failure": row["failure"],
        "trained": row["trained"],
        "extra": _object(row["extra"]),
        "printed": {name: _clipped(str(text)) for name, text in _object(row["printed"]).items()},
        "verdict": {},
        "final_value": number_or_text(float(final.values[-1]))
        if final and len(final) > len(row["token_ids"])
        else None,
    }


def _answer(row: dict[str, Any], numbers: Mapping[str, Numbers | None]) -> dict[str, Any]:
    return {
        **_tokens(row, numbers, row["answer"], row["sample"]),
        "verdict": {
            "correct": row["correct"],
            "extracted": row["extracted"],
            "rule": row["rule"],
            "other_rules": _object(row["other_rules"]),
            "vote": row["vote"],
            "score": number_or_text(row["score"]),
        },
    }


def _tokens(row: dict[str, Any], numbers: Mapping[str, Numbers | None], text: Any, number: int) -> dict[str, Any]:
    """What every completion has: its text, its tokens up to PAGE_TOKENS, and the numbers of each."""
    count = min(len(row["token_ids"]), PAGE_TOKENS)
    texts = None if row["token_texts"] is None else row["token_texts"][:count]
    mask = row["mask"][:count]
    episode = _object(row["episode"]) or None
    return {
        "number": number,
        "text": _clipped(text or ""),
        "finish_reason": row["finish_reason"],
        "episode": episode,
        "token_ids": row["token_ids"][:count],
        "token_texts": texts,
        "tokens": len(row["token_ids"]),
        "mask": mask,
        "special": [place for place, one in enumerate(texts or ()) if _SPECIAL.fullmatch(one)],
        "blocks": _blocks(texts, mask, episode is not None),
        "values": {key: None if one is None else rounded(one.first(count)) for key, one in numbers.items()},
        "means": {key: None if one is None else one.mean(row["mask"]) for key, one in numbers.items()},
    }


def _blocks(texts: Sequence[str] | None, mask: Sequence[bool], with_calls: bool) -> list[dict[str, Any]]:
    """Observations, which are the runs of tokens that were not sampled, and calls, in order, as [start, end) tokens."""
    blocks, start = [], 0
    for place in range(1, len(mask) + 1):
        if place < len(mask) and mask[place] == mask[start]:
            continue
        if not mask[start]:
            blocks.append({"kind": "observation", "start": start, "end": place})
        elif with_calls and texts is not None:
            ends = list(accumulate(len(one) for one in texts[start:place]))  # in characters
            for found in _CALL.finditer("".join(texts[start:place])):
                first, last = bisect_right(ends, found.start()), bisect_left(ends, found.end())
                blocks.append({"kind": "call", "start": start + first, "end": start + last + 1})
        start = place
    return blocks


def _steps(steps: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The ends of reasoning steps by reward: {name, token, number, reward}; entries without a token are left out."""
    found = []
    for name, one in steps.items():
        rewards, ends = (one.get("rewards"), one.get("ends")) if isinstance(one, Mapping) else (None, None)
        if isinstance(rewards, list) and isinstance(ends, list):
            for number, (reward, end) in enumerate(zip(rewards, ends, strict=False), start=1):
                if type(end) is int and 0 <= end < count:
                    found.append({"name": name, "token": end, "number": number, "reward": reward})
    return found


def _prompt(row: Mapping[str, Any], content: str | None) -> dict[str, Any]:
    """The prompt of a group: messages or a text, its tokens, and the other columns of its row."""
    messages = _messages(content or "")
    ids = (row["prompt_token_ids"] or [])[:PAGE_TOKENS]
    texts = (row["prompt_token_texts"] or [])[:PAGE_TOKENS]
    texts = texts if _fits(texts, len(ids)) else []
    return {
        "id": row["prompt_id"],
        "text": _clipped(content or "") if messages is None else None,
        "messages": messages,
        "token_ids": ids or None,
        "token_texts": texts or None,
        "special": [place for place, one in enumerate(texts) if _SPECIAL.fullmatch(one)],
        "columns": _object(row["columns"]),
    }


def _messages(content: str) -> list[dict[str, Any]] | None:
    """The messages of a prompt with their text and, as JSON, what else they have; None if the prompt is a text."""
    try:
        read = json.loads(content) if content.startswith("[") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, list) or not all(isinstance(one, dict) and "role" in one for one in read):
        return None
    messages = []
    for one in read:
        rest = {name: value for name, value in one.items() if name not in ("role", "content")}
        text = _clipped(text_of_content(one.get("content")))
        messages.append({"role": str(one["role"]), "text": text, "more": as_json(rest) if rest else None})
    return messages


def _commands(run: str, step: int, group: int, parts: Mapping[str, Any]) -> list[dict[str, str]]:
    """For every reward function, the command that repeats its call on the group. None for names that hide characters,
    which nobody should paste into a shell."""
    names = [name for name in parts if name not in _NOT_FUNCTIONS and is_visible(name) and is_visible(run)]
    place = shlex.quote(run if not run.startswith("-") else f"./{run}")
    start = f"gruppo rerun-reward {place} --step {step} --group {group}"
    return [{"reward": name, "command": f"{start} {shlex.quote(f'--reward={name}')}"} for name in names]


def _object(text: str | None) -> dict[str, Any]:
    """The object in a JSON column; {"damaged": its text} if it is something else."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or too_deep(value):
        return {"damaged": _clipped(text)}
    return {name: _clean(entry) for name, entry in value.items()}


def _clean(value: Any) -> Any:
    """A value of JSON with texts of bounded length, and without the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _clean(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return _clipped(value) if isinstance(value, str) else number_or_text(value)


def number_or_text(value: Any) -> Any:
    """The value; the text "NaN", "inf" or "-inf" for a number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    return value


def _clipped(text: str) -> str:
    left = len(text) - MOST_TEXT
    return text if left <= 0 else f"{text[:MOST_TEXT]}… ({left:,} more characters)"
