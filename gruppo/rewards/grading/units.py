"""Units of measurement after a number, as opposed to variables: "5 cm", but not "5x".

A single letter, and an abbreviation that may be a product of variables, is a unit only where the reference or the
question uses it as one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from gruppo.rewards.grading.latex import WORD, formulas

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
    r"(?:(?<=[\d})%])|(?<=\\pi)(?=\s))(?P<space>\s*)(?<![\\])(?:(?:square|cubic|sq\.?|cu\.?)\s+)?"
    r"(?!(?:and|or|mod|if|for|where|with)\b)(?P<unit>[A-Za-z]{1,14})(?:\s+[a-z]{2,14}){0,4}\.?"
    r"(?:\s*/\s*(?P<per>[A-Za-z]{1,8})|\s+per\s+[a-z]+)?(?:\s*\^\s*\{?-?[1-4]\}?)?\s*$"
)
_CHINESE_UNIT = re.compile(r"(?<=[\d})%])\s*[\u4e00-\u9fff]{1,6}\s*$")
# "5 m" in prose, not the term of a sum: "2h + 2h".
_AFTER_NUMBER = re.compile(r"(?<![-+*/=^(])\s\d[\d,.]{0,20}(?:\s|-)?([A-Za-z]{1,4})(?![A-Za-z]|\s?[-+*/=^)])")
# "in m/s", "how many g of salt".
_NAMED_IN = re.compile(
    r"\b(?:[Ii]n ([A-Za-z]{1,3}/[A-Za-z]{1,3}|(?:square|cubic) [A-Za-z]{1,3})(?![A-Za-z])"
    r"|[Hh]ow many ([A-Za-z]{1,3})(?= (?:of|are|is|do|does|did|will|can)\b))"
)
_WORD = re.compile("[A-Za-z]++")
_VARIABLE = re.compile(r"(?<![A-Za-z'’])[b-zB-HJ-Z](?![A-Za-z'’])")


def units_of(reference: str, question: str) -> Collection[str]:
    """Letters and short abbreviations that the reference or the question uses as units.

    They stand in upright letters ("5\\text{ m}"), after a number in the prose of the question ("5 m"), or the question
    names them ("metres"). "/" is among them if the question has no variables: abbreviations on both sides of a slash
    are units then.
    """
    found = {word for upright in _TEXT.finditer(f"{reference} {question}") for word in _WORD.findall(upright[1])}
    prose = _prose(question)
    found.update(after[1] for after in _AFTER_NUMBER.finditer(f" {prose}"))
    found.update(word for asked in _NAMED_IN.finditer(prose) for word in _WORD.findall(asked[1] or asked[2]))
    named = " ".join([prose, *(upright[1] for upright in _TEXT.finditer(reference))])
    found.update(unit for unit, names in _NAMES.items() if re.search(rf"\b(?:{names})(?:e?s)?\b", named, re.IGNORECASE))
    return (found - _NEVER) | (set() if _VARIABLE.search(question) else {"/"})


def _prose(text: str) -> str:
    """A text without its formulas."""
    found = formulas(text)
    begins, ends = [0, *(one.end for one in found)], [*(one.start for one in found), len(text)]
    return " ".join(text[begin:end] for begin, end in zip(begins, ends, strict=True))


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
    whole = formula
    slashed = formula = _with_slash(formula)
    for pattern in (_UNIT_TEXT, _UNIT_WORD, _CHINESE_UNIT):
        found = pattern.search(formula)
        if found and _is_unit_at_end(pattern, found, used):
            shorter = formula[: found.start()].strip().removesuffix("\\")
            formula = shorter if re.search(r"\d|\\", shorter) else formula
    return whole if formula == slashed else formula


_UPRIGHT = rf"{WORD}\s*\{{\s*([A-Za-z]{{1,6}})\s*\}}"
_RAISED = r"\s*(?:\^\s*\{?([23])\}?)?\s*"
_FRACTION_OF_UNITS = re.compile(
    rf"\\frac\s*\{{\s*(?:{_UPRIGHT}|([A-Za-z]{{1,3}})){_RAISED}\}}\s*\{{\s*(?:{_UPRIGHT}|([A-Za-z]{{1,3}})){_RAISED}\}}\s*$"
)
_INVERSE = re.compile(
    rf"(?P<style>{WORD}\s*\{{\s*)?(?<![A-Za-z\\])(?P<unit>[A-Za-z]{{1,3}})(?:\s+|\s*\\cdot\s*)(?P<per>[A-Za-z]{{1,3}})"
    r"\s*(?P<end>\})?\s*\^\s*\{\s*-\s*(?P<power>[123])\s*\}\s*$"
)


_GROUP = (
    rf"{WORD}\s*+\{{(?:\^\s*+\{{\s*+-?\s*+\d\s*+\}}|[^{{}}\\$]|\\[,;:! ]|\\cdot(?![A-Za-z]))*+\}}"
    r"(?:\s*+\^\s*+(?:\{\s*+-?\s*+\d\s*+\}|\d)|[²³])?+"
)
_GROUPS = re.compile(rf"{_GROUP}(?:(?:\s|~|\\[,;:! ]|\\cdot(?![A-Za-z])|[·⋅*/])*+{_GROUP})*+\s*+")
_IN_GROUPS: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), other)
    for pattern, other in (
        (r"\^\s*+\{\s*+(-?)\s*+(\d)\s*+\}", r"^\1\2"),
        ("²", "^2"),
        ("³", "^3"),
        (r"\\cdot(?![A-Za-z])|\\[,;:! ]|[~·⋅*\s]++", " "),
        (rf"{WORD}\s*+\{{|\}}", ""),
        (" {2,}", " "),
    )
]


def _in_one_group(formula: str) -> str:
    r"""A formula with the abbreviations of its unit in one upright group without braces: "\text{ m s^-1}"."""
    found = next((one for one in _GROUPS.finditer(formula) if one.end() == len(formula)), None)
    if found is None:
        return formula
    inner = found[0]
    for pattern, other in _IN_GROUPS:
        inner = pattern.sub(other, inner)
    words = _WORD.findall(inner)
    if not words or not all(word in _NAMES or _KNOWN.fullmatch(word) for word in words):
        return formula
    one_letter = len(words) == 1 and len(words[0]) == 1 and words != ["m"]
    return formula if one_letter else f"{formula[: found.start()]}\\text{{ {inner.strip()}}}"


def _with_slash(formula: str) -> str:
    r"""A formula whose unit is a fraction, or has a negative exponent, with this unit as "m/s"."""
    formula = _in_one_group(formula)
    if found := _FRACTION_OF_UNITS.search(formula):
        upright, italic, raised, per, below, power = found.groups()
        unit = f"{upright or italic}{(raised and '^' + raised) or ''}/{per or below}{(power and '^' + power) or ''}"
    elif found := _INVERSE.search(formula):
        upright, power = found["style"], {"1": ""}.get(found["power"], f"^{found['power']}")
        unit = f"{found['unit']}/{found['per']}{power}"
    else:
        return formula
    return formula[: found.start()].rstrip() + (f"\\text{{ {unit}}}" if upright else unit)


def _is_unit_at_end(pattern: re.Pattern[str], found: re.Match[str], used: Collection[str]) -> bool:
    if pattern is _UNIT_WORD:
        words = [word for word in (found["unit"], found["per"]) if word]
        apart = bool(found["space"])
        quotient = apart and "/" in used and _QUOTIENT.fullmatch("/".join(words))
        return bool(quotient) or all(is_unit(word, used, apart) for word in words)
    return pattern is not _UNIT_TEXT or not (is_limited(found[0]) or _is_variable(found[0], used))


# Quotients of abbreviations that are units in italics too: "12 m/s", but not "12 h/t".
_QUOTIENT = re.compile(rf"(?:[mgJNWVC]|{_KNOWN.pattern})/(?:[shmLlK]|{_KNOWN.pattern})")


def without_bound(text: str) -> str:
    """A formula without the words that make its number a bound: "at least", "or more"."""
    return BOUND.sub("", text)


BOUND = re.compile(
    r"\b(?:or (?:more|less|fewer|greater|larger|smaller|higher|lower|above|below|over|under)|at (?:least|most)|up to|"
    r"(?:more|less|fewer|greater|larger|smaller|higher|lower) than)\b",
    re.IGNORECASE,
)
_LIMITED = re.compile(r"\b(?:over|under|above|below|not)\b|[\s{](?<!per )(?<!\^\{)(?<!\^ \{)(?<!\^ )\d", re.IGNORECASE)


def is_limited(words: str) -> bool:
    """Whether words beside a number change it: a bound, a "not", another number ("3 apples and 2 pears")."""
    return bool(BOUND.search(words) or _LIMITED.search(words))


def _is_variable(text: str, used: Collection[str]) -> bool:
    """Whether an upright letter after a number is a variable: any but those of units, and those with an exponent."""
    found = _UPRIGHT_LETTER.fullmatch(text)
    return (
        found is not None and found[1] not in used and (found[1] not in _NAMES or (bool(found[2]) and found[1] != "m"))
    )


_UPRIGHT_LETTER = re.compile(rf"\s*{WORD}\s*\{{\s*([A-Za-z])\s*\}}(\s*\^\s*\{{?[1-9]\}}?)?\s*")


# Names of units that contradict each other: 5 kg is not 5 g. Units are not converted.
_SYNONYMS = {
    "mm": "millimet(?:er|re)", "cm": "centimet(?:er|re)", "m": "met(?:er|re)", "km": "kilomet(?:er|re)",
    "in": "inch(?:e(?=s))?", "ft": "foot|feet", "yd": "yard", "mi": "mile", "mg": "milligram", "g": "gram",
    "kg": "kilogram", "oz": "ounce", "lb": "pound|lb(?=s)", "ml": "mL|millilit(?:er|re)", "L": "l|lit(?:er|re)",
    "gal": "gallon", "s": "sec|second", "min": "minute", "h": "hr|hour", "day": "", "week": "", "month": "", "year": "",
    "dollar": "USD", "cent": "", "euro": "", "rad": "radian", "°": "degree|deg",
}  # fmt: skip
_UNIT = "|".join(
    f"(?:{'|'.join(filter(None, (unit, names)))})s?"
    for unit, names in sorted(_SYNONYMS.items(), key=lambda item: -len(item[0]))
)
_UNITS = [(unit, re.compile(f"(?:{'|'.join(filter(None, (unit, names)))})s?")) for unit, names in _SYNONYMS.items()]
_AT_END = re.compile(
    rf"(?:(?P<power>square|sq\.?|cubic|cu\.?) )?(?P<unit>{_UNIT})\.?(?: ?\^ ?\{{?(?P<raised>[23])\}}?)?"
    rf"(?: ?(?:/|per) ?(?P<per>{_UNIT})(?: ?\^ ?\{{?(?P<below>[23])\}}?)?)?"
)
_STYLED = re.compile(rf"{WORD}\s*\{{([^{{}}]*)\}}")
_DEGREES = re.compile(r"(?:\^ ?\{? ?\\circ ?\}?|°|\\degrees?) ?([CF])? ?$")
_ASKED = re.compile(
    rf"\bin (?:the )?(?P<asked>(?:(?:square|sq\.?|cubic|cu\.?) )?(?:{_UNIT})(?: ?\^ ?\{{?[23]\}}?)?"
    rf"(?: ?(?:/|per) ?(?:{_UNIT})(?: ?\^ ?\{{?[23]\}}?)?)?)(?= ?(?:[.,;?!)]|$))"
)


def contradicts(answer: str, wanted: str, question: str) -> bool:
    """Whether an answer has another unit than the reference or, if that has none, than the question asks for."""
    ours, theirs = _unit(answer), _unit(wanted) or _asked(question)
    factors = _factors(answer), _factors(wanted)
    if factors[0] and factors[1] and factors[0] != factors[1]:
        return True
    if ours is None or theirs is None or "," in answer:
        return False
    return not (ours.startswith(theirs) or theirs.startswith(ours)) if "°" in ours + theirs else ours != theirs


def _plain(text: str) -> str:
    text = _with_slash(text.strip(" $.,*"))
    text = re.sub(r"(?<!\\)\$|\\[,;:! ]|~", " ", _STYLED.sub(r" \1 ", text))
    return re.sub(r"\s+", " ", text).strip()


def _unit(text: str) -> str | None:
    """The unit of a quantity, in one notation ("km/h", "cm^2"); None if it has none or an unknown one."""
    plain = _plain(text[-_LONGEST:]).rstrip(" .,*")
    if plain.startswith(("\\$", "-\\$")):
        return "dollar"
    if plain.endswith("%"):
        return "%"
    if degrees := _DEGREES.search(plain):
        return f"°{degrees[1] or ''}"
    begin = max((found.end() for found in _NUMBER_END.finditer(plain)), default=-1)
    found = _AT_END.fullmatch(plain, begin) if begin >= 0 else None
    return _written(found) if found else None


_LONGEST = 200
# The end of a number or formula, not of an exponent: what follows may be a unit.
_NUMBER_END = re.compile(r"(?<!\^)(?<!\^\{)(?<=[\d})]) ?(?=[A-Za-z])|\\pi ")


_PRODUCT = re.compile(
    r"(?:(?<=[\d})])|(?<=\\pi )) ?[A-Za-z]{1,4}(?:\^-?\d)?(?:(?: ?/ ?| )[A-Za-z]{1,4}(?:\^-?\d)?){1,5}$"
)
_FACTOR_OF_UNIT = re.compile(r"(/?) ?([A-Za-z]{1,4})(?:\^(-?\d))?")


def _factors(text: str) -> Mapping[str, int]:
    """The exponents of the abbreviations in the unit of a quantity, if it has at least two: m/s is m^1 s^-1."""
    plain = re.sub(r" ?\^ ?(?:\{ ?(-?\d) ?\}|(-?\d))", r"^\1\2", _plain(text[-_LONGEST:]).rstrip(" .,*"))
    found, factors = _PRODUCT.search(plain), Counter[str]()
    for slash, unit, power in _FACTOR_OF_UNIT.findall(found[0]) if found else ():
        if unit not in _NAMES and not _KNOWN.fullmatch(unit):
            return {}
        name = next((name for name, names in _UNITS if names.fullmatch(unit)), unit)
        factors[name] += int(power or 1) * (-1 if slash else 1)
    return factors


def _asked(question: str) -> str | None:
    """The only unit in which a question asks for the answer ("in metres?")."""
    plain = _plain(question)
    found = {_written(unit) for asked in _ASKED.finditer(plain) if (unit := _AT_END.fullmatch(asked["asked"]))}
    return found.pop() if len(found) == 1 else None


def _written(found: re.Match[str]) -> str:
    power = {"s": "2", "c": "3"}.get((found["power"] or " ")[0]) or found["raised"]
    unit = _one(found["unit"]) + (f"^{power}" if power else "")
    if found["per"]:
        unit += "/" + _one(found["per"]) + (f"^{found['below']}" if found["below"] else "")
    return unit


def _one(name: str) -> str:
    return next(unit for unit, names in _UNITS if names.fullmatch(name))
