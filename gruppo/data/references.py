"""Reference answers of rows: a value, a list of alternatives of which any one is right, or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeVar

from gruppo.data.values import is_missing
from gruppo.errors import UsageError
from gruppo.types import Row

T = TypeVar("T")


def alternatives(reference: Any) -> list[Any]:
    """The values any one of which is right: the members of a list, or the reference itself.

    Empty if there is no reference: for None, NaN, blank text and an empty list. A list written inside a text is one
    answer. Raises UsageError for an object, and for a list with members other than texts and numbers.
    """
    if hasattr(reference, "tolist"):
        reference = reference.tolist()  # of numpy
    if not isinstance(reference, list | tuple):
        if isinstance(reference, Mapping | set):
            raise UsageError(f"answer = {reference!r:.200}: is neither text nor a number; write one")
        return [] if _is_none(reference) else [reference]
    for member in reference:
        if _is_none(member) or isinstance(member, Mapping | list | tuple | set):
            raise UsageError(
                f"answer = {reference!r:.200}: a list means alternatives, and {member!r:.60} is neither text nor a "
                "number; write one"
            )
    return list(reference)


def _is_none(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def answer_text(value: Any) -> str:
    """A reference as text; a float in decimals, without an exponent, and without ".0"."""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"
    return str(value)


def answer_texts(value: Any) -> set[str]:
    """All texts of a reference: 5.0 is "5.0" and "5", true is "True" and "true"."""
    return {str(value), answer_text(value)} | ({str(value).lower()} if isinstance(value, bool) else set())


def listed_in(text: str) -> list[str]:
    """The items of a list of two or more that is written inside a text: '["4", "5"]' or "[4, 5]"; [] for other texts.

    Such a list is one answer: only all of its items together are right.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return []
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = [item.strip().strip("\"'") for item in text[1:-1].split(",")]
    return [answer_text(item) for item in items] if len(items) > 1 else []


def reference_of(columns: Mapping[str, Any], names: Sequence[str]) -> tuple[str, list[Any]]:
    """The first of these columns that has a reference, and its alternatives; the first column and [] if none has."""
    for name in names:
        if found := alternatives(columns.get(name)):
            return name, found
    return names[0], []


# Names that columns of references often have, in lower case.
_LIKELY = (
    *("answer", "answers", "final_answer", "correct_answer", "expected_answer", "reference_answer"),
    *("solution", "solutions", "label", "labels", "target", "targets", "reference", "references"),
    *("ground_truth", "gold", "golden", "expected", "output"),
)


def likely_column(columns: Iterable[str]) -> str | None:
    """The column that probably has the references, judged by its name; None if none does."""
    named = {name.lower(): name for name in columns}
    return next((named[name] for name in _LIKELY if name in named), None)


def with_one_reference(columns: Mapping[str, Any], names: Sequence[str], convert: Callable[[Any], Any]) -> list[Row]:
    """The row once per alternative of its reference, with that alternative, converted, as its only reference.

    `names`: columns that may have the reference, the preferred one first. Raises UsageError if there is none.
    """
    name, found = reference_of(columns, names)
    if not found:
        given = f"{name} = {columns[name]!r}" if name in columns else f"columns: {', '.join(columns) or 'none'}"
        raise UsageError(f"a question has no answer ({given}); add one in the column {' or '.join(names)}")
    others = {key: value for key, value in columns.items() if key not in names}
    return [{**others, name: convert(value)} for value in found]


def for_each(compare: Callable[[Any], T], references: Sequence[Any]) -> list[T]:
    """The results of comparing with each reference, without those that cannot be read.

    Raises the UsageError of the first reference if none can be read.
    """
    results, errors = [], []
    for reference in references:
        try:
            results.append(compare(reference))
        except UsageError as error:
            errors.append(error)
    if errors and not results:
        raise errors[0]
    return results
