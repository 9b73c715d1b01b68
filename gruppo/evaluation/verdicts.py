"""The verdict on an answer, by a grader of ours or of a user."""

from __future__ import annotations

import re
from typing import Any

from gruppo.errors import RunError
from gruppo.rewards.grading.graders import GRADERS, Named
from gruppo.rewards.grading.last_number import last_number
from gruppo.rewards.grading.verdicts import Verdict, verdicts
from gruppo.types import Prompt


def vote(verdict: Verdict) -> str | None:
    """What an answer says, equal for equal answers; None where nothing could be extracted. All right answers are equal;
    others are by the value of a number, or else by their text without case and space."""
    if verdict.correct:
        return "right"
    if verdict.extracted is None:
        return None
    number = last_number(verdict.extracted) if _NUMERIC.fullmatch(verdict.extracted.strip()) else None
    return f"= {number}" if number is not None else f": {''.join(verdict.extracted.split()).casefold()}"


_NUMERIC = re.compile(r"[-−+$€£]?[\d,./]+%?", re.ASCII)


def mark(text: str, prompt: Prompt, grader: Named) -> Verdict:
    """The verdict on an answer. Raises RunError where a grader of the user's raises, or gives anything but yes or no;
    it has no rules of extraction, and votes by the last number, or else by the whole text."""
    if grader.name in GRADERS:
        try:
            return verdicts(text, prompt.columns, grader.name)
        except Exception as error:
            raise _failed(grader.name, prompt, error) from error
    number = last_number(text)
    said = text.strip() if number is None else str(number)
    return Verdict(_graded(grader, text, prompt), said or None, grader.name)


def _graded(named: Named, text: str, prompt: Prompt) -> bool:
    try:
        verdict: Any = named.grader(text, prompt.columns)
    except Exception as error:
        raise _failed(named.name, prompt, error) from error
    if hasattr(verdict, "item"):
        verdict = verdict.item()  # numpy's bool
    if hasattr(verdict, "close"):
        verdict.close()  # a coroutine that nobody will await
    if not isinstance(verdict, bool) and verdict not in (0, 1):
        raise RunError(
            f"evaluation.grader: gives {type(verdict).__name__} {verdict!r} on {prompt.id}, not True or False"
        )
    return bool(verdict)


def _failed(name: str, prompt: Prompt, error: Exception) -> RunError:
    return RunError(f'evaluation.grader = "{name}": fails on {prompt.id} ({type(error).__name__}: {error})')
