"""What a run has spent: the same while it runs and afterwards."""

from __future__ import annotations

import json
from pathlib import Path

from gruppo.study.file import Budget
from gruppo.study.spending import BudgetCallback, reached_at, seconds_by_step
from gruppo.training.callbacks import STOP


def test_minutes_with_a_reward_model_are_counted_alike_during_and_after_a_run(tmp_path: Path) -> None:
    """A reward model is trained before the first step, and again after step 3; a step takes 10 seconds."""
    budget, file = Budget(minutes=7 / 6), tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "time/reward_model": 30.0}]
    callback, stopped = BudgetCallback(budget, tmp_path), None
    file.write_text(json.dumps(lines[0]) + "\n")
    assert callback.on_start(0) is None
    for step in range(1, 20):
        lines.append({"step": step, "completion/length": 8.0, "time/step": 10.0, "eval/accuracy": 0.5})
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if callback.on_step(step, {}, []) is STOP:
            stopped = step
            break
        if step == 3:
            lines.append({"step": 3, "time/reward_model": 12.0})
    assert stopped == 4, "30 + 3 x 10 s are below 70; the 12 s after step 3 belong to the next one"
    assert reached_at(budget, seconds_by_step(lines)) == stopped
    assert BudgetCallback(budget, tmp_path).on_start(stopped) is STOP
    assert BudgetCallback(budget, tmp_path).on_start(stopped - 1) is None
    assert sum(seconds_by_step(lines).values()) == 82.0
