"""A fleet of two native engines passes the contract of engines, unchanged."""

from __future__ import annotations

import pytest

from tests.engines import test_contract as contract
from tests.engines.fleet.conftest import MakeFleet
from tests.engines.test_contract import MakeEngine, policy

__all__ = ["policy"]

for _name, _test in vars(contract).items():
    if _name.startswith("test_"):
        globals()[_name] = _test


@pytest.fixture
def make_engine(find: MakeFleet) -> MakeEngine:
    return find


@pytest.fixture
def draws() -> int:
    return 2000
