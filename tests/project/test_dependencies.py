"""What is installed is pinned, hashed, and its licence is listed: the four files agree."""

from __future__ import annotations

import re
from pathlib import Path

LOCKS = [Path("requirements.lock"), Path("requirements-dev.lock")]


def pins(text: str) -> dict[str, str]:
    """Versions by normalised name."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


WANTED = pins(Path("constraints.txt").read_text())


def test_locks_hold_the_pins_each_with_its_hashes() -> None:
    """Else run make lock."""
    own = [pins(lock.read_text()) for lock in LOCKS]
    assert not set(own[0]) & set(own[1])
    assert own[0] | own[1] == WANTED
    for lock in LOCKS:
        entries = re.split(r"\n(?=[A-Za-z0-9])", lock.read_text().partition("\n")[2])
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
        assert not re.search(r"https?:|file:|--index|--find-links", lock.read_text())


def test_what_gruppo_needs_itself_is_in_the_first_lock() -> None:
    import tomllib

    needed = tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", each)[0]).lower() for each in needed}  # type: ignore[index]
    assert names - {"torch"} <= set(pins(LOCKS[0].read_text()))


def test_licences_are_listed() -> None:
    """Else run make licences."""
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \| (.+) \|$", Path("docs/licences.md").read_text(), re.MULTILINE)
    assert {name: version for name, version, _ in rows[2:]} == WANTED
