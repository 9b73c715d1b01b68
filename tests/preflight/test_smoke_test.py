"""The smoke test of `gruppo check`: it finds every fault planted in completions, rewards, advantages, the engine or the
gradient, and reports nothing where there is none."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gruppo.config.loading import load_recipe
from gruppo.models.ops.cpu.build import why_missing
from gruppo.preflight import smoke_test
from gruppo.preflight.check import check_recipe
from gruppo.preflight.findings import Finding
from gruppo.preflight.gradient_check import Derivative
from gruppo.preflight.smoke_test import (
    ENOUGH_GROUPS,
    SmokeTest,
    other_sizes,
    report_advantages,
    report_completions,
    report_engine_difference,
    report_gradient,
    report_rewards,
    report_smoke_test,
)
from gruppo.types import Group, Reward, Steps
from gruppo.utils.signals import Interrupted, Stop
from gruppo.utils.stats import wilson_interval
from tests.conftest import make_completion, make_group
from tests.preflight.test_check import data  # noqa: F401  # a fixture

pytestmark = pytest.mark.usefixtures("quick_workers")

NAMES = {"last_number": 1.0}


def recipe(**tables: Any):
    held = {"model": {"name": "m"}, "reward": {"functions": ["last_number"]}, "sampling": {"group_size": 4}}
    return load_recipe({**held, **tables})


def smoke_test_of(*rewards: list[float | None], sampling: float = 1.0, rewarding: float = 0.1) -> SmokeTest:
    groups = [make_group([1, 2], [[3, 4]] * len(each), each) for each in rewards]
    for group in groups:
        group.rewards = [Reward(r.total, {"last_number": r.total}, r.failure) for r in group.rewards]
    return SmokeTest(groups, sampling_seconds=sampling, reward_seconds=rewarding, complete=True)


def graded(findings: list[Finding]) -> dict[str, str]:
    return {each.subject: each.severity for each in findings}


@pytest.mark.parametrize(
    ("cut", "method", "severity"),
    [(0, {}, "ok"), (4, {}, "ok"), (6, {}, "warning"), (10, {}, "warning"), (10, {"mask_truncated": True}, "problem")],
)
def test_completions_that_are_cut(cut: int, method: dict, severity: str) -> None:
    completions = [make_completion([1, 2], "length" if place < cut else "stop") for place in range(10)]
    found = report_completions(completions, recipe(method=method))
    assert (found.severity, found.figures["truncated"]) == (severity, cut)
    assert ("emits an EOS token" in found.what) == (cut == 10)


@pytest.mark.parametrize(
    ("rewards", "method", "grades"),
    [
        ([0.0, 1.0, 1.0], {}, {"reward": "ok"}),
        ([1.0, 1.0, 1.0], {}, {"reward": "problem"}),
        ([1.0, 1.0, 1.0], {"name": "rft"}, {"reward": "warning"}),
        ([0.0, 0.0, 0.0], {"name": "rft"}, {"reward": "problem"}),
        ([None, 1.0, 0.0, 1.0, 0.0, 0.0], {}, {"excluded completions": "warning", "reward": "ok"}),
        ([None, 1.0, 0.0], {}, {"excluded completions": "problem", "reward": "ok"}),
        ([None, None], {}, {"excluded completions": "problem"}),
    ],
)
def test_rewards(rewards: list[float | None], method: dict, grades: dict) -> None:
    assert graded(report_rewards(recipe(method=method), smoke_test_of(rewards), NAMES)) == {
        **grades,
        "reward time": "ok",
    }


def test_a_constant_beside_a_reward_model_or_steps_is_no_problem() -> None:
    judged = recipe(reward_model={"kind": "outcome"})
    assert graded(report_rewards(judged, smoke_test_of([0.0, 0.0]), NAMES))["reward"] == "ok"
    stepwise = smoke_test_of([0.0, 0.0])
    stepwise.groups[0].rewards = [Reward(0.0, {}, steps={"last_number": Steps((each,), (0,))}) for each in (0.0, 1.0)]
    (found, _) = report_rewards(recipe(), stepwise, NAMES)
    assert (found.severity, found.what) == ("ok", "last_number 0 to 1, mean 0.5 (steps)")


@pytest.mark.parametrize(("count", "severity"), [(4, "warning"), (ENOUGH_GROUPS, "problem")])
def test_a_smoke_test_that_timed_out_is_not_conclusive(count: int, severity: str) -> None:
    some = smoke_test_of(*[[1.0] * 4] * count)
    some.complete = False
    assert report_rewards(recipe(), some, NAMES)[0].severity == severity
    assert report_advantages(recipe(), some, NAMES).severity == severity
    assert wilson_interval(0, ENOUGH_GROUPS)[1] < 0.15


def test_a_reward_that_takes_longer_than_sampling() -> None:
    slow = report_rewards(recipe(), smoke_test_of([0.0, 1.0], rewarding=1.5), NAMES)[-1]
    assert (slow.severity, slow.figures["seconds_each"]) == ("warning", 0.75)
    assert slow.what == "750 ms per completion, 48.0 s per step; sampling takes 32.0 s per step"


def test_the_share_of_groups_with_a_nonzero_advantage() -> None:
    found = report_advantages(
        recipe(), smoke_test_of([0.0, 1.0, 1.0, 1.0], [1.0] * 4, [0.0] * 4, [0.0, 0.0, 1.0, 1.0]), NAMES
    )
    assert (found.severity, found.figures["nonzero_advantage"], found.figures["groups"]) == ("ok", 2, 4)
    assert found.figures["share_at"] == pytest.approx(
        {"2": (1 / 2 + 2 / 3) / 4, "8": (2 - 0.75**8 - 0.25**8 - 2 * 0.5**8) / 4,
         "16": (2 - 0.75**16 - 0.25**16 - 2 * 0.5**16) / 4}
    )  # fmt: skip
    assert report_advantages(recipe(), smoke_test_of(*[[1.0] * 4] * 9, [0.0, 1.0]), NAMES).severity == "warning"
    assert report_advantages(recipe(), smoke_test_of(*[[1.0] * 4] * 9), NAMES).severity == "problem"
    judged = recipe(reward_model={"kind": "outcome"})
    assert report_advantages(judged, smoke_test_of(*[[1.0] * 4] * 9), NAMES).severity == "warning"


def test_other_group_sizes_follow_what_a_method_learns_from() -> None:
    groups = smoke_test_of([1.0, 0.0, 0.0, 0.0]).groups
    assert other_sizes(groups, recipe(method={"name": "rft"}).method, 4)[2] == pytest.approx(1 / 2)
    assert other_sizes(groups, recipe(method={"name": "rft"}).method, 4)[1] == pytest.approx(1 / 4)
    assert other_sizes(groups, recipe(method={"name": "dpo", "source": "policy"}).method, 4)[2] == pytest.approx(1 / 2)
    for name in ("reinforce-pp", "ppo", "grpo-process"):
        assert other_sizes(groups, recipe(method={"name": name}).method, 4) == {}
    assert smoke_test._differs(Counter(), 2, False) == 0


def test_the_chance_of_fewer_is_without_bias() -> None:
    """Over all groups of four that a rate of 0.3 gives, the estimate for pairs is that of pairs."""
    from itertools import product

    expected = 0.0
    for draws in product([0.0, 1.0], repeat=4):
        chance = 0.3 ** sum(draws) * 0.7 ** (4 - sum(draws))
        expected += chance * other_sizes(smoke_test_of(list(draws)).groups, recipe().method, 4)[2]
    assert expected == pytest.approx(2 * 0.3 * 0.7)


@pytest.mark.parametrize(("apart", "dtype", "severity"), [
    (1e-5, "float32", "ok"), (1e-3, "float32", "problem"), (0.03, "bfloat16", "ok"), (0.1, "bfloat16", "problem"),
    (float("nan"), "float32", "problem"),
])  # fmt: skip
def test_engine_and_trainer(apart: float, dtype: str, severity: str) -> None:
    finding = report_engine_difference(torch.full((5,), apart), getattr(torch, dtype))
    assert finding.severity == severity
    assert f"bound of the mean in {dtype}: " in finding.what


@pytest.mark.parametrize(("made", "own", "severity"), [
    (Derivative([1.0, 2.0], [1.0, 2.001], "float32", "float64"), False, "ok"),
    (Derivative([1.0, 2.0], [1.0, 2.5], "float32", "float64"), False, "problem"),
    (Derivative([1.0, 2.0], [1.0, 2.5], "float32", "float64"), True, "warning"),
    (Derivative([1.0], [1.05], "float32", "float32"), False, "ok"),
    (Derivative([1.0, 2.0], [1.0, 2.5], "bfloat16", "float64"), False, "ok"),
    (Derivative([float("nan")], [1.0], "float32", "float64"), False, "problem"),
])  # fmt: skip
def test_gradients(made: Derivative, own: bool, severity: str) -> None:
    assert report_gradient(made, own).severity == severity


class _Pool:
    names, weights = ["last_number"], [1.0]


def test_what_took_too_long_is_said() -> None:
    (none,) = report_smoke_test(recipe(), SmokeTest(timed_out=True), {"r": 1.0}, 5)
    assert (none.severity, "in 5 s" in none.what) == ("warning", True)
    hung = SmokeTest(unscored=smoke_test_of([None, None]).groups, sampling_seconds=1.0, timed_out=True)
    assert graded(report_smoke_test(recipe(), hung, {"r": 1.0}, 5)) == {"completions": "ok", "reward": "problem"}


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(smoke_test.time, "monotonic", lambda: now[0])
    stop = Stop()
    until = smoke_test._Deadline(stop, 5.0)
    until.check()
    now[0] = 5.5
    with pytest.raises(smoke_test._TimeUp):
        until.check()
    stop.request()
    with pytest.raises(Interrupted):
        until.check()


def whole(data: dict, *overrides: str, **options: Any) -> dict[str, Finding]:  # noqa: F811
    return {each.subject: each for each in check_recipe(data, overrides=overrides, **options).findings}


def test_a_whole_check_of_a_recipe_that_is_right(data: dict) -> None:  # noqa: F811
    found = whole(data)
    assert {name: each.severity for name, each in found.items() if not name.startswith("row ")} == {
        **dict.fromkeys(["recipe", "model", "EOS tokens", "padding", "prompts", "memory", "time", "reward"], "ok"),
        **dict.fromkeys(["disk", "reward time", "nonzero advantage", "engine", "gradient"], "ok"),
        "kernels": "ok" if why_missing(torch.float32) is None else "note",
        "chat template": "note",
        "gradient noise": "note",
        "overlap": "warning",
        "completions": "warning",
    }
    assert found["gradient noise"].figures["groups"] == 18
    assert found["nonzero advantage"].figures["groups"] == 18
    assert found["overlap"].figures["exact"] == 4


def test_rounds_grow_and_every_prompt_is_sampled_once(
    data: dict, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    rounds, score = [], smoke_test.score_groups

    def counted(prompts, *rest):
        rounds.append([prompt.id for prompt in prompts])
        return score(prompts, *rest)

    monkeypatch.setattr(smoke_test, "score_groups", counted)
    whole(data)
    assert [len(each) for each in rounds] == [1, 2, 4, 4, 4, 3], "16 slots hold 4 groups of 4"
    assert len({each for names in rounds for each in names}) == 18


def test_quick_samples_nothing(data: dict, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(smoke_test, "run_smoke_test", lambda *_: pytest.fail("it sampled"))
    found = whole(data, quick=True)
    assert (found["completions"].severity, "--quick" in found["completions"].what) == ("note", True)
    assert found["gradient"].severity == "ok"
    assert not {"reward", "nonzero advantage", "engine"} & found.keys()


def test_an_engine_that_samples_from_another_distribution(
    data: dict, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    sample = smoke_test.sample_groups

    def warmer(engine, prompts, streams, options, *rest):
        import dataclasses

        return sample(engine, prompts, streams, dataclasses.replace(options, temperature=0.5), *rest)

    monkeypatch.setattr(smoke_test, "sample_groups", warmer)
    assert whole(data)["engine"].severity == "problem"


@pytest.mark.parametrize(
    ("function", "grades"),
    [
        ("never", {"excluded completions": "problem"}),
        ("length", {"reward": "ok"}),
        ("always_half", {"reward": "problem", "nonzero advantage": "problem"}),
    ],
)
def test_rewards_of_all_kinds(data: dict, function: str, grades: dict) -> None:  # noqa: F811
    found = whole(data, f'reward.functions=["tests/rewards/functions.py:{function}"]')
    assert {name: found[name].severity for name in grades} == grades


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_rows_sample_nothing(tiny_folder: str, tmp_path: Path, name: str) -> None:
    import json

    row = {"prompt": "ab", "completion": "abc", "chosen": "abc", "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) * 1 + "\n" + json.dumps({**row, "prompt": "b"}))
    found = whole(
        {
            "model": {"name": tiny_folder, "device": "cpu", "dtype": "float32"},
            "task": {"name": str(tmp_path / "rows.jsonl")},
            "method": {"name": name, "source": "dataset"},
            "sampling": {"max_tokens": 8, "prompts_per_step": 2},
        }
    )
    assert 'method.source = "dataset"' in found["completions"].what
    assert found["gradient"].severity == "ok"
    assert "rows of at most" not in found["recipe"].what


def test_overlong_rows_are_counted(data: dict, tmp_path: Path) -> None:  # noqa: F811
    path = Path(data["task"]["name"])
    path.write_text(path.read_text() + '{"prompt": "' + "a" * 125 + '", "answer": "a"}\n')
    data["evaluation"]["questions"] = 4
    found = whole(data, quick=True)
    assert (found["prompts"].severity, found["prompts"].figures["too_long"]) == ("problem", 1)
    assert "row 19" in found["prompts"].why
    assert whole(data, 'task.overlong="filter"', quick=True)["prompts"].severity == "warning"


def test_groups_are_left_as_they_were() -> None:
    made = smoke_test_of([0.0, 1.0])
    report_advantages(recipe(), made, NAMES)
    assert made.groups == [Group(made.groups[0].prompt, made.groups[0].completions, made.groups[0].rewards)]
