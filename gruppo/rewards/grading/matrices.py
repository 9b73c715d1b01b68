"""Matrices and determinants in formulas, by whatever environment they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations, permutations
from math import prod

LARGEST = 5  # rows of a determinant that is expanded


_LARGEST_SYMBOLIC = 3  # rows of a determinant with letters that is expanded


# Environments that differ only in the brackets around a matrix. A matrix between bars is a determinant, and so is
# vmatrix; Vmatrix is a norm.
MATRIX = r"\\begin\{(?:[bBp]?(?:small)?matrix)\*?\}(?:\[[lcr]\])?|\\begin\{array\}\s*(?:\[[tcb]\]\s*)?\{[^{}]*\}"


MATRIX_END = r"\\end\{(?:[bBp]?(?:small)?matrix\*?|array)\}"


_MATRIX, _MATRIX_END = re.compile(MATRIX), re.compile(MATRIX_END)


_DETERMINANT = re.compile(r"\\begin\{v(?:small)?matrix\*?\}(?:\[[lcr]\])?")


_DETERMINANT_END = re.compile(r"\\end\{v(?:small)?matrix\*?\}")


_BEGIN, _END = "\\begin{pmatrix}", "\\end{pmatrix}"


_DET = re.compile(r"\\(?:det|operatorname\{det\}|mathrm\{det\}|text\{det\})\s*\Z|\|\s*\Z")


def expanded_determinants(text: str) -> str:
    r"""A formula with determinants (vmatrix, |pmatrix|, \det pmatrix) as numbers or sums of products of their entries.

    Matrices in the formula have to be pmatrix.
    """
    text = _DETERMINANT_END.sub(lambda _: _END + "|", _DETERMINANT.sub(lambda _: "|" + _BEGIN, text))
    parts, place = [], 0
    while (begin := text.find(_BEGIN, place)) >= 0 and (end := text.find(_END, begin)) >= 0:
        before, after = text[place:begin], end + len(_END)
        marked = _DET.search(before, max(0, len(before) - 30))
        rows = _rows(text[begin + len(_BEGIN) : end])
        closing = re.compile(r"\s*\|").match(text, after)
        bars = marked is not None and marked[0].startswith("|")
        if marked and _square(rows) and (closing or not bars):
            parts += [before[: marked.start()], _expanded(rows)]
            place = closing.end() if closing and bars else after
        else:
            parts.append(text[place:after])
            place = after
    return "".join([*parts, text[place:]])


_MARKED = re.compile(r"\\begin\{v|\\(?:det|operatorname|mathrm|text)(?![A-Za-z])|\|")


def without_determinants(text: str) -> str:
    """A formula with the values of its determinants, whatever environment its matrices are in."""
    if ("matrix" not in text and "array" not in text) or not _MARKED.search(text):
        return text
    return expanded_determinants(_MATRIX_END.sub(lambda _: _END, _MATRIX.sub(lambda _: _BEGIN, text)))


def _rows(content: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in row.split("&")] for row in content.replace("\\hline", "").split("\\\\") if row.strip()
    ]


def _square(rows: Sequence[Sequence[str]]) -> bool:
    if not all(len(row) == len(rows) and all(row) for row in rows):
        return False
    numeric = all(_number(cell) is not None for row in rows for cell in row)
    return 0 < len(rows) <= (LARGEST if numeric else _LARGEST_SYMBOLIC)


def _expanded(rows: Sequence[Sequence[str]]) -> str:
    """A determinant as a number, or as the sum of products of its entries: (ad-bc)."""
    numbers = [[_number(cell) for cell in row] for row in rows]
    if all(number is not None for row in numbers for number in row):
        value = Fraction(0)
        for order, sign in _orders(len(rows)):
            value += sign * prod(numbers[row][column] or 0 for row, column in enumerate(order))
        return f"({_written(value)})"
    terms = []
    for order, sign in _orders(len(rows)):
        factors = [rows[row][column] for row, column in enumerate(order)]
        if "0" not in factors:
            product = "\\cdot ".join(factor if _SIMPLE.fullmatch(factor) else f"({factor})" for factor in factors)
            terms.append(("-" if sign < 0 else "+") + product)
    return f"({''.join(terms).removeprefix('+')})" if terms else "(0)"


_SIMPLE = re.compile(r"\d{1,20}|\\?[A-Za-z]{1,20}")


_FRACTION = re.compile(
    r"(-?)\\frac\s*\{\s*(-?\d{1,40})\s*\}\s*\{\s*(\d{1,40})\s*\}|(-?)\s*(\d{1,40}(?:\.\d{1,40}|/\d{1,40})?)"
)


def _number(cell: str) -> Fraction | None:
    """The value of an entry that is a number; None for any other."""
    found = _FRACTION.fullmatch(cell)
    if not found:
        return None
    try:
        value = Fraction(int(found[2]), int(found[3])) if found[2] else Fraction(found[5])
    except ZeroDivisionError:
        return None
    return -value if found[1] or found[4] else value


def _orders(size: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Every permutation of the columns, with its sign."""
    for order in permutations(range(size)):
        swapped = sum(first > second for first, second in combinations(order, 2))
        yield order, -1 if swapped % 2 else 1


def is_matrix(text: str) -> bool:
    """Whether a formula contains a matrix."""
    return _BEGIN in text


def flat(text: str) -> str:
    """A matrix with one column or one row as a tuple; anything else unchanged."""
    match = re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text.strip())
    if not match:
        return text
    rows = _rows(match[1])
    if not rows or (len(rows) > 1 and any(len(row) > 1 for row in rows)):
        return text
    return f"({','.join(cell for row in rows for cell in row)})"


_RULES = re.compile(r"(\\\\)\s*\[\s*-?[\d.]{1,9}\s*(?:pt|em|ex|mm|cm|in)\s*\]|\\hline(?![A-Za-z])|\\cline\s*\{[^{}]*\}")
_SYSTEM = re.compile(
    r"\\begin\{cases\}((?:[^\\&]|\\(?!begin|end)|&(?=\s*[=<>]))*+)\\end\{cases\}"
    r"|(?:\\left\s?)?\\\{\s?\\begin\{(?:array\}\{[lcr]|aligned|matrix)\}"
    r"((?:[^\\&]|\\(?!begin|end)|&(?=\s*[=<>]))*+)\\end\{(?:array|aligned|matrix)\}(?:\s?\\right\s?\.)?"
)


def plain_rows(text: str) -> str:
    """A formula without lines and extra space between rows, and with systems of relations as lists."""
    return _SYSTEM.sub(_listed, _RULES.sub(r"\1", text))


def _listed(found: re.Match[str]) -> str:
    rows = (found[1] or found[2]).replace("&", "").split("\\\\")
    return ", ".join(row.strip(" \n,.;") for row in rows if row.strip(" \n,.;"))


_INVERSE = re.compile(
    r"\\begin\{pmatrix\}((?:[^\\]|\\(?!begin|end))*+)\\end\{pmatrix\}\s*\^\s*(?:\{\s*-\s*1\s*\}|-1(?!\d))"
)


def with_inverses(text: str) -> str:
    """A formula with the inverse of every matrix of numbers with at most `LARGEST` rows that has one."""
    return _INVERSE.sub(_inverse, text)


def _inverse(found: re.Match[str]) -> str:
    cells = _rows(found[1])
    numbers = [[_number(cell) for cell in row] for row in cells]
    size = len(cells)
    if not 0 < size <= LARGEST or any(len(row) != size or None in row for row in numbers):
        return found[0]
    rows = [
        [number or Fraction(0) for number in row] + [Fraction(place == other) for other in range(size)]
        for place, row in enumerate(numbers)
    ]
    for column in range(size):
        pivot = next((place for place in range(column, size) if rows[place][column]), None)
        if pivot is None:
            return found[0]
        rows[column], rows[pivot] = rows[pivot], rows[column]
        rows[column] = [number / rows[column][column] for number in rows[column]]
        for place in range(size):
            if place != column:
                factor = rows[place][column]
                rows[place] = [one - factor * other for one, other in zip(rows[place], rows[column], strict=True)]
    return _BEGIN + "\\\\".join("&".join(map(_written, row[size:])) for row in rows) + _END


def _written(number: Fraction) -> str:
    sign = "-" if number < 0 else ""
    size = abs(number)
    return sign + (f"\\frac{{{size.numerator}}}{{{size.denominator}}}" if size.denominator > 1 else f"{size.numerator}")


_UNIT_VECTOR = re.compile(
    r"\s*+([+-]?)\s*+((?:[^+\-{}()]|\{(?:[^{}]|\{[^{}]*+\})*+\}|\([^()]*+\))*?)"
    r"\\(?:mathbf|boldsymbol|textbf|bm|hat|vec)\s*\{\s*(?:\\mathbf\s*\{\s*([ijk])\s*\}|\\?([ijk])(?:math)?)\s*\}"
)


def vector(text: str) -> str:
    r"""A sum of multiples of unit vectors such as 2\mathbf{i}+3\mathbf{j} as a tuple; anything else unchanged."""
    parts: dict[str, str] = {}
    place = 0
    while found := _UNIT_VECTOR.match(text, place):
        name = found[3] or found[4]
        if name in parts or (place and not found[1]):
            return text
        parts[name], place = f"{found[1].strip('+')}{found[2].strip() or '1'}", found.end()
    if len(parts) < 2 or text[place:].strip(" .$"):
        return text
    return "(" + ",".join(parts.get(name, "0") for name in ("ijk" if "k" in parts else "ij")) + ")"


_LISTS = re.compile(r"[\[(]\s*([\[(][^\[\]()]*[\])](?:\s*,\s*[\[(][^\[\]()]*[\])])*)\s*[\])]")


def from_lists(text: str) -> str:
    """Nested lists such as [[1,2],[3,4]] as a matrix, if their rows are equally long; anything else unchanged."""
    found = _LISTS.fullmatch(text.strip())
    rows = [row.split(",") for row in re.findall(r"[\[(]([^\[\]()]*)[\])]", found[1])] if found else []
    if not rows or len({len(row) for row in rows}) > 1:
        return text
    return _BEGIN + " \\\\ ".join(" & ".join(row) for row in rows) + _END
