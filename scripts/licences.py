"""Write docs/licences.md: the licence of every package in constraints.txt, according to its metadata.

make licences    (after a change of constraints.txt)
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from lock import name_of, pins

HEADER = """# Licences of installed packages

<!-- Written by `make licences` from the packages' metadata. -->

gruppo is licensed under Apache-2.0. It contains no code of these packages and does not ship them: pip installs them in
the versions of `constraints.txt`. The dependencies of gruppo are in `requirements.lock`, those that the dashboard adds
in `requirements-ui.lock`; the additional packages for tests, checks and benchmarks are in `requirements-dev.lock`. The
Makefile chooses the torch build; CUDA builds include NVIDIA's libraries under NVIDIA's terms.

| package | version | licence |
| --- | --- | --- |
"""


def licence(name: str) -> str:
    """The licence of an installed package: its SPDX expression, its classifiers, or the first line of its text."""
    fields = metadata.metadata(name)
    if expression := fields.get("License-Expression"):
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2] for line in fields.get_all("Classifier") or [] if line.startswith("License :: ")
    ]
    names = [name for name in classifiers if name != "OSI Approved"]
    first = (fields.get("License") or "").strip().partition("\n")[0][:60]
    return ", ".join(names) or first or "not stated; see its repository"


def main() -> None:
    """Write the page."""
    versions = {name: line.partition("==")[2] for name, line in pins().items()}
    rows = {name: f"| {name} | {version} | {licence(name)} |" for name, version in versions.items()}
    rows["torch"] = f"| torch | chosen by the Makefile | {licence('torch')} |"
    Path("docs/licences.md").write_text(HEADER + "\n".join(rows[name] for name in sorted(rows, key=name_of)) + "\n")


if __name__ == "__main__":
    main()
