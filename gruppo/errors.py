"""Errors that users can fix. Each message names the field, the value and the fix."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

# Whether this process is the command line, whose options have other names than the arguments of the Python functions.
_command_line = False

# Options without a value, which Python spells name=True.
_FLAGS = {"adapter", "force", "gguf", "private", "quick", "resume", "trust", "trust-remote-code", "verify"}
_SET = re.compile(r"--set ('[^']*'|[^\s,;]+)")
_OPTION = re.compile(r"(?<![^\s(])--([a-z][a-z-]*[a-z])(?:=([^\s;,)]+))?(?![\w=/-])")


# Characters that Python calls printable although nothing is drawn: Unicode's Default_Ignorable_Code_Point (fillers,
# variation selectors, joiners), and letters and symbols whose glyph is blank.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff"
    "\u2800\U00013441\U00013442\U00016fe4\U0001d159]"
)


def speak_command_line(on: bool = True) -> None:
    """Name the command line's options in messages, in place of the arguments of the Python functions."""
    global _command_line
    _command_line = on


def worded(message: object) -> str:
    """The message as one line, in the words of the caller.

    A message names options as on the command line: "--out FOLDER: …" at its start, "--out", "--resume" or
    "--checkpoint=last" later. In Python these are arguments: "out = FOLDER: …", "out=", "resume=True" and
    'checkpoint="last"'. Commands between backticks stay as they are.
    """
    text = one_line(message)
    return text if _command_line else _in_python(text)


def _in_python(text: str) -> str:
    """A message with the arguments of the Python functions in place of the command line's options."""
    text = re.sub(r" \(on the command line --[a-z-]+\)", "", text)
    if start := re.match(r"--set (.+?): ", text):
        text = f"overrides = {_quoted([start[1]])}: {text[start.end() :]}"
    elif start := re.match(r"--([a-z-]+) (.+?): ", text):
        name = "out" if start[1] == "resume" else start[1].replace("-", "_")
        text = f"{name} = {start[2]}: {text[start.end() :]}"
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else _OPTION.sub(_argument, _SET.sub(_override, part)) for part in parts
    )


def _override(option: re.Match[str]) -> str:
    return f"overrides = {_quoted([option[1].strip(chr(39))])}"


def _argument(option: re.Match[str]) -> str:
    name, value = option[1].replace("-", "_"), option[2]
    if option[1] in _FLAGS:
        return f"{name}=True"
    return f"{name}=" if value is None else f"{name}={value if value[0].isdigit() else _quoted(value)}"


def _quoted(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def is_visible(text: str) -> bool:
    """Whether a reader sees every character of a text. Of the spaces, only the ASCII space counts as seen."""
    return text.isprintable() and not _BLANK.search(text)


def escaped(text: str, keep: str = "") -> str:
    r"""The text with every invisible character escaped as in Python (\x1b, \u3164), except those in `keep`.

    Invisible are control and format characters, line breaks and tabs, spaces other than the ASCII space, surrogates,
    unassigned characters, and characters whose glyph is blank.
    """
    if is_visible(text.translate(dict.fromkeys(map(ord, keep)))):
        return text
    return "".join(
        character if character in keep or is_visible(character) else character.encode("unicode_escape").decode()
        for character in text
    )


def one_line(message: object) -> str:
    """The message as one printable line, safe to write to any file.

    Line breaks and tabs become spaces; other control characters, lone surrogates and other invisible characters are
    escaped as in Python.
    """
    return escaped(re.sub(r"\s*[\n\r\t\v\f]\s*", " ", str(message).strip()))


class UsageError(ValueError):
    """Invalid input from the user: a recipe, data, a reward, a model or a folder. Exit code 2."""

    def __init__(self, message: object) -> None:
        super().__init__(worded(message))


class RunError(RuntimeError):
    """A run that had started cannot continue. Everything it has saved is in its run folder. Exit code 1."""

    def __init__(self, message: object) -> None:
        super().__init__(worded(message))


# Parts of the messages with which libraries report a failed allocation. On accelerators these are RuntimeErrors too.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "could not create a memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error reports a failed allocation, of Python, numpy, or torch on a CPU or an accelerator."""
    if isinstance(error, MemoryError):
        return True
    by_library = isinstance(error, RuntimeError) and not isinstance(error, RunError)
    return by_library and any(words in str(error) for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of the error's message, or its type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean "x"?' for the known word closest to `word`, or '; known: …' if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f'; did you mean "{close[0]}"?' if close else f"; known: {', '.join(known)}"


def error_line(error: BaseException) -> str:
    """The type of the error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
