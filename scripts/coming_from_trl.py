"""Write the lists of TRL's arguments into docs/coming_from_trl.md, from the lists in the code.

make coming-from-trl        (or: python scripts/coming_from_trl.py)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from gruppo.trl import DPOConfig, GRPOConfig, RLOOConfig, SFTConfig
from gruppo.trl.arguments import IGNORED, MAPPED, REFUSED, words_of
from gruppo.trl.configs import Earlier

PAGE = Path("docs/coming_from_trl.md")
START, END = "<!-- lists: written by scripts/coming_from_trl.py -->", "<!-- end of lists -->"

_CONFIGS = (GRPOConfig, RLOOConfig, DPOConfig, SFTConfig)
_EARLIER = {entry.name for entry in fields(Earlier)}
_HAVE = {kind.__name__.removesuffix("Config"): {entry.name for entry in fields(kind)} for kind in _CONFIGS}
_LISTS = {
    "Mapped": (MAPPED, "What each argument becomes: a field of the recipe, or something that the trainer does."),
    "Ignored": (IGNORED, "They change no result here. Those that a script writes are listed once, when it trains."),
    "Refused": (
        REFUSED,
        "They would change what is trained. A value other than TRL's default is an error, with these words.",
    ),
}


def lists() -> str:
    """The three lists, with the number of arguments of each trainer."""
    lines = [f"| list | {' | '.join(_HAVE)} |", f"| --- |{' ---: |' * len(_HAVE)}"]
    for title, (names, _) in _LISTS.items():
        counts = [str(len(have & set(names) - _EARLIER)) for have in _HAVE.values()]
        lines.append(f"| {title.lower()} | {' | '.join(counts)} |")
    for title, (names, sentence) in _LISTS.items():
        lines += ["", f"### {title}", "", sentence, "", "| argument | of | |", "| --- | --- | --- |"]
        lines += [f"| `{name}` | {_of(name)} | {_cell(words_of(name))} |" for name in _ordered(names)]
    return "\n".join(lines)


def _ordered(names: Iterable[str]) -> list[str]:
    """The names in the order in which the configs have them, those of earlier versions last."""
    order = list(dict.fromkeys(entry.name for kind in _CONFIGS for entry in fields(kind)))
    return sorted(names, key=lambda name: (name in _EARLIER, order.index(name)))


def _of(name: str) -> str:
    """The trainers that have an argument."""
    if name in _EARLIER:
        return "earlier versions"
    having = [title for title, have in _HAVE.items() if name in have]
    return "all" if len(having) == len(_HAVE) else ", ".join(having)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def page() -> str:
    """The page with current lists."""
    found = f"{START}\n\n{lists()}\n\n{END}"
    return re.sub(
        f"{re.escape(START)}.*{re.escape(END)}", lambda _: found, PAGE.read_text(encoding="utf-8"), flags=re.S
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
