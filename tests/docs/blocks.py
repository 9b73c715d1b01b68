"""Code blocks and commands in the README and the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("examples/README.md"), *sorted(Path("docs").glob("*.md"))]
_FENCED = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(gruppo [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its first line of code, its language ("" for none) and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language, page by page, in the order of the page."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCED.finditer(text):
            block = Block(page, text.count("\n", 0, match.start(3)) + 1, match[2], match[3])
            found += [block] if block.language == language else []
    return found


def commands() -> list[tuple[str, str, bool]]:
    """(page, command, whether it is complete) for every `gruppo …` in the pages.

    Complete ones stand on a line of a block without language or of a shell, or on an indented line; those between
    backticks may leave out arguments.
    """
    found = []
    for page in PAGES:
        prose = page.read_text()
        for match in _FENCED.finditer(prose):
            if match[2] in ("", "sh"):
                found += [(str(page), line, True) for line in match[3].splitlines() if line.startswith("gruppo ")]
        prose = _FENCED.sub("", prose)
        found += [(str(page), line.strip(), True) for line in prose.splitlines() if line.startswith("    gruppo ")]
        found += [(str(page), " ".join(match[1].split()), False) for match in _INLINE.finditer(prose)]
    return list(dict.fromkeys(found))
