"""Warnings: every check has a series that triggers it, healthy series trigger none, and a resume changes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gruppo.runs.reading import read_lines
from gruppo.runs.warnings import CHECKS, PATIENCE, WarningEvent, WarningMonitor, warnings_of
from tests.small_runs import killed, small_run

WEIGHTS = {"last_number": 1.0, "regex": 0.5}
RECORDED = Path("tests/runs/recorded")


def healthy(step: int) -> dict[str, Any]:
    """Metrics with deterministic noise: a rising reward, and shorter completions with lower entropy."""
    swing = (-1) ** step * 0.01
    return {
        "step": step, "groups/nonzero_advantage": 0.6 + swing, "reward/mean": 0.2 + 0.01 * step + swing,
        "reward/last_number/mean": 0.1 + 0.008 * step + swing, "reward/last_number/std": 0.3,
        "reward/regex/mean": 0.2 + 0.004 * step, "reward/regex/std": 0.2,
        "completion/length": 60.0 - 0.5 * step + 100 * swing, "completion/truncated": 0.3 + swing,
        "policy/entropy": 0.4 + 0.6 * 0.97**step + swing, "policy/kl": 0.001 * step,
        "groups/duplicate_completions": 0.1,
        "engine/logprob_difference_mean": 2e-6, "engine/logprob_difference_max": 2e-5,
        "optimizer/gradient_norm": 0.5 + 10 * swing,
    }  # fmt: skip


def evaluation(step: int, accuracy: float) -> dict[str, Any]:
    low, high = accuracy - 0.05, accuracy + 0.05
    return {"step": step, "eval/accuracy": accuracy, "eval/accuracy_low": low, "eval/accuracy_high": high}


def series(steps: int = 40, since: int = 20, until: int = 1000, **changes: Any) -> list[dict[str, Any]]:
    """A healthy run in which some metrics are replaced between two steps by a number or a function of the step."""
    lines = []
    for step in range(1, steps + 1):
        line = healthy(step)
        if since <= step < until:
            line |= {
                name.replace("__", "/"): value(step) if callable(value) else value for name, value in changes.items()
            }
        lines.append(line)
    return lines


def with_evaluations(lines: list[dict[str, Any]], accuracies: dict[int, float]) -> list[dict[str, Any]]:
    made = [evaluation(0, accuracies[0])]
    for line in lines:
        made += [line, *([evaluation(line["step"], accuracies[line["step"]])] if line["step"] in accuracies else [])]
    return made


def with_round(auc: float | None, positives: int, step: int = 20) -> list[dict[str, Any]]:
    """A reward model trained after a step, with `positives` positives among 100 held-out labels."""
    figures = {"auc": auc, "labels": 100.0, "positives": float(positives)}
    line = {"step": step, "iteration": 2, **{f"reward_model/after/{name}": value for name, value in figures.items()}}
    return [*series()[:step], line, *series()[step:]]


def warnings_from(lines: list[dict[str, Any]]) -> list[WarningEvent]:
    return warnings_of(lines, WEIGHTS, 1e-4)


def begun(lines: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(notice.name, notice.step) for notice in warnings_from(lines) if not notice.passed]


# For every warning, a series that triggers it, and the step at which it is reported.
SHOWN = {
    "no_nonzero_advantage": (series(groups__nonzero_advantage=0.0), 24),
    "evaluation_falls": (with_evaluations(series(), {0: 0.3, 10: 0.5, 20: 0.52, 30: 0.35, 40: 0.3}), 30),
    "lengths": (series(completion__length=lambda step: 50.0 + 8 * (step - 19)), 29),
    "everything_truncated": (series(completion__truncated=0.98), 22),
    "entropy_collapses": (series(policy__entropy=0.02), 22),
    "engine_drifts": (series(engine__logprob_difference_mean=3e-4), 22),
    "one_part_of_the_reward": (series(reward__last_number__mean=0.0, reward__last_number__std=0.0), 29),
    "kl_explodes": (series(policy__kl=lambda step: 0.02 * 1.5 ** (step - 19)), 24),
    "gradient_spikes": (series(until=21, optimizer__gradient_norm=7.0), 20),
    "noisy_gradient": (series(gradient__signal=lambda step: None if step % 5 else 0.01 - 0.001 * (step % 2)), 35),
    "reward_model_guesses": (with_round(0.66, 10), 20),  # a standard error is 0.097
    "tokens_without_text": (series(completion__without_text=0.3), 20),
}


def test_every_check_has_a_series() -> None:
    assert set(SHOWN) == set(CHECKS)


@pytest.mark.parametrize("name", SHOWN)
def test_a_problem_triggers_one_warning_with_evidence(name: str) -> None:
    lines, step = SHOWN[name]
    assert begun(lines) == [(name, step)], warnings_from(lines)
    (notice,) = (notice for notice in warnings_from(lines) if not notice.passed)
    steps = notice.evidence["steps"]
    assert steps[1] == step
    assert str(steps[0]) in notice.message or str(steps[1]) in notice.message
    json.dumps(notice.evidence, allow_nan=False)


@pytest.mark.parametrize(
    ("signals", "warned"),
    [([0.01] * 4, True), ([0.06] * 4, False), ([-0.02, 0.02, 0.0, 0.01], True), ([-0.2, 0.3, -0.1, 0.04], False),
     ([0.0] * 3, False), ([0.5, 0.0, 0.0, 0.0, 0.0], True)],
)  # fmt: skip
def test_one_noisy_measurement_does_not_warn(signals: list[float], warned: bool) -> None:
    lines = [
        {**healthy(step), "gradient/signal": value, "gradient/agreement": value} for step, value in enumerate(signals)
    ]
    assert ("noisy_gradient" in dict(begun(lines))) == warned


def test_an_unmeasurable_reward_model_triggers_a_warning_that_a_better_one_ends() -> None:
    lines = with_round(None, 0)
    lines[31:31] = [{**with_round(0.9, 10)[20], "step": 30}]
    found = [(notice.name, notice.step, notice.passed) for notice in warnings_from(lines)]
    assert found == [("reward_model_guesses", 20, False), ("reward_model_guesses", 30 + PATIENCE, True)]


@pytest.mark.parametrize("name", SHOWN)
def test_the_documentation_explains_every_warning(name: str) -> None:
    lines, _ = SHOWN[name]
    file, _, anchor = warnings_from(lines)[0].link.partition("#")
    assert re.search(rf"^## {anchor}$", Path(file).read_text(), re.MULTILINE)


def test_healthy_series_trigger_no_warning() -> None:
    assert warnings_from(series(100)) == []
    assert warnings_from(with_evaluations(series(), {0: 0.3, 10: 0.5, 20: 0.45, 30: 0.5, 40: 0.52})) == []


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_recorded_quickstart_runs_trigger_no_warning(path: Path) -> None:
    """Its model and task, by several methods, in bfloat16."""
    lines = read_lines(path)
    assert len(lines) >= 12
    assert warnings_of(lines, {"last_number": 1.0}, 0.05) == []


@pytest.mark.parametrize(
    "lines",
    [
        series(until=24, groups__nonzero_advantage=0.0),
        with_evaluations(series(), {0: 0.3, 10: 0.5, 20: 0.42, 30: 0.41, 40: 0.40}),
        with_evaluations(series(reward__mean=0.5), {0: 0.3, 20: 0.52, 30: 0.35, 40: 0.3}),
        series(completion__length=lambda step: 50.0 + step),
        series(completion__length=10.0, reward__mean=lambda step: 0.2 + 0.03 * step),
        series(until=22, completion__truncated=1.0),
        series(policy__entropy=0.2),
        series(until=22, engine__logprob_difference_mean=1.0),
        series(reward__regex__std=0.0, reward__regex__mean=0.5),
        series(policy__kl=0.09),
        series(optimizer__gradient_norm=4.0),
        with_round(0.70, 10),
        with_round(0.66, 20),
    ],
    ids=[
        "four steps without signal", "intervals that overlap", "a reward that does not rise", "slow growth",
        "shorter while the reward rises", "two steps truncated", "a fifth of the entropy", "two steps of drift",
        "a part that all completions earn", "a KL of 0.09", "eight times the usual gradient",
        "an AUC chance seldom gives", "one of more labels",
    ],
)  # fmt: skip
def test_values_below_the_thresholds_trigger_no_warning(lines: list[dict[str, Any]]) -> None:
    assert warnings_from(lines) == []


def test_shorter_completions_without_a_better_reward() -> None:
    ((name, _),) = begun(series(completion__length=10.0, reward__mean=0.2))
    assert name == "lengths"


def test_a_part_that_falls_as_another_rises() -> None:
    changes = {"reward__last_number__mean": lambda step: 0.3 - 0.01 * step, "reward__last_number__std": 0.01}
    ((name, _),) = begun(series(since=1, **changes))
    assert name == "one_part_of_the_reward"


def test_penalties_may_be_zero() -> None:
    lines = [
        {**line, "reward/overlong/mean": 0.0, "reward/overlong/std": 0.0, "reward/regex/std": 0.0} for line in series()
    ]
    assert warnings_of(lines, {**WEIGHTS, "overlong": 1.0}, 1e-4) == []


def test_a_warning_passes_after_some_steps_and_can_begin_again() -> None:
    lines = series(40, 10, 20, completion__truncated=1.0)
    notices = [
        (notice.step, notice.passed)
        for notice in warnings_from([*lines, *series(60, 1, completion__truncated=1.0)[40:]])
    ]
    assert notices == [(12, False), (19 + PATIENCE, True), (43, False)]


def test_a_short_break_does_not_end_a_warning() -> None:
    lines = series(40, 10, completion__truncated=lambda step: 0.5 if step % 8 == 0 else 1.0)
    assert begun(lines) == [("everything_truncated", 12)]


def test_missing_metrics_trigger_no_warning() -> None:
    lines: list[dict[str, Any]] = [{"step": step, "completion/length": 5.0} for step in range(1, 50)]
    assert warnings_from(lines) == []
    empty = [{name: None if "/" in name and name != "completion/length" else v for name, v in healthy(s).items()}
             for s in range(1, 50)]  # fmt: skip
    assert warnings_from(empty) == []


@pytest.mark.parametrize("cut", [5, 21, 23, 30])
def test_replaying_the_lines_gives_the_same_state(cut: int) -> None:
    for lines, _ in SHOWN.values():
        first, again = WarningMonitor(WEIGHTS, 1e-4), WarningMonitor(WEIGHTS, 1e-4)
        for line in lines[:cut]:
            first.see(line)
            again.see(json.loads(json.dumps(line)))
        assert [first.see(line) for line in lines[cut:]] == [again.see(line) for line in lines[cut:]]


def warnings_in(out: Path) -> list[dict[str, Any]]:
    events = read_lines(out / "events.jsonl")
    return [{k: v for k, v in event.items() if k != "time"} for event in events if event["kind"] == "warning"]


def test_a_run_warns_once_even_if_it_is_killed(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All completions of two tokens are truncated. A kill after the warning and before a checkpoint repeats it."""
    monkeypatch.setattr("gruppo.models.compatibility.eos_ids", lambda *_: ())
    changes = {"sampling__max_tokens": 2, "run__steps": 5}
    small_run(tiny_folder, tmp_path / "whole", **changes)
    (event,) = warnings_in(tmp_path / "whole")
    assert (event["warning"], event["state"], event["step"]) == ("everything_truncated", "begins", 3)
    assert event["evidence"]["completion/truncated"] == [1.0, 1.0, 1.0]
    assert event["link"] == "docs/warnings.md#everything-truncated"
    with killed(monkeypatch, "gruppo.training.run.TrainingRun._describe", 4):
        small_run(tiny_folder, tmp_path / "run", **changes)
    small_run(tiny_folder, tmp_path / "run", resume=True, **changes)
    assert warnings_in(tmp_path / "run") == [event]
