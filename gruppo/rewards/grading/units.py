"""Units of measurement after a number, as opposed to variables: "5 cm", but not "5x".

A single letter, and an abbreviation that may be a product of variables, is a unit only where the reference or the
question uses it as one.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from gruppo.rewards.grading.latex import WORD

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
EVERYDAY = frozenset("bBcCdFgGhJkKlLmMNpsStTVW")  # units of everyday texts, where no question shows its units
_NEVER = frozenset("aeinxyz")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|rm|operatorname)\s*+\{([^{}]*+)\}")
_UNIT_TEXT = re.compile(
    rf"(?<=\S)\s*{WORD}\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?-?\d\}}?)?(?:\s*/?\s*{WORD}\s*\{{[^{{}}]*\}}(?:\s*\^\s*\{{?-?\d\}}?)?)*\s*$"
)
_UNIT_WORD = re.compile(
    r"(?<=[\d})%])(?P<space>\s*)(?<![\\])(?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
    r"(?!(?:and|or|mod|if|for|where|with)\b)(?P<unit>[A-Za-z]{1,14})(?:\s+[a-z]{2,14}){0,4}\.?"
    r"(?:\s*/\s*(?P<per>[A-Za-z]{1,8})|\s+per\s+[a-z]+)?(?:\s*\^\s*\{?-?[1-4]\}?)?\s*$"
)
_CHINESE_UNIT = re.compile(r"(?<=[\d})%])\s*[\u4e00-\u9fff]{1,6}\s*$")
_FORMULA = re.compile(r"(?<!\\)\$[^$]*+\$|\\\((?:[^\\]|\\(?!\)))*+\\\)")
# "5 m" in prose, not the term of a sum: "2h + 2h".
_AFTER_NUMBER = re.compile(r"(?<![-+*/=^(])\s\d[\d,.]{0,20}(?:\s|-)?([A-Za-z]{1,4})(?![A-Za-z]|\s?[-+*/=^)])")
_WORD = re.compile("[A-Za-z]++")


def units_of(reference: str, question: str) -> Collection[str]:
    """Letters and short abbreviations that the reference or the question uses as units.

    They stand in upright letters ("5\\text{ m}"), after a number in the prose of the question ("5 m"), or the question
    names them ("metres").
    """
    found = {word for upright in _TEXT.finditer(f"{reference} {question}") for word in _WORD.findall(upright[1])}
    prose = _FORMULA.sub(" ", question)
    found.update(after[1] for after in _AFTER_NUMBER.finditer(f" {prose}"))
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


def without_unit(formula: str, used: Collection[str]) -> str:
    """A formula without the unit at its end, if a number or a command remains."""
    for pattern in (_UNIT_TEXT, _UNIT_WORD, _CHINESE_UNIT):
        found = pattern.search(formula)
        if found and (pattern is not _UNIT_WORD or _all_units(found, used)):
            shorter = formula[: found.start()].strip()
            formula = shorter if re.search(r"\d|\\", shorter) else formula
    return formula


def _all_units(found: re.Match[str], used: Collection[str]) -> bool:
    return all(is_unit(word, used, bool(found["space"])) for word in (found["unit"], found["per"]) if word)
