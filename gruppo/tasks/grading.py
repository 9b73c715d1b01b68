"""stub until merge"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gruppo.tasks.answers import find_grader, last_number


@dataclass(frozen=True)
class Verdict:
    correct: bool
    extracted: str | None
    rule: str
    others: Mapping[str, bool] = field(default_factory=dict)


def verdicts(text: str, columns: Mapping[str, Any], grader: str) -> Verdict:
    number = last_number(text)
    return Verdict(find_grader(grader)(text, columns), None if number is None else str(number), grader)


def default_grader(task: str) -> str:
    return "number"


def domain(task: str, trained: object) -> str:
    return "out-of-domain"
