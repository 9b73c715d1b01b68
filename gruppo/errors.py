"""Errors that are the user's to mend. Each message names the place, the value and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def one_line(message: object) -> str:
    """The message as one line that any file can hold, whatever values it quotes: line breaks, controls and lone
    surrogates as Python writes them."""
    text = str(message)
    return text if text.isprintable() else "".join(_written(letter) for letter in text)


def _written(letter: str) -> str:
    return letter if letter.isprintable() else repr(letter)[1:-1]


class UsageError(ValueError):
    """Something that the user gave is wrong: a recipe, data, a reward, a model or a folder. Exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


class RunError(RuntimeError):
    """A run that had begun could not go on; what it had is in its folder. Exit code 1."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(message))


# What libraries say where memory is not to be had; an accelerator's error is a RuntimeError too.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: Python's, numpy's, torch's on a CPU or an accelerator."""
    if isinstance(error, MemoryError):
        return True
    told = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return told and any(words in str(error) for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the known word nearest to `word`, or '; known: …' where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def error_line(error: BaseException) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
