"""An engine that shares the device with the trainer sleeps whenever the trainer needs the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gruppo.preflight.check import check_recipe
from gruppo.training.api import train
from tests.engines import watched
from tests.small_runs import ROWS, recipe

PAIRS = [{**row, "completion": f"{row['answer']}z"} for row in ROWS]
EVALUATION = {"evaluation__questions": 3, "evaluation__every": 2, "evaluation__grader": "exact_match"}


def settings_of(model: str, method: str, **changes: Any) -> dict[str, Any]:
    settings = recipe(
        model,
        **{
            "method__name": method, "engine__name": watched.NAME, "task__held_out": 0.3, "run__steps": 3,
            **EVALUATION, **changes,
        },
    )  # fmt: skip
    if method in {"sft", "rft"}:
        del settings["method"]["kl_coef"]
    if method == "sft":
        del settings["reward"]
    return settings


@pytest.mark.parametrize("method", ["grpo", "rft", "sft"])
def test_engines_sleep_while_the_policy_is_scored_and_updated(
    method: str, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions of the policy, of the initial model (by a second engine, whose start finds the memory), of a
    dataset."""
    trainer = "gruppo.training.policy_trainer.PolicyTrainer"
    counts = watched.watch(monkeypatch, f"{trainer}.score", f"{trainer}.update")
    rows = PAIRS if method == "sft" else ROWS
    result = train(settings_of(tiny_folder, method), prompts=rows, out=tmp_path / "run", progress=False)
    assert sum("eval/accuracy" in line for line in result.metrics) >= 2
    assert len(counts) > 3
    assert set(counts) == {0}


def test_the_engine_sleeps_while_check_computes_with_the_policy(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = watched.watch(
        monkeypatch,
        "gruppo.preflight.check.time_update",
        "gruppo.preflight.smoke_test.compare_logprobs",
        "gruppo.preflight.smoke_test.compare_gradient",
    )
    check_recipe(settings_of(tiny_folder, "grpo", task__name="arithmetic", task__held_out=0.0), seconds=20)
    assert counts == [0, 0, 0]
