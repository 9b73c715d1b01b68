"""The reward audit: what it scores, and when it raises an alarm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gruppo.config.loading import load_recipe
from gruppo.config.sections import Audit
from gruppo.errors import UsageError
from gruppo.evaluation.datasets import preflight
from gruppo.preflight.check import check_recipe
from gruppo.runs.reading import read_lines
from gruppo.training.api import train
from gruppo.training.reward_audit import RewardAudit
from gruppo.types import Reward, Steps
from gruppo.utils.metrics import Metrics
from gruppo.utils.progress import NullProgress
from gruppo.utils.stats import trend
from tests.conftest import make_group
from tests.small_runs import ROWS, recipe

HALF = "tests/rewards/functions.py:always_half"
LETTERS = "tests/rewards/functions.py:likes_letters"
AGAIN = "tests/rewards/functions.py:letters_again"


class FakePool:
    names = ("second",)


def alarms(rewards: list[float], audits: list[float], window: int = 8) -> list[str | None]:
    made = RewardAudit(FakePool(), Audit(function="second", window=window), 0)  # type: ignore[arg-type]
    return [made.alarm({"audit/reward": r, "audit/mean": a}) for r, a in zip(rewards, audits, strict=True)]


def test_trend_is_the_slope_in_standard_errors() -> None:
    values = [0.1, 0.3, 0.2, 0.5, 0.4, 0.8]
    times = np.arange(6)
    matrix = np.stack([times, np.ones(6)], 1)
    solved, residual, *_ = np.linalg.lstsq(matrix, np.array(values), rcond=None)
    error = math.sqrt(residual[0] / 4 * np.linalg.inv(matrix.T @ matrix)[0, 0])
    assert trend(values) == pytest.approx(solved[0] / error)
    assert trend([1.0] * 5) == 0.0
    assert trend([0.0, 1.0, 2.0]) == math.inf
    assert trend([2.0, 1.0, 0.0]) == -math.inf
    with pytest.raises(ValueError, match="too few for a trend"):
        trend([1.0, 2.0])


def test_alarm_when_the_reward_rises_and_the_audit_does_not() -> None:
    rising = [0.1, 0.15, 0.2, 0.3, 0.35, 0.45, 0.5, 0.6]
    level = [0.3, 0.28, 0.31, 0.3, 0.29, 0.3, 0.28, 0.3]
    assert [bool(each) for each in alarms(rising, level)] == [False] * 7 + [True]
    assert "second" in (alarms(rising, level)[-1] or "")
    assert not any(alarms(rising, rising))
    assert not any(alarms(level, level))
    assert not any(alarms(level, [-each for each in rising]))
    assert not any(alarms(rising, level, window=9))
    assert alarms(rising, [-each for each in rising])[-1]


def test_a_step_without_audit_does_not_repeat_the_alarm() -> None:
    made = RewardAudit(FakePool(), Audit(function="second", window=4), 0)  # type: ignore[arg-type]
    found = [made.alarm({"audit/reward": each, "audit/mean": 0.5}) for each in (0.1, 0.2, 0.3, 0.4)]
    assert found[-1]
    assert made.alarm({"audit/reward": None, "audit/mean": None}) is None
    assert made.alarm({"step": 5, "eval/accuracy": 0.5}) is None


def test_step_rewards_count_with_their_weight() -> None:
    class Pool(FakePool):
        def score(self, groups, state, advance):
            return [[Reward(1.0, {}) for _ in own] for _, own in groups], {}

    group = make_group([1], [[1, 2], [3, 4]], [0.5, 0.5])
    group.rewards = [replace(each, steps={"judge": Steps((0.2, 0.4), (0, 1))}) for each in group.rewards]
    made, metrics = RewardAudit(Pool(), Audit(function="second"), 0), Metrics()  # type: ignore[arg-type]
    made.score([group], {"judge": 2.0}, 1, metrics, lambda _: None)
    assert metrics.reduce()["audit/reward"] == pytest.approx(0.5 + 2 * 0.3)


def test_a_run_is_audited_and_raises_the_alarm(tiny_folder: str, tmp_path: Path) -> None:
    changes = {"run__steps": 12, "optimizer__learning_rate": 1e-2, "audit__function": HALF, "audit__window": 6}
    plain = train(
        recipe(tiny_folder, run__steps=12, optimizer__learning_rate=1e-2), prompts=ROWS, out=tmp_path / "plain"
    )
    result = train(recipe(tiny_folder, **changes, audit__share=0.5), prompts=ROWS, out=tmp_path / "run")
    assert all(line["audit/mean"] == 0.5 for line in result.metrics)
    assert result.summary["weights_sha256"] == plain.summary["weights_sha256"], "an audit trains nothing"
    assert any(line["audit/reward"] != line["reward/mean"] for line in result.metrics), "half of the groups"
    found = [event for event in read_lines(tmp_path / "run/events.jsonl") if event["kind"] == "audit"]
    assert found
    assert "always_half" in found[0]["message"]


def test_an_audit_that_agrees_raises_no_alarm(tiny_folder: str, tmp_path: Path) -> None:
    settings = recipe(
        tiny_folder,
        run__steps=12,
        optimizer__learning_rate=1e-2,
        audit__function=AGAIN,
        audit__window=6,
        audit__share=1.0,
    )
    result = train(settings, prompts=ROWS, out=tmp_path / "run")
    assert all(line["audit/reward"] == pytest.approx(line["audit/mean"]) for line in result.metrics)
    assert not [event for event in read_lines(tmp_path / "run/events.jsonl") if event["kind"] == "audit"]


def test_a_missing_grader_is_reported_with_its_field(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"audit\.function"):
        train(recipe(tiny_folder, audit__function="nowhere"), prompts=ROWS, out=tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_an_audit_without_a_function_is_reported_with_a_fix(tiny_folder: str) -> None:
    with pytest.raises(
        UsageError, match=r'audit\.function: missing; write e\.g\. function = "math_verify" in \[audit\]'
    ):
        load_recipe(recipe(tiny_folder, audit__share=0.5))


@pytest.mark.parametrize(
    ("functions", "weights", "audit", "refused"),
    [
        ([LETTERS], [], {"function": LETTERS}, True),
        ([HALF, LETTERS], [1.0, 0.5], {"function": f"./{LETTERS}"}, True),
        (["exact_match"], [], {"function": "exact_match"}, True),
        (["exact_match"], [], {"function": "gruppo.rewards.answers:exact_match"}, True),
        ([f"verl:{LETTERS}"], [], {"function": f"verl:./{LETTERS}"}, True),
        (["regex"], [], {"function": "regex", "options": {"pattern": "a"}}, True),
        (["regex"], [], {"function": "regex", "options": {"pattern": "b"}}, False),  # another judgment
        ([HALF, LETTERS], [1.0, 0.0], {"function": LETTERS}, False),  # not trained on
        ([HALF], [], {"function": LETTERS}, False),
    ],
)
def test_an_audit_by_a_function_that_is_trained_on_is_refused(
    functions: list[str], weights: list[float], audit: dict[str, Any], refused: bool, tmp_path: Path
) -> None:
    options = {"regex": {"pattern": "a"}} if functions == ["regex"] else {}
    tables = {"functions": functions, "weights": weights, "options": options}
    made = load_recipe({"model": {"name": "x"}, "reward": tables, "audit": audit})

    def read() -> None:
        preflight(made, tmp_path / "run", False, functions, ROWS, NullProgress())

    if not refused:
        return read()
    with pytest.raises(UsageError, match=r"audit\.function = .*is in reward\.functions too"):
        read()
    with pytest.raises(UsageError, match=r"audit\.function = .*is in reward\.functions too"):
        check_recipe(made)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text(made.to_toml())  # started before this was checked
    preflight(made, tmp_path / "run", True, functions, ROWS, NullProgress())
    return None
