"""Import of user code by names such as "package.module:name" and "file.py:name"."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.abc import SourceLoader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from gruppo.errors import UsageError
from gruppo.utils.paths import is_file, user_path

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


class _SentFile(NamedTuple):
    """A file of another machine: its path there, and what it contains."""

    path: Path
    content: bytes


_sent: dict[str, _SentFile] = {}  # by the path as it is written in a name


def files_to_send(names: Iterable[str]) -> dict[str, tuple[str, bytes]]:
    """The files that are named in "path/to/file.py:name", for `use_sent_files` on another machine. Those that cannot be
    read are left out: the import says why."""
    found = {}
    for name in names:
        location = name.rpartition(":")[0]
        path = user_path(location).resolve()
        if location.endswith(".py") and is_file(path):
            found[str(Path(location))] = str(path), path.read_bytes()
    return found


def use_sent_files(files: Mapping[str, tuple[str, bytes]]) -> None:
    """From now on, import these files as they were sent, where this machine has no equal ones at their paths."""
    _sent.update({location: _SentFile(Path(path), content) for location, (path, content) in files.items()})


def file_of(module: ModuleType | None) -> bytes | None:
    """The content of the file that a module was imported from, None if there is none."""
    if isinstance(loader := getattr(module, "__loader__", None), _SentLoader):
        return loader.content
    file = getattr(module, "__file__", None)
    return Path(file).read_bytes() if file else None


class _SentLoader(SourceLoader):
    """Imports a file that this machine does not have."""

    def __init__(self, sent: _SentFile) -> None:
        self.path, self.content = sent

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str | bytes) -> bytes:
        return self.content


def _load_file(path: Path) -> ModuleType:
    sent = _sent.get(str(path))
    path = user_path(path).resolve() if sent is None else sent.path
    name = f"gruppo_user_{path.stem}"
    if sent is not None and not (is_file(path) and path.read_bytes() == sent.content):
        spec = importlib.util.spec_from_loader(name, _SentLoader(sent))
        assert spec is not None
        return _run_module(name, path, spec)
    spec = importlib.util.spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no file {path}")
    return _run_module(name, path, spec)


def _run_module(name: str, path: Path, spec: ModuleSpec) -> ModuleType:
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module
