"""Units of measurement after a number, as opposed to variables: "5 cm", but not "5x".

A single letter, and an abbreviation that may be a product of variables, is a unit only where the reference or the
question uses it as one.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# What a letter, or an abbreviation that may be a product, stands for. A question with one of its names uses it.
_NAMES = {
    "m": "met(?:er|re)", "s": "second", "h": "hour", "g": "gram", "l": "lit(?:er|re)", "L": "lit(?:er|re)", "d": "day",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "amp(?:ere)?", "K": "kelvin", "C": "celsius|coulomb",
    "F": "fahrenheit|farad", "T": "tesla", "B": "byte", "b": "bit", "t": "ton(?:ne)?", "p": "pence", "c": "cent",
    "ms": "millisecond", "mg": "milligram", "mi": "mile", "pt": "pint|point", "qt": "quart", "st": "stone",
    "ml": "millilit(?:er|re)", "mo": "month", "Pa": "pascal", "ns": "nanosecond",
}  # fmt: skip
_KNOWN = re.compile(
    r"(?:[mcdk]m|nm|[mk]g|[mcdk]?[lL]|cc|ft|in|yd|lbs?|oz|gal|hrs?|mins?|secs?|wks?|yrs?|[mk]ph|rpm|[kMG]?Hz|[kM]Pa|k[NJ]|"
    r"[kM]Wh?|Wh|kcal|[kM]?eV|mol|deg|rad|dB|[pc]ts|USD|EUR|GBP|CNY|RMB|Rs|[KMGT]B|sq|cu|pcs|"
    r"men|day|cup|box|bag|egg|pen|hat|car|way|row|dog|cat|pie|ton|bus|ice)"
)
_NEVER = frozenset("aeinxyz")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|rm|operatorname)\s*+\{([^{}]*+)\}")
_FORMULA = re.compile(r"(?<!\\)\$[^$]*+\$|\\\((?:[^\\]|\\(?!\)))*+\\\)")
_AFTER_NUMBER = re.compile(r"(?<=\d)(?:\s|-|\\[,;: ]|~)?([A-Za-z]{1,4})(?![A-Za-z])")
_WORD = re.compile("[A-Za-z]++")


def units_of(reference: str, question: str) -> Collection[str]:
    """Letters and short abbreviations that the reference or the question uses as units.

    They stand in upright letters ("5\\text{ m}"), after a number in the prose of the question ("5 m"), or the question
    names them ("metres").
    """
    found = {word for upright in _TEXT.finditer(f"{reference} {question}") for word in _WORD.findall(upright[1])}
    prose = _FORMULA.sub(" ", question)
    found.update(after[1] for after in _AFTER_NUMBER.finditer(prose))
    found.update(unit for unit, names in _NAMES.items() if re.search(rf"\b(?:{names})(?:e?s)?\b", prose, re.IGNORECASE))
    return found - _NEVER


def is_unit(word: str, used: Collection[str], apart: bool) -> bool:
    """Whether a word after a number is a unit or another noun. `apart`: whether a space stands between them."""
    if word in used:
        return True
    if len(word) < 2 or word.lower() in _ALPHABET:
        return False
    if _KNOWN.fullmatch(word):
        return True
    return (len(word) > 3 or (len(word) == 3 and apart)) and re.search("[aeiouy]", word.lower()) is not None
