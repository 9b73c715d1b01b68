"""How the library shows what it is doing: bars, notes and steps, for whoever wants to show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

Advance = Callable[[float], None]

# What moves a terminal's cursor, recolours, rings, or turns the direction of writing; and halves of characters, which
# cannot be written at all.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters but tabs and line breaks written out (\\x1b): a completion, a column or a name
    writes nothing to the terminal but itself."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Progress(Protocol):
    """Shows progress and notes to a person."""

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """A bar named `label` over `total` units (None: not known); call what it yields with the units just done."""

    def note(self, text: str) -> None:
        """A line of plain text."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of a finished step."""


class NullProgress:
    """Shows nothing."""

    @contextmanager
    def bar(self, label: str, total: float | None, unit: str) -> Iterator[Advance]:
        """See `Progress`."""
        yield lambda _: None

    def note(self, text: str) -> None:
        """See `Progress`."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """See `Progress`."""
