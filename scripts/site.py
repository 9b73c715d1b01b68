"""Collect the pages of the documentation's site in build/docs, for `make docs`.

The README becomes the first page. A file of the repository that a page links to becomes a page too: Markdown as it is,
notebooks cell by cell, source as a block of code, images as files. api.md lists the public API, whose text mkdocstrings
takes from the docstrings. Links to pages or headings that do not exist are left as they are: the strict build reports
them. It does not look at images, so those are checked here.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path("build/docs")
IMAGES = {".svg", ".png"}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def place_of(path: Path) -> Path:
    """Where a file of the repository is in the site, relative to its root."""
    if path == Path("README.md"):
        return Path("index.md")
    if path.parts[0] == "docs":
        return path.relative_to("docs")
    return Path("source", path if path.suffix in {".md", *IMAGES} else f"{path}.md")


def page_of(path: Path) -> tuple[str, set[Path]]:
    """The text of a page, and the files that it links to."""
    text, found = path.read_text(encoding="utf-8"), set()
    if path.suffix == ".ipynb":
        return "\n\n".join(map(cell_text, json.loads(text)["cells"])) + "\n", found
    if path.suffix != ".md":
        return f"# {path}\n\n`````{path.suffix[1:]}\n{text}\n`````\n", found

    def relinked(match: re.Match[str]) -> str:
        target = Path(path.parent, match[1])
        if "://" in match[1] or not target.is_file():
            if target.suffix in IMAGES:
                sys.exit(f"{path}: {match[1]}: there is no such image; add it, or remove the link")
            return match[1]
        target = target.resolve().relative_to(Path.cwd())
        found.add(target)
        return os.path.relpath(place_of(target), place_of(path).parent)

    return _LINK.sub(relinked, text), found


def cell_text(cell: dict[str, Any]) -> str:
    """A cell of a notebook as Markdown, without outputs."""
    source = "".join(cell["source"])
    return f"```python\n{source}\n```" if cell["cell_type"] == "code" else source


def public_names() -> Iterator[tuple[str, str]]:
    """(name, path in the package) of the functions and classes of `gruppo`, from the imports that editors read."""
    for node in ast.walk(ast.parse(Path("gruppo/__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gruppo.") and node.level == 0:
            yield from ((alias.asname, f"{node.module}.{alias.name}") for alias in node.names if alias.asname)


def api_page() -> str:
    """The page of the public API, with a directive of mkdocstrings for every name."""
    names = sorted(public_names(), key=lambda pair: (pair[0][0].isupper(), pair[0].lower()))
    parts = [f"::: {path}\n    options:\n      heading: gruppo.{name}\n      toc_label: {name}" for name, path in names]
    return "# Python API\n\nEverything that `import gruppo` offers.\n\n" + "\n\n".join(parts) + "\n"


def main() -> None:
    """Write build/docs anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    pending = [Path("README.md"), Path("CHANGELOG.md"), *Path("docs").glob("*.md"), Path("examples/README.md")]
    done: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in done:
            continue
        done.add(path)
        target = OUT / place_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in IMAGES:
            shutil.copyfile(path, target)
        else:
            text, found = page_of(path)
            target.write_text(text, encoding="utf-8")
            pending += found
    (OUT / "api.md").write_text(api_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
