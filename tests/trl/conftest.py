"""Makes sure that `trl` is TRL: a user's file in tests/ or gruppo/ puts that folder into the path, with its trl."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

OTHERS = {Path("tests").resolve(), Path("gruppo").resolve()}


@pytest.fixture(autouse=True)
def real_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() not in OTHERS])
    loaded = sys.modules.get("trl")
    if loaded is not None and OTHERS & {*Path(str(loaded.__file__)).resolve().parents}:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
            monkeypatch.delitem(sys.modules, name)
