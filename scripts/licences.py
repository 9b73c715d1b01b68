"""Write docs/licences.md: the licence of every package in constraints.txt and the locks, according to its metadata.

    make licences    (after a change of constraints.txt or a lock)

The wheels of packages that are not installed in the development environment are downloaded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from lock import GROUPS, name_of, pins

HEADER = """# Licences of installed packages

<!-- Written by `make licences` from the packages' metadata. -->

gruppo is licensed under Apache-2.0. It contains no code of these packages and does not ship them: pip installs them in
the versions of `constraints.txt`. The dependencies of gruppo are in `requirements.lock`, those that the dashboard adds
in `requirements-ui.lock`; the additional packages for tests, checks and benchmarks are in `requirements-dev.lock`.
`make docs` and `make test-notebook` have environments of their own, `requirements-docs.lock` and
`requirements-notebook.lock`. The Makefile chooses the torch build; CUDA builds include NVIDIA's libraries under
NVIDIA's terms.

| package | version | licence |
| --- | --- | --- |
"""


def licence(package: metadata.Distribution) -> str:
    """The licence of a package: its SPDX expression, its classifiers, or the first line of its text."""
    fields = package.metadata
    if expression := fields.get("License-Expression"):
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2] for line in fields.get_all("Classifier") or [] if line.startswith("License :: ")
    ]
    names = [name for name in classifiers if name != "OSI Approved"]
    first = (fields.get("License") or "").strip().partition("\n")[0][:60]
    return ", ".join(names) or first or "not stated; see its repository"


def downloaded(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """The metadata in the wheels of these versions, in the same order."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, requirement in enumerate(requirements):
            target = Path(folder, str(number))
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--disable-pip-version-check", "--dest", str(target), requirement], check=True)
            (package,) = metadata.distributions(path=[str(wheel) for wheel in target.glob("*.whl")])
            found.append(package)
    return found


def main() -> None:
    """Write the page."""
    versions = {(name, line.partition("==")[2]) for name, line in pins().items()}
    rows = {(name, version): licence(metadata.distribution(name)) for name, version in versions}
    locked = {line for group in GROUPS for line in lock_lines(Path(f"requirements-{group}.lock"))}
    others = sorted(locked - {(name_of(name), version) for name, version in versions})
    for pin, package in zip(others, downloaded(f"{name}=={version}" for name, version in others)):
        rows[pin] = licence(package)
    rows["torch", "chosen by the Makefile"] = licence(metadata.distribution("torch"))
    lines = [f"| {name} | {version} | {rows[name, version]} |" for name, version in sorted(rows)]
    Path("docs/licences.md").write_text(HEADER + "\n".join(lines) + "\n")


def lock_lines(file: Path) -> set[tuple[str, str]]:
    """The normalized names and the versions in a lock; a version for some Pythons beside that for others."""
    lines = [line.split() for line in file.read_text().splitlines() if "==" in line and line[0].isalnum()]
    return {(name_of(words[0]), words[0].partition("==")[2]) for words in lines}


if __name__ == "__main__":
    main()
