"""Load tasks in tests."""

from __future__ import annotations

from typing import Any

from gruppo.config.sections import Task
from gruppo.data.loading import Dataset, load_questions, load_training
from gruppo.types import Row
from gruppo.utils.progress import NullProgress


class Notes(NullProgress):
    """A progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def training(name: object, progress: NullProgress | None = None, **fields: object) -> list[Row]:
    return list(load_training(Task(name=str(name), **fields), "task", False, progress or NullProgress())[0].rows)


def given(rows: Any, progress: NullProgress | None = None, **fields: object) -> list[Row]:
    """Training rows that were passed from Python."""
    return list(load_training(Task(**fields), "task", False, progress or NullProgress(), rows)[0].rows)


def both_sides(name: object, **fields: object) -> tuple[Dataset, Dataset]:
    train, held_out = load_training(Task(name=str(name), **fields), "task", True, NullProgress())
    assert held_out is not None
    return train, held_out


def questions(name: object, **fields: object) -> Dataset:
    return load_questions(Task(name=str(name), **fields), "evaluation.task", NullProgress())
