"""Which packages are installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gruppo.utils.imports import installed


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_folder" / "run-1").mkdir(parents=True)
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package" / "__init__.py").touch()
    (tmp_path / "a_module.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert [installed(name) for name in ("a_folder", "a_package", "a_module", "not_there")] == [
        False,
        True,
        True,
        False,
    ]
