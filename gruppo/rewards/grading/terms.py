r"""The formula around a number in a text: "5" in "x = 5 cm", "\sqrt{16}", "13x".

A formula is one number if it is a number with a unit, or arithmetic. Any other formula that contains a number
("13x", "16\pi", "\log_2 5") is none.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from gruppo.rewards.grading.arithmetic import calculated
from gruppo.rewards.grading.quantities import Quantity
from gruppo.rewards.grading.units import EVERYDAY, is_unit

WINDOW = 200  # characters on each side of a number that can belong to its formula

# Marks that belong to no formula: those of a calculator, tags, arrows, "i.e.", ordinals, degrees.
_BREAK = re.compile(
    r"<<[^<>\n]*+>>|</?[A-Za-z][A-Za-z0-9]*+>|(?<=\n)[ \t]*+>|[-=]{1,2}>|(?<![A-Za-z])[ie]\.[eg]\."
    r"|\\(?:[lL]?ong)?(?:[rR]ightarrow|[lL]eftrightarrow)(?![A-Za-z])"
    r"|\\(?:to|implies|iff|therefore|because|checkmark|blacksquare|square|qed|qquad|quad|space)(?![A-Za-z])"
)
_MARK = re.compile(
    r"\^\s?\{?\s?(?:st|nd|rd|th)\b(?:\s?\})?|\^?\s?\{?\s?(?:\\circ|\\degree|°)(?![A-Za-z])(?:\s?\})?(?:\s?[CFK]\b)?"
    r"|\\[,;:! ]|\\(?:boxed|fbox|underline|mathbf|boldsymbol|bm|displaystyle|textstyle|bf|rm)(?![A-Za-z])"
    r"|[MLR]_\{?\s?(?:\\odot|\\oplus|sun)(?![A-Za-z])\s?\}?|\\(?:Omega|ohm|AA|mu)(?![A-Za-z])"
)
_RUN = re.compile(  # not possessive: Python before 3.11.5 never ends at lookbehinds in "(?:…)++"
    r"(?:\d++(?:,\d{3}(?!\d))*+(?:\.\d++)?+|\.\d++|\\[A-Za-z]++|\\[{}]"
    r"|(?<![A-Za-z])(?:pi|sqrt|log|ln|lg|sin|cos|tan|exp|mod)(?![A-Za-z])|(?<![A-Za-z'’])[A-Za-z](?![A-Za-z'’])"
    r"|(?<=[+*^])[abcnpqruvwxyz]{2,3}(?![A-Za-z])|(?<=[-+*] )[bcnpqrvwxyz]{2,3}(?![A-Za-z])"
    r"|[-+*/^_!<>=≤≥⩽⩾≠±∓≈×÷·√∛∞%α-ωΑ-Ω(){}\[\]~\"'` \t])+"
)
_RELATION = re.compile(
    r"=|≈|\\(?:approx|simeq|cong|sim|equiv)(?![A-Za-z])"
    r"|(?P<bound>[<>≤≥⩽⩾≠±∓]|\\(?:leq?(?:slant)?|geq?(?:slant)?|lt|gt|neq?|not|pm|mp|ll|gg)(?![A-Za-z]))"
)
# What may stand before a number: brackets and quotes, or a letter or bracket that a space sets apart ("(a) 5").
_BEFORE = re.compile(r"(?:.*(?:[)\]]|(?<![A-Za-z\\])[A-Za-z])\s)?[\s({\[*_~\"'`]*+[A-Z]?|[\s*_]*+[-+]\s*+", re.DOTALL)
_NUMBER_BEFORE = re.compile(r"[^\\^_]*\d\s+[({\[*_~\"'`]*+")
# What may stand after it: a unit, an aside in brackets, another number, a sign without a second term.
_UNIT = r"[A-Za-z](?:\s?\^\s?\{?\s?-?\d\s?\}?)?"
_UNITS = rf"{_UNIT}(?:\s*+[/·*]?\s*+{_UNIT}){{0,4}}"
_AFTER = re.compile(
    rf"(?P<unit>\s*+(?:[/·*]\s?)?{_UNITS})?[\s)}}\]*_~\"'`!]*+"
    r"(?:[-+*/·(]?[\s(]*+|(?<=\s)(?:[-+](?=\d)|[\d(\"'`]).*)",
    re.DOTALL,
)
_SUM = re.compile(r"[\d)}]\s*+[-+]")
_UNITS_AT_END = re.compile(rf"(?<=[\d)}}])\s++(?P<unit>{_UNITS})[\s.]*+$")
_ARTICLE = re.compile(r"\s+[aAI](?:\s|$)")
_FACTOR = re.compile(r"\s*+\((?=[^()]*[A-Za-z])(?=[^()]*[-+*/^])[^()=]*\)")
CONTINUED = re.compile(r"\\[lc]?dots(?![A-Za-z])|\.{3}\s*+$|…\s*+$")
_POINT_AFTER, _POINT_BEFORE = re.compile(r"\.\d"), re.compile(r"\d\.$")  # "3.5.2" is no number
_LETTERS = re.compile("[A-Za-z]")
_TIMES = re.compile(r"(?<=[\d.)])\s?[xX]\s?(?=[\d(.])")
_EXPRESSION = re.compile(r"[\d)}!]\s*+(?:[-+*/×÷·]|\\(?:times|cdot|div)(?![A-Za-z]))\s*+[-+]?[\d.(\\]")
# Indices, exponents and arguments of a name: "a_1", "x^2", "f(2)".
_DETAIL = re.compile(r"[_^]\s?(?:\{[^{}]*+\}|\\?\w)|(?<=[A-Za-z])\([^()]*+\)")
_WORD = re.compile(r"\\[A-Za-z]++|(?<![A-Za-z])[A-Za-z]\s++(?=[\d.])")  # a command, "x 10", "a 5"
_UNIT_NOUN = re.compile(r"\s*+(?!and\b|for\b|when\b|with\b)[A-Za-z]{3,}")


def settled(clean: str, number: Quantity, units: Collection[str], worked_out: bool = False) -> Quantity | None:
    """The number that the formula around a number of a cleaned text states; None if it is not one number.

    It is `number` itself, or the value of the arithmetic around it; a sum or a product counts only if `worked_out`.
    `bound` is set for one side of an inequality and for a number with an undecided sign. `units`: letters that are
    units after a number.
    """
    if has_variable(clean, number, units) or (worked_out and CONTINUED.search(clean)):
        return None
    if _POINT_AFTER.match(clean, number.end) or _POINT_BEFORE.search(clean, max(0, number.start - 2), number.start):
        return None
    begin = max(0, number.start - WINDOW)
    text = clean[begin : number.end + WINDOW]
    text = _MARK.sub(_blank, _BREAK.sub(_line, text))
    start, end = number.start - begin, number.end - begin
    run = next((found for found in _RUN.finditer(text) if found.end() > start), None)
    if run is None or run.start() > start:
        return number
    left, right, bound = run.start(), max(run.end(), end), False
    for relation in _RELATION.finditer(text, run.start(), run.end()):
        if relation.end() <= start:
            left, bound = relation.end(), relation["bound"] is not None
        elif relation.start() >= end:
            right, bound = relation.start(), bound or relation["bound"] is not None
            break
    named = not worked_out and _UNIT_NOUN.match(clean, number.end)  # "the wins are 2x = 20 games"
    if not bound and not named and left > run.start() and _is_unsolved(text[run.start() : left], units):
        return None
    number = replace(number, bound=bound)
    plain = _is_plain(text[left:start], text[end:right], units)
    if not worked_out and (plain or _EXPRESSION.search(text[left:right])):
        return number if plain else None
    value = calculated(_TIMES.sub("*", _without_units(text[left:right], units)))
    if value is None or value == number.value:
        return number if plain or value is not None else None
    return replace(number, value=value, decimals=None, percent=False)


def _blank(found: re.Match[str]) -> str:
    return " " * len(found[0])


def _line(found: re.Match[str]) -> str:
    return "\n" * len(found[0])


# A letter right after a number, or with an exponent: a variable if it is no unit.
_LETTER = re.compile(r"(?P<space>\s?)(?P<letters>[A-Za-z]{1,3})(?![A-Za-z'’])(?P<raised>\s*+\^)?")
_PER = re.compile(r"/([A-Za-z])(?![A-Za-z])")
_PRODUCT = re.compile("[abcnpqruvwxyz]{2,3}")


def has_variable(clean: str, number: Quantity, units: Collection[str]) -> bool:
    """Whether a letter that is no unit follows a number: "13x", "3s^2"."""
    found = _LETTER.match(clean, number.end)
    if not found or (found["letters"] in units and units is not EVERYDAY) or (found["space"] and not found["raised"]):
        return False
    letters = found["letters"]
    if len(letters) > 1:
        return not is_unit(letters, units, False) and bool(found["raised"] or _PRODUCT.fullmatch(letters))
    if letters in EVERYDAY and (per := _PER.match(clean, found.end())) and per[1] in EVERYDAY:
        return False
    return (units is EVERYDAY and bool(found["raised"]) and letters != "m") or letters not in units


def _is_plain(before: str, after: str, units: Collection[str]) -> bool:
    """Whether a number stands alone between these parts of its formula, or has only a unit."""
    alone = _BEFORE.fullmatch(before) or _NUMBER_BEFORE.fullmatch(before)
    if not alone or _FACTOR.match(after):
        return False
    if _ARTICLE.match(after):
        return True
    found = _AFTER.fullmatch(after.replace("\\cdot", "·"))
    if found is None:
        return False
    used = {*units, *EVERYDAY}
    letters = _LETTERS.findall(found["unit"] or "")
    apart = (found["unit"] or "x")[0].isspace() and len(letters) == 1
    return all(letter in used for letter in letters) or (apart and letters[0] not in "xyzn")


def _without_units(formula: str, units: Collection[str]) -> str:
    r"""A formula without the units at its end: "2\sqrt{4} m/s". In a sum, a letter is a variable: "2 + 3 m"."""
    found = None if _SUM.search(formula) else _UNITS_AT_END.search(formula)
    if found and all(letter in units for letter in _LETTERS.findall(found["unit"])):
        return formula[: found.start()]
    return formula


def _is_unsolved(text: str, units: Collection[str]) -> bool:
    """Whether the sides of an equation before its result are terms of an unknown: "5x =", "2x + 3 =".

    A name ("x =", "f(2) ="), and arithmetic, may stand before a result.
    """
    sides = [_WORD.sub(" ", _DETAIL.sub("", _TIMES.sub("*", side))) for side in _RELATION.split(text)[::2]]
    return not any(_is_name(side, units, place > 0) for place, side in enumerate(sides[:-1]))


def _is_name(side: str, units: Collection[str], later: bool) -> bool:
    """Whether a side has no coefficient or no unknown. In a `later` one, a name may follow a number ("26 x = 13")."""
    unknown = any(letter not in units for letter in _LETTERS.findall(side))
    return not (unknown and re.search(r"\d", side)) or (
        later and bool(re.fullmatch(r"\s*[-\d.,/]+\s+[A-Za-z]\s*", side))
    )
