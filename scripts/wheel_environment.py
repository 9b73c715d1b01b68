"""Make an environment that holds what a wheel declares, and nothing else:

    .venv/bin/python scripts/wheel_environment.py WHEEL FOLDER

Every package that the wheel requires, directly or not and without extras, is linked from the environment that runs this
program; then pip installs the wheel. So nothing is downloaded, and a package that the wheel forgets to declare is
missing. pip itself is there as in every environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def requirements_of(wheel: Path) -> list[str]:
    """The requirements in a wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """The installed packages that meet the requirements, and theirs. Raises SystemExit if a version does not fit."""
    found: dict[str, Distribution] = {}
    seen, left = set[tuple[str, str]](), [(text, "") for text in requirements]
    while left:
        text, extra = left.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        package = found.setdefault(name, distribution(name))
        if not requirement.specifier.contains(package.version, prereleases=True):
            raise SystemExit(f"{package.version} of {name} is installed, and {text} is required; run `make lock`")
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(text, wanted) for text in package.requires or []]
    return found


def link(package: Distribution, target: Path) -> None:
    """Link a package's files into another site-packages; its programs, which name this environment, stay out."""
    for file in package.files or []:
        source = Path(str(package.locate_file(file)))
        if ".." in file.parts or not source.is_file():
            continue
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, place)
        except OSError:  # another file system
            shutil.copy2(source, place)


def main() -> None:
    """See the module's docstring."""
    wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    for package in closure([*requirements_of(wheel), "pip"]).values():
        link(package, Path(packages))
    pip = [folder / "bin/python", "-m", "pip"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    subprocess.run([*pip, "install", *options, str(wheel)], check=True)
    subprocess.run([*pip, "check"], check=True)


if __name__ == "__main__":
    main()
