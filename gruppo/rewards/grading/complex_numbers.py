"""Complex numbers: i as the imaginary unit, polar forms."""

from __future__ import annotations

import re
from typing import Any

_CIS = re.compile(
    r"(?:\\(?:operatorname|text|mathrm|mathop)\s*\{\s*cis\s*\}|\\cis\b|(?<![A-Za-z\\])cis(?![A-Za-z]))\s*"
    r"(?:\(([^()]{1,80})\)|\{([^{}]{1,80})\}|(\d{1,20}(?:\.\d{1,20})?\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})"
    r"|\\d?frac\s*\{[^{}]{1,40}\}\s*\{[^{}]{1,40}\}|\\?\w{1,20}))"
)


def written_out(text: str) -> str:
    r"""A formula with \operatorname{cis} x as \cos(x)+i\sin(x), and \overline{1+2i} as 1+2(-i)."""
    return _CONJUGATE.sub(lambda found: f"({found[1].replace('i', '(-i)')})", _CIS.sub(_cosine_and_sine, text))


# The conjugate of a number; the bar over a letter is a name.
_CONJUGATE = re.compile(r"\\(?:overline|bar)\s*\{((?=[^{}i]{0,80}[\d+-])[\d\s+*/.()-]{0,80}i[\d\s+*/.()i-]{0,80})\}")


def _cosine_and_sine(found: re.Match[str]) -> str:
    angle = found[1] or found[2] or found[3]
    return rf"(\cos({angle})+i\sin({angle}))"


def with_one_unit(first: Any, second: Any) -> tuple[Any, Any]:
    """Two parsed formulas, with j as i where one of them has only i and the other only j, as engineers write it.

    Vectors with both letters, and formulas with j alone, are unchanged.
    """
    named = [{str(symbol): symbol for symbol in getattr(part, "free_symbols", ())} for part in (first, second)]
    units = [{"i", "j"} & set(names) for names in named]
    if units == [{"i"}, {"j"}]:
        return first, second.xreplace({named[1]["j"]: named[0]["i"]})
    if units == [{"j"}, {"i"}]:
        return first.xreplace({named[0]["j"]: named[1]["i"]}), second
    return first, second
