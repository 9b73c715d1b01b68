"""Matrices and determinants in formulas, by whatever environment they are written."""

from __future__ import annotations

import re
from collections.abc import Sequence

LARGEST = 4  # rows of a determinant that is expanded; math-verify computes larger ones if they contain only numbers


# Environments that differ only in the brackets around a matrix. A matrix between bars is a determinant, and so is
# vmatrix; Vmatrix is a norm.
MATRIX = r"\\begin\{(?:[bBp]?(?:small)?matrix)\*?\}(?:\[[lcr]\])?|\\begin\{array\}\s*(?:\[[tcb]\]\s*)?\{[^{}]*\}"


MATRIX_END = r"\\end\{(?:[bBp]?(?:small)?matrix\*?|array)\}"


_DETERMINANT = re.compile(r"\\begin\{v(?:small)?matrix\*?\}(?:\[[lcr]\])?")


_DETERMINANT_END = re.compile(r"\\end\{v(?:small)?matrix\*?\}")


_BEGIN, _END = "\\begin{pmatrix}", "\\end{pmatrix}"


_DET = re.compile(r"\\(?:det|operatorname\{det\}|mathrm\{det\}|text\{det\})\s*\Z|\|\s*\Z")


def expanded_determinants(text: str) -> str:
    r"""A formula with determinants (vmatrix, |pmatrix|, \det pmatrix) as sums of products of their entries.

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


def _rows(content: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in row.split("&")] for row in content.replace("\\hline", "").split("\\\\") if row.strip()
    ]


def _square(rows: Sequence[Sequence[str]]) -> bool:
    return 0 < len(rows) <= LARGEST and all(len(row) == len(rows) and all(row) for row in rows)


def _expanded(rows: Sequence[Sequence[str]]) -> str:
    """A determinant expanded along its first row: (a)(d) - (b)(c)."""
    if len(rows) == 1:
        return f"({rows[0][0]})"
    terms = []
    for column, cell in enumerate(rows[0]):
        smaller = _expanded([[*row[:column], *row[column + 1 :]] for row in rows[1:]])
        terms.append(f"{'-' if column % 2 else '+'}({cell})\\cdot{smaller}")
    return f"({''.join(terms).removeprefix('+')})"


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


_LISTS = re.compile(r"[\[(]\s*([\[(][^\[\]()]*[\])](?:\s*,\s*[\[(][^\[\]()]*[\])])*)\s*[\])]")


def from_lists(text: str) -> str:
    """Nested lists such as [[1,2],[3,4]] as a matrix, if their rows are equally long; anything else unchanged."""
    found = _LISTS.fullmatch(text.strip())
    rows = [row.split(",") for row in re.findall(r"[\[(]([^\[\]()]*)[\])]", found[1])] if found else []
    if not rows or len({len(row) for row in rows}) > 1:
        return text
    return _BEGIN + " \\\\ ".join(" & ".join(row) for row in rows) + _END
