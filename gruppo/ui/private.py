"""What a report does not tell about the machine that made it: where its folders are."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

# An absolute path of at least two parts. Not the end of an address (https://…), of a relative path, or of a fraction.
_PATH = re.compile(r"(?<![\w.~/:>-])/(?:[^\s/:\"'`,;()<>\[\]{}|=]+/)+([^\s/:\"'`,;()<>\[\]{}|=]*)")


class Private:
    """Shortens paths. `runs`: run folder -> its name in the report."""

    def __init__(self, runs: Mapping[Path, str]) -> None:
        known = {str(Path(path).absolute()): name for path, name in runs.items()}
        known |= {str(path.resolve()): name for path, name in runs.items()}
        for path, short in ((Path.cwd(), "."), (Path.home(), "~"), (Path(tempfile.gettempdir()), "tmp")):
            known.setdefault(str(path), short)
            known.setdefault(str(path.resolve()), short)
        self._known = {path: short for path, short in known.items() if path != os.sep}
        longest = sorted(self._known, key=lambda path: (-len(path), path))
        self._folders = (
            re.compile(rf"(?<![\w.~/-])({'|'.join(map(re.escape, longest))})(?![\w.-])") if longest else None
        )

    def folders(self, text: str) -> str:
        """The text with short names in place of the runs' folders, the home folder, the current folder and the one for
        temporary files."""
        return self._folders.sub(lambda match: self._known[match[1]], text) if self._folders else text

    def paths(self, text: str) -> str:
        """The same, and of every other absolute path only the last part, after "…/"."""
        return _PATH.sub(lambda match: f"…/{match[1] or match[0].split('/')[-2]}", self.folders(text))


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
