"""The pages of the documentation's site. `make docs` builds it and checks its links."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gruppo
from scripts import site


def test_every_page_is_collected_and_in_the_navigation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "OUT", tmp_path)
    site.main()
    listed = set(pages(tomllib.loads(Path("zensical.toml").read_text())["project"]["nav"]))
    assert {name for name in listed if not (tmp_path / name).is_file()} == set()
    assert {path.name for path in Path("docs").glob("*.md")} <= listed
    assert {f"source/{path}.md" for path in Path("examples").glob("*.[pi]*")} <= listed
    assert "```python\nimport re" in (tmp_path / "source/examples/first_run.ipynb.md").read_text()
    assert "](source/gruppo/training/loop.py.md)" in (tmp_path / "index.md").read_text()


def test_the_api_page_has_every_public_name() -> None:
    names = {name for name, _ in site.public_names()}
    assert names == set(gruppo.__all__)
    assert all(f"heading: gruppo.{name}\n" in site.api_page() for name in names)


def test_a_missing_image_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text("![A picture](images/none.png)")
    with pytest.raises(SystemExit, match="no such image"):
        site.page_of(Path("page.md"))


def pages(navigation: list[dict[str, Any]]) -> Iterator[str]:
    for entry in navigation:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else pages(target)
