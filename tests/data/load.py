"""Tasks as tests read them."""

from __future__ import annotations

from gruppo.config.recipe import Task
from gruppo.data.loading import Part, load_questions, load_training
from gruppo.types import Row
from gruppo.utils.progress import Silent


class Notes(Silent):
    """A reporter that remembers what it was told to note."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def training(name: object, reporter: Silent | None = None, **fields: object) -> list[Row]:
    return list(load_training(Task(name=str(name), **fields), "task", False, reporter or Silent())[0].rows)


def both_sides(name: object, **fields: object) -> tuple[Part, Part]:
    train, held = load_training(Task(name=str(name), **fields), "task", True, Silent())
    assert held is not None
    return train, held


def questions(name: object, **fields: object) -> Part:
    return load_questions(Task(name=str(name), **fields), "evaluation.task", Silent())
