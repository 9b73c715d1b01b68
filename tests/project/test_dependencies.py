"""Every installed package is pinned and hashed, and its licence is listed; the five files agree."""

from __future__ import annotations

import re
from pathlib import Path

LOCKS = [Path("requirements.lock"), Path("requirements-ui.lock"), Path("requirements-dev.lock")]


def pins(text: str) -> dict[str, str]:
    """Normalized package name -> pinned version."""
    matches = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in matches}


EXPECTED = pins(Path("constraints.txt").read_text())


def test_locks_have_the_pinned_versions_with_hashes() -> None:
    """If this fails, run make lock."""
    core, ui, dev = (pins(lock.read_text()) for lock in LOCKS)
    assert len(core) + len(ui) + len(dev) == len(EXPECTED)
    assert core | ui | dev == EXPECTED
    for lock in LOCKS:
        entries = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text().partition("\n")[2])
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
        assert not re.search(r"https?:|file:|--index|--find-links", lock.read_text())


def test_dependencies_of_gruppo_are_in_the_core_lock() -> None:
    import tomllib

    requirements = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in requirements}  # type: ignore[index]
    assert names - {"torch"} <= set(pins(LOCKS[0].read_text()))


def test_licences_are_listed() -> None:
    """If this fails, run make licences."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \| (.+) \|$", Path("docs/licences.md").read_text(), re.MULTILINE)
    assert {name: version for name, version, _ in rows[2:]} == EXPECTED
