"""A formula in normal form: one way of writing for symbols, spaces, angles, scales and brackets."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gruppo.data.boxes import closing_braces
from gruppo.rewards.grading.complex_numbers import written_out
from gruppo.rewards.grading.conditions import with_marks
from gruppo.rewards.grading.digits import ascii_digits
from gruppo.rewards.grading.latex import WORD, braced, ratio_as_tuple, with_products
from gruppo.rewards.grading.matrices import (
    MATRIX,
    MATRIX_END,
    expanded_determinants,
    plain_rows,
    vector,
    with_inverses,
)
from gruppo.rewards.grading.units import is_limited

_SYMBOLS = {
    "，": ",", "；": ";", "（": "(", "）": ")", "：": ":", "−": "-", "π": "\\pi ", "×": "\\times ", "·": "\\cdot ",
    "÷": "\\div ", "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ",
    "∈": "\\in ", "≈": "\\approx ", "`": "",
    "±": "\\pm ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "²": "^{2}", "³": "^{3}",
    "°": "^{\\circ}",
    "、": ",", "\u00a0": " ", "\u202f": " ", "\u2009": " ",
} | {chr(0x2460 + place): f"\\textcircled{{{place + 1}}}" for place in range(9)}  # fmt: skip
_SCALES = {
    "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}", "trillion": "10^{12}",
    "dozen": "12",
}  # fmt: skip
_CHANGES: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), other)
    for pattern, other in (
        (r"\\(?:displaystyle|limits|nolimits|big|Big|bigg|bigl|bigr|Bigl|Bigr)\b|\\!\s*|\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right)(?![a-z])", ""),
        (r"\\varnothing\b", r"\\emptyset"),
        (rf"(?<=[\d}}])\s*(?:{WORD}\s*\{{\s*to\s*\}}|(?<=\s)to(?=\s))\s*(?=[\d\\])|\\colon(?![A-Za-z])", ":"),
        (r"\\(?:backslash|smallsetminus)\b|(?<=\\mathbb\{[CNQRZ]\})\s*-\s*(?=\\\{)", r"\\setminus "),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])|\\bigcup\b", r"\\cup "),
        (r"\\langle\b", "("),
        (r"\\rangle\b", ")"),
        (rf"{WORD}\s*\{{\s*(?:all )?real numbers?\s*\}}", r"\\mathbb{R}"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"(?<=\d)(?:\{,\}|\\[,;: ]|,\\!|~)(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "),
        (r"(?:^|(?<=[-+*/^=<>(\[{,]))(\s?)–\s?(?=[\d.\\A-Za-z(])", r"\1-"),
        (rf"{WORD}\s*\{{\s*([ied])\s*\}}", r"\1"),
        (rf"{WORD}\s*\{{\s*(?:and|or)\s*\}}", ","),
        (rf"(?<=\d)\s*\^\s*(\{{\s*)?{WORD}\s*\{{\s*(?:st|nd|rd|th)\s*\}}(?(1)\s*\}})", ""),
        (r"(?<=\d)\s*\^\s*\{\s*(?:st|nd|rd|th)\s*\}", ""),
        (r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b)(?:\s?[CF](?![A-Za-z_]))?", ""),
        (r"\\\$|\$|€|£|¥|￥|\\[()]|\\\[|\\\]|\*\*(?!\d)", ""),
        (r"\*\*", "^"),
        (r"√\s*\(([^()]*)\)|\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2}"),
        (r"√\s*(\w)", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|ln|log|arcsin|arccos|arctan|exp|pi|infty)(?![A-Za-z])", r"\\\1 "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])", r"\\infty "),
        (r"\bnp\.", ""),
        (r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d{1,3})(?![\w.])", r"\1\\times 10^{\2}"),
        (r"(\d)\.(?=/|$|[\s,;)])", r"\1"),
        (MATRIX, r"\\begin{pmatrix}"),
        (MATRIX_END, r"\\end{pmatrix}"),
        (r"[\[(]\s*(\\begin\{pmatrix\}[^[]*?\\end\{pmatrix\})\s*[\])]", r"\1"),
    )
]  # fmt: skip
LISTED = re.compile(r"\s*(?:,|;|\band\b|\bor\b|和|或)\s*")
_SCALED = re.compile(rf"(?<=[\d}}])\s*+(?P<begin>{WORD}\s*+\{{\s*+)?(?P<scale>{'|'.join(_SCALES)})\b\s*+(?P<end>\}})?")


_ANGLE = r"\s*(\d{1,40}(?:\.\d{1,40})?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*"
_DEGREES = re.compile(rf"(?:\\|(?<![A-Za-z\\]))(sin|cos|tan|cot|sec|csc)\s*(?:\({_ANGLE}\)|\{{{_ANGLE}\}}|{_ANGLE})")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,40})\.(\d{0,40})\\(?:overline|bar|dot)\s*(?:\{\s*(\d{1,40})\s*\}|(\d))(?!\d)")


_DOTS = re.compile(r"\\(?:dots[cbmio]?|cdots)(?![A-Za-z])|(?<=,)\s*(?:\.{3}|…)|(?:\.{3}|…)(?=\s*,)")


def _radians(match: re.Match[str]) -> str:
    r"""\cos 60^\circ as \cos(\frac{60\pi}{180})."""
    return rf"\{match[1]}(\frac{{{match[2] or match[3] or match[4]}\pi}}{{180}})"


def _repeating(match: re.Match[str]) -> str:
    r"""0.1\overline{6} as \frac{15}{90}."""
    head, period = match[1] + match[2], match[3] or match[4]
    under = (10 ** len(period) - 1) * 10 ** len(match[2])
    return rf"\frac{{{int(head + period) - int(head or 0)}}}{{{under}}}"


def _scaled(match: re.Match[str]) -> str:
    r"""3\text{ million dollars} as 3\times 10^{6}\text{dollars}."""
    rest = "" if match["begin"] and match["end"] else (match["begin"] or match["end"] or "")
    return rf"\times {_SCALES[match['scale']]} {rest}"


def normal(text: str) -> str:
    """A formula in normal form: no dollar signs, spacing commands or Unicode symbols; angles in radians."""
    text = ascii_digits(text)
    for symbol, other in _SYMBOLS.items():
        text = text.replace(symbol, other)
    text = _DOTS.sub(r"\\ldots ", vector(plain_rows(braced(text.strip().strip("*_ ")))))
    text = _DEGREES.sub(_radians, written_out(text))
    text = _SCALED.sub(_scaled, _REPEATING.sub(_repeating, text))
    text = with_products(with_marks(text))
    for pattern, other in _CHANGES:
        text = pattern.sub(other, text)
    text = _without_bold(re.sub(r"\s+", " ", expanded_determinants(with_inverses(text))).strip().rstrip(".,;:").strip())
    text = text[1:-1].strip() if closing_braces(text).get(0) == len(text) - 1 else text
    return ratio_as_tuple(_OPENING.sub("", _with_upright_unit(text)))


_OPENING = re.compile(r"^(?:\\(?:approx|simeq)(?![A-Za-z])|=)\s*+(?=\S)")  # of a right-hand side
_BOLD = re.compile(r"\\(?:mathbf|boldsymbol|bm|pmb)\s*(?=\{)")
_NUMBER_IN_WORDS = re.compile(
    rf"{WORD}\s*\{{\s*(?P<number>-?(?:(?:\d+ )?\d+\s?/\s?\d+|[\d,]*\d(?:\.\d+)?))(?P<unit>\s[A-Za-z][A-Za-z .]*)?\}}"
)


def _without_bold(text: str) -> str:
    r"""A formula without the \mathbf around all of it; vectors and other bold letters stay bold."""
    bold = _BOLD.match(text)
    if bold is None or closing_braces(text).get(bold.end()) != len(text) - 1:
        return text
    inner = text[bold.end() + 1 : -1].strip()
    return inner if re.search(r"[\d\\]", inner) else text


def _with_upright_unit(text: str) -> str:
    r"""\text{12 inches} as 12\text{ inches}."""
    found = _NUMBER_IN_WORDS.fullmatch(text)
    if found is None or (found["unit"] and (is_limited(found["unit"]) or LISTED.search(found["unit"]))):
        return text
    return found["number"] + (f"\\text{{{found['unit']}}}" if found["unit"] else "")
