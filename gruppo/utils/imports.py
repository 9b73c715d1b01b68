"""Import of user code by names such as "package.module:name" and "file.py:name"."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from gruppo.errors import UsageError
from gruppo.utils.paths import user_path

IN_MEMORY = "in-memory:"  # begins the names of objects that were passed from Python


def installed(package: str) -> bool:
    """Whether a package is installed. Nothing is imported. A folder of its name, as some trackers and Ray write one,
    can be imported too, as an empty package, and does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def import_attribute(name: str, field: str) -> Any:
    """The callable named "package.module:name" or "path/to/file.py:name".

    `field` is the name of the setting in error messages. Modules in the current folder can be imported, and come first;
    gruppo's own names do not make the current folder importable. Raises UsageError if the name is not an import path,
    the import fails, or the attribute does not exist or is not callable.
    """
    if name.startswith(IN_MEMORY):
        raise UsageError(f'{field} = "{name}": was passed from Python, so its name cannot be imported; pass it again')
    location, colon, attribute = name.rpartition(":")
    if not colon or not location or not attribute:
        raise UsageError(f'{field} = "{name}": not an import path; write "package.module:name" or "file.py:name"')
    try:
        module = _load_file(Path(location)) if location.endswith(".py") else _import_module(location)
    except (Exception, SystemExit) as error:
        raise UsageError(
            f'{field} = "{name}": {location} cannot be imported ({type(error).__name__}: {error}); fix it or its path'
        ) from error
    try:
        value: Any = module
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError:
        raise UsageError(f'{field} = "{name}": {location} has no {attribute}; write a name that it defines') from None
    if not callable(value):
        raise UsageError(
            f'{field} = "{name}": {attribute} is a {type(value).__name__} and not callable; name a function or class'
        )
    return value


@contextmanager
def needing_ui(what: str) -> Iterator[None]:
    """Guard a block that imports from gruppo.ui. Raises UsageError with the command that installs the extra `ui`, if a
    package of it is missing. `what`: what needs it, e.g. "the dashboard"."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "gruppo":
            raise
        raise UsageError(f'{error.name}: is not installed; {what} needs: pip install "gruppo[ui]"') from None


def _import_module(name: str) -> ModuleType:
    if not name.startswith("gruppo.") and str(Path.cwd()) not in sys.path:
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
