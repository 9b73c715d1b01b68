"""The interface through which the library reports progress: bars, notes and steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

Advance = Callable[[float], None]

# Characters that move a terminal's cursor, change colors, ring the bell or change the writing direction; and
# surrogates, which cannot be encoded.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters, except tabs and line breaks, escaped (\\x1b).

    Completions, columns and names thus cannot control the terminal.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Progress(Protocol):
    """Receives progress, notes and metrics for display."""

    def bar(self, label: str, total: float | None, unit: str) -> AbstractContextManager[Advance]:
        """A bar named `label` over `total` units (None: unknown). It yields a function that advances it by an
        amount."""

    def note(self, text: str) -> None:
        """Show a line of plain text."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of a finished step."""


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
