"""docs/architecture.md matches the code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

PAGE = Path("docs/architecture.md")


def without_sizes(text: str) -> str:
    """The page without the numbers of modules and lines, which change with every commit."""
    return re.sub(r"\| \d+ \| [\d,]+ \|", "|", text)


def test_the_diagram_matches_the_imports() -> None:
    generated = runpy.run_path("scripts/architecture.py")["page"]()
    assert without_sizes(generated) == without_sizes(PAGE.read_text(encoding="utf-8")), "run `make architecture`"


def test_every_file_that_the_page_names_exists() -> None:
    names = set(re.findall(r"`([\w/]+/\w+\.(?:py|c))`", PAGE.read_text(encoding="utf-8")))
    missing = {name for name in names if not (Path("gruppo") / name).exists() and not Path(name).exists()}
    assert len(names) > 30
    assert missing == set()


def test_every_constant_that_the_page_names_exists() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in Path("gruppo").rglob("*.py"))
    for name in set(re.findall(r"`([A-Z]{4,})`", PAGE.read_text(encoding="utf-8"))):
        assert re.search(rf"^{name}\b.*=", source, re.MULTILINE), name
