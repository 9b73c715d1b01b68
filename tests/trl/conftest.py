"""Makes sure that `trl` is TRL: a user's file in the folder gruppo/ would put gruppo/trl in its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import gruppo

FOLDER = Path(gruppo.__file__).parent


@pytest.fixture(autouse=True)
def real_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place or ".").resolve() != FOLDER])
    loaded = sys.modules.get("trl")
    if loaded is not None and FOLDER in Path(str(loaded.__file__)).parents:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
            monkeypatch.delitem(sys.modules, name)
