"""Grading one answer, with a built-in or a user-defined grader."""

from __future__ import annotations

import re
from typing import Any

from gruppo.errors import RunError
from gruppo.rewards.grading.graders import GRADERS, Named
from gruppo.rewards.grading.last_number import last_number
from gruppo.rewards.grading.verdicts import Verdict, verdicts
from gruppo.types import Prompt


def vote(verdict: Verdict) -> str | None:
    """A key that is equal for equal answers, or None if no answer could be extracted.

    All correct answers have the same key. Other answers are identified by their number, otherwise by their text without
    case and whitespace.
    """
    if verdict.correct:
        return "right"
    if verdict.extracted is None:
        return None
    number = last_number(verdict.extracted) if _NUMERIC.fullmatch(verdict.extracted.strip()) else None
    return f"= {number}" if number is not None else f": {''.join(verdict.extracted.split()).casefold()}"


_NUMERIC = re.compile(r"[-−+$€£]?[\d,./]+%?", re.ASCII)


def grade_answer(text: str, prompt: Prompt, grader: Named) -> Verdict:
    """Grade an answer.

    A user-defined grader has no extraction rules: the last number counts as the extracted answer, otherwise the whole
    text. Raises RunError if a user-defined grader raises, or returns anything but True or False.
    """
    if grader.name in GRADERS:
        try:
            return verdicts(text, prompt.columns, grader.name)
        except Exception as error:
            raise _failed(grader.name, prompt, error) from error
    number = last_number(text)
    extracted = text.strip() if number is None else str(number)
    return Verdict(_is_correct(grader, text, prompt), extracted or None, grader.name)


def _is_correct(named: Named, text: str, prompt: Prompt) -> bool:
    try:
        verdict: Any = named.grader(text, prompt.columns)
    except Exception as error:
        raise _failed(named.name, prompt, error) from error
    if hasattr(verdict, "item"):
        verdict = verdict.item()  # numpy's bool
    if hasattr(verdict, "close"):
        verdict.close()  # a coroutine that is never awaited
    if not isinstance(verdict, bool) and verdict not in (0, 1):
        raise RunError(
            f"evaluation.grader: returned {type(verdict).__name__} {verdict!r} for {prompt.id}, not True or False"
        )
    return bool(verdict)


def _failed(name: str, prompt: Prompt, error: Exception) -> RunError:
    return RunError(f'evaluation.grader = "{name}": failed on {prompt.id} ({type(error).__name__}: {error})')
