"""Names like "package.module:name" and "file.py:name", by which a user's own code is found."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gruppo.errors import UsageError
from gruppo.utils.paths import user_path


def import_attribute(name: str, field: str) -> Any:
    """The object behind "package.module:name" or "path/to/file.py:name"; `field` names it in errors.

    The current folder can be imported from. Raises UsageError where the module, its import or the name fails.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f'{field} = "{name}": not an import path; write "package.module:name" or "file.py:name"')
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f'{field} = "{name}": {place} cannot be imported ({type(error).__name__}: {error}); mend it or its path'
        ) from error
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise UsageError(f'{field} = "{name}": {place} has no {attribute}; write a name that it defines') from None
    if not callable(found):
        raise UsageError(f'{field} = "{name}": {attribute} is a {type(found).__name__}; it must be callable')
    return found


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def _load_file(path: Path) -> ModuleType:
    path = user_path(path).resolve()
    name = f"gruppo_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module
