"""The recipes that come with gruppo, by name: `gruppo recipes` lists them."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "recipes"


def packaged_recipes() -> dict[str, Path]:
    """Name -> file of every packaged recipe, in alphabetical order."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of a packaged recipe if there is no such file."""
    path = Path(name)
    if path.name == str(name) and not path.is_file():
        return packaged_recipes().get(path.name, path)
    return path


def described(path: Path) -> str:
    """The comment at the top of a packaged recipe, as one line."""
    lines = re.match(r"(?:#[^\n]*\n)*", path.read_text(encoding="utf-8"))
    comments = (line.removeprefix("#").strip() for line in (lines[0] if lines else "").splitlines())
    return " ".join(line for line in comments if not line.startswith(":schema"))


def as_copy(path: Path) -> str:
    """The text of a packaged recipe for a file of the user's, without the path of its schema."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"\A#:schema [^\n]*\n", "", text)
