"""Numbers and texts of a run as pages show them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

# Characters that would be invisible, or change the direction or place of the text around them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_LONE = re.compile("[\ud800-\udfff]")
LONGEST = 2_000  # characters of a text in a line


def shown(value: Any, longest: int = LONGEST) -> str:
    """A text of a run for one line: what cannot be seen is written as its escape, and a long text is cut."""
    return _visible(" ".join(_text(value, longest).split()))


def shown_lines(value: Any, longest: int = 200_000) -> str:
    """The same, with its lines and spaces."""
    return _visible(_text(value, longest).replace("\r\n", "\n"))


def _text(value: Any, longest: int) -> str:
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= longest else text[:longest] + f" … ({len(text) - longest:,} more characters)"


def _visible(text: str) -> str:
    text = _LONE.sub("\ufffd", text)
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def number(value: float | None) -> str:
    """Four significant digits, halves away from 0, as the scripts of the pages write them; a dash if not recorded."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{Decimal(value).quantize(Decimal(1).scaleb(-min(digits, 4)), ROUND_HALF_UP):,}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def numbers(values: Sequence[float | None], most: int = 64) -> str:
    """Several values in words."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(map(number, values[:most])) + more


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.1%}"


def size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def height(value: float | None, low: float, high: float) -> float:
    """How high a bar of a strip is, in percent: 12 for the lowest value, 100 for the highest. If all are equal, 100
    for positive values and 12 for others."""
    if value is None or not math.isfinite(value) or not math.isfinite(high - low):
        return 100.0
    if high <= low:
        return 100.0 if value > 0 else 12.0
    return 12 + 88 * (value - low) / (high - low)


def json_block(value: Any) -> str:
    """JSON that can stand in a page: no character in it ends a script block. NaN and infinities must not be in it."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def lowest(values: Sequence[float | None]) -> float:
    """The smallest known value; 0 if there is none."""
    return min((value for value in values if value is not None and math.isfinite(value)), default=0.0)


def highest(values: Sequence[float | None]) -> float:
    """The largest known value; 0 if there is none."""
    return max((value for value in values if value is not None and math.isfinite(value)), default=0.0)
