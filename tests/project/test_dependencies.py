"""Every installed package is pinned and hashed, and its licence is listed; the seven files agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

LOCKS = [Path("requirements.lock"), Path("requirements-ui.lock"), Path("requirements-dev.lock")]
GROUPS = {"docs": Path("requirements-docs.lock"), "notebook": Path("requirements-notebook.lock")}


PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """Normalized package name -> pinned version."""
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PIN.findall(text)}


EXPECTED = pins(Path("constraints.txt").read_text())


def test_locks_have_the_pinned_versions_with_hashes() -> None:
    """If this fails, run make lock."""
    core, ui, dev = (pins(lock.read_text()) for lock in LOCKS)
    assert len(core) + len(ui) + len(dev) == len(EXPECTED)
    assert core | ui | dev == EXPECTED
    for lock in [*LOCKS, *GROUPS.values()]:
        entries = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text().partition("\n")[2])
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
        assert not re.search(r"https?:|file:|--index|--find-links", lock.read_text())


def test_dependencies_of_gruppo_are_in_the_core_lock() -> None:
    requirements = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    assert names(requirements) - {"torch"} <= set(pins(LOCKS[0].read_text()))


@pytest.mark.parametrize("group", GROUPS)
def test_the_lock_of_a_group_has_its_packages_and_the_versions_of_all(group: str) -> None:
    """If this fails, run make lock."""
    locked = pins(GROUPS[group].read_text())
    groups = tomllib.loads(Path("pyproject.toml").read_text())["dependency-groups"]
    assert set(groups) == set(GROUPS)
    assert names(groups[group]) <= set(locked)
    shared = locked.keys() & EXPECTED.keys()
    assert shared
    assert {name: locked[name] for name in shared} == {name: EXPECTED[name] for name in shared}


def names(requirements: list[str]) -> set[str]:
    """Normalized package names."""
    return {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}  # type: ignore[index]


def test_licences_are_listed() -> None:
    """If this fails, run make licences."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \| (.+) \|$", Path("docs/licences.md").read_text(), re.MULTILINE)
    locked = {pin for lock in GROUPS.values() for pin in PIN.findall(lock.read_text())}
    assert {(name, version) for name, version, _ in rows[2:]} == set(EXPECTED.items()) | locked
