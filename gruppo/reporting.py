"""How the library says what it is doing. It prints nothing itself: the command line passes a reporter that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

Advance = Callable[[float], None]


class Reporter(Protocol):
    """Shows progress and notes to a person."""

    def progress(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """A bar named `label` over `total` units (None: not known); call what it yields with the units just done."""

    def note(self, text: str) -> None:
        """A line of plain text."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of a finished step."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def progress(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See `Reporter`."""
        yield lambda _: None

    def note(self, text: str) -> None:
        """See `Reporter`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Reporter`."""
