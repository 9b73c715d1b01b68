"""Write the package diagram into docs/architecture.md, based on the imports in the code.

    make architecture        (or: python scripts/architecture.py)

An arrow leads from a package to one that it imports. Arrows implied by others are left out, so the diagram shows the
order in which packages build on each other.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE, PAGE = Path("gruppo"), Path("docs/architecture.md")
START, END = "<!-- diagram: written by scripts/architecture.py -->", "<!-- end of diagram -->"


def packages() -> dict[str, str]:
    """Package name -> first paragraph of its docstring."""
    sentences = {}
    for path in sorted(PACKAGE.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        sentences[path.parent.name] = text.split("\n\n")[0].replace("\n", " ").strip()
    return sentences


def imported(package: str) -> set[str]:
    """Other packages of gruppo that a package imports, including imports inside functions and for type checking."""
    names = set()
    for path in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gruppo."):
                names.add(str(node.module).split(".")[1])
    return names & packages().keys() - {package}


def reachable(package: str, edges: dict[str, set[str]]) -> set[str]:
    """All packages that a package imports, directly or through others."""
    visited: set[str] = set()
    pending = list(edges[package])
    while pending:
        name = pending.pop()
        if name not in visited:
            visited.add(name)
            pending += edges[name]
    return visited


def diagram() -> str:
    """The packages as a Mermaid graph and a table."""
    edges = {name: imported(name) for name in packages()}
    lines = ["```mermaid", "graph BT"]
    for name, targets in edges.items():
        direct = {t for t in targets if not any(t in reachable(other, edges) for other in targets - {t})}
        lines += [f"    {name} --> {target}" for target in sorted(direct)]
    table = ["", "| package | contents | modules | lines |", "| --- | --- | --- | --- |"]
    for name, sentence in packages().items():
        files = list((PACKAGE / name).rglob("*.py"))
        count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)
        table.append(f"| `{name}/` | {sentence} | {len(files)} | {count:,} |")
    return "\n".join([*lines, "```", *table])


def page() -> str:
    """The page with an up-to-date diagram."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(f"({re.escape(START)}\n).*?(\n{re.escape(END)})", re.DOTALL)
    return pattern.sub(lambda match: f"{match[1]}{diagram()}{match[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
