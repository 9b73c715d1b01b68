"""How a result looks in a notebook: a small table with a curve for each metric, as HTML without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from gruppo.runs.reading import finite_number
from gruppo.runs.screen import ACCURACY, ROWS, downsampled, state_of
from gruppo.runs.status import read_status
from gruppo.utils.progress import visible

if TYPE_CHECKING:
    from gruppo.runs.results import Result

WIDTH, HEIGHT = 160, 26  # of a curve, in pixels
POINTS = 80  # of a curve
_CELL = "padding:2px 12px 2px 0;text-align:right"
_FAINT = "opacity:0.7"


def result_html(result: Result) -> str:
    """The state of a run, and its first and last values with curves.

    Colors are those of the notebook. Values that are not numbers, and metrics that were not recorded, are left out.
    """
    state = state_of(read_status(result.path), result.summary).words
    rows = [row for name, words, form in (ACCURACY, *ROWS) if (row := _row(result.metrics, name, words, form))]
    head = "".join(f'<th style="{_CELL};{_FAINT}">{words}</th>' for words in ("", "first", "last", ""))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    return (
        f'<div><p><b>{_text(result.path.name)}</b> <span style="{_FAINT}">{_text(state)}</span></p>'
        f'{table or "<p>No step is done yet.</p>"}<p style="{_FAINT}">.view(step), .frame(), .rollouts(step), '
        ".evaluations(step), .events(), .report(), .load_model()</p></div>"
    )


def curve(values: Sequence[float | None], words: str) -> str:
    """A curve as an SVG picture, with gaps where a value is missing or not finite. `words`: its name for screen
    readers. Equal values are a line in the middle; a value alone is a point."""
    means = downsampled(values, POINTS)
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high / 2 - low / 2  # halves, because the difference of huge values is infinite
    step = (WIDTH - 6) / max(1, len(means) - 1)
    parts: list[list[str]] = [[]]
    for place, mean in enumerate(means):
        if mean is None:
            parts.append([])
        else:
            share = (mean / 2 - low / 2) / span if span else 0.5
            parts[-1].append(f"{3 + place * step:.1f},{HEIGHT - 3 - share * (HEIGHT - 6):.1f}")
    drawn = (" ".join(part if len(part) > 1 else part * 2) for part in parts if part)
    lines = "".join(f'<polyline points="{points}"/>' for points in drawn)
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    line = 'fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"'
    return f'<svg role="img" aria-label="{escape(words)}" {size} {line}>{lines}</svg>'


def _row(metrics: Sequence[dict[str, Any]], name: str, words: str, form: str) -> str:
    values = [finite_number(line[name]) for line in metrics if name in line]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    ends = "".join(f'<td style="{_CELL}">{format(value, form)}</td>' for value in (known[0], known[-1]))
    label = f"{words}: {format(known[0], form)} to {format(known[-1], form)}"
    head = f'<th scope="row" style="{_CELL};font-weight:normal">{words}</th>'
    return f'<tr>{head}{ends}<td style="padding:0">{curve(values, label)}</td></tr>'


def _text(text: str) -> str:
    return escape(visible(text))
