"""Comparison of runs that differ in the number of ranks: equal up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-10) -> None:
    """Equal tokens, texts and rewards; metrics except times, and final weights, within the tolerance."""
    for one, two in zip(lines(found), lines(expected), strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            if not name.startswith(("time/", "memory/")):
                assert_close(one[name], value, tolerance, name)
    tables = sorted(path.name for path in (expected / "rollouts").iterdir())
    assert sorted(path.name for path in (found / "rollouts").iterdir()) == tables
    for name in tables:
        assert_close(
            pq.read_table(found / "rollouts" / name).to_pylist(),
            pq.read_table(expected / "rollouts" / name).to_pylist(),
            tolerance,
            name,
        )
    one, two = (load_file(folder / "model/model.safetensors") for folder in (found, expected))
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        assert float((one[name] - tensor).abs().max()) <= tolerance, name


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(found: Any, expected: Any, tolerance: float, where: str) -> None:
    """Equal, and real numbers within the tolerance."""
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance), where
    elif isinstance(expected, str) and expected.startswith("{"):
        assert_close(json.loads(found), json.loads(expected), tolerance, where)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, tolerance, f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for one, two in zip(found, expected, strict=True):
            assert_close(one, two, tolerance, where)
    else:
        assert found == expected, where
