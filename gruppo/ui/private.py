"""Keeps the folders of the machine that wrote a report out of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

# An absolute path of at least two parts. Not the end of an address (https://…), of a relative path, or of a fraction.
_PATH = re.compile(r"(?<![\w.~/:>-])/(?:[^\s/:\"'`,;()<>\[\]{}|=]+/)+([^\s/:\"'`,;()<>\[\]{}|=]*)")

_MOST_RECIPE, _MOST_PATHS = 200_000, 200  # characters of a recipe, and paths in it


class Private:
    """Shortens paths. `runs`: run folder -> its name in the report.

    The paths that the recipes of the runs name are known too, because ids of prompts begin with them.
    """

    def __init__(self, runs: Mapping[Path, str]) -> None:
        known = dict(_in_recipes(runs)) | {str(path): name for path, name in runs.items() if len(path.parts) > 1}
        homes = {str(Path.home()), str(Path.home().resolve())} - {os.sep}
        self._named, self._home = _replacing(known), _replacing(dict.fromkeys(homes, "~"))

    def folders(self, text: str) -> str:
        """The text with short names in place of the runs' folders, the paths of their recipes, and the home folder."""
        return self._home(self._named(text))

    def paths(self, text: str) -> str:
        """The text with the names of runs in place of their folders, and of every other absolute path only the last
        part, after "…/"."""
        return _PATH.sub(_last_part, self._named(text))


def _replacing(names: Mapping[str, str]) -> Callable[[str], str]:
    """A function that puts names in place of paths, also at the beginning of longer paths."""
    if not names:
        return str
    longest = sorted(names, key=lambda path: (-len(path), path))
    pattern = re.compile(rf"(?<![\w.~/-])({'|'.join(map(re.escape, longest))})(?![\w.-])")
    return lambda text: pattern.sub(lambda match: names[match[1]], text)


def _last_part(match: re.Match[str]) -> str:
    return f"…/{match[1] or match[0].rstrip('/').rpartition('/')[2]}"


def _in_recipes(runs: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for run in runs:
        with suppress(OSError):
            text = (run / "recipe.toml").read_text(encoding="utf-8", errors="replace")[:_MOST_RECIPE]
            for match in islice(_PATH.finditer(text), _MOST_PATHS):
                yield match[0].rstrip("/"), _last_part(match)


def every_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` applied to every text in it: in dicts (not their keys), lists, tuples and dataclasses."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: every_text(one, change) for name, one in value.items()}
    if isinstance(value, list):
        return [every_text(one, change) for one in value]
    if type(value) is tuple:
        return tuple(every_text(one, change) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: every_text(getattr(value, one.name), change) for one in fields(value)})
    return value
