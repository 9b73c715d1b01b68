"""Write docs/licences.md: the licence of each package of constraints.txt, as its own metadata says.

make licences    (after a change of constraints.txt)
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from lock import name_of, pins

HEADER = """# Licences of what is installed

<!-- Made by `make licences` from the packages' own metadata. -->

gruppo is Apache-2.0. It contains no code of these packages, and none of them comes with it: pip installs them, in the
versions of `constraints.txt`. What gruppo needs itself is in `requirements.lock`, what tests, checks and benchmarks
need besides in `requirements-dev.lock`. torch is chosen by the Makefile; its builds for CUDA bring NVIDIA's libraries
under NVIDIA's own terms.

| package | version | licence |
| --- | --- | --- |
"""


def licence(name: str) -> str:
    """The licence of an installed package: its SPDX expression, its classifiers, or the first line of its text."""
    held = metadata.metadata(name)
    if expression := held.get("License-Expression"):
        return str(expression)
    classes = [
        each.rpartition(" :: ")[2] for each in held.get_all("Classifier") or [] if each.startswith("License :: ")
    ]
    named = [each for each in classes if each != "OSI Approved"]
    first = (held.get("License") or "").strip().partition("\n")[0][:60]
    return ", ".join(named) or first or "not said; see its repository"


def main() -> None:
    """Write the page."""
    versions = {name: line.partition("==")[2] for name, line in pins().items()}
    rows = {name: f"| {name} | {version} | {licence(name)} |" for name, version in versions.items()}
    rows["torch"] = f"| torch | by the Makefile | {licence('torch')} |"
    Path("docs/licences.md").write_text(HEADER + "\n".join(rows[name] for name in sorted(rows, key=name_of)) + "\n")


if __name__ == "__main__":
    main()
