"""Decimal digits of every script as ASCII digits: Arabic-Indic, Persian, Devanagari, Thai, full-width and others."""

from __future__ import annotations

import unicodedata

# Arabic marks in numbers: decimal and thousands separator, percent, comma, semicolon; and invisible direction marks,
# which stand between a sign and its number.
_MARKS = {
    0x066B: ".", 0x066C: ",", 0x066A: "%", 0x060C: ",", 0x061B: ";", 0x061C: None, 0x200E: None, 0x200F: None,
}  # fmt: skip


class _Digits(dict[int, int | str | None]):
    """Table of `str.translate` that finds the value of a character when it first occurs."""

    def __missing__(self, code: int) -> int | str:
        digit = unicodedata.decimal(chr(code), None)
        self[code] = code if digit is None else str(digit)
        return code if digit is None else str(digit)


_DIGITS = _Digits(_MARKS)


def ascii_digits(text: str) -> str:
    """The text with every decimal digit of Unicode as an ASCII digit, and Arabic marks of numbers as ASCII marks."""
    return text if text.isascii() else text.translate(_DIGITS)
