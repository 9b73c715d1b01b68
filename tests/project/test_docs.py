"""Everything that the documentation refers to exists."""

from __future__ import annotations

import re
from pathlib import Path

from gruppo.rewards import PREFIXES, REWARDS

MAP = Path("docs/paper_map.md").read_text()


def test_every_function_and_test_of_the_paper_map_exists() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", MAP)
    assert len(named) > 40
    for file, name in named:
        path = Path("tests" if Path(file).name.startswith("test_") else "gruppo") / file
        assert path.is_file(), path
        if name:
            assert re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE), f"{path}::{name}"


def test_every_metric_is_explained() -> None:
    explained = Path("docs/metrics.md").read_text()
    code = "".join(path.read_text() for path in Path("gruppo").rglob("*.py"))
    names = set(re.findall(r'"((?:reward|groups|advantage|policy|engine|completion|loss|optimizer|eval)/\w+)"', code))
    assert len(names) > 20
    for name in names:
        stem = re.sub(r"_(min|max|low|high)$", "", name)
        assert name in explained or stem in explained, name


def test_every_test_named_in_safety_exists() -> None:
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)`", Path("docs/safety.md").read_text())
    assert len(named) > 20
    for name in named:
        assert Path("tests", name).is_file(), name


def test_relative_links_have_a_target() -> None:
    for page in (Path("README.md"), *Path("docs").glob("*.md"), Path("CONTRIBUTING.md"), Path("examples/README.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_reward_is_explained() -> None:
    explained = Path("docs/rewards.md").read_text()
    for name in (*REWARDS, *(f"{prefix}:" for prefix in PREFIXES)):
        assert re.search(rf"`\W?{name}", explained), name
