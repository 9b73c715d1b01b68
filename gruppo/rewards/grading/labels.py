"""Functions as labels of formulas: f(x) = 2x + 3 and y = 2x + 3."""

from __future__ import annotations

import re
from typing import NamedTuple


class Function(NamedTuple):
    """A formula with the function that it defines: f(x) = 2x + 3 has the name f, arguments "x", and value "2x + 3"."""

    name: str
    arguments: str
    value: str


_NAME = r"[A-Za-z](?:_\{?\w{1,10}\}?)?(?:'{1,3}|\^\{?\s*-1\s*\}?|\^\{\\prime\})?"


_DEFINED = re.compile(rf"\s*({_NAME})\s*\(([^()=]{{1,40}})\)\s*=([^=]+)")


_MAPPED = re.compile(rf"\s*(?:({_NAME})\s*:\s*)?\(?([A-Za-z](?:\s*,\s*[A-Za-z])*)\)?\s*\\mapsto([^=]+)")


_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")


def function_of(text: str) -> Function | None:
    """The function that a formula defines; None if it is not written with a function's name and arguments."""
    found = _DEFINED.fullmatch(text) or _MAPPED.fullmatch(text)
    if not found:
        return None
    return Function(re.sub(r"[\s{}]", "", found[1] or "y"), re.sub(r"\s", "", found[2]), found[3].strip())


def unlabelled_pair(answer: str, wanted: str) -> tuple[str, str] | None:
    """Two formulas, of which at least one defines a function, in a form that can be compared; None if they differ.

    The name y fits every function. Arguments may have other names, but not other values: f(2) = 7 is not f(3) = 7.
    Formulas without such labels are returned unchanged.
    """
    first, second = function_of(answer), function_of(wanted)
    if first and second:
        if first.name != second.name and "y" not in (first.name, second.name):
            return None
        renamed = _renamed(first, second.arguments)
        return None if renamed is None else (renamed, second.value)
    if first is None and second is not None:
        return answer, _as_equation(second, answer, wanted)
    if first is not None and second is None:
        return _as_equation(first, wanted, answer), wanted
    return answer, wanted


def _as_equation(function: Function, other: str, text: str) -> str:
    """A function as an equation for y, or z if it has two arguments, if the other formula is one; else unchanged."""
    names = function.arguments.split(",")
    value = "y" if len(names) == 1 else "z"
    letters = _LETTER.findall(other)
    fits = len(names) <= 2 and all(re.fullmatch("[A-Za-z]", name) for name in names) and value not in names
    return f"{value} = {function.value}" if fits and "=" in other and value in letters else text


def _renamed(function: Function, arguments: str) -> str | None:
    """The value of a function in terms of other names of its arguments; None if the arguments are not names."""
    if function.arguments == arguments:
        return function.value
    ours, theirs = function.arguments.split(","), arguments.split(",")
    names = [*ours, *theirs]
    if len(ours) != len(theirs) or not all(re.fullmatch("[A-Za-z]", name) for name in names):
        return None
    if set(_LETTER.findall(function.value)) & (set(theirs) - set(ours)):
        return None  # the new name already means something else
    table = dict(zip(ours, theirs, strict=True))
    return _LETTER.sub(lambda letter: table.get(letter[0], letter[0]), function.value)
