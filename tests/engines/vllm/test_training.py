"""A run that samples with vLLM, as a user starts it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from gruppo.models.weights import save_model
from gruppo.training.reproduce import reproduce
from tests.engines.test_contract import make_policy
from tests.small_runs import ROWS, killed, small_run

CHANGES: dict[str, Any] = {
    "engine__name": "vllm",
    "engine__memory": "500 MB",
    "run__steps": 3,
    "evaluation__questions": 4,
    "evaluation__grader": "exact_match",
    "task__held_out": 0.3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(make_policy(initializer_range=0.1), folder)
    return str(folder)


def rollouts(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "rollouts").iterdir()) for row in pq.read_table(path).to_pylist()]


def weights(out: Path) -> str:
    return str(json.loads((out / "summary.json").read_text())["weights_sha256"])


def test_a_run_samples_with_vllm_and_resumes_to_the_same_weights(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step samples from the policy of the step before. Log-probabilities differ from the trainer's by rounding.

    A resumed run samples the same tokens, and ends with the same weights. No process is left behind.
    """
    before = set(psutil.Process().children(recursive=True))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    small_run(model, whole, **CHANGES)
    rows = rollouts(whole)
    assert len(rows) == 3 * 16
    assert all(row["policy_version"] == row["step"] - 1 for row in rows)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "engine/logprob_difference_max" in line]
    assert len(steps) == 3
    assert all(0 < line["engine/logprob_difference_max"] < 1e-4 for line in steps)
    assert sum("eval/accuracy" in line for line in lines) == 2
    with killed(monkeypatch, "gruppo.engines.vllm.engine.VllmEngine.stream", 8):
        small_run(model, resumed, **CHANGES)
    small_run(model, resumed, resume=True, **CHANGES)
    assert [row["token_ids"] for row in rollouts(resumed)] == [row["token_ids"] for row in rows]
    assert weights(resumed) == weights(whole)
    new = set(psutil.Process().children(recursive=True)) - before
    assert not {child for child in new if "VLLM" in child.name()}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert reproduce(whole, 2, prompts=ROWS, trust=True).equal, "a step is reproduced without vLLM"


def test_vllm_samples_while_the_policy_is_trained(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another thread than the one that started it, also weights that were kept for later, which are probed."""
    changes = {**CHANGES, "run__steps": 5, "cluster__lag": 2, "method__tis_cap": 2.0}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    small_run(model, whole, **changes)
    assert {row["step"]: row["policy_version"] for row in rollouts(whole)} == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2}
    with killed(monkeypatch, "gruppo.training.policy_trainer.batch_loss", 4):
        small_run(model, resumed, **changes)
    small_run(model, resumed, resume=True, **changes)
    assert [row["token_ids"] for row in rollouts(resumed)] == [row["token_ids"] for row in rollouts(whole)]
    assert weights(resumed) == weights(whole)
