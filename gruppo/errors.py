"""Errors that are the user's to mend. Each message names the place, the value and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something that the user gave is wrong: a recipe, data, a reward, a model or a folder. Exit code 2."""


class RunError(RuntimeError):
    """A run that had begun could not go on; what it had is in its folder. Exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the known word nearest to `word`, or '; known: …' where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"
